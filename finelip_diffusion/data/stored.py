"""What frozen towers make of images and prompts, computed once and kept on disk in shards (MobileCLIP's idea)."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import writing

SHARD_BYTES = 2**26  # of half precision, that a process gathers before it writes them
KEYS, LENGTHS = "keys", ".lengths"

Record = dict[str, Tensor]
"""Name -> (rows, width); names and widths are those of every record of a store, rows may differ."""


def fingerprint(weights: Mapping[str, Tensor], *parts: str) -> str:
    """Names a folder by what its content depends on: weights, and whatever else."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode())
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def content_key(tensor: Tensor) -> int:
    """A number of 63 bits that stands for the content of a tensor on the CPU, its shape included."""
    digest = hashlib.blake2b(str(tuple(tensor.shape)).encode(), digest_size=8)
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "big") >> 1


class TensorStore:
    """Records by key, in shards of safetensors and half precision.

    Several processes may fill one folder: each writes shards of its own, whole, and sees those of the others when it
    misses a key. What a killed process had not written is computed again.
    """

    def __init__(self, folder: Path, rank: int = 0):
        """Args: the folder, made if it does not exist; the number of this process among those that write there."""
        self.folder, self.rank = folder, rank
        folder.mkdir(parents=True, exist_ok=True)
        self._read: set[str] = set()
        self._shards: list[dict[str, tuple[Tensor, list[int]]]] = []  # tensors that lie in the file, first rows
        self._places: dict[int, tuple[int, int]] = {}  # key -> shard, record there
        self._waiting: dict[int, Record] = {}
        self._bytes = 0
        self.refresh()

    def __len__(self) -> int:
        return len(self._places) + len(self._waiting)

    def __contains__(self, key: int) -> bool:
        return key in self._places or key in self._waiting

    def __getitem__(self, key: int) -> Record:
        """The record of a key, float16."""
        if key in self._waiting:
            return self._waiting[key]
        shard, number = self._places[key]
        return {name: rows[first[number] : first[number + 1]] for name, (rows, first) in self._shards[shard].items()}

    def refresh(self) -> None:
        """Reads the index of shards that were written since the last time.

        Raises:
            ValueError: If a shard is damaged. One sentence.
        """
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name in self._read:
                continue
            try:
                with safe_open(file, "pt") as opened:
                    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                keys = tensors.pop(KEYS).tolist()
                lengths = {name: tensors.pop(name + LENGTHS) for name in list(tensors) if not name.endswith(LENGTHS)}
            except Exception as error:  # safetensors raises an exception of its own for each kind of damage
                raise ValueError(f"{file} is damaged: delete it, and what it held is computed again.") from error
            self._read.add(file.name)
            first = {name: [0, *counts.cumsum(0).tolist()] for name, counts in lengths.items()}
            self._places |= {key: (len(self._shards), number) for number, key in enumerate(keys)}
            self._shards.append({name: (rows, first[name]) for name, rows in tensors.items()})

    def add(self, key: int, record: Record) -> None:
        """Keeps a record; it is written when there are enough of them, or by `flush`.

        Raises:
            ValueError: If half precision does not hold it, or the disk is full. One sentence.
        """
        half = {name: rows.detach().to("cpu", torch.float16).clone() for name, rows in record.items()}
        for name, rows in half.items():
            if not rows.isfinite().all():
                raise ValueError(f"{name} does not fit half precision: train without a cache_dir.")
        self._waiting[key] = half
        self._bytes += sum(rows.nbytes for rows in half.values())
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what waits, as one shard."""
        if not self._waiting:
            return
        records = list(self._waiting.values())
        tensors = {KEYS: torch.tensor(list(self._waiting), dtype=torch.int64)}
        for name in records[0]:
            tensors[name] = torch.cat([record[name] for record in records])
            tensors[name + LENGTHS] = torch.tensor([len(record[name]) for record in records], dtype=torch.int32)
        number = sum(1 for _ in self.folder.glob(f"{self.rank:05d}-*.safetensors"))
        with writing(self.folder / f"{self.rank:05d}-{number:06d}.safetensors") as file:
            save_file(tensors, file)
        self._waiting.clear()
        self._bytes = 0
        self.refresh()


def recall(
    store: TensorStore, keys: Sequence[int], compute: Callable[[list[int]], Sequence[Record]], device: torch.device
) -> dict[str, list[Tensor]]:
    """The records of keys, of which those that are missing are computed.

    Args:
        store: Where they are, and are kept.
        keys: Of a batch.
        compute: Rows of the batch -> their records.
        device: Where they are wanted.

    Returns:
        Name -> the rows of each key, float32: also those that were just computed have gone through half precision, so
        that an epoch does not depend on which of them were known.
    """
    if any(key not in store for key in keys):
        store.refresh()
    missing = {key: row for row, key in enumerate(keys) if key not in store}
    if missing:
        for key, record in zip(missing, compute(list(missing.values())), strict=True):
            store.add(key, record)
    records = [store[key] for key in keys]
    return {name: [record[name].to(device, torch.float32) for record in records] for name in records[0]}


def recalled(
    store: TensorStore | None,
    keys: Tensor | None,
    batch: Mapping[str, Tensor],
    compute: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a frozen tower makes of a batch: computed, or where there is a store, looked up.

    Args:
        store: Keeps it; None computes.
        keys: (B,), of the rows of the batch.
        batch: Name -> (B, ...).
        compute: A part of the batch -> name -> (B', D) or (B', T, D).
        mask: (B, T), the tokens that count, the first ones of each row; only these are kept, and the others are 0.

    Returns:
        Name -> (B, D) or (B, T, D); without gradients where there is a store.
    """
    if store is None:
        return compute(batch)
    assert keys is not None, "a batch without keys cannot be looked up: make it with Collator(keyed=True)"
    counts = None if mask is None else mask.sum(1).tolist()

    def records(rows: list[int]) -> list[Record]:
        with torch.no_grad():
            made = compute({name: values[rows] for name, values in batch.items()})
        return [
            {name: values[place, : counts[row] if counts else None] if values.ndim == 3 else values[place, None]
             for name, values in made.items()}
            for place, row in enumerate(rows)
        ]  # fmt: skip

    found = recall(store, keys.tolist(), records, keys.device)
    length = None if mask is None else mask.shape[1]
    return {name: _joined(rows, length) for name, rows in found.items()}


def _joined(rows: list[Tensor], length: int | None) -> Tensor:
    """(T', D) each -> (B, T, D), padded with 0; single rows -> (B, D)."""
    if all(len(row) == 1 for row in rows):
        return torch.cat(rows)
    length = length or len(rows[0])
    return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])
