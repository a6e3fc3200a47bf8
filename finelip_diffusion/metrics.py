"""Figures: what a reader finds of a prompt in an image, what a probe finds of it in text states, their drift."""

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
    encoding = tokenizer(str(caption), return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    offsets = encoding.offset_mapping
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


@torch.inference_mode()
def state_drift(
    encoder: CLIPTextModel, stock_encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> dict[str, dict[str, float | list[float]]]:
    """How far the token states of short prompts have moved from the stock encoder's, layer by layer.

    A UNet of Stable Diffusion 1.x attends to `last_hidden_state`, one of SDXL to `hidden_states[-2]`. The start token
    is left out: its state is the same for every prompt. So is padding.

    Args:
        encoder: the long encoder.
        stock_encoder: the one that it was made of.
        tokenizer: of both.
        prompts: texts that fit the stock encoder.

    Returns:
        For `hidden_states[0]` (the embeddings), ..., `hidden_states[L]`, and `last_hidden_state` (after the final
        norm):

        - `rms`: root mean square of the difference, relative to that of the stock states, over all tokens,
        - `cosine`: mean over all tokens of the cosine with the stock state,
        - `prompt_rms`, `prompt_cosine`: the same over the tokens of each prompt.

    Raises:
        ValueError: if there is no prompt, one is longer than the stock encoder reads or empty, or the encoders' layers
            or widths differ.
    """
    shapes = [(model.config.num_hidden_layers, model.config.hidden_size) for model in (encoder, stock_encoder)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The encoders have (layers, width) {shapes[0]} and {shapes[1]}: compare two of one shape.")
    rows = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts]
    limit = stock_encoder.config.max_position_embeddings
    if not rows or not all(3 <= len(row) <= limit for row in rows):
        wrong = next((len(row) for row in rows if not 3 <= len(row) <= limit), None)
        found = "There is no prompt" if wrong is None else f"A prompt has {wrong} tokens"
        raise ValueError(f"{found}: drift is measured on prompts of 3 to {limit} tokens, start and end included.")
    sums = []
    for row in rows:
        moved, kept = (_states(model, row) for model in (encoder, stock_encoder))  # (L + 2, T - 1, D)
        cosines = F.cosine_similarity(moved, kept, dim=-1)
        squares = [states.square().sum((1, 2)) for states in (moved - kept, kept)]
        sums.append(torch.stack([*squares, cosines.sum(1)]))
    difference, size, cosine = torch.stack(sums, dim=2)  # (L + 2, prompts) each
    counts = torch.tensor([len(row) - 1 for row in rows])
    names = [*(f"hidden_states[{layer}]" for layer in range(len(size) - 1)), "last_hidden_state"]
    return {
        name: {
            "rms": (difference[layer].sum() / size[layer].sum()).sqrt().item(),
            "cosine": (cosine[layer].sum() / counts.sum()).item(),
            "prompt_rms": (difference[layer] / size[layer]).sqrt().tolist(),
            "prompt_cosine": (cosine[layer] / counts).tolist(),
        }
        for layer, name in enumerate(names)
    }


def _states(encoder: CLIPTextModel, row: list[int]) -> Tensor:
    """A prompt's states, the start token's aside: embeddings, every layer, final norm, (L + 2, T - 1, D)."""
    output = encoder(torch.tensor([row], device=encoder.device), output_hidden_states=True)
    return torch.cat([*output.hidden_states, output.last_hidden_state])[:, 1:].double().cpu()
