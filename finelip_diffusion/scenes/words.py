"""What the things of the bundled world are called."""

import functools
from typing import Any

from .world import COLOURS, SHAPES

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
ROWS = (("top", "upper"), ("middle", "middle"), ("bottom", "lower"))
COLUMNS = ("left", "middle", "right")
PLACES = (
    ("in the top left corner", "at the upper left"),
    ("at the top in the middle", "at the upper centre"),
    ("in the top right corner", "at the upper right"),
    ("on the left side, halfway down", "at the centre left"),
    ("in the very centre", "in the middle of the picture"),
    ("on the right side, halfway down", "at the centre right"),
    ("in the bottom left corner", "at the lower left"),
    ("at the bottom in the middle", "at the lower centre"),
    ("in the bottom right corner", "at the lower right"),
)


SYNONYMS: dict[str, dict[str, tuple[str, ...]]] = {  # the plain name first
    "shape": {
        "circle": ("circle", "disc", "disk", "dot", "ball", "round shape", "roundel"),
        "square": ("square", "box", "block", "tile", "square shape", "quadrate"),
        "triangle": ("triangle", "pyramid", "wedge", "three-sided shape", "triangle shape", "trigon"),
        "diamond": ("diamond", "rhombus", "lozenge", "diamond shape", "rhomb"),
        "star": ("star", "five-pointed star", "pentagram", "star shape", "starlet"),
        "cross": ("cross", "plus", "plus sign", "cross shape", "plus symbol"),
    },
    "colour": {
        "red": ("red", "crimson", "scarlet", "ruby", "cherry red", "bright red", "vermilion"),
        "orange": ("orange", "tangerine", "pumpkin", "bright orange", "carrot orange"),
        "yellow": ("yellow", "lemon", "golden", "sunny yellow", "bright yellow", "canary"),
        "green": ("green", "emerald", "grass green", "leaf green", "jade"),
        "blue": ("blue", "cobalt", "royal blue", "sapphire", "bright blue", "azure"),
        "purple": ("purple", "violet", "plum", "lilac", "deep purple", "amethyst"),
        "brown": ("brown", "chocolate", "chestnut", "coffee brown", "umber"),
        "black": ("black", "jet black", "ebony", "pitch black", "inky black", "onyx"),
    },
    "size": {
        "small": ("small", "little", "tiny", "mini", "miniature", "wee", "petite", "small-sized", "undersized"),
        "large": ("large", "big", "huge", "giant", "enormous", "massive", "oversized", "large-sized", "gigantic"),
    },
    "background": {
        "grey": ("gray", "light gray", "silver", "pale gray", "ashen"),
        "beige": ("beige", "cream", "sand-colored", "pale beige", "ecru"),
        "pink": ("pink", "rose", "light pink", "pale pink", "blush"),
        "mint": ("mint", "mint green", "pale green", "light mint", "celadon"),
    },
}
UNSEEN_SYNONYMS = frozenset(
    [
        "roundel",
        "quadrate",
        "trigon",
        "rhomb",
        "starlet",
        "vermilion",
        "jade",
        "azure",
        "onyx",
        "umber",
        "undersized",
        "gigantic",
        "ecru",
        "celadon",
    ]
)
"""Words that no training caption has, a tenth of all: what a model makes of them, it has not learned by heart."""
PLURALS = {"box": "boxes", "cross": "crosses", "rhombus": "rhombuses", "plus": "pluses", "star": "stars"}


def plural(noun: str) -> str:
    """More than one of a noun, such as `"plus signs"`."""
    return PLURALS.get(noun, noun + "s")


@functools.cache
def meanings() -> dict[str, dict[str, Any]]:
    """What each attribute may be called in a caption, in small letters: the name, and the value that it names."""
    places = {phrase: cell for cell, phrases in enumerate(PLACES) for phrase in phrases}
    for cell in range(9):
        row, column = divmod(cell, 3)
        places[f"in the {ROWS[row][0]} row and the {COLUMNS[column]} column"] = cell
    return {
        "shape": {shape: shape for shape in SHAPES},
        "colour": {colour: colour for colour in COLOURS},
        "size": {word: size for size, words in SIZE_WORDS.items() for word in words},
        "cell": places,
    }
