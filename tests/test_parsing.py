"""What find_facts reads of prompts, in every wording, and what it leaves out."""

import pytest

from finelip_diffusion.scenes import FAMILIES, Object, describe, find_facts, sample_for, sample_scene

RED = {"shape": "square", "colour": "red", "size": "large"}
BLUE = {"shape": "star", "colour": "blue", "size": "small"}


def objects(text: str) -> list[Object]:
    return [fact.object for fact in find_facts(text).facts]


def test_facts_of_a_caption_in_sentences_are_its_own() -> None:
    for seed in range(500):
        caption = describe(sample_scene(seed, "test", (1, 9)), seed)
        found = find_facts(str(caption))
        assert [(fact.object, fact.end) for fact in found.facts] == [(fact.object, fact.end) for fact in caption.facts]
        assert all(own.start <= fact.start for own, fact in zip(caption.facts, found.facts, strict=True))


@pytest.mark.parametrize(
    ("split", "name", "noise"),
    [(split, name, noise) for split, names in FAMILIES.items() for name in names for noise in (False, True)],
)
def test_every_family_is_read(split: str, name: str, noise: bool) -> None:
    """The figures of docs/scenes.md, on 40 captions, less a margin of 0.05; of noisy groups, less 0.1.

    Of `respective` nothing is read but an object by itself: what belongs to what is not in the order of the words.
    """
    right = found = stated = 0
    for seed in range(40):
        caption = describe(sample_for(name, seed, "test"), seed, wording=name, split=split, noise=noise)
        one, other = {fact.object for fact in caption.facts}, set(objects(str(caption)))
        right, found, stated = right + len(one & other), found + len(other), stated + len(one)
    least = {"grouped": (0.95, 0.75), "respective": (0.0, 0.0), "defaults": (0.95, 0.75), "unplaced": (0.8, 0.7)}.get(
        name, (0.95, 0.88)
    )[noise]
    assert right / stated >= least
    assert right / found >= (0.99 if not noise else {"grouped": 0.88, "respective": 0.8}.get(name, 0.95))


@pytest.mark.parametrize(
    "text",
    [
        "a large red square in the top left corner",
        "TOP LEFT LARGE RED SQUARE",
        "big scarlet box, upper-left, masterpiece, 8k",
        "hey pls put a huge red squrae in teh top lfet, thx",
        "in the upper left hand corner there's a big square, and it is red",
        "red square of large size at the upper left",
        "row 1, column 1: large red square",
        "Columns A to C, rows 1 to 3. A1 = large red square",
        "a giant ruby tile to the north-west",
        "top row from left to right: a large red square, nothing, nothing",
        "left column, top to bottom: big red square, empty, empty",
        "top row: a large red square on the left",
        "everything red: a big square at the top on the left",
        "place: top left, size: large, color: red, shape: square",
        "a large red square (not blue) top left, nothing in the center",
        "no circles please. the center is empty. large red square, top-left",
    ],
)
def test_one_object_is_read_in_many_ways(text: str) -> None:
    assert objects(text) == [Object(0, **RED)]


@pytest.mark.parametrize(
    ("relation", "cell"),
    [
        ("directly above it", 1), ("below the red square", 7), ("just left of the square", 3),
        ("next to it on the right", 5), ("on top of it", 1), ("up and to the right of the large red square", 2),
        ("diagonally below it to the left", 6), ("directly to the right of it", 5),
    ],
)  # fmt: skip
def test_relations_lead_to_a_cell(relation: str, cell: int) -> None:
    assert objects(f"A large red square is in the center. A small blue star sits {relation}.") == [
        Object(4, **RED),
        Object(cell, **BLUE),
    ]
    assert objects(f"A large red square is in the center. {relation} is a small blue star.")[1:] == [
        Object(cell, **BLUE)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "...",
        "a witch in a forest",
        "a red square in the top left corner",  # no size
        "a red square",  # no size
        "a large red square and a star",  # no size and color
        "a large red square on the left",  # a column, no cell
        "a large red or blue square in the center",
        "two large red squares in the center",
        "a small blue star directly above it",  # above what?
        "a small blue star left of the green circle in the corner",
        "a large red square top left and a small blue star top left",  # one cell, two objects
        "a small blue star near a large red square",
    ],
)
def test_what_is_not_certain_is_left_out(text: str) -> None:
    assert objects(text) == []


def test_without_places_objects_stand_where_such_captions_mean_them() -> None:
    assert objects("draw a large red square please") == [Object(4, **RED)]
    assert objects("A large red square and a small blue star on a mint background.") == [
        Object(3, **RED),
        Object(5, **BLUE),
    ]
    assert objects("large red square, small blue star, large red square") == [
        Object(3, **RED),
        Object(4, **BLUE),
        Object(5, **RED),
    ]


def test_questions_are_read_with_their_answers_and_a_size_for_all() -> None:
    assert objects("What is at the top left? A large red square. Where is a small blue star? In the center.") == [
        Object(0, **RED),
        Object(4, **BLUE),
    ]
    assert objects(
        "Everything is large unless I say otherwise. Top left: a red square. Center: a small blue star."
    ) == [
        Object(0, **RED),
        Object(4, **BLUE),
    ]


def test_a_relation_out_of_the_picture_or_to_one_of_two_is_left_out() -> None:
    told = "A large red square is at the top left. "
    assert objects(told + "A small blue star is directly above it.") == [Object(0, **RED)]
    told += "A large red square is at the bottom left. "
    assert len(objects(told + "A small blue star is right of the red square.")) == 2
    assert objects(told + "A small blue star is right of the red square in the top left corner.")[2:] == [
        Object(1, **BLUE)
    ]


def test_spans_name_what_they_state() -> None:
    text = "Hello. In the very center sits a LARGE red square; and a small blue star is directly above it, I think."
    found = find_facts(text).facts
    assert text[found[0].start : found[0].end] == "In the very center sits a LARGE red square"
    assert text[found[1].start : found[1].end] == "small blue star is directly above it"


def test_sentences_with_two_objects_and_loose_words() -> None:
    text = (
        "HUGE, yellow: a Star in the very centre! A red circle. A small red star beside a large blue cross at the "
        "upper left? Tiny, a black diamond at the lower right"
    )
    assert objects(text) == [
        Object(4, "star", "yellow", "large"),
        Object(0, "cross", "blue", "large"),
        Object(8, "diamond", "black", "small"),
    ]
