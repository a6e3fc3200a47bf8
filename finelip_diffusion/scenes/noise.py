"""What people's keyboards do to a caption: case, punctuation, typos, spelling. Facts keep their characters."""

import random
import re
from collections.abc import Callable, Iterable

from .facts import Caption, Fact

NEIGHBORS = dict(
    zip(
        "abcdefghijklmnopqrstuvwxyz",
        [
            "sq",
            "vn",
            "xv",
            "sf",
            "wr",
            "dg",
            "fh",
            "gj",
            "uo",
            "hk",
            "jl",
            "kp",
            "nk",
            "bm",
            "ip",
            "ol",
            "wa",
            "et",
            "ad",
            "ry",
            "yi",
            "cb",
            "qe",
            "zc",
            "tu",
            "xa",
        ],
        strict=True,
    )
)
"""The letters left and right of each on a keyboard, or beside it."""
BRITISH = {"center": "centre", "centered": "centred", "gray": "grey", "color": "colour", "colored": "coloured",
           "colors": "colours", "program": "programme"}  # fmt: skip
AMERICAN = {british: american for american, british in BRITISH.items()}

Edit = tuple[int, int, str]


def edited(caption: Caption, edits: Iterable[Edit]) -> Caption:
    """A caption with parts of it replaced, its facts moved along.

    Args:
        caption: with its facts.
        edits: (start, end, new text), in the order of the text, none over another.
    """
    parts, moves, position, shift = list[str](), [(0, 0)], 0, 0
    for start, end, text in edits:
        parts += [caption[position:start], text]
        shift += len(text) - (end - start)
        moves.append((end, shift))
        position = end

    def moved(place: int) -> int:
        return place + next(shift for end, shift in reversed(moves) if end <= place)

    facts = (Fact(fact.object, moved(fact.start), moved(fact.end)) for fact in caption.facts)
    return caption.put("".join([*parts, caption[position:]]), facts)


def lower(caption: Caption) -> Caption:
    """All in small letters."""
    return _cased(caption, str.lower)


def upper(caption: Caption) -> Caption:
    """All in capital letters."""
    return _cased(caption, str.upper)


def _cased(caption: Caption, change: Callable[[str], str]) -> Caption:
    return caption.put("".join(change(letter) if letter.isascii() else letter for letter in caption), caption.facts)


def unpunctuated(caption: Caption) -> Caption:
    """Without full stops, commas, colons and their like, in one line; hyphens within words and numbers stay."""
    return edited(
        caption,
        [
            (m.start(), m.end(), " " if m[0].isspace() else "")
            for m in re.finditer(r"\n|[.,;:!?()\"*•|]|(?<!\w)-|-(?!\w)", caption)
        ],
    )


def british(caption: Caption) -> Caption:
    """Spelled `"colour"`, `"grey"`, `"centre"`."""
    return _spelled(caption, BRITISH)


def american(caption: Caption) -> Caption:
    """Spelled `"color"`, `"gray"`, `"center"`."""
    return _spelled(caption, AMERICAN)


def _spelled(caption: Caption, words: dict[str, str]) -> Caption:
    edits = []
    for match in re.finditer(r"[A-Za-z]+", caption):
        if new := words.get(match[0].lower()):
            edits.append((*match.span(), new.capitalize() if match[0][0].isupper() else new))
    return edited(caption, edits)


def misspelled(caption: Caption, seed: int, share: float = 0.06) -> Caption:
    """With typos: two letters swapped, one left out, one struck twice, or a neighbor on the keyboard struck instead.

    Words of four letters and more get one at most; the first letter stays.

    Args:
        caption: with its facts.
        seed: any integer.
        share: of the words.
    """
    rng = random.Random(f"typos {seed} {caption}")
    edits = []
    for match in re.finditer(r"[A-Za-z]{4,}", caption):
        if rng.random() < share:
            edits.append((*match.span(), _typo(match[0], rng)))
    return edited(caption, edits)


def _typo(word: str, rng: random.Random) -> str:
    place = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    if kind == 1:
        return word[:place] + word[place + 1 :]
    if kind == 2:
        return word[:place] + word[place] + word[place:]
    return word[:place] + rng.choice(NEIGHBORS[word[place].lower()]) + word[place + 1 :]


STRAY = (
    "really", "very", "quite", "some", "kind", "of", "sort", "nice", "lovely", "pretty", "just", "maybe",
    "perhaps", "somewhere", "actually", "basically", "simply", "old", "new", "bold", "soft", "shiny", "glossy",
    "matte", "wooden", "paper", "plastic", "metal", "happy", "sleepy", "lonely", "quiet", "loud", "famous",
    "secret", "summer", "winter", "morning", "evening", "music", "river", "mountain", "garden", "window", "table",
    "chair", "coffee", "banana", "elephant", "tiger", "robot", "castle", "dragon", "forest", "ocean", "planet",
    "rocket", "guitar", "piano", "doctor", "teacher", "friend", "mother", "city", "village", "bridge", "hello",
    "please", "thanks", "yeah", "well", "anyway", "honestly", "literally", "today", "tomorrow", "always", "never",
    "often", "dancing", "sleeping", "running", "flying", "beautiful", "strange", "ancient", "modern", "cozy",
    "dusty", "frozen", "hidden", "tasty", "cheap", "expensive", "sharp", "rough", "smooth",
)  # fmt: skip
"""Words that say nothing of a scene."""


def strayed(caption: Caption, seed: int, share: float = 0.06) -> Caption:
    """With words in it that say nothing.

    Args:
        caption: with its facts.
        seed: any integer.
        share: of the words of which one comes before.
    """
    rng = random.Random(f"stray {seed} {caption}")
    words = re.finditer(r"(?<=[ \n])[A-Za-z]", caption)
    return edited(caption, [(m.start(), m.start(), rng.choice(STRAY) + " ") for m in words if rng.random() < share])


def disturbed(caption: Caption, seed: int) -> Caption:
    """A caption as somebody may have typed it; four in ten stay as they are.

    Each of these by itself: small letters (25%), capitals (3%), no punctuation (15%), British spelling (25%), typos
    (25%, in 3% to 12% of the words), words that say nothing (10%, before 2% to 10% of the words).
    """
    rng = random.Random(f"noise {seed} {caption}")
    dice = [rng.random() for _ in range(5)]
    if rng.random() < 0.4:
        return caption
    if dice[4] < 0.16:
        caption = strayed(caption, seed, rng.uniform(0.02, 0.1))
    if dice[0] < 0.4:
        caption = british(caption)
    if dice[1] < 0.4:
        caption = misspelled(caption, seed, rng.uniform(0.03, 0.12))
    if dice[2] < 0.25:
        caption = unpunctuated(caption)
    if dice[3] < 0.45:
        return lower(caption)
    return upper(caption) if dice[3] > 0.95 else caption
