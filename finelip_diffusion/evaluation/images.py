"""Draws the same prompts under several text encoders and UNets, from the same noise, and keeps every image.

An image file holds its prompt, seed and settings, so an interrupted comparison goes on where it stopped, and images of
other settings or weights are never taken for those that are wanted.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from PIL import Image

from ..files import png_text, writing
from ..locations import BUNDLED_MODEL, locate
from ..pipeline import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
from ..prompts import LongPrompt
from ..scenes import Scene
from ..upstream import name_dtype
from .adherence import Change
from .questions import Question

COPY_NOISE = 1_000_000  # between the seeds of two images of a prompt: more than there are prompts
BASELINE = "truncate"
STRATEGIES: dict[str, tuple[LongPrompt, str]] = {
    "truncate": ("truncate", "the first 77 tokens, what diffusers does"),
    "chunk": ("chunk", "windows of 75 tokens side by side, what compel and A1111 do"),
    "segment": ("segment", "a window for each sentence"),
    "untrained": ("stretch", "positions stretched to 248, not trained"),
}


@dataclass
class Settings:
    """What decides an image beside its prompt and its condition."""

    model: str = field(
        default="bundled", metadata={"help": "The Stable Diffusion 1.x, 2.x or XL: a folder or hub id."}
    )
    negative_prompt: str | None = field(default=None, metadata={"help": "The negative prompt of every image."})
    num_inference_steps: int = field(default=30, metadata={"help": "The number of denoising steps."})
    guidance_scale: float = field(default=7.5, metadata={"help": "The guidance scale."})
    height: int | None = field(default=None, metadata={"help": "The height in pixels. The default is the model's."})
    width: int | None = field(default=None, metadata={"help": "The width in pixels. The default is the model's."})
    seed: int = field(default=0, metadata={"help": "The seed. The noise of prompt i has this seed plus i."})
    noise: Literal["per_prompt", "in_order"] = field(
        default="per_prompt", metadata={"help": "per_prompt, or in_order: one generator for all prompts in turn."}
    )
    refiner: str | None = field(
        default=None, metadata={"help": "The SDXL refiner, which reads 77 tokens: a folder or hub id."}
    )
    refiner_start: float = field(
        default=0.8, metadata={"help": "The share of the steps after which the refiner takes over."}
    )
    dtype: Literal["float32", "float16", "bfloat16"] = field(
        default="float32", metadata={"help": "The data type of the weights."}
    )


# --------------------------------------------------------------------------------------------------------- conditions


@dataclass(frozen=True)
class Condition:
    """One way to draw: a UNet, a text encoder and how it reads; or a folder of pictures, whose UNet is empty."""

    unet: str
    encoder: str
    unet_source: str | None
    encoder_source: str | None
    long_prompt: LongPrompt
    about: str
    blend: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.unet}/{self.encoder}" if self.unet else self.encoder


def located(source: str) -> str:
    """A source, `bundled` being the model that comes with the package."""
    head, *rest = source.split("/", 1)
    return str(Path(BUNDLED_MODEL, *rest)) if head == "bundled" else source


def named(item: str) -> tuple[str, str]:
    """NAME=SOURCE, or a source that is called by its last part."""
    name, equals, source = item.partition("=")
    return (name, located(source)) if equals else (Path(item).name, located(item))


def read_conditions(model: str, encoders: Sequence[str], unets: Sequence[str]) -> list[Condition]:
    """Every UNet with every encoder.

    Args:
        model: whose `finelip/` is meant by `"finelip"` and `"adapted"`.
        encoders: strategies of `STRATEGIES`, `"finelip"`, or [NAME=]SOURCE of a long text encoder; with `@SHARE`
            behind it, such as `"finelip@0.5"`, blended with the stock encoder.
        unets: `"base"`, `"adapted"`, or [NAME=]FOLDER that holds `unet/`.

    Raises:
        ValueError: For a source that is none, before anything is loaded.
    """
    own = Path(located(model), "finelip")
    found_unets: dict[str, str | None] = {}
    for item in unets:
        name, source = ("adapted", str(own)) if item == "adapted" else named(item)
        if item != "base" and not Path(source, "unet", "config.json").is_file():
            raise ValueError(f"UNet {item}: there is no {Path(source, 'unet')} with a config.json in it.")
        found_unets[name] = None if item == "base" else source
    found_encoders: dict[str, tuple[str | None, LongPrompt, str, float]] = {}
    for item in encoders:
        if item in STRATEGIES:
            found_encoders[item] = (None, *STRATEGIES[item], 1.0)
            continue
        whole, blend = _blended(item)
        name, source = ("finelip", str(own)) if whole == "finelip" else named(whole)
        locate(source, None, {})
        about = f"a long encoder, {whole if whole != 'finelip' else 'finelip/'}"
        if blend < 1:
            name, about = f"{name}@{blend:g}", f"{about}, a share of {blend:g} beside the stock encoder's"
        found_encoders[name] = (source, "stretch", about, blend)
    if len(found_unets) < len(unets) or len(found_encoders) < len(encoders):
        raise ValueError("two UNets or two encoders have one name: call one of them NAME=SOURCE.")
    return [
        Condition(unet, encoder, unet_source, *how)
        for unet, unet_source in found_unets.items()
        for encoder, how in found_encoders.items()
    ]


def _blended(item: str) -> tuple[str, float]:
    """An encoder and its share: what stands behind the last `@`, if it is a number."""
    source, _, share = item.rpartition("@")
    try:
        blend = float(share)
    except ValueError:
        return item, 1.0
    if not source or not 0 <= blend <= 1:
        raise ValueError(f"encoder {item}: a blend is SOURCE@SHARE, with a share from 0 to 1.")
    return source, blend


def load_pipeline(condition: Condition, settings: Settings, device: torch.device) -> Any:
    """The pipeline of a condition, without a progress bar of its own, and without a safety checker, whose black images
    would be measured as the model's."""
    model, dtype = located(settings.model), getattr(torch, settings.dtype)
    precision = name_dtype({"dtype": dtype})
    unet = UNet2DConditionModel.from_pretrained(condition.unet_source or model, subfolder="unet", **precision)
    parts = {"finelip": condition.encoder_source, "unet": unet, "long_prompt": "stretch", **precision}
    if "XL" in DiffusionPipeline.load_config(model)["_class_name"]:
        pipe = FineLIPStableDiffusionXLPipeline.from_pretrained(model, second_encoder="stretch", **parts)
    else:
        pipe = FineLIPStableDiffusionPipeline.from_pretrained(model, safety_checker=None, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_refiner(settings: Settings, device: torch.device) -> Any:
    """SDXL's refiner, or None."""
    if settings.refiner is None:
        return None
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        located(settings.refiner), **name_dtype({"dtype": getattr(torch, settings.dtype)})
    )
    refiner.set_progress_bar_config(disable=True)
    return refiner.to(device)


def fingerprint(pipe: DiffusionPipeline) -> str:
    """Of all weights that a pipeline draws with."""
    return fingerprint_of(pipe.components)


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """Of the weights of modules, by name."""
    digest = hashlib.blake2b(digest_size=8)
    for name, part in sorted(parts.items()):
        if isinstance(part, torch.nn.Module):
            for key, tensor in sorted(part.state_dict().items()):
                digest.update(f"{name}.{key}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ drawing


@dataclass(frozen=True)
class Prompt:
    """What is drawn.

    Attributes:
        kind: `"long"`, with a reference image; `"short"`, fits 77 tokens; `"changed"`, the long prompt of the same
            number, with one thing after token 77 changed.
        index: its number among those of its kind.
        text: a `Caption` where it describes a scene.
        name: where it comes from.
        scene: what a perfect image of it would show.
        change: what was changed.
        questions: what is asked of its image.
        category: of the prompt.
        copy: which of several images of the prompt.
    """

    kind: str
    index: int
    text: str
    name: str = ""
    scene: Scene | None = None
    change: Change | None = None
    questions: tuple[Question, ...] = ()
    category: str = ""
    copy: int = 0

    @property
    def noise(self) -> int:
        """What its noise adds to the seed."""
        return self.index + COPY_NOISE * self.copy

    def file(self, condition: Condition, kind: str | None = None) -> Path:
        """Where its image is, or that of the same number of another kind."""
        copy = f"-{self.copy}" if self.copy else ""
        return Path("images", condition.name, kind or self.kind, f"{self.index:06d}{copy}.png")


class Noise:
    """The noise of each prompt, on the CPU, so that it is the same on every device."""

    def __init__(self, settings: Settings, pipe: Any):
        self.settings = settings
        factor, own = pipe.vae_scale_factor, pipe.unet.config.sample_size
        size = [side // factor if side else own for side in (settings.height, settings.width)]
        self.shape = (1, pipe.unet.config.in_channels, *size)
        self._stream, self._place = torch.Generator().manual_seed(settings.seed), 0

    def of(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What the pipeline is called with."""
        generators = [torch.Generator().manual_seed(self.settings.seed + prompt.noise) for prompt in prompts]
        if self.settings.noise == "per_prompt" or prompts[0].kind != "long":
            return {"generator": generators}
        latents = []
        for prompt in prompts:
            if prompt.index < self._place:
                self._stream, self._place = torch.Generator().manual_seed(self.settings.seed), 0
            for _ in range(prompt.index - self._place + 1):
                noise = torch.randn(self.shape, generator=self._stream)
            self._place = prompt.index + 1
            latents.append(noise)
        dtype = getattr(torch, self.settings.dtype)
        return {"generator": generators, "latents": torch.cat(latents).to(dtype)}


def batches(pipe: Any, prompts: Sequence[Prompt], long_prompt: LongPrompt, batch_size: int) -> Iterator[list[Prompt]]:
    """Deals prompts out in batches of one kind and of one length in states.

    In a batch, shorter prompts are filled up with windows of the empty prompt, to which the UNet attends: the image of
    a prompt would depend on its neighbors.
    """
    groups: dict[tuple[str, int], list[Prompt]] = {}
    for prompt in prompts:
        readings = pipe.describe_prompt(str(prompt.text), long_prompt).readings
        groups.setdefault((prompt.kind, max(reading.length for reading in readings)), []).append(prompt)
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]


def draw(
    pipe: Any, refiner: Any, prompts: Sequence[Prompt], long_prompt: LongPrompt, settings: Settings, noise: Noise
) -> list[Image.Image]:
    """Images of a batch of prompts of one kind."""
    texts = [str(prompt.text) for prompt in prompts]
    both: dict[str, Any] = {
        "prompt": texts,
        "negative_prompt": None if settings.negative_prompt is None else [settings.negative_prompt] * len(texts),
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
    }
    size, start = {"height": settings.height, "width": settings.width}, noise.of(prompts)
    if refiner is None:
        return pipe(**both, **size, **start, long_prompt=long_prompt).images
    end = {"denoising_end": settings.refiner_start, "output_type": "latent"}
    half = pipe(**both, **size, **start, **end, long_prompt=long_prompt).images
    return refiner(**both, image=half, denoising_start=settings.refiner_start, generator=start["generator"]).images


def drawn_with(condition: Condition, settings: Settings, weights: str) -> str:
    """Everything that decides an image beside its prompt, as it is written into the file."""
    own: dict[str, Any] = {"condition": condition.name, "long_prompt": condition.long_prompt, "weights": weights}
    if condition.blend < 1:
        own["blend"] = condition.blend
    return json.dumps(own | {entry.name: getattr(settings, entry.name) for entry in fields(Settings)})


def is_drawn(file: Path, prompt: Prompt, settings: str) -> bool:
    """Whether an image is there.

    Raises:
        ValueError: If it is another one.
    """
    if not file.exists():
        return False
    try:
        with Image.open(file) as image:
            found = dict(image.info)
    except OSError as error:
        raise ValueError(f"{file} is not a readable image ({error}): delete it, and it is drawn again.") from error
    if (found.get("prompt"), found.get("settings")) != (prompt.text, settings):
        raise ValueError(
            f"{file} was drawn from another prompt, other settings or other weights: choose another folder, or delete "
            f"it. It has {found.get('settings')}; wanted are {settings}."
        )
    return True


def save_image(image: Image.Image, file: Path, prompt: Prompt, seed: int, settings: str) -> None:
    """Whole or not at all."""
    with writing(file) as part:
        image.save(part, "PNG", pnginfo=png_text(prompt=prompt.text, seed=str(seed), settings=settings))
