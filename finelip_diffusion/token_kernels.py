"""The passes of `scores.max_similarity` as Triton kernels: similarities are made and reduced on the chip.

Only this module imports Triton, and only what runs on a GPU imports it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128  # of tokens in a tile: several images or captions where they are short, a part of one where they are long


@triton.jit
def _matches_kernel(
    image, text, image_mask, text_mask, text_maxima, text_best, image_maxima, image_best,
    N, M, P, T, E,
    MASKED_IMAGE: tl.constexpr, MASKED_TEXT: tl.constexpr, IMAGES: tl.constexpr, BLOCK_P: tl.constexpr,
    TEXTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_P tokens of IMAGES images and all tokens of TEXTS captions; a program's text maxima are of its chunk."""
    chunks = tl.cdiv(P, BLOCK_P)
    tall, wide = tl.cdiv(N, IMAGES) * chunks, tl.cdiv(M, TEXTS)
    down, across = tl.swizzle2d(tl.program_id(0) // wide, tl.program_id(0) % wide, tall, wide, 8)
    chunk = down % chunks
    first_image, first_text = down // chunks * IMAGES, across * TEXTS

    row = tl.arange(0, IMAGES * BLOCK_P)
    i, p = (first_image + row // BLOCK_P).to(tl.int64), chunk * BLOCK_P + row % BLOCK_P
    real_row = (i < N) & (p < P)
    kept_row = real_row
    if MASKED_IMAGE:
        kept_row = kept_row & (tl.load(image_mask + i * P + p, mask=real_row, other=0) != 0)
    column, e = tl.arange(0, TEXTS * BLOCK_T), tl.arange(0, BLOCK_E)
    j = (first_text + column // BLOCK_T).to(tl.int64)
    some_i, some_p = first_image + tl.arange(0, IMAGES), chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    some_j = first_text + tl.arange(0, TEXTS)
    maxima = tl.full((IMAGES, BLOCK_P, TEXTS), float("-inf"), tl.float32)
    best = tl.zeros((IMAGES, BLOCK_P, TEXTS), tl.int32)
    for start in range(0, T, BLOCK_T):
        t = start + column % BLOCK_T
        real_column = (j < M) & (t < T)
        kept_column = real_column
        if MASKED_TEXT:
            kept_column = kept_column & (tl.load(text_mask + j * T + t, mask=real_column, other=0) != 0)
        similarity = tl.zeros((IMAGES * BLOCK_P, TEXTS * BLOCK_T), tl.float32)
        for width in range(0, E, BLOCK_E):
            inside = width + e < E
            left = tl.load(
                image + ((i * P + p) * E)[:, None] + (width + e)[None, :],
                mask=real_row[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                text + ((j * T + t) * E)[None, :] + (width + e)[:, None],
                mask=real_column[None, :] & inside[:, None], other=0.0,
            )  # fmt: skip
            similarity = tl.dot(left, right, similarity, input_precision=PRECISION)
        similarity = tl.where(kept_row[:, None] & kept_column[None, :], similarity, float("-inf"))
        tile = tl.reshape(similarity, (IMAGES, BLOCK_P, TEXTS, BLOCK_T))
        of_texts, which = tl.max(tile, axis=1, return_indices=True)  # (IMAGES, TEXTS, BLOCK_T)
        which = which + chunk * BLOCK_P
        which = tl.where(of_texts > 0, which, -1 - which)
        some_t = start + tl.arange(0, BLOCK_T)
        place = (chunk * N + some_i).to(tl.int64)[:, None, None] * M * T + (some_j * T)[None, :, None] + some_t
        there = (some_i < N)[:, None, None] & (some_j < M)[None, :, None] & (some_t < T)[None, None, :]
        tl.store(text_maxima + place, of_texts, mask=there)
        tl.store(text_best + place, which.to(tl.int16), mask=there)
        of_images, which = tl.max(tile, axis=3, return_indices=True)  # (IMAGES, BLOCK_P, TEXTS)
        best = tl.where(of_images > maxima, which + start, best)
        maxima = tl.maximum(maxima, of_images)
    best = tl.where(maxima > 0, best, -1 - best)
    place = some_i.to(tl.int64)[:, None, None] * M * P + some_p[None, :, None] + (some_j * P)[None, None, :]
    there = (some_i < N)[:, None, None] & (some_p < P)[None, :, None] & (some_j < M)[None, None, :]
    tl.store(image_maxima + place, maxima, mask=there)
    tl.store(image_best + place, best.to(tl.int16), mask=there)


@triton.jit
def _gradient_kernel(
    other, other_mask, best, other_best, weights, other_weights, grad, other_grad, result, slope,
    N, M, P, T, E, own_stride, other_stride,
    MASKED: tl.constexpr, ITEMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_P tokens of ITEMS of N items, in BLOCK_E channels, a sum over M items of the other side.

    The matches of a pair are a matrix (P, T) with at most P + T entries; it is made on the chip and multiplied.
    """
    chunks = tl.cdiv(P, BLOCK_P)
    first, chunk = tl.program_id(0) // chunks * ITEMS, tl.program_id(0) % chunks
    n, p = (first + tl.arange(0, ITEMS)).to(tl.int64), chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    real = (n < N)[:, None] & (p < P)[None, :]
    weight = tl.load(weights + (n * P)[:, None] + p[None, :], mask=real, other=0.0)  # (ITEMS, BLOCK_P)
    sums = tl.zeros((ITEMS * BLOCK_P, BLOCK_E), tl.float32)
    parts = tl.cdiv(T, BLOCK_T)
    for step in range(M * parts):
        m, t = step // parts, step % parts * BLOCK_T + tl.arange(0, BLOCK_T)
        pair = n * own_stride + m * other_stride  # (ITEMS,)
        match = tl.load(best + (pair * P)[:, None] + p[None, :], mask=real, other=0).to(tl.int32)
        back = tl.load(grad + pair, mask=n < N, other=0.0)[:, None] * weight
        back = tl.where(match < 0, back * slope, back)
        match = tl.where(match < 0, -1 - match, match)
        inside = (n < N)[:, None] & (t < T)[None, :]
        other_match = tl.load(other_best + (pair * T)[:, None] + t[None, :], mask=inside, other=0).to(tl.int32)
        other_weight = tl.load(other_weights + m.to(tl.int64) * T + t, mask=t < T, other=0.0)
        other_back = tl.load(other_grad + pair, mask=n < N, other=0.0)[:, None] * other_weight[None, :]
        other_back = tl.where(other_match < 0, other_back * slope, other_back)
        other_match = tl.where(other_match < 0, -1 - other_match, other_match)  # (ITEMS, BLOCK_T)
        matrix = tl.where(t[None, None, :] == match[:, :, None], back[:, :, None], 0.0)
        matrix += tl.where(p[None, :, None] == other_match[:, None, :], other_back[:, None, :], 0.0)
        kept = t < T
        if MASKED:
            kept = kept & (tl.load(other_mask + m.to(tl.int64) * T + t, mask=kept, other=0) != 0)
        values = tl.load(
            other + ((m.to(tl.int64) * T + t) * E)[:, None] + e[None, :],
            mask=kept[:, None] & (e < E)[None, :],
            other=0.0,
        )
        flat = tl.reshape(matrix, (ITEMS * BLOCK_P, BLOCK_T))
        if HALF:
            sums = tl.dot(flat.to(tl.bfloat16), values, sums)
        else:
            sums = tl.dot(flat, values.to(tl.float32), sums, input_precision=PRECISION)
    rows = tl.reshape((n * P)[:, None] + p[None, :], (ITEMS * BLOCK_P,))
    there = tl.reshape(real, (ITEMS * BLOCK_P,))
    tl.store(result + (rows * E)[:, None] + e[None, :], sums, mask=there[:, None] & (e < E)[None, :])


def best_matches(
    image_values: Tensor, text_values: Tensor, image_mask: Tensor | None, text_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each token's largest similarity to a token of the other side, of every pair.

    Args:
        image_values: (N, P, E), contiguous; float32, bfloat16 or float16.
        text_values: (M, T, E), of the same dtype.
        image_mask, text_mask: (N, P) and (M, T), booleans or None.

    Returns:
        Of text tokens (N, M, T) the maxima, float32, and the indices of the image tokens, int16, ~index where the
        maximum is not positive; of image tokens (N, M, P) the same.
    """
    (N, P, E), (M, T, _) = image_values.shape, text_values.shape
    block_p, block_t = _block(P), _block(T)
    chunks, device = triton.cdiv(P, block_p), image_values.device
    text_maxima = torch.empty(chunks, N, M, T, device=device)
    image_maxima = torch.empty(N, M, P, device=device)
    text_best, image_best = (torch.empty_like(maxima, dtype=torch.int16) for maxima in (text_maxima, image_maxima))
    images, texts = ROWS // block_p, ROWS // block_t
    _matches_kernel[(triton.cdiv(N, images) * chunks * triton.cdiv(M, texts),)](
        image_values, text_values, _bytes(image_mask, image_values), _bytes(text_mask, text_values),
        text_maxima, text_best, image_maxima, image_best, N, M, P, T, E,
        MASKED_IMAGE=image_mask is not None, MASKED_TEXT=text_mask is not None, IMAGES=images, BLOCK_P=block_p,
        TEXTS=texts, BLOCK_T=block_t, BLOCK_E=128 // image_values.element_size(),
        PRECISION=_precision(image_values.dtype), num_warps=8, num_stages=3,
    )  # fmt: skip
    if chunks == 1:
        return text_maxima[0], text_best[0], image_maxima, image_best
    maxima, best = text_maxima.max(0, keepdim=True)
    return maxima[0], text_best.gather(0, best)[0], image_maxima, image_best


def token_gradient(
    other: Tensor,
    other_mask: Tensor | None,
    best: Tensor,
    other_best: Tensor,
    weights: Tensor,
    other_weights: Tensor,
    grad: Tensor,
    other_grad: Tensor,
    slope: float,
    texts: bool,
) -> Tensor:
    """The gradient of one side's tokens, float32.

    Args:
        other: (M, T, E), tokens of the other side, contiguous.
        other_mask: (M, T), booleans or None.
        best, other_best: What `best_matches` found for this side's tokens, (images, captions, P), and for the other's,
            (images, captions, T).
        weights, other_weights: (N, P) and (M, T), what a token counts in a mean, float32.
        grad, other_grad: (images, captions), of the mean over this side's tokens and over the other's; float32 and
            contiguous.
        slope: Factor of negative similarities.
        texts: Whether this side is that of the captions.
    """
    (M, T, E), (N, P) = other.shape, weights.shape
    block_p, block_t = _block(P), min(64, _block(T))
    items, half = ROWS // block_p, other.dtype == torch.bfloat16
    block_e = min(256 if half else 128, max(16, triton.next_power_of_2(E)))
    own_stride, other_stride = (1, N) if texts else (M, 1)
    result = torch.empty(N, P, E, device=other.device)
    _gradient_kernel[(triton.cdiv(N, items) * triton.cdiv(P, block_p), triton.cdiv(E, block_e))](
        other, _bytes(other_mask, other), best, other_best, weights, other_weights, grad, other_grad, result, slope,
        N, M, P, T, E, own_stride, other_stride,
        MASKED=other_mask is not None, ITEMS=items, BLOCK_P=block_p, BLOCK_T=block_t, BLOCK_E=block_e, HALF=half,
        PRECISION=_precision(other.dtype), num_warps=8, num_stages=2,
    )  # fmt: skip
    return result


def _block(tokens: int) -> int:
    return max(16, min(ROWS, triton.next_power_of_2(tokens)))


def _bytes(mask: Tensor | None, unused: Tensor) -> Tensor:
    """A mask as a kernel reads it; a kernel that reads none still wants a pointer."""
    return unused if mask is None else mask.contiguous().view(torch.uint8)


def _precision(dtype: torch.dtype) -> str:
    """float16 fits into TF32, whose range it lacks; float32 does as torch is set, or in three parts."""
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"
