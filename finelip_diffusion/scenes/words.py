"""What the things of the bundled world are called."""

import functools

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
        "heart": ("heart", "love heart", "heart shape", "valentine", "sweetheart"),
        "moon": ("moon", "crescent", "crescent moon", "half moon", "moon shape", "lune"),
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
        "sweetheart",
        "lune",
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


# Places: {t} top or bottom, {u} upper or lower, {d} up or down, {s} left or right. As an adverb, bare, and as a noun.
CORNER = (
    (
        "in the {t} {s} corner", "at the {u} {s}", "in the {t}-{s} corner", "on the {t} {s}", "at the {t} on the {s}",
        "on the {s} at the {t}", "{d} in the {s} corner", "in the {u} {s} part", "in the {u} {s} corner",
        "at the {t}, far {s}", "in the {t} row on the {s}", "in the {t} row and the {s} column", "in the {t} {s}",
        "in the {s} column at the {t}",
    ),
    ("{t} {s}", "{u} {s}", "{t}-{s}", "{u}-{s}", "{t} {s} corner", "{s} {t}"),
    ("the {t} {s} corner", "the {u} {s}", "the {t} {s}", "the {t}-{s} cell", "the {u} {s} corner"),
)  # fmt: skip
END = (
    (
        "at the {t} in the middle", "at the {u} center", "at the {t} center", "in the middle of the {t} row",
        "in the {t} middle", "halfway along the {t}", "at the {t}, centered", "in the center of the {t} edge",
        "in the {t} row and the middle column", "in the middle column at the {t}", "in the {u} middle",
    ),
    ("{t} center", "{t} middle", "{u} middle", "{t}-center", "{u} center", "{t}-middle", "middle {t}"),
    ("the {t} center", "the middle of the {t} row", "the {u} middle", "the {t} middle"),
)  # fmt: skip
SIDE = (
    (
        "on the {s} side, halfway down", "at the center {s}", "in the middle of the {s} side", "at the middle {s}",
        "on the {s} at mid-height", "halfway down the {s} side", "on the {s} in the middle row", "in the middle {s}",
        "in the middle row and the {s} column", "in the middle of the {s} column", "on the {s} of the middle row",
    ),
    ("middle {s}", "center {s}", "{s} middle", "{s} center", "mid {s}", "middle-{s}", "center-{s}"),
    ("the middle {s}", "the {s} center", "the middle of the {s} side", "the {s} of the middle row"),
)  # fmt: skip
CENTER = (
    (
        "in the very center", "in the middle of the picture", "in the center", "in the middle", "right in the middle",
        "dead center", "at the center of the image", "in the exact middle", "in the middle row and the middle column",
        "in the center of it all", "in the center of the grid",
    ),
    ("center", "middle", "dead center", "exact center", "very center"),
    ("the center", "the middle", "the very center", "the central cell"),
)  # fmt: skip
UNSEEN_PLACES = frozenset(
    ["in the {u} {s} part", "{s} {t}", "halfway along the {t}", "middle {t}", "at the middle {s}", "center-{s}",
     "in the center of the grid"]
)  # fmt: skip
COMPASS = ("northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast")
ORDINALS = ("first", "second", "third")


@functools.cache
def places(cell: int, split: str = "train") -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """What the place of a cell is called: `"in the top left corner"`, bare, `"top left"`, and as a noun.

    Args:
        cell: 0..8.
        split: `"train"` leaves out what is never trained on.
    """
    row, column = divmod(cell, 3)
    phrases = CENTER if cell == 4 else SIDE if row == 1 else END if column == 1 else CORNER
    names = {"t": ("top", "", "bottom")[row], "u": ("upper", "", "lower")[row], "d": ("up", "", "down")[row]}
    names["s"] = ("left", "", "right")[column]
    adverbs, bare, nouns = (
        tuple(each.format(**names) for each in kind if split != "train" or each not in UNSEEN_PLACES)
        for kind in phrases
    )
    return adverbs, bare, nouns


@functools.cache
def synonyms(attribute: str, value: str, split: str = "train") -> tuple[str, ...]:
    """What a value is called, the plain name first; `"train"` leaves out `UNSEEN_SYNONYMS`."""
    return tuple(word for word in SYNONYMS[attribute][value] if split != "train" or word not in UNSEEN_SYNONYMS)
