"""Checkpoint files, read without running anything that they hold."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

CONFIGURATION = "finelip_diffusion.config"
"""Metadata of a .safetensors file that this package writes: a `config.json`, for what shapes cannot say."""

_ADVICE = "give .safetensors, or a state dict of tensors only saved by torch.save"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint file without running anything that it holds.

    Takes safetensors, files of `torch.save` (through `weights_only=True`), and the `….index.json` of either, which
    names shards. Wrapping dictionaries (`{"state_dict": …}`) and the prefixes of DistributedDataParallel and
    `torch.compile` are taken off.

    Args:
        path: The file.

    Returns:
        Name -> tensor, on the CPU; may be mapped from the file.

    Raises:
        ValueError: If the file is not a checkpoint, is damaged, is a TorchScript archive, or would have to run code.
    """
    if path.name.endswith(".index.json"):
        shards = shard_names(path)
        return {name: tensor for shard in shards for name, tensor in read_checkpoint(path.parent / shard).items()}
    if not path.is_file():
        raise ValueError(f"{path} is missing: check the path, or download the file again.")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _unwrap(_read_pickle(path))
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors under names: give a state dict of a CLIP.")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def shard_names(path: Path) -> list[str]:
    """The files that an `….index.json` names, sorted.

    Raises:
        ValueError: If the file is not such an index.
    """
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{path} names no shards: download it again.")
    return sorted(set(shards.values()))


def read_configuration(path: Path) -> dict[str, Any] | None:
    """The `config.json` that this package puts into the metadata of a .safetensors file; None where there is none.

    Raises:
        ValueError: If there is one, but no JSON object.
    """
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(CONFIGURATION)
    try:
        content = json.loads("{}" if text is None else text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} has metadata {CONFIGURATION} that is not a JSON object: convert it again.")
    return content or None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: If the file is missing, no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable JSON file: download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: download it again.")
    return content


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first names, and how many there are besides."""
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:limit]) + (f" and {len(unique) - limit} more" if len(unique) > limit else "")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): download or save it again.") from error


def _read_pickle(path: Path) -> Any:
    archive = zipfile.is_zipfile(path)
    if archive and _is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, which holds code: save its state_dict() with torch.save and give that, "
            f"or give the same model in the layout of transformers."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = (
            f"is a pickle that wants to run {wanted[1]}"
            if wanted
            else "is not a checkpoint, or one that wants to run code"
        )
        raise ValueError(f"{path} {what}, and was refused unread: {_ADVICE}.") from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint, or a damaged one: {_ADVICE}.") from error


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _unwrap(loaded: Any) -> dict[str, Any]:
    while isinstance(loaded, Mapping):
        inner = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            return {name: value for name, value in loaded.items() if isinstance(name, str)}
        loaded = inner
    return {}
