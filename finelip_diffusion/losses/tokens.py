"""Terms of patches and tokens."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores import laps_scores, late_interaction, max_similarity
from .primitives import (
    MARGIN,
    cross_entropy,
    infonce_loss,
    products,
    sigmoid_loss,
    triplet_margin_loss,
    valid,
    widen,
    wrong_pairs,
)


def finelip(
    local_image_tokens: Tensor,
    local_image_mask: Tensor,
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
        local_image_mask: (B, M), True = keep.
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
        masks = (None if mask.all() else mask for mask in (local_image_mask, local_text_mask))  # all kept: less to do
        scores = late_interaction(local_image_tokens, local_text_tokens, *masks)
    elif interaction == "mean":
        images = valid(local_image_tokens, local_image_mask).sum(1)
        texts = valid(local_text_tokens, local_text_mask).sum(1)
        scores = products(F.normalize(images, dim=-1), F.normalize(texts, dim=-1))  # of length 1: sums do for means
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
    patches = F.normalize(widen(image_tokens[:, 1:]), dim=-1)
    tokens = F.normalize(valid(text_tokens, text_mask), dim=-1)
    text_to_image, image_to_text = max_similarity(patches, tokens, text_mask=text_mask)
    of_images = cross_entropy(logit_scale * image_to_text, same)
    return (of_images + cross_entropy((logit_scale * text_to_image).T, same)) / 2


def sparc(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor, logit_scale: Tensor) -> Tensor:
    """SPARC's fine-grained loss: within a pair, each token against the patches it is like (arXiv 2401.09865).

    Products of a token with the P patches, min-max normalized over patches and zeroed below 1/P, weigh the patches;
    the token and the weighted patches, both of length 1, find each other among those of the caption by cross-entropy,
    both ways. Averaged over all tokens of the batch, as in the paper's listing 1. Patches without CLS.

    Not confirmed, there being no code by the authors: that start and end token take part.

    Args:
        image_tokens: (B, 1 + P, E), not normalized.
        text_tokens: (B, T, E), not normalized.
        text_mask: (B, T), True = keep.
        logit_scale: ().
    """
    patches, tokens = widen(image_tokens[:, 1:]), valid(text_tokens, text_mask)
    weights = products(tokens, patches)  # (B, T, P)
    low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)  # torch 2.6 cannot train aminmax
    weights = (weights - low) / (high - low).clamp(min=torch.finfo(weights.dtype).eps)
    weights = weights.masked_fill(weights < 1 / patches.shape[1], 0)
    grouped = F.normalize(products(weights, patches.mT), dim=-1)  # (B, T, E): the weights' sum cancels
    logits = logit_scale * products(grouped, F.normalize(tokens, dim=-1))  # (B, T, T)
    columns = ~text_mask[:, None]
    both_ways = [
        rows.masked_fill(columns, -math.inf).log_softmax(-1).diagonal(dim1=1, dim2=2) for rows in (logits, logits.mT)
    ]
    found = (both_ways[0] + both_ways[1]).masked_fill(~text_mask, 0)  # (B, T)
    return -found.sum() / text_mask.sum() / 2


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
        image_tokens: (B, 1 + P, E), not normalized.
        text_tokens: (B, T, E), not normalized.
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
        sub_embeds: (B, S, E), not normalized: the pooling reads them as they are.
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
    logits = logit_scale * F.cosine_similarity(widen(pooled), widen(queries), dim=-1) + logit_bias  # (B, S + B)
    own, of_others = logits.split([count, number], dim=1)
    conditioned = -(F.logsigmoid(own).sum() + wrong_pairs(of_others, same)) / (count + number - 1)
    texts = F.normalize(widen(sub_embeds), dim=-1).unbind(1)  # S of (B, E)
    pairs = [sigmoid_loss(logit_scale * products(image_embeds, text) + logit_bias, same) for text in texts]
    return (conditioned + torch.stack(pairs).mean()) / 2


def beta_clip(
    image_tokens: Tensor,
    sub_embeds: Tensor,
    pooling: Callable[[Tensor, Tensor], Tensor],
    logit_scale: Tensor,
    same: Tensor,
    *,
    beta: float = 0.5,
    objective: Literal["ce", "bce"] = "ce",
) -> Tensor:
    """β-CLIP's contextualized contrastive alignment (arXiv 2512.12678): texts of one image are half right for another.

    Each of an image's S sub-captions pools the image's patches, and what it gets is compared with the sub-captions of
    all images. Its own counts 1, the others of its image `beta`, those of other images 0: as the target of a softmax,
    made to sum to 1 (`"ce"`); or, each pair by itself, as the weight of a right pair among wrong ones (`"bce"`). Both
    directions' mean.

    Against the authors' code: their pooling has two linear layers behind it and a logit scale of its own; an image's
    whole caption and 30 phrases are among its texts; `bce` there has no bias either.

    Args:
        image_tokens: (B, 1 + P, E), CLS first, which is not pooled.
        sub_embeds: (B, S, E), not normalized.
        pooling: (B, Q, E) queries, (B, P, E) tokens -> (B, Q, E).
        logit_scale: ().
        same: (B, B).
        beta: what the other texts of an image count.
        objective: `"ce"` or `"bce"`.

    Raises:
        ValueError: If `objective` is unknown.
    """
    number, count = sub_embeds.shape[:2]
    pooled = F.normalize(widen(pooling(sub_embeds, image_tokens[:, 1:])), dim=-1).flatten(0, 1)  # (B S, E)
    logits = logit_scale * products(pooled, F.normalize(widen(sub_embeds), dim=-1).flatten(0, 1))  # (B S, B S)
    own = torch.eye(number * count, dtype=torch.bool, device=logits.device)
    blocks = torch.arange(number, device=logits.device).repeat_interleave(count)
    of_image = blocks[:, None] == blocks
    further = same.repeat_interleave(count, 0).repeat_interleave(count, 1) & ~of_image  # of the image, told elsewhere
    counts = (of_image * beta).to(logits.dtype).masked_fill(own, 1)
    if objective == "ce":
        targets = counts / counts.sum(1, keepdim=True)
        both = [
            (targets * rows.masked_fill(further, -math.inf).log_softmax(1).masked_fill(further, 0)).sum(1).mean()
            for rows in (logits, logits.T)
        ]
        return -(both[0] + both[1]) / 2
    if objective == "bce":
        weights = torch.where(of_image, counts, 1.0).masked_fill(further, 0)
        return F.binary_cross_entropy_with_logits(logits, of_image.to(logits.dtype), weights)  # as its transpose has
    raise ValueError(f'objective is {objective!r}: choose "ce" or "bce".')


def goal_text_span(span_embeds: Tensor, sub_embeds: Tensor, sub_spans: Tensor) -> Tensor:
    """GOAL's text-span term: tokens of a long caption against the same sentences read alone (arXiv 2503.17782).

        mean over sub-captions that fit of (1 - cos(mean token of the span, embedding of the sub-caption))^2

    Tokens are averaged in front of the final norm and of the projection, and nothing is detached, as in the authors'
    code: both sides move. Against that code: all sub-captions that fit the window take part (there one, which suits a
    segment of the image best); its image-box term is not made.

    Args:
        span_embeds: (B, S, E), of the mean token of each span.
        sub_embeds: (B, S, E).
        sub_spans: (B, S, 2), first token and the one after the last; the start token is 0, and 0, 0 does not fit.

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
    fits = sub_spans[..., 1] > sub_spans[..., 0]
    cosines = F.cosine_similarity(widen(span_embeds), widen(sub_embeds), dim=-1)  # (B, S)
    return (1 - cosines).square().masked_fill(~fits, 0).sum() / fits.sum().clamp(min=1)
