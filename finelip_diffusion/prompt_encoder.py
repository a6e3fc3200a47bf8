"""Encode first, then draw: which encoder reads what of a prompt, in which share, and how all comes to one length."""

import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor
from transformers import CLIPTokenizer

from .encoding import PromptEmbeds, encode_readings
from .lengthening import STOCK, UNTRAINED, is_stock, stretched, widened
from .positions import STOCK_POSITIONS, stretched_length
from .prompts import Cut, PromptReport, PromptSettings, Reading, read_prompt
from .text_encoder import TextEncoder
from .weighting import Mixture, parse_weights

logger = logging.getLogger(__name__)

_Method = TypeVar("_Method", bound=Callable[..., Any])

_Models = dict["Source", tuple[TextEncoder, CLIPTokenizer]]
"""The encoder of each source, and its tokenizer."""

_Sides = list[list[list[Mixture]] | None]
"""Prompts and negative prompts, by place and row; None where there is nothing to encode."""

_CUTS: dict[str, Cut] = {"stretch": "packed", "truncate": "first", "chunk": "windows", "segment": "sentences"}


@dataclass(frozen=True, eq=False)
class Source:
    """A text encoder of a pipeline, and how it reads.

    Attributes:
        name: Name of the encoder in the pipeline.
        place: Whose channels its states are: 0 for the first encoder, 1 for SDXL's second.
        tokenizer: Its tokenizer.
        window_length: Tokens that it reads at once, start and end included.
        cut: How prompts are cut into its windows.
        span_length: States of windows that are joined, or None.
        share: Share of its states in what the UNet gets.
        decides: Whether its readings decide on the number of states.
    """

    name: str
    place: int
    tokenizer: CLIPTokenizer
    window_length: int
    cut: Cut
    span_length: int | None = None
    share: float = 1.0
    decides: bool = True


@dataclass(frozen=True)
class Pass:
    """One reading of one prompt by one encoder. What the UNet gets for a row is the sum of its passes."""

    source: Source
    row: int
    factor: float
    reading: Reading


class PromptEncoder:
    """Reads prompts with the text encoders of a pipeline.

    It holds no state of a call and changes nothing of the pipeline, so threads may share a pipeline.

    Args:
        pipeline: A pipeline with CLIP text encoders under `text_encoder` and, for SDXL, `text_encoder_2`; 77-token
            encoders beside long ones are its `stock_text_encoder` and `stock_text_encoder_2`.
        settings: How prompts are read; None takes the pipeline's `prompt_settings`.
    """

    def __init__(self, pipeline: DiffusionPipeline, settings: PromptSettings | None = None):
        self.pipeline = pipeline
        self.settings = settings or pipeline.prompt_settings
        self.places = [place for place in ("", "_2") if getattr(pipeline, f"text_encoder{place}", None) is not None]

    @overload
    def describe(self, prompt: str) -> PromptReport: ...

    @overload
    def describe(self, prompt: list[str]) -> list[PromptReport]: ...

    def describe(self, prompt: str | list[str]) -> PromptReport | list[PromptReport]:
        """Says what is read of a prompt, and what is dropped.

        Args:
            prompt: A prompt, or several.

        Returns:
            The report, or one for each prompt of a list.

        Raises:
            ValueError: If the strategy needs an encoder that the pipeline does not have.
        """
        if not isinstance(prompt, str):
            return [self._describe(text) for text in prompt]
        return self._describe(prompt)

    def encode(
        self, prompt: str | list[str], negative_prompt: str | list[str] | None = None, **kwargs: Any
    ) -> PromptEmbeds:
        """Encodes prompts once, to draw from them as often as wanted.

        Args:
            prompt: One prompt or several.
            negative_prompt: One for all, or one for each; None as in a call without.
            **kwargs: For diffusers' `encode_prompt`, such as `prompt_2` and `clip_skip`.

        Returns:
            States and, for SDXL, pooled outputs; `save` writes them to a file.

        Raises:
            ValueError: As for `encode_prompt`.
        """
        own = own_encode_prompt(self.pipeline)
        texts = {"prompt": prompt, "negative_prompt": negative_prompt, **kwargs}
        call = {"device": self.pipeline._execution_device, "num_images_per_prompt": 1} | texts
        with torch.no_grad():
            encoded = self.encode_prompt(own, (), {**call, "do_classifier_free_guidance": True})
        self.pipeline.maybe_free_model_hooks()
        settings = {name: getattr(self.settings, name) for name in ("long_prompt", "weighting", "blend")}
        states, negative, pooled, negative_pooled = (*encoded[:4], None, None)[:4]
        metadata = {"encoded": json.dumps(texts | settings, default=str)}
        return PromptEmbeds(states, negative, pooled, negative_pooled, metadata)

    def encode_prompt(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """diffusers' `encode_prompt`, which is given the states of whole prompts to repeat and to cast.

        Args:
            own: The method of the pipeline's class in diffusers, bound.
            args: Its arguments.
            kwargs: The others.

        Returns:
            As in diffusers.

        Raises:
            ValueError: As for `ready`.
        """
        given = inspect.signature(own).bind(*args, **kwargs)
        given.apply_defaults()
        call = given.arguments
        device = call.get("device") or self.pipeline._execution_device
        call |= self.ready(call, call["do_classifier_free_guidance"], device, call.get("lora_scale"))
        return own(*given.args, **given.kwargs)

    def ready(
        self, call: dict[str, Any], guided: bool, device: torch.device, lora_scale: float | None
    ) -> dict[str, Any]:
        """What takes the place of the texts among the arguments of a call.

        Prompts, negative prompts and ready embeddings come out at one length, that of the longest: shorter ones go on
        with windows of the empty prompt. As in diffusers, `clip_skip` does not apply to the negative prompt.

        Args:
            call: Arguments of `__call__` or `encode_prompt` by name, defaults included.
            guided: Whether the negative side is wanted.
            device: Where to encode.
            lora_scale: Weight of LoRA layers in the text encoders.

        Returns:
            Embeddings by argument name, and None for each text that they stand for. What the caller has encoded
            already, and SDXL's zeros for a missing negative prompt, are left to diffusers.

        Raises:
            ValueError: If there is neither a prompt nor embeddings, the negative prompts are neither one nor as many
                as the prompts, a layer does not exist, or a strategy lacks its encoder.
        """
        return self._ready(call, self._mixtures(call, guided), None, device, lora_scale)

    def ready_groups(
        self, call: dict[str, Any], guided: bool, device: torch.device, lora_scale: float | None
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """The same for prompts that are read alike, group by group: of one strategy and one length.

        Args:
            call: As for `ready`.
            guided: As for `ready`.
            device: As for `ready`.
            lora_scale: As for `ready`.

        Returns:
            For each group, the numbers of its prompts, and what `ready` returns for them. Embeddings that the caller
            has encoded, and their texts, are one group.

        Raises:
            ValueError: As for `ready`.
        """
        mixtures = self._mixtures(call, guided)
        if mixtures[0] is None or len(mixtures[0][0]) == 1:
            return [([0], self._ready(call, mixtures, None, device, lora_scale))]
        fixed = [0] if (states := call.get("negative_prompt_embeds")) is None else [states.shape[1]]
        groups: dict[tuple[str, int], list[int]] = {}
        for row in range(len(mixtures[0][0])):
            own = [mixture for mixture in _of_rows(mixtures, [row]) if mixture]
            how, sources = self._decide(own)
            passes = [each for texts in own for each in _passes(sources, texts) if each.source.decides]
            groups.setdefault((how, max(*fixed, *(each.reading.length for each in passes))), []).append(row)
        if len(groups) == 1:
            return [(rows, self._ready(call, mixtures, None, device, lora_scale)) for rows in groups.values()]
        return [(rows, self._ready(call, mixtures, rows, device, lora_scale)) for rows in groups.values()]

    def _ready(
        self,
        call: dict[str, Any],
        mixtures: "_Sides",
        rows: list[int] | None,
        device: torch.device,
        lora_scale: float | None,
    ) -> dict[str, Any]:
        """`ready` for some of the prompts, or for all."""
        if mixtures == [None, None]:
            return {}
        ready = [call.get("prompt_embeds"), call.get("negative_prompt_embeds")]
        pooled = ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        done: dict[str, Any] = {}
        if rows is not None:
            mixtures = _of_rows(mixtures, rows)
            ready = [states if states is None else states[rows] for states in ready]
            done = {name: call[name][rows] for name in pooled if call.get(name) is not None}
        found = self._encode(mixtures, ready, device, lora_scale, call.get("clip_skip") or 0)
        done |= {"prompt_embeds": found[0], "negative_prompt_embeds": found[1]}
        for side, prefix in enumerate(("", "negative_")):
            if mixtures[side]:
                done |= {name: None for name in (f"{prefix}prompt", f"{prefix}prompt_2") if name in call}
                if pooled[side] in call and call[pooled[side]] is None:
                    done[pooled[side]] = found[2 + side]
        return done

    def _mixtures(self, call: dict[str, Any], guided: bool) -> "_Sides":
        """The prompts and the negative prompts of a call, parsed; None where there is nothing to encode."""
        states, negative = call.get("prompt_embeds"), call.get("negative_prompt_embeds")
        texts: list[list[list[str]] | None] = [None, None]
        if states is None:
            first = _texts(call.get("prompt"))
            second = [_texts(call.get("prompt_2") or first, len(first), "prompts_2")] if self._is_xl else []
            texts[0] = [first, *second]
        negative_prompt = call.get("negative_prompt")
        zeros = negative_prompt is None and self.pipeline.config.get("force_zeros_for_empty_prompt", False)
        if guided and negative is None and not zeros:
            size = len(texts[0][0] if texts[0] else call["prompt_embeds"])
            both = [negative_prompt, call.get("negative_prompt_2") or negative_prompt][: 1 + self._is_xl]
            texts[1] = [_texts(text or "", size) for text in both]
        if texts != [None, None] and not self.places:
            raise ValueError(
                f"{type(self.pipeline).__name__} has no text encoder: give prompt_embeds instead of texts."
            )
        places = len(self.places)  # SDXL's refiner has the second encoder alone
        return [self._parse(each[:places]) if each else None for each in texts]

    # ------------------------------------------------------------------------------------------------ what is read

    @property
    def _is_xl(self) -> bool:
        return hasattr(self.pipeline, "text_encoder_2")

    def _describe(self, prompt: str) -> PromptReport:
        mixtures = self._parse([[prompt] for _ in self.places])
        how, sources = self._decide([mixtures])
        readings = tuple(each.reading for each in _passes(sources, mixtures))
        return PromptReport(prompt, how, readings, self.settings.why)

    def _parse(self, texts: list[list[str]]) -> list[list[Mixture]]:
        """By place and row, each text parsed once: textual inversions written out, as diffusers does, then weights."""
        parsed: dict[str, Mixture] = {}
        for place, row in zip(self.places, texts, strict=True):
            tokenizer = getattr(self.pipeline, f"tokenizer{place}")
            added = tokenizer.added_tokens_encoder
            several = any(f"{token}_1" in added for token in added)
            row[:] = [self.pipeline.maybe_convert_prompt(text, tokenizer) if several else text for text in row]
            parsed |= {text: parse_weights(text, self.settings.weighting) for text in {*row} - parsed.keys()}
        return [[parsed[text] for text in row] for row in texts]

    def _decide(self, mixtures: Iterable[list[list[Mixture]]]) -> tuple[str, list[Source]]:
        """The strategy of a call, and its sources: guidance compares states of the same encoders.

        Under a blend the stock encoder stands beside the long one, position by position: in its own window where the
        whole call fits it, and the states of the long encoder end there, too; else in windows that are joined to the
        length of the long ones.
        """
        how = self.settings.long_prompt
        if how == "auto":
            first = self._sources("truncate", True)
            if not _drops(first, mixtures):
                return "truncate", first
            how = "chunk" if is_stock(getattr(self.pipeline, f"text_encoder{self.places[0]}")) else "stretch"
        if how != "stretch":
            return how, self._sources(how, True)
        long, blend = self._sources(how, False), self.settings.blend
        if self.settings.second_encoder == "window" and len(long) == 2:
            stock = self._source(1, "chunk", True)
            long[1] = replace(stock, cut="packed", span_length=long[0].window_length)
        if blend == 1:
            return how, long
        stock_side = self._sources("truncate", True, f"blend={blend}")
        if _drops(stock_side, mixtures):
            length = long[0].window_length
            stock_side = [replace(source, cut="packed", span_length=length) for source in stock_side]
        long = [replace(source, share=blend, decides=False) for source in long]
        return how, [*(long if blend > 0 else []), *(replace(source, share=1 - blend) for source in stock_side)]

    def _sources(self, how: str, stock: bool, asked: str = "") -> list[Source]:
        return [self._source(place, how, stock, asked) for place in range(len(self.places))]

    def _source(self, place: int, how: str, stock: bool, asked: str = "") -> Source:
        """The encoder that a strategy reads with in one place.

        Raises:
            ValueError: If the pipeline does not have it.
        """
        ending = self.places[place]
        text_encoder, name = getattr(self.pipeline, f"text_encoder{ending}"), f"text_encoder{ending}"
        if stock and not is_stock(text_encoder):
            name = f"{STOCK}{name}"
            text_encoder = getattr(self.pipeline, name, None)
        tokenizer = getattr(self.pipeline, name.replace("text_encoder", "tokenizer"), None)
        if text_encoder is None or tokenizer is None:
            raise ValueError(
                f"{asked or f'long_prompt={how!r}'} reads with {name}, which this pipeline does not have: load it "
                f"from a base with a {STOCK_POSITIONS}-token text encoder, or pass {name}= and "
                f"{name.replace('text_encoder', 'tokenizer')}=."
            )
        rows = text_encoder.config.max_position_embeddings
        window = tokenizer.model_max_length if stock or not is_stock(text_encoder) else stretched_length(rows)
        return Source(name, place, tokenizer, window, _CUTS[how])

    # ------------------------------------------------------------------------------------------------------ states

    def _encode(
        self,
        mixtures: "_Sides",
        ready: list[Tensor | None],
        device: torch.device,
        lora_scale: float | None,
        clip_skip: int,
    ) -> list[Tensor | None]:
        """Encodes the prompts of one call and brings everything to one length.

        Args:
            mixtures: Prompts and negative prompts by place and row; None where there is nothing to encode.
            ready: (B, T, D) states of both that the caller has, or None.
            device: Where the encoders run.
            lora_scale: Weight of LoRA layers in the encoders.
            clip_skip: Layers to leave out of the prompts' states.

        Returns:
            States of the prompts and of the negative prompts, and the pooled outputs of both; the pooled ones only
            where text was encoded and the last encoder pools.
        """
        _, sources = self._decide([own for own in mixtures if own])
        passes = [_passes(sources, own) if own else [] for own in mixtures]
        every = [each for own in passes for each in own]
        _warn(each.reading for each in every)
        lengths = [each.reading.length for each in every if each.source.decides]
        length = max(lengths + [states.shape[1] for states in ready if states is not None])
        last = self.settings.hidden_state == "last_norm" or not self._is_xl
        layer = -1 if last else -2
        models = {source: self._model(source, device) for source in sources}
        states: list[Tensor | None] = list(ready)
        pooled: list[Tensor | None] = [None, None]
        with _lora_scaled({text_encoder for text_encoder, _ in models.values()}, lora_scale):
            for side, own in enumerate(passes):
                how = {"device": device, "layer": layer - (0 if side else clip_skip), "norm": last}
                if own:
                    states[side], pooled[side] = _embed(own, sources, models, length, **how)
                if (found := states[side]) is not None and (missing := length - found.shape[1]):
                    empty = _passes(sources, [[parse_weights("")]] * len(self.places))
                    tail = _embed(empty, sources, models, missing, **how)[0].to(found)
                    states[side] = torch.cat([found, tail.expand(len(found), -1, -1)], dim=1)
        return [*states, *pooled]

    def _model(self, source: Source, device: torch.device) -> tuple[TextEncoder, CLIPTokenizer]:
        """The encoder of a source with its tokenizer, where it can run.

        Raises:
            ValueError: If a stock encoder would have to be stretched while it is offloaded, or lacks the adapters of
                the long one.
        """
        text_encoder = getattr(self.pipeline, source.name)
        if source.window_length > source.tokenizer.model_max_length:  # asked for in this call alone
            if hasattr(text_encoder, "_hf_hook"):
                raise ValueError(
                    "long_prompt='stretch' stretches the stock encoder in this call, which is offloaded: load the "
                    "pipeline with long_prompt='stretch', then enable the offloading."
                )
            logger.warning(UNTRAINED, text_encoder.config.max_position_embeddings)
            return stretched(text_encoder), widened(source.tokenizer, source.window_length)
        if source.name not in self.pipeline.config:  # one that `attach` has put aside
            long = getattr(self.pipeline, source.name.removeprefix(STOCK))
            if lacks := set(getattr(long, "peft_config", ())) - set(getattr(text_encoder, "peft_config", ())):
                raise ValueError(
                    f"the LoRA {', '.join(sorted(lacks))} was loaded into the long encoder alone, but "
                    f"{source.name} reads, too: attach with long_prompt='stretch', or use one of this package's "
                    "pipelines, where both encoders get it."
                )
            text_encoder.to(device=device, dtype=long.dtype)
        return text_encoder, source.tokenizer


def own_encode_prompt(pipeline: DiffusionPipeline) -> Callable[..., Any]:
    """`encode_prompt` of a pipeline's class, bound, whatever the object itself has under that name."""
    return type(pipeline).encode_prompt.__get__(pipeline)


def with_signature_of(theirs: Callable[..., Any]) -> Callable[[_Method], _Method]:
    """Gives a method the signature of diffusers' own, and the keyword arguments that it adds itself.

    Editors, programs that build forms from signatures, and diffusers' own checks then see every parameter.
    """

    def decorate(ours: _Method) -> _Method:
        vars(ours)["__signature__"] = joined_signature(theirs, ours)
        return ours

    return decorate


def joined_signature(theirs: Callable[..., Any], ours: Callable[..., Any]) -> inspect.Signature:
    """All parameters of `theirs`, and the keyword-only ones of `ours`."""
    own = list(inspect.signature(theirs).parameters.values())
    rest = [each for each in own if each.kind is each.VAR_KEYWORD]
    added = [each for each in inspect.signature(ours).parameters.values() if each.kind is each.KEYWORD_ONLY]
    return inspect.Signature([*(each for each in own if each not in rest), *added, *rest])


def _passes(sources: list[Source], mixtures: list[list[Mixture]]) -> list[Pass]:
    """All readings of prompts, which are given by place and row."""
    return [
        Pass(source, row, factor, _read(source, text))
        for source in sources
        for row, mixture in enumerate(mixtures[source.place])
        for factor, text in mixture
    ]


def _of_rows(sides: _Sides, rows: list[int]) -> _Sides:
    return [own and [[place[row] for row in rows] for place in own] for own in sides]


def _read(source: Source, text: Any) -> Reading:
    how = {"span_length": source.span_length, "window_length": source.window_length}
    return read_prompt(text, source.tokenizer, source.cut, encoder=source.name, **how)


def _drops(sources: list[Source], mixtures: Iterable[list[list[Mixture]]]) -> bool:
    """Whether the sources drop anything."""
    return any(each.reading.dropped for own in mixtures for each in _passes(sources, own))


def _embed(
    passes: list[Pass],
    sources: list[Source],
    models: _Models,
    length: int,
    **how: Any,
) -> tuple[Tensor, Tensor | None]:
    """Encodes passes to (B, length, D) states and (B, E) pooled output, if any."""
    states, pooled = [], []
    for decides in (False, True):
        parts, last = [], None
        for source in (each for each in sources if each.decides is decides):  # in the order of the places
            read = [each for each in passes if each.source is source]
            found, vectors = encode_readings([each.reading for each in read], *models[source], length, **how)
            parts.append(_mix(found, read))
            last = None if vectors is None else (source.share, _mix(vectors, read))
        if parts:
            states.append((source.share, torch.cat(parts, dim=-1)))  # each (B, T, D_i) -> (B, T, D)
        if last:
            pooled.append(last)
    return _add(states), _add(pooled) if pooled else None


def _mix(found: Tensor, passes: list[Pass]) -> Tensor:
    """(R, ...) -> (B, ...): the passes of each row, added up with their factors."""
    rows: dict[int, list[tuple[float, Tensor]]] = {}
    for each, tensor in zip(passes, found, strict=True):
        rows.setdefault(each.row, []).append((each.factor, tensor))
    return torch.stack([_add(parts) for parts in rows.values()])


def _add(parts: list[tuple[float, Tensor]]) -> Tensor:
    """The sum of tensors with their factors; one with factor 1 stays as it is."""
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    return sum((factor * tensor for factor, tensor in parts), start=parts[0][1].new_zeros(()))


def _texts(prompt: str | list[str] | None, size: int | None = None, what: str = "negative prompts") -> list[str]:
    """A list of prompts, of `size` of them where that is given."""
    if prompt is None:
        raise ValueError("neither prompt nor prompt_embeds is given: one of the two is needed.")
    texts = [prompt] * (size or 1) if isinstance(prompt, str) else list(prompt)
    if size is not None and len(texts) != size:
        raise ValueError(f"{len(texts)} {what} for {size} prompts: give one, or one for each.")
    return texts


def _warn(readings: Iterable[Reading]) -> None:
    """Says once, in words, what no encoder is going to see, and which brackets are text."""
    readings = list(readings)
    cut = {reading.dropped: reading for reading in readings if reading.dropped}
    if cut:
        parts = [f"{r.tokens - r.tokens_read} of {r.tokens} tokens dropped: {text!r}" for text, r in cut.items()]
        logger.warning("long_prompt='truncate' reads the first window alone; %s", "; ".join(parts))
    for weighted in {reading.prompt for reading in readings if reading.prompt.unmatched}:
        logger.warning("brackets without a partner are text: %s in %r", weighted.unmatched, weighted.text)


@contextmanager
def _lora_scaled(text_encoders: set[TextEncoder], scale: float | None) -> Iterator[None]:
    """Weighs the LoRA layers, if there are any, while text is encoded; diffusers does so in the layers themselves."""
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
