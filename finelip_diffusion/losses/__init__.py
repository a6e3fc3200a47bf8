"""Losses: what a recipe can name, as data, and the primitives that they are made of.

`CONTRASTIVE` and `PRESERVING` say what a term is given: representations of a batch (`objective`), heads with
parameters of their own (`aggregation`, `pooling`, `logit_bias`), and `same`, (B, B), True where two captions are of
one image, the diagonal included. Keyword-only parameters of a term are its settings. Row i of an embedding is image
i's or caption i's; scores have a row for each image and a column for each caption. Similarities, softmaxes and sums
are made in float32 or wider, whatever autocast is set to; only `scores.max_similarity` and the heads follow autocast.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from .embeddings import (
    cloob,
    edited,
    hn_clip,
    infoloob,
    infonce,
    infonce_short,
    neg_clip,
    pca_image,
    sigmoid,
    softened,
)
from .preservation import affinity, distill, hycd, lwf, proclip, token
from .primitives import MARGIN, infonce_loss, sigmoid_loss, triplet_margin_loss
from .tokens import beta_clip, filip, finelip, flair, goal_text_span, laps, sparc

__all__ = [
    "CONTRASTIVE",
    "MARGIN",
    "PRESERVING",
    "Loss",
    "PromptKind",
    "infonce_loss",
    "sigmoid_loss",
    "triplet_margin_loss",
]

PromptKind = Literal["short", "random"]


class Loss(NamedTuple):
    """A term that a recipe can name.

    Attributes:
        function: of what it reads, and of its settings; a scalar.
        reads: what its positional parameters are given, in their order.
        prompts: the prompts of at most 77 tokens that it needs beside the captions: parts of captions (`short`), or
            random words (`random`).
    """

    function: Callable[..., Tensor]
    reads: tuple[str, ...]
    prompts: PromptKind | None = None


_WHOLE = ("image_embeds", "text_embeds", "logit_scale", "same")
_TOKENS = ("image_tokens", "text_tokens", "text_mask")
_REFINED = ("local_image_tokens", "local_image_mask", "local_text_tokens", "local_text_mask")
_EDITED = ("image_embeds", "text_embeds", "edited_embeds", "edited_valid", "logit_scale")
_STATES = ("kept_states", "kept_penultimate", "kept_mask", "teacher_kept_states", "teacher_kept_penultimate")
_DISTILLED = (
    "kept_states", "kept_penultimate", "kept_embeds", "kept_mask",
    "teacher_kept_states", "teacher_kept_penultimate", "teacher_kept_embeds",
)  # fmt: skip
_KEPT = ("image_embeds", "kept_embeds", "teacher_image_embeds", "teacher_kept_embeds", "logit_scale")

CONTRASTIVE: dict[str, Loss] = {
    "infonce": Loss(infonce, _WHOLE),
    "sigmoid": Loss(sigmoid, ("image_embeds", "text_embeds", "logit_scale", "logit_bias", "same")),
    "hn_clip": Loss(hn_clip, _WHOLE),
    "infoloob": Loss(infoloob, _WHOLE),
    "cloob": Loss(cloob, _WHOLE),
    "softened": Loss(softened, (*_WHOLE, "progress")),
    "edited": Loss(edited, _EDITED),
    "neg_clip": Loss(neg_clip, (*_EDITED, "same")),
    "infonce_short": Loss(infonce_short, ("image_embeds", "short_embeds", "logit_scale", "same")),
    "pca_image": Loss(pca_image, ("image_embeds", "short_embeds", "logit_scale", "same")),
    "finelip": Loss(finelip, (*_REFINED, "logit_scale", "same")),
    "filip": Loss(filip, (*_TOKENS, "logit_scale", "same")),
    "sparc": Loss(sparc, (*_TOKENS, "logit_scale")),
    "laps": Loss(laps, (*_TOKENS, "aggregation", "same")),
    "flair": Loss(
        flair, ("image_tokens", "image_embeds", "sub_embeds", "pooling", "logit_scale", "logit_bias", "same")
    ),
    "beta_clip": Loss(beta_clip, ("image_tokens", "sub_embeds", "pooling", "logit_scale", "same")),
    "goal_text_span": Loss(goal_text_span, ("span_embeds", "sub_embeds", "sub_spans")),
}
"""Terms that teach which caption is of which image, and what in it is of what."""

PRESERVING: dict[str, Loss] = {
    "token": Loss(token, _STATES, prompts="short"),
    "distill": Loss(distill, _DISTILLED, prompts="short"),
    "hycd": Loss(hycd, _KEPT, prompts="short"),
    "affinity": Loss(affinity, _KEPT, prompts="short"),
    "lwf": Loss(lwf, _KEPT, prompts="random"),
    "proclip": Loss(proclip, ("kept_embeds", "teacher_kept_embeds"), prompts="short"),
}
"""Terms that keep the latent space of the stock CLIP."""
