"""What is drawn of a caption for training: first sentence, sampled sentences, sub-captions, prompts to keep.

Everything is made of runs of the caption's own tokens: a caption is tokenized once, and it is known where in it a
sub-caption stands. Everything is a function of the caption and of one integer, the draw.
"""

import random
from collections.abc import Sequence
from typing import Literal, get_args

from ..prompts import sentence_bounds

CaptionKind = Literal["full", "first_sentence", "debias", "sub_captions", "merged_captions"]
CAPTION_KINDS: tuple[str, ...] = get_args(CaptionKind)

Span = tuple[int, int]
"""[first, stop): consecutive content tokens of a caption, start and end tokens not counted."""

Offsets = Sequence[tuple[int, int]]
"""The characters of each content token, as the tokenizer returns them."""


def sentence_runs(caption: str, offsets: Offsets) -> list[Span]:
    """The sentences of a caption; a caption without any token is one empty run."""
    return sentence_bounds(caption, list(offsets)) or [(0, len(offsets))]


def draw_captions(
    caption: str, offsets: Offsets, kind: CaptionKind, draw: int, *, number: int = 8, longest: int = 3
) -> list[list[Span]]:
    """Draws further captions out of one.

    Args:
        caption: The caption.
        offsets: The characters of each of its tokens.
        kind: What is drawn beside the caption itself:
            `"full"`: nothing.
            `"first_sentence"`: the text in front of the first ". ", or all of it (Long-CLIP's training code). A token
            counts where it begins, so a full stop that shares its token with a bracket stays.
            `"debias"`: 1 to n - 1 of the n - 1 sentences after the first, each number equally likely, in random order
            (DeBias-CLIP, arXiv 2602.22419, sentence sampling). A caption of one sentence is that sentence.
            `"sub_captions"`: `number` runs of 1 to `longest` consecutive sentences, drawn independently of each other.
            `"merged_captions"`: the same, but half of those of several sentences are sentences from anywhere, in any
            order (FLAIR, arXiv 2412.03561, as its code draws them); these have no place in the caption.
        draw: The same draw gives the same captions.
        number: Sub-captions to draw.
        longest: Sentences of the longest sub-caption.

    Returns:
        The drawn captions, each as the runs that it is made of, in order.

    Raises:
        ValueError: For an unknown kind.
    """
    if kind == "full":
        return []
    if kind == "first_sentence":
        stop = caption.find(". ")
        return [[(0, sum(start < stop for start, _ in offsets) if stop > 0 else len(offsets))]]
    rng = random.Random(f"captions {draw}")
    all_runs = sentence_runs(caption, offsets)
    if kind == "debias":
        rest = all_runs[1:] or all_runs
        return [rng.sample(rest, rng.randint(1, len(rest)))]
    if kind in ("sub_captions", "merged_captions"):
        captions = []
        for _ in range(number):
            length = rng.randint(1, min(longest, len(all_runs)))
            if kind == "merged_captions" and length > 1 and rng.random() < 0.5:
                captions.append(rng.sample(all_runs, length))
                continue
            first = rng.randint(0, len(all_runs) - length)
            captions.append([(all_runs[first][0], all_runs[first + length - 1][1])])
        return captions
    raise ValueError(f"captions={kind!r} is not one of {', '.join(CAPTION_KINDS)}.")


def draw_padding(free: int, draw: int) -> int:
    """How many of the `free` positions after a short caption move in front of it, each number equally likely.

    DeBias-CLIP's token padding: start token, padding, text, end token; it trains positions that short text never
    reaches.
    """
    return random.Random(f"padding {draw}").randint(0, max(free, 0))


def draw_short_prompt(caption: str, offsets: Offsets, draw: int, room: int) -> Span:
    """A part of a caption that an encoder of few tokens reads: whole sentences from a random one on.

    As many as fit `room` tokens; a single longer sentence is cut.
    """
    runs = sentence_runs(caption, offsets)
    first = random.Random(f"prompt {draw}").randrange(len(runs))
    start, stop = runs[first]
    for _, end in runs[first + 1 :]:
        if end - start > room:
            break
        stop = end
    return start, min(stop, start + room)


def draw_random_prompt(vocabulary: Sequence[int], draw: int, room: int) -> list[int]:
    """Random tokens, 1 to `room` of them: the replayed vocabulary of VR-LwF (arXiv 2207.09248)."""
    rng = random.Random(f"words {draw}")
    return rng.choices(vocabulary, k=rng.randint(1, room))
