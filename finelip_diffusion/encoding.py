"""Readings in, token states out: windows through a CLIP text encoder, joined and brought to one length."""

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from .prompts import Reading, Window
from .text_encoder import TextEncoder, final_layer_norm


def encode_readings(
    readings: list[Reading],
    text_encoder: TextEncoder,
    tokenizer: CLIPTokenizer,
    length: int,
    *,
    device: torch.device | str = "cpu",
    layer: int = -1,
    norm: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Encodes prompts that are cut into windows, all windows in one batch, each padded to the full window.

    Args:
        readings: B prompts.
        text_encoder: Reads `reading.window_length` tokens at once.
        tokenizer: Names the start, end and padding tokens.
        length: Token states wanted; a shorter prompt goes on with windows of the empty prompt, a longer one is cut.
        device: Where the encoder is.
        layer: Index into the hidden states, -1 for the last layer.
        norm: Whether the final LayerNorm follows.

    Returns:
        (B, length, D) token states, and the (B, E) pooled output of each prompt's first window, or None where the
        encoder has no projection.

    Raises:
        ValueError: If the encoder has no such layer.
    """
    windows = [window for reading in readings for window in reading.windows]
    if any(length > reading.length or reading.span_length for reading in readings):
        windows.append(())  # what shorter prompts go on with
    input_ids = torch.tensor([_frame(window, readings[0].window_length, tokenizer) for window in windows])  # (W, T)
    output = text_encoder(input_ids.to(device), output_hidden_states=True)
    if not -len(output.hidden_states) <= layer <= -1:
        layers = len(output.hidden_states) - 1
        raise ValueError(f"clip_skip asks for layer {layers + 1 + layer} of a text encoder that has {layers} layers.")
    states = output.hidden_states[layer]  # (W, T, D)
    if norm:
        states = final_layer_norm(text_encoder)(states)
    empty = states[-1]

    rows, firsts, used = [], [], 0
    for reading in readings:
        firsts.append(used)
        spans = []
        for span in reading.spans:
            span_states = _join(states[used : used + len(span)], span)
            spans.append(_fit(span_states, reading.span_length or len(span_states), empty))
            used += len(span)
        rows.append(_fit(torch.cat(spans), length, empty))
    pooled = getattr(output, "text_embeds", None)
    return torch.stack(rows), None if pooled is None else pooled[firsts]


def _frame(window: Window, length: int, tokenizer: CLIPTokenizer) -> list[int]:
    """Start token, content, end token, padding: `length` ids."""
    padding = [tokenizer.pad_token_id] * (length - 2 - len(window))
    return [tokenizer.bos_token_id, *window, tokenizer.eos_token_id, *padding]


def _join(states: Tensor, span: tuple[Window, ...]) -> Tensor:
    """(windows, T, D) -> (T', D): the start of the first, the content of all, the end and padding of the last."""
    parts = [states[0, :1], *(row[1 : 1 + len(window)] for row, window in zip(states, span, strict=True))]
    return torch.cat([*parts, states[-1, 1 + len(span[-1]) :]])


def _fit(states: Tensor, length: int, empty: Tensor) -> Tensor:
    """(T, D) -> (length, D): cut, or continued with (T_empty, D) as often as it takes."""
    missing = max(length - len(states), 0)
    return torch.cat([states[:length], empty.repeat(-(-missing // len(empty)), 1)[:missing]])
