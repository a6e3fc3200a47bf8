"""Captions of scenes: a scene, told in words that a seed chooses, and which characters state what."""

import itertools
import random
import re
from dataclasses import replace
from typing import Any

from .facts import Caption, Fact
from .families import ARRANGED, BEFORE, CLOSE, OPEN, TRAINED, UNSEEN, Teller, preamble
from .noise import disturbed
from .words import COLUMNS, NUMBERS, PLACES, ROWS, SIZE_WORDS
from .world import Object, Scene, sample_scene

OPENINGS = (
    "The picture shows {number} {objects} on a {background} background.",
    "On a {background} background there {are} {number} {objects}.",
    "A {background} background with {number} {objects} on it.",
    "This is an illustration of {number} {objects} arranged over a plain {background} background.",
)
SENTENCES = (  # the fact, then what may follow it
    "There is a {size} {colour} {shape} {place}",
    "A {size} {colour} {shape} can be seen {place}",
    "A {colour} {shape} of {size} size is placed {place}",
    "{Place} there is a {size} {colour} {shape}",
    "{Place} sits a {colour} {shape}, and it is {size}",
    "{Place} one finds a {shape} that is {size} and painted {colour}",
)
ENDINGS = (
    ".",
    ", drawn with clean edges.",
    ", and nothing else touches it.",
    ", standing apart from the other shapes.",
    ", painted in a flat and even tone.",
)


def _place(cell: int, rng: random.Random) -> str:
    row, column = divmod(cell, 3)
    return rng.choice((*PLACES[cell], f"in the {ROWS[row][0]} row and the {COLUMNS[column]} column"))


FAMILIES = {"train": ("sentences", *TRAINED, "late"), "unseen": tuple(UNSEEN)}
"""Names of the wording families: those of the training split, and those that no training caption is told in."""
SPLITS = tuple(FAMILIES)
SENTENCES_WEIGHT = 3  # how often "any" chooses the sentences, the others being 1
UNPLACED_WEIGHT = 12  # and captions without places, of scenes that are arranged
LATE_LENGTH = 1060  # characters of the longest caption that comes late, about 240 tokens
PREAMBLES = 0.3  # share of captions that begin with sentences that say nothing, so that facts lie at any token


def describe(
    scene: Scene,
    seed: int = 0,
    like: Scene | None = None,
    *,
    wording: str = "sentences",
    split: str = "train",
    noise: bool = False,
) -> Caption:
    """Describes a scene in one of the many ways in which people do.

    `"sentences"`, the first family and the default: an opening, then a sentence for each object, in random order and
    varied wording; scenes of 4 to 9 objects take about 60 to 240 CLIP tokens. `"late"` is the same after sentences
    that say nothing, up to the end of a window of 248 tokens; `"any"` never chooses it.

    Args:
        scene: the scene.
        seed: any integer; the same arguments give the same caption.
        like: another scene with as many objects, in whose order and wording this one is told: what both hold gets the
            same sentence, and the captions differ where the scenes do, nowhere else. In `"sentences"` alone.
        wording: a name in `FAMILIES`, or `"any"`, one of the split, which the seed chooses.
        split: `"train"`, or `"unseen"`: families, synonyms and names of places that no training caption has. A family
            of the training split may be told in the words of the other.
        noise: whether case, punctuation, spelling and typos vary, too (`noise.disturbed`).

    Returns:
        The caption, a `str` whose `facts` tell which characters name which object.

    Raises:
        ValueError: if `like` has another number of objects or meets another family, or there is no such family or
            split.
    """
    if split not in SPLITS:
        raise ValueError(f"The split of a wording is 'train' or 'unseen', not {split!r}.")
    if wording == "any":
        names = FAMILIES[split]
        special = {"sentences": SENTENCES_WEIGHT, "late": 0, "unplaced": UNPLACED_WEIGHT * _is_arranged(scene)}
        weights = [special.get(name, 1) for name in names]
        wording = random.Random(f"family {seed} {scene}").choices(names, weights)[0]
    if wording == "sentences":
        caption = _in_sentences(scene, seed, like)
    elif wording == "late" and like is None:
        caption = _late(scene, seed)
    elif like is not None:
        raise ValueError(f"The wording 'sentences' alone can tell a scene like another, not {wording!r}.")
    else:
        tell = (TRAINED if split == "train" else {**TRAINED, **UNSEEN}).get(wording)
        if tell is None:
            known = ", ".join((*FAMILIES["train"], *(FAMILIES["unseen"] if split == "unseen" else ())))
            raise ValueError(f"The wording {wording!r} is not one of the split {split!r}: choose any, {known}.")
        if wording == "unplaced" and not _is_arranged(scene):
            raise ValueError("The wording 'unplaced' tells a scene of one to five objects that arranged(scene) gives.")
        teller = Teller(scene, random.Random(f"{wording} {split} {scene} {seed}"), split)
        text = tell(teller)
        if wording not in ("prose", "tags", "unplaced") and teller.chance(PREAMBLES):
            text = f"{preamble(teller.rng, teller.rng.randint(2, 5))} {text}"
        caption = _unmarked(text, scene, scene.background if teller.says_background else None, wording)
    return disturbed(caption, seed) if noise else caption


def arranged(scene: Scene) -> Scene:
    """A scene whose objects, in the same order, stand where they stand if nobody says where: `families.ARRANGED`.

    A scene of more than five objects stays as it is: with so many, somebody says where.
    """
    cells = ARRANGED.get(len(scene.objects), [item.cell for item in scene.objects])
    return replace(scene, objects=tuple(replace(item, cell=cell)
                                        for item, cell in zip(scene.objects, cells, strict=True)))  # fmt: skip


def sample_for(wording: str, seed: int, split: str = "train") -> Scene:
    """Draws a scene that a wording can tell: `sample_scene`, and for `"unplaced"` an arranged one of one to five.

    Args:
        wording: As for `telling`.
        seed: Any integer.
        split: `"train"` or `"test"`, of scenes.
    """
    if wording != "unplaced":
        return sample_scene(seed, split)
    drawn = (arranged(sample_scene(seed + turn * 10**9, split, (1, max(ARRANGED)))) for turn in itertools.count())
    return next(scene for scene in drawn if scene.split == split)


def _is_arranged(scene: Scene) -> bool:
    return len(scene.objects) in ARRANGED and arranged(scene) == scene


def telling(wording: str) -> dict[str, Any]:
    """Arguments of `describe` for a name that data and figures go by.

    Args:
        wording: `"all"`, any training family with noise; `"unseen"`, any family, with noise, that is never trained on;
            or the name of one family, without noise.
    """
    several = {"all": "train", "unseen": "unseen"}
    if wording in several:
        return {"wording": "any", "split": several[wording], "noise": True}
    return {"wording": wording, "split": "unseen" if wording in FAMILIES["unseen"] else "train"}


def _unmarked(text: str, scene: Scene, background: str | None, wording: str) -> Caption:
    """A family's text, its marks taken out and kept as facts."""
    parts, facts, length = list[str](), list[Fact](), 0
    opened: list[tuple[Object, int]] = []
    for part in re.split(r"([\ue000-\ue0ff])", text):
        if part == CLOSE:
            item, start = opened.pop()
            facts.append(Fact(item, start, length))
        elif part and ord(part[0]) in range(OPEN, OPEN + 9):
            opened.append((scene.objects[ord(part[0]) - OPEN], length))
        else:
            parts.append(part)
            length += len(part)
    return Caption("".join(parts), facts, background, wording)


def _in_sentences(scene: Scene, seed: int, like: Scene | None) -> Caption:
    like = like or scene
    count = len(like.objects)
    if len(scene.objects) != count:
        raise ValueError(f"A scene of {len(scene.objects)} objects cannot be told like one of {count}.")
    others = (item for item in scene.objects if item not in like.objects)
    objects = [item if item in scene.objects else next(others) for item in like.objects]
    rng = random.Random(f"{like} {seed}")
    text = rng.choice(OPENINGS).format(
        number=NUMBERS[count],
        objects=rng.choice(("shapes", "objects") if count != 1 else ("shape", "object")),
        are="are" if count != 1 else "is",
        background=scene.background,
    )
    facts = []
    for item in rng.sample(objects, count):
        place = _place(item.cell, rng)
        fact = rng.choice(SENTENCES).format(
            size=rng.choice(SIZE_WORDS[item.size]),
            colour=item.colour,
            shape=item.shape,
            place=place,
            Place=place[0].upper() + place[1:],
        )
        fact = fact.replace(" a orange", " an orange").replace("A orange", "An orange")
        facts.append(Fact(item, len(text) + 1, len(text) + 1 + len(fact)))
        text += " " + fact + rng.choice(ENDINGS)
    return Caption(text, facts, scene.background, "sentences")


def _late(scene: Scene, seed: int) -> Caption:
    """Sentences, after others that say nothing and take half of the room in the window or more."""
    plain, rng = _in_sentences(scene, seed, None), random.Random(f"late {scene} {seed}")
    most = max(0, LATE_LENGTH - len(plain))
    room = rng.randint(most // 2, most)
    before = ""
    for filler in rng.sample(BEFORE, len(BEFORE)):
        if len(before) + len(filler) + 1 <= room:
            before += f"{filler} "
    shift = len(before)
    facts = (replace(fact, start=fact.start + shift, end=fact.end + shift) for fact in plain.facts)
    return Caption(before + plain, facts, plain.background, "late")
