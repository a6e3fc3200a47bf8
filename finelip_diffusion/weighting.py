"""Words that weigh more or less: the syntax of A1111 and of compel. `encoding` has what weights do to states.

The syntax of A1111 is translated into what compel's parser makes of its own: fragments with weights.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

from .prompts import WEIGHTINGS, Run, WeightedText, Weighting

__all__ = ["WEIGHTINGS", "Mixture", "Weighting", "compel_is_missing", "parse_weights"]

BRACKET_FACTOR = 1.1
"""What a round bracket of A1111 multiplies the weight by, and a square one divides it by."""

Mixture = tuple[tuple[float, WeightedText], ...]
"""Texts whose states are added up, each with its factor; most prompts are one text."""

_A1111 = re.compile(r"\\(?P<escaped>[\\()\[\]])|(?P<bracket>[()\[\]])|\s*\b(?P<part>BREAK)\b\s*")
_NUMBER = re.compile(r"\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")
_PAIRS = {")": "(", "]": "["}


def parse_weights(prompt: str, weighting: str = "plain") -> Mixture:
    """Reads the weights in a prompt. Brackets without a partner are text.

    Args:
        prompt: Any text.
        weighting: `"plain"`, every letter is text; `"a1111"`, `(word:1.3)`, `((word))`, `[word]`, `\\(` for a bracket
            that is text, and `BREAK`, after which a new window begins; `"compel"`, `(some words)1.3`, `word++`,
            `("one", "two").and()` and `.blend(0.7, 0.3)`.

    Returns:
        The text with its weights; several with their factors for `.blend()`.

    Raises:
        ValueError: If a weight is negative, a LoRA or `.swap()` is asked for, or compel is not installed.
    """
    if weighting == "plain":
        return ((1.0, WeightedText(prompt)),)
    return ((1.0, _parse_a1111(prompt)),) if weighting == "a1111" else _parse_compel(prompt)


def _parse_a1111(prompt: str) -> WeightedText:
    items = list(_items(prompt))
    partners = _partners([text if kind == "bracket" else "" for kind, text in items])
    unmatched = "".join(text for k, (kind, text) in enumerate(items) if kind == "bracket" and k not in partners)
    builder, factors = _Builder(), [1.0]
    for k, (kind, text) in enumerate(items):
        if kind == "break":
            builder.begin_part()
        elif k not in partners:
            inside = items[k + 1 : k + 2] == [("bracket", ")")] and k + 1 in partners
            number = _NUMBER.search(text) if inside else None
            builder.add(text[: number.start()] if number else text, factors[-1])
        elif text in _PAIRS:
            factors.pop()
        else:
            number = _NUMBER.search(items[partners[k] - 1][1]) if text == "(" else None
            usual = BRACKET_FACTOR if text == "(" else 1 / BRACKET_FACTOR
            factors.append(factors[-1] * (float(number[1]) if number else usual))
    return builder.finish(unmatched)


def _items(prompt: str) -> Iterator[tuple[str, str]]:
    """Kind and text of what a prompt is made of: text, brackets and breaks, a text before each of the others."""
    text, start = "", 0
    for found in _A1111.finditer(prompt):
        text += prompt[start : found.start()] + (found["escaped"] or "")
        start = found.end()
        if not found["escaped"]:
            yield "text", text
            yield ("bracket", found["bracket"]) if found["bracket"] else ("break", "")
            text = ""
    yield "text", text + prompt[start:]


def _partners(brackets: list[str]) -> dict[int, int]:
    """Each bracket's partner, both ways; what lies open inside a pair has none."""
    partners: dict[int, int] = {}
    opened: list[int] = []
    for k, bracket in enumerate(brackets):
        if bracket in _PAIRS:
            same = [i for i in opened if brackets[i] == _PAIRS[bracket]]
            if same:
                partners |= {same[-1]: k, k: same[-1]}
                opened = [i for i in opened if i < same[-1]]
        elif bracket:
            opened.append(k)
    return partners


@lru_cache(64)  # compel takes milliseconds a token
def _parse_compel(prompt: str) -> Mixture:
    try:
        from compel import Compel
        from compel.prompt_parser import Blend, Conjunction, FlattenedPrompt
    except ImportError as error:
        raise compel_is_missing() from error
    conjunction: Conjunction = Compel.parse_prompt_string(prompt)
    if conjunction.lora_weights:
        raise ValueError("withLora() in a prompt loads nothing here: load it with load_lora_weights() first.")

    def text_of(prompts: list[FlattenedPrompt], weights: list[float]) -> WeightedText:
        builder = _Builder()
        for number, (part, weight) in enumerate(zip(prompts, weights, strict=True)):
            if number:
                builder.begin_part(weight)
            else:
                builder.parts = [(0, weight)]
            for fragment in part.children:
                if not hasattr(fragment, "text"):
                    raise ValueError(".swap() needs cross-attention control, which pipelines of diffusers lack.")
                builder.add(fragment.text, fragment.weight, " ")
        brackets = [character if character in "()" else "" for character in builder.text]
        partners = _partners(brackets)
        return builder.finish("".join(bracket for k, bracket in enumerate(brackets) if k not in partners))

    first = conjunction.prompts[0]
    if isinstance(first, Blend) and len(conjunction.prompts) == 1:
        total = sum(first.weights) if first.normalize_weights else 1.0
        if total == 0:
            raise ValueError(f"the weights {first.weights} of .blend() add up to nothing: give others.")
        return tuple((w / total, text_of([part], [1])) for w, part in zip(first.weights, first.prompts, strict=True))
    return ((1.0, text_of(conjunction.prompts, conjunction.weights)),)


class _Builder:
    """Gathers a text fragment by fragment."""

    def __init__(self) -> None:
        self.text = ""
        self.weights: list[Run] = []
        self.parts: list[tuple[int, float]] = [(0, 1.0)]

    def add(self, text: str, weight: float, between: str = "") -> None:
        if weight < 0:
            raise ValueError(f"weight {weight:g} of {text.strip()!r}: weights are at least 0.")
        if self.text and text and not self.text[-1].isspace():
            self.text += between
        start, weight = len(self.text), round(weight, 9)  # 1.1 / 1.1 is 1
        self.text += text
        if text and weight != 1:
            if self.weights and self.weights[-1][1:] == (start, weight):
                start = self.weights.pop()[0]
            self.weights.append((start, len(self.text), weight))

    def begin_part(self, weight: float = 1.0) -> None:
        if self.text and not self.text[-1].isspace():
            self.text += " "
        self.parts.append((len(self.text), weight))

    def finish(self, unmatched: str) -> WeightedText:
        return WeightedText(self.text, tuple(self.weights), tuple(self.parts), unmatched)


def compel_is_missing() -> ValueError:
    """What to say where compel is needed."""
    return ValueError("prompts with weights need compel, which is not installed: pip install compel.")
