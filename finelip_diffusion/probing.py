"""What a linear classifier reads of an object from the states of the words that state it."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scenes import ATTRIBUTES, Caption, fact_tokens

CLASSES = [len(values) for values in ATTRIBUTES.values()]
WEIGHT_DECAY = 1e-3


def stated_facts(captions: Sequence[str], tokenizer: Callable, length: int) -> Tensor:
    """Where captions state what objects are.

    Args:
        captions: `scenes.Caption`s; other texts state nothing.
        tokenizer: CLIP's.
        length: Tokens that the encoder reads; what is stated beyond them is left out.

    Returns:
        (N, 3 + number of `ATTRIBUTES`), integers: the caption, the first and the last token, and the class of each
        attribute.
    """
    rows = [
        (row, first, last, *(values.index(getattr(fact.object, name)) for name, values in ATTRIBUTES.items()))
        for row, caption in enumerate(captions)
        if isinstance(caption, Caption) and caption.facts
        for fact, (first, last) in zip(caption.facts, fact_tokens(caption, tokenizer), strict=True)
        if last < length - 1
    ]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, 3 + len(CLASSES))


def mean_states(states: Tensor, facts: Tensor) -> Tensor:
    """The mean state of the tokens of each fact, (N, D).

    Args:
        states: (B, T, D).
        facts: (N, 7), see `stated_facts`.
    """
    row, first, last = facts[:, :3].unbind(1)
    sums = F.pad(states.float().cumsum(1), (0, 0, 1, 0))  # (B, T + 1, D)
    return (sums[row, last + 1] - sums[row, first]) / (last + 1 - first)[:, None]


class FactProbe(nn.Module):
    """A linear classifier of each of the `ATTRIBUTES`, of the mean state of a fact's tokens; frozen.

    Args:
        width: D, of the states.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, sum(CLASSES)).requires_grad_(False)

    def forward(self, states: Tensor, facts: Tensor) -> Tensor:
        """Cross-entropy: a mean over attributes, the facts of a caption, and captions, those without facts as 0.

        Args:
            states: (B, T, D).
            facts: (N, 7), see `stated_facts`.
        """
        each = _cross_entropy(self.linear(mean_states(states, facts)), facts)
        row = facts[:, 0]
        counts = torch.bincount(row, minlength=len(states)).clamp(min=1)
        return (each / counts[row]).sum() / len(states)

    def right(self, states: Tensor, facts: Tensor) -> Tensor:
        """Which attributes of which facts are read as they are, (N, 4), booleans."""
        found = self.linear(mean_states(states, facts)).split(CLASSES, 1)
        return torch.stack([logits.argmax(1) for logits in found], 1) == facts[:, 3:]


def _cross_entropy(logits: Tensor, facts: Tensor) -> Tensor:
    parts = zip(logits.split(CLASSES, 1), facts[:, 3:].unbind(1), strict=True)
    return torch.stack([F.cross_entropy(part, classes, reduction="none") for part, classes in parts]).mean(0)


def fit_probe(batches: Iterable[tuple[Tensor, Tensor]]) -> FactProbe:
    """Fits a probe by logistic regression, with a small weight decay, in double precision.

    Args:
        batches: States (B, T, D) and facts (N, 7).

    Raises:
        ValueError: If there are no facts. One sentence.
    """
    found = [(mean_states(states, facts).double(), facts) for states, facts in batches if len(facts)]
    if not found:
        raise ValueError("no caption says where it states an object: give scenes, whose captions do.")
    features, facts = (torch.cat(parts) for parts in zip(*found, strict=True))
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    features = (features - mean) / deviation
    probe = FactProbe(features.shape[1]).to(features.device)
    weight = torch.zeros_like(probe.linear.weight, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros_like(probe.linear.bias, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = _cross_entropy(F.linear(features, weight, bias), facts).mean() + WEIGHT_DECAY * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        probe.linear.weight.copy_(weight / deviation)
        probe.linear.bias.copy_(bias - weight @ (mean / deviation))
    return probe
