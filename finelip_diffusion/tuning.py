"""Image tuning: a pipeline's text encoders, or adapters of its UNet, are trained by what the UNet predicts."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .denoising import denoising_target, min_snr_weights, squared_error
from .lengthening import check_lengths, check_widths, long_encoder, second_source
from .locations import BUNDLED_MODEL
from .model import FineLIPModel
from .objective import Objective, TrainingStep
from .pipeline import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
from .probing import FactProbe
from .recipes import Recipe
from .text_encoder import TextEncoder

STRETCHED = "stretched"
"""Given for a long encoder: the base's own, its positions stretched."""


@dataclass
class Place:
    """A text encoder of a pipeline.

    Attributes:
        encoder: The long one.
        tokenizer: Its tokenizer.
        stock: The base's own, frozen.
        stock_tokenizer: Its tokenizer.
        start: The long one as it was before it was trained, or another, frozen, see `keep_start`.
    """

    encoder: TextEncoder
    tokenizer: CLIPTokenizer
    stock: TextEncoder
    stock_tokenizer: CLIPTokenizer
    start: TextEncoder | None = None


@dataclass
class Parts:
    """A pipeline in parts; all is frozen until something is said to be trained.

    Attributes:
        pipeline: Diffusers' own, which draws with the long encoders.
        places: By the name of the component, `text_encoder` and `text_encoder_2`.
        scheduler: The noise schedule of training.
        probe: Reads objects from the states of encoders that are not trained.
    """

    pipeline: DiffusionPipeline
    places: dict[str, Place]
    scheduler: DDPMScheduler
    probe: FactProbe | None = None

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoiser."""
        return self.pipeline.unet

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder."""
        return self.pipeline.vae

    @property
    def side(self) -> int:
        """Pixels of the images that the model draws by itself."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def kind(self) -> Any:
        """This package's pipeline class for it."""
        return FineLIPStableDiffusionXLPipeline if self.is_xl else FineLIPStableDiffusionPipeline

    @property
    def stock(self) -> dict[str, Any]:
        """The stock encoders and tokenizers as this package's pipelines name them."""
        found: dict[str, Any] = {}
        for name, place in self.places.items():
            found |= {f"stock_{name}": place.stock}
            found |= {f"stock_{name}".replace("text_encoder", "tokenizer"): place.stock_tokenizer}
        return found

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
        places[name] = Place(encoder, its_tokenizer, own, tokenizer)
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
    xl = known[kind] is FineLIPStableDiffusionXLPipeline._stock_class
    unchecked = {} if xl else {"safety_checker": None, "requires_safety_checker": False}
    return known[kind].from_pretrained(str(base), **unchecked, **options)


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
    return second_source(finelip)


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


@dataclass(frozen=True)
class Noised:
    """What a UNet is asked about.

    Attributes:
        noisy: (B, C, H, W).
        timesteps: (B,).
        time_ids: (B, 6), what SDXL is told of the image.
    """

    noisy: Tensor
    timesteps: Tensor
    time_ids: Tensor

    def rows(self, chosen: Tensor) -> "Noised":
        """Of some examples."""
        return Noised(self.noisy[chosen], self.timesteps[chosen], self.time_ids[chosen])


@dataclass(frozen=True)
class Kept:
    """Prompts that fit the stock encoders, as these read them and as the long ones do.

    Attributes:
        before: By the stock encoders, of Ts states.
        after: By the long ones, of at least Ts states.
        noised: What their UNet is asked about.
    """

    before: Conditioning
    after: Conditioning
    noised: Noised


Batch = dict[str, Any]


def denoising(step: "TuningStep", batch: Batch, kept: Kept | None) -> Tensor:
    """The UNet's own loss on whole captions."""
    scheduler, timesteps, gamma = step.scheduler, batch["timesteps"], step.min_snr_gamma
    target = denoising_target(scheduler, batch["latents"], batch["noise"], timesteps)
    weights = None if gamma is None else min_snr_weights(scheduler, timesteps, gamma)
    return squared_error(step.predicted(batch), target, weights)


def teacher_predictions(step: "TuningStep", batch: Batch, kept: Kept | None) -> Tensor:
    """What the frozen UNet predicted along its own trajectory, under a strategy that reads the whole prompt."""
    taught = batch.get("taught", batch)
    return squared_error(step.predict(step.noised(taught), step.read(taught)), taught["predictions"])


def restated_predictions(step: "TuningStep", batch: Batch, kept: Kept | None) -> Tensor:
    """What the UNet predicts for the same image's other caption, which the encoder understood before training.

    In expectation over images that is the target of `denoising`, without its noise, with the errors of that reading.
    """
    start = [place.start for place in step.parts.places.values()]
    assert all(start), "keep_start comes first"
    with torch.no_grad(), step.without_adapters():
        target = step.predict(step.noised(batch), step.read(batch, "restated_ids", start))
    return squared_error(step.predicted(batch), target)


def restated_attention(step: "TuningStep", batch: Batch, kept: Kept | None) -> Tensor:
    """What each cross-attention layer of the UNet returns as it predicts for the same image's other caption.

    The layers are asked what they were asked then, so nothing is propagated through the UNet, forward or back: a mean
    over layers and examples, each relative to the mean square of what the layer returned for it. SDXL's pooled output
    counts as a layer.
    """
    start = [place.start for place in step.parts.places.values()]
    assert all(start), "keep_start comes first"
    seen: list[tuple[Any, Tensor, Tensor]] = []

    def see(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Tensor) -> None:
        seen.append((layer, args[0], returned))

    layers = [module for name, module in step.parts.unet.named_modules() if name.endswith(".attn2")]
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(see, with_kwargs=True).remove)
        with torch.no_grad(), step.without_adapters():
            other = step.read(batch, "restated_ids", start)
            step.predict(step.noised(batch), other)
    own = step.captions(batch)
    states = own.states.to(step.parts.unet.dtype)
    pairs = [(layer(asked, encoder_hidden_states=states), returned) for layer, asked, returned in seen]
    if own.pooled is not None and other.pooled is not None:
        pairs.append((own.pooled, other.pooled))
    return torch.stack([_relative_error(*pair) for pair in pairs]).mean()


def _relative_error(value: Tensor, target: Tensor) -> Tensor:
    """A mean over examples, so that a batch in parts, of processes or of accumulation, has the same."""
    value, target = value.float().flatten(1), target.float().flatten(1)
    return ((value - target).square().mean(1) / target.square().mean(1)).mean()


def stated_facts(step: "TuningStep", batch: Batch, kept: Kept | None) -> Tensor:
    """What a linear probe reads of each object that a caption states, from the mean state of the words that state it.

    The probe was fitted before training and is frozen: an object's size, color, shape and place must stand where they
    stood in the captions that the encoder understood. No UNet is asked.
    """
    assert step.parts.probe is not None, "the probe is fitted first"
    return step.parts.probe(step.captions(batch).states, batch["facts"])


def kept_states(step: "TuningStep", batch: Batch, kept: Kept | None) -> Tensor:
    """The stock encoders' states of prompts that they read whole, and SDXL's pooled output."""
    assert kept is not None
    error = squared_error(kept.after.states[:, : kept.before.states.shape[1]], kept.before.states)
    if kept.before.pooled is not None and kept.after.pooled is not None:
        error = error + squared_error(kept.after.pooled, kept.before.pooled)
    return error


def kept_predictions(step: "TuningStep", batch: Batch, kept: Kept | None) -> Tensor:
    """What the UNet predicts with the stock encoders for prompts that they read whole."""
    assert kept is not None
    with torch.no_grad(), step.without_adapters():
        target = step.predict(kept.noised, kept.before)
    return squared_error(step.predict(kept.noised, kept.after), target)


@dataclass(frozen=True)
class Term:
    """A term of the loss.

    Attributes:
        function: Of the step, a batch, and prompts that are kept; a scalar.
        reads: What must be there: `images`, those with captions in other words, `restated`, or whose captions say
            where they state what, `facts`; `teacher`, `kept`.
    """

    function: Callable[["TuningStep", Batch, Kept | None], Tensor]
    reads: str


TERMS = {
    "denoising": Term(denoising, "images"),
    "teacher_predictions": Term(teacher_predictions, "teacher"),
    "restated_predictions": Term(restated_predictions, "restated"),
    "restated_attention": Term(restated_attention, "restated"),
    "stated_facts": Term(stated_facts, "facts"),
    "kept_states": Term(kept_states, "kept"),
    "kept_predictions": Term(kept_predictions, "kept"),
}
"""What may be trained for, beside the recipes of `finetune_encoder.py`; `docs/image_tuning.md` says what each is."""


class TuningStep(nn.Module):
    """From a batch to the terms of the loss. Its parameters are those that are trained, by name."""

    def __init__(
        self,
        parts: Parts,
        terms: Mapping[str, float],
        min_snr_gamma: float | None = None,
        retrieval: TrainingStep | None = None,
        retrieval_weight: float = 1.0,
    ):
        """Puts the parts together, once it is known what requires gradients.

        Args:
            parts: Of the pipeline.
            terms: Weights of the terms, by name.
            min_snr_gamma: Weights the denoising loss by min-SNR; None does not.
            retrieval: A recipe's step whose text tower is the first encoder, see `share_tower`.
            retrieval_weight: Of the recipe's terms.
        """
        super().__init__()
        self.terms, self.min_snr_gamma, self.is_xl = dict(terms), min_snr_gamma, parts.is_xl
        self.retrieval_weight, self.scheduler = retrieval_weight, parts.scheduler
        self._frozen = (parts, retrieval)  # what is not trained is not part of the state
        self.trained = nn.ParameterDict(
            {name.replace(".", "/"): weight for name, weight in trained_of(parts, retrieval)}
        )

    @property
    def parts(self) -> Parts:
        """Of the pipeline."""
        return self._frozen[0]

    @property
    def encoders(self) -> list[TextEncoder]:
        """The long ones."""
        return [place.encoder for place in self.parts.places.values()]

    def without_adapters(self) -> Any:
        """A context in which the UNet is the base's own."""
        unet: Any = self.parts.unet
        return _disabled(unet) if getattr(unet, "peft_config", None) else nullcontext()

    def noised(self, batch: Batch) -> Noised:
        """What the UNet is given of a batch of images, or of a teacher's trajectories."""
        noisy = batch.get("noisy")
        if noisy is None:
            noisy = self.scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
        return Noised(noisy, batch["timesteps"], batch["time_ids"])

    def read(self, batch: Batch, name: str = "input_ids", by: Sequence[Any] = ()) -> Conditioning:
        """What the long encoders, or others in their places, make of the prompts of a batch."""
        ids = [batch[key] for key in (name, f"{name}_2") if key in batch]
        return encode(by or self.encoders, ids, self.is_xl)

    def predict(self, noised: Noised, read: Conditioning) -> Tensor:
        """The UNet's prediction, (B, C, H, W)."""
        unet = self.parts.unet
        added = None if read.pooled is None else {"text_embeds": read.pooled.to(unet.dtype),
                                                  "time_ids": noised.time_ids}  # fmt: skip
        return unet(
            noised.noisy.to(unet.dtype), noised.timesteps, read.states.to(unet.dtype), added_cond_kwargs=added,
            return_dict=False,
        )[0]  # fmt: skip

    def captions(self, batch: Batch) -> Conditioning:
        """What the long encoders make of the captions of a batch; the terms share it, in the batch."""
        if "read" not in batch:
            batch["read"] = self.read(batch)
        read: Conditioning = batch["read"]
        return read

    def predicted(self, batch: Batch) -> Tensor:
        """The UNet's prediction for these captions; the terms share it, too."""
        if "predicted" not in batch:
            batch["predicted"] = self.predict(self.noised(batch), self.captions(batch))
        prediction: Tensor = batch["predicted"]
        return prediction

    def keep(self, batch: Batch) -> Kept:
        """Encodes the prompts that are kept, twice."""
        stock = [place.stock for place in self.parts.places.values()]
        length = min(model.config.max_position_embeddings for model in stock)
        ids = [batch[key][:, :length] for key in ("kept_ids", "kept_ids_2") if key in batch]
        with torch.no_grad():
            before = encode(stock, ids, self.is_xl)
        return Kept(before, self.read(batch, "kept_ids"), self.noised(batch).rows(batch["kept_rows"]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms by name, each a mean over the batch.

        Args:
            batch: latents and noise (B, C, H, W), or, of a teacher, noisy and predictions (B, C, H, W); timesteps
                (B,); time_ids (B, 6); `input_ids` and, for SDXL, `input_ids_2` (B, T); with terms that keep,
                `kept_ids`, `kept_ids_2` (K, Tk), prompts of the examples `kept_rows` (K,), of which the stock
                encoders read the first 77 positions. `restated_ids`, `restated_ids_2` (B, T): the images' captions
                in other words. `facts` (N, 7): see `probing.stated_facts`. `taught`: a teacher's batch beside one of
                images. `pairs`: a batch of `data.batches.Collator` for the recipe.
        """
        batch = dict(batch)
        kept = self.keep(batch) if "kept_ids" in batch else None
        values = {name: weight * TERMS[name].function(self, batch, kept) for name, weight in self.terms.items()}
        retrieval = self._frozen[1]
        if retrieval is not None:
            found = retrieval(batch["pairs"])
            values |= {name: self.retrieval_weight * value for name, value in found.items()}
        return values


class _disabled:
    """Switches the adapters of a UNet off and on again."""

    def __init__(self, unet: Any):
        self.unet = unet

    def __enter__(self) -> None:
        self.unet.disable_adapters()

    def __exit__(self, *_: object) -> None:
        self.unet.enable_adapters()


def trained_of(parts: Parts, retrieval: TrainingStep | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """What requires gradients, each weight once, by name."""
    modules: dict[str, nn.Module] = {name: place.encoder for name, place in parts.places.items()}
    modules["unet"] = parts.unet
    if retrieval is not None:
        modules["retrieval"] = retrieval
    seen: set[int] = set()
    for prefix, module in modules.items():
        for name, weight in module.named_parameters():
            if weight.requires_grad and id(weight) not in seen:
                seen.add(id(weight))
                yield f"{prefix}.{name}", weight


def keep_start(parts: Parts, finelip: str | Path | None = None) -> None:
    """Keeps a copy of the long encoders as they are, which the terms of other words read with.

    Args:
        parts: Of the pipeline.
        finelip: Other long encoders to read with instead, see `load_parts`.

    Raises:
        ValueError: If these do not fit, or read another number of tokens. One sentence.
    """
    for name, place in parts.places.items():
        start = place.encoder
        if finelip is not None:
            source, extra = _source_of(name, finelip)
            other, _ = long_encoder(place.stock, place.stock_tokenizer, source, warn=False, **extra)
            assert other is not None
            lengths = [encoder.config.max_position_embeddings for encoder in (start, other)]
            if lengths[0] != lengths[1]:
                raise ValueError(
                    f"the {name} of {finelip} reads {lengths[1]} tokens, and the one that is trained {lengths[0]}: "
                    "give encoders of the same length."
                )
            start = other
        place.start = copy.deepcopy(start).requires_grad_(False).eval()


def share_tower(model: FineLIPModel, encoder: TextEncoder) -> None:
    """Makes an encoder the text tower of a model, weight for weight, so that one training moves both.

    Raises:
        ValueError: If the model's tower has other layers. One sentence.
    """
    own: Any = model.clip.text_model
    tower: Any = getattr(encoder, "text_model", encoder)
    shapes = [(len(each.encoder.layers), each.config.hidden_size) for each in (own, tower)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the retrieval model's text tower has (layers, width) {shapes[0]} and the encoder {shapes[1]}: give the "
            "CLIP that the encoder was made of (--retrieval_model)."
        )
    for name in ("embeddings", "encoder", "final_layer_norm"):
        setattr(own, name, getattr(tower, name))
    model.config.clip_config.text_config = encoder.config  # whose window decides how much of a caption is read


def retrieval_step(
    model: FineLIPModel, recipe: Recipe, teacher: FineLIPModel | None, gather: Callable[[Any], Any]
) -> TrainingStep:
    """A recipe's step of which the image tower is frozen; text tower, scale and heads are trained."""
    for part in (model.clip.vision_model, model.clip.visual_projection):
        part.requires_grad_(False)
    objective = Objective(recipe, model.config.clip_config.projection_dim, model.config.num_refined_tokens)
    clip = teacher.clip.requires_grad_(False).eval() if teacher is not None and objective.needs_teacher else None
    return TrainingStep(model, objective, clip, gather)


def prepare_frozen(parts: Parts, device: torch.device, dtype: torch.dtype) -> None:
    """Brings what is frozen to the device, the UNet in the precision of autocast.

    On a CPU in bfloat16 attention is computed step by step, which is the faster way there; in float32 it is not.
    """
    stepwise = device.type == "cpu" and dtype == torch.bfloat16
    parts.unet.to(device)
    for weight in parts.unet.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)
    for place in parts.places.values():
        place.stock.to(device)
        place.encoder.to(device, torch.float32)
        if place.start is not None:
            place.start.to(device)
        if stepwise:
            for encoder in filter(None, (place.stock, place.encoder, place.start)):
                encoder.set_attn_implementation("eager")
    if stepwise:
        parts.unet.set_attn_processor(AttnProcessor())
