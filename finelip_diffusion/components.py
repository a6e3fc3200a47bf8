"""The text encoders of a pipeline, made long: what takes the place of a stock one, and `attach` for any pipeline."""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .positions import stretch_positions
from .text_encoder import TextEncoder, check_width, load_text_encoder, text_embeddings

logger = logging.getLogger(__name__)

STOCK_POSITIONS = 77
"""Positions of CLIP's text tower as it was published: an encoder with more of them is a long one."""


def attach(pipe: DiffusionPipeline, finelip: str | Path | None = None, **options: Any) -> DiffusionPipeline:
    """Gives a long text encoder to other diffusers pipelines that read through CLIP: img2img, inpaint, ControlNet.

    The pipeline stays diffusers' own and reads 248 tokens by itself; strategies other than "stretch", and `clip_skip`
    where diffusers has it broken, are the business of this package's pipelines. SDXL gets both encoders, the second
    stretched without training. The UNet stays: one that was adapted to the encoder is given to the pipeline by
    `pipe.register_modules(unet=...)`.

    Args:
        pipe: The pipeline; its components are replaced, never changed, so others that share them keep theirs.
        finelip: Any source of `load_text_encoder`; None stretches the pipeline's own encoder without training.
        **options: For `load_text_encoder`, such as `pad_token`.

    Returns:
        `pipe`.

    Raises:
        ValueError: If the pipeline has a text encoder that is no CLIP, or none for `finelip` to replace, is already
            set up for offloading, or its UNet reads another width; and whatever `load_text_encoder` raises.
    """
    encoders = {name: part for name, part in pipe.components.items() if name in ("text_encoder", "text_encoder_2")}
    encoders = {name: part for name, part in encoders.items() if part is not None}
    foreign = [
        f"{name} ({type(part).__name__})" for name, part in encoders.items() if not isinstance(part, TextEncoder)
    ]
    if foreign or not encoders or "text_encoder_3" in pipe.components:
        parts = ", ".join(foreign) or "no CLIP text encoders alone"
        raise ValueError(f"{type(pipe).__name__} reads prompts through {parts}: attach needs CLIP text encoders only.")
    if finelip is not None and "text_encoder" not in encoders:
        raise ValueError(f"{type(pipe).__name__} has no text_encoder that finelip={finelip} could replace.")
    if any(hasattr(part, "_hf_hook") for part in encoders.values()):
        raise ValueError("the pipeline is set up for offloading already: attach first, then enable the offloading.")
    replaced: dict[str, Any] = {}
    for name, text_encoder in encoders.items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        source = finelip if name == "text_encoder" else None
        replaced[name], replaced[tokenizer] = long_encoder(
            text_encoder, getattr(pipe, tokenizer), source, warn=name == "text_encoder", **options
        )
    check_widths([replaced[name] for name in encoders], pipe.components.get("unet"))
    pipe.register_modules(**replaced)
    return pipe


def long_encoder(
    text_encoder: TextEncoder | None,
    tokenizer: CLIPTokenizer | None,
    finelip: str | Path | None = None,
    *,
    warn: bool = True,
    **options: Any,
) -> tuple[TextEncoder | None, CLIPTokenizer | None]:
    """Finds the encoder that takes the place of `text_encoder`, in its dtype and on its device, and its tokenizer.

    Args:
        text_encoder: What the place holds; None where it is empty.
        tokenizer: Its tokenizer.
        finelip: Any source of `load_text_encoder`; None stretches `text_encoder` if it is a stock one.
        warn: Whether stretching without training is said.
        **options: For `load_text_encoder`.

    Returns:
        The encoder and a tokenizer of its length. What was given is never changed: copies are.

    Raises:
        ValueError: If `text_encoder` has a LoRA that its replacement would lack; and whatever `load_text_encoder`
            raises.
    """
    if finelip is not None:
        if text_encoder is None:
            return load_text_encoder(finelip, **options)
        adapters = ", ".join(getattr(text_encoder, "peft_config", ()))
        if adapters:
            raise ValueError(
                f"the text encoder has a LoRA ({adapters}), which would stay behind when finelip={finelip} replaces "
                "it: unload_lora_weights() first, and load it again afterwards."
            )
        projection = isinstance(text_encoder, CLIPTextModelWithProjection)
        options = {"projection": projection, "dtype": text_encoder.dtype, **options}
        found, its_tokenizer = load_text_encoder(finelip, **options)
        if tokenizer is not None:
            _bring_embeddings(text_encoder, tokenizer, found, its_tokenizer)
        return found.to(text_encoder.device), its_tokenizer
    if text_encoder is None or tokenizer is None:
        return text_encoder, tokenizer
    if is_stock(text_encoder):
        if warn:
            logger.warning(
                "the text encoder is stretched from %d positions without training: prompts of more than 20 tokens "
                "are read differently, and worse than by a trained one (finelip=).",
                text_encoder.config.max_position_embeddings,
            )
        text_encoder = _stretched(text_encoder)
    if tokenizer.model_max_length != text_encoder.config.max_position_embeddings:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_max_length = text_encoder.config.max_position_embeddings
    return text_encoder, tokenizer


def _bring_embeddings(
    source: TextEncoder, its_tokenizer: CLIPTokenizer, target: TextEncoder, tokenizer: CLIPTokenizer
) -> None:
    """Copies textual inversions, the tokens that were added behind the vocabulary, from one encoder to another."""
    known = tokenizer.get_vocab()
    new = {place: token for place, token in its_tokenizer.added_tokens_decoder.items() if token.content not in known}
    table = source.get_input_embeddings().weight.data
    if not new or table.shape[1] != target.get_input_embeddings().embedding_dim:  # which `check_width` is going to say
        return
    tokenizer.add_tokens(list(new.values()))
    target.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = target.get_input_embeddings().weight.data
    for place, token in new.items():
        rows[tokenizer.convert_tokens_to_ids(token.content)] = table[place].to(rows)


def _stretched(text_encoder: TextEncoder) -> TextEncoder:
    """A copy with a longer position table."""
    text_encoder = copy.deepcopy(text_encoder)
    embeddings = text_embeddings(text_encoder)
    table = stretch_positions(embeddings.position_embedding.weight)
    embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)
    embeddings.position_ids = torch.arange(len(table), device=table.device).unsqueeze(0)
    text_encoder.config.max_position_embeddings = len(table)
    return text_encoder


def is_stock(text_encoder: TextEncoder | None) -> bool:
    """Whether there is an encoder, of no more positions than CLIP's."""
    return text_encoder is not None and text_encoder.config.max_position_embeddings <= STOCK_POSITIONS


def check_widths(text_encoders: list[TextEncoder | None], unet: UNet2DConditionModel | None) -> None:
    """`check_width` for the encoders there are; the SDXL refiner has only one, diffusers allows none at all."""
    there = [text_encoder for text_encoder in text_encoders if text_encoder is not None]
    if there and unet is not None:
        check_width(there, unet)
