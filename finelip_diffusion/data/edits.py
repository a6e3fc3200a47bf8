"""Edits of a caption that make it wrong of its image: one change each, by rules, for captions of any images.

Rules know words, not pictures: now and then an edit stays true of the image (a clause less, a second thing of the new
color). Edits by a language model come in a field of the data instead (`sources.EDIT_COLUMNS`).
"""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Literal

from ..scenes import STOCK_CONTENT_TOKENS

EditPlace = Literal["any", "before", "after"]
"""Where a caption is edited: before or after what a 77-token encoder reads."""

COLORS = (
    "black", "blue", "brown", "gold", "golden", "gray", "green", "grey", "orange", "pink", "purple", "red", "silver",
    "tan", "white", "yellow",
)  # fmt: skip
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
OPPOSITES = (
    ("left", "right"), ("top", "bottom"), ("upper", "lower"), ("above", "below"), ("inside", "outside"),
    ("in front of", "behind"), ("foreground", "background"), ("front", "back"), ("first", "last"),
)  # fmt: skip
ATTRIBUTES = (  # words of one class are exchanged between nouns
    COLORS,
    ("big", "huge", "large", "little", "long", "short", "small", "tall", "thick", "thin", "tiny", "wide"),
    ("brick", "concrete", "glass", "leather", "metal", "metallic", "plastic", "stone", "wooden"),
    ("checkered", "dotted", "floral", "patterned", "plaid", "plain", "striped"),
    ("bright", "clear", "cloudy", "dark", "dim", "pale"),
)
_JOINTS = {"a", "an", "and", "of", "or", "the", "with"}  # between two attributes of one noun: "red and white shirt"
_OPPOSITE = {one: other for pair in OPPOSITES for one, other in (pair, pair[::-1])}
_CLAUSE = re.compile(r", [^,.;:!?]{8,}(?=[,.;!?])")

Change = tuple[int, int, str]
"""[start, end) of a caption, and what stands there instead."""


def rule_edits(caption: str, draw: int = 0) -> list[str]:
    """All edits of a caption that the rules make, in the order of where they stand.

    A color becomes another; a number one more or one less; left and right, and other opposites, change places; two
    attributes of one class, of different nouns, change places; a clause between commas is dropped.

    Args:
        caption: Any text.
        draw: Chooses the other color, and more or less; the same draw gives the same edits.

    Returns:
        Texts, none of them the caption, each once.
    """
    rng = random.Random(f"edits {draw}")
    changes = [*_replaced(caption, rng), *_exchanged(caption), *([(*match.span(), "")] for match in _clauses(caption))]
    edits = [_edited(caption, change) for change in sorted(changes)]
    return [edit for edit in dict.fromkeys(edits) if edit != caption]


def place_of_edit(caption: str, edit: str, offsets: Sequence[tuple[int, int]]) -> Literal["before", "after"]:
    """Whether an edit differs from its caption within what a 77-token encoder reads, or after it alone.

    Args:
        caption: Text.
        edit: The edited one.
        offsets: The characters of each content token of the caption.
    """
    pairs = zip(caption, edit, strict=False)
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(caption), len(edit)))
    token = sum(end <= same for _, end in offsets)  # tokens in front of the first one that differs
    return "before" if token < STOCK_CONTENT_TOKENS else "after"


def choose_edits(
    caption: str, edits: Sequence[str], offsets: Sequence[tuple[int, int]], number: int, place: EditPlace, draw: int
) -> list[str]:
    """Draws at most `number` of the edits that stand in a place."""
    if place != "any":
        edits = [edit for edit in edits if place_of_edit(caption, edit, offsets) == place]
    return random.Random(f"chosen {draw}").sample(edits, min(number, len(edits)))


def _words(caption: str, words: Sequence[str]) -> Iterator[re.Match[str]]:
    return re.finditer(rf"\b(?:{'|'.join(sorted(words, key=len, reverse=True))})\b", caption, re.IGNORECASE)


def _clauses(caption: str) -> Iterator[re.Match[str]]:
    return _CLAUSE.finditer(caption)


def _replaced(caption: str, rng: random.Random) -> Iterator[list[Change]]:
    """One word for another of its kind."""
    for match in _words(caption, COLORS):
        yield [(*match.span(), rng.choice([color for color in COLORS if color != match[0].lower()]))]
    for match in _words(caption, NUMBERS):
        place = NUMBERS.index(match[0].lower())
        beside = [n for n in (place - 1, place + 1) if 0 <= n < len(NUMBERS)]
        yield [(*match.span(), NUMBERS[rng.choice(beside)])]
    for match in re.finditer(r"\b\d{1,3}\b", caption):
        yield [(*match.span(), str(max(1, int(match[0]) + rng.choice((-1, 1)))))]
    for match in _words(caption, list(_OPPOSITE)):
        yield [(*match.span(), _OPPOSITE[match[0].lower()])]


def _exchanged(caption: str) -> Iterator[list[Change]]:
    """Two attributes of a class that follow each other, with a noun between them."""
    for words in ATTRIBUTES:
        for one, other in combinations(_words(caption, words), 2):
            between = set(re.findall(r"\w+", caption[one.end() : other.start()].lower())) - _JOINTS
            if one[0].lower() != other[0].lower() and between - set(words):
                yield [(*one.span(), other[0]), (*other.span(), one[0])]
                break  # with the next one alone: pairs of all would be many


def _edited(caption: str, changes: list[Change]) -> str:
    parts, place = [], 0
    for start, end, text in changes:
        capital = caption[start : start + 1].isupper()
        parts += [caption[place:start], text[:1].upper() + text[1:] if capital else text[:1].lower() + text[1:]]
        place = end
    return "".join([*parts, caption[place:]])
