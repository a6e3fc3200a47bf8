"""Prompts as text encoders read them: settings, token counts, windows, and the text that is dropped."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from sentencex import get_sentence_boundaries
from transformers import PreTrainedTokenizerBase

LongPrompt = Literal["stretch", "truncate", "chunk", "segment", "auto"]
LONG_PROMPTS: tuple[str, ...] = get_args(LongPrompt)

Weighting = Literal["plain", "a1111", "compel"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)

SECOND_ENCODERS = ("stretch", "window")
HIDDEN_STATES = ("penultimate", "last_norm")

Cut = Literal["first", "windows", "packed", "sentences"]
"""Ways to cut a prompt: the first window alone, window after full window, windows of whole sentences, or a window for
each sentence."""

Window = tuple[int, ...]
"""Token ids that an encoder reads at once, without start, end and padding."""

Run = tuple[int, int, float]
"""First, last (exclusive), and the weight of what lies between."""


@dataclass(frozen=True)
class PromptSettings:
    """How prompts are read. Checked once, where it is made; a call with other settings makes another one.

    Attributes:
        long_prompt: What happens to a prompt that does not fit the stock window; docs/pipelines.md has the table.
        weighting: The syntax in which words get their weights; `"plain"` is none.
        blend: Share of the long encoder's states in what `"stretch"` reads, 0 to 1; the rest are the stock encoder's.
        second_encoder: SDXL's second encoder beside a long first one: `"stretch"` reads with a long one, `"window"`
            with the stock one, in windows that are joined.
        hidden_state: SDXL's states: `"penultimate"`, or `"last_norm"`, the last layer after the final LayerNorm.
        why: Why these are the default, in words; empty where somebody chose.

    Raises:
        ValueError: If a value is not one of its choices, or a blend is set for a strategy that cannot use it.
    """

    long_prompt: str = "stretch"
    weighting: str = "plain"
    blend: float = 1.0
    second_encoder: str = "stretch"
    hidden_state: str = "penultimate"
    why: str = ""

    def __post_init__(self) -> None:
        choices = {
            "long_prompt": LONG_PROMPTS,
            "weighting": WEIGHTINGS,
            "second_encoder": SECOND_ENCODERS,
            "hidden_state": HIDDEN_STATES,
        }
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(known)}.")
        if not 0 <= self.blend <= 1:
            raise ValueError(f"blend={self.blend} is not a share: give 0 (the stock encoder) to 1 (the long one).")
        if self.blend < 1 and self.long_prompt not in ("stretch", "auto"):
            raise ValueError(
                f"blend={self.blend} mixes into what the long encoder reads, but long_prompt={self.long_prompt!r} "
                "reads with the stock encoder alone: set blend=1, or long_prompt='stretch'."
            )

    def but(self, **given: Any) -> "PromptSettings":
        """These settings with other values; None leaves a value as it is.

        Raises:
            ValueError: As for new settings.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if "long_prompt" in given:
            given["why"] = ""
        return replace(self, **given) if given else self


@dataclass(frozen=True)
class WeightedText:
    """A prompt whose words weigh differently, once its syntax has been read; see `weighting`.

    Attributes:
        text: What is read, without brackets and numbers.
        weights: Characters that weigh other than 1, run by run, in order.
        parts: Where each part begins, at 0 first, and what it weighs; a part begins a window of its own.
        unmatched: Brackets that are text, since they have no partner.
    """

    text: str
    weights: tuple[Run, ...] = ()
    parts: tuple[tuple[int, float], ...] = ((0, 1.0),)
    unmatched: str = ""


@dataclass(frozen=True)
class Reading:
    """One prompt, as one text encoder reads it.

    What the UNet sees between a start and an end token is a *span*. Most spans are one window; a span of several
    windows is joined: the start token of the first, the content of all, the end token and padding of the last.

    Attributes:
        encoder: Name of the text encoder in the pipeline.
        tokens: Tokens of the whole prompt, without start and end.
        window_length: Tokens that the encoder reads at once, start and end included.
        spans: The content, span by span, window by window.
        dropped: The end of the prompt that no window holds, letter by letter; empty when nothing is dropped.
        span_length: Token states of each span, or None where a span is as long as its windows make it.
        offsets: First and last (exclusive) character of each token in `prompt.text`, dropped ones included.
        prompt: The prompt, its syntax of weights already read.
        weights: Tokens that weigh other than 1, run by run.
        window_weights: What each window weighs; empty when all of them weigh 1.
    """

    encoder: str
    tokens: int
    window_length: int
    spans: tuple[tuple[Window, ...], ...] = field(repr=False)
    dropped: str = ""
    span_length: int | None = None
    offsets: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    prompt: WeightedText = field(default=WeightedText(""), repr=False)
    weights: tuple[Run, ...] = field(default=(), repr=False)
    window_weights: tuple[float, ...] = field(default=(), repr=False)

    @property
    def windows(self) -> tuple[Window, ...]:
        """All windows in order."""
        return tuple(window for span in self.spans for window in span)

    @property
    def tokens_read(self) -> int:
        """Tokens that some window holds."""
        return sum(map(len, self.windows))

    @property
    def length(self) -> int:
        """Token states that the UNet gets, before they are balanced with other prompts of the call."""
        return sum(self.span_length or self.window_length + sum(map(len, span[:-1])) for span in self.spans)

    @property
    def positions(self) -> tuple[int, ...]:
        """Where among the token states the UNet gets each token that is read, in the order of the tokens."""
        positions: list[int] = []
        first = 0
        for span in self.spans:
            positions += range(first + 1, first + 1 + sum(map(len, span)))
            first += self.span_length or self.window_length + sum(map(len, span[:-1]))
        return tuple(positions)

    def __str__(self) -> str:
        sizes = [str(len(window)) for window in self.windows]
        shown = ", ".join(sizes if len(sizes) <= 8 else [*sizes[:6], "...", sizes[-1]])
        line = f"{self.encoder}: {len(sizes)} window{'s' * (len(sizes) != 1)} of {self.window_length} positions"
        line += f" ({shown} tokens), {self.length} states"
        if self.weights:
            line += f", {sum(stop - start for start, stop, _ in self.weights)} tokens weighted"
        if not self.dropped:
            return f"{line}, nothing dropped"
        return f"{line}, {self.tokens - self.tokens_read} of {self.tokens} tokens dropped: {self.dropped!r}"


@dataclass(frozen=True)
class PromptReport:
    """What a pipeline makes of one prompt; `str()` says it to a person.

    Attributes:
        prompt: The prompt.
        long_prompt: The strategy, `"auto"` already decided.
        readings: One for each text encoder.
        why: Why this strategy is the default, in words; empty where somebody chose it.
    """

    prompt: str
    long_prompt: str
    readings: tuple[Reading, ...]
    why: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of the prompt as the first encoder counts them, without start and end."""
        return self.readings[0].tokens

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens in each window of the first encoder, without start and end."""
        return tuple(map(len, self.readings[0].windows))

    @property
    def dropped(self) -> str:
        """The longest end of the prompt that an encoder does not read; empty when all of them read everything."""
        return max((reading.dropped for reading in self.readings), key=len)

    def __str__(self) -> str:
        head = f"{self.tokens} token{'s' * (self.tokens != 1)}, long_prompt={self.long_prompt!r}"
        head += f" ({self.why})" if self.why else ""
        return "\n".join([head, *(f"  {reading}" for reading in self.readings)])


def read_prompt(
    prompt: str | WeightedText,
    tokenizer: PreTrainedTokenizerBase,
    cut: Cut = "windows",
    *,
    encoder: str = "text_encoder",
    span_length: int | None = None,
    window_length: int | None = None,
) -> Reading:
    """Cuts a prompt into the windows of one text encoder.

    The prompt is tokenized once and the tokens are dealt out, so the count is the same for every way to cut. An empty
    prompt is one empty window.

    Args:
        prompt: Any text, or one with weights, whose parts are cut one by one.
        tokenizer: It has to know offsets (every tokenizer of transformers 5 does).
        cut: `"first"` keeps the first window and drops the rest; `"windows"` fills window after window, wherever it
            cuts; `"packed"` ends a window with the last sentence that fits it, a sentence that is longer than a window
            after a comma or between words; `"sentences"` gives each sentence its own window, longer ones several,
            joined to one span.
        encoder: Name for the report.
        span_length: With `"windows"` and `"packed"`: joins windows to spans of this many states, so that they lie
            position by position beside those of another encoder with this window.
        window_length: Tokens that the encoder reads at once, start and end included; None is the tokenizer's
            `model_max_length`.

    Returns:
        The reading.

    Raises:
        ValueError: If `span_length` has no room for start and end.
    """
    if span_length is not None and span_length < 3:
        raise ValueError(f"span_length={span_length} has no room beside start and end: give at least 3.")
    weighted = WeightedText(prompt) if isinstance(prompt, str) else prompt
    text = weighted.text
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = tuple(encoding["input_ids"]), tuple((start, stop) for start, stop in encoding["offset_mapping"])
    window_length = window_length or tokenizer.model_max_length
    size = window_length - 2

    def first_token(character: int) -> int:
        return bisect_left(offsets, (character, 0))

    borders = _borders(text, offsets, tokenizer.convert_ids_to_tokens(ids)) if cut in ("packed", "sentences") else []
    starts = [first_token(character) for character, _ in weighted.parts]
    spans: list[tuple[Window, ...]] = []
    window_weights: list[float] = []
    for (start, stop), (_, weight) in zip(pairwise([*starts, len(ids)]), weighted.parts, strict=True):
        if cut == "sentences":
            inner = [border for border in borders[0] if start < border < stop]
            sentences = [pair for pair in pairwise([start, *inner, stop]) if pair[0] < pair[1]]
            found = [tuple(w for pair in sentences or [(start, stop)] for w in _windows(ids, *pair, size, borders))]
        elif span_length is not None:
            found = [
                tuple(_windows(ids, *pair, size, borders)) for pair in _pieces(start, stop, span_length - 2, borders)
            ]
        else:
            found = [(window,) for window in _windows(ids, start, stop, size, borders)]
        spans += found
        window_weights += [weight] * sum(map(len, found))
    dropped = ""
    if cut == "first":
        kept = len(spans[0][0])
        spans, window_weights = spans[:1], window_weights[:1]
        if kept < len(ids):
            dropped = text[offsets[kept][0] : offsets[-1][1]]
    runs = ((first_token(start), first_token(stop), weight) for start, stop, weight in weighted.weights)
    return Reading(
        encoder,
        len(ids),
        window_length,
        tuple(spans),
        dropped,
        span_length,
        offsets,
        weighted,
        tuple(run for run in runs if run[0] < run[1]),
        tuple(window_weights) if set(window_weights) != {1.0} else (),
    )


def sentence_spans(prompt: str) -> list[tuple[int, int]]:
    """First and last (exclusive) character of each sentence that is more than white space."""
    spans = [(boundary["start_index"], boundary["end_index"]) for boundary in get_sentence_boundaries("en", prompt)]
    return [(start, stop) for start, stop in spans if prompt[start:stop].strip()]


def sentence_bounds(prompt: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Bounds of each sentence, counted in tokens: a token belongs to the sentence in which it begins."""
    firsts = [bisect_left(offsets, (start, 0)) for start, _ in sentence_spans(prompt)[1:]]
    return [(first, stop) for first, stop in pairwise([0, *firsts, len(offsets)]) if first < stop]


_PHRASE_END = re.compile(r"[,;:—–]\s*$")


def _borders(text: str, offsets: Sequence[tuple[int, int]], tokens: Sequence[str]) -> list[list[int]]:
    """Tokens before which a prompt may be cut, the best places first: sentences, phrases, words, pieces of words."""
    sentences = [start for start, _ in sentence_bounds(text, offsets)[1:]]
    words = [k for k in range(1, len(offsets)) if text[offsets[k][0] - 1 : offsets[k][0]].isspace()]
    phrases = [k for k in words if _PHRASE_END.search(text[offsets[k - 1][0] : offsets[k][0]])]
    return [sentences, phrases, words, [k for k in range(1, len(tokens)) if tokens[k - 1].endswith("</w>")]]


def _pieces(start: int, stop: int, size: int, borders: list[list[int]]) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive pieces of at most `size` tokens; no tokens are one empty piece.

    A piece that is followed by another ends with the last sentence that it can hold; where it cannot hold one, at the
    best border in its second half, or full.
    """
    while stop - start > size:
        end = start + size
        for kind, least in zip(borders, (1, *[size // 2] * len(borders)), strict=False):
            last = kind[bisect_right(kind, start + size) - 1] if kind else 0
            if start + least <= last <= start + size:
                end = last
                break
        yield start, end
        start = end
    yield start, stop


def _windows(ids: Window, start: int, stop: int, size: int, borders: list[list[int]]) -> Iterator[Window]:
    return (ids[first:last] for first, last in _pieces(start, stop, size, borders))
