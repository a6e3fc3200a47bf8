"""The memory of a step of image tuning, counted on the meta device before anything is loaded onto a real one."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .low_rank import adapt_encoder, adapt_unet
from .tuning import Conditioning, Noised, Parts, encode


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel of attention keeps: queries, keys, values, the output; no table of pairs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("memory is counted of the forward pass alone")


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class Counter:
    """Bytes that autograd keeps of a forward pass, each storage once, weights left out."""

    def __init__(self, weights: nn.Module):
        self._known = {weight.untyped_storage()._cdata for weight in weights.parameters()}
        self._held: list[Any] = []  # or a new storage may get the address of an old one
        self.kept, self.recomputed = 0, 0
        self._inside: int | None = None  # bytes of a checkpointed block so far

    @contextmanager
    def counting(self) -> Any:
        """Counts what happens in its block."""
        with torch.autograd.graph.saved_tensors_hooks(self._take, lambda tensor: tensor), _FusedAttention():
            yield

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Takes the place of `torch.utils.checkpoint.checkpoint`: what goes in is kept, and what is inside is not."""
        for each in args:
            if isinstance(each, Tensor):
                self._take(each)
        self._inside = 0
        known = set(self._known)
        result = function(*args, **kwargs)
        self.recomputed, self._inside, self._known = max(self.recomputed, self._inside), None, known
        return result

    def _take(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._held.append(storage)
            if self._inside is None:
                self.kept += storage.nbytes()
            else:
                self._inside += storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        """At the worst moment: what is kept, and the block that is being computed again."""
        return self.kept + self.recomputed


def activation_bytes(
    parts: Parts,
    batch_size: int,
    length: int,
    side: int,
    dtype: torch.dtype,
    checkpointing: bool,
    encoder_rank: int | None = None,
    unet_rank: int | None = None,
) -> int:
    """Bytes that a step keeps for its backward pass of one prediction, as autograd says itself.

    Args:
        parts: Of the pipeline; nothing of it is moved or computed with.
        batch_size: Examples.
        length: Token states that the UNet reads.
        side: Pixels.
        dtype: Of the UNet, and of autocast.
        checkpointing: Whether activations are recomputed.
        encoder_rank: Of adapters in the encoders.
        unet_rank: Of adapters in the UNet; the encoders are frozen then.
    """
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(parts.unet.config)
        encoders = [type(place.encoder)(place.encoder.config) for place in parts.places.values()]
    unet.requires_grad_(False)
    for encoder in encoders:
        encoder.requires_grad_(unet_rank is None).train()
        if encoder_rank and unet_rank is None:
            adapt_encoder(encoder, encoder_rank)
    if unet_rank:
        adapt_unet(unet, unet_rank)
    both = nn.ModuleList([unet, *encoders]).to("meta", dtype)
    counter = Counter(both)
    if checkpointing:
        module: Any
        for module in both.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = counter.checkpoint
    latent = side // 2 ** (len(parts.vae.config.block_out_channels) - 1)
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    noisy = torch.empty(batch_size, unet.config.in_channels, latent, latent, dtype=dtype, device="meta")
    noised = Noised(noisy, torch.zeros(batch_size, device="meta"), torch.zeros(batch_size, 6, device="meta"))
    with counter.counting():
        read = encode(encoders, [ids] * len(encoders), parts.is_xl)
        _predict(unet, noised, read)
    return counter.total


def _predict(unet: Any, noised: Noised, read: Conditioning) -> Tensor:
    added = None if read.pooled is None else {"text_embeds": read.pooled, "time_ids": noised.time_ids}
    return unet(noised.noisy, noised.timesteps, read.states, added_cond_kwargs=added, return_dict=False)[0]
