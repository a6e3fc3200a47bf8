"""Where the UNet looks: its cross-attention to the tokens of a prompt, as maps over the image."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from .prompts import PromptReport


@dataclass
class AttentionMaps:
    """Cross-attention of one call of a pipeline, averaged over steps, layers and heads.

    Attributes:
        sums: (B, T, h, w) for each grid (h, w) that the UNet attends on: what the grid's points gave to each of the T
            token states, summed over calls of its layers. Under guidance, of the conditional half alone.
        calls: How many calls of layers were summed, over all grids.
        size: Height and width of the images in pixels.
    """

    sums: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    calls: int = 0
    size: tuple[int, int] = (0, 0)

    def of(self, report: PromptReport, start: int, stop: int, image: int = 0) -> np.ndarray:
        """The share of its attention that each pixel gave to a part of the prompt, such as a sentence.

        Give whole sentences, the full stop included. CLIP reads from left to right, so that the states of a sentence's
        last tokens are those that know all of it; the words in front of them may draw no attention at all.

        Args:
            report: What `describe_prompt` says of the prompt under the strategy that it was drawn with.
            start: The part's first character.
            stop: The character after its last one.
            image: Number of the image in the call.

        Returns:
            (H, W), float32 in 0..1.

        Raises:
            ValueError: If nothing was drawn, the report is of a prompt with more states than were, or no encoder read
                that part of the prompt.
        """
        if not self.sums:
            raise ValueError("no image was drawn while attention was recorded: call the pipeline inside the block.")
        positions = sorted(
            {
                position
                for reading in report.readings
                for (first, _), position in zip(reading.offsets, reading.positions, strict=False)
                if start <= first < stop
            }
        )
        states = next(iter(self.sums.values())).shape[1]
        if report.readings[0].length > states:
            raise ValueError(
                f"the report is of a prompt of {report.readings[0].length} states, but one of {states} was drawn: "
                "describe the prompt with the strategy that it was drawn with."
            )
        if not positions:
            raise ValueError(
                f"no encoder reads characters {start} to {stop} of the prompt under long_prompt="
                f"{report.long_prompt!r}: nothing in the image can come from there."
            )
        shares = [
            F.interpolate(grid[image, positions].float().sum(0)[None, None], size=self.size, mode="bilinear")
            for grid in self.sums.values()
        ]
        return (torch.stack(shares).sum(0)[0, 0] / self.calls).cpu().numpy()


@contextmanager
def record_attention(pipe: DiffusionPipeline) -> Iterator[AttentionMaps]:
    """Records where the UNet looks for each token, in one call of a pipeline inside the block.

    The layers work as they are, whatever attention processor they use, and their inputs are only watched: images are
    the same bit by bit. Softmax maps are computed beside them, a head at a time. IP-Adapters are not covered. All
    prompts of the call have one length: those of different lengths are drawn in groups, each a call of its own.

    Args:
        pipe: Any pipeline with the UNet of Stable Diffusion 1.x, 2.x or XL.

    Yields:
        The maps, complete when the call has returned.

    Raises:
        ValueError: If the UNet has no cross-attention layers of that kind; in the call, if its prompts come out at
            different lengths.
    """
    maps, grid = AttentionMaps(), [0, 0]

    def see_image(unet: Any, args: tuple[Any, ...]) -> None:
        height, width = args[0].shape[-2:]
        maps.size = (height * pipe.vae_scale_factor, width * pipe.vae_scale_factor)

    def see_grid(transformer: Any, args: tuple[Any, ...]) -> None:
        grid[:] = args[0].shape[-2:]

    def see_attention(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states, text = args[0], kwargs["encoder_hidden_states"]  # (B, h * w, C), (B, T, D)
        if pipe.do_classifier_free_guidance:
            states, text = states.chunk(2)[1], text.chunk(2)[1]
        weights = attention_weights(attention, states, text).mT.unflatten(-1, tuple(grid))  # (B, T, h, w)
        key = (grid[0], grid[1])
        sums = maps.sums.setdefault(key, torch.zeros_like(weights))
        if sums.shape != weights.shape:
            raise ValueError(
                f"attention is recorded to {sums.shape[1]} states and to {weights.shape[1]} in one call: the prompts "
                "have different lengths, so record those of each length in a call of their own."
            )
        sums += weights
        maps.calls += 1

    transformers = [module for module in pipe.unet.modules() if isinstance(module, Transformer2DModel)]
    if not transformers:
        raise ValueError(f"{type(pipe.unet).__name__} has no transformer blocks: there is nothing to record.")
    with ExitStack() as hooks:
        hooks.callback(pipe.unet.register_forward_pre_hook(see_image).remove)
        for transformer in transformers:
            hooks.callback(transformer.register_forward_pre_hook(see_grid).remove)
            for block in transformer.transformer_blocks:
                hooks.callback(block.attn2.register_forward_pre_hook(see_attention, with_kwargs=True).remove)
        yield maps


def attention_weights(attention: Any, states: Tensor, text: Tensor) -> Tensor:
    """What each image state attends to, `softmax(Q K^T / sqrt(d))`, averaged over heads.

    Args:
        attention: A cross-attention layer of diffusers.
        states: (B, P, C), image states.
        text: (B, T, D), text states.

    Returns:
        (B, P, T), float32; rows sum to 1.
    """
    heads = [
        layer(inputs).unflatten(-1, (attention.heads, -1)).movedim(2, 0).float()
        for layer, inputs in ((attention.to_q, states), (attention.to_k, text))
    ]
    # One head at a time: all at once would hold (heads, B, P, T), gigabytes for SDXL and a long prompt.
    return sum((q @ k.mT * attention.scale).softmax(-1) for q, k in zip(*heads, strict=True)) / attention.heads
