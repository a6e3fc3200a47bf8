"""Terms of one embedding for each image and each caption."""

import torch
from torch import Tensor

from .primitives import infonce_loss, products, sigmoid_loss, widen


def infonce(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, same: Tensor, *, label_smoothing: float = 0.1
) -> Tensor:
    """CLIP's loss between images and whole captions, smoothed as Long-CLIP and FineLIP's baseline have it.

    Not in their code: further captions of an image are no negatives of it.
    """
    return infonce_loss(logit_scale * products(image_embeds, text_embeds), label_smoothing, same)


def sigmoid(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor, same: Tensor
) -> Tensor:
    """SigLIP's loss between images and whole captions. Not there: further captions of an image are no negatives."""
    return sigmoid_loss(logit_scale * products(image_embeds, text_embeds) + logit_bias, same)


def pca_image(
    image_embeds: Tensor,
    short_embeds: Tensor,
    logit_scale: Tensor,
    same: Tensor,
    *,
    components: int = 32,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Long-CLIP's coarse term: what the batch's images mostly differ in, against short captions (arXiv 2403.15378).

    Image embeddings are centred, cut to their first principal components, shifted back and, as in the authors' code,
    not normalised again; then smoothed InfoNCE. Components are of the whole batch, of all processes (there: of each
    process). Value and gradient are those of the authors' singular value decomposition, but the gradient stays finite
    where that has none: where singular values coincide, as those of repeated images do.

    Raises:
        ValueError: If the batch or the width does not exceed `components`.
    """
    if min(image_embeds.shape) <= components:
        raise ValueError(
            f"components={components} of a batch of {len(image_embeds)} images of width {image_embeds.shape[1]} leave "
            "nothing out: take a larger batch or fewer components."
        )
    with torch.autocast(image_embeds.device.type, enabled=False):
        embeds = widen(image_embeds)
        mean = embeds.mean(0)
        coarse = mean + _low_rank(embeds - mean, components)
    return infonce_loss(logit_scale * products(coarse, short_embeds), label_smoothing, same)


def _low_rank(matrix: Tensor, rank: int) -> Tensor:
    """The matrix of that rank that is nearest.

    It is the projection of the columns on `rank` singular vectors. To first order the projection changes only by
    turning kept vectors towards dropped ones, so that the gradient needs no more than their distances; differentiating
    the decomposition itself would divide by the distances of all.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return _low_rank(matrix.T, rank).T
    basis, values, _ = torch.linalg.svd(matrix.detach(), full_matrices=False)  # (N, N), (N,)
    kept = torch.arange(len(values), device=values.device) < rank
    distances = values.square()[:, None] - values.square()
    turns = (kept[:, None] != kept) & (distances.abs() > torch.finfo(values.dtype).eps * values[0].square())
    rates = torch.where(turns, 1 / distances.abs(), 0)
    gram = matrix @ matrix.T
    turn = basis @ (rates * (basis.T @ (gram - gram.detach()) @ basis)) @ basis.T  # zero, with the gradient
    return (basis[:, kept] @ basis[:, kept].T + turn) @ matrix
