"""Judges at work: every question that is asked of every picture, its answers kept so that nothing is asked twice."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from transformers import PreTrainedTokenizerBase

from .adherence import sentences_of
from .preferences import Preference
from .questions import Answer, Question, arithmetic_mean, geometric_mean, told_at, with_parents
from .vision import VisionJudge, put, whole

Asked = VisionJudge | Preference
"""What is given a picture and a text at a time."""

Values = list[list[float]]
"""What a judge says of one picture: of each question the probability of the right answer and whether it is the most
probable one, or of each text a score."""

Points = list[tuple[int, float]]
"""(token, value) along a prompt."""


@dataclass(frozen=True)
class Sheet:
    """What is asked of a picture of one prompt.

    Attributes:
        prompt: the whole of it.
        questions: of its set.
        tokens: where the prompt tells what each of them asks, or None.
        sentences: texts of its sentences.
        ends: the token with which each sentence ends.
    """

    prompt: str
    questions: tuple[Question, ...]
    tokens: tuple[int | None, ...]
    sentences: tuple[str, ...]
    ends: tuple[int, ...]


def sheet_of(prompt: str, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> Sheet:
    """What is asked of pictures of a prompt."""
    parts = sentences_of(prompt, tokenizer)
    return Sheet(
        prompt,
        tuple(questions),
        tuple(told_at(questions, prompt, tokenizer)),
        tuple(prompt[part.start : part.end] for part in parts),
        tuple(part.token for part in parts),
    )


def texts_of(judge: Asked, sheet: Sheet) -> list[Question]:
    """What a judge is given of a sheet: the questions of the set, the whole prompt, and sentence by sentence where
    there are no questions that say where the prompt is followed."""
    sentences = [whole(text) for text in sheet.sentences]
    if isinstance(judge, Preference):
        return [whole(sheet.prompt), *sentences]
    return [*sheet.questions, whole(sheet.prompt), *(() if sheet.questions else sentences)]


# ------------------------------------------------------------------------------------------------------------- asking


class Kept:
    """Answers by picture, judge and question, in a file that grows; a run that is killed loses the last line at most.

    Several processes write a file each and read all of them.
    """

    def __init__(self, folder: Path, process: int = 0):
        self.file = folder / f"answers-{process}.jsonl"
        self.answers: dict[str, Values] = {}
        for file in sorted(folder.glob("answers-*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    key, values = json.loads(line)
                except ValueError:  # the run was killed while it wrote
                    continue
                self.answers[key] = values

    def put(self, key: str, values: Values) -> None:
        self.answers[key] = values
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(f"\n{json.dumps([key, values])}")  # a line of its own, whatever half a line came before


def _key(judge: Asked, image: Image.Image, texts: Iterable[str]) -> str:
    """The same for the same pixels, judge and texts alone."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (judge.name, judge.revision, str(image.size), *texts):
        digest.update(part.encode() + b"\0")
    digest.update(image.tobytes())
    return digest.hexdigest()


def ask(judge: Asked, image: Image.Image, sheet: Sheet, kept: Kept) -> Values:
    """What a judge says of one picture."""
    image, asked = image.convert("RGB"), texts_of(judge, sheet)
    texts = [question.text for question in asked] if isinstance(judge, Preference) else [put(one) for one in asked]
    key = _key(judge, image, [*texts, *(question.answer for question in asked)])
    if key not in kept.answers:
        images = [image] * len(asked)
        if isinstance(judge, Preference):
            kept.put(key, [[score] for score in judge(images, texts)])
        else:
            kept.put(key, [[answer.probability, float(answer.right)] for answer in judge(images, asked)])
    return kept.answers[key]


# ------------------------------------------------------------------------------------------------------ what they say


@dataclass
class Verdicts:
    """What a judge says of the pictures of one prompt.

    Attributes:
        figures: by name, a value of each picture, or of each question of each.
        points: by name of a curve, (token, value).
        scores: of each picture, one for each question, dependencies counted.
        answers: of each picture.
    """

    figures: dict[str, list[float]] = field(default_factory=dict)
    points: dict[str, Points] = field(default_factory=dict)
    scores: list[list[float]] = field(default_factory=list)
    answers: list[list[Answer]] = field(default_factory=list)

    def add(self, name: str, values: Iterable[float]) -> None:
        self.figures.setdefault(name, []).extend(values)


def verdicts(judge: Asked, sheet: Sheet, said: Sequence[Values], cascade: bool = False) -> Verdicts:
    """Figures of one prompt.

    Args:
        judge: who said it.
        sheet: what was asked.
        said: what of, picture by picture.
        cascade: as `with_parents` takes it.
    """
    found = Verdicts()
    number = 0 if isinstance(judge, Preference) else len(sheet.questions)
    for values in said:
        first, *rest = values[number:]
        kind = "preference" if isinstance(judge, Preference) else "vqa_score"
        found.add(kind, [first[0]])
        if rest:
            found.points.setdefault(kind, []).extend(
                (end, value[0]) for end, value in zip(sheet.ends, rest, strict=True)
            )
        if number:
            answers = [Answer(probability, bool(right)) for probability, right in values[:number]]
            scores = with_parents(answers, sheet.questions, cascade)
            found.answers.append(answers)
            found.scores.append(scores)
            found.add("vqa", [sum(scores) / number])
            found.add("soft", [arithmetic_mean(answers)])
            found.add("soft_gm", [geometric_mean(answers)])
            found.points.setdefault("vqa", []).extend(
                (token, score) for token, score in zip(sheet.tokens, scores, strict=True) if token is not None
            )
    return found


def by_category(
    sheets: Sequence[Sheet], found: Sequence[Verdicts], last_picture_alone: bool = False
) -> dict[str, list[list[float]]]:
    """Scores of the questions of each category, prompt by prompt.

    Args:
        sheets: of the prompts.
        found: of the prompts.
        last_picture_alone: counts answers of each prompt's last picture and no dependencies, as the script of
            DPG-Bench does.
    """
    result: dict[str, list[list[float]]] = {}
    for sheet, own in zip(sheets, found, strict=True):
        pictures: list[list[float]] = own.scores
        if last_picture_alone:
            pictures = [[float(answer.right) for answer in answers] for answers in own.answers[-1:]]
        values: dict[str, list[float]] = {}
        for scores in pictures:
            for question, score in zip(sheet.questions, scores, strict=True):
                values.setdefault(question.category, []).append(score)
        for name, some in values.items():
            result.setdefault(name, []).append(some)
    return dict(sorted(result.items()))
