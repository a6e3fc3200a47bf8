"""Captioned images as published: which files hold them, what is in them, and what of it is bad.

Everything that a training run may meet in files of others is a `Skip` with a name and a reason, never an exception.
"""

import csv
import functools
import glob
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

IMAGE_COLUMNS = ("image", "file_name", "image_file", "image_path", "filename")
CAPTION_COLUMNS = ("caption", "text", "description", "captions", "conversations")
EDIT_COLUMNS = ("edits", "hard_negatives", "negative_captions")  # captions edited elsewhere, wrong of their image
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")  # in shards
LIST_SUFFIXES = (".json", ".jsonl", ".jsonlines", ".csv")
MAX_ASPECT_RATIO = 100  # a hair line, whose shorter side scaled to a model's would make the longer one enormous
SPLIT_NAMES = {  # what others call a split
    "train": ("train", "restval"),  # Karpathy's split of COCO: restval is trained on
    "validation": ("validation", "val", "valid", "dev"),
    "val": ("val", "validation", "valid", "dev"),
}


@dataclass(frozen=True)
class Skip:
    """An example that cannot be used: where it stands (file:line), and why."""

    name: str
    reason: str


class Record(NamedTuple):
    """One caption and where its image is: a file, or the row of a table. Captions of one image share its image_id.

    `edits` are the caption's, as the data has them.
    """

    image: str | int
    caption: str
    image_id: str
    name: str
    edits: Sequence[str] = ()


class Slot(NamedTuple):
    """One place in a tar shard: an example's files as {extension: (offset, size)}, or the reason why there is none."""

    shard: str
    key: str
    files: dict[str, tuple[int, int]]
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.shard}:{self.key}" if self.key else self.shard


class Unusable(ValueError):
    """What is wrong with one example."""


# ------------------------------------------------------------------------------------------------ images and captions


def open_image(source: str | bytes) -> Image.Image:
    """Decodes an image wholly, turns it as its EXIF orientation says, and converts it to RGB.

    Transparent images are laid on white, the paper that cut-outs, drawings and diagrams are made for; dropping the
    alpha channel would show whatever color lies hidden below it, mostly black.

    Args:
        source: A file, or the bytes of one.

    Raises:
        Unusable: If it is missing, truncated, or no image; a line; or so large that Pillow takes it for a
            decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
                image.load()
                if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                    raise ValueError(f"{image.width} x {image.height} pixels are a line")
                return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a broken file may raise anything: OSError, SyntaxError, struct.error, ...
        reason = "missing file" if isinstance(error, FileNotFoundError) else f"unreadable image: {error}"
        raise Unusable(reason) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey: a conversion would cut everything above 255 to white
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def captions_of(row: dict[str, Any], column: str | None = None) -> list[str]:
    """The captions in a row: a text, several texts, or a conversation's first answer (ShareGPT4V).

    White space is joined: line breaks mean nothing to CLIP's tokenizer.

    Args:
        row: The row; the first of `CAPTION_COLUMNS` that it has is taken.
        column: Names the column instead.

    Returns:
        One or more captions, none of them empty.

    Raises:
        Unusable: If there is no caption, or one is empty or no text.
    """
    columns = (column,) if column else CAPTION_COLUMNS
    value = next((row[name] for name in columns if row.get(name) is not None), None)
    if value is None:
        raise Unusable(f"no caption: none of {', '.join(columns)} is there")
    texts: list[Any] = list(value) if isinstance(value, list) else [value]
    if texts and all(isinstance(turn, dict) for turn in texts):
        texts = [turn.get("value") for turn in texts if turn.get("from") in ("gpt", "assistant")][:1]
    try:
        [text.encode() for text in texts]
    except (AttributeError, UnicodeEncodeError) as error:  # a number, half a surrogate pair
        raise Unusable("the caption is not text") from error
    captions = [" ".join(text.split()) for text in texts]
    if not captions or not all(captions):
        raise Unusable("empty caption")
    return captions


def edits_of(row: dict[str, Any], captions: int = 1) -> list[list[str]]:
    """The edited captions in a row, those of each of its captions: a list of texts, or a list for each caption.

    Args:
        row: The row; the first of `EDIT_COLUMNS` that it has is taken. CSV has texts in JSON.
        captions: How many the row has.

    Raises:
        Unusable: If the field is not such a list.
    """
    value = next((row[name] for name in EDIT_COLUMNS if row.get(name)), None)
    if value is None:
        return [[] for _ in range(captions)]
    try:
        value = json.loads(value) if isinstance(value, str) else value
        lists = [value] if captions == 1 and all(isinstance(each, str) for each in value) else value
        known = isinstance(lists, list) and len(lists) == captions and all(isinstance(own, list) for own in lists)
        if not known or not all(isinstance(text, str) for own in lists for text in own):
            raise ValueError
        return [[" ".join(text.split()) for text in own] for own in lists]
    except (TypeError, ValueError) as error:
        raise Unusable(f"the edited captions are not a list of texts for each of {captions} captions") from error


# ------------------------------------------------------------------------------------------------------------- listing


def read_records(
    source: Path,
    split: str,
    image_root: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> tuple[list[Record], list[Skip]] | None:
    """Lists what a folder or file of a known layout holds.

    - imagefolder: `metadata.jsonl` or `metadata.csv` in the folder, or in its folder of the split;
    - DOCCI: `docci_descriptions.jsonlines` beside `images/`;
    - Urban1k: `image/NAME.jpg` with `caption/NAME.txt`;
    - a file of rows: .jsonl, .jsonlines, .csv, or .json with a list (ShareGPT4V, or an image and a caption each),
      with COCO's `images` and `annotations`, or with Karpathy's `images` and their `sentences`.

    A row with a `split` belongs to that split alone. Images lie below `image_root`, or where the layout has them.

    Returns:
        Records and skips, or None where the folder holds none of these.

    Raises:
        ValueError: If a file's kind is unknown, a .json file is broken as a whole, or no row is of the split.
    """
    if source.is_file():
        rows, roots = _rows_of_file(source), _roots_of_file(source)
    elif (source / "docci_descriptions.jsonlines").is_file():
        rows, roots = _rows_of_file(source / "docci_descriptions.jsonlines"), [source / "images", source]
    elif (source / "image").is_dir() and (source / "caption").is_dir():
        rows, roots = _rows_of_pairs(source / "image", source / "caption"), [source / "image"]
    else:
        folders = [*(source / name for name in SPLIT_NAMES.get(split, (split,))), source]
        files = [folder / name for folder in folders for name in ("metadata.jsonl", "metadata.csv")]
        file = next(filter(Path.is_file, files), None)
        if file is None:
            return None
        rows, roots = _rows_of_file(file), [file.parent]
    return _records(rows, [Path(image_root)] if image_root else roots, split, image_column, caption_column)


def _records(
    rows: Iterable[tuple[str, dict[str, Any]] | Skip],
    roots: list[Path],
    split: str,
    image_column: str | None,
    caption_column: str | None,
) -> tuple[list[Record], list[Skip]]:
    """Rows become records; a folder is listed once, which on a network is far quicker than asking for each file."""
    records, skipped = [], []
    splits = set()
    names_in = functools.cache(lambda folder: frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset())
    for row in rows:
        if isinstance(row, Skip):
            skipped.append(row)
            continue
        name, values = row
        if isinstance(values.get("split"), str):
            splits.add(values["split"])
            if values["split"] not in SPLIT_NAMES.get(split, (split,)):
                continue
        columns = (image_column,) if image_column else IMAGE_COLUMNS
        image = next((values[column] for column in columns if isinstance(values.get(column), str)), None)
        try:
            if image is None:
                raise Unusable(f"no image: none of {', '.join(columns)} is there")
            captions = captions_of(values, caption_column)
            edits = edits_of(values, len(captions))
            files = (os.path.normpath(root / image) for root in roots)
            file = next((file for file in files if os.path.basename(file) in names_in(os.path.dirname(file))), None)
            if file is None:
                raise Unusable(f"missing file {image}")
        except Unusable as error:
            skipped.append(Skip(name, str(error)))
            continue
        for place, (caption, wrong) in enumerate(zip(captions, edits, strict=True)):
            own = name if len(captions) == 1 else f"{name}[{place}]"
            records.append(Record(file, caption, image, own, wrong))
    if splits and not records:
        raise ValueError(f"split {split!r} has no usable row; the splits here are {', '.join(sorted(splits))}.")
    return records, skipped


def _rows_of_file(file: Path) -> Iterator[tuple[str, dict[str, Any]] | Skip]:
    """Yields each row with its name (file:line), or a skip."""
    if file.suffix == ".csv":
        with file.open(encoding="utf-8", errors="replace", newline="") as lines:
            reader = csv.DictReader(lines)
            while True:
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    yield Skip(f"{file}:{reader.line_num}", f"broken line: {error}")
                    continue
                if row is None:
                    return
                yield f"{file}:{reader.line_num}", row
    elif file.suffix in (".jsonl", ".jsonlines"):
        yield from _rows_of_lines(file)
    elif file.suffix == ".json":
        try:
            data = json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{file} is not JSON ({error}): fix it, or name it .jsonl if each line is one."
            ) from error
        if isinstance(data, dict):
            data = _coco_rows(data)
        for place, row in enumerate(data):
            name = f"{file}:{place}"
            yield (name, row) if isinstance(row, dict) else Skip(name, "no JSON object")
    else:
        raise ValueError(f"{file} is of no known kind: give a .jsonl, .jsonlines, .json or .csv file, or .tar shards.")


def _rows_of_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]] | Skip]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                yield Skip(name, f"broken line: {error}")
                continue
            yield (name, row) if isinstance(row, dict) else Skip(name, "no JSON object")


def _coco_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each image of COCO's captions (`annotations` by `image_id`) or of Karpathy's (`sentences`)."""
    images = data.get("images")
    if not isinstance(images, list):
        raise ValueError("a .json file holds a list of rows, or an object with images; this one has neither.")
    texts: dict[Any, list[str]] = {}
    for annotation in data.get("annotations", ()):
        texts.setdefault(annotation.get("image_id"), []).append(annotation.get("caption"))
    rows = []
    for image in images:
        if "sentences" in image:
            captions = [sentence.get("raw") for sentence in image["sentences"]]
        else:
            captions = texts.get(image.get("id"), [])
        name = os.path.join(image.get("filepath", ""), image.get("filename") or image.get("file_name") or "")
        rows.append({"image": name, "caption": captions} | {key: image[key] for key in ("split",) if key in image})
    return rows


def _roots_of_file(file: Path) -> list[Path]:
    """Where a file's images may lie: beside it, in `images/`, or where COCO has those of `captions_SPLIT.json`."""
    return [file.parent, file.parent / "images", file.parent.parent / file.stem.removeprefix("captions_")]


def _rows_of_pairs(images: Path, captions: Path) -> Iterator[tuple[str, dict[str, Any]] | Skip]:
    """Pairs files of one stem."""
    names = {file.stem: file.name for file in sorted(images.iterdir())}
    for file in sorted(captions.glob("*.txt")):
        try:
            caption = file.read_text(encoding="utf-8")
        except ValueError as error:
            yield Skip(str(file), f"broken text: {error}")
        else:
            yield str(file), {"image": names.get(file.stem, f"{file.stem}.jpg"), "caption": caption}
        names.pop(file.stem, None)
    for name in names.values():
        yield Skip(str(images / name), "no caption")


# ------------------------------------------------------------------------------------------------------------- shards


def expand_shards(pattern: str) -> list[str]:
    """Tar shards of a glob and of braces, `data/{000..012}.tar` or `data/{a,b}-*.tar`, sorted.

    Raises:
        ValueError: If no such file is there.
    """
    shards = []
    for name in _expand_braces(pattern):
        shards += sorted(glob.glob(name)) or ([] if glob.has_magic(name) else [name])  # a missing one is bad data
    if not any(map(os.path.isfile, shards)):
        raise ValueError(f"no shard is at {pattern}: give a path, a glob or braces that match .tar files.")
    return shards


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if ends:
        parts = [str(number).zfill(len(ends[1])) for number in range(int(ends[1]), int(ends[2]) + 1)]
    else:
        parts = match[1].split(",")
    return [
        name for part in parts for name in _expand_braces(pattern[: match.start()] + part + pattern[match.end() :])
    ]


def shard_slots(shard: str) -> Iterator[Slot]:
    """Yields the examples of a shard by its headers alone: consecutive files of one name up to its first dot.

    A shard that is broken at some place ends there, in a slot that says so.
    """
    key, files = "", dict[str, tuple[int, int]]()
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                if os.path.join(folder, stem) != key and files:
                    yield Slot(shard, key, files)
                    files = {}
                key = os.path.join(folder, stem)
                files[extension.lower()] = (member.offset_data, member.size)
            if files:
                yield Slot(shard, key, files)
            if tar.offset + tarfile.BLOCKSIZE > os.path.getsize(shard):
                raise tarfile.ReadError("it is cut off: its end mark is missing")
    except (OSError, tarfile.TarError) as error:
        reason = "missing file" if isinstance(error, FileNotFoundError) else f"broken shard: {error}"
        yield Slot(shard, "", {}, reason)


def read_slot(slot: Slot, caption_column: str | None = None) -> tuple[Image.Image, list[str], list[list[str]]]:
    """Image, captions and their edits of a slot: KEY.txt, or KEY.json with one of `CAPTION_COLUMNS`.

    Raises:
        Unusable: If a part is missing, empty or unreadable.
    """
    if slot.reason:
        raise Unusable(slot.reason)
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in slot.files), None)
    if suffix is None:
        raise Unusable(f"no image: none of {', '.join(IMAGE_SUFFIXES)} is there")
    if "txt" in slot.files and caption_column is None:
        row = {"text": _read_part(slot, "txt").decode("utf-8", errors="replace")}
    elif "json" in slot.files:
        try:
            row = json.loads(_read_part(slot, "json"))
        except ValueError as error:
            raise Unusable(f"broken JSON: {error}") from error
    else:
        raise Unusable("no caption: neither txt nor json is there")
    row = row if isinstance(row, dict) else {}
    captions = captions_of(row, caption_column)
    edits = edits_of(row, len(captions))
    return open_image(_read_part(slot, suffix)), captions, edits


def _read_part(slot: Slot, extension: str) -> bytes:
    offset, size = slot.files[extension]
    try:
        with open(slot.shard, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise Unusable(f"unreadable shard: {error}") from error
    if len(data) < size:
        raise Unusable("truncated shard")
    return data
