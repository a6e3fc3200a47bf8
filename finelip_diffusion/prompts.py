"""Prompts as text encoders read them: token counts, windows, and the text that is dropped."""

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

from sentencex import get_sentence_boundaries
from transformers import PreTrainedTokenizerBase

LongPrompt = Literal["stretch", "truncate", "chunk", "segment", "auto"]
LONG_PROMPTS: tuple[str, ...] = get_args(LongPrompt)

Cut = Literal["first", "windows", "sentences"]
"""Ways to cut a prompt: the first window alone, window after window, or a window for each sentence."""

Window = tuple[int, ...]
"""Token ids that an encoder reads at once, without start, end and padding."""


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
        offsets: First and last (exclusive) character of each token of the prompt, dropped ones included.
    """

    encoder: str
    tokens: int
    window_length: int
    spans: tuple[tuple[Window, ...], ...] = field(repr=False)
    dropped: str = ""
    span_length: int | None = None
    offsets: tuple[tuple[int, int], ...] = field(default=(), repr=False)

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
    """

    prompt: str
    long_prompt: str
    readings: tuple[Reading, ...]

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
        return "\n".join([head, *(f"  {reading}" for reading in self.readings)])


def read_prompt(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    cut: Cut = "windows",
    *,
    encoder: str = "text_encoder",
    span_length: int | None = None,
) -> Reading:
    """Cuts a prompt into the windows of one text encoder.

    The prompt is tokenized once and the tokens are dealt out, so the count is the same for every way to cut. An empty
    prompt is one empty window.

    Args:
        prompt: Any text.
        tokenizer: Its `model_max_length` is the window, start and end included; it has to know offsets (every
            tokenizer of transformers 5 does).
        cut: `"first"` keeps the first window and drops the rest; `"windows"` goes on in further windows;
            `"sentences"` gives each sentence its own window, longer ones several, joined to one span.
        encoder: Name for the report.
        span_length: With `"windows"`: joins windows to spans of this many states, so that they lie position by
            position beside those of another encoder with this window.

    Returns:
        The reading.

    Raises:
        ValueError: If `span_length` has no room for start and end.
    """
    if span_length is not None and span_length < 3:
        raise ValueError(f"span_length={span_length} has no room beside start and end: give at least 3.")
    encoding = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = tuple(encoding["input_ids"]), encoding["offset_mapping"]
    size = tokenizer.model_max_length - 2
    dropped = ""
    spans: list[tuple[Window, ...]]
    if cut == "first":
        spans = [(ids[:size],)]
        if len(ids) > size:
            dropped = prompt[offsets[size][0] : offsets[-1][1]]
    elif cut == "sentences":
        sentences = [ids[start:stop] for start, stop in sentence_bounds(prompt, offsets)]
        spans = [tuple(piece for sentence in sentences or [()] for piece in _pieces(sentence, size))]
    elif span_length is not None:
        spans = [tuple(_pieces(span, size)) for span in _pieces(ids, span_length - 2)]
    else:
        spans = [(window,) for window in _pieces(ids, size)]
    bounds = tuple((start, stop) for start, stop in offsets)
    return Reading(encoder, len(ids), tokenizer.model_max_length, tuple(spans), dropped, span_length, bounds)


def sentence_spans(prompt: str) -> list[tuple[int, int]]:
    """First and last (exclusive) character of each sentence that is more than white space."""
    spans = [(boundary["start_index"], boundary["end_index"]) for boundary in get_sentence_boundaries("en", prompt)]
    return [(start, stop) for start, stop in spans if prompt[start:stop].strip()]


def sentence_bounds(prompt: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Bounds of each sentence, counted in tokens: a token belongs to the sentence in which it begins."""
    firsts = [bisect_left(offsets, (start, 0)) for start, _ in sentence_spans(prompt)[1:]]
    return [(first, stop) for first, stop in pairwise([0, *firsts, len(offsets)]) if first < stop]


def _pieces(ids: Window, size: int) -> list[Window]:
    """Consecutive pieces of at most `size` tokens; no tokens are one empty piece."""
    return [ids[i : i + size] for i in range(0, max(len(ids), 1), size)]
