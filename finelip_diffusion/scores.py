"""Token-level similarities of every image with every caption: pure functions of tensors.

All of them rest on one product: the similarities of all image tokens with all text tokens, made block by block. Only
which token was the most similar one is kept for the backward pass.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

NEGATIVE_SLOPE = 0.1
"""Of the leaky ReLU that FineLIP and LAPS apply to token similarities."""

KERNEL_BLOCK = 2**26  # best matches that one launch of the Triton kernel leaves in memory, six bytes each
CPU_BLOCK, GPU_BLOCK = 2**22, 2**25
"""Similarities held at a time: 16 MB, which large caches hold; more where each step costs a launch."""

PASS, COLUMNS = 2**18, 128
"""What a core's own cache holds on a CPU: similarities of one pass over them, channels of rows that are summed."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # as many bytes as a float


def late_interaction(
    image_tokens: Tensor, text_tokens: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None
) -> Tensor:
    """FineLIP's score of every image with every caption (cross-modal late interaction; arXiv 2504.01916, section 3).

    With A = leaky_relu(text_tokens @ image_tokens.T, slope 0.1) of one pair, its score is

        mean over text tokens of (max over image tokens of A) + mean over image tokens of (max over text tokens of A)

    Args:
        image_tokens: (B_image, P, E), L2-normalized.
        text_tokens: (B_text, T, E), L2-normalized.
        image_mask: (B_image, P), boolean, True = keep; without it all tokens count.
        text_mask: (B_text, T), likewise.

    Returns:
        (B_image, B_text), within [-0.2, 2]; float64 for float64 tokens, else float32.

    Raises:
        ValueError: As `max_similarity` does.
    """
    text_to_image, image_to_text = max_similarity(image_tokens, text_tokens, image_mask, text_mask, NEGATIVE_SLOPE)
    return text_to_image + image_to_text


def max_similarity(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    negative_slope: float = 1.0,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean of each token's similarity to its best match on the other side, in both directions, for every pair.

    Extra memory: one block of similarities, and one small integer for each token of each pair, B_image * B_text *
    (P + T) bytes while both have at most 128 tokens. Under autocast the product runs in the autocast dtype; sums,
    scores and gradients are float32. Cannot be differentiated twice.

    With `fused`, an NVIDIA GPU compares tokens of at most 32 bits by Triton kernels, which never write similarities
    to memory: two bytes for each token of each pair. Their float32 products are as exact as TF32 in three parts, and
    in bfloat16 the gradient of a match is rounded to bfloat16 before it is summed in float32.

    Args:
        image_tokens: (B_image, P, E).
        text_tokens: (B_text, T, E).
        image_mask: (B_image, P), boolean, True = keep; without it all tokens count. A token that is not kept
            has similarity -inf: it is nobody's best match, has no part in a mean, and gets gradient 0.
        text_mask: (B_text, T), likewise.
        negative_slope: Factor of negative similarities (leaky ReLU), at least 0; 1 leaves them as they are.
        fused: Whether Triton kernels do the work. They agree with this module in Triton's interpreter, and have not
            run on a GPU yet: `python benchmarks/late_interaction.py --device cuda` checks them there.

    Returns:
        text_to_image: (B_image, B_text), mean over text tokens of the max over image tokens.
        image_to_text: (B_image, B_text), mean over image tokens of the max over text tokens.
        Both are float64 for float64 tokens, else float32.

    Raises:
        ValueError: If shapes do not fit, a mask is not boolean or keeps no token of a row, the slope is
            negative, or `fused` asks for what the kernels cannot do.
    """
    if not negative_slope >= 0:
        raise ValueError(f"negative_slope is {negative_slope}, but the maxima need a slope of at least 0.")
    for name, tokens, mask in (("image", image_tokens, image_mask), ("text", text_tokens, text_mask)):
        _check_tokens(name, tokens, mask)
    if image_tokens.shape[2] != text_tokens.shape[2]:
        raise ValueError(
            f"image tokens have width {image_tokens.shape[2]}, text tokens {text_tokens.shape[2]}: "
            "project both to one width."
        )
    if fused and (refusal := _refuses_kernels(image_tokens, text_tokens)):
        raise ValueError(f"fused=True, but {refusal}: leave fused out.")
    function = _FusedMaxSimilarity if fused else _MaxSimilarity
    return function.apply(image_tokens, text_tokens, image_mask, text_mask, negative_slope)


def laps_scores(
    image_tokens: Tensor,
    text_tokens: Tensor,
    text_mask: Tensor,
    aggregation: Callable[[Tensor], Tensor],
    keep: float = 0.5,
) -> Tensor:
    """LAPS' score of every image with every caption (Fu et al., CVPR 2024, "Linguistic-Aware Patch Slimming").

    Each caption chooses patches of each image: a patch counts by its cosine with the mean patch of its image plus its
    cosine with the mean token of the caption. The best ones are aggregated, the others fused into one token, weighted
    by the softmax of what they count; with CLS in front these tokens meet the caption in `late_interaction`. No
    gradient flows through the choice and the weights.

    One caption is scored at a time, and again in the backward pass, so memory does not hold each caption's images.

    Args:
        image_tokens: (B_image, 1 + P, E), CLS first; not normalized.
        text_tokens: (B_text, T, E), not normalized.
        text_mask: (B_text, T), boolean, True = keep.
        aggregation: (B_image, N, E) -> (B_image, K, E), for the N = ceil(keep * P) patches chosen.
        keep: Share of the patches chosen, above 0; at least one patch must be left to fuse.

    Returns:
        (B_image, B_text).

    Raises:
        ValueError: If `keep` leaves no patch on one side, and as `max_similarity` does.
    """
    for name, tokens, mask in (("image", image_tokens, None), ("text", text_tokens, text_mask)):
        _check_tokens(name, tokens, mask)
    patches = image_tokens.shape[1] - 1
    chosen = math.ceil(keep * patches)
    if not 0 < chosen < patches:
        raise ValueError(f"keep={keep} chooses {chosen} of {patches} patches: choose at least 1 and leave at least 1.")
    text_tokens = text_tokens.masked_fill(~text_mask.unsqueeze(-1), 0)
    with torch.no_grad():  # sums stand for means: only directions count
        directions = F.normalize(image_tokens[:, 1:], dim=-1)  # (B_image, P, E)
        mean_patch = F.normalize(image_tokens[:, 1:].sum(1, keepdim=True), dim=-1)  # (B_image, 1, E)
        mean_token = F.normalize(text_tokens.sum(1), dim=-1)  # (B_text, E)

    def score(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor, mean_token: Tensor) -> Tensor:
        counts = (directions * (mean_patch + mean_token)).sum(-1)  # (B_image, P)
        counts, order = counts.sort(dim=1, descending=True)
        weights = counts[:, chosen:].softmax(1).unsqueeze(-1)  # (B_image, P - N, 1)
        cls, patches = image_tokens[:, :1], image_tokens[:, 1:]
        patches = patches.take_along_dim(order.unsqueeze(-1), 1)
        fused = (patches[:, chosen:] * weights).sum(1, keepdim=True)  # (B_image, 1, E)
        slim = torch.cat([cls, aggregation(patches[:, :chosen]), fused], dim=1)  # (B_image, 1 + K + 1, E)
        text_tokens = F.normalize(text_tokens, dim=-1)
        return late_interaction(F.normalize(slim, dim=-1), text_tokens, text_mask=text_mask)  # (B_image, 1)

    captions = zip(text_tokens.split(1), text_mask.split(1), mean_token.split(1), strict=True)
    return torch.cat([checkpoint(score, image_tokens, *caption, use_reentrant=False) for caption in captions], dim=1)


class _MaxSimilarity(torch.autograd.Function):
    """`max_similarity` behind its checks: a dense product in blocks forward, a sparse one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        image_tokens: Tensor,
        text_tokens: Tensor,
        image_mask: Tensor | None,
        text_mask: Tensor | None,
        negative_slope: float,
    ) -> tuple[Tensor, Tensor]:
        (num_images, P, _), (num_texts, T, _) = image_tokens.shape, text_tokens.shape
        device, dtype = image_tokens.device, torch.promote_types(image_tokens.dtype, text_tokens.dtype)
        sums = torch.promote_types(dtype, torch.float32)
        if sums == torch.float32 and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        image_values, text_values = (tokens.to(dtype) for tokens in (image_tokens, text_tokens))
        if device.type == "cpu" and dtype.itemsize == 2 and not _multiplies(dtype):
            image_values, text_values = image_values.float(), text_values.float()
        image_weights = _weights(image_tokens, image_mask, sums)  # (B_image, P)
        text_weights = _weights(text_tokens, text_mask, sums)  # (B_text, T)

        text_to_image = torch.empty(num_images, num_texts, dtype=sums, device=device)
        image_to_text = torch.empty_like(text_to_image)
        best_image = torch.empty(num_images, num_texts, T, dtype=_index_dtype(P), device=device)
        best_text = torch.empty(num_images, num_texts, P, dtype=_index_dtype(T), device=device)
        for images, texts, similarity in _products(image_values, text_values):  # (images, P, texts, T)
            if image_mask is not None:
                similarity.masked_fill_(~image_mask[images, :, None, None], -math.inf)
            if text_mask is not None:
                similarity.masked_fill_(~text_mask[texts], -math.inf)
            maxima, best_image[images, texts] = _best(similarity, 1)  # (images, texts, T)
            text_to_image[images, texts] = _mean(maxima, text_weights[texts], negative_slope)
            maxima, best = (values.transpose(1, 2) for values in _best(similarity, 3))  # (images, texts, P)
            image_to_text[images, texts] = _mean(maxima, image_weights[images, None], negative_slope)
            best_text[images, texts] = best
        ctx.save_for_backward(image_tokens, text_tokens, image_weights, text_weights, best_image, best_text)
        ctx.negative_slope = negative_slope
        return text_to_image, image_to_text

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_text_to_image: Tensor, grad_image_to_text: Tensor) -> tuple[Tensor | None, ...]:
        image_tokens, text_tokens, image_weights, text_weights, best_image, best_text = ctx.saved_tensors
        device, sums, (_, P, E), T = image_tokens.device, image_weights.dtype, image_tokens.shape, text_tokens.shape[1]
        image_grad, text_grad = (
            torch.zeros(tokens.shape, dtype=sums, device=device) if needed else None
            for tokens, needed in zip((image_tokens, text_tokens), ctx.needs_input_grad, strict=False)
        )
        for images, texts in _blocks(image_tokens, text_tokens, 4):
            image_values = image_tokens[images].flatten(0, 1).to(sums)
            text_values = text_tokens[texts].flatten(0, 1).to(sums)
            best_of_texts, of_texts = _unpack(
                best_image[images, texts],
                grad_text_to_image[images, texts, None] * text_weights[texts],
                ctx.negative_slope,
            )  # (images, texts, T)
            best_of_images, of_images = _unpack(
                best_text[images, texts],
                grad_image_to_text[images, texts, None] * image_weights[images, None],
                ctx.negative_slope,
            )  # (images, texts, P)
            # Where two tokens are each other's best match, the text token's match carries both gradients.
            image_token, text_token = torch.arange(P, device=device), torch.arange(T, device=device)
            mutual = best_of_images.gather(2, best_of_texts) == text_token
            of_texts = of_texts + of_images.gather(2, best_of_texts) * mutual
            of_images = of_images.masked_fill(best_of_texts.gather(2, best_of_images) == image_token, 0)
            # A match is a row of image_values, a row of text_values, and the gradient of their product.
            first_image_row = torch.arange(0, len(image_values), P, device=device).view(-1, 1, 1)
            first_text_row = torch.arange(0, len(text_values), T, device=device).view(-1, 1)
            grads = torch.cat([of_texts.flatten(), of_images.flatten()])
            counted = grads.nonzero().squeeze(1).int()  # no pads, and no pairs that a hinge leaves out
            image_rows, text_rows = (
                torch.cat([left.flatten(), right.flatten()]).int().index_select(0, counted)
                for left, right in (
                    (first_image_row + best_of_texts, (first_image_row + image_token).expand_as(best_of_images)),
                    ((first_text_row + text_token).expand_as(best_of_texts), first_text_row + best_of_images),
                )
            )
            grads = grads.index_select(0, counted)
            if image_grad is not None:
                _add_rows(image_grad[images].view(-1, E), image_rows, text_values, text_rows, grads)
            if text_grad is not None:
                _add_rows(text_grad[texts].view(-1, E), text_rows, image_values, image_rows, grads)
        return (
            image_grad if image_grad is None else image_grad.to(image_tokens.dtype),
            text_grad if text_grad is None else text_grad.to(text_tokens.dtype),
            *(None, None, None),
        )


class _FusedMaxSimilarity(torch.autograd.Function):
    """`max_similarity` behind its checks, by `token_kernels`: dense products in both passes, reduced on the chip."""

    @staticmethod
    def forward(
        ctx: Any,
        image_tokens: Tensor,
        text_tokens: Tensor,
        image_mask: Tensor | None,
        text_mask: Tensor | None,
        negative_slope: float,
    ) -> tuple[Tensor, Tensor]:
        from .token_kernels import best_matches

        (num_images, P, _), (num_texts, T, _) = image_tokens.shape, text_tokens.shape
        device, dtype = image_tokens.device, torch.promote_types(image_tokens.dtype, text_tokens.dtype)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        image_values, text_values = (tokens.to(dtype).contiguous() for tokens in (image_tokens, text_tokens))
        image_weights = _weights(image_tokens, image_mask, torch.float32)  # (B_image, P)
        text_weights = _weights(text_tokens, text_mask, torch.float32)  # (B_text, T)
        text_to_image = torch.empty(num_images, num_texts, device=device)
        image_to_text = torch.empty_like(text_to_image)
        best_image = torch.empty(num_images, num_texts, T, dtype=torch.int16, device=device)
        best_text = torch.empty(num_images, num_texts, P, dtype=torch.int16, device=device)
        step = max(1, KERNEL_BLOCK // (num_texts * (P + T)))
        for first in range(0, num_images, step):
            images = slice(first, first + step)
            mask = None if image_mask is None else image_mask[images]
            maxima, best_image[images], own_maxima, best_text[images] = best_matches(
                image_values[images], text_values, mask, text_mask
            )
            text_to_image[images] = _mean(maxima, text_weights, negative_slope)
            image_to_text[images] = _mean(own_maxima, image_weights[images, None], negative_slope)
        ctx.save_for_backward(
            image_values, text_values, image_mask, text_mask, image_weights, text_weights, best_image, best_text
        )
        ctx.negative_slope, ctx.dtypes = negative_slope, (image_tokens.dtype, text_tokens.dtype)
        return text_to_image, image_to_text

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_text_to_image: Tensor, grad_image_to_text: Tensor) -> tuple[Tensor | None, ...]:
        from .token_kernels import token_gradient

        image_values, text_values, image_mask, text_mask, image_weights, text_weights, best_image, best_text = (
            ctx.saved_tensors
        )
        of_texts, of_images = grad_text_to_image.contiguous(), grad_image_to_text.contiguous()
        grads: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[0]:
            grads[0] = token_gradient(
                text_values, text_mask, best_text, best_image, image_weights, text_weights, of_images, of_texts,
                ctx.negative_slope, texts=False,
            ).to(ctx.dtypes[0])  # fmt: skip
        if ctx.needs_input_grad[1]:
            grads[1] = token_gradient(
                image_values, image_mask, best_image, best_text, text_weights, image_weights, of_texts, of_images,
                ctx.negative_slope, texts=True,
            ).to(ctx.dtypes[1])  # fmt: skip
        return (*grads, None, None, None)


def _refuses_kernels(*tokens: Tensor) -> str:
    """Why the Triton kernels cannot compare tokens, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    on_nvidia = torch.version.cuda is not None and all(values.is_cuda for values in tokens)
    if not on_nvidia and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tokens are not on an NVIDIA GPU"
    if any(values.dtype == torch.float64 for values in tokens):
        return "float64 tokens need exact products"
    if max(values.shape[1] for values in tokens) > torch.iinfo(torch.int16).max:
        return "there are more tokens than 16 bits count"
    return ""


def _products(image_values: Tensor, text_values: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Runs of images and of texts, and their similarities (images, P, texts, T), in parts that fit a core's cache."""
    (_, P, _), (_, T, _) = image_values.shape, text_values.shape
    for images, texts in _blocks(image_values, text_values):
        block = image_values[images].flatten(0, 1) @ text_values[texts].flatten(0, 1).T
        block = block.view(-1, P, block.shape[1] // T, T)
        some = len(block) if block.is_cuda else max(1, PASS // block[0].numel())
        for number, part in enumerate(block.split(some)):
            first = images.start + number * some
            yield slice(first, first + len(part)), texts, part


def _blocks(image_tokens: Tensor, text_tokens: Tensor, factor: int = 1) -> Iterator[tuple[slice, slice]]:
    """Runs of images and of texts whose similarities fill `factor` blocks, about as many images as texts."""
    num_images, num_texts = len(image_tokens), len(text_tokens)
    elements = factor * (CPU_BLOCK if image_tokens.device.type == "cpu" else GPU_BLOCK)
    pairs = max(1, elements // (image_tokens.shape[1] * text_tokens.shape[1]))
    some_texts = min(num_texts, max(math.isqrt(pairs), pairs // num_images))
    some_images = max(1, pairs // some_texts)
    for image in range(0, num_images, some_images):
        for text in range(0, num_texts, some_texts):
            yield slice(image, image + some_images), slice(text, text + some_texts)


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in a half precision; one that does not takes five times as long as in float32."""
    return dtype == torch.bfloat16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _weights(tokens: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What each token counts in a mean over tokens; (B, N, E) -> (B, N)."""
    kept = torch.ones(tokens.shape[:2], dtype=dtype, device=tokens.device) if mask is None else mask.to(dtype)
    return kept / kept.sum(1, keepdim=True)


def _mean(maxima: Tensor, weights: Tensor, negative_slope: float) -> Tensor:
    maxima = F.leaky_relu(maxima.to(weights.dtype), negative_slope)  # monotone: the same before the maximum and behind
    return (maxima.masked_fill(weights == 0, 0) * weights).sum(-1)


def _best(similarity: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The maximum over a dimension, and its index i; ~i where the maximum is not positive.

    The largest index of those that reach the maximum, and 0 where a maximum is NaN. A difference to the maximum is 0
    or negative, so its sign bit alone says which: passes over integers, which take half the time of `Tensor.max`.
    """
    integer = _INTEGERS[similarity.element_size()]
    index = torch.arange(similarity.shape[dim], dtype=integer, device=similarity.device)
    index = index.view([-1 if other == dim else 1 for other in range(similarity.ndim)])
    maxima = similarity.amax(dim, keepdim=True)
    signs = (similarity - maxima).view(integer).bitwise_right_shift_(8 * similarity.element_size() - 1)
    best = signs.bitwise_or_(index).amax(dim).clamp_(min=0)
    maxima = maxima.squeeze(dim)
    return maxima, torch.where(maxima > 0, best, ~best)


def _index_dtype(tokens: int) -> torch.dtype:
    """The smallest one that holds an index i of a token, or ~i = -1 - i where the maximum was not positive."""
    return next(dtype for dtype in (torch.int8, torch.int16, torch.int32) if tokens - 1 <= torch.iinfo(dtype).max)


def _unpack(best: Tensor, grads: Tensor, negative_slope: float) -> tuple[Tensor, Tensor]:
    """Indices of tokens, and the gradients behind the leaky ReLU at their similarities."""
    negative = best < 0
    return torch.where(negative, ~best, best).long(), torch.where(negative, negative_slope * grads, grads)


def _add_rows(target: Tensor, target_rows: Tensor, source: Tensor, source_rows: Tensor, weights: Tensor) -> None:
    """target[target_rows] += weights * source[source_rows], one sum for each row of the target."""
    order = _argsort(target_rows, len(target))
    target_rows, source_rows, weights = (
        values.index_select(0, order) for values in (target_rows, source_rows, weights)
    )
    rows = torch.arange(len(target), dtype=target_rows.dtype, device=target.device)
    starts = torch.searchsorted(target_rows, rows, out_int32=True)
    columns = COLUMNS if source.device.type == "cpu" else source.shape[1]
    for sums, values in zip(target.split(columns, dim=1), source.split(columns, dim=1), strict=True):
        sums += F.embedding_bag(source_rows, values, starts, mode="sum", per_sample_weights=weights)


def _argsort(rows: Tensor, stop: int) -> Tensor:
    """Stable order of integers in [0, stop); NumPy sorts those of 16 bits by radix, ten times as fast as torch."""
    if rows.device.type != "cpu" or stop > 2**15:
        return rows.argsort(stable=True)
    return torch.from_numpy(rows.to(torch.int16).numpy().argsort(kind="stable"))


def _check_tokens(name: str, tokens: Tensor, mask: Tensor | None) -> None:
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(
            f"{name}_tokens have shape {tuple(tokens.shape)}: "
            "give tokens of shape (batch, tokens, width), none of the three 0."
        )
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"{name}_mask is {mask.dtype} of shape {tuple(mask.shape)}: "
            f"give booleans of shape {tuple(tokens.shape[:2])}, True = keep."
        )
    if not mask.any(1).all():
        empty = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"{name}_mask keeps no token of row {empty}: a mean needs at least one, leave the row out.")
