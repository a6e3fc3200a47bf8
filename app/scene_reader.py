"""What the pictures of the bundled world show, in words: a line under each, and a table of every object."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape

from panels import COMPARED, STRATEGIES, named
from PIL import Image

from finelip_diffusion.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    advice,
    find_facts,
    findings,
    read,
)
from finelip_diffusion.tokenizer import clip_tokenizer

CAN_DRAW = (
    f"This small model draws {' and '.join(SIZES)} shapes ({', '.join(SHAPES)}) in {len(COLOURS)} colors "
    f"({', '.join(COLOURS)}) on a plain background ({', '.join(BACKGROUNDS)})."
)


def in_words(scene: Scene) -> str:
    """What a picture of the bundled world shows."""
    items = [f"{item.size} {item.colour} {item.shape} {PLACES[item.cell][0]}" for item in scene.objects]
    return f"A {scene.background} background with {', '.join(items) or 'nothing on it'}."


def asked_background(prompt: str) -> str | None:
    """The background that a prompt names, where it names one."""
    named = {name for name in BACKGROUNDS if name in prompt.lower().replace(",", " ").replace(".", " ").split()}
    return named.pop() if len(named) == 1 else None


class Reader:
    """Compares pictures with their prompts."""

    def __init__(self) -> None:
        self.tokenizer = clip_tokenizer(77)
        self.facts = lru_cache(256)(find_facts)  # all pictures of a history ask

    def advice(self, prompt: str) -> str:
        """HTML below the prompt: what the model can draw, and that a prompt about something else is none of it."""
        warning = advice(prompt) if prompt else None
        return (
            f'<p class="warning" role="status">{escape(warning)}</p>' if warning else f'<p class="hint">{CAN_DRAW}</p>'
        )

    def scene(self, image: Image.Image) -> Scene:
        """What a picture shows."""
        return read(image)

    def score(self, prompt: str, image: Image.Image) -> list[tuple[str, str]]:
        """Lines under a picture: how many objects of the prompt it shows, and whether the background is right.

        Returns:
            Each line, and whether it is good ("yes"), bad ("no") or neither ("").
        """
        scene, caption, lines = self.scene(image), self.facts(prompt), []
        if caption.facts:
            found = findings(caption, scene, self.tokenizer)
            right = sum(finding.found for finding in found)
            lines.append((f"{right} of {len(found)} objects found", "yes" if right == len(found) else ""))
            asked = {fact.object.cell for fact in caption.facts}
            if others := sum(item.cell not in asked for item in scene.objects):
                lines.append((f"{others} not asked for", "no"))
        background = asked_background(prompt)
        if background:
            right = background == scene.background
            words = "" if right else f", not {background}"
            lines.append((f"background {scene.background}{words}", "yes" if right else "no"))
        return lines or [(in_words(scene), "")]

    def table(self, prompt: str, images: Mapping[str, Image.Image], columns: Sequence[str] = COMPARED) -> str:
        """Which objects of a prompt each picture shows.

        Args:
            prompt: What was asked for.
            images: By strategy, the pictures that are drawn already.
            columns: The strategies that are compared.

        Returns:
            The table, or a line that says why there is none.
        """
        caption = self.facts(prompt)
        if not caption.facts:
            return (
                '<p class="hint">There is no table: no sentence of this prompt names one shape, one color, one size '
                "and one place. The examples show sentences that do.</p>"
            )
        shown = {name: self.scene(image) for name, image in images.items()}
        found = {name: findings(caption, shown.get(name, Scene("", ())), self.tokenizer) for name in columns}
        rows = []
        for index, fact in enumerate(caption.facts):
            item, cells = fact.object, []
            for name in columns:
                scene = shown.get(name)
                drawn = {other.cell: other for other in scene.objects}.get(item.cell) if scene else None
                seen = f"{drawn.size} {drawn.colour} {drawn.shape}" if drawn else "nothing"
                cells.append(_cell(scene, found[name][index].found, seen))
            after = '<span class="after">after token 77</span>' if found[columns[0]][index].after else ""
            rows.append(
                _row(f"{item.size} {item.colour} {item.shape} <small>{PLACES[item.cell][0]}</small> {after}", cells)
            )
        if background := asked_background(prompt):
            scenes = [shown.get(name) for name in columns]
            cells = [
                _cell(scene, bool(scene and scene.background == background), scene.background if scene else None)
                for scene in scenes
            ]
            rows.append(_row(f"{background} background", cells))
        heads = "".join(f'<th scope="col">{named(STRATEGIES[name])}</th>' for name in columns)
        return (
            '<table class="verdict"><caption>What the reader finds in each picture: shape, color and size, in the '
            'place that the prompt names.</caption><thead><tr><th scope="col">asked for</th>'
            f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )


def _row(name: str, cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>'


def _cell(scene: Scene | None, right: bool, seen: str | None) -> str:
    if scene is None:
        return '<td class="open">…</td>'
    if right:
        return '<td class="yes">✓ <span>found</span></td>'
    return f'<td class="no">✗ <span>{seen}</span></td>'
