"""What the page shows beside results, as HTML: names, the meter, notes, sentences and where they were heard."""

import json
from html import escape

import numpy as np
from PIL import Image, ImageDraw
from studio import Picture

from finelip_diffusion.prompts import Reading, sentence_spans
from finelip_diffusion.scenes import PLACES

STRATEGIES = {  # long_prompt: what the page calls it
    "stretch": "FineLIP (248 tokens)",
    "truncate": "Stable Diffusion (77 tokens)",
    "chunk": "Windows of 77",
    "segment": "One window a sentence",
    "auto": "Automatic: 77 tokens where they are enough",
}
WEIGHTINGS = {  # weighting: what the page calls it
    "plain": "Plain text",
    "a1111": "Weights as in A1111: (word:1.3), [word], BREAK",
    "compel": "Weights as in compel: (word)1.3, word++",
}
NAMES = {  # of settings, in sentences
    "prompt": "prompt", "negative_prompt": "negative prompt", "seed": "seed", "steps": "steps",
    "guidance_scale": "guidance", "width": "width", "height": "height", "weighting": "what brackets mean",
}  # fmt: skip
COMPARED = ("truncate", "chunk", "stretch")
HINT = "<p class='hint'>Compare draws three times, from the same noise (Ctrl + Enter).</p>"
HEAT = np.array([255, 122, 0], dtype=np.float32)


def meter(stock: Reading, long: Reading, raw: str) -> str:
    """Two bars and a sentence: how full both windows are, and where the stock encoder stops.

    Args:
        stock: The prompt, cut after 77 tokens.
        long: The prompt, read by the long encoder.
        raw: The prompt as it stands in the box, whose characters `data-cuts` counts as a browser does.
    """
    rows = [_bar(STRATEGIES[name], reading) for name, reading in (("truncate", stock), ("stretch", long))]
    return (
        f'<div class="meter" data-cuts="{escape(json.dumps(cuts(stock, long, raw)))}">{"".join(rows)}'
        f'<p class="stops" role="status">{_stops(stock, long)}</p></div>'
    )


def named(label: str) -> str:
    """A label as HTML: what stands in brackets goes below it, smaller."""
    name, bracket, rest = label.partition(" (")
    return escape(name) + (f" <small>({escape(rest)}</small>" if bracket else "")


def _bar(name: str, reading: Reading) -> str:
    used, size = reading.tokens + 2, reading.window_length
    share = min(used / size, 1)
    if reading.dropped:
        verdict = f"{reading.tokens - reading.tokens_read} unread"
    elif len(reading.windows) > 1:
        verdict = f"all read, in {len(reading.windows)} windows"
    else:
        verdict = "all read"
    full = " over" if reading.dropped else ""
    return (
        f'<div class="bar{full}"><span class="name">{name}</span>'
        f'<span class="count"><b>{used}</b> of {size}: {verdict}</span>'
        f'<span class="track"><span class="fill" style="width: {share:.1%}"></span></span></div>'
    )


def _stops(stock: Reading, long: Reading) -> str:
    """What the marks in the box mean."""
    if not stock.dropped:
        return "Every encoder reads all of this prompt."
    text = stock.prompt.text
    end = stock.offsets[stock.tokens_read - 1][1]
    words = escape(" ".join(text[max(0, end - 60) : end].split()[-4:]))
    line = f'Stable Diffusion stops after “<bdi>… {words}</bdi>” and <span class="unread">never reads the rest</span>.'
    if len(long.windows) > 1:
        line += ' FineLIP continues in <span class="further">further windows</span>.'
    return line


def cuts(stock: Reading, long: Reading, raw: str) -> list[tuple[int, str]]:
    """Where in the box a mark begins, in UTF-16 units, and which: `"unread"`, or `"further"` for another window.

    The syntax of weights stays in the box but not in a reading: its characters are found again in their order. Where
    they cannot be found, nothing is marked.
    """
    text = stock.prompt.text
    bounds = [(stock.tokens_read, "unread")]
    bounds += [(int(token), "further") for token in np.cumsum([len(window) for window in long.windows])[:-1]]
    places, found = [], _places(text, raw)
    for token, kind in bounds:
        if token < stock.tokens and found:
            places.append((len(raw[: found[stock.offsets[token][0]]].encode("utf-16-le", "surrogatepass")) // 2, kind))
    return places


def _places(text: str, raw: str) -> list[int]:
    """For each character of a text, its place in the box; empty where the box does not hold it."""
    places, at = [], 0
    for character in text:
        at = raw.find(character, at)
        if at < 0:
            return []
        places.append(at)
        at += 1
    return places


def negative_meter(reading: Reading) -> str:
    """One line on the negative prompt."""
    used = reading.tokens + 2
    tail = f", read in {len(reading.windows)} windows" if len(reading.windows) > 1 else ""
    return f'<p class="count"><b>{used}</b> of {reading.window_length} tokens{tail}</p>'


def note(text: str) -> str:
    """One line that is read out."""
    return f'<p class="note" role="status">{escape(text)}</p>'


def sentences(picture: Picture, chosen: int | None = None) -> str:
    """The prompt of a picture as sentences to click; those that no encoder read cannot be."""
    prompt, buttons = picture.text, []
    limit = len(prompt) - len(picture.report.dropped)
    for number, (start, stop) in enumerate(sentence_spans(prompt)):
        text = escape(prompt[start:stop].strip())
        if start >= limit:
            buttons.append(f'<button type="button" disabled dir="auto"><s>{text}</s> (never read)</button>')
        else:
            buttons.append(
                f'<button type="button" data-sentence="{number}" aria-pressed="{str(number == chosen).lower()}" '
                f'dir="auto">{text}</button>'
            )
    return f'<div class="sentences" role="group" aria-label="Sentences of the prompt">{"".join(buttons)}</div>'


def overlay(image: Image.Image, heat: np.ndarray, side: int = 512) -> Image.Image:
    """The picture in gray, in color where attention is, with a ring around the peak.

    Args:
        image: The picture.
        heat: (H, W), any scale.
        side: The longer side of the result is at least so long.

    Returns:
        An RGB image.
    """
    scale = max(1, -(-side // max(image.size)))
    size = (image.width * scale, image.height * scale)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.NEAREST), dtype=np.float32)
    spread = heat.max() - heat.min()
    level = (heat - heat.min()) / (spread if spread else 1)
    mask = np.asarray(Image.fromarray(level.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))[..., None]
    gray = pixels.mean(2, keepdims=True) * 0.45 + 130
    shown = (1 - mask) * gray + mask * (0.7 * pixels + 0.3 * HEAT)
    result = Image.fromarray(shown.clip(0, 255).astype(np.uint8))
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    x, y, radius = (column + 0.5) / heat.shape[1] * size[0], (row + 0.5) / heat.shape[0] * size[1], max(size) / 30
    x, y = (min(max(at, radius), length - radius) for at, length in zip((x, y), size, strict=True))  # all of the ring
    draw = ImageDraw.Draw(result)
    for width, color in ((6, "black"), (3, "white")):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=color, width=width)
    return result


def heard(heat: np.ndarray, sentence: str) -> str:
    """What a heat map says, in words."""
    row, column = (3 * np.array(np.unravel_index(heat.argmax(), heat.shape)) // heat.shape).tolist()
    return (
        f"“{sentence}” Attention peaks {PLACES[3 * row + column][0]}: there it is "
        f"{heat.max() / heat.mean():.1f} times as high as over the whole picture."
    )
