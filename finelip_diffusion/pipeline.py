"""Stable Diffusion pipelines for long prompts: thin subclasses of diffusers' own."""

import json
import logging
from dataclasses import replace
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
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from .adapters import AdapterMixin
from .components import STOCK, check_widths, is_stock, long_encoder, single_file_components
from .locations import model_index
from .prompts import LONG_PROMPTS, LongPrompt
from .readers import Reader, ReadingMixin, one_of
from .upstream import name_dtype
from .weighting import Weighting

logger = logging.getLogger(__name__)

BUNDLED_MODEL = Path(__file__).parent / "bundled"
"""A small Stable Diffusion of the scenes world; its `finelip/` holds the long encoder and the UNet adapted to it."""

HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "token")
SECOND_ENCODERS = ("stretch", "window")
HIDDEN_STATES = ("penultimate", "last_norm")


class _LongPromptMixin(AdapterMixin, ReadingMixin):
    """What both pipelines share: loading and saving of a long and a stock text encoder in each place."""

    _stock_class: ClassVar[type[DiffusionPipeline]]

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
            ValueError: If the base is not a pipeline's folder and cannot be had from the hub, the encoder's width is
                not the one that the UNet reads, or an argument is none of its choices; and whatever
                `load_text_encoder` raises.
            OSError: If a part of the base is missing.
        """
        one_of("long_prompt", long_prompt, LONG_PROMPTS)
        kwargs = name_dtype(kwargs)
        if base is None:
            base, finelip = BUNDLED_MODEL, finelip or BUNDLED_MODEL / "finelip"
        model_index(base, {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs})
        if Path(base).is_dir():  # one that `from_pipe` made of ours names the stock encoders, and saves none
            names = [f"{STOCK}{part}{place}" for part in ("text_encoder", "tokenizer") for place in cls._places]
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
        one_of("long_prompt", long_prompt, LONG_PROMPTS)
        kwargs = name_dtype(kwargs)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype")) or torch.float32  # diffusers' default for a file
        hub: dict[str, Any] = {
            name: kwargs[name] for name in ("token", "local_files_only", "cache_dir") if name in kwargs
        }
        file, folder, components = single_file_components(
            path, cls._places, set(kwargs), config=config, dtype=dtype, hub=hub
        )
        for place in cls._places:  # a configuration saved by this class has these, a file has not
            components |= {f"{STOCK}text_encoder{place}": None, f"{STOCK}tokenizer{place}": None}
        kwargs = {**_adapted_unet(finelip, kwargs), **kwargs}
        kwargs = {"config": str(folder), "finelip": finelip, "long_prompt": long_prompt, **components, **kwargs}
        return super().from_single_file(str(file), **kwargs)  # type: ignore[misc]

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Gives the stock encoders, which diffusers' own classes must not see, back to ours."""
        public = {key.removeprefix("_") if key.startswith(f"_{STOCK}") else key: v for key, v in config_dict.items()}
        return super().extract_init_dict(public, **kwargs)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """The `model_index.json`, in the name of diffusers' own class, so that plain diffusers loads it."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config = {f"_{key}" if key.startswith(STOCK) else key: value for key, value in config.items()}
        config["_class_name"] = self._stock_class.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


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
        with self.reading_with(long_prompt, weighting, blend):
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
            with self.reading_with(long_prompt, weighting, blend):
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
        self.second_encoder = one_of("second_encoder", second_encoder, SECOND_ENCODERS)
        self.hidden_state = one_of("hidden_state", hidden_state, HIDDEN_STATES)

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
        with self.reading_with(long_prompt, weighting, blend):
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
            with self.reading_with(long_prompt, weighting, blend):
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

    def _readers(self, how: LongPrompt) -> list[Reader]:
        readers = super()._readers(how)
        if how == "stretch" and self.second_encoder == "window":
            span_length = readers[0].tokenizer.model_max_length
            readers[1] = replace(self._reader(STOCK, "_2", "chunk"), cut="packed", span_length=span_length)
        return readers


def _adapted_unet(finelip: str | Path | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The UNet beside a long encoder, for the arguments of a loader that gives none itself."""
    if "unet" in kwargs or finelip is None or not (Path(finelip) / "unet").is_dir():
        return {}
    logger.info("the UNet in %s was adapted to the encoder beside it and replaces that of the base", finelip)
    options = {name: kwargs[name] for name in ("dtype", "torch_dtype", "device_map") if name in kwargs}
    unet = UNet2DConditionModel.from_pretrained(finelip, subfolder="unet", **options)
    return {"unet": unet}


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
