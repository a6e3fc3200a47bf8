"""Stable Diffusion pipelines for long prompts: thin subclasses of diffusers' own."""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from .components import check_widths, is_stock, long_encoder, single_file_components
from .encoding import PromptEmbeds, encode_readings
from .positions import STOCK_POSITIONS
from .prompts import LONG_PROMPTS, Cut, LongPrompt, PromptReport, Reading, WeightedText, read_prompt
from .text_encoder import TextEncoder
from .upstream import even_alphas, fit_text_encoder_names
from .weighting import WEIGHTINGS, Weighting, parse_weights

logger = logging.getLogger(__name__)

BUNDLED_MODEL = Path(__file__).parent / "bundled"
"""A small Stable Diffusion of the scenes world; its `finelip/` holds the long encoder and the UNet adapted to it."""

_EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

SECOND_ENCODERS = ("stretch", "window")
HIDDEN_STATES = ("penultimate", "last_norm")

_CUTS: dict[str, Cut] = {"stretch": "packed", "truncate": "first", "chunk": "windows", "segment": "sentences"}
_STOCK = "stock_"  # model_index.json has these components under a leading underscore: diffusers' own classes skip them


@dataclass(frozen=True)
class _Reader:
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


class _LongPromptMixin:
    """What both pipelines share: a long and a stock text encoder in each place, and the strategies that use them."""

    config: Any
    text_encoder: TextEncoder
    _lora_loadable_modules: ClassVar[list[str]]
    _stock_class: ClassVar[type[DiffusionPipeline]]
    _places: ClassVar[tuple[str, ...]] = ("",)
    _long_prompt: LongPrompt = "stretch"
    _weighting: Weighting = "plain"
    _blend: float = 1.0

    @property
    def long_prompt(self) -> LongPrompt:
        """How prompts are read that do not fit the stock window; `docs/pipelines.md` has the table."""
        return self._long_prompt

    @long_prompt.setter
    def long_prompt(self, value: str) -> None:
        self._long_prompt = _one_of("long_prompt", value, LONG_PROMPTS)

    @property
    def weighting(self) -> Weighting:
        """The syntax in which words of a prompt get their weights: `"plain"` (none), `"a1111"` or `"compel"`."""
        return self._weighting

    @weighting.setter
    def weighting(self, value: str) -> None:
        self._weighting = _one_of("weighting", value, WEIGHTINGS)

    @property
    def blend(self) -> float:
        """Share of the long encoder's states in what `"stretch"` reads; the rest are the stock encoder's."""
        return self._blend

    @blend.setter
    def blend(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"blend={value} is no share: give 0 (the stock encoder) to 1 (the long one).")
        self._blend = float(value)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | None = None,
        finelip: str | Path | None = None,
        long_prompt: LongPrompt = "stretch",
        **kwargs: Any,
    ):
        """Loads a Stable Diffusion and puts a long text encoder into it.

        Args:
            base: Folder or hub id of a Stable Diffusion, in diffusers' layout. None is the bundled model.
            finelip: Any source of `load_text_encoder`. If it is a folder with a `unet/`, that UNet was adapted to the
                encoder and replaces the base's, unless `unet=` is given. None takes the base's own encoder: as it is
                if it is a long one, else stretched without training, with a warning.
            long_prompt: How prompts are read: `"stretch"`, `"truncate"`, `"chunk"`, `"segment"` or `"auto"`.
            **kwargs: As for diffusers' `from_pretrained`.

        Returns:
            The pipeline.

        Raises:
            ValueError: If the encoder's width is not the one that the UNet reads, or an argument is none of its
                choices; and whatever `load_text_encoder` raises.
            OSError: If the base is neither a folder nor to be had from the hub.
        """
        _one_of("long_prompt", long_prompt, LONG_PROMPTS)
        if base is None:
            base, finelip = BUNDLED_MODEL, finelip or BUNDLED_MODEL / "finelip"
        if Path(base).is_dir():  # one that `from_pipe` made of ours names the stock encoders, and saves none
            names = [f"{_STOCK}{part}{place}" for part in ("text_encoder", "tokenizer") for place in cls._places]
            kwargs = {**{name: None for name in names if not (Path(base) / name).is_dir()}, **kwargs}
        kwargs |= _adapted_unet(finelip, kwargs)
        return super().from_pretrained(str(base), finelip=finelip, long_prompt=long_prompt, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        finelip: str | Path | None = None,
        long_prompt: LongPrompt = "stretch",
        config: str | Path | None = None,
        **kwargs: Any,
    ):
        """Loads a Stable Diffusion from one file, as its authors and A1111 have it, and does as `from_pretrained`.

        Args:
            path: The file, or a link to one on the hub.
            finelip: As in `from_pretrained`.
            long_prompt: As in `from_pretrained`.
            config: Folder or hub id of a pipeline of the same kind, in diffusers' layout, whose configurations and
                tokenizers are used; None is the one that diffusers takes for such a file.
            **kwargs: As for diffusers' `from_single_file`.

        Returns:
            The pipeline.

        Raises:
            ValueError: If there is no such file, it holds the encoders of another kind of model, or the
                configurations cannot be had; the encoder's width is not the one that the UNet reads, or an argument
                is none of its choices; and whatever `load_text_encoder` raises.
        """
        _one_of("long_prompt", long_prompt, LONG_PROMPTS)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype")) or torch.float32  # diffusers' default for a file
        hub: dict[str, Any] = {
            name: kwargs[name] for name in ("token", "local_files_only", "cache_dir") if name in kwargs
        }
        file, folder, components = single_file_components(
            path, cls._places, set(kwargs), config=config, dtype=dtype, hub=hub
        )
        for place in cls._places:  # a configuration saved by this class has these, a file has not
            components |= {f"{_STOCK}text_encoder{place}": None, f"{_STOCK}tokenizer{place}": None}
        kwargs = {**_adapted_unet(finelip, kwargs), **kwargs}
        kwargs = {"config": str(folder), "finelip": finelip, "long_prompt": long_prompt, **components, **kwargs}
        return super().from_single_file(str(file), **kwargs)  # type: ignore[misc]

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Gives the stock encoders, which diffusers' own classes must not see, back to ours."""
        public = {key.removeprefix("_") if key.startswith(f"_{_STOCK}") else key: v for key, v in config_dict.items()}
        return super().extract_init_dict(public, **kwargs)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """The `model_index.json`, in the name of diffusers' own class, so that plain diffusers loads it."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config = {f"_{key}" if key.startswith(_STOCK) else key: value for key, value in config.items()}
        config["_class_name"] = self._stock_class.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def lora_state_dict(cls, *args: Any, **kwargs: Any) -> tuple:
        """Reads a LoRA as diffusers does, and keeps the alphas that diffusers loses."""
        state_dict, network_alphas, *rest = super().lora_state_dict(*args, **kwargs)  # type: ignore[misc]
        return *even_alphas(state_dict, network_alphas), *rest

    @classmethod
    def load_lora_into_text_encoder(
        cls, state_dict: dict[str, Tensor], network_alphas: dict | None, text_encoder: TextEncoder, **kwargs: Any
    ) -> None:
        """Loads a LoRA into a long encoder as diffusers does, and into the stock one that stands beside it."""
        prefix = kwargs.get("prefix") or cls.text_encoder_name  # type: ignore[attr-defined]
        for each, _ in _and_stock(kwargs.get("_pipeline"), text_encoder):
            fitting = fit_text_encoder_names(state_dict, each, prefix)
            super().load_lora_into_text_encoder(fitting, network_alphas, each, **kwargs)  # type: ignore[misc]

    def fuse_lora(self, components: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        """Fuses LoRAs as diffusers does, those of a stock encoder with those of the long one."""
        super().fuse_lora(self._lora_components(components), *args, **kwargs)  # type: ignore[misc]

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Takes LoRAs out again as diffusers does, those of a stock encoder with those of the long one."""
        super().unfuse_lora(self._lora_components(components), **kwargs)  # type: ignore[misc]

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Weighs LoRAs as diffusers does, those of a stock encoder as those of the long one."""

        def complete(weights: Any) -> Any:
            if not isinstance(weights, dict):
                return weights
            stock = {f"{_STOCK}{name}": weights[name] for name in weights}
            return {**{name: stock[name] for name in stock if name in self._lora_loadable_modules}, **weights}

        several = isinstance(adapter_weights, list)
        weights = [complete(each) for each in adapter_weights] if several else complete(adapter_weights)
        super().set_adapters(adapter_names, weights)  # type: ignore[misc]

    def _lora_components(self, components: list[str] | None) -> list[str]:
        """All that can have a LoRA, or the named ones with the stock encoders beside them."""
        names = list(self._lora_loadable_modules if components is None else components)
        beside = [name for name in self._lora_loadable_modules if name.removeprefix(_STOCK) in names]
        return [*names, *(name for name in beside if name not in names)]

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str] | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder: TextEncoder | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads an embedding into a long encoder as diffusers does, and into the stock one that stands beside it."""
        for each, other in _and_stock(self, text_encoder or self.text_encoder):
            super().load_textual_inversion(  # type: ignore[misc]
                pretrained_model_name_or_path, token, other or tokenizer, each, **kwargs
            )

    def unload_textual_inversion(
        self,
        tokens: str | list[str] | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        """Takes embeddings out of a long encoder as diffusers does, and of the stock one that stands beside it."""
        for each, other in _and_stock(self, text_encoder or self.text_encoder):
            super().unload_textual_inversion(tokens, other or tokenizer, each)  # type: ignore[misc]
            each.config.vocab_size = each.get_input_embeddings().num_embeddings

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
        with self._reading_with(long_prompt, weighting, blend):
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
        with self._reading_with(long_prompt, weighting, blend), torch.no_grad():
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

    def _fit(self, readers: list[_Reader], prompts: list[str]) -> bool:
        """Whether the readers drop nothing."""
        return not any(r.dropped for reader in readers for text in prompts for _, r in self._read(reader, text))

    def _sides(self, prompts: list[str]) -> tuple[LongPrompt, list[tuple[float, list[_Reader]]]]:
        """The strategy of a call, and its readers with the share that their states have in what the UNet reads.

        Under a blend the stock encoder stands beside the long one, position by position: in its own window where the
        whole call fits it, and the states of the long encoder end there, too; else in windows that are joined to the
        length of the long ones.
        """
        how = self._decide(prompts)
        readers = self._readers(how)
        if how != "stretch" or self.blend == 1:
            return how, [(1.0, readers)]
        stock = [self._reader(_STOCK, place, "truncate", f"blend={self.blend}") for place in self._places]
        if not self._fit(stock, prompts):
            span_length = readers[0].tokenizer.model_max_length
            stock = [replace(reader, cut="packed", span_length=span_length) for reader in stock]
        sides = [(self.blend, readers), (1 - self.blend, stock)]
        return how, [side for side in sides if side[0] > 0]

    def _readers(self, how: LongPrompt) -> list[_Reader]:
        """The encoders that a strategy reads with, in the order of their channels."""
        prefix = "" if how == "stretch" else _STOCK
        return [self._reader(prefix, place, how) for place in self._places]

    def _reader(self, prefix: str, place: str, how: str, asked: str = "") -> _Reader:
        name = f"{prefix}text_encoder{place}"
        text_encoder, tokenizer = getattr(self, name), getattr(self, f"{prefix}tokenizer{place}")
        if text_encoder is None or tokenizer is None:
            raise ValueError(
                f"{asked or f'long_prompt={how!r}'} reads with {name}, which this pipeline does not have: load it "
                f"from a base with a {STOCK_POSITIONS}-token text encoder, or pass {name}= and "
                f"{prefix}tokenizer{place}=."
            )
        return _Reader(name, text_encoder, tokenizer, _CUTS[how])

    def _read(self, reader: _Reader, prompt: str) -> _Mixed:
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

        def read(readers: list[_Reader], texts: list[list[str]]) -> list[list[_Mixed]]:
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
    def _reading_with(
        self, long_prompt: LongPrompt | None, weighting: Weighting | None, blend: float | None
    ) -> Iterator[None]:
        """Other settings for one call."""
        if blend is not None and blend < 1 and (how := long_prompt or self.long_prompt) not in ("stretch", "auto"):
            raise ValueError(
                f"blend={blend} mixes into what the long encoder reads, but long_prompt={how!r} reads with the stock "
                "encoder alone: leave one of the two out."
            )
        usual = {"long_prompt": self.long_prompt, "weighting": self.weighting, "blend": self.blend}
        own = {"long_prompt": long_prompt, "weighting": weighting, "blend": blend}
        try:
            for name, value in own.items():
                if value is not None:
                    setattr(self, name, value)
            yield
        finally:
            for name, value in usual.items():
                setattr(self, name, value)


class FineLIPStableDiffusionPipeline(_LongPromptMixin, StableDiffusionPipeline):
    """Stable Diffusion 1.x / 2.x with a long text encoder; everything else is diffusers' `StableDiffusionPipeline`.

    Args:
        vae: As in diffusers.
        text_encoder: A long encoder (more than 77 positions), used as it is; or a stock one, which is kept as
            `stock_text_encoder`, while `finelip`, or a stretched copy, takes its place.
        tokenizer: The tokenizer of `text_encoder`.
        unet: As in diffusers.
        scheduler: As in diffusers.
        safety_checker: As in diffusers.
        feature_extractor: As in diffusers.
        image_encoder: As in diffusers.
        requires_safety_checker: As in diffusers.
        stock_text_encoder: The 77-token encoder that `"truncate"`, `"chunk"`, `"segment"` and `"auto"` read with.
        stock_tokenizer: Its tokenizer.
        finelip: Any source of `load_text_encoder`.
        long_prompt: How prompts are read.
        weighting: The syntax in which words get their weights: `"plain"` (none), `"a1111"` or `"compel"`.
        blend: Share of the long encoder's states in what `"stretch"` reads; the rest are the stock encoder's.

    Raises:
        ValueError: If an encoder's width is not the one that the UNet reads, or an argument is none of its choices.
    """

    model_cpu_offload_seq = f"stock_text_encoder->{StableDiffusionPipeline.model_cpu_offload_seq}"
    _optional_components: ClassVar[list[str]] = [
        *StableDiffusionPipeline._optional_components,
        "stock_text_encoder",
        "stock_tokenizer",
    ]
    _lora_loadable_modules: ClassVar[list[str]] = [
        *StableDiffusionPipeline._lora_loadable_modules,
        "stock_text_encoder",
    ]
    _stock_class = StableDiffusionPipeline

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
        stock_text_encoder: CLIPTextModel | None = None,
        stock_tokenizer: CLIPTokenizer | None = None,
        finelip: str | Path | None = None,
        long_prompt: str = "stretch",
        weighting: str = "plain",
        blend: float = 1.0,
    ):
        if is_stock(text_encoder):
            stock_text_encoder, stock_tokenizer = text_encoder, tokenizer
        text_encoder, tokenizer = long_encoder(text_encoder, tokenizer, finelip)
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self.register_modules(stock_text_encoder=stock_text_encoder, stock_tokenizer=stock_tokenizer)
        check_widths([text_encoder], unet)
        self.long_prompt, self.weighting, self.blend = long_prompt, weighting, blend

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
        **kwargs: Any,
    ):
        """Generates images; all arguments but `long_prompt`, `weighting` and `blend` are those of diffusers'
        `StableDiffusionPipeline`.

        Args:
            prompt: One prompt or several.
            *args: As in diffusers.
            long_prompt: How prompts are read in this call, or None for the pipeline's setting.
            weighting: The syntax of weights in this call, or None for the pipeline's setting.
            blend: Share of the long encoder in this call, or None for the pipeline's setting.
            **kwargs: As in diffusers.

        Returns:
            As in diffusers.

        Raises:
            ValueError: For what diffusers refuses, an argument that is none of its choices, or a strategy whose
                encoder is missing.
        """
        with self._reading_with(long_prompt, weighting, blend):
            return super().__call__(prompt, *args, **kwargs)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encodes prompts as diffusers does, but whole.

        Prompts, negative prompts and ready embeddings come out at one length, that of the longest: shorter ones go on
        with windows of the empty prompt. As in diffusers, `clip_skip` does not apply to the negative prompt.

        Args:
            prompt: B prompts, or None with `prompt_embeds`.
            device: Where to encode.
            num_images_per_prompt: N.
            do_classifier_free_guidance: Whether the negative side is wanted.
            negative_prompt: One for all, or B of them; None is the empty prompt.
            prompt_embeds: (B, T, D), ready states.
            negative_prompt_embeds: (B, T, D), ready states.
            lora_scale: Weight of LoRA layers in the text encoder.
            clip_skip: Layers to leave out before the final LayerNorm.
            long_prompt: How prompts are read, or None for the pipeline's setting.
            weighting: The syntax of weights, or None for the pipeline's setting.
            blend: Share of the long encoder, or None for the pipeline's setting.

        Returns:
            (B * N, T, D) states of the prompts and of the negative ones (or None).

        Raises:
            ValueError: If the negative prompts are neither one nor B, a layer does not exist, an argument is none of
                its choices, or a strategy lacks its encoder.
        """
        prompts = _texts(prompt) if prompt_embeds is None else None
        negatives = None
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negatives = _texts(negative_prompt or "", _size(prompts, prompt_embeds))
        if prompts is not None or negatives is not None:
            with self._reading_with(long_prompt, weighting, blend):
                prompt_embeds, negative_prompt_embeds, _, _ = self._encode(
                    None if prompts is None else [prompts],
                    None if negatives is None else [negatives],
                    prompt_embeds,
                    negative_prompt_embeds,
                    device=device,
                    lora_scale=lora_scale,
                    layers=(-1 - (clip_skip or 0), -1),
                    norm=True,
                )
        return super().encode_prompt(
            None,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=lora_scale,
        )


class FineLIPStableDiffusionXLPipeline(_LongPromptMixin, StableDiffusionXLPipeline):
    """Stable Diffusion XL with two long text encoders; everything else is diffusers' `StableDiffusionXLPipeline`.

    SDXL joins the token states of both encoders position by position. `finelip` replaces the first (CLIP-L); the
    second (OpenCLIP bigG), for which no long weights exist, is stretched without training. The pooled output comes
    from the first window of the second encoder.

    Args:
        vae: As in diffusers.
        text_encoder: A long encoder, used as it is; or a stock one, which is kept as `stock_text_encoder`, while
            `finelip`, or a stretched copy, takes its place.
        text_encoder_2: The same for the second encoder; a stock one is stretched.
        tokenizer: The tokenizer of `text_encoder`.
        tokenizer_2: The tokenizer of `text_encoder_2`.
        unet: As in diffusers.
        scheduler: As in diffusers.
        image_encoder: As in diffusers.
        feature_extractor: As in diffusers.
        force_zeros_for_empty_prompt: As in diffusers.
        add_watermarker: As in diffusers.
        stock_text_encoder: The 77-token encoder that `"truncate"`, `"chunk"`, `"segment"` and `"auto"` read with.
        stock_text_encoder_2: The same for the second place.
        stock_tokenizer: The tokenizer of `stock_text_encoder`.
        stock_tokenizer_2: The tokenizer of `stock_text_encoder_2`.
        finelip: Any source of `load_text_encoder`, for the first place.
        long_prompt: How prompts are read.
        weighting: The syntax in which words get their weights: `"plain"` (none), `"a1111"` or `"compel"`.
        blend: Share of the long encoder's states in what `"stretch"` reads; the rest are the stock encoder's.
        second_encoder: Under `"stretch"`, the second encoder's part: `"stretch"` reads with the stretched one;
            `"window"` reads with the stock one in windows of 75 tokens, whose states are joined (start and end kept
            once), so that token by token they stand beside those of the first encoder.
        hidden_state: `"penultimate"` is what SDXL was trained on; `"last_norm"` is the last layer after the final
            LayerNorm, as the scripts of Long-CLIP and FineLIP feed it to SDXL.

    Raises:
        ValueError: If the widths of the encoders do not add up to the one that the UNet reads, or an argument is none
            of its choices.
    """

    model_cpu_offload_seq = (
        f"stock_text_encoder->stock_text_encoder_2->{StableDiffusionXLPipeline.model_cpu_offload_seq}"
    )
    _optional_components: ClassVar[list[str]] = [
        *StableDiffusionXLPipeline._optional_components,
        "stock_text_encoder",
        "stock_text_encoder_2",
        "stock_tokenizer",
        "stock_tokenizer_2",
    ]
    _lora_loadable_modules: ClassVar[list[str]] = [
        *StableDiffusionXLPipeline._lora_loadable_modules,
        "stock_text_encoder",
        "stock_text_encoder_2",
    ]
    _stock_class = StableDiffusionXLPipeline
    _places = ("", "_2")

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        stock_text_encoder: CLIPTextModel | None = None,
        stock_text_encoder_2: CLIPTextModelWithProjection | None = None,
        stock_tokenizer: CLIPTokenizer | None = None,
        stock_tokenizer_2: CLIPTokenizer | None = None,
        finelip: str | Path | None = None,
        long_prompt: str = "stretch",
        weighting: str = "plain",
        blend: float = 1.0,
        second_encoder: str = "stretch",
        hidden_state: str = "penultimate",
    ):
        if is_stock(text_encoder):
            stock_text_encoder, stock_tokenizer = text_encoder, tokenizer
        if is_stock(text_encoder_2):
            stock_text_encoder_2, stock_tokenizer_2 = text_encoder_2, tokenizer_2
        text_encoder, tokenizer = long_encoder(text_encoder, tokenizer, finelip)
        text_encoder_2, tokenizer_2 = long_encoder(text_encoder_2, tokenizer_2, warn=False)
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self.register_modules(
            stock_text_encoder=stock_text_encoder,
            stock_text_encoder_2=stock_text_encoder_2,
            stock_tokenizer=stock_tokenizer,
            stock_tokenizer_2=stock_tokenizer_2,
        )
        check_widths([text_encoder, text_encoder_2], unet)
        self.long_prompt, self.weighting, self.blend = long_prompt, weighting, blend
        self.second_encoder = _one_of("second_encoder", second_encoder, SECOND_ENCODERS)
        self.hidden_state = _one_of("hidden_state", hidden_state, HIDDEN_STATES)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
        **kwargs: Any,
    ):
        """Generates images; all arguments but `long_prompt`, `weighting` and `blend` are those of diffusers'
        `StableDiffusionXLPipeline`.

        Args:
            prompt: One prompt or several.
            *args: As in diffusers.
            long_prompt: How prompts are read in this call, or None for the pipeline's setting.
            weighting: The syntax of weights in this call, or None for the pipeline's setting.
            blend: Share of the long encoder in this call, or None for the pipeline's setting.
            **kwargs: As in diffusers.

        Returns:
            As in diffusers.

        Raises:
            ValueError: For what diffusers refuses, an argument that is none of its choices, or a strategy whose
                encoder is missing.
        """
        with self._reading_with(long_prompt, weighting, blend):
            return super().__call__(prompt, *args, **kwargs)

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Encodes prompts as diffusers does, but whole; lengths as in `FineLIPStableDiffusionPipeline.encode_prompt`.

        Args:
            prompt: B prompts, or None with `prompt_embeds`.
            prompt_2: Prompts for the second encoder; None repeats `prompt`.
            device: Where to encode.
            num_images_per_prompt: N.
            do_classifier_free_guidance: Whether the negative side is wanted.
            negative_prompt: One for all, or B of them; None is zeros, or the empty prompt where
                `force_zeros_for_empty_prompt` is off.
            negative_prompt_2: The same for the second encoder; None repeats `negative_prompt`.
            prompt_embeds: (B, T, D), ready states.
            negative_prompt_embeds: (B, T, D), ready states.
            pooled_prompt_embeds: (B, E), ready.
            negative_pooled_prompt_embeds: (B, E), ready.
            lora_scale: Weight of LoRA layers in the text encoders.
            clip_skip: Layers to leave out, counted from the one that `hidden_state` names.
            long_prompt: How prompts are read, or None for the pipeline's setting.
            weighting: The syntax of weights, or None for the pipeline's setting.
            blend: Share of the long encoder, or None for the pipeline's setting.

        Returns:
            (B * N, T, D) states of the prompts and of the negative ones (or None), and (B * N, E) pooled outputs of
            both.

        Raises:
            ValueError: If the negative prompts are neither one nor B, a layer does not exist, an argument is none of
                its choices, or a strategy lacks its encoder.
        """
        device = device or self._execution_device
        prompts = negatives = None
        if prompt_embeds is None:
            prompts = [_texts(prompt), _texts(prompt_2 or prompt)]
        zeros = negative_prompt is None and self.config.force_zeros_for_empty_prompt
        if do_classifier_free_guidance and negative_prompt_embeds is None and not zeros:
            size = _size(prompts[0] if prompts else None, prompt_embeds)
            negatives = [_texts(text or "", size) for text in (negative_prompt, negative_prompt_2 or negative_prompt)]
        if prompts is not None or negatives is not None:
            norm = self.hidden_state == "last_norm"
            layer = -1 if norm else -2
            with self._reading_with(long_prompt, weighting, blend):
                prompt_embeds, negative_prompt_embeds, pooled, negative_pooled = self._encode(
                    prompts,
                    negatives,
                    prompt_embeds,
                    negative_prompt_embeds,
                    device=device,
                    lora_scale=lora_scale,
                    layers=(layer - (clip_skip or 0), layer),
                    norm=norm,
                )
            pooled_prompt_embeds = pooled if pooled_prompt_embeds is None else pooled_prompt_embeds
            if negative_pooled_prompt_embeds is None:
                negative_pooled_prompt_embeds = negative_pooled
        return super().encode_prompt(
            None,
            device=device,
            num_images_per_prompt=num_images_per_prompt,
            do_classifier_free_guidance=do_classifier_free_guidance,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            lora_scale=lora_scale,
        )

    def _readers(self, how: LongPrompt) -> list[_Reader]:
        readers = super()._readers(how)
        if how == "stretch" and self.second_encoder == "window":
            span_length = readers[0].tokenizer.model_max_length
            readers[1] = replace(self._reader(_STOCK, "_2", "chunk"), cut="packed", span_length=span_length)
        return readers


def _adapted_unet(finelip: str | Path | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The UNet beside a long encoder, for the arguments of a loader that gives none itself."""
    if "unet" in kwargs or finelip is None or not (Path(finelip) / "unet").is_dir():
        return {}
    logger.info("the UNet in %s was adapted to the encoder beside it and replaces that of the base", finelip)
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    device_map = kwargs.get("device_map")
    unet = UNet2DConditionModel.from_pretrained(finelip, subfolder="unet", torch_dtype=dtype, device_map=device_map)
    return {"unet": unet}


def _and_stock(pipe: Any, text_encoder: TextEncoder) -> list[tuple[TextEncoder, CLIPTokenizer | None]]:
    """An encoder without its tokenizer, and, if it is a pipeline's long one, the stock one beside it with its own."""
    found: list[tuple[TextEncoder, CLIPTokenizer | None]] = [(text_encoder, None)]
    for place in pipe._places if isinstance(pipe, _LongPromptMixin) else ():
        stock = getattr(pipe, f"{_STOCK}text_encoder{place}")
        if stock is not None and text_encoder is getattr(pipe, f"text_encoder{place}"):
            found.append((stock, getattr(pipe, f"{_STOCK}tokenizer{place}")))
    return found


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
    readers: list[_Reader], readings: list[list[_Mixed]], length: int, **how: Any
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


def _texts(prompt: str | list[str] | None, size: int | None = None) -> list[str]:
    """A list of prompts, of `size` of them where that is given."""
    if prompt is None:
        raise ValueError("neither prompt nor prompt_embeds is given: one of the two is needed.")
    texts = [prompt] * (size or 1) if isinstance(prompt, str) else list(prompt)
    if size is not None and len(texts) != size:
        raise ValueError(f"{len(texts)} negative prompts for {size} prompts: give one, or one for each.")
    return texts


def _size(prompts: list[str] | None, prompt_embeds: Tensor | None) -> int:
    """Prompts of a call, which come as one or the other."""
    return len(prompts) if prompts is not None else len(prompt_embeds)  # type: ignore[arg-type]


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(choices)}.")
    return value
