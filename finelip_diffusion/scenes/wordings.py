"""Captions of scenes: a scene, told in words that a seed chooses, and which characters state what."""

import random

from .facts import Caption, Fact
from .words import COLUMNS, NUMBERS, PLACES, ROWS, SIZE_WORDS
from .world import Scene

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


def describe(scene: Scene, seed: int = 0, like: Scene | None = None) -> Caption:
    """Describes a scene: an opening, then a sentence for each object, in random order and varied wording.

    Scenes of 4 to 9 objects take about 60 to 240 CLIP tokens.

    Args:
        scene: the scene.
        seed: any integer; the same scene and seed give the same caption.
        like: another scene with as many objects, in whose order and wording this one is told: what both hold gets the
            same sentence, and the captions differ where the scenes do, nowhere else.

    Returns:
        The caption, a `str` whose `facts` tell which characters name which object.

    Raises:
        ValueError: if `like` has another number of objects.
    """
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
    caption = Caption(text)
    caption.facts = tuple(facts)
    return caption
