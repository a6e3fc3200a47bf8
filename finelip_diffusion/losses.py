"""Losses: three primitives on a matrix of scores (`*_loss`), and the terms that a recipe names.

A term's positional parameters name what it compares: fields of `FineLIPOutput`, further embeddings of the batch, heads
(`aggregation`, `pooling`, `logit_bias`), and `same`, (B, B), True where two captions are of one image, the diagonal
included. Its keyword-only parameters are settings. Row i of an embedding is image i's or caption i's; scores have a
row for each image and a column for each caption. Similarities, softmaxes and sums are made in float32 or wider,
whatever autocast is set to; only `scores.max_similarity` and the heads follow autocast.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .scores import laps_scores, late_interaction, max_similarity

MARGIN = 0.2
"""By which FineLIP and LAPS want a right pair to score above a wrong one."""

# ------------------------------------------------------------------------------------- primitives on a score matrix


def triplet_margin_loss(
    scores: Tensor, margin: float = MARGIN, same: Tensor | None = None, hardest: bool = False
) -> Tensor:
    """Hinge over all triplets in both directions (FineLIP, arXiv 2504.01916, section 3; the VSE loss of LAPS).

        sum over i != j of [margin + s(i, j) - s(i, i)]+ + [margin + s(j, i) - s(i, i)]+

    A sum, as in the authors' code: it grows with the square of the batch.

    Args:
        scores: (B, B).
        margin: of a right pair over a wrong one.
        same: (B, B), True where a pair is no negative; by default the diagonal.
        hardest: counts the worst negative of each image and of each caption alone (VSE++).

    Returns:
        A scalar.

    Raises:
        ValueError: If the scores are not square, or `same` has another shape.
    """
    same = _same_or_diagonal(scores, same)
    scores = _widen(scores)
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
    same = _same_or_diagonal(logits, same)
    return (_cross_entropy(logits, same, label_smoothing) + _cross_entropy(logits.T, same, label_smoothing)) / 2


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
    same = _same_or_diagonal(logits, same)
    logits = _widen(logits)
    return -(F.logsigmoid(logits.diagonal()).sum() + _wrong_pairs(logits, same)) / len(logits)


# --------------------------------------------------------------------------------------------- terms, of embeddings


def infonce(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, same: Tensor, *, label_smoothing: float = 0.1
) -> Tensor:
    """CLIP's loss between images and whole captions, smoothed as Long-CLIP and FineLIP's baseline have it.

    Not in their code: further captions of an image are no negatives of it.
    """
    return infonce_loss(logit_scale * _products(image_embeds, text_embeds), label_smoothing, same)


def sigmoid(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor, same: Tensor
) -> Tensor:
    """SigLIP's loss between images and whole captions. Not there: further captions of an image are no negatives."""
    return sigmoid_loss(logit_scale * _products(image_embeds, text_embeds) + logit_bias, same)


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
        embeds = _widen(image_embeds)
        mean = embeds.mean(0)
        coarse = mean + _low_rank(embeds - mean, components)
    return infonce_loss(logit_scale * _products(coarse, short_embeds), label_smoothing, same)


# ------------------------------------------------------------------------------------------------- terms, of tokens


def finelip(
    local_image_tokens: Tensor,
    local_text_tokens: Tensor,
    local_text_mask: Tensor,
    logit_scale: Tensor,
    same: Tensor,
    *,
    interaction: Literal["clim", "mean"] = "clim",
    objective: Literal["triplet", "infonce"] = "triplet",
    margin: float = MARGIN,
) -> Tensor:
    """FineLIP's loss: a hinge over late-interaction scores of refined tokens (arXiv 2504.01916, section 3).

    The defaults are the authors' code, its warm-up aside (the loss is scaled from 0 to 1 during the first epoch). The
    other choices are ablations of the paper whose code is not public; how they are made here is our reading.

    Args:
        local_image_tokens: (B, M, E), of length 1.
        local_text_tokens: (B, N, E), of length 1.
        local_text_mask: (B, N), True = keep.
        logit_scale: (), used by `infonce` alone.
        same: (B, B).
        interaction: `"clim"`, late interaction; `"mean"`, the cosine of the mean tokens in its place.
        objective: `"triplet"`, or `"infonce"` without smoothing, of logit_scale times the scores.
        margin: of the triplets.

    Raises:
        ValueError: If `interaction` or `objective` is unknown.
    """
    if interaction == "clim":
        scores = late_interaction(local_image_tokens, local_text_tokens, text_mask=local_text_mask)
    elif interaction == "mean":
        images, texts = _widen(local_image_tokens).sum(1), _valid(local_text_tokens, local_text_mask).sum(1)
        scores = _products(F.normalize(images, dim=-1), F.normalize(texts, dim=-1))  # of length 1: sums do for means
    else:
        raise ValueError(f'interaction is {interaction!r}: choose "clim" or "mean".')
    if objective == "triplet":
        return triplet_margin_loss(scores, margin, same)
    if objective == "infonce":
        return infonce_loss(logit_scale * scores, same=same)
    raise ValueError(f'objective is {objective!r}: choose "triplet" or "infonce".')


def filip(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor, logit_scale: Tensor, same: Tensor) -> Tensor:
    """FILIP's loss: InfoNCE over mean-of-max token similarities (arXiv 2111.07783, section 3.1).

    An image looks for its caption by the mean over patches of the max over tokens, a caption for its image by the mean
    over tokens of the max over patches. Patches without CLS; valid tokens, start and end included (the paper excludes
    padding alone). The authors' code is not public; not made here: their half-precision top-quarter token choice.

    Args:
        image_tokens: (B, 1 + P, E).
        text_tokens: (B, T, E).
        text_mask: (B, T), True = keep.
        logit_scale: ().
        same: (B, B).
    """
    patches = F.normalize(_widen(image_tokens[:, 1:]), dim=-1)
    tokens = F.normalize(_valid(text_tokens, text_mask), dim=-1)
    text_to_image, image_to_text = max_similarity(patches, tokens, text_mask=text_mask)
    of_images = _cross_entropy(logit_scale * image_to_text, same)
    return (of_images + _cross_entropy((logit_scale * text_to_image).T, same)) / 2


def sparc(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor, logit_scale: Tensor) -> Tensor:
    """SPARC's fine-grained loss: within a pair, each token against the patches it is like (arXiv 2401.09865).

    Products of a token with the P patches, min-max normalised over patches and zeroed below 1/P, weigh the patches;
    the token and the weighted patches, both of length 1, find each other among those of the caption by cross-entropy,
    both ways. Averaged over the tokens of a caption, then over captions. Patches without CLS.

    Not confirmed, there being no code by the authors: that the mean is taken caption by caption (public rewritings of
    the paper's listing average over all tokens of the batch), and that start and end token take part.

    Args:
        image_tokens: (B, 1 + P, E), not normalised.
        text_tokens: (B, T, E), not normalised.
        text_mask: (B, T), True = keep.
        logit_scale: ().
    """
    patches, tokens = _widen(image_tokens[:, 1:]), _valid(text_tokens, text_mask)
    weights = _products(tokens, patches)  # (B, T, P)
    low, high = weights.aminmax(dim=-1, keepdim=True)
    weights = (weights - low) / (high - low).clamp(min=torch.finfo(weights.dtype).eps)
    weights = weights.masked_fill(weights < 1 / patches.shape[1], 0)
    grouped = F.normalize(_products(weights, patches.mT), dim=-1)  # (B, T, E): the weights' sum cancels
    logits = logit_scale * _products(grouped, F.normalize(tokens, dim=-1))  # (B, T, T)
    columns = ~text_mask[:, None]
    both_ways = [
        rows.masked_fill(columns, -math.inf).log_softmax(-1).diagonal(dim1=1, dim2=2) for rows in (logits, logits.mT)
    ]
    found = (both_ways[0] + both_ways[1]).masked_fill(~text_mask, 0)  # (B, T)
    return -(found.sum(1) / text_mask.sum(1)).mean() / 2


def laps(
    image_tokens: Tensor,
    text_tokens: Tensor,
    text_mask: Tensor,
    aggregation: Callable[[Tensor], Tensor],
    same: Tensor,
    *,
    keep: float = 0.5,
    margin: float = MARGIN,
) -> Tensor:
    """LAPS' loss: a hinge over scores whose patches the caption chose (Fu et al., CVPR 2024; see `laps_scores`).

    Against the authors' code: the hinge stays a sum over all negatives, as it is there before the switch
    `--max_violation` of the first epoch's end; the penalty on the share of chosen patches, a constant, is left out.

    Args:
        image_tokens: (B, 1 + P, E), not normalised.
        text_tokens: (B, T, E), not normalised.
        text_mask: (B, T), True = keep.
        aggregation: (B, N, E) -> (B, K, E).
        same: (B, B).
        keep: share of the patches that a caption chooses.
        margin: of the triplets.

    Raises:
        ValueError: As `laps_scores` does.
    """
    tokens = text_tokens.masked_fill(~text_mask[..., None], 0)
    return triplet_margin_loss(laps_scores(image_tokens, tokens, text_mask, aggregation, keep), margin, same)


def flair(
    image_tokens: Tensor,
    image_embeds: Tensor,
    sub_embeds: Tensor,
    pooling: Callable[[Tensor, Tensor], Tensor],
    logit_scale: Tensor,
    logit_bias: Tensor,
    same: Tensor,
) -> Tensor:
    """FLAIR's loss: the mean of its text-conditioned and its multi-positive sigmoid loss (arXiv 2412.03561).

    Text-conditioned: a text pools the image's patches, and the pooled vector is compared with that same text; an
    image's S sub-captions are positives, one sub-caption of each other image negatives; the sum over images and texts
    is divided by S + B - 1. Multi-positive: each image's embedding against all B * S sub-captions, divided by B * S.

    Against the authors' code: the other image's sub-caption is its first, not a random one; with several processes
    the batch is the joint one; further captions of an image are no negatives of it.

    Args:
        image_tokens: (B, 1 + P, E), CLS first, which is not pooled.
        image_embeds: (B, E), of length 1.
        sub_embeds: (B, S, E), not normalised: the pooling reads them as they are.
        pooling: (B, Q, E) queries, (B, P, E) tokens -> (B, Q, E).
        logit_scale: ().
        logit_bias: ().
        same: (B, B).

    Raises:
        ValueError: If there are not S sub-captions for each of the B images.
    """
    number = len(image_embeds)
    if sub_embeds.ndim != 3 or len(sub_embeds) != number:
        raise ValueError(
            f"sub_embeds has shape {tuple(sub_embeds.shape)}, but {number} images need shape ({number}, S, E)."
        )
    count = sub_embeds.shape[1]
    queries = torch.cat([sub_embeds, sub_embeds[:, 0].expand(number, -1, -1)], dim=1)  # (B, S + B, E)
    pooled = pooling(queries, image_tokens[:, 1:])
    logits = logit_scale * F.cosine_similarity(_widen(pooled), _widen(queries), dim=-1) + logit_bias  # (B, S + B)
    own, of_others = logits.split([count, number], dim=1)
    conditioned = -(F.logsigmoid(own).sum() + _wrong_pairs(of_others, same)) / (count + number - 1)
    texts = F.normalize(_widen(sub_embeds), dim=-1).unbind(1)  # S of (B, E)
    pairs = [sigmoid_loss(logit_scale * _products(image_embeds, text) + logit_bias, same) for text in texts]
    return (conditioned + torch.stack(pairs).mean()) / 2


def goal_text_span(text_tokens: Tensor, sub_embeds: Tensor, sub_spans: Tensor) -> Tensor:
    """GOAL's text-span term: tokens of a long caption against the same sentences read alone (arXiv 2503.17782).

        mean over sub-captions that fit of (1 - cos(mean token of the span, embedding of the sub-caption))^2

    Nothing is detached, as in the authors' code: both sides move. Against that code: all sub-captions that fit the
    window take part (there one, which suits a segment of the image best); tokens are averaged after the final norm and
    the projection (there before both); its image-box term is not made.

    Args:
        text_tokens: (B, T, E), of the long captions.
        sub_embeds: (B, S, E).
        sub_spans: (B, S, 2), first token and the one behind the last; the start token is 0, and 0, 0 does not fit.

    Returns:
        A scalar; 0 where no span fits.

    Raises:
        ValueError: If there is not one span for each sub-caption.
    """
    if sub_spans.shape != (*sub_embeds.shape[:2], 2):
        raise ValueError(
            f"sub_spans has shape {tuple(sub_spans.shape)}, but sub_embeds of shape {tuple(sub_embeds.shape)} need a "
            "first and a last token for each sub-caption."
        )
    position = torch.arange(text_tokens.shape[1], device=text_tokens.device)
    inside = (position >= sub_spans[..., :1]) & (position < sub_spans[..., 1:])  # (B, S, T)
    tokens = _valid(text_tokens, inside.any(1))
    spans = _products(inside.to(tokens.dtype), tokens.mT)  # (B, S, E): sums; the cosine ignores their lengths
    distances = (1 - F.cosine_similarity(spans, _widen(sub_embeds), dim=-1)).square()  # (B, S)
    fits = inside.any(-1)
    return distances.masked_fill(~fits, 0).sum() / fits.sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------- helpers


def _widen(tensor: Tensor) -> Tensor:
    """As float32, or float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _valid(tokens: Tensor, mask: Tensor) -> Tensor:
    """Widened, and 0 where the mask says so, whatever stands there: 0 * inf would be NaN. (B, T, E), (B, T)."""
    return _widen(tokens).masked_fill(~mask[..., None], 0)


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """(..., N, E), (..., M, E) -> (..., N, M)."""
    with torch.autocast(rows.device.type, enabled=False):
        return _widen(rows) @ _widen(columns).mT


def _same_or_diagonal(scores: Tensor, same: Tensor | None) -> Tensor:
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, but each image needs one caption: (B, B).")
    if same is None:
        return torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    if same.shape != scores.shape:
        raise ValueError(
            f"same has shape {tuple(same.shape)}, but scores have {tuple(scores.shape)}: give ids[:, None] == ids."
        )
    return same


def _cross_entropy(logits: Tensor, same: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Of each row to its diagonal entry, averaged; `same` as in `infonce_loss`."""
    excluded = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    log_shares = _widen(logits).masked_fill(excluded, -math.inf).log_softmax(1)
    smooth = log_shares.masked_fill(excluded, 0).sum(1) / (~excluded).sum(1)
    return -((1 - label_smoothing) * log_shares.diagonal() + label_smoothing * smooth).mean()


def _wrong_pairs(logits: Tensor, same: Tensor) -> Tensor:
    """Log-probability that all pairs of different images are recognised as wrong."""
    return F.logsigmoid(-logits).masked_fill(same, 0).sum()


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
