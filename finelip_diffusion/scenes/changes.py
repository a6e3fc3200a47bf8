"""One change at a time to a caption in sentences: what a model makes of each shows what it has learned to read."""

import random
from collections.abc import Callable

from .facts import Caption, Fact
from .families import BETWEEN, preamble
from .noise import american, lower, misspelled, unpunctuated, upper
from .wordings import describe
from .world import Scene

TYPOS = 0.08  # share of words


def _sentences(caption: Caption) -> tuple[str, list[tuple[str, Fact]]]:
    """The opening, and each object's sentence with its fact, which begins where the sentence does."""
    starts = [fact.start for fact in caption.facts]
    stops = [*(start - 1 for start in starts[1:]), len(caption)]
    told = zip(starts, stops, caption.facts, strict=True)
    return caption[: starts[0] - 1], [(caption[start:stop], fact) for start, stop, fact in told]


def _together(caption: Caption, parts: list[tuple[str, Fact | None]], joint: str = " ") -> Caption:
    """A caption in other parts; a fact begins where its part does, after a bullet."""
    facts, length = [], 0
    for text, fact in parts:
        if fact is not None:
            start = length + text.startswith("- ") * 2
            facts.append(Fact(fact.object, start, start + fact.end - fact.start))
        length += len(text) + len(joint)
    return caption.put(joint.join(text for text, _ in parts), facts)


def reordered(caption: Caption, seed: int) -> Caption:
    """Its sentences in another order, the opening last."""
    opening, told = _sentences(caption)
    random.Random(f"order {seed}").shuffle(told)
    return _together(caption, [*told, (opening, None)])


def padded(caption: Caption, seed: int) -> Caption:
    """With sentences that say nothing before it and after every second object."""
    rng = random.Random(f"fillers {seed}")
    opening, told = _sentences(caption)
    parts: list[tuple[str, Fact | None]] = [(preamble(rng, 2), None), (opening, None)]
    fillers = rng.sample(BETWEEN, len(told) // 2)
    for number, sentence in enumerate(told, 1):
        parts += [sentence, *([(fillers.pop(), None)] if number % 2 == 0 else [])]
    return _together(caption, parts)


def bulleted(caption: Caption) -> Caption:
    """As a list, a sentence a line."""
    opening, told = _sentences(caption)
    return _together(caption, [(opening, None), *((f"- {text}", fact) for text, fact in told)], "\n")


CHANGES: dict[str, Callable[[Scene, int], Caption]] = {
    "as it is": lambda scene, seed: describe(scene, seed),
    "small letters": lambda scene, seed: lower(describe(scene, seed)),
    "capitals": lambda scene, seed: upper(describe(scene, seed)),
    "no punctuation": lambda scene, seed: unpunctuated(describe(scene, seed)),
    "American spelling": lambda scene, seed: american(describe(scene, seed)),
    "typos": lambda scene, seed: misspelled(describe(scene, seed), seed, TYPOS),
    "order": lambda scene, seed: reordered(describe(scene, seed), seed),
    "fillers": lambda scene, seed: padded(describe(scene, seed), seed),
    "list": lambda scene, seed: bulleted(describe(scene, seed)),
    "tags": lambda scene, seed: describe(scene, seed, wording="tags"),
}
"""By name, a scene's caption with that change."""
