"""Retrieval: what a model finds in a gallery of images and captions, and whether it reads captions to their end."""

from typing import Any

import torch
from torch import Tensor

from ..model import GLOBAL_SHARE
from .gallery import (
    DIRECTIONS,
    VIEWS,
    Gallery,
    Progress,
    SceneGallery,
    embed_gallery,
    gallery_scores,
    scenes_gallery,
    silent,
    token_scores,
)
from .intervals import bootstrap_interval

__all__ = [
    "DIRECTIONS",
    "RECALL_AT",
    "VIEWS",
    "Gallery",
    "SceneGallery",
    "embed_gallery",
    "evaluate",
    "gallery_scores",
    "himo_at_k",
    "ranks",
    "scenes_gallery",
    "token_scores",
]

RECALL_AT = (1, 5, 10)


def ranks(scores: Tensor, right: Tensor, among: Tensor | None = None) -> Tensor:
    """How many wrong candidates each query puts before, or level with, its best right one.

    A tie counts against the query, and so does NaN: a model that tells nothing apart finds nothing.

    Args:
        scores: (Q, C), of queries with candidates.
        right: (Q, C), boolean, True where a candidate answers the query; each query has one or more.
        among: (Q, C), boolean, the candidates that a query chooses among; by default all.

    Returns:
        (Q,), integers. A query is a hit of R@k where its rank is below k.

    Raises:
        ValueError: If the shapes differ or a query has no right candidate.
    """
    if scores.shape != right.shape:
        raise ValueError(f"scores are {tuple(scores.shape)}, but right is {tuple(right.shape)}: give one shape.")
    if not right.any(1).all():
        raise ValueError(f"query {int(right.any(1).int().argmin())} has no right candidate: leave it out.")
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)  # (Q, 1)
    before = ~right & ~(scores < best)
    return (before if among is None else before & among).sum(1)


def himo_at_k(similarities: Tensor) -> float:
    """HiMo@K of one caption (HiMo-CLIP, arXiv 2511.06653): does its image's similarity rise as the caption grows?

    Args:
        similarities: (K,), of the image with the first 1, ..., K sentences.

    Returns:
        Pearson's correlation of the similarities with 1, ..., K; 0 where all are equal.

    Raises:
        ValueError: For fewer than two similarities.
    """
    if len(similarities) < 2:
        raise ValueError(f"HiMo@K needs a caption of 2 sentences or more, not {len(similarities)}: leave it out.")
    place, height = torch.arange(len(similarities), dtype=torch.float64), similarities.double()
    place, height = place - place.mean(), height - height.mean()
    spread = float(place.norm() * height.norm())
    return float(place @ height) / spread if spread else 0.0


def evaluate(
    gallery: Gallery,
    global_share: float = GLOBAL_SHARE,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measures retrieval in a gallery, and HiMo@K where it was embedded.

    Args:
        gallery: from `embed_gallery`.
        global_share: of the global cosine in FineLIP*.
        device: where blocks of token scores are computed.
        progress: wraps what is iterated over, given its name.

    Returns:
        Plain data:

        - `figures`, each as `bootstrap_interval` gives it, over queries, those of a group drawn together:
          `VIEW/SCORE/DIRECTION/R@K`, where the score is `global`, `finelip` (FineLIP*) or the model's own (`laps`,
          `flair`, `filip`), and the direction `image_to_text` or `text_to_image`;
          `VIEW/SCORE/DIRECTION/group_R@1`, among near-duplicates alone; `himo`, and `himo/K`, of captions of K
          sentences;
        - `ranks` of each query, by `VIEW/SCORE/DIRECTION`, and among its group, by `VIEW/SCORE/DIRECTION/group`;
        - `himo` of each caption of two sentences or more, by its number;
        - `images`, `groups`, `captions`: how many there are, and what was `skipped`;
        - `lengths` of the captions; `views`: how many captions each has `changed`, the tokens `read` of each.
    """
    num_images, num_groups = len(gallery.image_ids), len(gallery.groups.unique())
    own = [name for name in gallery.compare if name != "finelip"]
    figures, ranks_by_name = {}, {}
    for view, captions in gallery.views.items():
        right, text_groups = gallery.right(view), gallery.groups[captions.image_of]
        among = gallery.groups[:, None] == text_groups
        for score in ("global", "finelip", *own):
            if score in own:
                both = token_scores(gallery, view, score, device, progress)
            else:
                scores = gallery_scores(gallery, view, 1.0 if score == "global" else global_share, device, progress)
                both = scores, scores
            for direction, clusters, queries in (
                ("image_to_text", gallery.groups, (both[0], right, among)),
                ("text_to_image", text_groups, (both[1].T, right.T, among.T)),
            ):
                name = f"{view}/{score}/{direction}"
                found = ranks(*queries[:2])
                ranks_by_name[name] = found.tolist()
                for k in RECALL_AT:
                    figures[f"{name}/R@{k}"] = bootstrap_interval(found < k, clusters)
                if num_groups < num_images:
                    found = ranks(*queries)
                    ranks_by_name[f"{name}/group"] = found.tolist()
                    figures[f"{name}/group_R@1"] = bootstrap_interval(found < 1, clusters)
    himo = {number: himo_at_k(similarities) for number, similarities in gallery.growing.items()}
    by_length: dict[str, list[int]] = {"himo": list(himo)} if himo else {}
    for number in sorted(himo, key=lambda number: len(gallery.growing[number])):
        by_length.setdefault(f"himo/{len(gallery.growing[number])}", []).append(number)
    for name, numbers in by_length.items():
        values = torch.tensor([himo[number] for number in numbers], dtype=torch.float64)
        figures[name] = bootstrap_interval(values, gallery.groups[gallery.image_of][numbers])
    return {
        "images": num_images,
        "groups": num_groups,
        "captions": len(gallery.image_of),
        "skipped": [{"name": skip.name, "reason": skip.reason} for skip in gallery.skipped],
        "lengths": gallery.lengths.tolist(),
        "views": {
            view: {"changed": captions.changed, "read": captions.read.tolist()}
            for view, captions in gallery.views.items()
        },
        "figures": figures,
        "ranks": ranks_by_name,
        "himo": himo,
    }
