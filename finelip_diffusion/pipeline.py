"""Stable Diffusion pipelines for long prompts: diffusers' own, which are given the states of whole prompts."""

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast, overload

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
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from .adapters import AdapterPipeline
from .drawing import draw
from .encoding import PromptEmbeds
from .lengthening import STOCK, check_widths, default_settings, in_place, is_stock, second_source
from .loading import adapted_unet, fuse_adapters, single_file_components
from .locations import BUNDLED_MODEL, model_index
from .prompt_encoder import PromptEncoder, with_signature_of
from .prompts import LongPrompt, PromptReport, PromptSettings, Weighting
from .publishing import push_to_hub
from .upstream import name_dtype

HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "token")


_Pipeline = TypeVar("_Pipeline", bound="_LongPromptPipeline")


def _setting(name: str, doc: str) -> Any:
    """A setting of the pipeline as an attribute; a new value makes new settings."""

    def put(pipe: Any, value: Any) -> None:
        pipe.prompt_settings = pipe.prompt_settings.but(**{name: value})

    return property(lambda pipe: getattr(pipe.prompt_settings, name), put, doc=doc)


def _check(long_prompt: LongPrompt | None, given: dict[str, Any]) -> None:
    """Refuses settings before anything is loaded."""
    PromptSettings(long_prompt or "stretch").but(weighting=given.get("weighting"), blend=given.get("blend"))


def _with_stock(config: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("_") if key.startswith(f"_{STOCK}") else key: value for key, value in config.items()}


class _LongPromptPipeline(AdapterPipeline):
    """What both pipelines share: loading and saving of a long and a stock text encoder in each place, and reading."""

    _stock_class: ClassVar[type[DiffusionPipeline]]
    prompt_settings: PromptSettings

    long_prompt = _setting("long_prompt", "How prompts are read; docs/pipelines.md has the table.")
    weighting = _setting("weighting", "The syntax in which words get their weights; `'plain'` is none.")
    blend = _setting("blend", "Share of the long encoder's states in what `'stretch'` reads.")

    @classmethod
    def from_pretrained(
        cls: type[_Pipeline],
        base: str | Path | None = None,
        finelip: str | Path | None = None,
        long_prompt: LongPrompt | None = None,
        **kwargs: Any,
    ) -> _Pipeline:
        """Loads a Stable Diffusion and puts a long text encoder into it.

        Args:
            base: Folder or hub id of a Stable Diffusion, in diffusers' layout. None is the bundled model.
            finelip: Any source of `load_text_encoder`. If it is a folder with a `unet/`, that UNet was adapted to the
                encoder and replaces the base's, unless `unet=` is given; a `pytorch_lora_weights.safetensors` there is
                fused into the base's. None takes the base's own encoder as it is;
                under `long_prompt="stretch"` a stock one is stretched without training, with a warning.
            long_prompt: How prompts are read: `"stretch"`, `"truncate"`, `"chunk"`, `"segment"` or `"auto"`. None is
                the best that the loaded parts can do: `"stretch"` with a trained long encoder, `"chunk"` without.
            **kwargs: As for diffusers' `from_pretrained`, and `weighting`, `blend`, `second_encoder`, `hidden_state`.
                `stock_text_encoder=None` (for SDXL `stock_text_encoder_2=None`, too) keeps no stock encoder beside a
                long one: half the memory, and `"stretch"` alone.

        Returns:
            The pipeline.

        Raises:
            ValueError: If the base is not a pipeline's folder and cannot be had from the hub, the encoder's width is
                not the one that the UNet reads, or an argument is not one of its choices; and whatever
                `load_text_encoder` raises.
            OSError: If a part of the base is missing.
        """
        _check(long_prompt, kwargs)
        kwargs = name_dtype(kwargs)
        if base is None:
            base, finelip = BUNDLED_MODEL, finelip or BUNDLED_MODEL / "finelip"
        model_index(base, {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs})
        unwanted = [place for place in cls._places if kwargs.get(f"{STOCK}text_encoder{place}", ...) is None]
        if Path(base).is_dir():  # one that `from_pipe` made of ours names the stock encoders, and saves none
            names = [f"{STOCK}{part}{place}" for part in ("text_encoder", "tokenizer") for place in cls._places]
            kwargs = {**{name: None for name in names if not (Path(base) / name).is_dir()}, **kwargs}
        kwargs |= adapted_unet(finelip, kwargs)
        pipe = super().from_pretrained(str(base), finelip=finelip, long_prompt=long_prompt, **kwargs)
        fuse_adapters(pipe, finelip, kwargs)
        for place in unwanted:
            pipe.register_modules(**{f"{STOCK}text_encoder{place}": None, f"{STOCK}tokenizer{place}": None})
        if "_2" in unwanted:
            pipe.prompt_settings = pipe.prompt_settings.but(second_encoder=kwargs.get("second_encoder", "stretch"))
        return pipe

    @classmethod
    def from_single_file(
        cls: type[_Pipeline],
        path: str | Path,
        finelip: str | Path | None = None,
        long_prompt: LongPrompt | None = None,
        config: str | Path | None = None,
        **kwargs: Any,
    ) -> _Pipeline:
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
                is not one of its choices; and whatever `load_text_encoder` raises.
        """
        _check(long_prompt, kwargs)
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
        kwargs = {**adapted_unet(finelip, kwargs), **kwargs}
        kwargs = {"config": str(folder), "finelip": finelip, "long_prompt": long_prompt, **components, **kwargs}
        pipe = super().from_single_file(str(file), **kwargs)
        fuse_adapters(pipe, finelip, kwargs)
        return pipe

    @classmethod
    def _dict_from_json_file(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The `model_index.json` with the stock encoders, which diffusers' own classes must not see; what is found by
        their names are their folders, also on the hub, and variants of their weights."""
        return _with_stock(super()._dict_from_json_file(*args, **kwargs))

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The same for `custom_pipeline=`, where diffusers' base class reads the file."""
        return super().extract_init_dict(_with_stock(config_dict), **kwargs)

    def to_json_string(self) -> str:
        """The `model_index.json`, in the name of diffusers' own class, so that plain diffusers loads it."""
        config = json.loads(super().to_json_string())
        config = {f"_{key}" if key.startswith(STOCK) else key: value for key, value in config.items()}
        config["_class_name"] = self._stock_class.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @overload
    def describe_prompt(
        self,
        prompt: str,
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
    ) -> PromptReport: ...

    @overload
    def describe_prompt(
        self,
        prompt: list[str],
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
    ) -> list[PromptReport]: ...

    def describe_prompt(
        self,
        prompt: str | list[str],
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
    ) -> PromptReport | list[PromptReport]:
        """Says what the pipeline would read of a prompt, what it would drop, and why it reads prompts so.

        Args:
            prompt: A prompt, or several.
            long_prompt: A strategy, or None for the pipeline's.
            weighting: A syntax of weights, or None for the pipeline's.
            blend: A share of the long encoder, or None for the pipeline's.

        Returns:
            The report, or one for each prompt of a list.

        Raises:
            ValueError: If an argument is not one of its choices, or a strategy needs a stock encoder that the pipeline
                does not have.
        """
        return self._prompt_encoder(long_prompt, weighting, blend).describe(prompt)

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
        return self._prompt_encoder(long_prompt, weighting, blend).encode(prompt, negative_prompt, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **options: Any,
    ) -> str:
        """Saves the pipeline and uploads it in one commit, with a model card.

        Args:
            repo_id: Where it goes: `owner/name`. The repository is made if it does not exist.
            safe_serialization: As for `save_pretrained`.
            variant: As for `save_pretrained`.
            max_shard_size: As for `save_pretrained`.
            **options: For `publishing.push_to_hub`: `base_model`, `private`, `token`, `revision`, `commit_message`,
                `create_pr`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: If the hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(
                folder, safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size
            )
            return push_to_hub(folder, repo_id, **options)

    def _prompt_encoder(self, long_prompt: str | None, weighting: str | None, blend: float | None) -> PromptEncoder:
        settings = self.prompt_settings.but(long_prompt=long_prompt, weighting=weighting, blend=blend)
        return PromptEncoder(self, settings)


class FineLIPStableDiffusionPipeline(_LongPromptPipeline, StableDiffusionPipeline):
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
        ValueError: If an encoder's width is not the one that the UNet reads, or an argument is not one of its choices.
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
        long_prompt: str | None = None,
        weighting: str = "plain",
        blend: float = 1.0,
    ):
        stretch = long_prompt == "stretch"
        first = in_place(text_encoder, tokenizer, stock_text_encoder, stock_tokenizer, finelip, stretch=stretch)
        super().__init__(
            vae=vae,
            text_encoder=first.text_encoder,
            tokenizer=first.tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self.register_modules(stock_text_encoder=first.stock_text_encoder, stock_tokenizer=first.stock_tokenizer)
        check_widths([first.text_encoder], unet)
        self.prompt_settings = default_settings(cast(LongPrompt | None, long_prompt), first).but(
            weighting=weighting, blend=blend
        )

    @with_signature_of(StableDiffusionPipeline.__call__)
    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates images; all arguments but the three of this package are those of diffusers' own.

        Args:
            *args: As for diffusers' `StableDiffusionPipeline`.
            long_prompt: How prompts are read in this call, or None for the pipeline's setting.
            weighting: The syntax of weights in this call, or None for the pipeline's setting.
            blend: Share of the long encoder in this call, or None for the pipeline's setting.
            **kwargs: As for diffusers' `StableDiffusionPipeline`.

        Returns:
            As in diffusers.

        Raises:
            ValueError: For what diffusers refuses, an argument that is not one of its choices, or a strategy whose
                encoder is missing.
        """
        return draw(self._prompt_encoder(long_prompt, weighting, blend), super().__call__, args, kwargs)

    @with_signature_of(StableDiffusionPipeline.encode_prompt)
    def encode_prompt(
        self,
        *args: Any,
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encodes prompts as diffusers does, but whole; `PromptEncoder.ready` says how they come to one length.

        Args:
            *args: As in diffusers.
            long_prompt: How prompts are read, or None for the pipeline's setting.
            weighting: The syntax of weights, or None for the pipeline's setting.
            blend: Share of the long encoder, or None for the pipeline's setting.
            **kwargs: As in diffusers.

        Returns:
            As in diffusers: (B * N, T, D) states of the prompts and of the negative ones (or None).

        Raises:
            ValueError: If the negative prompts are neither one nor as many as the prompts, a layer does not exist, an
                argument is not one of its choices, or a strategy lacks its encoder.
        """
        encoder = self._prompt_encoder(long_prompt, weighting, blend)
        return encoder.encode_prompt(super().encode_prompt, args, kwargs)


class FineLIPStableDiffusionXLPipeline(_LongPromptPipeline, StableDiffusionXLPipeline):
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
        finelip: Any source of `load_text_encoder`, for the first place; a `text_encoder_2/` in its folder takes the
            second.
        long_prompt: How prompts are read.
        weighting: The syntax in which words get their weights: `"plain"` (none), `"a1111"` or `"compel"`.
        blend: Share of the long encoder's states in what `"stretch"` reads; the rest are the stock encoder's.
        second_encoder: Under `"stretch"`, the second encoder's part: `"stretch"` reads with the stretched one;
            `"window"` reads with the stock one in windows of 75 tokens, whose states are joined (start and end kept
            once), so that token by token they stand beside those of the first encoder.
        hidden_state: `"penultimate"` is what SDXL was trained on; `"last_norm"` is the last layer after the final
            LayerNorm, as the scripts of Long-CLIP and FineLIP feed it to SDXL.

    Raises:
        ValueError: If the widths of the encoders do not add up to the one that the UNet reads, or an argument is not
            one of its choices.
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

    second_encoder = _setting("second_encoder", "The second encoder's part under `'stretch'`.")
    hidden_state = _setting("hidden_state", "The states that the UNet reads.")

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
        long_prompt: str | None = None,
        weighting: str = "plain",
        blend: float = 1.0,
        second_encoder: str | None = None,
        hidden_state: str = "penultimate",
    ):
        stretch = long_prompt == "stretch"
        first = in_place(text_encoder, tokenizer, stock_text_encoder, stock_tokenizer, finelip, stretch=stretch)
        beside, asked = second_source(finelip)
        second = in_place(
            text_encoder_2,
            tokenizer_2,
            stock_text_encoder_2,
            stock_tokenizer_2,
            beside,
            stretch=not is_stock(first.text_encoder),  # both encoders end at one length
            warn=False,
            **asked,
        )
        super().__init__(
            vae=vae,
            text_encoder=first.text_encoder,
            text_encoder_2=second.text_encoder,
            tokenizer=first.tokenizer,
            tokenizer_2=second.tokenizer,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self.register_modules(
            stock_text_encoder=first.stock_text_encoder,
            stock_text_encoder_2=second.stock_text_encoder,
            stock_tokenizer=first.stock_tokenizer,
            stock_tokenizer_2=second.stock_tokenizer,
        )
        check_widths([first.text_encoder, second.text_encoder], unet)
        self.prompt_settings = default_settings(cast(LongPrompt | None, long_prompt), first, second).but(
            weighting=weighting, blend=blend, second_encoder=second_encoder, hidden_state=hidden_state
        )

    @with_signature_of(StableDiffusionXLPipeline.__call__)
    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates images; all arguments but the three of this package are those of diffusers' own.

        Args:
            *args: As for diffusers' `StableDiffusionXLPipeline`.
            long_prompt: How prompts are read in this call, or None for the pipeline's setting.
            weighting: The syntax of weights in this call, or None for the pipeline's setting.
            blend: Share of the long encoder in this call, or None for the pipeline's setting.
            **kwargs: As for diffusers' `StableDiffusionXLPipeline`.

        Returns:
            As in diffusers.

        Raises:
            ValueError: For what diffusers refuses, an argument that is not one of its choices, or a strategy whose
                encoder is missing.
        """
        return draw(self._prompt_encoder(long_prompt, weighting, blend), super().__call__, args, kwargs)

    @with_signature_of(StableDiffusionXLPipeline.encode_prompt)
    def encode_prompt(
        self,
        *args: Any,
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encodes prompts as diffusers does, but whole; `PromptEncoder.ready` says how they come to one length.

        Args:
            *args: As in diffusers.
            long_prompt: How prompts are read, or None for the pipeline's setting.
            weighting: The syntax of weights, or None for the pipeline's setting.
            blend: Share of the long encoder, or None for the pipeline's setting.
            **kwargs: As in diffusers.

        Returns:
            As in diffusers: (B * N, T, D) states of the prompts and of the negative ones (or None), and (B * N, E)
            pooled outputs of both.

        Raises:
            ValueError: If the negative prompts are neither one nor as many as the prompts, a layer does not exist, an
                argument is not one of its choices, or a strategy lacks its encoder.
        """
        encoder = self._prompt_encoder(long_prompt, weighting, blend)
        return encoder.encode_prompt(super().encode_prompt, args, kwargs)
