"""How pipelines read prompts: which encoder reads what, in which share, and how it all comes to one length."""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor
from transformers import CLIPTokenizer

from .components import STOCK
from .encoding import PromptEmbeds, encode_readings
from .positions import STOCK_POSITIONS
from .prompts import LONG_PROMPTS, Cut, LongPrompt, PromptReport, Reading, WeightedText, read_prompt
from .text_encoder import TextEncoder
from .weighting import WEIGHTINGS, Weighting, parse_weights

logger = logging.getLogger(__name__)

_CALLS: ContextVar[dict[tuple[int, str], Any]] = ContextVar("calls", default={})  # noqa: B039, never changed in place
"""Settings of the calls under way in a thread, by pipeline and name."""

_CHOICES = {"long_prompt": LONG_PROMPTS, "weighting": WEIGHTINGS}
_CUTS: dict[str, Cut] = {"stretch": "packed", "truncate": "first", "chunk": "windows", "segment": "sentences"}


@dataclass(frozen=True)
class Reader:
    """A text encoder, and how it is to read."""

    name: str
    text_encoder: TextEncoder
    tokenizer: CLIPTokenizer
    cut: Cut
    span_length: int | None = None

    def read(self, prompt: WeightedText) -> Reading:
        return read_prompt(prompt, self.tokenizer, self.cut, encoder=self.name, span_length=self.span_length)


_Mixed = list[tuple[float, Reading]]
"""Readings of one prompt, whose states are added up, each with its factor."""


class ReadingMixin:
    """What pipelines of two encoders in each place do about prompts: the strategies that use the one or the other."""

    _places: ClassVar[tuple[str, ...]] = ("",)
    _long_prompt: LongPrompt = "stretch"
    _weighting: Weighting = "plain"
    _blend: float = 1.0

    @property
    def long_prompt(self) -> LongPrompt:
        """How prompts are read that do not fit the stock window; `docs/pipelines.md` has the table."""
        return self._setting("long_prompt")

    @long_prompt.setter
    def long_prompt(self, value: str) -> None:
        self._long_prompt = _checked("long_prompt", value)

    @property
    def weighting(self) -> Weighting:
        """The syntax in which words of a prompt get their weights: `"plain"` (none), `"a1111"` or `"compel"`."""
        return self._setting("weighting")

    @weighting.setter
    def weighting(self, value: str) -> None:
        self._weighting = _checked("weighting", value)

    @property
    def blend(self) -> float:
        """Share of the long encoder's states in what `"stretch"` reads; the rest are the stock encoder's."""
        return self._setting("blend")

    @blend.setter
    def blend(self, value: float) -> None:
        self._blend = _checked("blend", value)

    def _setting(self, name: str) -> Any:
        """A setting of the call under way, or else the pipeline's."""
        return _CALLS.get().get((id(self), name), getattr(self, f"_{name}"))

    def describe_prompt(
        self,
        prompt: str | list[str],
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
    ) -> PromptReport | list[PromptReport]:
        """Says what the pipeline would read of a prompt, and what it would drop.

        Args:
            prompt: A prompt, or those of one call.
            long_prompt: A strategy, or None for the pipeline's.
            weighting: A syntax of weights, or None for the pipeline's.
            blend: A share of the long encoder, or None for the pipeline's.

        Returns:
            The report, or one for each prompt of a list.

        Raises:
            ValueError: If an argument is none of its choices, or a strategy needs a stock encoder that the pipeline
                does not have.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        with self.reading_with(long_prompt, weighting, blend):
            how, sides = self._sides(prompts)
            readers = [reader for _, side in sides for reader in side]
            reports = [
                PromptReport(text, how, tuple(r for reader in readers for _, r in self._read(reader, text)))
                for text in prompts
            ]
        return reports[0] if isinstance(prompt, str) else reports

    def encode(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        *,
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
        **kwargs: Any,
    ) -> PromptEmbeds:
        """Encodes prompts once, to draw from them as often as wanted: `pipe(**pipe.encode(prompt), generator=...)`.

        Args:
            prompt: One prompt or several.
            negative_prompt: One for all, or one for each; None as in a call without.
            long_prompt: How prompts are read, or None for the pipeline's setting.
            weighting: The syntax of weights, or None for the pipeline's setting.
            blend: Share of the long encoder, or None for the pipeline's setting.
            **kwargs: For `encode_prompt`, such as `prompt_2` and `clip_skip`.

        Returns:
            States and, for SDXL, pooled outputs; `save` writes them to a file.

        Raises:
            ValueError: Whatever `encode_prompt` raises.
        """
        with self.reading_with(long_prompt, weighting, blend), torch.no_grad():
            encoded = self.encode_prompt(  # type: ignore[attr-defined]
                prompt,
                device=self._execution_device,  # type: ignore[attr-defined]
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=negative_prompt,
                **kwargs,
            )
            texts = {"prompt": prompt, "negative_prompt": negative_prompt, **kwargs}
            settings = {"long_prompt": self.long_prompt, "weighting": self.weighting, "blend": self.blend}
        self.maybe_free_model_hooks()  # type: ignore[attr-defined]
        states, pooled = encoded[:2], encoded[2:] or (None, None)
        return PromptEmbeds(*states, *pooled, {"encoded": json.dumps(texts | settings, default=str)})  # type: ignore[call-arg]

    def _decide(self, prompts: list[str]) -> LongPrompt:
        """Turns `"auto"` into one strategy for all prompts of a call: guidance compares states of one encoder."""
        if self.long_prompt != "auto":
            return self.long_prompt
        return "truncate" if self._fit(self._readers("truncate"), prompts) else "stretch"

    def _fit(self, readers: list[Reader], prompts: list[str]) -> bool:
        """Whether the readers drop nothing."""
        return not any(r.dropped for reader in readers for text in prompts for _, r in self._read(reader, text))

    def _sides(self, prompts: list[str]) -> tuple[LongPrompt, list[tuple[float, list[Reader]]]]:
        """The strategy of a call, and its readers with the share that their states have in what the UNet reads.

        Under a blend the stock encoder stands beside the long one, position by position: in its own window where the
        whole call fits it, and the states of the long encoder end there, too; else in windows that are joined to the
        length of the long ones.
        """
        how = self._decide(prompts)
        readers = self._readers(how)
        if how != "stretch" or self.blend == 1:
            return how, [(1.0, readers)]
        stock = [self._reader(STOCK, place, "truncate", f"blend={self.blend}") for place in self._places]
        if not self._fit(stock, prompts):
            span_length = readers[0].tokenizer.model_max_length
            stock = [replace(reader, cut="packed", span_length=span_length) for reader in stock]
        sides = [(self.blend, readers), (1 - self.blend, stock)]
        return how, [side for side in sides if side[0] > 0]

    def _readers(self, how: LongPrompt) -> list[Reader]:
        """The encoders that a strategy reads with, in the order of their channels."""
        prefix = "" if how == "stretch" else STOCK
        return [self._reader(prefix, place, how) for place in self._places]

    def _reader(self, prefix: str, place: str, how: str, asked: str = "") -> Reader:
        name = f"{prefix}text_encoder{place}"
        text_encoder, tokenizer = getattr(self, name), getattr(self, f"{prefix}tokenizer{place}")
        if text_encoder is None or tokenizer is None:
            raise ValueError(
                f"{asked or f'long_prompt={how!r}'} reads with {name}, which this pipeline does not have: load it "
                f"from a base with a {STOCK_POSITIONS}-token text encoder, or pass {name}= and "
                f"{prefix}tokenizer{place}=."
            )
        return Reader(name, text_encoder, tokenizer, _CUTS[how])

    def _read(self, reader: Reader, prompt: str) -> _Mixed:
        """Reads one prompt: textual inversions written out, as diffusers does, then weights, then windows."""
        added = reader.tokenizer.added_tokens_encoder
        if any(f"{token}_1" in added for token in added):
            prompt = self.maybe_convert_prompt(prompt, reader.tokenizer)  # type: ignore[attr-defined]
        return [(factor, reader.read(text)) for factor, text in parse_weights(prompt, self.weighting)]

    def _encode(
        self,
        prompts: list[list[str]] | None,
        negative_prompts: list[list[str]] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        *,
        device: torch.device,
        lora_scale: float | None,
        layers: tuple[int, int],
        norm: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Encodes the prompts of one call and brings everything to one length.

        Args:
            prompts: One list of B texts for each place, or None where `prompt_embeds` are ready.
            negative_prompts: The same for the negative side, or None where nothing is to be encoded.
            prompt_embeds: (B, T, D) or None.
            negative_prompt_embeds: (B, T, D) or None.
            device: Where the encoders run.
            lora_scale: Weight of LoRA layers in the encoders.
            layers: Indices into the hidden states, for the prompts and for the negative ones.
            norm: Whether the final LayerNorm follows.

        Returns:
            prompt_embeds, negative_prompt_embeds, pooled and negative pooled; the pooled ones only where text was
            encoded and the last encoder pools.
        """
        asked = (prompts, negative_prompts)
        _, sides = self._sides([text for texts in asked for part in texts or [] for text in part])

        def read(readers: list[Reader], texts: list[list[str]]) -> list[list[_Mixed]]:
            return [[self._read(reader, text) for text in part] for reader, part in zip(readers, texts, strict=True)]

        def embed(readings: list[list[list[_Mixed]]], length: int, layer: int) -> tuple[Tensor, Tensor | None]:
            how = {"device": device, "layer": layer, "norm": norm}
            found = [
                (share, _embed(readers, own, length, **how))
                for (share, readers), own in zip(sides, readings, strict=True)
            ]
            pooled = [(share, vectors) for share, (_, vectors) in found if vectors is not None]
            return _add([(share, states) for share, (states, _) in found]), _add(pooled) if pooled else None

        readings = [[read(readers, texts) for _, readers in sides] if texts else None for texts in asked]
        _warn(mixed for own in readings for side in own or [] for part in side for mixed in part)
        ready = [prompt_embeds, negative_prompt_embeds]
        lengths = [r.length for own in readings if own for part in own[-1] for mixed in part for _, r in mixed]
        length = max(lengths + [states.shape[1] for states in ready if states is not None])
        pooled: list[Tensor | None] = [None, None]
        with _lora_scaled([reader.text_encoder for _, readers in sides for reader in readers], lora_scale):
            for i, layer in enumerate(layers):
                if (own := readings[i]) is not None:
                    ready[i], pooled[i] = embed(own, length, layer)
                if (states := ready[i]) is not None and (missing := length - states.shape[1]):
                    empty = [read(readers, [[""]] * len(readers)) for _, readers in sides]
                    tail = embed(empty, missing, layer)[0].to(states)
                    ready[i] = torch.cat([states, tail.expand(len(states), -1, -1)], dim=1)
        return ready[0], ready[1], pooled[0], pooled[1]

    @contextmanager
    def reading_with(
        self, long_prompt: LongPrompt | None, weighting: Weighting | None, blend: float | None
    ) -> Iterator[None]:
        """Other settings for one call; what other threads do with the pipeline meanwhile goes on under its own."""
        if blend is not None and blend < 1 and (how := long_prompt or self.long_prompt) not in ("stretch", "auto"):
            raise ValueError(
                f"blend={blend} mixes into what the long encoder reads, but long_prompt={how!r} reads with the stock "
                "encoder alone: leave one of the two out."
            )
        given = {"long_prompt": long_prompt, "weighting": weighting, "blend": blend}
        own = {(id(self), name): _checked(name, value) for name, value in given.items() if value is not None}
        token = _CALLS.set({**_CALLS.get(), **own})
        try:
            yield
        finally:
            _CALLS.reset(token)


@contextmanager
def _lora_scaled(text_encoders: list[TextEncoder], scale: float | None) -> Iterator[None]:
    """Weighs the LoRA layers, if there are any, while text is encoded."""
    if scale is None or not USE_PEFT_BACKEND:
        yield
        return
    for text_encoder in text_encoders:
        scale_lora_layers(text_encoder, scale)
    try:
        yield
    finally:
        for text_encoder in text_encoders:
            unscale_lora_layers(text_encoder, scale)


def _embed(
    readers: list[Reader], readings: list[list[_Mixed]], length: int, **how: Any
) -> tuple[Tensor, Tensor | None]:
    """Encodes readings, one list for each reader, to (B, length, D) states and (B, E) pooled output, if any."""
    states, pooled = [], None
    for reader, prompts in zip(readers, readings, strict=True):
        each = [reading for mixed in prompts for _, reading in mixed]
        factors = [[factor for factor, _ in mixed] for mixed in prompts]
        found, vectors = encode_readings(each, reader.text_encoder, reader.tokenizer, length, **how)
        states.append(_mix(found, factors))
        pooled = None if vectors is None else _mix(vectors, factors)
    return torch.cat(states, dim=-1), pooled  # each (B, T, D_i) -> (B, T, D)


def _mix(rows: Tensor, factors: list[list[float]]) -> Tensor:
    """(R, ...) -> (B, ...): the rows of each prompt, added up with their factors."""
    parts = rows.split([len(own) for own in factors])
    return torch.stack([_add(list(zip(own, part, strict=True))) for own, part in zip(factors, parts, strict=True)])


def _add(parts: list[tuple[float, Tensor]]) -> Tensor:
    """The sum of tensors with their factors; one with factor 1 stays as it is."""
    first = parts[0][1]
    return first if len(parts) == 1 and parts[0][0] == 1 else sum(factor * tensor for factor, tensor in parts)  # type: ignore[return-value]


def _warn(prompts: Iterable[_Mixed]) -> None:
    """Says once, in words, what no encoder is going to see, and which brackets are text."""
    readings = [reading for mixed in prompts for _, reading in mixed]
    cut = {reading.dropped: reading for reading in readings if reading.dropped}
    if cut:
        parts = [f"{r.tokens - r.tokens_read} of {r.tokens} tokens dropped: {text!r}" for text, r in cut.items()]
        logger.warning("long_prompt='truncate' reads the first window alone; %s", "; ".join(parts))
    for weighted in {reading.prompt for reading in readings if reading.prompt.unmatched}:
        logger.warning("brackets without a partner are text: %s in %r", weighted.unmatched, weighted.text)


def _checked(name: str, value: Any) -> Any:
    """The value of a setting.

    Raises:
        ValueError: If it is none of the choices, or no share.
    """
    if name in _CHOICES:
        return one_of(name, value, _CHOICES[name])
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is no share: give 0 (the stock encoder) to 1 (the long one).")
    return float(value)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    """`value`, if it is among the choices.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(choices)}.")
    return value
