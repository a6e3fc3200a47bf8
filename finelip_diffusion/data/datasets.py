"""Long-caption datasets: images with their captions, from any known source, and the account of what is unusable.

An example is a function of its index and of one integer, the draw; nothing here reads the global random state.
"""

import copy
import hashlib
import itertools
import json
import os
import random
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from ..scenes import Caption, Scene, alterations, describe, render, sample_for, sample_scene, telling, vary
from .edits import rule_edits
from .sources import (
    CAPTION_COLUMNS,
    EDIT_COLUMNS,
    IMAGE_COLUMNS,
    LIST_SUFFIXES,
    Record,
    Skip,
    Slot,
    Unusable,
    captions_of,
    edits_of,
    expand_shards,
    open_image,
    read_records,
    read_slot,
    shard_slots,
)

MAX_IN_A_ROW = 1000  # unusable examples after which a dataset gives up looking for the next good one
FEW, MANY = (1, 3), (4, 9)  # numbers of objects in a scene
SHARE_OF_FEW = 0.25
SHARE_OF_ARRANGED = 0.25  # of scenes whose captions may leave places out
GROUP_SIZE = 8  # a scene and its near-duplicates
SHUFFLE_BUFFER = 5000  # examples of a stream that wait to be drawn, about half a shard
MIN_SEEN = 1000  # examples of a stream before which its share of unusable ones means nothing


@dataclass(frozen=True)
class Example:
    """An image and its caption.

    Attributes:
        image: RGB, of any size.
        caption: Its text, one line.
        image_id: The same for captions of the same image.
        name: Where it comes from (file:line).
        skipped: What was found unusable on the way to this example, which takes its place.
        draw: What further captions are drawn by.
        edits: Captions that are wrong of the image, one change each, where they are asked for.
    """

    image: Image.Image
    caption: str
    image_id: str
    name: str
    skipped: tuple[Skip, ...] = ()
    draw: int = 0
    edits: tuple[str, ...] = ()


def stable_hash(*parts: object) -> int:
    """63 bits that depend on the text of the parts alone, in every process and on every machine."""
    text = " ".join(map(str, parts)).encode("utf-8", "surrogatepass")  # file names may be no Unicode
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# ------------------------------------------------------------------------------------------------------------ datasets


class CaptionDataset(Dataset[Example]):
    """Examples by index, or by (index, draw); an unusable one is replaced by the next that can be used.

    Attributes:
        group_size: Consecutive examples that belong in one batch.
        skipped: What was found unusable while the data was listed; it has no index.
        with_edits: Whether examples come with edits of their captions.
    """

    group_size: int = 1
    with_edits: bool = False
    skipped: Sequence[Skip] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int, draw: int) -> Example:
        """Decodes one example.

        Raises:
            Unusable: If it cannot be used.
        """

    @abstractmethod
    def caption(self, index: int, draw: int) -> str:
        """The caption of an example, without its image."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Where an example comes from."""

    @abstractmethod
    def caption_lengths(self) -> np.ndarray:
        """A length for each caption, (N,), in any unit that orders captions by their tokens."""

    def drawn_lengths(self, indices: np.ndarray, draws: Sequence[int]) -> np.ndarray:
        """Such lengths of the captions that these draws choose, (len(indices),)."""
        return self.caption_lengths()[indices]

    def __getitem__(self, index: int | tuple[int, int]) -> Example:
        index, draw = index if isinstance(index, tuple) else (index, 0)
        if not 0 <= index < len(self):
            raise IndexError(index)
        skipped: list[Skip] = []
        for place in range(index, index + min(len(self), MAX_IN_A_ROW)):
            try:
                return replace(self.read(place % len(self), draw), skipped=tuple(skipped))
            except Unusable as error:
                skipped.append(Skip(self.name(place % len(self)), str(error)))
        raise _all_unusable(skipped)


def _all_unusable(skipped: Sequence[Skip]) -> ValueError:
    return ValueError(
        f"{len(skipped)} examples in a row cannot be used, the first of them {skipped[0].name} "
        f"({skipped[0].reason}): fix the data."
    )


class RecordDataset(CaptionDataset):
    """Captions of image files."""

    def __init__(self, records: Iterable[Record], skipped: Sequence[Skip] = ()) -> None:
        # One array of bytes, which worker processes share; millions of small objects would be copied into each of
        # them as soon as their reference counts change.
        rows = [json.dumps(record).encode() for record in records]
        self._ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(rows), np.uint8)
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self._ends)

    def record(self, index: int) -> Record:
        """Caption, image file and ids of an example, without its image."""
        start = self._ends[index - 1] if index else 0
        record = Record(*json.loads(self._bytes[start : self._ends[index]].tobytes()))
        return record._replace(edits=tuple(record.edits))

    def image(self, record: Record) -> str | bytes:
        """The file, or the bytes of one, that a record speaks of."""
        return str(record.image)

    def read(self, index: int, draw: int) -> Example:
        record = self.record(index)
        edits = tuple(record.edits or rule_edits(record.caption, draw)) if self.with_edits else ()
        return Example(
            open_image(self.image(record)), record.caption, record.image_id, record.name, draw=draw, edits=edits
        )

    def caption(self, index: int, draw: int) -> str:
        return self.record(index).caption

    def name(self, index: int) -> str:
        return self.record(index).name

    def caption_lengths(self) -> np.ndarray:
        """Characters."""
        return np.array([len(self.record(index).caption) for index in range(len(self))])


class TableDataset(RecordDataset):
    """A table of the `datasets` library with a column of images; its captions are listed, its images stay there.

    Raises:
        ValueError: If it has no such columns.
    """

    def __init__(self, table: Any, source: str, image_column: str | None, caption_column: str | None) -> None:
        import datasets

        columns = table.column_names
        images = (image_column,) if image_column else IMAGE_COLUMNS
        captions = (caption_column,) if caption_column else CAPTION_COLUMNS
        self.image_column = next((column for column in images if column in columns), "")
        caption = next((column for column in captions if column in columns), "")
        if not self.image_column or not caption:
            raise ValueError(
                f"{source} has columns {', '.join(columns)}: no image among {', '.join(images)}, or no caption among "
                f"{', '.join(captions)}; name them with image_column and caption_column."
            )
        if isinstance(table.features[self.image_column], datasets.Image):
            table = table.cast_column(self.image_column, datasets.Image(decode=False))
        self.table = table
        column = next((column for column in EDIT_COLUMNS if column in columns), None)
        wrong = None if column is None else table[column]
        records, skipped = [], []
        for row, value in enumerate(table[caption]):
            name = f"{source}:{row}"
            try:
                texts = captions_of({caption: value}, caption)
                edits = edits_of({"edits": wrong[row]} if wrong else {}, len(texts))
            except Unusable as error:
                skipped.append(Skip(name, str(error)))
                continue
            for place, (text, own) in enumerate(zip(texts, edits, strict=True)):
                records.append(Record(row, text, str(row), name if len(texts) == 1 else f"{name}[{place}]", own))
        super().__init__(records, skipped)

    def image(self, record: Record) -> str | bytes:
        value = self.table[record.image][self.image_column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, (str, bytes)):
            raise Unusable("no image")
        return value


class ScenesDataset(CaptionDataset):
    """The bundled world, drawn on the fly: groups of a scene and its near-duplicates.

    A group of eight is a scene, its objects in other cells (four times), and its attributes dealt out anew (three
    times); without near-duplicates in the batch, text states forget places. The draw chooses a caption's wording.

    Args:
        split: `"train"` or `"test"`.
        num_scenes: Pictures.
        seed: Which scenes.
        group_size: Pictures of a group; 1 for scenes that have nothing to do with each other.
        wording: How scenes are told: `"all"`, each draw in a training family of its own and with noise; `"unseen"`,
            the same in families and words that no training caption has; the name of one family, without noise; or
            several of these between commas, one of which each draw chooses. Where places may be left unsaid (`"all"`
            and `"unplaced"`), some or all scenes of at most five objects are `scenes.arranged`.

    Raises:
        ValueError: For an unknown split or wording, or `"unplaced"` beside others.

    Attributes:
        arranged_share: Of scenes that are arranged.
    """

    def __init__(
        self,
        split: str = "train",
        num_scenes: int = 40_000,
        seed: int = 0,
        group_size: int = GROUP_SIZE,
        wording: str = "sentences",
    ) -> None:
        self.split, self.num_scenes, self.seed, self.group_size = split, num_scenes, seed, group_size
        names = wording.split(",")
        if "unplaced" in names and len(names) > 1:
            raise ValueError("The wording 'unplaced' needs scenes of its own: give it alone, or 'all', which has it.")
        self._tellings = [telling(name) for name in names]
        self._like: ScenesDataset | None = None
        self.arranged_share = 1.0 if names == ["unplaced"] else SHARE_OF_ARRANGED if "all" in names else 0.0
        for told in self._tellings:
            describe(self._base(0)[1], **told)  # refuses an unknown split or wording

    def retold(self, wording: str) -> "ScenesDataset":
        """The same pictures in another wording; `"sentences"` say no background where this one's caption says none."""
        other = copy.copy(self)
        other._tellings, other._like = [telling(name) for name in wording.split(",")], self
        return other

    def __len__(self) -> int:
        return self.num_scenes

    def _base(self, group: int) -> tuple[int, Scene]:
        seed = self.seed * 10_000_000 + group
        few = random.Random(f"few {seed}").random() < SHARE_OF_FEW
        if random.Random(f"arranged {seed}").random() < self.arranged_share:
            return seed, sample_for("unplaced", seed, self.split)
        return seed, sample_scene(seed, self.split, FEW if few else MANY)

    def scene(self, index: int) -> Scene:
        """What the picture of an example shows."""
        group, turn = divmod(index, self.group_size)
        seed, scene = self._base(group)
        if not turn:
            return scene
        other = "exchange" if len(scene.objects) > 1 else "alter"
        kind = "move" if turn <= self.group_size // 2 and self.arranged_share < 1 else other
        return vary(scene, kind, self.group_size * seed + turn - 1)

    def read(self, index: int, draw: int) -> Example:
        scene = self.scene(index)
        caption = self.caption(index, draw)
        edits = self._edits(scene, caption, draw) if self.with_edits else ()
        return Example(render(scene), caption, repr(scene), self.name(index), draw=draw, edits=edits)

    def _edits(self, scene: Scene, caption: str, draw: int) -> tuple[str, ...]:
        """For each object, the caption of the scene with that one altered, in the same words and order.

        Only `"sentences"` can be told alike; other families are edited by rules.
        """
        if self._telling(draw)["wording"] != "sentences":
            return tuple(rule_edits(caption, draw))
        rng, edits = random.Random(f"edits {draw}"), []
        for item in scene.objects:
            others = alterations(scene, [item])
            rng.shuffle(others)
            other = next((other for other in others if other.split == self.split), None)
            if other is not None:
                edits.append(str(describe(other, draw, like=scene)))
        return tuple(edits)

    def caption(self, index: int, draw: int) -> str:
        told = self._told(index, draw)
        like = self._like if self._telling(draw)["wording"] == "sentences" else None
        if like is not None and like._told(index, draw).background is None:
            return str(told)[told.facts[0].start :]  # without the opening
        return told

    def _told(self, index: int, draw: int) -> Caption:
        return describe(self.scene(index), draw, **self._telling(draw))

    def _telling(self, draw: int) -> dict[str, Any]:
        return random.Random(f"wording {draw}").choice(self._tellings)

    def name(self, index: int) -> str:
        return f"scenes:{self.split}:{index}"

    def caption_lengths(self) -> np.ndarray:
        """Objects: a sentence each."""
        groups = range(-(-len(self) // self.group_size))
        counts = [len(self._base(group)[1].objects) for group in groups]
        return np.repeat(counts, self.group_size)[: len(self)]

    def drawn_lengths(self, indices: np.ndarray, draws: Sequence[int]) -> np.ndarray:
        """Characters: wordings differ more than numbers of objects do."""
        return np.array([len(self.caption(*place)) for place in zip(indices.tolist(), draws, strict=True)])


class DrawnCaptions(CaptionDataset):
    """Images with several captions as one example each, whose caption the draw chooses (LaCLIP, arXiv 2305.20088).

    Args:
        dataset: Records of captions; those that share an image_id are one image's.
    """

    def __init__(self, dataset: RecordDataset) -> None:
        self.dataset, self.skipped = dataset, dataset.skipped
        places: dict[str, list[int]] = {}
        for index in range(len(dataset)):
            places.setdefault(dataset.record(index).image_id, []).append(index)
        self._places = list(places.values())

    def __len__(self) -> int:
        return len(self._places)

    def _chosen(self, index: int, draw: int) -> int:
        own = self._places[index]
        return own[draw % len(own)]

    def read(self, index: int, draw: int) -> Example:
        self.dataset.with_edits = self.with_edits
        return self.dataset.read(self._chosen(index, draw), draw)

    def caption(self, index: int, draw: int) -> str:
        return self.dataset.caption(self._chosen(index, draw), draw)

    def name(self, index: int) -> str:
        return self.dataset.name(self._places[index][0])

    def caption_lengths(self) -> np.ndarray:
        """Characters of an image's longest caption."""
        lengths = self.dataset.caption_lengths()
        return np.array([lengths[own].max() for own in self._places])


class TarDataset(IterableDataset[Example]):
    """Examples of WebDataset shards, streamed: an endless sequence, a function of the seed and of the reader.

    Each epoch deals the shards out to the readers anew (a reader is a worker of a process). A reader goes through the
    headers of its shards, keeps the places of `SHUFFLE_BUFFER` examples, and reads those that it draws among them.
    Places cost nothing, so examples mix across shards; and skipping to a step costs headers, not images. The
    `webdataset` library does neither: it has no way back to a place in its stream.

    An unusable example is replaced by the next usable one, which comes again in its own place: the sequence does not
    depend on what is found in it, and can be counted without being read.

    Args:
        shards: Files; at least one for each reader.
        seed: Orders shards and examples.
        caption_column: Of KEY.json, where the caption is there under another name.
    """

    skipped: Sequence[Skip] = ()
    with_edits: bool = False

    def __init__(self, shards: Sequence[str], seed: int = 0, caption_column: str | None = None) -> None:
        self.shards, self.seed, self.caption_column = list(shards), seed, caption_column

    def __iter__(self) -> Iterator[Example]:
        return self.examples()

    def examples(self, reader: int = 0, readers: int = 1, skip: int = 0) -> Iterator[Example]:
        """What one of several readers reads, from its example number `skip` on.

        Raises:
            ValueError: If nothing can be used.
        """
        skipped: list[Skip] = []
        for epoch in itertools.count():
            count = 0
            for slot in self._slots(epoch, reader, readers):
                count += 1
                if skip:
                    skip -= 1
                    continue
                draw = stable_hash(self.seed, epoch, slot.name)
                try:
                    image, captions, edits = read_slot(slot, self.caption_column)
                except Unusable as error:
                    skipped.append(Skip(slot.name, str(error)))
                    if len(skipped) == MAX_IN_A_ROW:
                        raise _all_unusable(skipped) from error
                    continue
                chosen = draw % len(captions)
                caption = captions[chosen]
                wrong = tuple(edits[chosen] or rule_edits(caption, draw)) if self.with_edits else ()
                example = Example(image, caption, slot.name, slot.name, tuple(skipped), draw, wrong)
                yield example
                yield from [replace(example, skipped=())] * len(skipped)
                skipped = []
            if not count:
                raise ValueError(f"reader {reader} of {readers} finds no example in the {len(self.shards)} shards.")

    def _slots(self, epoch: int, reader: int, readers: int) -> Iterator[Slot]:
        shards = random.Random(f"shards {self.seed} {epoch}").sample(self.shards, len(self.shards))
        rng = random.Random(f"slots {self.seed} {epoch} {reader}")
        buffer: list[Slot] = []
        for slot in itertools.chain.from_iterable(map(shard_slots, shards[reader::readers])):
            if len(buffer) < SHUFFLE_BUFFER:
                buffer.append(slot)
                continue
            place = rng.randrange(SHUFFLE_BUFFER)
            buffer[place], slot = slot, buffer[place]
            yield slot
        rng.shuffle(buffer)
        yield from buffer


def open_dataset(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    image_root: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    seed: int = 0,
    num_scenes: int = 40_000,
    edits: bool = False,
    rewrites: bool = False,
) -> CaptionDataset | TarDataset:
    """Opens captioned images of any of these kinds, told apart by looking.

    Args:
        source: `"scenes"`, or `"scenes:WORDING"` (see `ScenesDataset`); a folder or file that `sources.read_records`
            knows (imagefolder, DOCCI, Urban1k, JSON, JSON lines, CSV, COCO, Karpathy); tar shards as a path, glob or
            braces (WebDataset, streamed); a folder or id of the `datasets` library.
        split: Of sources that have splits; others are taken whole.
        image_root: Where the image files of a list are, if not beside it.
        image_column, caption_column: Names in rows, where they are not the usual ones.
        seed: Which scenes, and the order of a stream.
        num_scenes: Pictures of `"scenes"`.
        edits: Whether examples come with edits of their captions: those of the data (`sources.EDIT_COLUMNS`), of
            scenes with one object altered, or else by rules (`edits.rule_edits`).
        rewrites: Whether an image of several captions is one example, whose caption is drawn anew each time, rather
            than each caption an example; `"scenes"` are told in all training families then. A stream always draws.

    Raises:
        ValueError: If the source is none of these, or nothing in it can be used.
    """
    dataset = _open(os.fspath(source), split, image_root, image_column, caption_column, seed, num_scenes, rewrites)
    if rewrites and isinstance(dataset, RecordDataset):
        dataset = DrawnCaptions(dataset)
    dataset.with_edits = edits
    return dataset


def _open(
    source: str, split: str, image_root: str | Path | None, image_column: str | None, caption_column: str | None,
    seed: int, num_scenes: int, rewrites: bool,
) -> CaptionDataset | TarDataset:  # fmt: skip
    world, _, wording = source.partition(":")
    if world == "scenes":
        return ScenesDataset(split, num_scenes, seed, wording=wording or ("all" if rewrites else "sentences"))
    if source.endswith(".tar"):
        return TarDataset(expand_shards(source), seed, caption_column)
    path, found = Path(source), None
    if path.exists():
        found = read_records(path, split, image_root, image_column, caption_column)
    dataset = (
        RecordDataset(*found)
        if found
        else TableDataset(_open_table(source, split), source, image_column, caption_column)
    )
    if not len(dataset):
        first = "".join(f"; {skip.name}: {skip.reason}" for skip in dataset.skipped[:1])
        raise ValueError(f"{source}, split {split!r}, has nothing to use ({len(dataset.skipped)} skipped{first}).")
    return dataset


def _open_table(source: str, split: str) -> Any:
    folder = os.path.isdir(source)
    kinds = (
        "metadata.jsonl or metadata.csv (imagefolder), docci_descriptions.jsonlines (DOCCI), image/ and caption/ "
        "(Urban1k), and what the datasets library saves or loads; a .json, .jsonl or .csv file and .tar shards are "
        "named themselves"
    )
    if not folder and (not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.endswith(LIST_SUFFIXES)):
        raise ValueError(
            f"{source} is not there, and is not an id of the datasets library: give a folder or file, or 'scenes'."
        )
    try:
        import datasets
    except ImportError as error:
        where = f"{source} holds none of: {kinds}" if folder else f"{source} is not there; if it is an id, reading it"
        raise ValueError(f"{where} needs the datasets library: pip install datasets.") from error
    try:
        if any(os.path.isfile(os.path.join(source, name)) for name in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(source)
            return table[split] if isinstance(table, datasets.DatasetDict) else table
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises whatever its readers and the hub's client raise
        looked = f"looked for {kinds}" if folder else "neither a file nor a dataset that can be loaded"
        raise ValueError(f"{source}, split {split!r}: {looked} ({type(error).__name__}: {error}).") from error


class SkipLog:
    """Counts what cannot be used, writes it down once, and stops a run that has too much of it.

    Args:
        path: skipped.jsonl: a line {"name", "reason"} for each. What an earlier run wrote there counts.
        max_bad_fraction: Of `total`, 0 to 1.
        total: Examples, the unusable ones included; None for a stream, where what was seen counts.
        write: Whether this process writes; of several that are told the same, one should.
    """

    def __init__(
        self, path: str | Path, max_bad_fraction: float = 0.01, total: int | None = None, write: bool = True
    ) -> None:
        self.path, self.max_bad_fraction, self.total, self.write = Path(path), max_bad_fraction, total, write
        self.names: dict[str, None] = {}
        whole = b""
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            if line.endswith(b"\n"):  # a run that was killed may leave half a line
                self.names[json.loads(line)["name"]] = None
                whole += line
        if write and self.path.exists():
            os.truncate(self.path, len(whole))

    def add(self, skips: Iterable[Skip], seen: int = 0) -> None:
        """Takes note of what was skipped.

        Args:
            skips: With or without those that are known already.
            seen: Examples of a stream so far.

        Raises:
            ValueError: If more than `max_bad_fraction` cannot be used, with the names of the first.
        """
        found = {skip.name: skip for skip in skips}
        if not found:
            return
        new = {name: skip for name, skip in found.items() if name not in self.names}
        if self.write and new:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"name": skip.name, "reason": skip.reason}) + "\n" for skip in new.values())
        self.names |= dict.fromkeys(new)
        total = max(seen, MIN_SEEN) if self.total is None else self.total
        if len(self.names) > self.max_bad_fraction * total:
            shown = ", ".join(itertools.islice(self.names, 10)) + (", ..." if len(self.names) > 10 else "")
            raise ValueError(
                f"{len(self.names)} of {total} examples cannot be used, more than max_bad_fraction="
                f"{self.max_bad_fraction:g} allows: {shown}; {self.path} has the reasons. Mend them, or allow more."
            )
