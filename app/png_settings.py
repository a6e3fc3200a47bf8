"""A picture as a PNG that remembers how it was drawn, and what such a PNG says."""

import io
import json
from typing import Any

import other_programs
from other_programs import Found
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from settings import Settings, as_record, as_settings
from studio import Picture

from finelip_diffusion import __version__
from finelip_diffusion.files import png_text

MAX_BYTES = 20_000_000  # of a picture that is dropped on the page
MAX_SETTINGS = 300_000  # characters; two prompts of 20,000 characters, each escaped, are fewer


def to_png(picture: Picture, model: str) -> bytes:
    """The picture as a PNG whose text chunks are those of `finelip generate`.

    Args:
        picture: The picture.
        model: The model's name.

    Returns:
        The file's content.
    """
    content = io.BytesIO()
    picture.image.save(content, "PNG", pnginfo=text_chunks(picture.settings, model, picture.image.size))
    return content.getvalue()


def text_chunks(settings: Settings, model: str, size: tuple[int, int]) -> PngInfo:
    """What a PNG says of itself.

    Args:
        settings: How it was drawn.
        model: The model's name.
        size: Width and height of what the model drew.
    """
    values = as_record(settings) | {"model": model, "width": size[0], "height": size[1], "version": __version__}
    return png_text(prompt=values["prompt"], negative_prompt=values["negative_prompt"], settings=values)


def found_in(content: bytes) -> tuple[Found, str | None]:
    """How a picture was drawn: one of this page or of `finelip generate`, or of another program.

    Only its text is looked at: no pixel is decoded, nothing that it names is opened.

    Args:
        content: A file's content: PNG, JPEG or WebP.

    Returns:
        What could be read, and the name of the model where this package drew it.

    Raises:
        ValueError: If it is not a picture, holds no settings, or settings that are not valid.
    """
    texts = _texts(content)
    if "settings" in texts:
        settings, model = _own(texts["settings"])
        return Found("this page", as_record(settings)), model
    found = other_programs.read(texts)
    if found is None:
        raise ValueError(
            "This picture holds no settings: drop one of this page, or of A1111, Forge, Fooocus, ComfyUI or InvokeAI. "
            "Many programs and web sites remove them when they save a picture again."
        )
    return found, None


def settings_of(content: bytes) -> tuple[Settings, str]:
    """How a PNG of this page, or of `finelip generate`, was drawn.

    Args:
        content: A file's content.

    Returns:
        The settings, and the name of the model.

    Raises:
        ValueError: If it is not a PNG, holds no settings, or settings that are not valid.
    """
    texts = _texts(content)
    if "settings" not in texts:
        raise ValueError("This picture holds no settings of this page.")
    return _own(texts["settings"])


def _texts(content: bytes) -> dict[str, str]:
    if len(content) > MAX_BYTES:
        raise ValueError(f"The file has {len(content):,} bytes: a picture here has at most {MAX_BYTES:,}.")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG", "JPEG", "WEBP"]) as image:
            return other_programs.texts_of(image)
    except Exception as error:  # whatever a broken file makes of its reader
        raise ValueError("This file is not a picture that can be read: drop a PNG, JPEG or WebP.") from error


def _own(text: str) -> tuple[Settings, str]:
    try:
        if len(text) > MAX_SETTINGS:
            raise ValueError("too long")
        values: Any = json.loads(text)
        model = values["model"]
        if not isinstance(model, str):
            raise TypeError("the model's name is not a text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("The settings in this picture cannot be read: this page did not write them.") from error
    if values.get("blend", 1) != 1:
        raise ValueError("This picture was drawn with a blend of two encoders, which the page lacks: use the command.")
    try:
        return as_settings(values), model
    except (ValueError, TypeError) as error:
        raise ValueError(f"The settings in this picture are not valid. {error}") from error
