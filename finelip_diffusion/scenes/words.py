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
