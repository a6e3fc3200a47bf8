"""Primitives on a matrix of scores (`*_loss`), which the terms of all families share.

Scores have a row for each image and a column for each caption. Similarities, softmaxes and sums are made in float32 or
wider, whatever autocast is set to.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN = 0.2
"""By which FineLIP and LAPS want a right pair to score above a wrong one."""


def triplet_margin_loss(
    scores: Tensor, margin: float = MARGIN, same: Tensor | None = None, hardest: bool = False
) -> Tensor:
    """Hinge over all triplets in both directions (FineLIP, arXiv 2504.01916, section 3; the VSE loss of LAPS).

        sum over i != j of [margin + s(i, j) - s(i, i)]+ + [margin + s(j, i) - s(i, i)]+

    A sum, as in the authors' code: it grows with the square of the batch.

    Args:
        scores: (B, B).
        margin: of a right pair over a wrong one.
        same: (B, B), True where a pair is not a negative; by default the diagonal.
        hardest: counts the worst negative of each image and of each caption alone (VSE++).

    Returns:
        A scalar.

    Raises:
        ValueError: If the scores are not square, or `same` has another shape.
    """
    same = same_or_diagonal(scores, same)
    scores = widen(scores)
    right = scores.diagonal()
    of_images = (margin + scores - right[:, None]).clamp(min=0).masked_fill(same, 0)  # an image's wrong captions
    of_captions = (margin + scores - right).clamp(min=0).masked_fill(same, 0)  # a caption's wrong images
    if hardest:
        of_images, of_captions = of_images.max(1).values, of_captions.max(0).values
    return of_images.sum() + of_captions.sum()


def infonce_loss(logits: Tensor, label_smoothing: float = 0.0, same: Tensor | None = None) -> Tensor:
    """Cross-entropy of each image to its caption and of each caption to its image, averaged (CLIP, arXiv 2103.00020).

    Args:
        logits: (B, B).
        label_smoothing: share of the target spread evenly over a row's classes, the right one included.
        same: (B, B); off the diagonal, pairs of one image are left out of the softmax and of the smoothing.

    Returns:
        A scalar.

    Raises:
        ValueError: As `triplet_margin_loss` does.
    """
    same = same_or_diagonal(logits, same)
    return (cross_entropy(logits, same, label_smoothing) + cross_entropy(logits.T, same, label_smoothing)) / 2


def sigmoid_loss(logits: Tensor, same: Tensor | None = None) -> Tensor:
    """Each pair classified alone (SigLIP, arXiv 2303.15343, algorithm 1).

        -1/B * sum over i, j of log sigmoid(z(i, j) * logits(i, j)), z = 1 on the diagonal, -1 elsewhere

    Args:
        logits: (B, B), bias included.
        same: (B, B); off the diagonal, pairs of one image are left out.

    Returns:
        A scalar.

    Raises:
        ValueError: As `triplet_margin_loss` does.
    """
    same = same_or_diagonal(logits, same)
    logits = widen(logits)
    return -(F.logsigmoid(logits.diagonal()).sum() + wrong_pairs(logits, same)) / len(logits)


def infoloob_loss(logits: Tensor, same: Tensor | None = None) -> Tensor:
    """The leave-one-out bound (InfoLOOB; CLOOB, arXiv 2110.11316): the right pair is left out of the sum.

        mean over rows of (log sum over j != i of exp(logits(i, j)) - logits(i, i)), of rows alone

    Args:
        logits: (B, B).
        same: (B, B); pairs of one image are left out of the sum. A row without any other has no sum.

    Returns:
        A scalar.

    Raises:
        ValueError: As `triplet_margin_loss` does.
    """
    same = same_or_diagonal(logits, same)
    logits = widen(logits)
    others = logits.masked_fill(same, -math.inf)[~same.all(1)]
    return (others.logsumexp(1).sum() - logits.diagonal().sum()) / len(logits)


def softened_loss(
    logits: Tensor, share: Tensor | float, weights: Tensor | None = None, same: Tensor | None = None
) -> Tensor:
    """Cross-entropy of rows whose target gives a share to wrong pairs (PyramidCLIP, arXiv 2204.14095, section 3.3).

    Args:
        logits: (B, B).
        share: of the target that wrong pairs get together, 0 to 1; the right pair gets the rest.
        weights: (B, B), at least 0, by which a row's wrong pairs share it; by default all alike.
        same: (B, B); off the diagonal, pairs of one image are in neither softmax nor target.

    Returns:
        A scalar.

    Raises:
        ValueError: As `triplet_margin_loss` does.
    """
    same = same_or_diagonal(logits, same)
    excluded = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    log_shares = widen(logits).masked_fill(excluded, -math.inf).log_softmax(1)
    weights = (torch.ones_like(log_shares) if weights is None else widen(weights)).masked_fill(same, 0)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    wrong = (weights * log_shares.masked_fill(excluded, 0)).sum(1)
    return -((1 - share) * log_shares.diagonal() + share * wrong).mean()


# ---------------------------------------------------------------------------------------------------- arithmetic


def widen(tensor: Tensor) -> Tensor:
    """As float32, or float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def valid(tokens: Tensor, mask: Tensor) -> Tensor:
    """Widened, and 0 where the mask says so, whatever stands there: 0 * inf would be NaN. (B, T, E), (B, T)."""
    return widen(tokens).masked_fill(~mask[..., None], 0)


def products(rows: Tensor, columns: Tensor) -> Tensor:
    """(..., N, E), (..., M, E) -> (..., N, M)."""
    with torch.autocast(rows.device.type, enabled=False):
        return widen(rows) @ widen(columns).mT


def same_or_diagonal(scores: Tensor, same: Tensor | None) -> Tensor:
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, but each image needs one caption: (B, B).")
    if same is None:
        return torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    if same.shape != scores.shape:
        raise ValueError(
            f"same has shape {tuple(same.shape)}, but scores have {tuple(scores.shape)}: give ids[:, None] == ids."
        )
    return same


def cross_entropy(logits: Tensor, same: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Of each row to its diagonal entry, averaged; `same` as in `infonce_loss`."""
    excluded = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    log_shares = widen(logits).masked_fill(excluded, -math.inf).log_softmax(1)
    smooth = log_shares.masked_fill(excluded, 0).sum(1) / (~excluded).sum(1)
    return -((1 - label_smoothing) * log_shares.diagonal() + label_smoothing * smooth).mean()


def wrong_pairs(logits: Tensor, same: Tensor) -> Tensor:
    """Log-probability that all pairs of different images are recognized as wrong."""
    return F.logsigmoid(-logits).masked_fill(same, 0).sum()
