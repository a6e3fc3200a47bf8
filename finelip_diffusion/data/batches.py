"""Batches: which examples a step reads, and the tensors that are made of them.

What a step reads is a function of the seed and the step alone: any number of processes read the joint batch of one,
and a run that is resumed reads on where it stopped.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ..positions import STOCK_POSITIONS
from ..text_encoder import MAX_LENGTH
from .captions import CAPTION_KINDS, CaptionKind, draw_captions, draw_padding, draw_random_prompt, draw_short_prompt
from .datasets import CaptionDataset, Example, TarDataset, stable_hash
from .edits import EditPlace, choose_edits
from .stored import content_key

BUCKET_WINDOW = 50  # batches whose examples are sorted by length together


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Deals out a dataset in batches of (index, draw), epoch after epoch, without end.

    The joint batch of all processes at a step is a function of the seed and the step; a process takes its slice. Each
    epoch is a permutation of the groups, less what does not fill a last joint batch.

    Args:
        dataset_length: Examples.
        batch_size: Examples of a batch of one process.
        seed: At least 0.
        rank, world_size: Which process of how many.
        first_step: Where to begin.
        group_size: Consecutive examples that stay together.
        lengths: (dataset_length,) Sorts examples by length within windows of `BUCKET_WINDOW` joint batches, whose
            order is then drawn: less padding, the same examples in an epoch.
        bucket: Whether `lengths` do that.
        rising_steps: The first so many batches of an epoch stand in the order of their lengths, the shortest first, as
            far as the run's first epoch goes; they are the same examples.

    Raises:
        ValueError: If the dataset is smaller than a joint batch, or batches cut groups.
    """

    def __init__(
        self,
        dataset_length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
        group_size: int = 1,
        lengths: np.ndarray | Sequence[int] | None = None,
        bucket: bool = True,
        rising_steps: int = 0,
    ) -> None:
        if batch_size % group_size:
            raise ValueError(
                f"a batch of {batch_size} cuts groups of {group_size} that belong together: "
                f"use a multiple of {group_size}, or another group_size."
            )
        self.joint_size = batch_size * world_size
        self.steps_per_epoch = dataset_length // group_size * group_size // self.joint_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"{dataset_length} examples do not fill a batch of {self.joint_size} "
                f"({batch_size} in each of {world_size} processes): use a smaller batch or more data."
            )
        self.batch_size, self.seed, self.rank, self.first_step = batch_size, seed, rank, first_step
        self.group_size, self.num_groups = group_size, dataset_length // group_size
        self.group_lengths, self.bucket, self.rising_steps = None, bucket, rising_steps
        if lengths is not None:
            whole = np.asarray(lengths)[: self.num_groups * group_size]
            self.group_lengths = whole.reshape(-1, group_size).max(1)
        self._epoch, self._order = -1, np.empty((0, 0), np.int64)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The batch of this process at a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._draw_order(epoch)
        start = self.rank * self.batch_size
        indices = self._order[place, start : start + self.batch_size].tolist()
        return [(index, stable_hash(self.seed, epoch, index)) for index in indices]

    def _draw_order(self, epoch: int) -> np.ndarray:
        """Indices of the joint batches of an epoch, (steps, joint size)."""
        rng = np.random.default_rng([self.seed, epoch])
        per_batch = self.joint_size // self.group_size
        groups = rng.permutation(self.num_groups)[: self.steps_per_epoch * per_batch]
        rising = self.rising_steps if epoch == 0 else 0
        first, rest = np.split(groups, [rising * per_batch])
        if self.group_lengths is not None:
            first = first[np.argsort(self.group_lengths[first], kind="stable")]
            if self.bucket:
                window = BUCKET_WINDOW * per_batch
                parts = np.split(rest, range(window, len(rest), window))
                rest = np.concatenate([part[np.argsort(self.group_lengths[part], kind="stable")] for part in parts])
        batches, rest = (part.reshape(-1, per_batch) for part in (first, rest))
        if self.group_lengths is not None and self.bucket:
            rest = rng.permutation(rest)
        batches = np.concatenate([batches, rest])
        indices = batches[..., None] * self.group_size + np.arange(self.group_size)
        return indices.reshape(self.steps_per_epoch, self.joint_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.batch, itertools.count(self.first_step))


class _StreamBatches(IterableDataset[list[Example]]):
    """Batches of a stream, from a step on.

    A loader takes batches from its workers in turn, beginning with the first worker. When it begins at another step,
    each worker stands in for the one whose turn it would have been.
    """

    def __init__(
        self, dataset: TarDataset, batch_size: int, rank: int, world_size: int, first_step: int, workers: int
    ) -> None:
        if workers * world_size > len(dataset.shards):
            raise ValueError(
                f"{len(dataset.shards)} shards are too few for {world_size} processes with {workers} readers each: "
                "use fewer workers, or cut the data into more shards."
            )
        self.dataset, self.batch_size, self.rank, self.world_size = dataset, batch_size, rank, world_size
        self.first_step, self.workers = first_step, workers

    def __iter__(self) -> Iterator[list[Example]]:
        info = get_worker_info()
        turn = (self.first_step + (info.id if info else 0)) % self.workers
        done = (self.first_step - turn + self.workers - 1) // self.workers  # its batches in front of the first step
        reader, readers = self.rank * self.workers + turn, self.world_size * self.workers
        examples = self.dataset.examples(reader, readers, skip=done * self.batch_size)
        while True:
            yield list(itertools.islice(examples, self.batch_size))


class Collator:
    """Makes a batch of examples: pixels, token ids, and what the recipe draws of the captions.

    Batches are as long as their longest caption; attention is causal, so padding after it would change nothing.
    Captions beyond `max_length` are cut in front of their end token and counted.

    Args:
        tokenizer: A CLIP tokenizer.
        image_processor: A CLIP image processor.
        captions: What is drawn of each caption, see `captions.draw_captions`.
        num_sub_captions: With `"sub_captions"` and `"merged_captions"`, how many.
        longest_sub_caption: With these, sentences of the longest.
        kept_prompts: Prompts of at most 77 tokens for preservation terms: `"short"` (sentences of the caption),
            `"random"` (random vocabulary) or None.
        max_length: Tokens of the window, start and end included.
        keyed: Whether images and prompts get keys, by which `stored.TensorStore` knows them; then a caption has one
            prompt for good.
        num_edits: How many of an example's edits are drawn.
        edit_place: Where the drawn ones differ from the caption.
        keyed: Whether images and prompts get keys by their content, for a `stored.TensorStore`; the prompt of a
            caption is drawn once for good then.

    Raises:
        ValueError: For an unknown kind of captions or prompts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        captions: CaptionKind = "full",
        num_sub_captions: int = 8,
        longest_sub_caption: int = 3,
        kept_prompts: Literal["short", "random"] | None = None,
        max_length: int = MAX_LENGTH,
        num_edits: int = 0,
        edit_place: EditPlace = "any",
        keyed: bool = False,
    ) -> None:
        if captions not in CAPTION_KINDS:
            raise ValueError(f"captions={captions!r} is not one of {', '.join(CAPTION_KINDS)}.")
        if kept_prompts not in ("short", "random", None):
            raise ValueError(f"kept_prompts={kept_prompts!r} is neither 'short' nor 'random' nor None.")
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.captions, self.kept_prompts, self.max_length = captions, kept_prompts, max_length
        self.num_sub_captions, self.longest_sub_caption = num_sub_captions, longest_sub_caption
        self.num_edits, self.edit_place, self.keyed = num_edits, edit_place, keyed
        self.start, self.end, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        # In front of a caption the end token cannot pad: the encoder would end there. CLIP's own code pads with 0.
        self.front_pad = self.pad if self.pad != self.end else 0
        self.vocabulary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Makes a batch.

        Returns:
            pixel_values (B, 3, H, W) float32; input_ids (B, T) int64 and attention_mask (B, T), True from the start
            token to the end token; image_ids (B,) int64; skipped, a list; cut, a number of captions;
            `"first_sentence"`, `"debias"`: short_ids and short_mask (B, Ts);
            `"sub_captions"`, `"merged_captions"`: sub_ids and sub_mask (B, S, Ts), sub_spans (B, S, 2), the [first,
            stop) positions of each in input_ids, both 0 where it reaches beyond the window or has no place;
            num_edits: edited_ids and edited_mask (B, N, Te), edited_valid (B, N), False where there are fewer edits;
            kept_prompts: kept_ids and kept_mask (B, Tk), Tk at most 77.
        """
        texts = [example.caption for example in examples]
        encoding = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = list(zip(examples, encoding["input_ids"], encoding["offset_mapping"], strict=True))
        room = self.max_length - 2
        input_ids, attention_mask = self._pad([ids for _, ids, _ in rows], self.max_length)
        pixels = self.image_processor([example.image for example in examples], return_tensors="pt").pixel_values
        batch = {
            "pixel_values": pixels,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "image_ids": torch.tensor([stable_hash(example.image_id) for example in examples]),
            "skipped": [skip for example in examples for skip in example.skipped],
            "cut": sum(len(ids) > room for _, ids, _ in rows),
        }
        number, longest = self.num_sub_captions, self.longest_sub_caption
        drawn = [
            draw_captions(example.caption, offsets, self.captions, example.draw, number=number, longest=longest)
            for example, _, offsets in rows
        ]
        pieces = [
            [[token for start, stop in runs for token in ids[start:stop]] for runs in captions]
            for captions, (_, ids, _) in zip(drawn, rows, strict=True)
        ]
        if self.captions in ("sub_captions", "merged_captions"):
            ids, mask = self._pad([piece for row in pieces for piece in row], self.max_length)
            batch["sub_ids"], batch["sub_mask"] = (x.unflatten(0, (-1, number)) for x in (ids, mask))
            spans = [[(runs[0][0] + 1, runs[-1][1] + 1) for runs in captions] for captions in drawn]
            placed = [[len(runs) == 1 and runs[0][1] <= room for runs in captions] for captions in drawn]
            batch["sub_spans"] = torch.tensor(spans) * torch.tensor(placed)[..., None]
        elif self.captions != "full":
            short = [row[0] for row in pieces]
            if self.captions == "debias":
                free = [
                    draw_padding(room - len(ids), example.draw) for ids, example in zip(short, examples, strict=True)
                ]
                short = [[self.front_pad] * count + ids for count, ids in zip(free, short, strict=True)]
            batch["short_ids"], batch["short_mask"] = self._pad(short, self.max_length)
        if self.num_edits:
            batch |= self._edits(rows)
        if self.kept_prompts:
            batch["kept_ids"], batch["kept_mask"] = self._pad([self._kept(*row) for row in rows], STOCK_POSITIONS)
        if self.keyed:
            batch["pixel_keys"] = torch.tensor([content_key(image) for image in pixels])
        if self.keyed and self.kept_prompts:
            prompts = zip(batch["kept_ids"], batch["kept_mask"], strict=True)
            batch["kept_keys"] = torch.tensor([content_key(ids[mask]) for ids, mask in prompts])
        return batch

    def _edits(self, rows: Sequence[tuple[Example, list[int], list[tuple[int, int]]]]) -> dict[str, Tensor]:
        """Edits of the captions; where there are too few, the caption itself, which does not count."""
        chosen = [
            choose_edits(example.caption, example.edits, offsets, self.num_edits, self.edit_place, example.draw)
            for example, _, offsets in rows
        ]
        texts = [edit for edits in chosen for edit in edits]
        found = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        padded, valid = [], []
        for edits, (_, own, _) in zip(chosen, rows, strict=True):
            ids = [next(found) for _ in edits]
            room = self.max_length - 2
            seen = [each[:room] != own[:room] for each in ids]  # an edit beyond the window is none
            missing = self.num_edits - len(ids)
            padded += [*ids, *[own] * missing]
            valid.append([*seen, *[False] * missing])
        both = (each.unflatten(0, (-1, self.num_edits)) for each in self._pad(padded, self.max_length))
        return dict(zip(("edited_ids", "edited_mask"), both, strict=True)) | {"edited_valid": torch.tensor(valid)}

    def _kept(self, example: Example, ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
        draw = stable_hash(example.caption) if self.keyed else example.draw
        if self.kept_prompts == "random":
            return draw_random_prompt(self.vocabulary, draw, STOCK_POSITIONS - 2)
        start, stop = draw_short_prompt(example.caption, offsets, draw, STOCK_POSITIONS - 2)
        return ids[start:stop]

    def _pad(self, rows: list[list[int]], max_length: int) -> tuple[Tensor, Tensor]:
        """Puts start and end around contents, cut to fit `max_length`; ids and mask, (N, longest)."""
        rows = [[self.start, *ids[: max_length - 2], self.end] for ids in rows]
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        return ids, torch.arange(longest) < lengths[:, None]


def make_loader(
    dataset: CaptionDataset | TarDataset,
    collator: Collator,
    batch_size: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
    num_workers: int = 0,
    bucket_by_length: bool = False,
    rising_steps: int = 0,
    pin_memory: bool = False,
) -> DataLoader[dict[str, Any]]:
    """Batches of one process, step after step without end, for training.

    They do not depend on the number of workers, but for a stream, whose workers read shards of their own. The global
    random state is neither read nor changed.

    Args:
        dataset: From `open_dataset`.
        collator: Makes the batches.
        batch_size: Examples in this process.
        seed: Order and draws of a dataset; a stream has its own.
        rank, world_size: Which process of how many.
        first_step: The step of the first batch.
        num_workers: Processes that decode.
        pin_memory: Whether batches lie where a GPU copies from without waiting.
        bucket_by_length: Whether a batch holds captions of about one length; a stream has none to sort by.
        rising_steps: The first so many batches go from the shortest captions to the longest; not of a stream.

    Raises:
        ValueError: If the dataset is too small (see `StepSampler`), or a stream has fewer shards than readers or is to
            be read in order of length.
    """
    common = {
        "collate_fn": collator,
        "num_workers": num_workers,
        "generator": torch.Generator(),
        "pin_memory": pin_memory,
    }
    if isinstance(dataset, TarDataset):
        if rising_steps:
            raise ValueError(
                "a stream cannot be read from the shortest captions to the longest: take a recipe without "
                "length_curriculum, or give a folder or a list."
            )
        batches = _StreamBatches(dataset, batch_size, rank, world_size, first_step, max(num_workers, 1))
        return DataLoader(batches, batch_size=None, **common)  # type: ignore[arg-type]
    lengths = dataset.caption_lengths() if bucket_by_length or rising_steps else None
    sampler = StepSampler(
        len(dataset), batch_size, seed, rank, world_size, first_step, dataset.group_size, lengths, bucket_by_length,
        rising_steps,
    )  # fmt: skip
    return DataLoader(dataset, batch_sampler=sampler, **common)  # type: ignore[arg-type]
