"""Figures: what a reader finds of a prompt in an image, and what a linear probe finds of it in text states."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from .scenes import COLOURS, SHAPES, SIZES, Caption, Scene, describe, sample_scene

STOCK_CONTENT_TOKENS = 75  # what a 77-token encoder reads beside its start and end tokens
ATTRIBUTES = {"cell": tuple(range(9)), "colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES)}


@dataclass(frozen=True)
class Finding:
    """Whether an image shows one object of its prompt.

    Attributes:
        token: index of the last token of the fact, the start token being 0.
        behind: whether that token lies behind what a 77-token encoder reads.
        filled: whether anything stands in the object's cell.
        shape, colour, size: whether the attribute of what stands there is right.
    """

    token: int
    behind: bool
    filled: bool
    shape: bool
    colour: bool
    size: bool

    @property
    def found(self) -> bool:
        """Shape and colour and size, in the right cell."""
        return self.shape and self.colour and self.size


def fact_tokens(caption: Caption, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """First and last token index of each fact of a caption; the start token has index 0."""
    offsets = tokenizer(str(caption), return_offsets_mapping=True, add_special_tokens=False).offset_mapping
    spans = []
    for fact in caption.facts:
        inside = [index for index, (start, end) in enumerate(offsets) if start >= fact.start and end <= fact.end]
        spans.append((inside[0] + 1, inside[-1] + 1))
    return spans


def findings(caption: Caption, shown: Scene, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """Compares a caption, fact by fact, with the scene that an image shows.

    Args:
        caption: from `scenes.describe`.
        shown: from `scenes.read`.
        tokenizer: counts the tokens; CLIP's.
    """
    cells = {item.cell: item for item in shown.objects}
    result = []
    for fact, (_, last) in zip(caption.facts, fact_tokens(caption, tokenizer), strict=True):
        item = cells.get(fact.object.cell)
        right = {name: item is not None and getattr(item, name) == getattr(fact.object, name) for name in
                 ("shape", "colour", "size")}  # fmt: skip
        result.append(Finding(token=last, behind=last > STOCK_CONTENT_TOKENS, filled=item is not None, **right))
    return result


def as_record(finding: Finding) -> dict[str, bool | int]:
    """A finding as plain data."""
    return asdict(finding) | {"found": finding.found}


def linear_probe(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Accuracy of a linear classifier, fitted by ridge regression to one-hot labels.

    Args:
        features: (N, D), and test_features (M, D), of any scale.
        labels: (N,), and test_labels (M,), classes from 0.
    """
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    train, test = (
        F.pad((values.double() - mean) / deviation, (0, 1), value=1.0) for values in (features, test_features)
    )
    targets = F.one_hot(labels).double()
    gram = train.T @ train + 1e-3 * len(train) * torch.eye(train.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, train.T @ targets)
    return ((test @ weights).argmax(1) == test_labels).double().mean().item()


@torch.inference_mode()
def probe_text_states(
    encoder: CLIPTextModel,
    tokenizer: PreTrainedTokenizerBase,
    num_captions: int = 600,
    num_objects: tuple[int, int] = (1, 9),
) -> dict[str, dict[str, float]]:
    """What a linear probe reads of a fact from the token states that a UNet attends to.

    Half of the captions, from the training split, fit the probe; the other half, from the test split, are scored.
    Facts that do not fit the encoder's window are left out.

    Returns:
        Accuracies by attribute (cell, colour, shape, size), from the state of the fact's last token (`"last"`) and
        from the mean over its tokens (`"mean"`). Chance: 0.11, 0.13, 0.17, 0.50.
    """
    length = encoder.config.max_position_embeddings
    features: dict[str, dict[str, list[Tensor]]] = {split: {"last": [], "mean": []} for split in ("train", "test")}
    labels: dict[str, list[list[int]]] = {"train": [], "test": []}
    for split in features:
        for seed in range(num_captions // 2):
            caption = describe(sample_scene(seed, split, num_objects), seed)
            batch = tokenizer(str(caption), truncation=True, max_length=length, return_tensors="pt")
            states = encoder(batch.input_ids).last_hidden_state[0].float()  # (T, D)
            for fact, (first, last) in zip(caption.facts, fact_tokens(caption, tokenizer), strict=True):
                if last < length - 1:
                    features[split]["last"].append(states[last])
                    features[split]["mean"].append(states[first : last + 1].mean(0))
                    labels[split].append([_class(fact.object, name) for name in ATTRIBUTES])
    targets = {split: torch.tensor(rows) for split, rows in labels.items()}
    return {
        name: {
            kind: linear_probe(
                torch.stack(features["train"][kind]), targets["train"][:, column],
                torch.stack(features["test"][kind]), targets["test"][:, column],
            )
            for kind in ("last", "mean")
        }
        for column, name in enumerate(ATTRIBUTES)
    }  # fmt: skip


def _class(item: object, name: str) -> int:
    values: Sequence[object] = ATTRIBUTES[name]
    return values.index(getattr(item, name))
