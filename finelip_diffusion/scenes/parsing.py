"""What a prompt states of the bundled world, whoever wrote it.

The atoms of a text become mentions of objects, and each is paired with its place. What does not fit is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .atoms import ATTRIBUTES, CELLS, INSIDE, PLACED, WEAK, Atom, Scanner
from .facts import Caption, Fact
from .families import ARRANGED
from .world import Object


@dataclass
class Mention:
    """An object that a text names, as far as its attributes are known."""

    noun: Atom
    named: dict[str, str] = field(default_factory=dict)
    atoms: list[Atom] = field(default_factory=list)
    wrong: bool = False

    def take(self, atom: Atom) -> None:
        self.named[atom.kind] = atom.value
        self.atoms.append(atom)


def find_facts(text: str) -> Caption:
    """Finds what a text says of the bundled world, whoever wrote it.

    It reads sentences, several objects in one, lists, tags, rows and columns, relations to objects named before,
    compass directions, numbered rows and columns, questions with their answers, a size that holds for all, synonyms,
    and words with one typo. A fact needs a shape, a color, a size and a place; what is not certain is left out. Where
    a prompt of one to five objects names no place at all, they stand as `families.ARRANGED` says.

    Args:
        text: A prompt, such as a caption that somebody has changed.

    Returns:
        The text with its facts. Those of a caption of `describe` in sentences name the same objects and end where its
        own do.
    """
    found, context = list[Fact](), _Context()
    atoms = list(Scanner(text).atoms())
    context.anywhere = not any(atom.kind in (*PLACED, "half", "line") for atom in atoms)
    for segment in _segments(atoms):
        found += _facts(segment, context)
    found += _arranged(context.unplaced)
    cells = [fact.object.cell for fact in found]
    certain = [
        fact
        for place, fact in enumerate(found)
        if all(fact.object == other.object for other in found if other.object.cell == fact.object.cell)
        and fact.object.cell not in cells[:place]
    ]
    return Caption(text, sorted(certain, key=lambda fact: fact.start))


@dataclass
class _Context:
    """What has been told so far.

    Attributes:
        told: Objects.
        size: What those have whose size is not said.
        anywhere: Whether the whole text names no place.
        unplaced: Objects without a place, of such a text.
    """

    told: list[Object] = field(default_factory=list)
    size: str | None = None
    anywhere: bool = False
    unplaced: list[Mention] = field(default_factory=list)

    def other(self, said: dict[str, Any]) -> Object | None:
        """The one that words speak of, if only one answers to them."""
        if not said:
            return self.told[-1] if self.told else None
        alike = [each for each in self.told if all(getattr(each, name) == value for name, value in said.items())]
        return alike[0] if len(set(alike)) == 1 else None


def _segments(atoms: Sequence[Atom]) -> Iterator[list[Atom]]:
    """Sentences, entries of lists; one that says of "it" how it looks goes with the one before."""
    segments: list[list[Atom]] = [[]]
    asked = False
    for atom in atoms:
        if atom.kind != "break":
            segments[-1].append(atom)
        elif atom.value == "?" and _is_half(segments[-1]):  # the answer has the other half
            asked = True
        elif not (asked and atom.value == "\n"):
            segments.append([])
        if atom.kind in (*ATTRIBUTES, *CELLS):
            asked = False
    whole: list[Atom] = []
    for segment in segments:
        kinds = {atom.kind for atom in segment}
        looks = kinds & {"colour", "size"} and kinds <= {"colour", "size", "word", "one"} and len(segment) < 14
        if looks and not _usual_size(segment):
            whole += [atom for atom in segment if atom.kind != "one"]
        else:
            yield whole
            whole = segment
    yield whole


def _is_half(atoms: Sequence[Atom]) -> bool:
    """Whether a question names either a place or an object."""
    kinds = [atom.kind for atom in atoms]
    return sorted((kinds.count("shape"), sum(kind in CELLS for kind in kinds))) == [0, 1]


def _usual_size(atoms: Sequence[Atom]) -> str | None:
    """The size of all objects that say none, if that is what a sentence is about."""
    values = {atom.value for atom in atoms if atom.kind in ("word", "empty")}
    sizes = [atom.value for atom in atoms if atom.kind == "size"]
    said = values & {"unless", "default", "otherwise"} or {"nothing", "else"} <= values
    return sizes[0] if said and len(sizes) == 1 and not any(atom.kind == "shape" for atom in atoms) else None


def _arranged(mentions: list[Mention]) -> list[Fact]:
    """Facts of objects whose places a text leaves to the picture."""
    facts = []
    for cell, mention in zip(ARRANGED.get(len(mentions), ()), mentions, strict=False):
        spans = [mention.noun, *mention.atoms]
        start, end = min(atom.start for atom in spans), max(atom.end for atom in spans)
        if len(mention.named) == 3 and not mention.wrong:
            facts.append(Fact(Object(cell, **mention.named), start, end))
    return facts if len(facts) == len(mentions) else []


def _facts(atoms: list[Atom], context: _Context) -> list[Fact]:
    """Facts of one segment, a sentence or an entry of a list."""
    words = {atom.value for atom in atoms if atom.kind == "word"}
    if "respectively" in words or {"this", "order"} <= words:  # what belongs to what is not in the words' order
        return []
    if size := _usual_size(atoms):
        context.size = size
        return []
    atoms = _stated(atoms)
    mentions = {id(mention.noun): mention for mention in _mentions(atoms)}
    facts, part, line = list[Fact](), list[Atom](), None
    for atom in [*atoms, None]:
        if atom is None or atom.kind == "line":
            facts += _line_facts(part, mentions, line, context)
            part, line = [], atom
        else:
            part.append(atom)
    return facts


def _stated(atoms: list[Atom]) -> list[Atom]:
    """Without what is said not to be there."""
    kept: list[Atom] = []
    index = 0
    while index < len(atoms):
        atom = atoms[index]
        following = atoms[index + 1 : index + 5]
        if atom.kind in ("no", "not"):
            gone = 0
            for place, other in enumerate(following, 1):
                if other.kind in (*ATTRIBUTES, "background"):
                    gone = place
                    if other.kind == "shape":
                        break
                elif gone or other.value not in ("a", "an", "the"):
                    break
            index += gone + 1
            continue
        if atom.kind == "empty":
            words = [other.value for other in following if other.kind == "word"]
            if atom.value == "nothing" and "is" in words[:2] and any(o.kind == "colour" for o in following[:3]):
                index += 1 + next(place for place, other in enumerate(following, 1) if other.kind == "colour")
                continue
            joint = next((other for other in following if other.value not in INSIDE | {"is", "right"}), None)
            spoken = bool(following) and following[0].value in ("in", "at", "on")
            if atom.value == "nothing" and joint and (joint.kind in CELLS or (joint.kind == "line" and spoken)):
                index += 1 + following.index(joint) + 1
                continue
            last = range(len(kept) - 1, max(-1, len(kept) - 5), -1)
            before = [place for place in last if kept[place].kind in CELLS]
            between = [other.value for other in kept[before[0] + 1 :]] if before else []
            if before and all(value in ("is", "stays", "left", "are", "remains", "be", ":", "-") for value in between):
                del kept[before[0] :]
                index += 1
                continue
        kept.append(atom)
        index += 1
    return kept


def _mentions(atoms: list[Atom]) -> list[Mention]:
    """Objects of a segment, in order, with what is said of them."""
    used: set[int] = set()
    nouns = [place for place, atom in enumerate(atoms) if atom.kind in ("shape", "one")]
    mentions: dict[int, Mention] = {}
    for noun in nouns:
        mention = Mention(atoms[noun])
        place = noun - 1
        while place >= 0:
            atom = atoms[place]
            if atom.kind in ("colour", "size") and place not in used and atom.kind not in mention.named:
                mention.take(atom)
                used.add(place)
            elif atom.value == "or" and mention.named:
                mention.wrong = True
                break
            elif atom.value not in (",", "|", "and") or not mention.named or _stands_alone(atoms, place):
                break
            place -= 1
        if atoms[noun].kind == "shape":
            mention.wrong |= atoms[noun].value.endswith("*")
            mention.named["shape"] = atoms[noun].value.rstrip("*")
        mentions[noun] = mention
    heads = [noun for noun in nouns if _is_head(atoms, noun, mentions[noun])]
    if heads and any(atoms[noun].kind == "one" for noun in nouns):
        for noun in nouns:
            before = [head for head in heads if head < noun]
            if atoms[noun].kind == "one" and before:
                mentions[noun].named["shape"] = atoms[before[-1]].value.rstrip("*")
        nouns = [noun for noun in nouns if noun not in heads]
    nouns = [noun for noun in nouns if atoms[noun].kind == "shape" or mentions[noun].named]
    shared = list[int]()
    for place, atom in enumerate(atoms):
        if atom.kind not in ("colour", "size") or place in used:
            continue
        before = [noun for noun in nouns if noun < place]
        after = [noun for noun in nouns if noun > place]
        lacks = bool(before) and atom.kind not in mentions[before[-1]].named
        if after and _is_head(atoms, place, None) and not (lacks and before[-1] > place - 3):
            shared.append(place)
        elif lacks:
            mentions[before[-1]].take(atom)
        elif after and atom.kind not in mentions[after[0]].named and not before:
            mentions[after[0]].take(atom)
    for place in reversed(shared):  # each for those up to the next one
        for noun in nouns:
            if noun > place:
                mentions[noun].named.setdefault(atoms[place].kind, atoms[place].value)
    return [mentions[noun] for noun in nouns]


def _stands_alone(atoms: Sequence[Atom], place: int) -> bool:
    """Whether what stands before a comma was said of what came earlier: "a star in blue, red circle"."""
    if place < 2 or atoms[place].value == "and":
        return True
    before = atoms[place - 2].value
    return before in ("is", "in", "of") or (before == "and" and atoms[place - 3].kind in ("colour", "size"))


def _is_head(atoms: Sequence[Atom], place: int, mention: Mention | None) -> bool:
    """Whether a word names what all of a sentence's objects share: "Everything red: ..."."""
    if mention is not None and (len(mention.named) > 1 or atoms[place].kind != "shape"):
        return False
    following = [atom.value for atom in atoms[place + 1 : place + 3]]
    if following[:1] == ["things"]:
        following = following[1:]
    if mention is None and atoms[place - 1].value in ("in", "everything", "painted") and following[0] in ("a", "an"):
        return True
    return following[:1] == [":"] or following[:1] == ["are"] or (mention is not None and following[:1] == [","])


def _line_facts(atoms: list[Atom], mentions: dict[int, Mention], line: Atom | None, context: _Context) -> list[Fact]:
    """Facts of what stands after the name of a row or column, or of a sentence without one."""
    own = [mentions[id(atom)] for atom in atoms if id(atom) in mentions]
    for mention in own:
        if context.size is not None:
            mention.named.setdefault("size", context.size)
    if context.anywhere and _are_listed(atoms, own):
        context.unplaced += own
    halves = [atom for atom in atoms if atom.kind in ("half", "center")]
    places = [atom for atom in atoms if atom.kind in (PLACED if line is None else ("place", "relation"))]
    pairs: list[tuple[Mention, Atom | None, int | None]] = []
    if line is not None and not places:
        row, column = line.value
        if len(halves) == len(own):
            for mention, half in zip(own, halves, strict=True):
                down, across = (1, 1) if half.kind == "center" else half.value
                down, across = row if row is not None else down, column if column is not None else across
                pairs.append((mention, half, None if down is None or across is None else 3 * down + across))
        elif not halves:
            items = [atom for atom in atoms if id(atom) in mentions or atom.kind == "empty"]
            if len(items) == 3:
                for number, atom in enumerate(items):
                    if id(atom) in mentions:
                        cell = 3 * row + number if row is not None else 3 * number + column
                        pairs.append((mentions[id(atom)], None, cell))
    elif line is None:
        pairs = [(mention, place, None) for mention, place in _paired(atoms, own, places)]
    facts = []
    for mention, place, cell in pairs:
        if place is not None and cell is None and place.kind in ("place", "center"):
            cell = place.value
        elif place is not None and place.kind == "relation":
            cell = _from(place.value, context)
        if cell is None or mention.wrong or len(mention.named) < 3:
            continue
        item = Object(cell, **mention.named)
        context.told.append(item)
        spans = [mention.noun, *mention.atoms, *([place] if place is not None else [])]
        facts.append(Fact(item, min(atom.start for atom in spans), max(atom.end for atom in spans)))
    return facts


def _are_listed(atoms: Sequence[Atom], mentions: Sequence[Mention]) -> bool:
    """Whether nothing is said between mentions of how they stand to each other."""
    said = [mention.noun for mention in mentions] + [atom for mention in mentions for atom in mention.atoms]
    own = [place for place, atom in enumerate(atoms) if any(atom is each for each in said)]
    between = atoms[own[0] : own[-1]] if own else []
    joints = WEAK | {"a", "an", "also", "with", "well", "as", "together", "along", "of", "in", "is", "that", "size"}
    return all(any(atom is each for each in said) or atom.value in joints for atom in between)


def _paired(atoms: Sequence[Atom], mentions: list[Mention], places: list[Atom]) -> list[tuple[Mention, Atom]]:
    """Mentions and places that belong together."""
    if len(mentions) == len(places):
        return list(zip(mentions, places, strict=True))
    nouns = {id(mention.noun): mention for mention in mentions}
    items = [atom for atom in atoms if id(atom) in nouns or atom.kind in PLACED]
    order = {id(atom): number for number, atom in enumerate(atoms)}

    def joined(one: Atom, other: Atom) -> bool:
        return not any(atom.value in WEAK for atom in atoms[order[id(one)] + 1 : order[id(other)]])

    pairs, taken = [], set[int]()
    for number, atom in enumerate(items):
        if id(atom) not in nouns:
            continue
        near = [
            other
            for other, ordered in (
                (items[number - 1] if number else None, False),
                (items[number + 1] if number + 1 < len(items) else None, True),
            )
            if other is not None
            and id(other) not in nouns
            and id(other) not in taken
            and (joined(atom, other) if ordered else joined(other, atom))
        ]
        if len(near) == 1:
            taken.add(id(near[0]))
            pairs.append((nouns[id(atom)], near[0]))
    return pairs


def _from(relation: tuple[int, int, dict[str, Any]], context: _Context) -> int | None:
    """The cell that lies so from an object that has been told, or None."""
    down, across, said = relation
    other = context.other(said)
    if other is None or (down, across) == (0, 0):
        return None
    row, column = divmod(other.cell, 3)
    row, column = row + down, column + across
    return 3 * row + column if 0 <= row < 3 and 0 <= column < 3 else None
