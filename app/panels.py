"""What the page shows as HTML: the meter, the prompt as it was read, progress, verdicts, sentences to listen to."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image, ImageDraw
from studio import Picture, Step

from finelip_diffusion.prompts import Reading, sentence_spans
from finelip_diffusion.scenes import PLACES, Caption, Scene, findings

STRATEGIES = {  # long_prompt: what the page calls it
    "stretch": "FineLIP: windows of 248 tokens",
    "truncate": "truncate: the first 77 tokens",
    "chunk": "chunk: windows of 77 tokens",
    "segment": "segment: a window a sentence",
    "auto": "auto: 77 tokens or FineLIP",
}
WEIGHTINGS = {  # weighting: what the page calls it
    "plain": "text, as everything else",
    "a1111": "weights: (word:1.3), [word], BREAK",
    "compel": "compel: (word)1.3, word++",
}
COMPARED = {"truncate": "truncate", "chunk": "chunk", "stretch": "FineLIP"}
HEAT = np.array([255, 122, 0], dtype=np.float32)


def meter(stock: Reading, long: Reading) -> str:
    """Two bars: how full the stock window and the long one are, and how much of the prompt does not fit."""
    rows = [_bar(f"{reading.window_length}-token encoder", reading) for reading in (stock, long)]
    return f'<div class="meter" role="status" aria-live="polite">{"".join(rows)}</div>'


def _bar(name: str, reading: Reading) -> str:
    used, size = reading.tokens + 2, reading.window_length
    share = min(used / size, 1)
    if reading.dropped:
        verdict = f"never reads the last {reading.tokens - reading.tokens_read}"
    elif len(reading.windows) > 1:
        verdict = f"reads all, in {len(reading.windows)} windows"
    else:
        verdict = "reads all"
    full = " over" if reading.dropped else ""
    return (
        f'<div class="bar{full}"><span class="name">{name}</span>'
        f'<span class="track"><span class="fill" style="width: {share:.1%}"></span></span>'
        f'<span class="count"><b>{used}</b> of {size}: {verdict}</span></div>'
    )


def negative_meter(reading: Reading) -> str:
    """One line on the negative prompt."""
    used = reading.tokens + 2
    tail = f", read in {len(reading.windows)} windows" if len(reading.windows) > 1 else ""
    return f'<p class="count" role="status"><b>{used}</b> of {reading.window_length} tokens{tail}</p>'


def reading(stock: Reading, long: Reading) -> str:
    """The prompt itself, coloured and marked by who reads what."""
    if not stock.tokens:
        return ""
    prompt = stock.prompt.text
    cuts = {len(prompt): ""}
    bounds = [stock.tokens_read, *np.cumsum([len(window) for window in long.windows])[:-1].tolist()]
    for number, token in enumerate(bounds):
        if token < stock.tokens:
            name = f"the {stock.window_length}-token encoder stops here" if not number else f"window {number + 1}"
            cuts[stock.offsets[token][0]] = name
    parts, start, kind = [], 0, "read"
    for stop in sorted(cuts):
        parts.append(f'<span class="{kind}">{escape(prompt[start:stop])}</span>')
        if cuts[stop]:
            parts.append(f'<span class="cut">{cuts[stop]}</span>')
            kind = "unread" if kind == "read" else "further"
        start = stop
    legend = ['<span class="read">read by both encoders</span>']
    if stock.dropped:
        legend.append(f'<span class="unread">never read by the {stock.window_length}-token encoder</span>')
    if len(long.windows) > 1:
        legend.append('<span class="further">in a further window of the long encoder</span>')
    return f'<div class="reading" dir="auto">{"".join(parts)}</div><p class="legend">{"".join(legend)}</p>'


def stage(step: Step, title: str) -> str:
    """A drawing under way: a bar, and the picture so far."""
    share = step.number / step.steps
    picture = ""
    if step.preview is not None:
        picture = f'<img src="{data_uri(step.preview)}" alt="Preview after step {step.number} of {step.steps}">'
    return (
        f'<div class="stage">{picture}<p role="status">{escape(title)}: step {step.number} of {step.steps}, '
        f"{step.seconds:.1f} s</p>"
        f'<progress max="1" value="{share:.3f}" aria-label="Steps done"></progress></div>'
    )


def note(text: str) -> str:
    """One line in the place of a drawing under way."""
    return f'<p class="note" role="status">{escape(text)}</p>'


def verdict(caption: Caption, shown: dict[str, Scene], tokenizer) -> str:
    """Which objects of a prompt the reader finds in each picture, as a table.

    Args:
        caption: The prompt, with the facts that were found in it.
        shown: By strategy, what the reader sees in the picture.
        tokenizer: CLIP's.

    Returns:
        The table, or a line that says why there is none.
    """
    if not caption.facts:
        return note(
            "No verdict: the reader knows coloured shapes on a 3 x 3 grid, and no sentence here names one shape, "
            "one colour, one size and one place. The examples do."
        )
    found = {name: findings(caption, scene, tokenizer) for name, scene in shown.items()}
    heads = "".join(
        f'<th scope="col">{COMPARED[name]}<br>{sum(finding.found for finding in rows)} of {len(rows)}</th>'
        for name, rows in found.items()
    )
    body = []
    for index, fact in enumerate(caption.facts):
        item = fact.object
        behind = next(iter(found.values()))[index].after
        words = f"{item.size} {item.colour} {item.shape} <small>{PLACES[item.cell][0]}</small>"
        cells = []
        for name, scene in shown.items():
            drawn = {other.cell: other for other in scene.objects}.get(item.cell)
            if found[name][index].found:
                cells.append('<td class="yes">✓ found</td>')
            else:
                seen = f"{drawn.size} {drawn.colour} {drawn.shape}" if drawn else "nothing"
                cells.append(f'<td class="no">✗&nbsp;{seen}</td>')
        side = '<span class="behind">behind token 77</span>' if behind else ""
        body.append(f'<tr><th scope="row">{words} {side}</th>{"".join(cells)}</tr>')
    return (
        '<table class="verdict"><caption>What the reader finds in each picture: shape, colour and size, in the cell '
        f'that the prompt names.</caption><thead><tr><th scope="col">asked for</th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


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
    """The picture in grey, in colour where attention is, with a ring around the peak.

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
    grey = pixels.mean(2, keepdims=True) * 0.45 + 130
    shown = (1 - mask) * grey + mask * (0.7 * pixels + 0.3 * HEAT)
    result = Image.fromarray(shown.clip(0, 255).astype(np.uint8))
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    x, y, radius = (column + 0.5) / heat.shape[1] * size[0], (row + 0.5) / heat.shape[0] * size[1], max(size) / 30
    x, y = (min(max(at, radius), length - radius) for at, length in zip((x, y), size, strict=True))  # all of the ring
    draw = ImageDraw.Draw(result)
    for width, colour in ((6, "black"), (3, "white")):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=colour, width=width)
    return result


def heard(heat: np.ndarray, sentence: str) -> str:
    """What a heat map says, in words."""
    row, column = (3 * np.array(np.unravel_index(heat.argmax(), heat.shape)) // heat.shape).tolist()
    return (
        f"“{sentence}” Attention peaks {PLACES[3 * row + column][0]}: there it is "
        f"{heat.max() / heat.mean():.1f} times as high as over the whole picture."
    )


def data_uri(image: Image.Image) -> str:
    """An image as part of a page."""
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
