"""Readings in, token states out: windows through a CLIP text encoder, joined and brought to one length."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from .files import writing
from .prompts import Reading, Run, Window
from .text_encoder import TextEncoder, final_layer_norm
from .weighting import compel_is_missing


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
        encoder has no projection. Weights of words change the states, not the pooled output.

    Raises:
        ValueError: If the encoder has no such layer, or a prompt has weights and compel is not installed.
    """
    windows = [window for reading in readings for window in reading.windows]
    continued = any(length > reading.length or reading.span_length or reading.window_weights for reading in readings)
    if continued and () not in windows:
        windows.append(())  # what shorter prompts go on with
    input_ids = torch.tensor([_frame(window, readings[0].window_length, tokenizer) for window in windows])  # (W, T)
    states, pooled = encode_layer(text_encoder, input_ids.to(device), layer, norm)  # (W, T, D), (W, E)
    empty = states[windows.index(()) if continued else -1]
    runs = [run for reading in readings for run in _runs(reading)]
    uneven = [k for k, own in enumerate(runs) if own]
    if uneven:
        read = [(windows[k], runs[k]) for k in uneven]
        weighed = weigh(read, text_encoder, tokenizer, device=device, layer=layer, norm=norm)
        states = states.index_copy(0, torch.tensor(uneven, device=states.device), torch.stack(list(weighed)))

    rows, firsts, used = [], [], 0
    for reading in readings:
        firsts.append(used)
        spans = []
        for span in reading.spans:
            own = states[used : used + len(span)]
            if reading.window_weights:
                first = used - firsts[-1]
                weights = own.new_tensor(reading.window_weights[first : first + len(span)])
                own = empty + weights[:, None, None] * (own - empty)
            span_states = _join(own, span)
            spans.append(_fit(span_states, reading.span_length or len(span_states), empty))
            used += len(span)
        rows.append(_fit(torch.cat(spans), length, empty))
    return torch.stack(rows), None if pooled is None else pooled[firsts]


def _runs(reading: Reading) -> list[list[Run]]:
    """By window, the runs of its tokens that weigh other than 1."""
    runs, start = [], 0
    for window in reading.windows:
        stop = start + len(window)
        inside = [(max(a, start) - start, min(b, stop) - start, w) for a, b, w in reading.weights]
        runs.append([run for run in inside if run[0] < run[1]])
        start = stop
    return runs


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


def encode_layer(
    text_encoder: TextEncoder, input_ids: Tensor, layer: int, norm: bool, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Runs a text encoder for the states of one layer.

    Args:
        text_encoder: A CLIP text encoder.
        input_ids: (B, T).
        layer: Index into the hidden states, -1 for the last layer.
        norm: Whether the final LayerNorm follows.
        attention_mask: (B, T), 1 for what may be attended to, or None.

    Returns:
        (B, T, D) states, and (B, E) pooled output, or None where the encoder has no projection.

    Raises:
        ValueError: If the encoder has no such layer.
    """
    if layer == -1 and norm:  # the encoder's own output: no need to keep the states of every layer
        output = text_encoder(input_ids, attention_mask)
        return output.last_hidden_state, getattr(output, "text_embeds", None)
    output = text_encoder(input_ids, attention_mask, output_hidden_states=True)
    if not -len(output.hidden_states) <= layer <= -1:
        layers = len(output.hidden_states) - 1
        raise ValueError(f"clip_skip asks for layer {layers + 1 + layer} of a text encoder that has {layers} layers.")
    states = output.hidden_states[layer]
    return final_layer_norm(text_encoder)(states) if norm else states, getattr(output, "text_embeds", None)


@dataclass
class _Layer:
    """A text encoder as compel takes it, whose last layer is the one that the UNet reads."""

    text_encoder: TextEncoder
    layer: int
    norm: bool

    def __getattr__(self, name: str) -> Any:
        return getattr(self.text_encoder, name)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        states, _ = encode_layer(self.text_encoder, input_ids, self.layer, self.norm, attention_mask)
        return type("Output", (), {"last_hidden_state": states})


def weigh(
    windows: list[tuple[Window, list[Run]]],
    text_encoder: TextEncoder,
    tokenizer: CLIPTokenizer,
    *,
    device: torch.device | str = "cpu",
    layer: int = -1,
    norm: bool = True,
) -> Iterator[Tensor]:
    """Encodes windows whose tokens weigh differently, as compel does.

    A token of weight w gets the state e + w (z - e), where z is its state and e that of the empty prompt. What weighs
    less than 1 is also taken back: the states of a pass without it (masked out of the attention) are mixed in with
    tan((1 - w) pi / 2), against 1 for those of the whole.

    Args:
        windows: Content tokens of each window, and the runs of them that weigh other than 1.
        text_encoder: Reads `tokenizer.model_max_length` tokens at once.
        tokenizer: Names the start, end and padding tokens.
        device: Where the encoder is.
        layer: Index into the hidden states, -1 for the last layer.
        norm: Whether the final LayerNorm follows.

    Yields:
        (T, D) states of one window after the other.

    Raises:
        ValueError: If compel is not installed.
    """
    try:
        from compel.embeddings_provider import EmbeddingsProvider
    except ImportError as error:
        raise compel_is_missing() from error

    class Provider(EmbeddingsProvider):
        """Reads fragments that are token ids already, so that windows and counts are those of the prompt's report."""

        def get_token_ids(self, texts: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
            return [list(ids) for ids in texts]

    provider = Provider(tokenizer, _Layer(text_encoder, layer, norm), device=device)
    for window, runs in windows:
        bounds = sorted({0, len(window), *(bound for run in runs for bound in run[:2])})
        pairs = [(first, last) for first, last in pairwise(bounds) if first < last]
        weight_of = {run[0]: run[2] for run in runs}
        yield provider.get_embeddings_for_weighted_prompt_fragments(
            [[window[first:last] for first, last in pairs]],
            [[weight_of.get(first, 1.0) for first, _ in pairs]],
            device=device,
        )[0]


@dataclass(frozen=True, eq=False)
class PromptEmbeds(Mapping[str, Tensor]):
    """What a pipeline's `encode` makes of prompts, to draw from as often as wanted: `pipe(**embeds)`.

    Attributes:
        prompt_embeds: (B, T, D) states of the prompts.
        negative_prompt_embeds: (B, T, D) states of the negative prompts.
        pooled_prompt_embeds: (B, E), SDXL's, or None.
        negative_pooled_prompt_embeds: (B, E), SDXL's, or None.
        metadata: What was encoded, and how.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        names = (entry.name for entry in fields(self) if entry.name != "metadata")
        return (name for name in names if getattr(self, name) is not None)

    def __contains__(self, name: object) -> bool:
        return any(name == own for own in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)  # tuple() would ask for the length

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, atomically.

        Raises:
            ValueError: If it cannot be written. One sentence.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.items()}
        with writing(path) as part:
            save_file(tensors, part, metadata={"format": "pt", **self.metadata})

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "PromptEmbeds":
        """Reads what `save` wrote.

        Args:
            path: The file.
            device: Where the tensors go.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is none of `save`'s.
        """
        try:
            with safe_open(path, framework="pt", device=device) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = dict(file.metadata() or {})
            return cls(**tensors, metadata={key: value for key, value in metadata.items() if key != "format"})
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{path} holds no encoded prompts of PromptEmbeds.save: encode them again.") from error
