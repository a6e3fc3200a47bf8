"""A picture as a PNG that remembers how it was drawn, and what such a PNG says."""

import io
import json
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from studio import Picture, Settings, as_record, as_settings

from finelip_diffusion import __version__

MAX_BYTES = 20_000_000  # of a PNG that is dropped on the page
MAX_SETTINGS = 300_000  # characters; two prompts of 20,000 characters, each escaped, are fewer


def to_png(picture: Picture, model: str) -> bytes:
    """The picture as a PNG whose text chunks are those of `finelip generate`.

    Args:
        picture: The picture.
        model: The model's name.

    Returns:
        The file's content.
    """
    settings = as_record(picture.settings)
    settings |= {"model": model, "width": picture.image.width, "height": picture.image.height, "version": __version__}
    info = PngInfo()
    for key in ("prompt", "negative_prompt"):
        info.add_itxt(key, settings[key])
    info.add_itxt("settings", json.dumps(settings, ensure_ascii=False))
    content = io.BytesIO()
    picture.image.save(content, "PNG", pnginfo=info)
    return content.getvalue()


def settings_of(content: bytes) -> tuple[Settings, str]:
    """How a PNG of this page, or of `finelip generate`, was drawn.

    Only its text is looked at: no pixel is decoded, nothing that it names is opened.

    Args:
        content: A file's content.

    Returns:
        The settings, and the name of the model.

    Raises:
        ValueError: If it is no PNG, holds no settings, or settings that are none.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"The file has {len(content):,} bytes: a PNG of this page has at most {MAX_BYTES:,}.")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            text: Any = image.info.get("settings")
    except Exception as error:  # whatever a broken file makes of its reader
        raise ValueError("This file is no PNG that can be read: drop one that was saved from this page.") from error
    if text is None:
        raise ValueError("This PNG holds no settings: drop one that was saved from this page.")
    try:
        if len(text) > MAX_SETTINGS:
            raise ValueError("too long")
        values = json.loads(text)
        model = values["model"]
        if not isinstance(model, str):
            raise TypeError("the model's name is no text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("The settings in this PNG cannot be read: it was not saved from this page.") from error
    if values.get("blend", 1) != 1:
        raise ValueError("This PNG was drawn with a blend of two encoders, which the page lacks: use the command.")
    try:
        return as_settings(values), model
    except (ValueError, TypeError) as error:
        raise ValueError(f"The settings in this PNG do not hold. {error}") from error
