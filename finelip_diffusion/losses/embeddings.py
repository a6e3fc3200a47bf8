"""Terms of one embedding for each image and each caption."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .primitives import infoloob_loss, infonce_loss, products, same_or_diagonal, sigmoid_loss, softened_loss, widen


def infonce(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, same: Tensor, *, label_smoothing: float = 0.1
) -> Tensor:
    """CLIP's loss between images and whole captions, smoothed as Long-CLIP and FineLIP's baseline have it.

    Not in their code: further captions of an image are no negatives of it.
    """
    return infonce_loss(logit_scale * products(image_embeds, text_embeds), label_smoothing, same)


def infonce_short(
    image_embeds: Tensor, short_embeds: Tensor, logit_scale: Tensor, same: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """CLIP's loss between images and short captions: TULIP's second term (arXiv 2410.10034, section 3.3)."""
    return infonce_loss(logit_scale * products(image_embeds, short_embeds), label_smoothing, same)


def sigmoid(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor, same: Tensor
) -> Tensor:
    """SigLIP's loss between images and whole captions. Not there: further captions of an image are no negatives."""
    return sigmoid_loss(logit_scale * products(image_embeds, text_embeds) + logit_bias, same)


def hn_clip(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    same: Tensor,
    *,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """HN-CLIP (arXiv 2608.18521): captions that are alike weigh more against each other.

        InfoNCE over logit_scale * (v . t + gamma * stopgrad(t . t)), the second part off the diagonal alone

    Not confirmed, the authors' code not being public: one matrix for both directions, and no smoothing.
    """
    alike = products(text_embeds, text_embeds).detach().fill_diagonal_(0)
    return infonce_loss(logit_scale * (products(image_embeds, text_embeds) + gamma * alike), label_smoothing, same)


def infoloob(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, same: Tensor) -> Tensor:
    """InfoLOOB between images and whole captions: CLOOB's loss (arXiv 2110.11316) without its retrieval.

    Both directions are summed and divided by `logit_scale`, which is not trained, as in the authors' code.
    """
    scale = logit_scale.detach()
    logits = scale * products(image_embeds, text_embeds)
    return (infoloob_loss(logits, same) + infoloob_loss(logits.T, same)) / scale


def cloob(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    same: Tensor,
    *,
    retrieval_scale: float = 8.0,
) -> Tensor:
    """CLOOB (arXiv 2110.11316): InfoLOOB between what images and captions retrieve from the batch.

    A modern Hopfield network answers an embedding x with softmax(retrieval_scale * x . stored) times what is stored,
    of length 1. What image i and caption j retrieve from the images are compared, and what they retrieve from the
    captions; the sum of both is divided by `logit_scale`, which is not trained. The batch is what is stored.
    """
    images, texts, scale = widen(image_embeds), widen(text_embeds), logit_scale.detach()

    def retrieved(states: Tensor, stored: Tensor) -> Tensor:
        return F.normalize(products((retrieval_scale * products(states, stored)).softmax(-1), stored.mT), dim=-1)

    from_images = products(retrieved(images, images), retrieved(texts, images))
    from_texts = products(retrieved(texts, texts), retrieved(images, texts))
    return (infoloob_loss(scale * from_images, same) + infoloob_loss(scale * from_texts, same)) / scale


def softened(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    same: Tensor,
    progress: Tensor,
    *,
    softness: float = 0.2,
    among: Literal["all", "alike"] = "all",
    rise: Literal["none", "linear"] = "none",
) -> Tensor:
    """InfoNCE whose target gives a share to wrong pairs, since they may fit, too.

    The defaults are PyramidCLIP's (arXiv 2204.14095): the same share for each wrong pair. LightCLIP (arXiv 2312.00674)
    shares by likeness, and more as training goes on, when likeness can be trusted: `among="alike"`, by the softmax of
    the detached logits, and `rise="linear"`, from 0 at the start to `softness` at the end. Its code is not public:
    that the share rises linearly, and that the softmax has the loss's own scale, are our reading.

    Args:
        image_embeds: (B, E), of length 1.
        text_embeds: (B, E), of length 1.
        logit_scale: ().
        same: (B, B).
        progress: (B,), the share of the training that is done, the same everywhere.
        softness: share of the target that wrong pairs get together.
        among: how they share it.
        rise: how the share grows.
    """
    logits = logit_scale * products(image_embeds, text_embeds)
    share = softness * (widen(progress).mean() if rise == "linear" else 1.0)
    both = []
    for rows in (logits, logits.T):
        alike = rows.detach().masked_fill(same_or_diagonal(rows, same), -math.inf) if among == "alike" else None
        weights = None if alike is None else (alike - alike.amax(1, keepdim=True).clamp(min=-1e30)).exp()
        both.append(softened_loss(rows, share, weights, same))
    return (both[0] + both[1]) / 2


def edited(
    image_embeds: Tensor, text_embeds: Tensor, edited_embeds: Tensor, edited_valid: Tensor, logit_scale: Tensor
) -> Tensor:
    """Each image finds its caption among edits of it: the multi-negative term of HQ-CLIP (arXiv 2507.22431).

        mean over images of -log(exp(s v . t) / (exp(s v . t) + sum over its edits e of exp(s v . e)))

    Images without an edit do not count. CLIP-IN (arXiv 2508.02329) has edited images, too, and compares both ways: on
    scenes the near-duplicates of a batch are that.

    Args:
        image_embeds: (B, E), of length 1.
        text_embeds: (B, E), of length 1.
        edited_embeds: (B, N, E), of length 1.
        edited_valid: (B, N), False where a caption has fewer edits.
        logit_scale: ().

    Returns:
        A scalar; 0 where there is no edit.
    """
    own, edits = _pairs_and_edits(image_embeds, text_embeds, edited_embeds, edited_valid, logit_scale)
    losses = torch.cat([own, edits], dim=1).logsumexp(1) - own[:, 0]
    has = edited_valid.any(1)
    return losses.masked_fill(~has, 0).sum() / has.sum().clamp(min=1)


def neg_clip(
    image_embeds: Tensor,
    text_embeds: Tensor,
    edited_embeds: Tensor,
    edited_valid: Tensor,
    logit_scale: Tensor,
    same: Tensor,
) -> Tensor:
    """InfoNCE whose images see the edits of all captions of the batch as further wrong captions (NegCLIP, 2210.01936).

    Edits of further captions of an image stay in its softmax, since they are wrong of it.

    Args:
        image_embeds: (B, E), of length 1.
        text_embeds: (B, E), of length 1.
        edited_embeds: (B, N, E), of length 1.
        edited_valid: (B, N).
        logit_scale: ().
        same: (B, B).
    """
    logits = logit_scale * products(image_embeds, text_embeds)
    edits = logit_scale * products(image_embeds, edited_embeds.flatten(0, 1))  # (B, B N)
    edits = edits.masked_fill(~edited_valid.flatten(), -math.inf)
    excluded = same_or_diagonal(logits, same) & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    right = torch.arange(len(logits), device=logits.device)
    of_images = F.cross_entropy(torch.cat([logits.masked_fill(excluded, -math.inf), edits], dim=1), right)
    return (of_images + F.cross_entropy(logits.T.masked_fill(excluded.T, -math.inf), right)) / 2


def _pairs_and_edits(
    images: Tensor, texts: Tensor, edits: Tensor, valid: Tensor, logit_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of images with their captions (B, 1), and with the edits of these (B, N), -inf where there is none."""
    rows = images[:, None]  # (B, 1, E)
    own, wrong = (logit_scale * products(rows, others)[:, 0] for others in (texts[:, None], edits))
    return own, wrong.masked_fill(~valid, -math.inf)


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
    not normalized again; then smoothed InfoNCE. Components are of the whole batch, of all processes (there: of each
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
