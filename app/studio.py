"""What the page does, without the page: a line of requests, drawing step by step, who drew what."""

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from PIL import Image
from settings import Settings, checked_number

from finelip_diffusion.attention import AttentionMaps, record_attention
from finelip_diffusion.prompts import PromptReport
from finelip_diffusion.scenes import IMAGE_SIZE

logger = logging.getLogger("finelip_diffusion.app")

MAX_VISITS = 1_000  # windows that can be stopped, the latest ones
MAX_HEARD = 96  # pictures whose attention maps stay in memory, the latest ones
MAX_WAITING = 40  # requests in line
PREVIEW_SHARE = 0.2  # of the time that drawing takes may go into previews


class Stopped(Exception):
    """Somebody wants no more of this drawing."""


@dataclass(frozen=True)
class Waiting:
    """A request in line.

    Attributes:
        before: Requests that are drawn first.
    """

    before: int


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
    """One open window.

    Attributes:
        stop: Ends the drawing under way.
        drawn: Names of the pictures that it drew last.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    drawn: tuple[str, ...] = ()


class Line:
    """Those who wait for the pipeline: first come, first served.

    Args:
        most: Requests that may wait; the next one is refused.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._tickets: dict[object, threading.Event] = {}
        self._moved = threading.Condition()

    def enter(self, stop: threading.Event) -> object:
        """A ticket for the end of the line; it counts for nothing once `stop` is set.

        Raises:
            ValueError: If the line is full.
        """
        with self._moved:
            if sum(not event.is_set() for event in self._tickets.values()) > self.most:
                raise ValueError(f"The line is full: {self.most} requests wait already. Try again in a minute.")
            ticket = object()
            self._tickets[ticket] = stop
            return ticket

    def before(self, ticket: object, known: int | None = None) -> int:
        """How many requests are drawn first; where that is `known`, it is looked at again after a moment."""
        with self._moved:
            if self._count(ticket) == known:
                self._moved.wait(0.25)  # seconds: so often somebody looks whether the window still wants it
            return self._count(ticket)

    def _count(self, ticket: object) -> int:
        earlier = takewhile(lambda item: item[0] is not ticket, self._tickets.items())
        return sum(not stop.is_set() for _, stop in earlier)

    def leave(self, ticket: object) -> None:
        """Whoever comes next moves up."""
        with self._moved:
            del self._tickets[ticket]
            self._moved.notify_all()


class Studio:
    """A pipeline, loaded when it is first needed, and those who draw with it one at a time.

    Args:
        load: Gives the pipeline.
        scenes: Whether the model draws scenes (`finelip_diffusion.scenes`), which have one size and a reader.
        max_waiting: Requests that may wait in line.
    """

    def __init__(self, load: Callable[[], Any], scenes: bool, max_waiting: int = MAX_WAITING) -> None:
        self.load, self.scenes, self.line = load, scenes, Line(max_waiting)
        self._pipe: Any = None
        self._loading, self._drawing, self._visiting = threading.Lock(), threading.Lock(), threading.Lock()
        self._visits: OrderedDict[str, Visit] = OrderedDict()
        self._heard: OrderedDict[str, Picture] = OrderedDict()

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
        """Stops what a session draws, and what it has begun to: that request may come after the window has closed."""
        self.visit(session).stop.set()

    def begin(self, session: str | None) -> threading.Event:
        """A window begins a drawing: what it drew until now ends. Set the event to stop the new one."""
        visit = self.visit(session)
        before, visit.stop = visit.stop, threading.Event()
        before.set()  # what it ends looks whether it was replaced, so only now
        return visit.stop

    def join(self, session: str | None) -> threading.Event:
        """A client draws beside what it draws already; one event stops everything."""
        visit = self.visit(session)
        return visit.stop if not visit.stop.is_set() else self.begin(session)

    def remember(self, name: str, picture: Picture) -> None:
        """Keeps a picture and its attention maps under a name, as long as it is among the latest."""
        with self._visiting:
            self._heard[name] = picture
            if len(self._heard) > MAX_HEARD:
                self._heard.popitem(last=False)

    def recall(self, name: Any) -> Picture | None:
        """The picture that was remembered under a name."""
        return self._heard.get(name) if isinstance(name, str) else None

    def describe(self, prompt: str, long_prompt: str, weighting: str = "plain") -> PromptReport:
        """What the pipeline reads of a prompt."""
        return self.pipe.describe_prompt(prompt, long_prompt, weighting)

    def draw(self, requests: Sequence[Settings], stop: threading.Event) -> Iterator[Waiting | Step | Picture]:
        """Draws one picture after the other, when it is their turn; closing the iterator, or `stop`, ends the work.

        Args:
            requests: What to draw.
            stop: Looked at after every step, and while this waits in line.

        Yields:
            The place in line whenever it changes, each step, and each picture when it is done.

        Raises:
            Stopped: If `stop` was set.
            ValueError: If the model refuses the settings, or the line is full.
        """
        for settings in requests:
            if self.scenes and any(size not in (None, IMAGE_SIZE) for size in (settings.width, settings.height)):
                raise ValueError(
                    f"This model draws at {IMAGE_SIZE} x {IMAGE_SIZE} pixels alone: leave width and height out."
                )
            checked_number(settings.seed + settings.num_images - 1, "seed")
        ticket, before = self.line.enter(stop), None
        try:
            while before != 0:
                if stop.is_set():
                    raise Stopped("Stopped.")
                known, before = before, self.line.before(ticket, before)
                if before and before != known:
                    yield Waiting(before)
            for settings in requests:
                for number in range(settings.num_images):
                    yield from self._draw(replace(settings, seed=settings.seed + number, num_images=1), stop)
        finally:
            self.line.leave(ticket)

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
