"""Questions about a picture: what they ask, what they hang on, where a prompt tells it, and what answers add up to.

The sums are those of the sets' own authors; each function names its source.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..scenes import PLACES, Caption, Scene
from .adherence import sentences_of
from .intervals import RESAMPLES

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ONE_WORD = "{} Answer in one word."
"""How GenEval 2 puts its questions (its `evaluation.py`), and how counts are asked for in general."""
_EMPTY_WORDS = frozenset(
    ["a", "an", "and", "any", "are", "as", "at", "be", "by", "do", "does", "for", "from", "has", "have", "how",
     "image", "in", "is", "it", "its", "many", "of", "on", "or", "picture", "that", "the", "there", "this", "to",
     "what", "with"]
)  # fmt: skip

TIIF_GROUPS = {
    "Basic, Attribute": ("shape+color", "color+texture", "texture+color", "shape+texture"),
    "Basic, Relation": ("2d_spatial_relation", "3d_spatial_relation", "action+2d", "action+3d"),
    "Basic, Reasoning": ("numeracy", "negation", "differentiation", "comparison"),
    "Advanced, Attribute + Relation": (
        "action+color", "action+texture", "color+2d", "color+3d", "shape+2d", "shape+3d", "texture+2d", "texture+3d",
    ),
    "Advanced, Attribute + Reasoning": (
        "numeracy+color", "numeracy+texture", "comparison+color", "comparison+texture", "differentiation+color",
        "differentiation+texture", "negation+color", "negation+texture",
    ),
    "Advanced, Relation + Reasoning": (
        "numeracy+2d", "numeracy+3d", "comparison+2d", "comparison+3d", "differentiation+2d", "differentiation+3d",
        "negation+2d", "negation+3d",
    ),
    "Advanced, Text": ("text",),
    "Advanced, Style": ("style",),
    "Real world": ("real_world",),
}  # fmt: skip
"""The nine groups of types of prompts that TIIF-Bench averages over (its `eval/summary_dimension_results.py`)."""


@dataclass(frozen=True)
class Question:
    """What is asked of a picture.

    Attributes:
        text: the question.
        answer: what is right: `"yes"`, `"no"`, or a number from `"one"` to `"ten"`.
        parents: places, among the questions of the same prompt, of those that it hangs on.
        category: for means by category.
        words: what it is about, to find where the prompt tells it; the question's own words where there are none.
        end: where in the prompt what it asks has been told, in characters, if that is known.
        asked: how it is put, if not as its text and the usual instruction.
    """

    text: str
    answer: str = "yes"
    parents: tuple[int, ...] = ()
    category: str = ""
    words: str = ""
    end: int | None = None
    asked: str = ""


@dataclass(frozen=True)
class Answer:
    """What a judge makes of a question.

    Attributes:
        probability: of the right answer, from 0 to 1.
        right: whether the right answer is more probable than every other one.
    """

    probability: float
    right: bool


# ------------------------------------------------------------------------------------------------------- what they sum


def with_parents(answers: Sequence[Answer], questions: Sequence[Question], cascade: bool = False) -> list[float]:
    """1 for a right answer and 0 for a wrong one; a question is 0, too, where one that it hangs on is.

    Args:
        answers: one for each question.
        questions: of one prompt.
        cascade: whether a parent counts as failed that only hangs on a failed one itself, as in DPG-Bench (ELLA's
            `compute_dpg_bench.py`, which writes zeros in place, in the order of the questions). In DSG (its
            `vqa_utils.py`) parents count by their own answers.
    """
    own = [float(answer.right) for answer in answers]
    scores = list(own)
    for place, question in enumerate(questions):
        failed = scores if cascade else own
        if any(failed[parent] == 0 for parent in question.parents):
            scores[place] = 0.0
    return scores


def arithmetic_mean(answers: Sequence[Answer]) -> float:
    """Soft-TIFA AM of GenEval 2 (arXiv 2512.16853): mean probability of the right answers of one picture."""
    return sum(answer.probability for answer in answers) / len(answers)


def geometric_mean(answers: Sequence[Answer]) -> float:
    """Soft-TIFA GM of GenEval 2: geometric mean of the probabilities of one picture; 0 where one of them is 0."""
    logs = [np.log(answer.probability) if answer.probability > 0 else -np.inf for answer in answers]
    return float(np.exp(np.mean(logs)))


def group_mean(
    scores: Sequence[Sequence[float]], types: Sequence[str], groups: Mapping[str, Sequence[str]], seed: int = 0
) -> dict[str, Any]:
    """TIIF-Bench's overall score: of all questions of a type, of the types in a group, of the groups.

    Args:
        scores: by prompt, one for each question.
        types: of the prompts.
        groups: types by group; those without prompts are left out, as are groups without types.
        seed: of the bootstrap, which draws prompts of each type anew.

    Returns:
        `value`, `low`, `high` (95%, percentile) and `n`, the number of questions; None for what cannot be known.
    """
    sums = np.array([sum(own) for own in scores], dtype=float)
    sizes = np.array([len(own) for own in scores], dtype=float)
    members = {name: np.flatnonzero([kind == name for kind in types]) for name in dict.fromkeys(types)}
    found = [[members[name] for name in names if name in members] for names in groups.values()]
    found = [kinds for kinds in found if kinds]
    figure: dict[str, Any] = {"value": None, "low": None, "high": None, "n": int(sizes.sum())}
    if not found:
        return figure

    def overall(draw: Any) -> float:
        drawn = [[draw(rows) for rows in kinds] for kinds in found]
        return float(np.mean([np.mean([sums[rows].sum() / sizes[rows].sum() for rows in kinds]) for kinds in drawn]))

    rng = np.random.default_rng(seed)
    figure["value"] = overall(lambda rows: rows)
    if max(len(rows) for kinds in found for rows in kinds) > 1:
        drawn = [overall(lambda rows: rng.choice(rows, len(rows))) for _ in range(RESAMPLES // 4)]
        figure |= dict(zip(("low", "high"), map(float, np.quantile(drawn, (0.025, 0.975))), strict=True))
    return figure


# ------------------------------------------------------------------------------------------------ where it is told


def told_at(questions: Sequence[Question], prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
    """The tokens of a prompt with which what questions ask has been told; the start token is 0.

    Where a question does not know: the sentence that has most of its words, the first of equals, and in it the last
    of these words.

    Returns:
        The token of each question, or None where the prompt has none of its words.
    """
    encoding = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in encoding["offset_mapping"]]
    sentences = [
        [
            (word, sentence.start + match.end())
            for match in re.finditer(r"[\w']+", prompt[sentence.start : sentence.end])
            for word in _words(match[0])
        ]
        for sentence in sentences_of(prompt, tokenizer)
    ]
    found: list[int | None] = []
    for question in questions:
        end = question.end
        if end is None:
            wanted = set(_words(question.words or question.text))
            held = [[(word, place) for word, place in own if word in wanted] for own in sentences]
            best = max(held, key=lambda own: len({word for word, _ in own}), default=[])
            end = best[-1][1] if best else None
        if end is None:
            found.append(None)
        else:
            found.append(1 + next((place for place, last in enumerate(ends) if last >= end), len(ends) - 1))
    return found


def _words(text: str) -> Iterable[str]:
    """Words that say something, without endings of the plural."""
    for word in re.findall(r"[\w']+", text.lower()):
        if word not in _EMPTY_WORDS:
            yield re.sub(r"('s|s')$|(?<=[^s])s$", "", re.sub(r"(?<=[xsh])es$", "", word))


# ------------------------------------------------------------------------------------------------------------- scenes


def scene_questions(caption: Caption) -> tuple[Question, ...]:
    """What can be asked of a picture of a scene: of each object its shape, then its color and its size, which hang on
    the shape. `scene_answers` has the truth, in the same order."""
    questions: list[Question] = []
    for fact in caption.facts:
        item, parent = fact.object, len(questions)
        place = PLACES[item.cell][0]
        questions += [
            Question(f"Is there a {item.shape} {place}?", category="shape", end=fact.end),
            Question(f"Is the {item.shape} {place} {item.colour}?", "yes", (parent,), "color", end=fact.end),
            Question(f"Is the {item.shape} {place} {item.size}?", "yes", (parent,), "size", end=fact.end),
        ]
    return tuple(questions)


def scene_answers(caption: Caption, shown: Scene) -> list[bool]:
    """The truth about `scene_questions`: whether a picture that shows a scene has it, cell by cell. A color or a size
    is that of whatever is in the cell."""
    cells = {item.cell: item for item in shown.objects}
    found = []
    for fact in caption.facts:
        item = cells.get(fact.object.cell)
        found += [item is not None and getattr(item, name) == getattr(fact.object, name)
                  for name in ("shape", "colour", "size")]  # fmt: skip
    return found
