"""A gallery: images and their captions as a model embeds them, and how it scores every pair of them."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessor, CLIPTokenizer

from ..data.captions import sentence_runs
from ..data.datasets import GROUP_SIZE, Example
from ..data.sources import Skip
from ..heads import TokenScore, finelip_score
from ..locations import BUNDLED_MODEL
from ..model import GLOBAL_SHARE, FineLIPModel
from ..scenes import STOCK_CONTENT_TOKENS, Caption, Scene, alterations, describe, fact_tokens, render, sample_scene

VIEWS = ("whole", "without_first", "first_last", "truncated", "sentences")
"""How captions are shown: as they are, without their first sentence, with it at the end, cut at 77 tokens, and each of
their sentences by itself."""
DIRECTIONS = ("image_to_text", "text_to_image")
BLOCK = 256  # images, and captions, that are scored at once

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
Compare = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
TokenIds = tuple[int, ...]


def silent(items: Iterable[Any], name: str) -> Iterable[Any]:
    """Shows no progress."""
    return items


@dataclass(frozen=True)
class Captions:
    """N captions, or sentences, as a model reads them. What reads alike is kept once: U different ones.

    Attributes:
        embeds: (U, E), of length 1.
        tokens: by token score, what it compares, (U, T, E), and the mask (U, T), True = keep.
        rows: (N,), the place of each caption among the different ones.
        read: (N,), tokens that the model was given, start and end included.
        image_of: (N,), the place of the image that a caption describes.
        changed: how many captions read otherwise than the whole ones.
    """

    embeds: Tensor
    tokens: dict[str, tuple[Tensor, Tensor]]
    rows: Tensor
    read: Tensor
    image_of: Tensor
    changed: int


@dataclass(frozen=True)
class Gallery:
    """What a model made of M images and their N captions, in float32 on the CPU.

    Attributes:
        image_ids: of the images.
        image_embeds: (M, E), of length 1.
        image_tokens: by token score, what it compares, (M, P, E).
        groups: (M,), the same number for near-duplicates.
        lengths: (N,), tokens of the whole captions, start and end included.
        views: captions by view; a view that changes no caption is left out.
        growing: by caption, of two sentences or more: similarities of its image with its first 1, ..., K sentences.
        skipped: what could not be used.
        compare: by token score, how it compares tokens.
    """

    image_ids: list[str]
    image_embeds: Tensor
    image_tokens: dict[str, Tensor]
    groups: Tensor
    lengths: Tensor
    views: dict[str, Captions]
    growing: dict[int, Tensor]
    skipped: list[Skip]
    compare: dict[str, Compare]

    @property
    def image_of(self) -> Tensor:
        """(N,), the place of the image that a whole caption describes."""
        return self.views["whole"].image_of

    def right(self, view: str) -> Tensor:
        """(M, N), True where a caption is an answer to an image. A sentence is one to every image that it is told of:
        near-duplicates share most of theirs, word for word."""
        captions = self.views[view]
        images = torch.arange(len(self.image_ids))[:, None]
        if view != "sentences":
            return images == captions.image_of
        told = torch.zeros(len(self.image_ids), len(captions.embeds), dtype=torch.bool)
        told[captions.image_of, captions.rows] = True
        return told[:, captions.rows]


@torch.no_grad()
def embed_gallery(
    model: FineLIPModel,
    tokenizer: CLIPTokenizer,
    image_processor: CLIPImageProcessor,
    examples: Dataset[Example] | Sequence[Example],
    batch_size: int = 64,
    *,
    views: Sequence[str] = ("whole",),
    own: TokenScore | None = None,
    himo: bool = False,
    num_workers: int = 0,
    progress: Progress = silent,
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
        own: a further score, from `heads.own_score`, beside the global cosine and FineLIP's.
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
    scores = [finelip_score(model), *([own] if own is not None else [])]
    tokens: dict[str, list[Tensor]] = {score.name: [] for score in scores}
    embeds, skipped = list[Tensor](), list[Skip](getattr(examples, "skipped", ()))
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
            for score in scores:
                tokens[score.name].append(score.image(image_tokens).float().cpu())
    if len(places) < 2:
        raise ValueError(f"the gallery has {len(places)} images: give at least 2.")

    encodings = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    whole = [tuple(ids) for ids in encodings["input_ids"]]
    runs = [sentence_runs(text, offsets) for text, offsets in zip(texts, encodings["offset_mapping"], strict=True)]
    room = model.config.clip_config.text_config.max_position_embeddings - 2

    def framed(ids: TokenIds) -> TokenIds:
        return (tokenizer.bos_token_id, *ids[:room], tokenizer.eos_token_id)

    found: dict[str, Captions] = {}
    for view in views:
        if view == "sentences":
            shown = [framed(ids[slice(*run)]) for ids, own_runs in zip(whole, runs, strict=True) for run in own_runs]
            owners = [image for image, own_runs in zip(image_of, runs, strict=True) for _ in own_runs]
            changed = sum(len(own_runs) > 1 for own_runs in runs)
        else:
            shown = [framed(_rearranged(ids, own_runs[0][1], view)) for ids, own_runs in zip(whole, runs, strict=True)]
            owners, changed = image_of, sum(ids != framed(before) for ids, before in zip(shown, whole, strict=True))
        if changed or view == "whole":
            captions = _embed_captions(model, shown, scores, batch_size, progress, view)
            found[view] = Captions(*captions, torch.tensor(owners), changed)
    image_embeds = torch.cat(embeds)
    beginnings = {
        number: [framed(ids[:stop]) for _, stop in own_runs]
        for number, (ids, own_runs) in enumerate(zip(whole, runs, strict=True))
        if himo and len(own_runs) > 1
    }
    growing = {
        number: text_embeds @ image_embeds[image_of[number]]
        for number, text_embeds in _embed_beginnings(model, beginnings, batch_size, progress)
    }
    return Gallery(
        image_ids=list(places),
        image_embeds=image_embeds,
        image_tokens={name: torch.cat(parts) for name, parts in tokens.items()},
        groups=torch.tensor(groups),
        lengths=torch.tensor([len(ids) + 2 for ids in whole]),
        views=found,
        growing=growing,
        skipped=list(dict.fromkeys(skipped)),
        compare={score.name: score.compare for score in scores},
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
    model: FineLIPModel,
    captions: Sequence[TokenIds],
    scores: Sequence[TokenScore],
    batch_size: int,
    progress: Progress,
    view: str,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], Tensor, Tensor]:
    """The first four attributes of `Captions`."""
    different, rows = _different(captions)
    embeds = list[Tensor]()
    parts: dict[str, tuple[list[Tensor], list[Tensor]]] = {score.name: ([], []) for score in scores}
    for text_embeds, text_tokens, text_mask in _encode(model, different, batch_size, progress, f"captions, {view}"):
        embeds.append(text_embeds.float().cpu())
        for score in scores:
            tokens, mask = score.text(text_tokens, text_mask)
            parts[score.name][0].extend(tokens.float().cpu())
            parts[score.name][1].extend(mask.cpu())
    padded = {
        name: (pad_sequence(tokens, batch_first=True), pad_sequence(masks, batch_first=True))
        for name, (tokens, masks) in parts.items()
    }
    return torch.cat(embeds), padded, rows, torch.tensor([len(ids) for ids in captions])


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
    progress: Progress = silent,
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
    scores = (gallery.image_embeds @ captions.embeds.T)[:, captions.rows]
    if global_share == 1:
        return scores
    return global_share * scores + (1 - global_share) * token_scores(gallery, view, "finelip", device, progress)[0]


@torch.no_grad()
def token_scores(
    gallery: Gallery,
    view: str = "whole",
    score: str = "finelip",
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> tuple[Tensor, Tensor]:
    """A token score of every image with every caption, block by block.

    Args:
        gallery: M images and N captions.
        view: of the captions.
        score: one of those that the gallery was embedded for.
        device: where a block is scored.
        progress: wraps what is iterated over, given its name.

    Returns:
        What images look for their captions by, and captions for their images: (M, N) each, on the CPU; one tensor
        where the score has no direction.
    """
    captions, image_tokens = gallery.views[view], gallery.image_tokens[score]
    tokens, mask = captions.tokens[score]
    both = [torch.empty(len(image_tokens), len(tokens)) for _ in DIRECTIONS]
    symmetric = True
    for i in progress(range(0, len(image_tokens), BLOCK), f"{score}, {view}"):
        images = slice(i, i + BLOCK)
        block = image_tokens[images].to(device)
        for j in range(0, len(tokens), BLOCK):
            texts = slice(j, j + BLOCK)
            found = gallery.compare[score](block, tokens[texts].to(device), mask[texts].to(device))
            symmetric &= found[0] is found[1]
            for scores, part in zip(both, found, strict=True):
                scores[images, texts] = part.cpu()
    image_to_text = both[0][:, captions.rows]
    return image_to_text, image_to_text if symmetric else both[1][:, captions.rows]


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
    """Draws held-out scenes in groups of eight that only what stands after token 77 tells apart.

    A group is a scene of six to nine objects, and seven others that differ from it in one attribute of one object: in
    color, shape or size, or in the cell, an empty one or another object's in exchange. Wording and order are the same
    in a group, and what differs is told after token 77: cut there, its captions are one.

    Few near-duplicates of a scene are held out as it is, so scenes are drawn until one has seven: about 0.2 s a group.

    Args:
        num_groups: of eight scenes. The first groups are the same, however many there are.
        seed: any integer.
    """
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED_MODEL / "tokenizer")
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
