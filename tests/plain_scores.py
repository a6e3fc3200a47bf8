"""Scores of tokens as the papers' loops, in float64, and random tokens to compare on."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGES, TEXTS, P, T, E = 5, 4, 7, 6, 16
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, where only the order of sums differs


def random_tokens(batch: int, length: int, width: int = E, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(batch, length, width, generator=generator, dtype=torch.float64), dim=-1)


def random_mask(batch: int, length: int, seed: int = 0) -> Tensor:
    """With holes, not only at the end; each row keeps its first token."""
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, 0] = True
    assert not mask.all()
    return mask


def kept(tokens: Tensor, mask: Tensor | None) -> list[Tensor]:
    return [row if mask is None else row[mask[number]] for number, row in enumerate(tokens)]


def literal_max_similarity(images: list[Tensor], texts: list[Tensor], slope: float) -> tuple[Tensor, Tensor]:
    text_to_image, image_to_text = [], []
    for image in images:
        for text in texts:
            similarity = F.leaky_relu(text @ image.T, slope)
            text_to_image.append(similarity.max(1).values.mean())
            image_to_text.append(similarity.max(0).values.mean())
    shape = len(images), len(texts)
    return torch.stack(text_to_image).view(shape), torch.stack(image_to_text).view(shape)


def literal_laps(
    image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor, aggregation: Callable[[Tensor], Tensor], keep: float
) -> Tensor:
    result = torch.zeros(len(image_tokens), len(text_tokens), dtype=image_tokens.dtype)
    for i, (cls, *patches) in enumerate(image_tokens):
        for j, text in enumerate(kept(text_tokens, text_mask)):
            mean_patch, mean_token = torch.stack(patches).mean(0), text.mean(0)
            counts = [
                (F.cosine_similarity(patch, mean_patch, dim=0) + F.cosine_similarity(patch, mean_token, dim=0)).item()
                for patch in patches
            ]
            order = sorted(range(len(patches)), key=lambda patch: -counts[patch])
            chosen, rest = order[: math.ceil(keep * len(patches))], order[math.ceil(keep * len(patches)) :]
            total = sum(math.exp(counts[patch]) for patch in rest)
            fused = sum(math.exp(counts[patch]) / total * patches[patch] for patch in rest)
            aggregated = aggregation(torch.stack([patches[patch] for patch in chosen])[None])[0]
            slim = F.normalize(torch.stack([cls, *aggregated, fused]), dim=-1)
            result[i, j] = sum(literal_max_similarity([slim], [F.normalize(text, dim=-1)], 0.1))
    return result


class Mixtures(nn.Module):
    """Three learned mixtures of the tokens, as token refinement makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Linear(E, 3, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weigh(tokens).softmax(1).transpose(1, 2) @ tokens
