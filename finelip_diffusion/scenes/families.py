"""Wording families: the ways in which people tell a scene. Each is a function of a `Teller`, which knows its words."""

import random
from collections.abc import Callable, Iterable, Sequence

from .words import COMPASS, ORDINALS, SIZE_WORDS, places, plural, synonyms
from .world import COLOURS, SHAPES, Object, Scene

OPEN, CLOSE = 0xE000, "\ue0ff"
"""Marks around the words of a fact, characters that no text has: OPEN + its object's number, CLOSE."""


class Teller:
    """Tells the objects of a scene in words that a random generator chooses.

    Args:
        scene: what is told.
        rng: chooses.
        split: `"train"`, or `"unseen"`, which may use words that no training caption has.
        variety: share of shapes, colors, sizes and backgrounds that are not called by their plain names.
    """

    def __init__(self, scene: Scene, rng: random.Random, split: str = "train", variety: float = 0.2) -> None:
        self.scene, self.rng, self.split, self.variety = scene, rng, split, variety
        self.choice, self.chance = rng.choice, lambda share: rng.random() < share
        self.objects = rng.sample(scene.objects, len(scene.objects))
        self.at = {item.cell: item for item in scene.objects}
        self.says_background = False

    def word(self, attribute: str, value: str) -> str:
        """A name of a value; a size has three plain ones."""
        names = synonyms(attribute, value, self.split)
        if self.chance(self.variety):
            return self.choice(names)
        return self.choice(SIZE_WORDS[value]) if attribute == "size" else names[0]

    def words(self, item: Object) -> tuple[str, str, str]:
        """Size, color and shape of an object."""
        return self.word("size", item.size), self.word("colour", item.colour), self.word("shape", item.shape)

    def look(self, item: Object) -> str:
        """An object without article and place, the noun first or last."""
        size, colour, shape = self.words(item)
        if self.chance(0.75):
            return f"{size} {colour} {shape}"
        return self.choice(
            (
                f"{colour} {shape} of {size} size",
                f"{size} {shape} in {colour}",
                f"{colour}, {size} {shape}",
                f"{size}, {colour} {shape}",
                f"{colour} {size} {shape}",
                f"{shape} that is {size} and {colour}",
                f"{colour} {shape}, {size} in size",
            )
        )

    def mark(self, item: Object, text: str) -> str:
        """Text that states an object."""
        return f"{chr(OPEN + self.scene.objects.index(item))}{text}{CLOSE}"

    def place(self, cell: int) -> str:
        """As an adverb, such as "in the top left corner"."""
        return self.choice(places(cell, self.split)[0])

    def corner(self, cell: int) -> str:
        """Bare, such as "top left"."""
        return self.choice(places(cell, self.split)[1])

    def spot(self, cell: int) -> str:
        """As a noun, such as "the top left corner"."""
        return self.choice(places(cell, self.split)[2])

    def background(self) -> str:
        """Its color."""
        self.says_background = True
        return self.word("background", self.scene.background)

    def told(self, templates: Sequence[str], item: Object) -> str:
        """One of some templates, with an object in it: {a} is its look with the article."""
        look = self.look(item)
        text = self.choice(templates).format(
            a=a(look), look=look, place=self.place(item.cell), corner=self.corner(item.cell), spot=self.spot(item.cell)
        )
        return self.mark(item, text)

    def with_background(
        self, parts: list[str], templates: Sequence[str], shares: tuple[float, ...] = (0.4, 0.7, 0.85)
    ) -> list[str]:
        """The parts, with one about the background first, last, between, or not at all."""
        dice = self.rng.random()
        if dice < shares[2]:
            place = 0 if dice < shares[0] else len(parts) if dice < shares[1] else self.rng.randrange(len(parts) + 1)
            parts = [*parts[:place], self.choice(templates).format(background=self.background()), *parts[place:]]
        return parts


def a(text: str) -> str:
    """With its article."""
    return f"an {text}" if (text[0] in "aeiou" and not text.startswith("u")) or text[:2] == "um" else f"a {text}"


def capital(text: str) -> str:
    """With its first letter large."""
    place = next((place for place, letter in enumerate(text) if letter.isascii() and letter.isalnum()), 0)
    return text[:place] + text[place : place + 1].upper() + text[place + 1 :]


def sentences(parts: Iterable[str], end: str = ".") -> str:
    """Parts as sentences."""
    return " ".join(capital(part) + ("" if part[-1:] in ".!?" else end) for part in parts)


def listed(parts: Sequence[str], last: str = "and", comma: str = ", ") -> str:
    """Parts in one sentence."""
    return parts[0] if len(parts) == 1 else f"{comma.join(parts[:-1])} {last} {parts[-1]}"


BACKDROPS = (
    "the background is {background}",
    "it is all on a {background} background",
    "{background} background",
    "the background is plain {background}",
    "everything is on {background}",
    "behind it all, plain {background}",
    "use a {background} background",
)

# --------------------------------------------------------------------------------------------------- said in sentences

OPENINGS = (
    "", "", "", "hey, can you draw this for me?", "please make a picture like this:", "ok so here is what i want.",
    "hi! could you make me a simple picture?", "i need an image.", "just some shapes please.", "draw this:",
    "can i get a picture with a few shapes?", "let's try something easy.", "make me an image:", "I'm imagining this:",
)  # fmt: skip
REQUESTS = (
    "put {a} {place}", "add {a} {place}", "i want {a} {place}", "there should be {a} {place}", "{a} {place} please",
    "draw {a} {place}", "stick {a} {place}", "also {a} {place}", "{place} goes {a}", "{place} i'd like {a}",
    "give me {a} {place}", "then {a} {place}", "{a} {place}", "maybe {a} {place}", "can we have {a} {place}",
    "{place}: {a}", "and {a}, {place}", "{corner} {look}", "{look} {corner}", "{a}, {corner}",
    "for {spot} {a}", "{spot} gets {a}",
)  # fmt: skip
THANKS = ("", "", "", "thanks!", "thx", "that's it", "nothing else please", "that is all.", "cheers")


def casual(t: Teller) -> str:
    """Somebody asks for a picture."""
    parts = t.with_background([t.told(REQUESTS, item) for item in t.objects], BACKDROPS, (0.25, 0.6, 0.75))
    join = t.choice((". ", ", ", " and ", "; ", "! "))
    text = sentences(parts) if t.chance(0.5) else join.join(parts)
    return " ".join(filter(None, (t.choice(OPENINGS), text, t.choice(THANKS))))


JOINTS = ("and", "and also", "as well as", "together with", "along with", "plus")
FRAMES = (
    "there is {items}", "you can see {items}", "the picture shows {items}", "it has {items}", "{items} are drawn",
    "I see {items}", "here are {items}", "next come {items}", "the image contains {items}", "{items}",
    "we find {items}",
)  # fmt: skip
ITEMS = ("{a} {place}", "{a} {place}", "{place} {a}", "{a} ({corner})", "{a}, {place}", "{a} that sits {place}")


def joined(t: Teller) -> str:
    """Several objects in one sentence."""
    parts, objects = [], list(t.objects)
    while objects:
        count = t.rng.randint(2, 4) if t.chance(0.85) else 9
        form = t.choice(ITEMS)
        items = [t.told((form,), item) for item in objects[:count]]
        parts.append(t.choice(FRAMES).format(items=listed(items, t.choice(JOINTS), t.choice((", ", ", ", "; ")))))
        objects = objects[count:]
    return sentences(t.with_background(parts, BACKDROPS))


FLAT = (
    "{a} {place}", "{place} there is {a}", "{a} is {place}", "there is {a} {place}", "{a} sits {place}",
    "{place} is {a}", "{a} can be found {place}", "{spot} holds {a}", "{spot} shows {a}", "{place}, {a}",
    "{a} stands {place}", "{a} has been drawn {place}", "{place} you see {a}", "{a} fills {spot}", "in {spot}: {a}",
)  # fmt: skip


def varied(t: Teller) -> str:
    """Synonyms for everything."""
    t.variety = 0.9
    return sentences(t.with_background([t.told(FLAT, item) for item in t.objects], BACKDROPS))


SCENERY = (
    "the backdrop is a plain {background}", "all of this stands before {background}", "the canvas is {background}",
    "the whole background has been painted {background}", "the picture is {background} wherever nothing is drawn",
    "the paper is {background}", "its background: {background}", "what lies behind the shapes is {background}",
)  # fmt: skip


def backdrop(t: Teller) -> str:
    """The background is said, wherever."""
    parts = [t.told(FLAT, item) for item in t.objects]
    return sentences(t.with_background(parts, (*SCENERY, *BACKDROPS), (0.25, 0.6, 1.0)))


BEFORE = (
    "I have been thinking about this picture for a while.", "It is meant for the wall of a classroom.",
    "What follows is a careful description of a very simple image.", "Imagine a sheet of paper, clean and flat.",
    "A friend of mine drew something like it years ago.", "Nothing here is complicated, and that is the point.",
    "The style is that of a poster, calm and clear.", "Please take your time and get every detail right.",
    "I saw it in a museum last summer and could not forget it.", "We need this for the cover of a small book.",
    "My daughter asked for it, so let us try.", "The light is even, and there are no shadows at all.",
    "It should look as if it had been cut from paper.", "Do not worry about style, it only has to be clear.",
    "This is the third version, after we changed our minds.", "All shapes are flat and have one color each.",
)  # fmt: skip
BETWEEN = (
    "It is simple, but it works well.", "Each shape keeps to its own place.", "The edges are crisp and clean.",
    "I like how calm that looks.", "There is plenty of room around it.", "That part matters most to me.",
    "No shadows, no outlines, nothing fancy.", "One notices it only at a second look.", "So much for that.",
)  # fmt: skip
AFTER = (
    "That is the whole picture, as I remember it.", "Nothing else is to be seen.", "I hope this helps.",
    "All in all, it is a quiet and balanced image.", "Thank you for reading all of this.",
)  # fmt: skip
LONG = (
    "if you let your eyes wander, you find {a} {place}", "{place}, almost as if it had always been there, is {a}",
    "somebody has placed {a} {place}", "as far as I can tell there is {a} {place}", "{a} is what you notice {place}",
    "I would also like to mention {a}, which is {place}", "then, of course, there is {a} {place}",
    "{place} one comes across {a}", "another thing worth seeing is {a} {place}", "what you find {place} is {a}",
    "not to be forgotten: {a} {place}", "the artist has put {a} {place}", "you will also notice {a} {place}",
)  # fmt: skip


def preamble(rng: random.Random, count: int) -> str:
    """Sentences that say nothing."""
    return " ".join(rng.sample(BEFORE, count))


def prose(t: Teller) -> str:
    """Wordy, with sentences that say nothing before, between and after."""
    parts = []
    fillers = t.rng.sample(BETWEEN, len(BETWEEN))[: max(1, 9 - len(t.objects))]
    for item in t.objects:
        parts.append(t.told(LONG, item))
        if fillers and t.chance(0.35):
            parts.append(fillers.pop())
    parts = t.with_background(parts, (*SCENERY, *BACKDROPS))
    before = t.rng.sample(BEFORE, t.rng.randint(0, 2))
    return sentences([*before, *parts, *t.rng.sample(AFTER, t.rng.randint(0, 1))])


FIRST = (
    "there is {shape} {place}", "{place} is {shape}", "{shape} sits {place}", "{place} there's {shape}",
    "you see {shape} {place}", "{spot} has {shape}",
)  # fmt: skip
THEN = (
    "it is {size} and {colour}", "it's {colour} and {size}", "that one is {size}, and its color is {colour}",
    "its color is {colour}, its size {size}", "{size}, {colour}", "{colour} it is, and {size}",
)  # fmt: skip


def followed(t: Teller) -> str:
    """The shape and its place, then what it looks like."""
    parts = []
    between = t.choice((". ", ". ", "; ", ", "))
    for item in t.objects:
        size, colour, shape = t.words(item)
        first = t.choice(FIRST).format(shape=a(shape), place=t.place(item.cell), spot=t.spot(item.cell))
        then = t.choice(THEN).format(size=size, colour=colour)
        parts.append(t.mark(item, first + between + (capital(then) if between == ". " else then)))
    return sentences(t.with_background(parts, BACKDROPS))


TWO = ("two {look}s: one {}, one {}", "two {look}s, one {} and one {}", "{a} {} and another one {}",
       "{a} {}, and the same {}", "{a} {} and one more {}")  # fmt: skip


def pairs(t: Teller) -> str:
    """Objects that look alike are named once, with all their places."""
    alike: dict[tuple[str, str, str], list[Object]] = {}
    for item in t.objects:
        alike.setdefault((item.shape, item.colour, item.size), []).append(item)
    parts = []
    for items in alike.values():
        while items:
            two, items = items[:2], items[2:]
            if len(two) == 1:
                parts.append(t.told(FLAT, two[0]))
                continue
            size, colour, shape = t.words(two[0])
            look, places_ = f"{size} {colour} {shape}", [t.place(item.cell) for item in two]
            head, middle, last = t.choice(TWO).split("{}")
            head = head.replace("{look}s", f"{size} {colour} {plural(shape)}").replace("{a}", a(look))
            lead = middle[: len(middle) - len(middle.lstrip(", "))]
            second = t.mark(two[1], middle.removeprefix(lead) + places_[1])
            parts.append(t.mark(two[0], head + places_[0]) + lead + second + last)
    t.rng.shuffle(parts)
    return sentences(t.with_background(parts, BACKDROPS))


ASKED = (
    ("what is {place}?", "{a}"), ("and {place}?", "{a}"), ("what do you see {place}?", "{a}"), ("{place}?", "{look}"),
    ("Q: what belongs {place}?", "A: {a}"), ("what should go {place}?", "{a}"), ("{spot}?", "{a}, please"),
    ("is there anything {place}?", "yes, {a}"), ("which shape is {place}?", "{a}"), ("where is {a}?", "{place}"),
    ("where does {a} go?", "{place}"), ("where do you want {a}?", "{place}"),
)  # fmt: skip


def asked(t: Teller) -> str:
    """Questions and their answers."""
    pool, parts = t.rng.sample(ASKED, t.rng.randint(2, 4)), []
    break_ = t.choice((" ", " ", "\n"))
    for item in t.objects:
        question, answer = t.choice(pool)
        look, place, spot = t.look(item), t.place(item.cell), t.spot(item.cell)
        told = [capital(part.format(a=a(look), look=look, place=place, spot=spot)) for part in (question, answer)]
        parts.append(t.mark(item, break_.join(told)))
    return break_.join(capital(part) + ("" if part[-1] in "?!." else ".")
                       for part in t.with_background(parts, BACKDROPS))  # fmt: skip


DEFAULTS = ("everything is {} unless I say otherwise", "all shapes are {} if nothing else is said",
            "by default things are {}", "unless it says something else, each shape is {}")  # fmt: skip
WITHOUT_SIZE = ("{look} {place}", "{place} there is {look}", "{place}: {look}", "{look} is {place}", "{place}, {look}",
                "{look}, {corner}", "{spot} has {look}")  # fmt: skip


def defaults(t: Teller) -> str:
    """The size of most is said once, before; an object whose size is another says so."""
    sizes = [item.size for item in t.objects]
    usual, form = max(set(sizes), key=lambda size: (sizes.count(size), size)), t.choice(WITHOUT_SIZE)
    parts = []
    for item in t.objects:
        size, colour, shape = t.words(item)
        look = f"{colour} {shape}" if item.size == usual else f"{size} {colour} {shape}"
        parts.append(t.mark(item, form.format(look=a(look), place=t.place(item.cell), corner=t.corner(item.cell),
                                              spot=t.spot(item.cell))))  # fmt: skip
    head = t.choice(DEFAULTS).format(t.word("size", usual))
    return sentences([head, *t.with_background(parts, BACKDROPS)])


def respective(t: Teller) -> str:
    """Two or three objects at a time, their shapes, colors, sizes and places each in the order of the first."""
    parts, objects = [], list(t.objects)
    while objects:
        some, objects = objects[: (count := t.rng.randint(2, 3))], objects[count:]
        words = [t.words(item) for item in some]
        first = t.choice(("colour", "size", "none"))
        names = [{"colour": f"{colour} {shape}", "size": f"{size} {shape}", "none": shape}[first]
                 for size, colour, shape in words]  # fmt: skip
        rest = {"colour": [[size for size, _, _ in words]], "size": [[colour for _, colour, _ in words]],
                "none": [[colour for _, colour, _ in words], [size for size, _, _ in words]]}[first]  # fmt: skip
        at = listed([t.mark(item, t.place(item.cell)) for item in some])
        if len(some) == 1:
            parts.append(f"{a(names[0])}, {listed([each[0] for each in rest])}, {at}")
            continue
        what, looks = listed([a(name) for name in names]), ", ".join(listed(each) for each in rest)
        parts.append(t.choice((f"{what} are {looks} respectively, and are {at}",
                               f"there are {what}, in this order {looks}, {at}")))  # fmt: skip
    return sentences(t.with_background(parts, BACKDROPS))


VACANT = ("{spot} is empty", "nothing {place}", "{spot} stays empty", "there is nothing {place}", "leave {spot} blank",
          "{spot} is left free")  # fmt: skip


def negations(t: Teller) -> str:
    """What there is, and what there is not: empty cells, shapes and colors that are nowhere."""
    parts = []
    for item in t.objects:
        text = t.told(FLAT, item)
        others = [each for each in COLOURS if each != item.colour], [each for each in SHAPES if each != item.shape]
        if t.chance(0.2):
            text = text[:-1] + t.choice((f", not {t.choice(others[0])}", f", not {a(t.choice(others[1]))}")) + CLOSE
        parts.append(text)
    empty = [cell for cell in range(9) if cell not in t.at]
    for cell in t.rng.sample(empty, min(len(empty), t.rng.randint(1, 4))):
        parts.append(t.choice(VACANT).format(spot=t.spot(cell), place=t.place(cell)))
    shapes = [shape for shape in SHAPES if all(item.shape != shape for item in t.objects)]
    colours = [colour for colour in COLOURS if all(item.colour != colour for item in t.objects)]
    if shapes and t.chance(0.5):
        parts.append(t.choice(("there are no {} anywhere", "no {} at all")).format(plural(t.choice(shapes))))
    if colours and t.chance(0.5):
        parts.append(t.choice(("nothing is {}", "nothing here is {}", "no {} shapes")).format(t.choice(colours)))
    t.rng.shuffle(parts)
    return sentences(t.with_background(parts, BACKDROPS))


# ------------------------------------------------------------------------------------------------- lists, tags, tables

ENTRIES = (
    "{look}, {corner}", "{corner}: {look}", "{look} ({corner})", "{look} - {corner}", "{a} {place}", "{place}: {a}",
    "[{corner}] {look}", "{look} {corner}", "{look} @ {corner}", "{corner} - {look}", "{look}: {corner}",
)  # fmt: skip
HEADERS = (
    "",
    "",
    "A picture with:",
    "Objects:",
    "Shapes in the image:",
    "Please draw:",
    "List of what to draw:",
    "- -",
)


def _list(t: Teller, bullets: Callable[[int], str], break_: str = "\n") -> str:
    form = (t.choice(ENTRIES),)
    parts = t.with_background(
        [t.told(form, item) for item in t.objects], ("{background} background", "background: {background}")
    )
    header = t.choice(HEADERS).strip("- ")
    return break_.join(([header] if header else []) + [bullets(number) + part for number, part in enumerate(parts, 1)])


def bullets(t: Teller) -> str:
    """A list of dashes, stars or dots."""
    sign = t.choice(("- ", "* ", "• ", "-- ", "> "))
    return _list(t, lambda number: sign)


def numbers(t: Teller) -> str:
    """A numbered list."""
    form = t.choice(("{}. ", "{}) ", "({}) ", "{}: ", "#{} "))
    return _list(t, form.format, t.choice(("\n", "\n", " ", "; ")))


QUALITY = (
    "masterpiece", "best quality", "highly detailed", "vector art", "flat design", "clean lines", "minimalist", "8k",
    "sharp focus", "digital art", "simple shapes", "no text", "studio light", "high resolution", "crisp edges",
    "geometric art", "ultra detailed", "trending", "award winning", "bold colors", "2d", "icon style",
)  # fmt: skip


def tags(t: Teller) -> str:
    """Keywords between commas, with words about quality."""
    forms = t.choice(
        (("{look} {corner}",), ("{corner} {look}",), ("{look} {place}",), ("{look} {corner}", "{look} {place}"))
    )
    parts = t.with_background(
        [t.told(forms, item) for item in t.objects],
        ("{background} background", "{background} backdrop", "plain {background} background"),
    )
    quality = t.rng.sample(QUALITY, t.rng.randint(8, 18) if t.chance(0.3) else t.rng.randint(0, 6))
    first = t.rng.randint(0, len(quality))
    text = t.choice((", ", ", ", ", ", " | ", "; ")).join([*quality[:first], *parts, *quality[first:]])
    return text + t.choice(("", "", "."))


def strung(t: Teller) -> str:
    """Bare words in an order of the caption's own."""
    order, comma = t.rng.sample(range(4), 4), t.choice((", ", " ", " / ", " - ", ", "))
    break_ = t.choice(("; ", "\n", ". ") if comma != " - " else ("\n", "; "))
    parts = []
    for item in t.objects:
        words = (*t.words(item), t.corner(item.cell))
        parts.append(t.mark(item, comma.join(words[place] for place in order)))
    return break_.join(t.with_background(parts, ("{background} background", "background {background}")))


EMPTY = ("nothing", "nothing", "empty", "an empty cell", "blank", "none", "a gap")
LINE_STYLES = ("{line} from {start} to {stop}: {items}", "{line}, {start} to {stop}: {items}", "{line}: {items}")


def _lines(
    t: Teller, lines: Sequence[tuple[tuple[str, ...], list[int]]], start: str, stop: str, ends: Sequence[str]
) -> str:
    """Rows or columns: the names and cells of each, where it starts and stops, what its ends and middle are called."""
    style, empty, parts = t.choice((*LINE_STYLES, "named", "named")), t.choice(EMPTY), []
    break_ = t.choice((". ", ".\n", "\n", "; "))
    comma, article = t.choice((", ", ", ", " | ", ", then ")), t.chance(0.6)
    kind = t.rng.randrange(2)
    for names, cells in lines:
        held = [cell for cell in cells if cell in t.at]
        if not held:
            if t.chance(0.7):
                parts.append(t.choice(("{} is empty", "{}: nothing", "nothing in the {}")).format(names[kind]))
            continue

        def shown(cell: int) -> str:
            look = t.look(t.at[cell])
            return a(look) if article else look

        if style == "named":
            items = [t.mark(t.at[cell], f"{shown(cell)} {ends[cells.index(cell)]}") for cell in held]
            parts.append(t.choice(("{}: {}", "in the {}, {}", "the {} has {}")).format(names[kind], listed(items)))
        else:
            items = [t.mark(t.at[cell], shown(cell)) if cell in t.at else empty for cell in cells]
            parts.append(style.format(line=names[kind], start=start, stop=stop, items=comma.join(items)))
    parts = t.with_background(parts, BACKDROPS)
    return break_.join(map(capital, parts)) + t.choice((".", ""))


def rows(t: Teller) -> str:
    """Row by row, from left to right; the words of a fact are those of its object, the row is said before."""
    names = [(f"{name} row", f"{nth} row") for name, nth in zip(("top", "middle", "bottom"), ORDINALS, strict=True)]
    lines = [(name, [3 * row, 3 * row + 1, 3 * row + 2]) for row, name in enumerate(names)]
    return _lines(t, lines, "left", "right", ("on the left", "in the middle", "on the right"))


def columns(t: Teller) -> str:
    """Column by column, from top to bottom."""
    names = [
        (f"{name} column", f"{nth} column") for name, nth in zip(("left", "middle", "right"), ORDINALS, strict=True)
    ]
    lines = [(name, [column, column + 3, column + 6]) for column, name in enumerate(names)]
    return _lines(t, lines, "top", "bottom", ("at the top", "in the middle", "at the bottom"))


COMPASS_FORMS = (
    ("in the {}", "to the {}", "in the {} corner", "at the {}", "up in the {}", "{}"),
    ("in the {}", "{}", "at the very {}", "right in the {}"),
)  # fmt: skip
SHORT_COMPASS = ("NW", "N", "NE", "W", "C", "E", "SW", "S", "SE")
DIRECTED = (
    "{a} {place}",
    "{place} there is {a}",
    "{place}: {look}",
    "{look} {place}",
    "{a} lies {place}",
    "{place}, {a}",
)


def compass(t: Teller) -> str:
    """North is up."""
    short, parts = t.chance(0.3), []
    hyphen, ern = t.chance(0.2), t.chance(0.2)
    for item in t.objects:
        name = COMPASS[item.cell]
        if short:
            place = SHORT_COMPASS[item.cell]
        else:
            if hyphen and len(name) > 6:
                name = name.replace("north", "north-").replace("south", "south-")
            if item.cell == 4:
                place = t.choice(COMPASS_FORMS[1]).format(name)
            elif ern:
                place = f"in the {name}ern part"
            else:
                forms = COMPASS_FORMS[0] if len(name) > 6 else ("in the {}", "to the {}", "at the {} end", "{}")
                place = t.choice(forms[:5] if name.startswith("north") else forms[:4]).format(name)
        look = t.look(item)
        parts.append(t.mark(item, t.choice(DIRECTED).format(a=a(look), look=look, place=place)))
    parts = t.with_background(parts, BACKDROPS)
    opening = t.choice(("", "", "North is up. ", "Think of the picture as a map. ", "As on a map: "))
    return opening + (sentences(parts) if t.chance(0.7) else ", ".join(parts))


GRIDS = (
    ("", "row {r}, column {c}"), ("", "row {r} column {c}"), ("", "{rth} row, {cth} column"), ("", "r{r}c{c}"),
    ("Cells are given as (row, column). ", "({r}, {c})"), ("A 3x3 grid, row and column: ", "[{r},{c}]"),
    ("", "column {c}, row {r}"), ("Columns A to C, rows 1 to 3. ", "{abc}{r}"), ("", "in row {r} and column {c}"),
    ("", "in the {rth} row and the {cth} column"),
)  # fmt: skip
LOCATED = (
    "{a} at {place}",
    "{place}: {look}",
    "{look}, {place}",
    "{place} has {a}",
    "{look} ({place})",
    "{place} = {look}",
)


def coordinates(t: Teller) -> str:
    """Cells by number."""
    (legend, grid), parts = t.choice(GRIDS), []
    form = (
        t.choice(("{a} {place}", "{place} there is {a}", "{place}: {look}"))
        if grid.startswith("in ")
        else t.choice(LOCATED)
    )
    for item in t.objects:
        row, column = divmod(item.cell, 3)
        place = grid.format(r=row + 1, c=column + 1, rth=ORDINALS[row], cth=ORDINALS[column], abc="ABC"[column])
        look = t.look(item)
        parts.append(t.mark(item, form.format(a=a(look), look=look, place=place)))
    parts = t.with_background(parts, ("background {background}", "{background} background"))
    return legend + (sentences(parts) if t.chance(0.5) else t.choice(("\n", "; ")).join(parts))


# ----------------------------------------------------------------------------------------------------------- relations

STEPS = {  # (rows down, columns right): how one object lies from another
    (-1, 0): ("directly above {}", "just above {}", "right above {}", "on top of {}, one cell up"),
    (1, 0): ("directly below {}", "just below {}", "right under {}", "directly underneath {}", "beneath {}"),
    (0, -1): ("directly to the left of {}", "just left of {}", "left of {}", "next to {} on the left"),
    (0, 1): ("directly to the right of {}", "just right of {}", "right of {}", "next to {} on the right"),
    (-1, -1): ("diagonally above {} to the left", "up and to the left of {}"),
    (-1, 1): ("diagonally above {} to the right", "up and to the right of {}"),
    (1, -1): ("diagonally below {} to the left", "down and to the left of {}"),
    (1, 1): ("diagonally below {} to the right", "down and to the right of {}"),
}
RELATED = ("{rel} is {a}", "{rel} there is {a}", "{a} is {rel}", "{a} sits {rel}", "{rel}, {a}", "put {a} {rel}")


def relations(t: Teller) -> str:
    """Some objects by place, others by how they lie from one that has been told; each can be found from the text."""
    told: list[Object] = []
    parts = []
    for item in t.objects:
        near = [each for each in told if _step(each, item) in STEPS]
        straight = [each for each in near if 0 in _step(each, item)]
        near = straight if straight and t.chance(0.8) else near
        if not near or t.chance(0.15):
            parts.append(t.told(FLAT, item))
        else:
            other = told[-1] if told[-1] in near and t.chance(0.7) else t.choice(near)
            name = "it" if other is told[-1] and t.chance(0.5) else _known(t, other, told)
            relation = t.choice(STEPS[_step(other, item)]).format(name)
            parts.append(t.mark(item, t.choice(RELATED).format(a=a(t.look(item)), rel=relation)))
        told.append(item)
    return sentences(t.with_background(parts, BACKDROPS, (0.45, 0.8, 0.8)))  # between, "it" would be the background


def _step(one: Object, other: Object) -> tuple[int, int]:
    (row, column), (next_row, next_column) = divmod(one.cell, 3), divmod(other.cell, 3)
    return next_row - row, next_column - column


def _known(t: Teller, item: Object, told: Sequence[Object]) -> str:
    """A name that only one of the told objects answers to, by its plain words."""
    alike = [each for each in told if (each.colour, each.shape) == (item.colour, item.shape)]
    if len(alike) == 1:
        if sum(each.shape == item.shape for each in told) == 1 and t.chance(0.4):
            return f"the {item.shape}"
        return f"the {item.colour} {item.shape}"
    if sum(each.size == item.size for each in alike) == 1:
        return f"the {t.choice(SIZE_WORDS[item.size])} {item.colour} {item.shape}"
    return f"the {item.colour} {item.shape} {places(item.cell)[0][0]}"


# ---------------------------------------------------------------------------------------------------- without a place

ARRANGED = {1: (4,), 2: (3, 5), 3: (3, 4, 5), 4: (0, 2, 6, 8), 5: (0, 2, 4, 6, 8)}
"""Where objects stand whose places nobody says: one in the center, two or three in a row, four or five apart."""
ALONE = (
    "{}", "draw {}", "i want {}", "just {} please", "a picture of {}", "{}, please", "make {}", "can you draw {}?",
    "an image of {}", "show me {}", "i'd like {}", "there is {}", "{}, centered composition", "{} and nothing else",
)  # fmt: skip


def unplaced(t: Teller) -> str:
    """Objects without their places, in the order of their cells, of a scene in which they stand as `ARRANGED` says."""
    article = t.chance(0.7)
    looks = [t.look(item) for item in t.scene.objects]
    told = [t.mark(item, a(look) if article else look) for item, look in zip(t.scene.objects, looks, strict=True)]
    text = t.choice(ALONE).format(listed(told, t.choice(("and", "and", "and also")), ", "))
    dice = t.rng.random()
    if dice < 0.25:
        text += f"{t.choice((' on', ' against', ' in front of', ' before'))} {a(t.background())} background"
        return text if t.chance(0.5) else sentences([text])
    parts = t.with_background([text], BACKDROPS, (0.2, 0.5, 0.5)) if dice < 0.75 else [text]
    return sentences(parts) if t.chance(0.5) else t.choice((", ", ". ")).join(parts)


# -------------------------------------------------------------------------------------------------- never trained on

RECORDS = (
    ("{corner} = {look}", "; ", "background = {background}"),
    ("{corner} -> {look}", "\n", "background -> {background}"),
    ('"{corner}": "{look}"', ", ", '"background": "{background}"'),
    ("place: {corner}, size: {size}, color: {colour}, shape: {shape}", "\n", "background: {background}"),
    ("shape={shape} color={colour} size={size} place={corner}", "; ", "background={background}"),
    ("| {corner} | {size} | {colour} | {shape} |", "\n", "| background | {background} |"),
)


def records(t: Teller) -> str:
    """As a program writes them."""
    form, break_, background = t.choice(RECORDS)
    parts = []
    for item in t.objects:
        size, colour, shape = t.words(item)
        values = {"size": size, "colour": colour, "shape": shape, "look": f"{size} {colour} {shape}"}
        parts.append(t.mark(item, form.format(corner=t.corner(item.cell), **values)))
    text = break_.join(t.with_background(parts, (background,)))
    return "{" + text + "}" if form.startswith('"') else text


STORY = (
    "{a} lives {place}", "look {place}, where {a} is waiting", "meanwhile, {a} was resting {place}",
    "{a} had made itself at home {place}", "who else was there? {a}, {place}, of course", "{place} slept {a}",
    "nobody knew how {a} had come to be {place}", "{a} kept watch {place}", "{spot} belonged to {a}",
)  # fmt: skip
TALES = ("Once upon a time, in a land called {background}, there was a little world.",
         "The walls of the house were {background}.", "Far and wide, all one could see was {background}.")  # fmt: skip


def story(t: Teller) -> str:
    """A tale, in verbs and turns that no other family has."""
    parts = [t.told(STORY, item) for item in t.objects]
    return sentences(t.with_background(parts, TALES, (0.6, 0.8, 0.9)))


def grouped(t: Teller) -> str:
    """Objects of one color, shape or size together, which is said once for all of them, before they come."""
    key = t.choice(("colour", "shape", "size"))
    parts = []
    for value in dict.fromkeys(getattr(item, key) for item in t.objects):
        items = []
        for item in (item for item in t.objects if getattr(item, key) == value):
            size, colour, shape = t.words(item)
            look = {"colour": f"{size} {shape}", "shape": f"{size} {colour} one", "size": f"{colour} {shape}"}[key]
            items.append(t.mark(item, f"{a(look)} {t.place(item.cell)}"))
        name = t.word(key, value)
        heads = {
            "colour": ("in {}: {}", "everything {}: {}", "painted {} are {}"),
            "shape": ("of the kind {}: {}", "{}: {}", "as to the shape {}, there is {}"),
            "size": ("these are {}: {}", "everything {}: {}", "the {} things are {}"),
        }[key]
        parts.append(t.choice(heads).format(name, listed(items)))
    return sentences(t.with_background(parts, BACKDROPS))


TRAINED: dict[str, Callable[[Teller], str]] = {
    "casual": casual,
    "joined": joined,
    "bullets": bullets,
    "numbers": numbers,
    "tags": tags,
    "rows": rows,
    "columns": columns,
    "relations": relations,
    "negations": negations,
    "prose": prose,
    "backdrop": backdrop,
    "compass": compass,
    "coordinates": coordinates,
    "synonyms": varied,
    "followed": followed,
    "pairs": pairs,
    "asked": asked,
    "defaults": defaults,
    "respective": respective,
    "strung": strung,
    "unplaced": unplaced,
}
UNSEEN: dict[str, Callable[[Teller], str]] = {"records": records, "story": story, "grouped": grouped}
