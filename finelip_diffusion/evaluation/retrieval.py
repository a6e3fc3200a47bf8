"""Retrieval: what a model finds in a gallery of images and captions, and whether it reads captions to their end."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessor, CLIPTokenizer

from ..data.captions import sentence_runs
from ..data.datasets import GROUP_SIZE, Example
from ..data.sources import Skip
from ..model import GLOBAL_SHARE, FineLIPModel, FineLIPOutput
from ..scenes import STOCK_CONTENT_TOKENS, Caption, Scene, alterations, describe, fact_tokens, render, sample_scene

RECALL_AT = (1, 5, 10)
VIEWS = ("whole", "without_first", "first_last", "truncated")
"""How captions are shown: as they are, without their first sentence, with it at the end, cut at 77 tokens."""
BLOCK = 256  # images, and captions, that are scored at once
RESAMPLES = 2000

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
TokenIds = tuple[int, ...]


def _silent(items: Iterable[Any], name: str) -> Iterable[Any]:
    return items


# ------------------------------------------------------------------------------------------------------------ figures


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


def bootstrap_interval(values: Tensor, clusters: Tensor | None = None) -> dict[str, float | int | None]:
    """A mean with its 95% percentile bootstrap interval.

    Clusters are drawn anew, not values: captions of one image, and near-duplicates, stand or fall together.

    Args:
        values: (N,).
        clusters: (N,), integers; values of the same number belong together. By default each stands alone.

    Returns:
        `value`, `low`, `high`, and `n`, the number of values. The interval is None with fewer than two clusters, and
        so is the value where there is none.
    """
    from scipy.stats import bootstrap

    members = torch.arange(len(values)) if clusters is None else clusters.unique(return_inverse=True)[1]
    sums = np.bincount(members.numpy(), values.double().numpy())
    sizes = np.bincount(members.numpy()).astype(float)

    def mean(sums: np.ndarray, sizes: np.ndarray, axis: int = -1) -> np.ndarray:
        return sums.sum(axis) / sizes.sum(axis)

    figure: dict[str, float | int | None] = {"value": None, "low": None, "high": None, "n": len(values)}
    if len(sums):
        figure["value"] = float(mean(sums, sizes))
    if len(sums) > 1:
        batch = max(1, 10**7 // len(sums))  # resamples at once: 80 MB of each array
        interval = bootstrap(
            (sums, sizes), mean, paired=True, n_resamples=RESAMPLES, batch=batch, method="percentile", rng=0
        ).confidence_interval
        figure |= {"low": float(interval.low), "high": float(interval.high)}
    return figure


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


# ------------------------------------------------------------------------------------------------------------ gallery


@dataclass(frozen=True)
class Captions:
    """N captions as a model reads them. What reads alike is kept once: U different ones.

    Attributes:
        embeds: (U, E), of length 1.
        tokens: (U, T, E), what the token score reads, of length 1.
        mask: (U, T), True = keep.
        rows: (N,), the place of each caption among the different ones.
        read: (N,), tokens that the model was given, start and end included.
        changed: how many captions read otherwise than the whole ones.
    """

    embeds: Tensor
    tokens: Tensor
    mask: Tensor
    rows: Tensor
    read: Tensor
    changed: int


@dataclass(frozen=True)
class Gallery:
    """What a model made of M images and their N captions, in float32 on the CPU.

    Attributes:
        image_ids: of the images.
        image_embeds: (M, E), of length 1.
        image_tokens: (M, P, E), what the token score reads, of length 1.
        groups: (M,), the same number for near-duplicates.
        image_of: (N,), the place of the image that a caption describes.
        lengths: (N,), tokens of the whole captions, start and end included.
        views: captions by view; a view that changes no caption is left out.
        growing: by caption, of two sentences or more: similarities of its image with its first 1, ..., K sentences.
        skipped: what could not be used.
    """

    image_ids: list[str]
    image_embeds: Tensor
    image_tokens: Tensor
    groups: Tensor
    image_of: Tensor
    lengths: Tensor
    views: dict[str, Captions]
    growing: dict[int, Tensor]
    skipped: list[Skip]


@torch.no_grad()
def embed_gallery(
    model: FineLIPModel,
    tokenizer: CLIPTokenizer,
    image_processor: CLIPImageProcessor,
    examples: Dataset[Example] | Sequence[Example],
    batch_size: int = 64,
    *,
    views: Sequence[str] = ("whole",),
    himo: bool = False,
    num_workers: int = 0,
    progress: Progress = _silent,
) -> Gallery:
    """Embeds images and captions.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        image_processor: of the model.
        examples: an image and a caption each; images of the same `image_id` count once. A dataset's `group_size` says
            how many consecutive ones are near-duplicates.
        batch_size: images, or captions, embedded at once; changes nothing but time and memory.
        views: `"whole"`, and more of `VIEWS`.
        himo: whether the beginnings of captions are embedded, too.
        num_workers: processes that decode images.
        progress: wraps what is iterated over, given its name; `tqdm`, say.

    Returns:
        The gallery. Token embeddings take 4 E bytes for each token of M images and of U captions, view by view.

    Raises:
        ValueError: For an unknown view, or fewer than two images.
    """
    if "whole" not in views or set(views) - set(VIEWS):
        raise ValueError(f"views are {list(views)}: give 'whole' and any of {list(VIEWS[1:])}.")
    group_size = getattr(examples, "group_size", 1)
    loader = DataLoader(  # with a generator of its own: a training run's random state is left as it is
        cast("Dataset[Example]", examples), batch_size, collate_fn=list, num_workers=num_workers,
        generator=torch.Generator(),
    )  # fmt: skip
    places: dict[str, int] = {}
    groups, image_of, texts = list[int](), list[int](), list[str]()
    embeds, tokens, skipped = list[Tensor](), list[Tensor](), list[Skip](getattr(examples, "skipped", ()))
    for number, batch in enumerate(progress(loader, "images")):
        images = []
        for index, example in enumerate(batch, number * batch_size):
            skipped += example.skipped
            if example.skipped:  # it stands in for those; it comes in its own place, too
                continue
            if example.image_id not in places:
                places[example.image_id] = len(places)
                groups.append(index // group_size)
                images.append(example.image)
            image_of.append(places[example.image_id])
            texts.append(example.caption)
        if images:
            pixel_values = image_processor(images, return_tensors="pt").pixel_values
            image_embeds, image_tokens = model.encode_image(pixel_values.to(model.device))
            embeds.append(image_embeds.float().cpu())
            tokens.append(model.local_image(image_tokens).float().cpu())
    if len(places) < 2:
        raise ValueError(f"the gallery has {len(places)} images: give at least 2.")

    encodings = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    whole = [tuple(ids) for ids in encodings["input_ids"]]
    stops = [
        [stop for _, stop in sentence_runs(text, offsets)]
        for text, offsets in zip(texts, encodings["offset_mapping"], strict=True)
    ]
    room = model.config.clip_config.text_config.max_position_embeddings - 2

    def framed(ids: TokenIds) -> TokenIds:
        return (tokenizer.bos_token_id, *ids[:room], tokenizer.eos_token_id)

    found: dict[str, Captions] = {}
    for view in views:
        shown = [framed(_rearranged(ids, ends[0], view)) for ids, ends in zip(whole, stops, strict=True)]
        changed = sum(ids != framed(before) for ids, before in zip(shown, whole, strict=True))
        if changed or view == "whole":
            found[view] = _embed_captions(model, shown, changed, batch_size, progress, view)
    image_embeds = torch.cat(embeds)
    beginnings = {
        number: [framed(ids[:stop]) for stop in ends]
        for number, (ids, ends) in enumerate(zip(whole, stops, strict=True))
        if himo and len(ends) > 1
    }
    growing = {
        number: text_embeds @ image_embeds[image_of[number]]
        for number, text_embeds in _embed_beginnings(model, beginnings, batch_size, progress)
    }
    return Gallery(
        image_ids=list(places),
        image_embeds=image_embeds,
        image_tokens=torch.cat(tokens),
        groups=torch.tensor(groups),
        image_of=torch.tensor(image_of),
        lengths=torch.tensor([len(ids) + 2 for ids in whole]),
        views=found,
        growing=growing,
        skipped=list(dict.fromkeys(skipped)),
    )


def _rearranged(ids: TokenIds, first: int, view: str) -> TokenIds:
    """Content tokens of a caption as a view shows them; its first sentence has `first` of them, or is all it has."""
    if view == "truncated":
        return ids[:STOCK_CONTENT_TOKENS]
    if view == "whole" or first == len(ids):
        return ids
    return ids[first:] + (ids[:first] if view == "first_last" else ())


def _different(captions: Sequence[TokenIds]) -> tuple[list[TokenIds], Tensor]:
    """The different ones, the short ones first, and the place of each caption among them, (N,)."""
    different = sorted(set(captions), key=lambda ids: (len(ids), ids))
    places = {ids: place for place, ids in enumerate(different)}
    return different, torch.tensor([places[ids] for ids in captions])


def _encode(
    model: FineLIPModel, captions: Sequence[TokenIds], batch_size: int, progress: Progress, name: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Embeddings, tokens and mask of one batch after the other, each trimmed to its longest caption."""
    for first in progress(range(0, len(captions), batch_size), name):
        batch = [torch.tensor(ids) for ids in captions[first : first + batch_size]]
        mask = pad_sequence([torch.ones_like(ids, dtype=torch.bool) for ids in batch], batch_first=True)
        yield model.encode_text(pad_sequence(batch, batch_first=True).to(model.device), mask.to(model.device))


def _embed_captions(
    model: FineLIPModel, captions: Sequence[TokenIds], changed: int, batch_size: int, progress: Progress, view: str
) -> Captions:
    different, rows = _different(captions)
    embeds, tokens, masks = list[Tensor](), list[Tensor](), list[Tensor]()
    for text_embeds, text_tokens, text_mask in _encode(model, different, batch_size, progress, f"captions, {view}"):
        local_tokens, local_mask = model.local_text(text_tokens, text_mask)
        embeds.append(text_embeds.float().cpu())
        tokens += local_tokens.float().cpu()
        masks += local_mask.cpu()
    padded, mask = (pad_sequence(parts, batch_first=True) for parts in (tokens, masks))
    return Captions(torch.cat(embeds), padded, mask, rows, torch.tensor([len(ids) for ids in captions]), changed)


def _embed_beginnings(
    model: FineLIPModel, beginnings: dict[int, list[TokenIds]], batch_size: int, progress: Progress
) -> Iterator[tuple[int, Tensor]]:
    """Embeddings of the K beginnings of each caption, (K, E)."""
    if not beginnings:
        return
    different, rows = _different([ids for parts in beginnings.values() for ids in parts])
    batches = _encode(model, different, batch_size, progress, "HiMo@K")
    text_embeds = torch.cat([embeds.float().cpu() for embeds, _, _ in batches])
    counts = [len(parts) for parts in beginnings.values()]
    for number, part in zip(beginnings, rows.split(counts), strict=True):
        yield number, text_embeds[part]


@torch.no_grad()
def gallery_scores(
    gallery: Gallery,
    view: str = "whole",
    global_share: float = GLOBAL_SHARE,
    device: torch.device | str = "cpu",
    progress: Progress = _silent,
) -> Tensor:
    """FineLIP* of every image with every caption, block by block.

    Args:
        gallery: M images and N captions.
        view: of the captions.
        global_share: of the global cosine; 1 leaves the token score out, and its time.
        device: where a block is scored.
        progress: wraps what is iterated over, given its name.

    Returns:
        (M, N), on the CPU.
    """
    captions = gallery.views[view]
    if global_share == 1:
        return (gallery.image_embeds @ captions.embeds.T)[:, captions.rows]
    scores = torch.empty(len(gallery.image_embeds), len(captions.embeds))
    for i in progress(range(0, len(scores), BLOCK), f"scores, {view}"):
        images = slice(i, i + BLOCK)
        image_embeds, image_tokens = gallery.image_embeds[images].to(device), gallery.image_tokens[images].to(device)
        for j in range(0, scores.shape[1], BLOCK):
            texts = slice(j, j + BLOCK)
            block = FineLIPOutput(
                image_embeds=image_embeds,
                text_embeds=captions.embeds[texts].to(device),
                local_image_tokens=image_tokens,
                local_text_tokens=captions.tokens[texts].to(device),
                local_text_mask=captions.mask[texts].to(device),
            )
            scores[images, texts] = block.scores(global_share).cpu()
    return scores[:, captions.rows]


def evaluate(
    gallery: Gallery,
    global_share: float = GLOBAL_SHARE,
    device: torch.device | str = "cpu",
    progress: Progress = _silent,
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
          `VIEW/SCORE/DIRECTION/R@K`, where the score is `global` or `finelip` (FineLIP*) and the direction
          `image_to_text` or `text_to_image`; `VIEW/SCORE/DIRECTION/group_R@1`, among near-duplicates alone; `himo`,
          and `himo/K`, of captions of K sentences;
        - `ranks` of each query, by `VIEW/SCORE/DIRECTION`, and among its group, by `VIEW/SCORE/DIRECTION/group`;
        - `himo` of each caption of two sentences or more, by its number;
        - `images`, `groups`, `captions`: how many there are, and what was `skipped`;
        - `lengths` of the captions; `views`: how many captions each has `changed`, the tokens `read` of each.
    """
    images = torch.arange(len(gallery.image_ids))
    right = images[:, None] == gallery.image_of  # (M, N)
    image_groups, caption_groups = gallery.groups, gallery.groups[gallery.image_of]
    among = image_groups[:, None] == caption_groups
    num_groups = len(image_groups.unique())
    figures, ranks_by_name = {}, {}
    for view in gallery.views:
        for score, share in (("global", 1.0), ("finelip", global_share)):
            scores = gallery_scores(gallery, view, share, device, progress)
            for direction, clusters, queries in (
                ("image_to_text", image_groups, (scores, right, among)),
                ("text_to_image", caption_groups, (scores.T, right.T, among.T)),
            ):
                name = f"{view}/{score}/{direction}"
                found = ranks(*queries[:2])
                ranks_by_name[name] = found.tolist()
                for k in RECALL_AT:
                    figures[f"{name}/R@{k}"] = bootstrap_interval(found < k, clusters)
                if num_groups < len(images):
                    found = ranks(*queries)
                    ranks_by_name[f"{name}/group"] = found.tolist()
                    figures[f"{name}/group_R@1"] = bootstrap_interval(found < 1, clusters)
    himo = {number: himo_at_k(similarities) for number, similarities in gallery.growing.items()}
    by_length: dict[str, list[int]] = {"himo": list(himo)} if himo else {}
    for number in sorted(himo, key=lambda number: len(gallery.growing[number])):
        by_length.setdefault(f"himo/{len(gallery.growing[number])}", []).append(number)
    for name, numbers in by_length.items():
        values = torch.tensor([himo[number] for number in numbers], dtype=torch.float64)
        figures[name] = bootstrap_interval(values, caption_groups[numbers])
    return {
        "images": len(images),
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


# ----------------------------------------------------------------------------------------------- near-duplicate scenes


class SceneGallery(Dataset[Example]):
    """Scenes with their captions, near-duplicates side by side."""

    group_size = GROUP_SIZE

    def __init__(self, pairs: Sequence[tuple[Scene, Caption]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        scene, caption = self.pairs[index]
        return Example(render(scene), str(caption), repr(scene), f"scenes_gallery:{index}")


def scenes_gallery(num_groups: int = 128, seed: int = 0) -> SceneGallery:
    """Draws held-out scenes in groups of eight that only what stands behind token 77 tells apart.

    A group is a scene of six to nine objects, and seven others that differ from it in one attribute of one object: in
    colour, shape or size, or in the cell, an empty one or another object's in exchange. Wording and order are the same
    in a group, and what differs is told behind token 77: cut there, its captions are one.

    Few near-duplicates of a scene are held out as it is, so scenes are drawn until one has seven: about 0.2 s a group.

    Args:
        num_groups: of eight scenes. The first groups are the same, however many there are.
        seed: any integer.
    """
    tokenizer = CLIPTokenizer.from_pretrained(Path(__file__).parents[1] / "bundled" / "tokenizer")
    pairs: list[tuple[Scene, Caption]] = []
    for group in range(num_groups):
        pairs += _late_group(tokenizer, 6 + group % 4, random.Random(f"gallery {seed} {group}"))
    return SceneGallery(pairs)


def _late_group(tokenizer: CLIPTokenizer, num_objects: int, rng: random.Random) -> list[tuple[Scene, Caption]]:
    while True:
        scene = sample_scene(rng.getrandbits(63), "test", (num_objects, num_objects))
        seed = rng.getrandbits(63)
        caption = describe(scene, seed)
        facts = zip(caption.facts, fact_tokens(caption, tokenizer), strict=True)
        late = [fact.object for fact, (first, _) in facts if first > STOCK_CONTENT_TOKENS]
        others = [other for other in alterations(scene, late) if other.split == "test"]
        if len(others) >= GROUP_SIZE - 1:
            chosen = [scene, *rng.sample(others, GROUP_SIZE - 1)]
            return [(other, describe(other, seed, like=scene)) for other in chosen]
