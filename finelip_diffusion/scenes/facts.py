"""What a caption states of a scene, and what an image shows of it."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from .words import SYNONYMS, plural
from .world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Object, Scene

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STOCK_CONTENT_TOKENS = 75  # what a 77-token encoder reads beside its start and end tokens


@dataclass(frozen=True)
class Fact:
    """Where a caption says what an object is: `caption[start:end]` names its shape, color, size and place."""

    object: Object
    start: int
    end: int


class Caption(str):
    """A caption as plain text.

    Attributes:
        facts: What it states of objects, in the order of the text.
        background: What `describe` has said of the background; None if nothing.
        wording: The family in which `describe` has told it; None for any other text.
    """

    facts: tuple[Fact, ...]
    background: str | None
    wording: str | None

    def __new__(
        cls, text: str, facts: Iterable[Fact] = (), background: str | None = None, wording: str | None = None
    ) -> "Caption":
        self = super().__new__(cls, text)
        self.facts, self.background, self.wording = tuple(facts), background, wording
        return self

    def put(self, text: str, facts: Iterable[Fact]) -> "Caption":
        """The same caption in another text, which states the same facts elsewhere."""
        return Caption(text, facts, self.background, self.wording)


def advice(prompt: str) -> str | None:
    """What the bundled model can draw, for a prompt about something else.

    Returns:
        One sentence, or None where the prompt names any of the world's shapes, by whatever word.
    """
    nouns = {noun for words in SYNONYMS["shape"].values() for word in words for noun in (word, plural(word))}
    if re.search(r"\b(?:" + "|".join(map(re.escape, sorted(nouns, key=len, reverse=True))) + r")\b", prompt.lower()):
        return None
    return (
        f"The bundled model knows only {_listed(SIZES)} {_listed(map(plural, SHAPES))} in {_listed(COLOURS)} on a "
        f"plain {_listed(BACKGROUNDS, 'or')} background, and this prompt names none of these shapes."
    )


def _listed(words: Iterable[str], last: str = "and") -> str:
    *others, final = words
    return f"{', '.join(others)} {last} {final}"


@dataclass(frozen=True)
class Finding:
    """Whether an image shows one object of its prompt.

    Attributes:
        token: index of the last token of the fact, the start token being 0.
        after: whether that token comes after what a 77-token encoder reads.
        filled: whether anything stands in the object's cell.
        shape, color, size: whether the attribute of what stands there is right.
    """

    token: int
    after: bool
    filled: bool
    shape: bool
    colour: bool
    size: bool

    @property
    def found(self) -> bool:
        """Shape and color and size, in the right cell."""
        return self.shape and self.colour and self.size


def fact_tokens(caption: Caption, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[int, int]]:
    """First and last token index of each fact of a caption; the start token has index 0."""
    encoding = tokenizer(str(caption), return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    offsets = encoding.offset_mapping
    spans = []
    for fact in caption.facts:
        inside = [index for index, (start, end) in enumerate(offsets) if start >= fact.start and end <= fact.end]
        spans.append((inside[0] + 1, inside[-1] + 1))
    return spans


def findings(caption: Caption, shown: Scene, tokenizer: "PreTrainedTokenizerBase") -> list[Finding]:
    """Compares a caption, fact by fact, with the scene that an image shows.

    Args:
        caption: from `describe` or `find_facts`.
        shown: from `read`.
        tokenizer: counts the tokens; CLIP's.
    """
    cells = {item.cell: item for item in shown.objects}
    result = []
    for fact, (_, last) in zip(caption.facts, fact_tokens(caption, tokenizer), strict=True):
        item = cells.get(fact.object.cell)
        right = {name: item is not None and getattr(item, name) == getattr(fact.object, name) for name in
                 ("shape", "colour", "size")}  # fmt: skip
        result.append(Finding(token=last, after=last > STOCK_CONTENT_TOKENS, filled=item is not None, **right))
    return result


def as_record(finding: Finding) -> dict[str, bool | int]:
    """A finding as plain data."""
    return asdict(finding) | {"found": finding.found}


def stock_border(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The first character that a stock encoder does not read, or None where it reads all."""
    encoding = tokenizer(str(prompt), return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    offsets = encoding["offset_mapping"]
    return offsets[STOCK_CONTENT_TOKENS][0] if len(offsets) > STOCK_CONTENT_TOKENS else None
