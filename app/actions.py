"""What happens when somebody types, clicks or calls: between the page's components and the studio."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import panels
from gradio.processing_utils import save_bytes_to_cache
from png_settings import settings_of, to_png
from studio import MAX_KEPT, Picture, Settings, Step, Stopped, Studio, Visit, as_record, checked_text, new_seed

from finelip_diffusion.prompts import sentence_spans
from finelip_diffusion.scenes import find_facts, read

logger = logging.getLogger("finelip_diffusion.app")


@contextmanager
def readable() -> Iterator[None]:
    """Turns whatever goes wrong into a message that the page shows; what nobody foresaw goes to the log as well."""
    try:
        yield
    except gr.Error:
        raise
    except (Stopped, ValueError, OSError, ImportError) as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from error
    except MemoryError as error:
        raise gr.Error("There is not enough memory for this: draw fewer or smaller pictures.") from error
    except Exception as error:
        if "out of memory" in str(error):
            raise gr.Error("The GPU has not enough memory for this: draw fewer or smaller pictures.") from error
        logger.exception("a request failed")
        raise gr.Error(f"That did not work ({type(error).__name__}); the server's log says more.") from error


class Actions:
    """The page's events and its API; each method is one.

    Args:
        studio: Draws.
        name: The model's name, for people and for PNGs.
        cache: Folder from which gradio serves files.
    """

    def __init__(self, studio: Studio, name: str, cache: str) -> None:
        self.studio, self.name, self.cache = studio, name, cache

    # ------------------------------------------------------------------------------------------------------ the page

    def meter(self, prompt: str, negative_prompt: str, weighting: str) -> tuple[str, str, str]:
        """What is read of the prompts, while somebody types."""
        try:
            with readable():
                prompt = checked_text(prompt, "prompt")
                negative_prompt = checked_text(negative_prompt, "negative prompt")
                stock = self.studio.describe(prompt, "truncate", weighting).readings[0]
                long = self.studio.describe(prompt, "stretch", weighting).readings[0]
                negative = self.studio.describe(negative_prompt, "stretch", weighting).readings[0]
        except gr.Error as error:
            return panels.note(error.message), "", ""
        return panels.meter(stock, long), panels.reading(stock, long), panels.negative_meter(negative)

    def draw(self, request: gr.Request, keep_seed: bool, *values: Any) -> Iterator[tuple]:
        """Yields (stage, pictures, kept, seed, which, sentences), step by step."""
        yield from _told(self._draw(request, keep_seed, values), others=5)

    def compare(self, request: gr.Request, keep_seed: bool, *values: Any) -> Iterator[tuple]:
        """Yields (stage, three pictures, verdict, kept, seed, which, sentences), step by step."""
        yield from _told(self._compare(request, keep_seed, values), others=8)

    def to_drawn(self, request: gr.Request) -> tuple[gr.Tabs, str]:
        """Draw was clicked: (tabs, empty stage); from here on, while it waits as well, Stop ends it."""
        self._begin(request)
        return gr.Tabs(selected="drawn"), ""

    def to_compared(self, request: gr.Request) -> tuple[gr.Tabs, str]:
        """Compare was clicked."""
        self._begin(request)
        return gr.Tabs(selected="compared"), ""

    def stop(self, request: gr.Request) -> None:
        """Ends what this window draws, after the step that is under way, and what it waits for."""
        self.studio.visit(request.session_hash).stop.set()

    def choose(self, which: str, request: gr.Request) -> tuple[str, None, str]:
        """Another picture to listen to: its (sentences, no overlay, no words)."""
        with readable():
            return panels.sentences(self._picture(request, which)), None, ""

    def hear(self, which: str, event: gr.EventData, request: gr.Request) -> tuple[str, Any, str]:
        """A sentence was clicked: (sentences, overlay, words)."""
        with readable():
            picture, number = self._picture(request, which), event._data.get("sentence")
            heat, sentence = self._heat(picture, number)
            words = panels.heard(heat, sentence)
            shown = gr.Image(panels.overlay(picture.image, heat), alt_text=words)
            return panels.sentences(picture, number), shown, panels.note(words)

    def restore(self, file: bytes) -> tuple:
        """A PNG was dropped: (keep the seed, all of its settings, a line about them)."""
        try:
            with readable():
                settings, model = settings_of(file)
        except gr.Error as error:
            return *[gr.skip()] * (1 + len(fields(Settings))), panels.note(error.message)
        if self.studio.scenes:
            settings = replace(settings, width=None, height=None)
        text = "Everything is as it was when this picture was drawn."
        if model != self.name:
            text = (
                "Prompt and settings are back, but the picture was drawn with another model: it will look different."
            )
        return True, *as_record(settings).values(), panels.note(text)

    def leave(self, request: gr.Request) -> None:
        """A window was closed."""
        self.studio.leave(request.session_hash)

    # ------------------------------------------------------------------------------------------------------- the API

    def api_describe(self, prompt: str, long_prompt: str = "stretch", weighting: str = "plain") -> dict:
        """What a text encoder reads of a prompt: tokens, windows, and the text that is dropped."""
        with readable():
            report = self.studio.describe(checked_text(prompt, "prompt"), long_prompt, weighting)
        return {
            "tokens": report.tokens,
            "long_prompt": report.long_prompt,
            "windows": list(report.windows),
            "dropped": report.dropped,
            "report": str(report),
        }

    def api_draw(
        self,
        request: gr.Request,
        prompt: str,
        negative_prompt: str = "",
        steps: int = 20,
        guidance_scale: float = 3.0,
        seed: int = 0,
        num_images: int = 1,
        long_prompt: str = "stretch",
        weighting: str = "plain",
        width: int | None = None,
        height: int | None = None,
    ) -> list:
        """Draws a prompt: PNG files with the prompt and all settings inside, one for each seed from `seed` on."""
        with readable():
            settings = Settings(
                prompt,
                negative_prompt,
                steps,
                guidance_scale,
                seed,
                num_images,
                long_prompt,
                weighting,
                width,
                height,
            )
            visit = self._begin(request)
            pictures = {f"seed {event.settings.seed}": event for event in self._pictures(settings, visit.stop)}
            visit.pictures = pictures
            return [_file_data(self._file(picture)) for picture in pictures.values()]

    def api_compare(
        self,
        request: gr.Request,
        prompt: str,
        negative_prompt: str = "",
        steps: int = 20,
        guidance_scale: float = 3.0,
        seed: int = 0,
    ) -> dict:
        """Draws a prompt from the same noise under `truncate`, `chunk` and `stretch`: a PNG file for each."""
        with readable():
            settings = Settings(prompt, negative_prompt, steps, guidance_scale, seed)
            visit = self._begin(request)
            pictures = {}
            for long_prompt in panels.COMPARED:
                (pictures[long_prompt],) = self._pictures(replace(settings, long_prompt=long_prompt), visit.stop)
            visit.pictures = pictures
            return {name: _file_data(self._file(picture)) for name, picture in pictures.items()}

    def api_listen(self, request: gr.Request, sentence: int, picture: int = 0) -> dict:
        """Where the UNet looked for a sentence (from 0) of the picture (from 0) that this client drew last."""
        with readable():
            drawn = list(self.studio.visit(request.session_hash).pictures.values())
            if not 0 <= picture < len(drawn):
                raise ValueError(f"There is no picture {picture}: this client's last drawing has {len(drawn)}.")
            heat, text = self._heat(drawn[picture], sentence)
            return {"sentence": text, "attention": heat.round(6).tolist()}

    # ------------------------------------------------------------------------------------------------- what they share

    def _draw(self, request: gr.Request, keep_seed: bool, values: tuple) -> Iterator[tuple]:
        settings, visit = _settings(keep_seed, values), self.studio.visit(request.session_hash)
        pictures: dict[str, Picture] = {}
        for event in self.studio.draw(settings, visit.stop):
            if isinstance(event, Step):
                title = f"Picture {len(pictures) + 1} of {settings.num_images}"
                yield panels.stage(event, title), *[gr.skip()] * 5
            else:
                pictures[f"seed {event.settings.seed}"] = event
        shown = gr.Gallery(self._keep(visit, pictures), selected_index=0)
        seconds = sum(picture.seconds for picture in pictures.values())
        which, sentences = self._to_listen(pictures)
        yield panels.note(f"Drawn in {seconds:.1f} s."), shown, visit.kept, settings.seed, which, sentences

    def _compare(self, request: gr.Request, keep_seed: bool, values: tuple) -> Iterator[tuple]:
        settings, visit = _settings(keep_seed, values), self.studio.visit(request.session_hash)
        settings, pictures = replace(settings, num_images=1), {}
        files: list[Any] = [None] * len(panels.COMPARED)
        for place, (long_prompt, label) in enumerate(panels.COMPARED.items()):
            for event in self.studio.draw(replace(settings, long_prompt=long_prompt), visit.stop):
                if isinstance(event, Step):
                    yield panels.stage(event, f"{label}, {place + 1} of 3"), *files, *[gr.skip()] * 5
                else:
                    pictures[label] = event
                    files[place] = self._file(event)
        self._keep(visit, pictures)
        seconds = sum(picture.seconds for picture in pictures.values())
        note = panels.note(f"Three pictures from the same noise, seed {settings.seed}, in {seconds:.1f} s.")
        which, sentences = self._to_listen(pictures, label)
        yield note, *files, self._verdict(pictures), visit.kept, settings.seed, which, sentences

    def _begin(self, request: gr.Request) -> Visit:
        """A window, with a stop that nobody has used; it is shared by what the window draws and waits for."""
        visit = self.studio.visit(request.session_hash)
        if visit.stop.is_set():
            visit.stop = threading.Event()
        return visit

    def _pictures(self, settings: Settings, stop: threading.Event) -> Iterator[Picture]:
        for event in self.studio.draw(settings, stop):
            if isinstance(event, Picture):
                yield event

    def _file(self, picture: Picture) -> str:
        """Path of the picture's PNG, where gradio serves it."""
        name = f"finelip-{picture.settings.long_prompt}-seed{picture.settings.seed}.png"
        return save_bytes_to_cache(to_png(picture, self.name), name, self.cache)

    def _keep(self, visit: Visit, pictures: dict[str, Picture]) -> list[tuple[str, str]]:
        """Puts pictures in front of the visit's gallery; their files and captions."""
        visit.pictures = pictures
        files = [(self._file(picture), label) for label, picture in pictures.items()]
        visit.kept = [(path, caption) for path, caption in [*files, *visit.kept] if Path(path).exists()][:MAX_KEPT]
        return files

    def _picture(self, request: gr.Request, which: Any) -> Picture:
        pictures = self.studio.visit(request.session_hash).pictures
        if which not in pictures:
            raise ValueError("This picture is no longer in memory: draw it again.")
        return pictures[which]

    def _heat(self, picture: Picture, number: Any) -> tuple[np.ndarray, str]:
        """Where a sentence was heard, and the sentence."""
        prompt = picture.text
        spans = sentence_spans(prompt)
        if not isinstance(number, int) or not 0 <= number < len(spans):
            raise ValueError(f"There is no such sentence: the prompt has {len(spans)}, counted from 0.")
        start, stop = spans[number]
        return picture.maps.of(picture.report, start, stop), prompt[start:stop].strip()

    def _to_listen(self, pictures: dict[str, Picture], which: str | None = None) -> tuple[Any, str]:
        which = which or next(iter(pictures))
        return gr.Radio(choices=list(pictures), value=which), panels.sentences(pictures[which])

    def _verdict(self, pictures: dict[str, Picture]) -> str:
        if not self.studio.scenes:
            return ""
        names = {label: name for name, label in panels.COMPARED.items()}
        shown = {names[label]: read(picture.image) for label, picture in pictures.items()}
        prompt = next(iter(pictures.values())).text
        return panels.verdict(find_facts(prompt), shown, self.studio.pipe.tokenizer)


def _settings(keep_seed: bool, values: tuple) -> Settings:
    """What the page's controls say, in the order of `Settings`."""
    settings = Settings(*values[:-2], *(size or None for size in values[-2:]))  # browsers send 0 for an empty number
    return settings if keep_seed else replace(settings, seed=new_seed())


def _told(events: Iterator[tuple], others: int) -> Iterator[tuple]:
    """A drawing's events; where it ends early the last one says why, and an error is raised as well."""
    try:
        with readable():
            yield from events
    except gr.Error as error:
        yield panels.note(error.message), *[gr.skip()] * others
        if not isinstance(error.__cause__, Stopped):
            raise


def _file_data(path: str) -> dict:
    """A file as gradio's clients take it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}}
