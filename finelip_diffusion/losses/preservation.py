"""Terms that keep the latent space of the stock CLIP, on prompts that fit its 77 tokens.

`kept_*` is the trained model's, `teacher_*` the frozen stock model's, of the same
prompts (and images); no gradient reaches the teacher's. Nor does one reach `logit_scale`, the factor of both models'
cosines here: student and teacher would agree best where it is 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .primitives import products, widen


def token(
    kept_states: Tensor,
    kept_penultimate: Tensor,
    kept_mask: Tensor,
    teacher_kept_states: Tensor,
    teacher_kept_penultimate: Tensor,
) -> Tensor:
    """Mean squared error of the token states that a UNet reads, last layer plus penultimate layer.

    This project's own: no published recipe supervises token states.

    Args:
        kept_states: (B, T, D), the last, after the final norm: what Stable Diffusion 1.x reads.
        kept_penultimate: (B, T, D), of the layer before, not normed: what SDXL reads.
        kept_mask: (B, T), True = keep.
        teacher_kept_states: (B, T, D).
        teacher_kept_penultimate: (B, T, D).
    """
    pairs = ((kept_states, teacher_kept_states), (kept_penultimate, teacher_kept_penultimate))
    errors = [F.mse_loss(widen(own[kept_mask]), widen(stock[kept_mask]).detach()) for own, stock in pairs]
    return errors[0] + errors[1]


def distill(
    kept_states: Tensor,
    kept_penultimate: Tensor,
    kept_embeds: Tensor,
    kept_mask: Tensor,
    teacher_kept_states: Tensor,
    teacher_kept_penultimate: Tensor,
    teacher_kept_embeds: Tensor,
    *,
    states: float = 1.0,
) -> Tensor:
    """TULIP's first stage (arXiv 2410.10034, section 3.2), mean of 1 - cos of embeddings, and token states beside it.

    The paper distills pooled embeddings alone, and its code offers the cosine among three distances. A UNet reads
    states, which that leaves free; `states` is the factor of `token`, 0 is the paper's.

    Args:
        kept_states: As `token` takes them, as the others.
        kept_penultimate: (B, T, D).
        kept_embeds: (B, E), of length 1.
        kept_mask: (B, T), True = keep.
        teacher_kept_states: (B, T, D).
        teacher_kept_penultimate: (B, T, D).
        teacher_kept_embeds: (B, E), of length 1.
        states: At least 0.
    """
    cosines = (widen(kept_embeds) * widen(teacher_kept_embeds).detach()).sum(-1)
    loss = (1 - cosines).mean()
    if not states:
        return loss
    return loss + states * token(
        kept_states, kept_penultimate, kept_mask, teacher_kept_states, teacher_kept_penultimate
    )


def hycd(
    image_embeds: Tensor,
    kept_embeds: Tensor,
    teacher_image_embeds: Tensor,
    teacher_kept_embeds: Tensor,
    logit_scale: Tensor,
) -> Tensor:
    """Hybrid contrastive distillation (CLIP-Refine, arXiv 2504.12717): half the right pair, half the teacher.

    KL divergence of the student's softmax from the mean of the identity and the teacher's softmax; mean over rows, and
    over both directions. Against the authors' code: its logits are products of embeddings that are not normalized, at
    temperature 1; here they are cosines times `logit_scale`.

    Args:
        image_embeds: (B, E), of length 1, as are the others; image i belongs to prompt i.
        kept_embeds: (B, E).
        teacher_image_embeds: (B, E).
        teacher_kept_embeds: (B, E).
        logit_scale: ().
    """
    logits, stock = _both(image_embeds, kept_embeds, teacher_image_embeds, teacher_kept_embeds, logit_scale)
    right = torch.eye(len(stock), dtype=stock.dtype, device=stock.device)
    divergences = [
        F.kl_div(rows.log_softmax(1), (right + of_stock.softmax(1)) / 2, reduction="batchmean")
        for rows, of_stock in ((logits, stock), (logits.T, stock.T))
    ]
    return (divergences[0] + divergences[1]) / 2


def affinity(
    image_embeds: Tensor,
    kept_embeds: Tensor,
    teacher_image_embeds: Tensor,
    teacher_kept_embeds: Tensor,
    logit_scale: Tensor,
) -> Tensor:
    """Affinity mimicking (TinyCLIP, arXiv 2309.12314): cross-entropy to the teacher's softmax, both directions' mean.

    Against the authors' code: there the student's factor of the cosines is trained and the teacher has its own.

    Args:
        image_embeds: (N, E), of length 1, as are the others.
        kept_embeds: (M, E).
        teacher_image_embeds: (N, E).
        teacher_kept_embeds: (M, E).
        logit_scale: ().
    """
    logits, stock = _both(image_embeds, kept_embeds, teacher_image_embeds, teacher_kept_embeds, logit_scale)
    return (F.cross_entropy(logits, stock.softmax(1)) + F.cross_entropy(logits.T, stock.T.softmax(1))) / 2


def lwf(
    image_embeds: Tensor,
    kept_embeds: Tensor,
    teacher_image_embeds: Tensor,
    teacher_kept_embeds: Tensor,
    logit_scale: Tensor,
) -> Tensor:
    """Learning without forgetting by replayed vocabulary (VR-LwF, arXiv 2207.09248): `affinity` to random prompts.

    What makes it is the data: kept prompts of random vocabulary. Not confirmed, the authors' code not being public:
    their temperature, and the direction from text to image.
    """
    return affinity(image_embeds, kept_embeds, teacher_image_embeds, teacher_kept_embeds, logit_scale)


def proclip(kept_embeds: Tensor, teacher_kept_embeds: Tensor) -> Tensor:
    """ProCLIP's first stage (arXiv 2510.18795): each embedding, and the distances between them, stay where they were.

        sum over i of |s(i) - t(i)|^2 + sum over i < j of smooth L1(|s(i) - s(j)| - |t(i) - t(j)|)

    Sums, as in the authors' code: the second grows with the square of the batch. There, a second text of each image
    takes part in the first sum, and the student is a language model.

    Args:
        kept_embeds: (B, E), of length 1.
        teacher_kept_embeds: (B, E), of length 1.
    """
    own, stock = widen(kept_embeds), widen(teacher_kept_embeds).detach()
    distances = F.smooth_l1_loss(torch.pdist(own), torch.pdist(stock), reduction="sum")
    return F.mse_loss(own, stock, reduction="sum") + distances


def _both(
    images: Tensor, texts: Tensor, teacher_images: Tensor, teacher_texts: Tensor, logit_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of the student and of the teacher, (N, M) each."""
    scale = logit_scale.detach()
    return scale * products(images, texts), scale * products(teacher_images, teacher_texts).detach()
