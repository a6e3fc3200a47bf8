"""The words of a prompt and what they mean: shapes, colors, sizes, places, relations, empty cells.

A text is cut into tokens (typos corrected, spelling made American), and tokens become atoms.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .noise import AMERICAN, NEIGHBORS
from .words import COMPASS, ORDINALS, SYNONYMS, plural

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ATTRIBUTES = ("shape", "colour", "size")
CELLS = ("place", "center")
PLACED = (*CELLS, "relation")
VERTICAL = {"top": 0, "upper": 0, "uppermost": 0, "topmost": 0, "bottom": 2, "lower": 2, "lowest": 2, "bottommost": 2}
HORIZONTAL = {"left": 0, "leftmost": 0, "right": 2, "rightmost": 2}
MIDDLE = {"middle", "center", "mid", "central", "centered", "halfway", "midway"}
TAILS = {"corner", "side", "edge", "part", "cell", "height", "hand", "end", "area", "spot", "half", "border"}
INSIDE = {"in", "at", "on", "of", "the", "very", "far", "to", "along", "exact", "dead", "down", "up", "and", "most"}
WHOLES = {"picture", "image", "grid", "page", "canvas", "sheet", "scene", "frame", "drawing", "all", "everything"}
EMPTY = {"nothing", "empty", "blank", "none", "gap", "free", "vacant"}
ADVERBS = {"directly", "just", "right", "immediately", "diagonally", "straight", "exactly"}
ABOVE = {"above": -1, "over": -1, "below": 1, "under": 1, "underneath": 1, "beneath": 1}
STRONG = {".", "!", "?", ";", "\n"}
RELATION_STARTS = {*ADVERBS, *ABOVE, "up", "down", "to", "on", "left", "next", "beside"}
PLACE_STARTS = {*VERTICAL, *HORIZONTAL, *MIDDLE, *ORDINALS, "up", "down"}
WEAK = {",", "|", "&", "and", "then", "plus"}
ORDINARY = {
    "stay", "stays", "stat", "stare", "start", "starts", "starting", "stand", "stands", "light", "might", "sight",
    "night", "fight", "tight", "eight", "bright", "lift", "felt", "let", "place", "places", "plate", "tidy",
    "blanket", "blown", "grown", "crown", "drown", "greet", "great", "grey", "share", "shape", "shapes", "shall",
    "smell", "stall", "power", "tower", "flower", "slower", "supper", "house", "hugs", "read", "bread", "colors",
    "color", "colored", "size", "sized", "there", "three", "these", "their", "then", "than", "that", "this",
    "thing", "things", "with", "without", "where", "were", "wear", "what", "when", "which", "while", "white",
    "wide", "side", "inside", "outside", "edge", "edges", "hedge", "cream", "dream", "dot", "dots", "box", "boy",
    "lovely", "charge", "barge", "minute", "mine", "mind", "mint", "print", "point", "paint", "painted",
    "painting", "plan", "plain", "plane", "plum", "plumb", "plump", "rose", "nose", "row", "rows", "rod", "road",
    "ride", "rise", "raise", "room", "roam", "below", "blow", "black", "block", "blocks", "blank", "bland",
    "brown", "bring", "boxes", "from", "form", "frame", "front", "ring", "string", "wing", "king", "line", "lines",
    "lone", "long", "alone", "along", "among", "around", "ground", "round", "hound", "bound", "found", "sound",
    "pound", "book", "books", "cook", "cooks", "look", "looks", "took", "corn", "corner", "born", "torn", "order",
    "older", "under", "wonder", "border", "ladder", "letter", "better", "later", "latter", "matter", "still",
    "hear", "hears", "heard", "heat", "hearth", "mood", "month",
    "style", "stile", "tile", "title", "tiles", "file", "mile", "smile", "least", "last", "past", "fast", "cast",
    "coast", "toast", "east", "feast", "beast", "best", "rest", "nest", "west", "vest", "test", "text", "next",
}  # fmt: skip
"""Words that are as they should be, though a slip of the finger would make them one that is looked for."""


@dataclass
class Token:
    """A word, number or mark of a text, in small letters, corrected: `text[start:end]`."""

    word: str
    start: int
    end: int


@dataclass
class Atom:
    """What some tokens, first up to last, mean."""

    kind: str  # shape, colour, size, background, place, center, half, line, relation, empty, one, no, not, break, word
    value: Any
    first: int
    last: int
    start: int
    end: int


# --------------------------------------------------------------------------------------------------------------- words


@functools.cache
def _phrases() -> dict[tuple[str, ...], tuple[str, str]]:
    """Words in a row, and the kind and value that they name. A plural names its value with a star."""
    found: dict[tuple[str, ...], tuple[str, str]] = {}
    for attribute, values in SYNONYMS.items():
        for value, names in values.items():
            for name in (value, *names):
                found[_key(name)] = (attribute, value)
                if attribute == "shape":
                    found[_key(plural(name))] = (attribute, f"{value}*")
    for shade in ("bright", "light", "dark", "deep", "pale", "vivid"):
        for value, (plain, *_) in SYNONYMS["colour"].items():
            found.setdefault((shade, plain), ("colour", value))
    del found["plus",]  # it also joins: `_scan` looks at what stands before it
    return found


def _key(name: str) -> tuple[str, ...]:
    return tuple(AMERICAN.get(word, word) for word in re.split(r"[ -]", name))


@functools.cache
def _typos() -> dict[str, str]:
    """What a slip of the finger makes of each word that is looked for, where it makes it of no other."""
    words = {word for phrase in _phrases() for word in phrase}
    words |= {*VERTICAL, *HORIZONTAL, *MIDDLE, *ABOVE, *COMPASS, *ORDINALS, *EMPTY, "corner", "column", "directly"}
    known = words | ORDINARY | TAILS | INSIDE | WHOLES | ADVERBS
    found: dict[str, str] = {}
    for word in sorted(words):
        for typo in _slips(word) - known:
            found[typo] = "" if typo in found else word
    return {typo: word for typo, word in found.items() if word}


def _slips(word: str) -> set[str]:
    """One edit away, the first letter kept; short words only by swaps, drops, double strokes and neighbors."""
    if len(word) < 4:
        return set()
    slips = set()
    for place in range(1, len(word)):
        head, tail = word[:place], word[place + 1 :]
        letters = LETTERS if len(word) > 4 else NEIGHBORS[word[place]]
        slips |= {head + letter + tail for letter in letters}
        slips |= {head + tail, head + word[place] * 2 + tail}
        if len(word) > 4:
            slips |= {head + letter + word[place:] for letter in LETTERS}
        if tail:
            slips.add(head + tail[0] + word[place] + tail[1:])
    return slips - {word}


def _tokens(text: str) -> list[Token]:
    tokens = []
    for match in re.finditer(r"[A-Za-z]+(?:'[A-Za-z]+)?|\d|\n|[^\w\s]", text):
        word = match[0].lower()
        if word == "-" and re.fullmatch(r"\w-\w", text[max(0, match.start() - 1) : match.end() + 1]):
            continue
        word = _typos().get(AMERICAN.get(word, word), AMERICAN.get(word, word))
        tokens.append(Token(word, match.start(), match.end()))
    return tokens


# --------------------------------------------------------------------------------------------------------------- atoms


class Scanner:
    """Makes atoms of tokens."""

    def __init__(self, text: str) -> None:
        self.tokens = _tokens(text)
        words = [token.word for token in self.tokens]
        self.row_first = re.search(r"row\W+(?:and |or )?col", text, re.IGNORECASE) is not None
        self.letters = "columns a to c" in text.lower()
        pairs = {"nw", "ne", "sw", "se"} & set(words)
        capitals = {match[0] for match in re.finditer(r"\b[NESWC]\b", text)}
        self.short = bool(pairs) or len(capitals) > 1

    def word(self, index: int) -> str:
        return self.tokens[index].word if 0 <= index < len(self.tokens) else ""

    def words(self, index: int, count: int) -> tuple[str, ...]:
        return tuple(self.word(index + offset) for offset in range(count))

    def atom(self, kind: str, value: Any, first: int, stop: int) -> Atom:
        return Atom(kind, value, first, stop - 1, self.tokens[first].start, self.tokens[stop - 1].end)

    def atoms(self) -> Iterator[Atom]:
        index = 0
        while index < len(self.tokens):
            atom = self.relation(index) or self.vacant(index) or self.place(index) or self.phrase(index)
            if atom is None:
                word = self.word(index)
                kind = {"no": "no", "without": "no", "not": "not", "one": "one"}.get(word, "word")
                if word in STRONG:
                    kind = "break"
                elif word in EMPTY and not (word == "free" and self.word(index - 1) == "from"):
                    kind = "empty"
                atom = self.atom(kind, word, index, index + 1)
            yield atom
            index = atom.last + 1

    def phrase(self, index: int) -> Atom | None:
        """A shape, color, size or background."""
        for count in (3, 2, 1):
            if found := _phrases().get(self.words(index, count)):
                return self.atom(*found, index, index + count)
        if self.word(index) == "plus":
            before = _phrases().get(self.words(index - 1, 1), ("",))[0]
            if before in ("colour", "size") or self.word(index - 1) in ("a", "the", "one"):
                return self.atom("shape", "cross", index, index + 1)
        return None

    def vacant(self, index: int) -> Atom | None:
        """ "left free": no place."""
        if self.word(index) == "left" and self.word(index + 1) in EMPTY:
            return self.atom("empty", "left", index, index + 2)
        directions = (("left", "to", "right"), ("top", "to", "bottom"))
        if self.words(index, 3) in directions:
            return self.atom("word", "direction", index, index + 3)
        return None

    # ------------------------------------------------------------------------------------------------------- relations

    def relation(self, index: int) -> Atom | None:
        """How an object lies from another: value (rows down, columns right, what is said of the other)."""
        if self.word(index) not in RELATION_STARTS:
            return None
        at = index
        while self.word(at) in ADVERBS and (self.word(at) != "right" or self.word(at + 1) in ABOVE):
            at += 1
        down = across = 0
        if self.words(at, 5)[1:4] == ("and", "to", "the") and self.word(at) in ("up", "down"):
            down = -1 if self.word(at) == "up" else 1
            at += 2
        if self.words(at, 2) == ("to", "the") and self.word(at + 2) in HORIZONTAL:
            at += 2
        if self.word(at) in ("left", "right") and self.word(at + 1) == "of":
            across, at = HORIZONTAL[self.word(at)] - 1, at + 2
        elif down:
            return None
        elif self.word(at) in ABOVE:
            down, at = ABOVE[self.word(at)], at + 1
        elif self.words(at, 3) == ("on", "top", "of"):
            down, at = -1, at + 3
        elif self.words(at, 2) == ("next", "to"):
            at += 2
        elif self.word(at) == "beside":
            at += 1
        else:
            return None
        other = self.reference(at)
        if other is None:
            return None
        said, at = other
        spot = next(spot for spot in range(at, at + 5) if self.word(spot) not in ("in", "at", "on", "the", "very"))
        if said and (where := self.place(spot)) and where.kind in ("place", "center"):
            said, at = said | {"cell": where.value}, where.last + 1
        side = self.word(at + 2)
        lead = self.words(at, 2) in (("to", "the"), ("on", "the")) and self.word(at + 3) != "of"
        if not across and lead and side in ("left", "right"):
            across, at = HORIZONTAL[side] - 1, at + 3
        if self.words(at, 4) == (",", "one", "cell", "up"):
            at += 4
        return self.atom("relation", (down, across, said), index, at)

    def reference(self, index: int) -> tuple[dict[str, Any], int] | None:
        """What is said of an object that has been named before, and the index after it; nothing of "it"."""
        if self.word(index) == "it":
            return {}, index + 1
        if self.word(index) not in ("the", "that", "this"):
            return None
        said: dict[str, Any] = {}
        index += 1
        while (atom := self.phrase(index)) and atom.kind in ATTRIBUTES and atom.kind not in said:
            said[atom.kind], index = atom.value, atom.last + 1
            if atom.kind == "shape":
                return said, index
        return None

    # ---------------------------------------------------------------------------------------------------------- places

    def place(self, index: int) -> Atom | None:
        """A cell, value 0..8 (`place`), or one row or column, value (row, column), one of them None (`line`)."""
        if not (self.word(index) in PLACE_STARTS or self.coordinates(index) or self.compass(index)):
            return None
        row = column = None
        middle = compass = line = False
        at, stop = index, None
        while at < len(self.tokens):
            word, after = self.word(at), self.word(at + 1)
            found: tuple[Any, Any, int] | None = None  # row, column, tokens
            if row is not None and column is not None:
                if stop == at and word in TAILS | {"row", "column"}:
                    at += 1
                    stop = at
                    continue
                break
            if self.relation(at) or self.vacant(at):
                break
            if word == "right" and self._is_adverb(at, index):
                at += 1
                continue
            if cell := self.coordinates(at):
                found, line = cell, True
            elif word in VERTICAL:
                found = (VERTICAL[word], None, 1)
            elif word in ("up", "down") and after in ("in", "at", "on") and self.word(at - 1) != "halfway":
                found = ({"up": 0, "down": 2}[word], None, 1)
            elif word in HORIZONTAL:
                found = (None, HORIZONTAL[word], 1)
            elif cell := self.compass(at):
                found, compass = cell, True
            elif word in MIDDLE or (word in ORDINALS and after in ("row", "column")):
                number = ORDINALS.index(word) if word in ORDINALS else 1
                if after == "row":
                    found, line = (number, None, 2), True
                elif after == "column":
                    found, line = (None, number, 2), True
                elif middle:
                    break
                else:
                    middle, stop = True, at + 1
                    if word == "halfway" and after in ("down", "up", "along"):
                        at += 1
                        stop = at + 1
                    at += 1
                    continue
            if found is not None:
                down, across, count = found
                if down is not None and row is not None and not (compass and row == down):
                    break
                if across is not None and column is not None:
                    break
                row, column = (down if row is None else row), (across if column is None else column)
                at += count
                stop = at
                if self.word(at) in ("row", "column") and count == 1 and not compass:
                    line, at = True, at + 1
                    stop = at
                continue
            if stop is None:
                break  # a place begins with a word that names one
            if word in TAILS and stop == at:
                at += 1
                stop = at
            elif (
                (word in INSIDE and word != "and")
                or word in TAILS
                or (word == "and" and line and after in ("the", "column", "row", "in"))
                or (
                    word == ","
                    and not middle
                    and (row is None) != (column is None)
                    and self._goes_on(at + 1, row, line)
                )
            ):
                at += 1
            else:
                break
            if at - stop > 4:
                break
        if stop is None:
            return None
        alone = row is None and column is None
        if middle or compass:
            row = 1 if row is None and (alone or column is not None) else row
            column = 1 if column is None else column
        for tail in (2, 3):  # "of the picture", "of it all"
            if self.word(stop) == "of" and self.word(stop + tail) in WHOLES and self.word(stop + 1) in ("the", "it"):
                stop += tail + 1
        first = self._with_preposition(index)
        if row is not None and column is not None:
            return self.spread("center" if alone else "place", 3 * row + column, first, index, stop)
        return self.spread("line" if line else "half", (row, column), first, index, stop)

    def spread(self, kind: str, value: Any, first: int, index: int, stop: int) -> Atom:
        """An atom whose characters begin with words that were read before it."""
        atom = self.atom(kind, value, index, stop)
        atom.start = self.tokens[first].start
        return atom

    def _with_preposition(self, index: int) -> int:
        first = index
        while self.word(first - 1) in {"the", "very", "far", "exact", "dead", "right"}:
            first -= 1
        return first - 1 if self.word(first - 1) in {"in", "at", "on", "to"} else first

    def _is_adverb(self, at: int, index: int) -> bool:
        """Whether "right" only stresses what follows: "right in the middle"."""
        if at != index or self.word(at + 1) not in ("in", "at") or self.word(at - 1) in ("the", "far", "to"):
            return False
        return self.word(at + 2) == "the" and self.word(at + 3) in MIDDLE | {
            "very",
            "exact",
            "dead",
            "north",
            *COMPASS,
        }

    def _goes_on(self, at: int, row: int | None, line: bool) -> bool:
        """Whether what follows a comma completes a place: "on the left side, halfway down", "row 1, column 3"."""
        while self.word(at) in ("far", "on", "the", "at", "in"):
            at += 1
        word = self.word(at)
        if cell := self.coordinates(at):
            return (cell[1] if row is not None else cell[0]) is not None
        if word in ORDINALS:
            return self.word(at + 1) == ("column" if row is not None else "row")
        if word in ("halfway", "centered", "midway") and not line:
            return True
        return row is not None and word in HORIZONTAL and self.word(at - 1) == "far"

    def compass(self, at: int) -> tuple[int | None, int | None, int] | None:
        word = self.word(at).removesuffix("most")
        word = word.removesuffix("ern") if word.removesuffix("ern") in COMPASS else word
        if self.short and word in ("n", "e", "s", "w", "c", "nw", "ne", "sw", "se"):
            if word == "c":
                return 1, 1, 1
            word = "".join({"n": "north", "e": "east", "s": "south", "w": "west"}[letter] for letter in word)
        if word not in COMPASS or word == "center":
            return None
        down = 0 if word.startswith("north") else 2 if word.startswith("south") else None
        across = 0 if word.endswith("west") else 2 if word.endswith("east") else None
        if across is None and self.word(at + 1) in ("east", "west", "eastern", "western"):
            return down, 0 if self.word(at + 1).startswith("west") else 2, 2
        return (1 if down is None else down), (1 if across is None else across), 1

    def coordinates(self, at: int) -> tuple[int | None, int | None, int] | None:
        """A numbered row, column or cell, and how many tokens it takes."""
        word, after = self.word(at), self.word(at + 1)
        if self.letters and word in ("a", "b", "c") and after in ("1", "2", "3"):
            return int(after) - 1, "abc".index(word), 2
        if word in ("row", "r") and after in ("1", "2", "3"):
            return int(after) - 1, None, 2
        if word in ("column", "col", "c") and after in ("1", "2", "3"):
            return None, int(after) - 1, 2
        if self.row_first and word in ("1", "2", "3"):
            gap = 2 if after == "," else 1
            if self.word(at + gap) in ("1", "2", "3"):
                return int(word) - 1, int(self.word(at + gap)) - 1, gap + 1
        return None
