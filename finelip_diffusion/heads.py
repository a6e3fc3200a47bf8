"""Heads that a recipe trains beside the model, and the token scores by which images and captions are compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints import listed, read_checkpoint
from .locations import locate
from .model import FineLIPConfig, FineLIPModel, last_tokens
from .refinement import AttentionPooling, TokenRefinement
from .scores import laps_scores, late_interaction, max_similarity

HEADS_FILE = "heads.safetensors"
LAPS_SHARE = 0.5  # of the patches, that a caption chooses

Tokens = tuple[Tensor, Tensor]
"""(B, N, E), and their mask (B, N), True = keep."""


@dataclass(frozen=True)
class TokenScore:
    """How images and captions are compared token by token.

    Attributes:
        name: of the score in a report.
        image: (B, 1 + P, E), CLS first, not normalized -> what is compared of an image, (B, M, E).
        text: (B, T, E) and mask -> what is compared of a caption, (B, N, E) and mask.
        compare: both -> scores (B_image, B_text) by which an image looks for its caption, and those by which a caption
            looks for its image.
    """

    name: str
    image: Callable[[Tensor], Tensor]
    text: Callable[[Tensor, Tensor], Tokens]
    compare: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def load_heads(source: str | Path) -> dict[str, nn.Module]:
    """The heads that `train/finetune_encoder.py` leaves beside a model: `aggregation` (LAPS), `pooling` (FLAIR).

    Args:
        source: Whatever `load_clip` takes.

    Returns:
        Name -> module, in evaluation mode; empty where the source has none, as a plain CLIP.

    Raises:
        ValueError: If the file is damaged, incomplete, or holds other heads. One sentence.
    """
    _, folder, config = locate(source, None, {})
    if folder is None or config is None or config.get("model_type") != FineLIPConfig.model_type:
        return {}
    file = folder / HEADS_FILE
    if not file.is_file():
        return {}
    state = {name.removeprefix("objective."): tensor for name, tensor in read_checkpoint(file).items()}
    state.pop("logit_bias", None)  # a constant in every logit: it changes no rank
    heads: dict[str, nn.Module] = {}
    for name in dict.fromkeys(key.split(".")[0] for key in state):
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
        try:
            heads[name] = _HEADS[name](own)
            heads[name].load_state_dict(own)
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{file} holds a head {name!r} that cannot be read: it must be {' or '.join(_HEADS)} with the weights "
                f"that finetune_encoder.py writes, but has {listed(own)}; train it again."
            ) from error
        heads[name].eval()
    return heads


_HEADS: dict[str, Callable[[Mapping[str, Tensor]], nn.Module]] = {
    "aggregation": lambda own: TokenRefinement(len(own["weigh.0.weight"]), len(own["weigh.3.weight"])),
    "pooling": lambda own: AttentionPooling(len(own["norm_queries.weight"])),
}


def finelip_score(model: FineLIPModel) -> TokenScore:
    """FineLIP's token score: refined tokens where the model refines them, else all tokens."""

    def image(tokens: Tensor) -> Tensor:
        tokens, mask = model.local_image(tokens)
        return tokens.masked_fill(~mask[..., None], 0)  # what does not count is told by its length

    def compare(image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        counts = None if model.config.adaptive_share is None else image.any(-1)
        scores = late_interaction(image, text, counts, mask)
        return scores, scores

    return TokenScore("finelip", image, model.local_text, compare)


def own_score(model: FineLIPModel, heads: Mapping[str, nn.Module]) -> TokenScore | None:
    """The score that a model was trained for, where it is neither the global cosine nor FineLIP's.

    Args:
        model: whose configuration names its score; one that names none is known by its heads.
        heads: from `load_heads`.

    Returns:
        LAPS', FLAIR's or FILIP's score, or None.

    Raises:
        ValueError: If the configuration names a score whose head is missing, or that there is not.
    """
    name = model.config.score or ("laps" if "aggregation" in heads else "flair" if "pooling" in heads else None)
    if name in (None, "global", "finelip"):
        return None
    settings = model.config.score_settings or {}
    try:
        return OWN_SCORES[name](heads, **settings)
    except KeyError as error:
        raise ValueError(
            f"the model was trained for the score {name!r}, which needs {error}: its {HEADS_FILE} is missing, or the "
            f"score is not one of {', '.join(OWN_SCORES)}."
        ) from error


def _same(tokens: Tensor) -> Tensor:
    return tokens


def _both(tokens: Tensor, mask: Tensor) -> Tokens:
    return tokens, mask


def _laps(heads: Mapping[str, nn.Module], keep: float = LAPS_SHARE, **_: Any) -> TokenScore:
    """LAPS (Fu et al., CVPR 2024): the caption chooses patches, which are aggregated; as in training."""

    def compare(
        image: Tensor, text: Tensor, mask: Tensor, *, aggregation: nn.Module = heads["aggregation"]
    ) -> tuple[Tensor, Tensor]:
        scores = laps_scores(image, text, mask, aggregation.to(image.device), keep)
        return scores, scores

    return TokenScore("laps", _same, _both, compare)


def _flair(heads: Mapping[str, nn.Module], **_: Any) -> TokenScore:
    """FLAIR (arXiv 2412.03561, section 3.2): a caption pools an image's patches, and is compared with what it gets."""
    return TokenScore("flair", _same, _end, partial(_pooled_cosine, heads["pooling"]))


def _end(tokens: Tensor, mask: Tensor) -> Tokens:
    return last_tokens(tokens, mask)[:, None], mask.new_ones(len(mask), 1)


def _pooled_cosine(pooling: nn.Module, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """cos(pool(patches; t), t) of every image with every caption t, whose embedding is not normalized."""
    queries = text[:, 0].expand(len(image), -1, -1)  # (B_image, B_text, E)
    scores = F.cosine_similarity(pooling.to(image.device)(queries, image[:, 1:]), queries, dim=-1)
    return scores, scores


def _filip(heads: Mapping[str, nn.Module], **_: Any) -> TokenScore:
    """FILIP (arXiv 2111.07783, section 3.1): each side looks for the other by its own mean of maxima."""

    def image(tokens: Tensor) -> Tensor:
        return F.normalize(tokens[:, 1:], dim=-1)

    def text(tokens: Tensor, mask: Tensor) -> Tokens:
        return F.normalize(tokens, dim=-1), mask

    def compare(image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        text_to_image, image_to_text = max_similarity(image, text, text_mask=mask)
        return image_to_text, text_to_image

    return TokenScore("filip", image, text, compare)


OWN_SCORES: dict[str, Callable[..., TokenScore]] = {"laps": _laps, "flair": _flair, "filip": _filip}
"""By name of the loss that trains for it: heads and settings -> score."""
