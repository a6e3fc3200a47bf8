"""Image tuning: a pipeline's text encoders are trained through its frozen UNet."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .denoising import denoising_target, min_snr_weights, squared_error
from .lengthening import check_lengths, check_widths, long_encoder
from .pipeline import BUNDLED_MODEL, FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
from .text_encoder import TextEncoder

STRETCHED = "stretched"
"""Given for a long encoder: the base's own, its positions stretched."""

TERMS = ("denoising", "kept_states", "kept_predictions")
"""What may be trained for; `docs/image_tuning.md` says what each is."""


@dataclass
class Place:
    """A text encoder of a pipeline.

    Attributes:
        encoder: The long one.
        tokenizer: Its tokenizer.
        stock: The base's own, frozen.
    """

    encoder: TextEncoder
    tokenizer: CLIPTokenizer
    stock: TextEncoder


@dataclass
class Parts:
    """A pipeline in parts; all is frozen until something is said to be trained.

    Attributes:
        pipeline: Diffusers' own, which draws with the long encoders.
        places: By the name of the component, `text_encoder` and `text_encoder_2`.
        scheduler: The noise schedule of training.
    """

    pipeline: DiffusionPipeline
    places: dict[str, Place]
    scheduler: DDPMScheduler

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoiser."""
        return self.pipeline.unet

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder."""
        return self.pipeline.vae

    @property
    def is_xl(self) -> bool:
        """Whether the UNet reads what SDXL's does: the layer before the last, a pooled output, sizes."""
        return getattr(self.unet.config, "addition_embed_type", None) == "text_time"


def load_parts(base: str | Path | None, finelip: str | Path | None = None, **options: Any) -> Parts:
    """Loads a Stable Diffusion, its long text encoders beside its own.

    Args:
        base: Folder, hub id, or one file; None is the bundled model with its base UNet.
        finelip: A long encoder, see `load_text_encoder`; `"stretched"` for the base's own. None is the bundled one
            for the bundled model, and `"stretched"` for others.
        **options: For diffusers' `from_pretrained` or `from_single_file`.

    Raises:
        ValueError: If the base is not a Stable Diffusion, or the encoder does not fit it.
        OSError: If the base is not there.
    """
    if base is None or Path(base).resolve() == BUNDLED_MODEL.resolve():
        base, finelip = BUNDLED_MODEL, finelip or BUNDLED_MODEL / "finelip"
    stock = _stock_pipeline(base, options)
    names = [name for name in ("text_encoder", "text_encoder_2") if getattr(stock, name, None) is not None]
    places = {}
    for name in names:
        own, tokenizer = getattr(stock, name), getattr(stock, name.replace("text_encoder", "tokenizer"))
        source, extra = _source_of(name, finelip)
        encoder, its_tokenizer = long_encoder(own, tokenizer, source, warn=False, **extra)
        assert encoder is not None and its_tokenizer is not None
        if encoder is own:  # a long base: training must not move the stock one
            encoder = copy.deepcopy(own)
        places[name] = Place(encoder, its_tokenizer, own)
    check_lengths([place.encoder for place in places.values()])
    check_widths([place.encoder for place in places.values()], stock.unet)
    for part in stock.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    scheduler = DDPMScheduler.from_config(stock.scheduler.config)
    long_parts: dict[str, Any] = {}
    for name, place in places.items():
        place.encoder.requires_grad_(False).eval()
        long_parts |= {name: place.encoder, name.replace("text_encoder", "tokenizer"): place.tokenizer}
    stock.register_modules(**long_parts)
    stock.set_progress_bar_config(disable=True)
    return Parts(stock, places, scheduler)


def _stock_pipeline(base: str | Path, options: dict[str, Any]) -> Any:
    """Diffusers' own pipeline of a base."""
    if Path(base).is_file() or str(base).startswith("http"):
        xl = any("text_encoder_2" in name for name in _embedded(base))
        ours: Any = FineLIPStableDiffusionXLPipeline if xl else FineLIPStableDiffusionPipeline
        loaded = ours.from_single_file(base, long_prompt="truncate", **options)
        parts = {name: part for name, part in loaded.components.items() if not name.startswith("stock_")}
        for place in ("", "_2") if xl else ("",):
            kept = getattr(loaded, f"stock_text_encoder{place}", None)
            if kept is not None:
                parts[f"text_encoder{place}"] = kept
                parts[f"tokenizer{place}"] = getattr(loaded, f"stock_tokenizer{place}")
        return ours._stock_class(**parts, **({} if xl else {"requires_safety_checker": False}))
    kind = DiffusionPipeline.load_config(str(base)).get("_class_name")
    known = {
        name: ours._stock_class
        for ours in (FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline)
        for name in (ours.__name__, ours._stock_class.__name__)
    }
    if kind not in known:
        raise ValueError(f"{base} is a {kind}: give a Stable Diffusion 1.x, 2.x or XL.")
    return known[kind].from_pretrained(str(base), **options)


def _embedded(base: str | Path) -> list[str]:
    from .checkpoints import read_checkpoint
    from .layouts import embedded_encoders
    from .locations import checkpoint_file

    file = checkpoint_file(base, {})
    return [] if file is None else list(embedded_encoders(read_checkpoint(file)))


def _source_of(name: str, finelip: str | Path | None) -> tuple[str | Path | None, dict[str, Any]]:
    """Where the long encoder of a place comes from, and how it is asked for."""
    if finelip is None or str(finelip) == STRETCHED:
        return None, {}
    if name == "text_encoder":
        return finelip, {}
    return (finelip, {"subfolder": name}) if (Path(finelip) / name).is_dir() else (None, {})


# ------------------------------------------------------------------------------------------------------------ a step


@dataclass(frozen=True)
class Conditioning:
    """What a UNet reads of prompts.

    Attributes:
        states: (B, T, D), of both encoders side by side for SDXL.
        pooled: (B, E), SDXL's.
    """

    states: Tensor
    pooled: Tensor | None = None

    def rows(self, chosen: slice | Tensor) -> "Conditioning":
        """Of some of the prompts."""
        return Conditioning(self.states[chosen], None if self.pooled is None else self.pooled[chosen])


def encode(encoders: Sequence[TextEncoder], input_ids: Sequence[Tensor], xl: bool) -> Conditioning:
    """Encodes prompts as diffusers' pipelines do, without their attention mask.

    Args:
        encoders: One, or SDXL's two.
        input_ids: (B, T) for each.
        xl: Whether the UNet reads the layer before the last, without the final norm, and a pooled output.
    """
    if not xl:
        return Conditioning(encoders[0](input_ids[0]).last_hidden_state)
    outputs = [model(ids, output_hidden_states=True) for model, ids in zip(encoders, input_ids, strict=True)]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return Conditioning(states, outputs[-1].text_embeds)


class TuningStep(nn.Module):
    """From a batch to the terms of the loss; its parameters are the encoders'."""

    def __init__(self, parts: Parts, terms: Mapping[str, float], min_snr_gamma: float | None = None):
        """Puts the parts together.

        Args:
            parts: Of the pipeline.
            terms: Weights of the terms, by name.
            min_snr_gamma: Weights the denoising loss by min-SNR; None does not.
        """
        super().__init__()
        self.encoders = nn.ModuleDict({name: place.encoder for name, place in parts.places.items()})
        self.terms, self.min_snr_gamma, self.is_xl = dict(terms), min_snr_gamma, parts.is_xl
        self._frozen = (parts.unet, parts.scheduler, [place.stock for place in parts.places.values()])  # no state

    def predict(self, noisy: Tensor, timesteps: Tensor, read: Conditioning, time_ids: Tensor | None) -> Tensor:
        """The UNet's prediction, (B, C, H, W)."""
        unet = self._frozen[0]
        added = None if read.pooled is None else {"text_embeds": read.pooled.to(unet.dtype), "time_ids": time_ids}
        return unet(
            noisy.to(unet.dtype), timesteps, read.states.to(unet.dtype), added_cond_kwargs=added, return_dict=False
        )[0]

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weighted terms by name, each a mean over the batch.

        Args:
            batch: latents, noise (B, C, H, W); timesteps (B,); `input_ids` and, for SDXL, `input_ids_2` (B, T); with
                terms that keep, `kept_ids`, `kept_ids_2` (K, Tk), prompts of the examples `kept_rows` (K,), of which
                the stock encoders read the first 77 positions; for SDXL `time_ids` (B, 6).
        """
        _, scheduler, stock = self._frozen
        encoders = list(self.encoders.values())
        latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
        noisy = scheduler.add_noise(latents, noise, timesteps)
        values: dict[str, Tensor] = {}
        if self.terms.get("denoising"):
            read = encode(encoders, _ids(batch, "input_ids"), self.is_xl)
            target = denoising_target(scheduler, latents, noise, timesteps)
            weights = None if self.min_snr_gamma is None else min_snr_weights(scheduler, timesteps, self.min_snr_gamma)
            values["denoising"] = squared_error(
                self.predict(noisy, timesteps, read, batch.get("time_ids")), target, weights
            )
        if self.terms.get("kept_states") or self.terms.get("kept_predictions"):
            ids = _ids(batch, "kept_ids")
            length = min(model.config.max_position_embeddings for model in stock)
            with torch.no_grad():
                before = encode(stock, [each[:, :length] for each in ids], self.is_xl)
            after = encode(encoders, ids, self.is_xl)
            if self.terms.get("kept_states"):
                values["kept_states"] = squared_error(after.states[:, :length], before.states)
                if before.pooled is not None and after.pooled is not None:
                    values["kept_states"] = values["kept_states"] + squared_error(after.pooled, before.pooled)
            if self.terms.get("kept_predictions"):
                rows = batch["kept_rows"]
                time_ids = batch["time_ids"][rows] if "time_ids" in batch else None
                with torch.no_grad():
                    target = self.predict(noisy[rows], timesteps[rows], before, time_ids)
                values["kept_predictions"] = squared_error(
                    self.predict(noisy[rows], timesteps[rows], after, time_ids), target
                )
        return {name: self.terms[name] * value for name, value in values.items()}


def _ids(batch: Mapping[str, Tensor], name: str) -> list[Tensor]:
    return [batch[key] for key in (name, f"{name}_2") if key in batch]


def prepare_frozen(parts: Parts, device: torch.device, dtype: torch.dtype) -> None:
    """Brings what is frozen to the device, the UNet in the precision of autocast.

    On a CPU in bfloat16 attention is computed step by step, which is the faster way there; in float32 it is not.
    """
    stepwise = device.type == "cpu" and dtype == torch.bfloat16
    parts.unet.to(device, dtype)
    for place in parts.places.values():
        place.stock.to(device)
        place.encoder.to(device, torch.float32)
        if stepwise:
            for encoder in (place.stock, place.encoder):
                encoder.set_attn_implementation("eager")
    if stepwise:
        parts.unet.set_attn_processor(AttnProcessor())


def is_pooling(text_encoder: TextEncoder) -> bool:
    """Whether an encoder has a pooled output, as SDXL's second."""
    return isinstance(text_encoder, CLIPTextModelWithProjection)
