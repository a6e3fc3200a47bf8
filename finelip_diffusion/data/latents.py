"""Latents of a dataset's images, computed once and kept on disk, and batches of them with their captions."""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..files import writing
from ..probing import stated_facts
from .batches import BUCKET_WINDOW
from .captions import draw_short_prompt
from .datasets import CaptionDataset, stable_hash
from .sources import Skip, Unusable
from .stored import fingerprint

ENCODED_AT_ONCE = 16
BUCKET_STEP = 64  # pixels by which the sides of buckets differ


def bucket_sizes(resolution: int, step: int = BUCKET_STEP, longest: float = 2.0) -> list[tuple[int, int]]:
    """Heights and widths of aspect-ratio buckets: about `resolution`² pixels each, sides multiples of `step`.

    Args:
        resolution: Side of the square bucket.
        step: Pixels.
        longest: The largest ratio of two sides.

    Raises:
        ValueError: If the resolution is below a step. One sentence.
    """
    if resolution < step:
        raise ValueError(f"a resolution of {resolution} has no aspect ratio buckets: they need at least {step}.")
    sizes = set()
    for short in range(step, resolution + 1, step):
        long = resolution * resolution // short // step * step
        if long <= longest * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def fit_image(image: Image.Image, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Scales an image to cover a bucket, and cuts what is left over, equally on both sides.

    Args:
        image: RGB.
        size: Height and width in pixels.

    Returns:
        Pixels in -1..1, (3, H, W), and the upper left corner of the cut in the scaled image, (top, left).
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1, (top, left)


def nearest_size(image: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest to that of an image of (width, height)."""
    ratio = math.log(image[1] / image[0])
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), size))


@dataclass(frozen=True)
class Latents:
    """Scaled latents of the images of a dataset.

    Attributes:
        tables: (n, C, h, w), float16, memory maps, by the size of the bucket in pixels.
        rows: (N, 2) Number of the bucket, in the order of `tables`, and row there, of each usable example.
        indices: (N,) Index of each usable example in the dataset.
        time_ids: (N, 6) What SDXL is told: height and width of the image, top and left of the cut, height and width
            of the bucket.
        skipped: What cannot be used.
    """

    tables: dict[tuple[int, int], np.ndarray]
    rows: np.ndarray
    indices: np.ndarray
    time_ids: np.ndarray
    skipped: list[Skip]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Tensor:
        """(C, h, w), float32."""
        bucket, row = self.rows[number]
        return torch.from_numpy(np.array(list(self.tables.values())[bucket][row], np.float32))


def latents_key(model: Any, **data: Any) -> str:
    """Names a cache by what it depends on: a model's weights and scale, the data, the buckets."""
    described = json.dumps(data, sort_keys=True, default=str)
    return fingerprint(model.state_dict(), described, str(getattr(model.config, "scaling_factor", None)))


def open_latents(folder: Path) -> Latents:
    """Reads a cache that `write_latents` wrote."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    tables = {(height, width): np.load(folder / f"{height}x{width}.npy", mmap_mode="r")
              for height, width in index["sizes"]}  # fmt: skip
    arrays = np.load(folder / "examples.npz")
    return Latents(
        tables, arrays["rows"], arrays["indices"], arrays["time_ids"], [Skip(*skip) for skip in index["skipped"]]
    )


@torch.inference_mode()
def write_latents(
    folder: Path,
    dataset: CaptionDataset,
    vae: AutoencoderKL,
    sizes: Sequence[tuple[int, int]],
    progress: Callable[[Sequence[int]], Any] = iter,
) -> Latents:
    """Encodes the images of a dataset, each in the bucket of its aspect ratio, and writes the cache whole.

    Latents are the means of the autoencoder's posterior, whose spread is far below that of the noise.

    Args:
        folder: Of the cache.
        dataset: Its images are read once each.
        vae: Encodes on its device, in its precision.
        sizes: Heights and widths of the buckets.
        progress: Wraps the indices, to show how far it is.

    Raises:
        ValueError: If nothing can be used, a latent is not finite, or the disk is full.
    """
    waiting: dict[tuple[int, int], list[Tensor]] = {size: [] for size in sizes}
    counts = dict.fromkeys(sizes, 0)
    rows: list[tuple[int, int]] = []
    indices: list[int] = []
    time_ids: list[tuple[int, ...]] = []
    skipped = list(dataset.skipped)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)

    with writing(folder) as part:
        part.mkdir()
        streams = {size: (part / f"{size[0]}x{size[1]}.raw").open("wb") for size in sizes}

        def encode(size: tuple[int, int]) -> None:
            if waiting[size]:
                pixels = torch.stack(waiting[size]).to(vae.device, vae.dtype)
                latents = vae.encode(pixels).latent_dist.mean.float() * vae.config.scaling_factor
                if not latents.isfinite().all():
                    raise ValueError("the autoencoder's latents are not finite: it needs single precision.")
                streams[size].write(latents.half().cpu().contiguous().numpy().tobytes())
                waiting[size].clear()

        for index in progress(range(len(dataset))):
            try:
                image = dataset.read(index, 0).image
            except Unusable as error:
                skipped.append(Skip(dataset.name(index), str(error)))
                continue
            size = nearest_size(image.size, sizes)
            pixels, corner = fit_image(image, size)
            waiting[size].append(pixels)
            rows.append((sizes.index(size), counts[size]))
            indices.append(index)
            time_ids.append((image.height, image.width, *corner, *size))
            counts[size] += 1
            if len(waiting[size]) == ENCODED_AT_ONCE:
                encode(size)
        if not indices:
            raise ValueError(f"none of the {len(skipped)} images can be used: the first is {skipped[0].name}.")
        for size, stream in streams.items():
            encode(size)
            stream.close()
            shape = (counts[size], vae.config.latent_channels, size[0] // factor, size[1] // factor)
            _add_header(part / f"{size[0]}x{size[1]}", shape)
        with (part / "examples.npz").open("wb") as file:
            np.savez(file, rows=np.array(rows), indices=np.array(indices), time_ids=np.array(time_ids))
        index_of = {"sizes": list(sizes), "skipped": [(skip.name, skip.reason) for skip in skipped]}
        (part / "index.json").write_text(json.dumps(index_of), encoding="utf-8")
    return open_latents(folder)


def _add_header(stem: Path, shape: tuple[int, ...]) -> None:
    """Makes a .npy of the bytes of an array of float16."""
    with stem.with_suffix(".npy").open("wb") as target:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(target, header)
        with stem.with_suffix(".raw").open("rb") as source:
            while block := source.read(2**24):
                target.write(block)
    stem.with_suffix(".raw").unlink()


# ------------------------------------------------------------------------------------------------------------- batches


class LatentDataset(Dataset[dict[str, Any]]):
    """Latents with a caption, by (number, draw).

    Args:
        dataset: Has the captions.
        latents: Of its images.
        kept: Has the captions for the terms that keep, taken around where it is the smaller; None is `dataset`.
        restated: Has the same images' captions in other words; None leaves them out.
    """

    def __init__(
        self,
        dataset: CaptionDataset,
        latents: Latents,
        kept: CaptionDataset | None = None,
        restated: CaptionDataset | None = None,
    ) -> None:
        self.dataset, self.latents, self.kept, self.restated = dataset, latents, kept, restated

    def __len__(self) -> int:
        return len(self.latents)

    def lengths(self, numbers: np.ndarray, draws: list[int]) -> np.ndarray:
        """How long the captions of some examples are at their draws, see `CaptionDataset.drawn_lengths`."""
        return self.dataset.drawn_lengths(self.latents.indices[numbers], draws)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        number, draw = place
        index = int(self.latents.indices[number])
        caption = self.dataset.caption(index, draw)
        return {
            "latents": self.latents[number],
            "caption": caption,
            "kept": caption if self.kept is None else self.kept.caption(index % len(self.kept), draw),
            "time_ids": torch.from_numpy(self.latents.time_ids[number]),
            "draw": draw,
        } | ({} if self.restated is None else {"restated": self.restated.caption(index, draw)})


class LatentCollator:
    """Makes a batch of latents and token ids.

    Args:
        tokenizers: One, or SDXL's two, each of the encoders' length.
        empty_captions: Share of captions that are left out, for guidance without a classifier.
        kept_every: Every so many examples have a prompt for the terms that keep: whole sentences of their caption
            that fit the stock encoder. 0 is none.
        stock_length: Tokens of the stock encoder.
        facts: Whether batches say where captions state what.
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        empty_captions: float,
        kept_every: int,
        stock_length: int = 77,
        facts: bool = False,
    ) -> None:
        self.tokenizers, self.empty_captions, self.facts = list(tokenizers), empty_captions, facts
        self.kept_every, self.stock_length = kept_every, stock_length

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch.

        Returns:
            What examples have of tensors, stacked: latents (B, C, h, w), time_ids (B, 6); input_ids (B, T) and
            input_ids_2, padded to the encoders' length; `longest`, tokens of the longest caption; `cut`, captions
            that are longer than the encoders read; with other captions of the images, `restated_ids` (B, T),
            restated_ids_2 and `longest_restated`; `facts` (N, 7), see `probing.stated_facts`; kept_rows (K,), the
            examples with kept prompts, and `kept_ids` (K, T) and kept_ids_2, the empty prompt where the caption is
            left out.
        """
        draws = [example["draw"] for example in examples]
        left_out = [random.Random(f"empty {draw}").random() < self.empty_captions for draw in draws]
        captions = ["" if out else example["caption"] for out, example in zip(left_out, examples, strict=True)]
        batch: dict[str, Any] = {
            name: torch.stack([example[name] for example in examples])
            for name, value in examples[0].items()
            if isinstance(value, Tensor)
        }
        lengths = self._tokens(batch, "input_ids", captions)
        batch["longest"], batch["cut"] = max(lengths), sum(n > self.tokenizers[0].model_max_length for n in lengths)
        if self.facts:
            batch["facts"] = stated_facts(captions, self.tokenizers[0], self.tokenizers[0].model_max_length)
        if "restated" in examples[0]:
            restated = ["" if out else str(example["restated"])
                        for out, example in zip(left_out, examples, strict=True)]  # fmt: skip
            batch["longest_restated"] = max(self._tokens(batch, "restated_ids", restated))
        if self.kept_every:
            batch["kept_rows"] = torch.arange(0, len(examples), self.kept_every)
            kept = ["" if left_out[row] else str(examples[row]["kept"]) for row in batch["kept_rows"]]
            draws = [draws[row] for row in batch["kept_rows"]]
            self._tokens(batch, "kept_ids", [self._short(*pair) for pair in zip(kept, draws, strict=True)])
        return batch

    def _short(self, caption: str, draw: int) -> str:
        encoding = self.tokenizers[0](caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoding["offset_mapping"]
        if len(offsets) <= self.stock_length - 2:
            return caption
        start, stop = draw_short_prompt(caption, offsets, draw, self.stock_length - 2)
        return caption[offsets[start][0] : offsets[stop - 1][1]]

    def _tokens(self, batch: dict[str, Any], name: str, texts: list[str]) -> list[int]:
        """Adds token ids, padded and cut, to a batch; the tokens of each text as the first tokenizer counts them."""
        lengths: list[int] = []
        for place, tokenizer in enumerate(self.tokenizers):
            room, start, end = tokenizer.model_max_length, tokenizer.bos_token_id, tokenizer.eos_token_id
            rows = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
            ids = torch.full((len(texts), room), tokenizer.pad_token_id)
            for row, content in enumerate(rows):
                whole = [start, *content[: room - 2], end]
                ids[row, : len(whole)] = torch.tensor(whole)
            batch[name if place == 0 else f"{name}_2"] = ids
            lengths = lengths or [len(content) + 2 for content in rows]
        return lengths


class BucketSampler:
    """Batches of (number, draw), all of one bucket, step after step without end.

    The joint batch of all processes at a step is a function of the seed and the step; a process takes its slice. An
    epoch goes through each bucket in an order of its own, less what does not fill a last joint batch.

    Args:
        buckets: (N,) The bucket of each example.
        batch_size: Examples of a batch of one process.
        seed: At least 0.
        rank, world_size: Which process of how many.
        first_step: Where to begin.
        lengths: Of examples (n,) at their draws, (n,). Sorts the examples of a bucket by it within windows of
            `BUCKET_WINDOW` joint batches.

    Raises:
        ValueError: If no bucket fills a joint batch.
    """

    def __init__(
        self,
        buckets: np.ndarray,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        first_step: int,
        lengths: Callable[[np.ndarray, list[int]], np.ndarray] | None = None,
    ):
        joint = batch_size * world_size
        self.buckets = [members for bucket in np.unique(buckets)
                        if len(members := np.flatnonzero(buckets == bucket)) >= joint]  # fmt: skip
        self.steps_per_epoch = sum(len(members) // joint for members in self.buckets)
        if not self.steps_per_epoch:
            raise ValueError(
                f"{len(buckets)} examples in {len(np.unique(buckets))} buckets do not fill a batch of {joint} "
                f"({batch_size} in each of {world_size} processes): use a smaller batch, more data, or one bucket."
            )
        self.left_out = len(buckets) - sum(len(members) for members in self.buckets)
        self.batch_size, self.joint, self.seed, self.rank, self.first_step = batch_size, joint, seed, rank, first_step
        self.lengths = lengths
        self._epoch, self._order = -1, np.empty((0, 0), np.int64)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The batch of this process at a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            drawn = [rng.permutation(members)[: len(members) // self.joint * self.joint] for members in self.buckets]
            rows = [self._sorted(members, epoch).reshape(-1, self.joint) for members in drawn]
            self._epoch, self._order = epoch, rng.permutation(np.concatenate(rows))
        start = self.rank * self.batch_size
        numbers = self._order[place, start : start + self.batch_size].tolist()
        return list(zip(numbers, self._draws(epoch, numbers), strict=True))

    def _draws(self, epoch: int, numbers: list[int]) -> list[int]:
        return [stable_hash(self.seed, epoch, number) for number in numbers]

    def _sorted(self, members: np.ndarray, epoch: int) -> np.ndarray:
        if self.lengths is None:
            return members
        lengths = self.lengths(members, self._draws(epoch, members.tolist()))
        window = BUCKET_WINDOW * self.joint
        starts = range(window, len(members), window)
        parts = zip(np.split(members, starts), np.split(lengths, starts), strict=True)
        return np.concatenate([part[np.argsort(own, kind="stable")] for part, own in parts])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.first_step
        while True:
            yield self.batch(step)
            step += 1
