"""What the page does, without the page: settings that hold, drawing step by step, who drew what."""

import logging
import math
import queue
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from PIL import Image

from finelip_diffusion.attention import AttentionMaps, record_attention
from finelip_diffusion.prompts import LONG_PROMPTS, PromptReport
from finelip_diffusion.scenes import IMAGE_SIZE
from finelip_diffusion.weighting import WEIGHTINGS

logger = logging.getLogger("finelip_diffusion.app")

MAX_CHARACTERS = 20_000  # of a prompt
MAX_IMAGES = 4  # of one request
MAX_VISITS = 32  # whose last pictures stay in memory, the latest ones
MAX_KEPT = 60  # pictures in the gallery of a visit
PREVIEW_SHARE = 0.2  # of the time that drawing takes may go into previews

BOUNDS: dict[str, tuple[float, float, int]] = {  # name: least, greatest, multiple of (0: any number)
    "steps": (1, 150, 1),
    "guidance_scale": (0, 30, 0),
    "seed": (0, 2**32 - 1, 1),
    "num_images": (1, MAX_IMAGES, 1),
    "width": (64, 2048, 8),
    "height": (64, 2048, 8),
}


class Stopped(Exception):
    """Somebody wants no more of this drawing."""


@dataclass(frozen=True)
class Settings:
    """All that decides a picture, beside the model.

    Attributes:
        prompt: What to draw.
        negative_prompt: What to avoid.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        seed: Of the first picture; the next ones have those that follow.
        num_images: Pictures to draw.
        long_prompt: How the prompt is read.
        weighting: What brackets in the prompts mean.
        width, height: In pixels; None is the model's own.

    Raises:
        ValueError: If a value is of another kind or outside its bounds.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int = 20
    guidance_scale: float = 7.5
    seed: int = 0
    num_images: int = 1
    long_prompt: str = "stretch"
    weighting: str = "plain"
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            object.__setattr__(self, name, checked_text(getattr(self, name), name.replace("_", " ")))
        if not self.prompt:
            raise ValueError("The prompt is empty: write what the image shall show.")
        for name in BOUNDS:
            value = getattr(self, name)
            if value is not None or name not in ("width", "height"):
                object.__setattr__(self, name, checked_number(value, name))
        if self.long_prompt not in LONG_PROMPTS:
            raise ValueError(f"The strategy must be one of {', '.join(LONG_PROMPTS)}.")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"Brackets must be one of {', '.join(WEIGHTINGS)}.")


def checked_text(text: Any, name: str) -> str:
    """A text that an encoder and a PNG can hold, without white space around it."""
    if not isinstance(text, str):
        raise ValueError(f"The {name} is no text.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"The {name} has {len(text):,} characters: shorten it to {MAX_CHARACTERS:,}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The {name} holds characters that are no text: take them out.") from None
    return text.replace("\0", " ").strip()


def checked_number(value: Any, name: str) -> float:
    """A number within its bounds; whole where it has to be."""
    least, greatest, multiple = BOUNDS[name]
    kind = {0: "number", 1: "whole number"}.get(multiple, f"multiple of {multiple}")
    label = name.replace("_", " ").capitalize()
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise ValueError(f"{label} is no number: choose a {kind} from {least} to {greatest}.")
    if not least <= value <= greatest or (multiple and value % multiple):
        raise ValueError(f"{label} cannot be {str(value)[:20]}: choose a {kind} from {least} to {greatest}.")
    return int(value) if multiple else float(value)


@dataclass(frozen=True)
class Step:
    """A drawing under way.

    Attributes:
        number: Step that was done, from 1.
        steps: Steps of this picture.
        seconds: Time since the drawing began.
        preview: What it last looked like; not every step can afford a new one.
    """

    number: int
    steps: int
    seconds: float
    preview: Image.Image | None


@dataclass(frozen=True)
class Picture:
    """A finished drawing.

    Attributes:
        image: The image.
        settings: Those that draw this picture alone: its own seed, one image.
        seconds: Time it took.
        report: What was read of the prompt.
        maps: Where the UNet looked.
    """

    image: Image.Image
    settings: Settings
    seconds: float
    report: PromptReport = field(repr=False)
    maps: AttentionMaps = field(repr=False)

    @property
    def text(self) -> str:
        """The prompt as it was read, without the syntax of weights."""
        return self.report.readings[0].prompt.text


@dataclass
class Visit:
    """One person's window.

    Attributes:
        pictures: What was drawn last, by label.
        kept: Files of all pictures of the visit, and their captions, newest first.
        stop: Ends the drawing under way.
    """

    pictures: dict[str, Picture] = field(default_factory=dict)
    kept: list[tuple[str, str]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)


class Studio:
    """A pipeline, loaded when it is first needed, and those who draw with it one at a time.

    Args:
        load: Gives the pipeline.
        scenes: Whether the model draws scenes (`finelip_diffusion.scenes`), which have one size and a reader.
    """

    def __init__(self, load: Callable[[], Any], scenes: bool) -> None:
        self.load, self.scenes = load, scenes
        self._pipe: Any = None
        self._loading, self._drawing, self._visiting = threading.Lock(), threading.Lock(), threading.Lock()
        self._visits: OrderedDict[str, Visit] = OrderedDict()

    @property
    def pipe(self) -> Any:
        """The pipeline.

        Raises:
            ValueError: If it cannot be loaded; the next one who asks tries again.
        """
        with self._loading:
            if self._pipe is None:
                try:
                    self._pipe = self.load()
                except (ValueError, OSError, ImportError) as error:
                    raise ValueError(f"The model could not be loaded: {error}") from error
                self._pipe.set_progress_bar_config(disable=True)
            return self._pipe

    def visit(self, session: str | None) -> Visit:
        """The visit of a session; the one that was seen longest ago is forgotten where there are too many."""
        with self._visiting:
            visit = self._visits.setdefault(session or "", Visit())
            self._visits.move_to_end(session or "")
            if len(self._visits) > MAX_VISITS:
                self._visits.popitem(last=False)
        return visit

    def leave(self, session: str | None) -> None:
        """Stops what a session draws and forgets it."""
        with self._visiting:
            visit = self._visits.pop(session or "", None)
        if visit is not None:
            visit.stop.set()

    def describe(self, prompt: str, long_prompt: str, weighting: str = "plain") -> PromptReport:
        """What the pipeline reads of a prompt."""
        return self.pipe.describe_prompt(prompt, long_prompt, weighting)

    def draw(self, settings: Settings, stop: threading.Event) -> Iterator[Step | Picture]:
        """Draws one picture after the other; whoever closes the iterator, or sets `stop`, ends the work.

        Args:
            settings: What to draw.
            stop: Looked at after every step.

        Yields:
            Each step, and each picture when it is done.

        Raises:
            Stopped: If `stop` was set.
            ValueError: If the model refuses the settings.
        """
        if self.scenes and any(size not in (None, IMAGE_SIZE) for size in (settings.width, settings.height)):
            raise ValueError(
                f"This model draws at {IMAGE_SIZE} x {IMAGE_SIZE} pixels alone: leave width and height out."
            )
        checked_number(settings.seed + settings.num_images - 1, "seed")
        for number in range(settings.num_images):
            yield from self._draw(replace(settings, seed=settings.seed + number, num_images=1), stop)

    def _draw(self, settings: Settings, stop: threading.Event) -> Iterator[Step | Picture]:
        """One picture, drawn by a thread of its own that reports after every step."""
        pipe, news, left = self.pipe, queue.SimpleQueue[Any](), threading.Event()
        began, previews, image = time.perf_counter(), 0.0, None

        def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal previews, image
            if stop.is_set() or left.is_set():
                raise Stopped("Stopped.")
            now = time.perf_counter()
            if previews <= PREVIEW_SHARE * (now - began):
                image = preview(pipe, tensors["latents"])
                previews += time.perf_counter() - now
            news.put(Step(index + 1, settings.steps, now - began, image))
            return {}

        def work() -> None:
            nonlocal began
            try:
                with self._drawing:
                    if stop.is_set() or left.is_set():
                        raise Stopped("Stopped.")
                    began = time.perf_counter()
                    with record_attention(pipe) as maps:
                        drawn = pipe(
                            settings.prompt,
                            negative_prompt=settings.negative_prompt or None,
                            long_prompt=settings.long_prompt,
                            weighting=settings.weighting,
                            num_inference_steps=settings.steps,
                            guidance_scale=settings.guidance_scale,
                            width=settings.width,
                            height=settings.height,
                            generator=torch.Generator().manual_seed(settings.seed),  # on the CPU: everywhere the same
                            callback_on_step_end=after_step,
                        ).images[0]
                maps.sums = {grid: sums.half().cpu() for grid, sums in maps.sums.items()}
                report = self.describe(settings.prompt, settings.long_prompt, settings.weighting)
                news.put(Picture(drawn, settings, time.perf_counter() - began, report, maps))
            except BaseException as error:
                news.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while not isinstance(item := news.get(), Picture | BaseException):
                yield item
        finally:
            left.set()
        worker.join()
        if isinstance(item, BaseException):
            raise item
        yield item


@torch.no_grad()
def preview(pipe: Any, latents: torch.Tensor) -> Image.Image:
    """What the latents of a drawing under way look like."""
    vae = pipe.vae
    half = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if half:  # in this precision SDXL's autoencoder gives black images
        vae.to(torch.float32)
    image = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    if half:
        vae.to(torch.float16)
    return pipe.image_processor.postprocess(image)[0]


def new_seed() -> int:
    """Any seed, such that `MAX_IMAGES` of them can follow each other."""
    return random.randrange(int(BOUNDS["seed"][1]) - MAX_IMAGES)


def as_settings(values: dict[str, Any]) -> Settings:
    """Settings out of plain data; what is missing keeps its default, what is unknown is left out."""
    known = {item.name for item in fields(Settings)}
    return Settings(**{name: value for name, value in values.items() if name in known})


def as_record(settings: Settings) -> dict[str, Any]:
    """Settings as plain data."""
    return asdict(settings)
