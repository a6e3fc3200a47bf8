"""From a call to pictures: the batch decides nothing, so prompts of different lengths are drawn in groups of one."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .prompt_encoder import PromptEncoder


def draw(encoder: PromptEncoder, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """diffusers' `__call__` with the states of whole prompts in the place of texts.

    The UNet attends to every state that it gets, those that fill a short prompt up to the length of a long one
    included. So prompts that have different lengths, or that `"auto"` reads differently, are drawn in groups, one
    after the other, each from the noise that it has in the whole batch: a picture is the one that its prompt gets
    alone. A callback sees one group after the other.

    Args:
        encoder: Reads the prompts.
        own: `__call__` of the pipeline's class in diffusers, bound.
        args: Its arguments.
        kwargs: The others.

    Returns:
        As in diffusers.

    Raises:
        ValueError: As for `PromptEncoder.ready`, and whatever diffusers refuses.
    """
    given = inspect.signature(own).bind(*args, **kwargs)
    given.apply_defaults()
    call, pipe = given.arguments, encoder.pipeline
    guided = call["guidance_scale"] > 1 and pipe.unet.config.time_cond_proj_dim is None
    device, scale = pipe._execution_device, (call["cross_attention_kwargs"] or {}).get("scale")
    groups = encoder.ready_groups(call, guided, device, scale)
    if len(groups) == 1:
        call |= groups[0][1]
        return own(*given.args, **given.kwargs)
    count, number = call["num_images_per_prompt"], sum(len(rows) for rows, _ in groups)
    if call["latents"] is None and not isinstance(call["generator"], list):
        dtype = groups[0][1]["prompt_embeds"].dtype
        call["latents"] = randn_tensor(_shape(pipe, call, number * count), call["generator"], device, dtype)
    shared, outputs, order = dict(call), [], []
    for rows, ready in groups:
        images = [row * count + k for row in rows for k in range(count)]
        order += images
        parts = {name: _rows(shared[name], images) for name in ("generator", "latents")}
        call |= shared | ready | parts | {"return_dict": True}
        outputs.append(own(*given.args, **given.kwargs))
    names = [field.name for field in fields(outputs[0])]
    found = {name: _joined([getattr(each, name) for each in outputs], order) for name in names}
    return type(outputs[0])(**found) if shared["return_dict"] else tuple(found.values())


def _rows(value: Any, images: list[int]) -> Any:
    """What of an argument belongs to some of the images: of a list or a tensor of all of them."""
    if isinstance(value, Tensor):
        return value[images]
    return [value[k] for k in images] if isinstance(value, list) else value


def _joined(parts: Sequence[Any], order: list[int]) -> Any:
    """What several calls have drawn, in the order of the whole one."""
    if parts[0] is None:
        return None
    every = [each for part in parts for each in part]
    placed = [every[order.index(k)] for k in range(len(every))]
    if isinstance(parts[0], Tensor):
        return torch.stack(placed)
    return np.stack(placed) if isinstance(parts[0], np.ndarray) else placed


def _shape(pipe: Any, call: dict[str, Any], images: int) -> tuple[int, int, int, int]:
    """Of the noise that diffusers would draw."""
    own = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
    sides = [side * pipe.vae_scale_factor for side in ([own, own] if isinstance(own, int) else own)]
    height, width = call["height"], call["width"]
    if not hasattr(pipe, "text_encoder_2") and not (height and width):
        height = width = None  # without SDXL's second encoder, diffusers takes both or neither
    height, width = (int(side) // pipe.vae_scale_factor for side in (height or sides[0], width or sides[1]))
    return images, pipe.unet.config.in_channels, height, width
