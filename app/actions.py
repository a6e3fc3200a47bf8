"""What happens when somebody types, clicks or drops a file: between the page's components and the studio."""

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from threading import Event
from typing import Any
from urllib.parse import parse_qsl

import gradio as gr
import numpy as np
import panels
import results
from album import Album, Kept, address, new_request
from comparison_sheet import sheet
from png_settings import found_in
from results import Frame
from scene_reader import Reader
from settings import Settings, as_record, as_settings, checked, checked_text, new_seed
from studio import Picture, Stopped, Studio, Waiting

from finelip_diffusion.prompts import sentence_spans

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
    """The page's events; each public method is one.

    Args:
        studio: Draws.
        album: Keeps what is drawn.
        reader: Says what pictures show, where the model draws scenes.
        start: What the controls hold at first, in the order of `Settings`.
    """

    def __init__(self, studio: Studio, album: Album, reader: Reader | None, start: dict[str, Any]) -> None:
        self.studio, self.album, self.reader, self.start = studio, album, reader, start

    # ------------------------------------------------------------------------------------------------------ typing

    def meter(self, prompt: str, negative_prompt: str, weighting: str) -> tuple[str, str, str]:
        """What is read of the prompts, and what the model can draw of them, while somebody types."""
        try:
            with readable():
                text = checked_text(prompt, "prompt")
                negative_prompt = checked_text(negative_prompt, "negative prompt")
                stock = self.studio.describe(text, "truncate", weighting).readings[0]
                long = self.studio.describe(text, "stretch", weighting).readings[0]
                negative = self.studio.describe(negative_prompt, "stretch", weighting).readings[0]
        except gr.Error as error:
            return panels.note(error.message), "", ""
        advice = self.reader.advice(stock.prompt.text) if self.reader else ""
        return panels.meter(stock, long, prompt), advice, panels.negative_meter(negative)

    # ----------------------------------------------------------------------------------------------------- drawing

    def begin(self, request: gr.Request) -> tuple[str, Any]:
        """Compare or Draw was clicked, and what this window drew until now ends: (told, Stop, which appears)."""
        self.studio.begin(request.session_hash)
        return panels.HINT, gr.update(visible=True)

    def stop(self, request: gr.Request) -> None:
        """Ends what this window draws, after the step that is under way, or at once while it waits."""
        self.studio.visit(request.session_hash).stop.set()

    def draw(self, request: gr.Request, state: Any, keep_seed: bool, *values: Any) -> Iterator[tuple]:
        """Yields (told, results, history, seed, which, sentences, Stop), step by step."""
        yield from self._told(request, lambda stop: self._draw(stop, _visitor(state), _settings(keep_seed, values)))

    def compare(self, request: gr.Request, state: Any, keep_seed: bool, *values: Any) -> Iterator[tuple]:
        """Yields (told, results, history, seed, which, sentences, Stop), step by step."""
        yield from self._told(request, lambda stop: self._compare(stop, _visitor(state), _settings(keep_seed, values)))

    def _told(self, request: gr.Request, draw: Any) -> Iterator[tuple]:
        """A drawing's events; one that was replaced says nothing more.

        Where a drawing is refused, what was shown before stays, and a line below the buttons says why.
        """
        visit = self.studio.visit(request.session_hash)
        stop = visit.stop
        try:
            with readable():
                for event in draw(stop):
                    if visit.stop is not stop:
                        return
                    yield event
        except gr.Error as error:
            if visit.stop is not stop:
                return
            if not isinstance(error.__cause__, Stopped):
                gr.Warning(escape(error.message), title="Not drawn")  # raised, it would leave "Error" in every output
            yield panels.note(error.message), *[gr.skip()] * 5, gr.update(visible=False)

    def _draw(self, stop: Event, visitor: str, settings: Settings) -> Iterator[tuple]:
        labels = [f"Seed {settings.seed + number}" for number in range(settings.num_images)]
        if settings.num_images == 1:
            labels = [panels.STRATEGIES[settings.long_prompt]]
        yield from self._drawn(stop, visitor, "draw", [settings], labels)

    def _compare(self, stop: Event, visitor: str, settings: Settings) -> Iterator[tuple]:
        requests = [replace(settings, long_prompt=name, num_images=1) for name in panels.COMPARED]
        labels = [panels.STRATEGIES[name] for name in panels.COMPARED]
        yield from self._drawn(stop, visitor, "compare", requests, labels)

    def _drawn(
        self, stop: Event, visitor: str, kind: str, requests: list[Settings], labels: list[str]
    ) -> Iterator[tuple]:
        """The events of one drawing: frames that fill, then everything that comes with finished pictures.

        One that ends early keeps what is finished, and says in the other frames why it ended.
        """
        settings, request, seconds = requests[0], new_request(), 0.0
        kept: list[Kept] = []
        shape, words = self._shape(settings), ""
        frames = [Frame(label, "waiting", shape=shape) for label in labels]
        try:
            with readable():
                for event in self.studio.draw(requests, stop):
                    number = len(kept)
                    if isinstance(event, Picture):
                        picture = self.album.add(visitor, event, request, kind, number)
                        self.studio.remember(picture.path.name, event)
                        frames[number] = results.finished(labels[number], picture, self.reader)
                        kept.append(picture)
                        seconds += event.seconds
                        continue
                    if isinstance(event, Waiting):
                        words = f"Waiting: {event.before} before you."
                        frames[0] = replace(frames[0], words=words.rstrip("."))
                    else:
                        words = f"Drawing {number + 1} of {len(labels)}." if len(labels) > 1 else "Drawing."
                        frames[number] = results.under_way(labels[number], event, shape)
                    yield gr.skip(), results.frames(frames, words, self._below(kind, settings, kept)), *[gr.skip()] * 5
        except gr.Error as error:
            if words:
                frames = [item if item.save else replace(item, words=error.message, share=None) for item in frames]
                ended = results.frames(frames, results.line(error.message), self._below(kind, settings, kept))
                listening = self._to_listen(kept) if kept else (gr.skip(), gr.skip())
                yield gr.skip(), ended, self._history(visitor), gr.skip(), *listening, gr.skip()
            raise
        yield (
            gr.skip(),
            self._shown(kept, f"Drawn in {seconds:.1f} s."),
            self._history(visitor),
            settings.seed,
            *self._to_listen(kept),
            gr.update(visible=False),
        )

    def _shown(self, kept: list[Kept], tail: str = "") -> str:
        """Finished pictures of one drawing, as HTML; of a comparison that was cut short they are fewer than three."""
        settings, kind, href = kept[0].settings, kept[0].kind, ""
        if kind == "compare" and len(kept) == len(panels.COMPARED):
            href = address(kept[0].comparison)
            if not kept[0].comparison.exists():
                self.album.write(kept[0].comparison, self._sheet(kept))
        labels = [f"Seed {picture.settings.seed}" for picture in kept]
        if kind == "compare" or len(kept) == 1:
            labels = [panels.STRATEGIES[picture.settings.long_prompt] for picture in kept]
        frames = [results.finished(label, picture, self.reader) for label, picture in zip(labels, kept, strict=True)]
        words = (
            f"The same noise, seed {settings.seed}. {tail}" if kind == "compare" else f"Seed {settings.seed}. {tail}"
        )
        return results.frames(frames, results.line(words), self._below(kind, settings, kept, href))

    def _below(self, kind: str, settings: Settings, kept: list[Kept], href: str = "") -> str:
        """What stands under a comparison, as far as it is drawn: where to save it, and the table."""
        if kind != "compare":
            return ""
        link = results.save_comparison(href, settings.seed)
        if not self.reader:
            return link
        return link + self.reader.table(
            settings.text, {picture.settings.long_prompt: picture.image for picture in kept}
        )

    def _sheet(self, kept: list[Kept]) -> bytes:
        pictures = {picture.settings.long_prompt: picture for picture in kept}
        notes = {}
        if self.reader:
            notes = {
                name: [line for line, _ in self.reader.score(picture.settings.text, picture.image)]
                for name, picture in pictures.items()
            }
        return sheet(pictures, notes, pictures["stretch"].settings, self.album.model)

    def _shape(self, settings: Settings) -> tuple[int, int]:
        """Width and height that a frame has before anything is drawn in it."""
        return settings.width or settings.height or 1, settings.height or settings.width or 1

    # ---------------------------------------------------------------------------------------------------- listening

    def choose(self, which: str) -> tuple[str, str]:
        """Another picture to listen to: its (sentences, nothing heard)."""
        with readable():
            return panels.sentences(self._picture(which)), ""

    def hear(self, which: str, event: gr.EventData) -> tuple[str, str]:
        """A sentence was clicked: (sentences, where it was heard)."""
        with readable():
            picture, number = self._picture(which), event._data.get("sentence")
            heat, sentence = heard_in(picture, number)
            words = panels.heard(heat, sentence)
            return panels.sentences(picture, number), results.heard(panels.overlay(picture.image, heat), words)

    def _to_listen(self, kept: list[Kept]) -> tuple[Any, str]:
        choices = [
            (panels.STRATEGIES[item.settings.long_prompt] + f", seed {item.settings.seed}", item.path.name)
            for item in kept
        ]
        last = self.studio.recall(kept[-1].path.name)
        sentences = panels.sentences(last) if last else panels.note(FORGOTTEN)
        return gr.Radio(choices=choices, value=kept[-1].path.name), sentences

    def _picture(self, which: Any) -> Picture:
        if (picture := self.studio.recall(which)) is None:
            raise ValueError(FORGOTTEN)
        return picture

    # --------------------------------------------------------------------------------------- what comes from elsewhere

    def open(self, state: Any, event: gr.EventData) -> tuple:
        """ "Use these settings" was clicked in the history: (told, keep the seed, all settings)."""
        try:
            with readable():
                settings = self.album.open(_visitor(state), str(event._data.get("name"))).settings
        except gr.Error as error:
            return panels.note(error.message), *[gr.skip()] * (1 + len(self.start))
        return self._filled(settings, "The prompt and all settings of this picture are back.")

    def restore(self, file: bytes) -> tuple:
        """A picture was dropped: (told, keep the seed, all settings); what it does not say stays as it is."""
        try:
            with readable():
                found, model = found_in(file)
        except gr.Error as error:
            return panels.note(error.message), *[gr.skip()] * (1 + len(self.start))
        values, unread = dict(found.values), list(found.unread)
        if self.studio.scenes and model is None:
            unread += [f"{side} {values.pop(side)}" for side in ("width", "height") if values.get(side)]
        if model is not None:
            text = "Everything is as it was when this picture was drawn."
            if model != self.album.model:
                text = "Prompt and settings are back, but another model drew the picture: it will look different."
        else:
            read = ", ".join(panels.NAMES[name] for name in panels.NAMES if values.get(name) not in (None, ""))
            text = f"Read from {found.program}: {read or 'nothing'}."
            if unread:
                text += f" Not read: {', '.join(unread)}."
        if self.studio.scenes:
            values["width"] = values["height"] = None
        controls = [values.get(name, gr.skip()) for name in self.start]
        return panels.note(text), True if "seed" in values else gr.skip(), *controls

    def _filled(self, settings: Settings, text: str) -> tuple:
        if self.studio.scenes:
            settings = replace(settings, width=None, height=None)
        return panels.note(text), True, *as_record(settings).values()

    def enter(self, state: Any, link: str) -> tuple:
        """The page was opened: (state, told, results, history, which, sentences, keep the seed, all settings).

        Args:
            state: What the browser remembers of the last visit.
            link: The fragment of the address, which holds prompt and settings where somebody shared them.
        """
        state = state if isinstance(state, dict) else {}
        visitor = state.get("visitor")
        if not isinstance(visitor, str) or not 16 <= len(visitor) <= 64:
            visitor = secrets.token_urlsafe(24)
        told, controls = gr.skip(), self._remembered(state.get("values"))
        if link := link.lstrip("#"):
            told, controls = self._linked(link, controls)
        shown, listened = gr.skip(), (gr.skip(), gr.skip())
        try:
            if last := self.album.last(visitor):
                shown, listened = self._shown(last), self._to_listen(last)
        except (ValueError, OSError):
            logger.exception("the last pictures of a visitor could not be shown")
        fresh = {"visitor": visitor, "values": list(controls)}
        return fresh, told, shown, self._history(visitor), *listened, *controls

    def _remembered(self, values: Any) -> tuple:
        """The controls as the browser remembers them; what does not hold is as at first."""
        names = ["keep_seed", *self.start]
        if not isinstance(values, list) or len(values) != len(names):
            return True, *self.start.values()
        controls: list[Any] = [bool(values[0])]
        for name, value in zip(names[1:], values[1:], strict=True):
            try:
                controls.append(checked(value, name))
            except ValueError:
                controls.append(self.start[name])
        return tuple(controls)

    def _linked(self, link: str, controls: tuple) -> tuple[str, tuple]:
        """A line about a link, and the controls as it says."""
        try:
            values: dict[str, Any] = dict(
                parse_qsl(link, keep_blank_values=True, strict_parsing=True, max_num_fields=30)
            )
            for name in ("steps", "seed", "num_images", "width", "height", "guidance_scale"):
                if name in values:
                    values[name] = float(values[name])
            settings = as_settings(self.start | {"prompt": ""} | values)
        except (ValueError, TypeError) as error:
            return panels.note(f"This link does not hold valid settings. {error}"), controls
        told, *filled = self._filled(settings, "Prompt and settings come from the link. Compare draws them.")
        return told, tuple(filled)

    def leave(self, request: gr.Request) -> None:
        """A window was closed."""
        self.studio.leave(request.session_hash)

    def _history(self, visitor: str) -> str:
        kept = []
        for path in self.album.pictures(visitor):
            try:
                kept.append(self.album.open(visitor, path.name))
            except (ValueError, OSError):
                logger.exception("%s cannot be shown", path)
        return results.history(kept, self.reader)


FORGOTTEN = "The server no longer knows where this picture's sentences were heard: draw it again."


def heard_in(picture: Picture, number: Any) -> tuple[np.ndarray, str]:
    """Where a sentence was heard, and the sentence."""
    prompt = picture.text
    spans = sentence_spans(prompt)
    if not isinstance(number, int) or not 0 <= number < len(spans):
        raise ValueError(f"There is no such sentence: the prompt has {len(spans)}, counted from 0.")
    start, stop = spans[number]
    return picture.maps.of(picture.report, start, stop), prompt[start:stop].strip()


def _visitor(state: Any) -> str:
    """Whose album it is; a browser that keeps nothing gets one for this drawing alone."""
    return (isinstance(state, dict) and state.get("visitor")) or secrets.token_urlsafe(24)


def _settings(keep_seed: bool, values: tuple) -> Settings:
    """What the page's controls say, in the order of `Settings`."""
    settings = Settings(*values[:-2], *(size or None for size in values[-2:]))  # browsers send 0 for an empty number
    return settings if keep_seed else replace(settings, seed=new_seed())
