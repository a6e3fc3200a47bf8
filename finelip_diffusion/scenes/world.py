"""Scenes of colored shapes on a 3x3 grid, their pictures, and a reader that says what a picture shows.

Everything is a function of a seed; train and test splits share no scene.
"""

import functools
import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

IMAGE_SIZE = 144  # pixels, both sides
CELL_SIZE = IMAGE_SIZE // 3
OVERSAMPLING = 4  # shapes are drawn this much larger, then averaged down
TEST_SHARE = 20  # one scene in TEST_SHARE belongs to the test split
PATIENCE = 2000  # draws of a near-duplicate before it may differ in more
MAX_RESIDUAL = 0.15  # root mean square error, of [0, 1], beyond which a cell shows nothing that the reader can name

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "moon")
SIZES = {"small": 10.5, "large": 19.0}  # radius in pixels
RIM = (1.5, 0.6)  # width in pixels and brightness, of the color, of the line around a shape
SHADOW = (2, 1.5, 0.28)  # pixels down and to the right, blur in pixels, darkness
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 225, 60),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "purple": (140, 60, 170),
    "brown": (125, 80, 45),
    "black": (25, 25, 25),
}
BACKGROUNDS = {"grey": (205, 205, 208), "beige": (232, 218, 190), "pink": (245, 205, 215), "mint": (200, 235, 215)}
ATTRIBUTES: dict[str, tuple[Any, ...]] = {
    "cell": tuple(range(9)),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
}


@dataclass(frozen=True, order=True)
class Object:
    """One shape in one cell; cells count 0..8 row by row from the top left."""

    cell: int
    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """A background and its objects, in the order of their cells."""

    background: str
    objects: tuple[Object, ...]

    @property
    def split(self) -> str:
        """`"test"` for one scene in `TEST_SHARE`, by a hash of the scene itself, else `"train"`."""
        digest = hashlib.blake2b(repr(self).encode(), digest_size=8).digest()
        return "test" if int.from_bytes(digest, "big") % TEST_SHARE == 0 else "train"


def sample_scene(seed: int, split: str = "train", num_objects: tuple[int, int] = (4, 9)) -> Scene:
    """Draws a scene.

    Args:
        seed: any integer; the same seed gives the same scene.
        split: `"train"` or `"test"`; no scene is in both.
        num_objects: least and greatest number of objects, 1..9.

    Raises:
        ValueError: for an unknown split or a number of objects outside 1..9.
    """
    least, greatest = num_objects
    if split not in ("train", "test"):
        raise ValueError(f"The split of a scene is 'train' or 'test', not {split!r}.")
    if not 1 <= least <= greatest <= 9:
        raise ValueError(f"A scene has 1 to 9 objects, not {least} to {greatest}: choose num_objects within (1, 9).")
    rng = random.Random(f"{split} {seed}")
    while True:
        objects = tuple(
            Object(cell, rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(SIZES)))
            for cell in sorted(rng.sample(range(9), rng.randint(least, greatest)))
        )
        scene = Scene(rng.choice(list(BACKGROUNDS)), objects)
        if scene.split == split:
            return scene


def vary(scene: Scene, kind: str, seed: int) -> Scene:
    """Draws a near-duplicate of a scene: another scene in the same split.

    Args:
        scene: the scene to vary.
        kind: `"move"` puts the same objects into other cells, `"exchange"` keeps cells and deals the colors, shapes
            and sizes out anew, each for itself, `"alter"` changes one attribute of one object. Where the split has no
            such scene (few objects, the test split), one attribute more is altered.
        seed: any integer.

    Raises:
        ValueError: for an unknown kind.
    """
    rng, start, tries = random.Random(f"{kind} {seed}"), scene, 0
    while True:
        tries += 1
        objects = list(start.objects)
        if kind == "move":
            cells = rng.sample(range(9), len(objects))
            objects = [replace(item, cell=cell) for item, cell in zip(objects, cells, strict=True)]
        elif kind == "exchange":
            for attribute in ("shape", "colour", "size"):
                values = [getattr(item, attribute) for item in objects]
                rng.shuffle(values)
                objects = [replace(item, **{attribute: value}) for item, value in zip(objects, values, strict=True)]
        elif kind == "alter":
            place = rng.randrange(len(objects))
            attribute, choices = rng.choice((("shape", SHAPES), ("colour", tuple(COLOURS)), ("size", tuple(SIZES))))
            change: dict[str, Any] = {attribute: rng.choice(choices)}
            objects[place] = replace(objects[place], **change)
        else:
            raise ValueError(f"A scene varies by 'move', 'exchange' or 'alter', not {kind!r}.")
        varied = Scene(scene.background, tuple(sorted(objects)))
        if varied != scene and varied.split == scene.split:
            return varied
        if tries % PATIENCE == 0:
            kind, start = "alter", varied


def alterations(scene: Scene, objects: Sequence[Object]) -> list[Scene]:
    """All scenes that differ in one attribute of one of the objects, or in two of them having changed places."""
    cells = {item.cell for item in scene.objects}
    changes: list[dict[Object, Object]] = []
    for item in objects:
        for name, values in ATTRIBUTES.items():
            altered: list[dict[str, Any]] = [{name: value} for value in values if name != "cell" or value not in cells]
            changes += [{item: replace(item, **attribute)} for attribute in altered]
    changes += [
        {one: replace(one, cell=other.cell), other: replace(other, cell=one.cell)}
        for one, other in combinations(objects, 2)
    ]
    scenes = [Scene(scene.background, tuple(sorted(change.get(item, item) for item in scene.objects)))
              for change in changes]  # fmt: skip
    return [other for other in dict.fromkeys(scenes) if other != scene]


def _turned(names: Sequence[str], by: int) -> dict[str, str]:
    return {name: names[(place + by) % len(names)] for place, name in enumerate(names)}


PALETTE = {**_turned(tuple(COLOURS), 3), **_turned(tuple(BACKGROUNDS), 1)}
"""Another style of this world: in which color it paints what is told to have a color. No color stays as it is."""
_PALETTE_BACK = {painted: told for told, painted in PALETTE.items()}


def repainted(scene: Scene, back: bool = False) -> Scene:
    """A scene in the colors of `PALETTE`, or `back` from them."""
    palette = _PALETTE_BACK if back else PALETTE
    objects = tuple(replace(item, colour=palette[item.colour]) for item in scene.objects)
    return Scene(palette[scene.background], objects)


# ---------------------------------------------------------------------------------------------------------- pictures


def _outline(shape: str, centre: float, radius: float) -> list[tuple[float, float]]:
    """Corner points of a polygon inscribed in a circle of `radius`, scaled so that the shapes look equally large."""

    def corners(number: int, turn: float, scale: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
        points = []
        for index in range(number):
            angle, length = 2 * math.pi * (index / number + turn), radius * scale[index % len(scale)]
            points.append((centre + length * math.sin(angle), centre - length * math.cos(angle)))
        return points

    if shape == "square":
        return corners(4, 1 / 8, (1.25,))
    if shape == "triangle":
        return [(x, y + radius * 0.2) for x, y in corners(3, 0, (1.2,))]
    if shape == "diamond":
        return [(centre + (x - centre) * 0.75, y) for x, y in corners(4, 0, (1.15,))]
    if shape == "heart":
        turns = [2 * math.pi * index / 48 for index in range(48)]
        points = [
            (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
            for t in turns
        ]
        return [(centre + x * radius / 15, centre - (y + 2.5) * radius / 15) for x, y in points]
    if shape == "star":
        return [(x, y + radius * 0.05) for x, y in corners(10, 0, (1.2, 0.5))]
    arm = radius * 0.33
    plus = [(-arm, -radius), (arm, -radius), (arm, -arm), (radius, -arm), (radius, arm), (arm, arm)]
    plus += [(-x, -y) for x, y in plus]
    return [(centre + x, centre + y) for x, y in plus]


@functools.cache
def _masks(shape: str, size: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much of each pixel of a cell a shape covers, its inside within the rim, and its shadow.

    Each is (CELL_SIZE, CELL_SIZE, 1) in 0..1.
    """
    canvas = Image.new("L", (CELL_SIZE * OVERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    centre, radius = CELL_SIZE * OVERSAMPLING / 2, SIZES[size] * OVERSAMPLING
    if shape == "circle":
        draw.ellipse([centre - radius, centre - radius, centre + radius, centre + radius], fill=255)
    elif shape == "moon":
        left, bite = centre - radius * 0.85, centre - radius * 0.3
        draw.ellipse([left, centre - radius, left + 2 * radius, centre + radius], fill=255)
        draw.ellipse([bite, centre - radius * 0.95, bite + 1.7 * radius, centre + radius * 0.75], fill=0)
    else:
        draw.polygon(_outline(shape, centre, radius), fill=255)
    inside = canvas.filter(ImageFilter.MinFilter(2 * round(RIM[0] * OVERSAMPLING) + 1))
    down, blur, _ = SHADOW
    shadow = Image.new("L", canvas.size)
    shadow.paste(canvas, (down * OVERSAMPLING,) * 2)
    shadow = ImageChops.subtract(shadow.filter(ImageFilter.GaussianBlur(blur * OVERSAMPLING)), canvas)
    whole, inner, dark = (
        np.asarray(each.resize((CELL_SIZE, CELL_SIZE), Image.Resampling.BOX), np.float32)[..., None] / 255
        for each in (canvas, inside, shadow)
    )
    return whole, inner, dark


@functools.cache
def _patch(shape: str, colour: str, size: str, background: str) -> np.ndarray:
    """A cell that holds one object, with its rim and its shadow, (CELL_SIZE, CELL_SIZE, 3) in 0..1."""
    whole, inner, dark = _masks(shape, size)
    fill, paper = np.array(COLOURS[colour], np.float32), np.array(BACKGROUNDS[background], np.float32)
    ground = paper * (1 - SHADOW[2] * dark)
    return (inner * fill + (whole - inner) * RIM[1] * fill + (1 - whole) * ground) / 255


@functools.cache
def cell_pictures(background: str) -> tuple[list[tuple[str, str, str] | None], np.ndarray]:
    """Every cell that can lie on a background, of which all pictures consist.

    Args:
        background: a name in `BACKGROUNDS`.

    Returns:
        The shape, color and size in it, None for the empty cell, which comes first; and its pixels,
        (N, CELL_SIZE, CELL_SIZE, 3) in 0..1.
    """
    names: list[tuple[str, str, str] | None] = [None, *((*kind,) for kind in product(SHAPES, COLOURS, SIZES))]
    empty = np.broadcast_to(np.array(BACKGROUNDS[background], np.float32) / 255, (CELL_SIZE, CELL_SIZE, 3))
    return names, np.stack([empty, *(_patch(*name, background) for name in names if name is not None)])


def render(scene: Scene) -> Image.Image:
    """Draws a scene as an RGB image of `IMAGE_SIZE` x `IMAGE_SIZE` pixels."""
    names, pictures = cell_pictures(scene.background)
    cells = np.zeros(9, int)
    for item in scene.objects:
        cells[item.cell] = names.index((item.shape, item.colour, item.size))
    rows = pictures[cells].reshape(3, 3, CELL_SIZE, CELL_SIZE, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray((rows.reshape(IMAGE_SIZE, IMAGE_SIZE, 3) * 255 + 0.5).astype(np.uint8))


# ------------------------------------------------------------------------------------------------------------ reader


def _cells(image: Image.Image | np.ndarray) -> np.ndarray:
    """The nine cells of an image, (9, pixels) in 0..1."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"The reader takes RGB images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, not an array of {pixels.shape}: "
            "draw at the model's own size or resize first."
        )
    values = pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels.astype(np.float32)
    grid = values.reshape(3, CELL_SIZE, 3, CELL_SIZE, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(9, CELL_SIZE * CELL_SIZE * 3)


def read(image: Image.Image | np.ndarray) -> Scene:
    """Says which scene an image shows.

    The background is the one nearest to the median color along the borders of the cells; each cell is the object,
    or the empty background, nearest in squared error. A cell that resembles none (root mean square error over
    `MAX_RESIDUAL`) counts as empty.

    Args:
        image: a PIL image, or an array (IMAGE_SIZE, IMAGE_SIZE, 3) of uint8, or of floats in 0..1.

    Raises:
        ValueError: for an image of another size.
    """
    cells = _cells(image)
    square = cells.reshape(9, CELL_SIZE, CELL_SIZE, 3)
    border = np.concatenate([square[:, :2].reshape(-1, 3), square[:, -2:].reshape(-1, 3)])
    median = np.median(border, axis=0) * 255
    background = min(BACKGROUNDS, key=lambda name: float(np.square(median - np.array(BACKGROUNDS[name])).sum()))
    names, pictures = cell_pictures(background)
    templates = pictures.reshape(len(pictures), -1)
    errors = np.square(cells).sum(1)[:, None] - 2 * cells @ templates.T + np.square(templates).sum(1)  # (9, N)
    residuals = np.sqrt(np.maximum(errors, 0) / cells.shape[1])
    objects = []
    for cell, best in enumerate(errors.argmin(1)):
        name = names[best]
        if name is not None and residuals[cell, best] <= MAX_RESIDUAL:
            objects.append(Object(cell, *name))
    return Scene(background, tuple(objects))
