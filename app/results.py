"""Results as HTML: frames with what is drawn in them and what was found under each, and the history."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from album import Kept
from panels import STRATEGIES, named
from PIL import Image
from scene_reader import Reader, in_words
from studio import Step

SIGNS = {"yes": "✓ ", "no": "✗ ", "": ""}
BEGINNING = 48  # characters of a prompt that name a picture


@dataclass(frozen=True)
class Frame:
    """The place of one picture, before, while and after it is drawn.

    Attributes:
        label: What stands over it.
        words: What stands in it while there is no picture.
        image: The address of the picture, or of a preview.
        alt: What the picture shows.
        share: How much is done, 0 to 1; None while nothing is drawn.
        found: HTML under it.
        save: The file name under which it is saved; empty while it is not done.
        shape: Width and height of the picture.
    """

    label: str
    words: str = ""
    image: str = ""
    alt: str = ""
    share: float | None = None
    found: str = ""
    save: str = ""
    shape: tuple[int, int] = (1, 1)


def frames(shown: Sequence[Frame], line: str, below: str = "", example: str = "") -> str:
    """A drawing, or three to compare.

    Args:
        shown: The frames, side by side.
        line: What stands over them, and is read out.
        below: HTML under them.
        example: The prompt of an example that was drawn ahead.
    """
    marked = f' data-example="{escape(example)}"' if example else ""
    body = "".join(map(_figure, shown))
    return (
        f'<div class="result"{marked}><p class="headline" role="status">{line}</p>'
        f'<div class="frames n{len(shown)}">{body}</div><div class="below">{below}</div></div>'
    )


def empty() -> str:
    """Where results will be, before anything is drawn."""
    return frames(
        [Frame("Result", "Compare draws the prompt three times, from the same noise.")], "Nothing is drawn yet."
    )


def _figure(frame: Frame) -> str:
    parts = []
    if frame.image:
        parts.append(f'<img src="{escape(frame.image)}" alt="{escape(frame.alt)}">')
    if frame.words:
        parts.append(f'<span class="words">{escape(frame.words)}</span>')
    if frame.share is not None:
        name = escape(f"Steps of {frame.label}")
        parts.append(f'<progress max="1" value="{frame.share:.3f}" aria-label="{name}"></progress>')
    save = '<span class="save"></span>'
    if frame.save:
        save = (
            f'<a class="save" download="{escape(frame.save)}" href="{escape(frame.image)}">Save'
            f'<span class="sr"> {escape(frame.label)}</span></a>'
        )
    width, height = frame.shape
    return (
        f"<figure><figcaption>{named(frame.label)}</figcaption>"
        f'<div class="screen" style="aspect-ratio: {width} / {height}">{"".join(parts)}</div>'
        f'<div class="found">{frame.found}</div>{save}</figure>'
    )


def line(text: str) -> str:
    """What stands over frames, as HTML."""
    return escape(text)


def heard(image: Image.Image, words: str) -> str:
    """Where a sentence was heard."""
    shown = f'<img src="{data_uri(image)}" alt="{escape(words)}">'
    return f'<figure class="heard">{shown}<figcaption><p role="status">{escape(words)}</p></figcaption></figure>'


def under_way(label: str, step: Step, shape: tuple[int, int]) -> Frame:
    """The frame of a picture that is being drawn."""
    image = data_uri(step.preview) if step.preview is not None else ""
    words = f"step {step.number} of {step.steps}"
    alt = f"Preview after step {step.number} of {step.steps}" if image else ""
    return Frame(label, words, image, alt, step.number / step.steps, shape=shape)


def finished(label: str, kept: Kept, reader: Reader | None, image: str = "") -> Frame:
    """The frame of a picture that is done.

    Args:
        label: What stands over it.
        kept: The picture.
        reader: Says what it shows, where the model draws scenes.
        image: Its address, where it is not the album's.
    """
    settings, found = kept.settings, _found(kept, reader)
    save = f"finelip-{settings.long_prompt}-seed{settings.seed}.png"
    image = image or kept.address
    return Frame(label, image=image, alt=shows(kept, reader), found=found, save=save, shape=kept.image.size)


def _found(kept: Kept, reader: Reader | None) -> str:
    lines = reader.score(kept.settings.text, kept.image) if reader else []
    return "<br>".join(f'<span class="{kind}">{SIGNS[kind]}{escape(text)}</span>' for text, kind in lines)


def shows(kept: Kept, reader: Reader | None) -> str:
    """What a picture shows, for those who do not see it."""
    if reader:
        return in_words(reader.scene(kept.image))
    return f"Drawn with {STRATEGIES[kept.settings.long_prompt]} for: {beginning(kept.settings.prompt)}"


def beginning(prompt: str) -> str:
    """The beginning of a prompt, which names a picture."""
    line = " ".join(prompt.split())
    return line if len(line) <= BEGINNING else line[:BEGINNING].rsplit(" ", 1)[0] + " …"


def save_comparison(href: str, seed: int) -> str:
    """A link that saves three pictures as one; without an address, the place where it will be."""
    if not href:
        return '<p class="share"></p>'
    return (
        f'<p class="share"><a class="save" download="finelip-comparison-seed{seed}.png" href="{escape(href)}">'
        "Save the comparison as one picture</a></p>"
    )


def history(kept: Sequence[Kept], reader: Reader | None) -> str:
    """All pictures of a visitor, named by the beginning of their prompt."""
    if not kept:
        return '<p class="hint">Pictures that you draw stay here for a week.</p>'
    cards = []
    for picture in kept:
        settings = picture.settings
        name = f"{STRATEGIES[settings.long_prompt]}, seed {settings.seed}"
        cards.append(
            f'<li><img loading="lazy" src="{escape(picture.address)}" alt="{escape(shows(picture, reader))}">'
            f'<p dir="auto">{escape(beginning(settings.prompt))}</p><small>{name}</small>'
            f'<div class="verdicts">{_found(picture, reader)}</div>'
            f'<button type="button" data-use="{picture.path.name}">Use these settings<span class="sr"> of '
            f"{escape(beginning(settings.prompt))}, {name}</span></button></li>"
        )
    return f'<ul class="history">{"".join(cards)}</ul>'


def data_uri(image: Image.Image) -> str:
    """An image as part of a page."""
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
