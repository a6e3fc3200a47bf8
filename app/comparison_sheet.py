"""Three pictures as one, with their names and what was found in each."""

import io
from collections.abc import Mapping

from album import Kept
from panels import STRATEGIES
from PIL import Image, ImageDraw, ImageFont
from png_settings import text_chunks
from settings import Settings

SIDE = 384  # pixels that a picture is wide; a smaller one is enlarged by a whole number to at least that
MARGIN = 24
LINES = 8  # of the prompt, at most


def sheet(pictures: Mapping[str, Kept], notes: Mapping[str, list[str]], settings: Settings, model: str) -> bytes:
    """A PNG with the pictures side by side; it holds the prompt and all settings, as every PNG of the page does.

    Args:
        pictures: By strategy.
        notes: By strategy, the lines under a picture.
        settings: What was drawn.
        model: The model's name.

    Returns:
        The file's content.
    """
    title, text = ImageFont.load_default(22), ImageFont.load_default(18)
    first = next(iter(pictures.values())).image
    scale = -(-SIDE // first.width) if first.width < SIDE else SIDE / first.width
    size = (round(first.width * scale), max(1, round(first.height * scale)))
    sampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    width = len(pictures) * (size[0] + MARGIN) + MARGIN
    prompt = _wrapped(settings.prompt, text, width - 2 * MARGIN)
    below = max(map(len, notes.values()), default=0) * 26
    height = MARGIN + 36 + size[1] + 12 + below + 12 + 26 * (len(prompt) + 1) + MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for place, (name, picture) in enumerate(pictures.items()):
        x, y = MARGIN + place * (size[0] + MARGIN), MARGIN
        draw.text((x, y), STRATEGIES[name], "black", title)
        canvas.paste(picture.image.convert("RGB").resize(size, sampling), (x, y + 36))
        draw.rectangle([x - 1, y + 35, x + size[0], y + 36 + size[1]], outline="#c9ced6")
        for number, line in enumerate(notes.get(name, [])):
            draw.text((x, y + 36 + size[1] + 12 + 26 * number), line, "black", text)
    y = MARGIN + 36 + size[1] + 12 + below + 12
    drawn = f"The same noise, seed {settings.seed}, {settings.steps} steps, guidance {settings.guidance_scale:g}."
    draw.text((MARGIN, y), f"{drawn} Model: {model}", "#475569", text)
    for number, line in enumerate(prompt):
        draw.text((MARGIN, y + 26 * (number + 1)), line, "black", text)
    content = io.BytesIO()
    canvas.save(content, "PNG", pnginfo=text_chunks(settings, model, first.size))
    return content.getvalue()


def _wrapped(prompt: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The prompt in lines, or nothing where the font lacks its letters."""
    if any(ord(character) > 0x24F and character not in "‘’“”–—…" for character in prompt):
        return []
    lines = [""]
    for word in prompt.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], lines[LINES - 1] + " …"]
