"""A whole model with another text encoder in it: one checkpoint file, or diffusers' folders."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from .checkpoints import listed, read_checkpoint, read_json
from .files import writing
from .layouts import POSITIONS, PROJECTION, TOKENS, embedded_encoders, openai_names, tower_names
from .text_encoder import TextEncoder, canonical_weights, save_text_encoder
from .towers import TextWeights, text_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """Where a whole model holds a text encoder.

    Attributes:
        place: `"text_encoder"` or `"text_encoder_2"`, diffusers' names.
        width, layers: Of the encoder that is there.
        projection: Whether it has a text projection.
        weights: That encoder, in a file; None in a folder.
    """

    place: str
    width: int
    layers: int
    projection: bool
    weights: TextWeights | None = None


def slots(base: str | Path) -> dict[str, Slot]:
    """The CLIP text encoders of a whole model.

    Args:
        base: A checkpoint file of Stable Diffusion 1.x, 2.x, XL, 3.x or Flux, or a folder of a diffusers pipeline.

    Returns:
        Place -> slot.

    Raises:
        ValueError: If there is no such encoder. One sentence.
    """
    base = Path(base)
    found: dict[str, Slot] = {}
    if (base / "model_index.json").is_file():
        for place in ("text_encoder", "text_encoder_2"):
            name = (read_json(base / "model_index.json").get(place) or ["", ""])[-1] or ""
            if name.startswith("CLIPTextModel"):
                config = read_json(base / place / "config.json")
                size = (int(config["hidden_size"]), int(config["num_hidden_layers"]))
                found[place] = Slot(place, *size, name == "CLIPTextModelWithProjection")
    elif base.is_dir():
        raise ValueError(f"{base} holds no model_index.json: give a whole model, a file or a folder of diffusers.")
    else:
        tensors = read_checkpoint(base)
        for place in embedded_encoders(tensors):
            weights = text_weights(tensors, str(base), place=place)
            if TOKENS in weights.tensors:
                width = weights.tensors[TOKENS].shape[-1]
                found[place] = Slot(place, width, weights.depth, PROJECTION in weights.tensors, weights)
    if not found:
        raise ValueError(f"{base} holds no text encoder of CLIP's: give a whole Stable Diffusion or Flux.")
    return found


def fitting_slot(base: str | Path, text_encoder: TextEncoder, place: str | None = None) -> Slot:
    """The slot that an encoder fits into.

    Args:
        base: As for `slots`.
        text_encoder: The encoder.
        place: `"text_encoder"` or `"text_encoder_2"`; None takes the one of the encoder's width and layers.

    Raises:
        ValueError: If there is none, or it has another width or number of layers. One sentence.
    """
    found = slots(base)
    size = (text_encoder.config.hidden_size, text_encoder.config.num_hidden_layers)
    held = ", ".join(f"{slot.place} ({slot.width} wide with {slot.layers} layers)" for slot in found.values())
    if place is not None and place not in found:
        raise ValueError(f"{base} has no {place}: it holds {held}.")
    for slot in [found[place]] if place else found.values():
        if (slot.width, slot.layers) == size:
            return slot
    raise ValueError(
        f"the text encoder is {size[0]} wide with {size[1]} layers, but {base} holds {held}: give an encoder of the "
        f"CLIP that the model was trained with."
    )


def merge(
    base: str | Path,
    text_encoder: TextEncoder,
    tokenizer: CLIPTokenizer,
    path: str | Path,
    *,
    place: str | None = None,
    overwrite: bool = False,
) -> Slot:
    """Writes a whole model with another text encoder in the place of its own.

    Everything else is the base's bit for bit, and the encoder's weights are in their own type: `load_text_encoder`
    reads them back bit for bit. Of a file, recorded hashes of its contents are left out; a file holds no tokenizer.

    Args:
        base: A checkpoint file, or a folder of a diffusers pipeline.
        text_encoder: The encoder, of the width and the layers of the one that it replaces.
        tokenizer: Its tokenizer; folders hold it beside the encoder.
        path: The file (.safetensors), or the folder: of the kind that the base is. Renamed into place when complete.
        place: `"text_encoder"` or `"text_encoder_2"`; None takes the one that fits.
        overwrite: Whether to replace what is at `path`.

    Returns:
        Where it was put.

    Raises:
        ValueError: If the base is not a whole model, the encoder does not fit into it or lacks the text projection
            that it needs, the path exists and `overwrite` is false or is of another kind, or the disk is full. One
            sentence.
    """
    base, path = Path(base), Path(path)
    slot = fitting_slot(base, text_encoder, place)
    if base.is_file() and (path.suffix != ".safetensors" or path.is_dir()):
        raise ValueError(f"{path} must be a file that ends in .safetensors, as {base} is one file.")
    if base.is_dir() and (path.is_file() or path.suffix == ".safetensors"):
        raise ValueError(f"{path} must be a folder, as {base} is one.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} would be overwritten: choose another one, or say overwrite=True (--overwrite).")
    if base.is_dir() and path.resolve() == base.resolve():
        raise ValueError(f"{path} is the folder that is read from: choose another one.")
    tensors = canonical_weights(text_encoder)
    if slot.projection and PROJECTION not in tensors and slot.weights is None:
        raise ValueError(f"{base} needs the text projection of {slot.place}: give an encoder that has one.")
    if slot.weights is None:
        _merge_folder(base, text_encoder, tokenizer, path, slot)
    else:
        _merge_file(base, tensors, path, slot.weights)
    return slot


def _merge_folder(base: Path, text_encoder: TextEncoder, tokenizer: CLIPTokenizer, path: Path, slot: Slot) -> None:
    replaced = (slot.place, slot.place.replace("text_encoder", "tokenizer"))
    with writing(path) as stage:
        shutil.copytree(base, stage, ignore=lambda folder, names: replaced if Path(folder) == base else ())
        save_text_encoder(text_encoder, tokenizer, stage, subfolder=slot.place)
        index = read_json(base / "model_index.json")
        index[slot.place] = ["transformers", type(text_encoder).__name__]
        (stage / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _merge_file(base: Path, tensors: dict[str, Tensor], path: Path, weights: TextWeights) -> None:
    whole = read_checkpoint(base)
    outer = embedded_encoders(whole)[weights.place or ""]
    old = tower_names(whole, outer)
    new = _renamed(tensors, weights)
    rows = len(tensors[POSITIONS])
    merged = {name: tensor for name, tensor in whole.items() if name not in old.values()} | new
    for name, tensor in whole.items():
        if name.startswith(outer) and name.endswith("position_ids"):
            merged[name] = torch.arange(rows, dtype=tensor.dtype).expand(1, -1)
        elif name.startswith(outer) and name.endswith("attn_mask"):
            merged[name] = torch.full((rows, rows), float("-inf"), dtype=tensor.dtype).triu(1)
    with writing(path) as file:
        save_file(_apart(merged), file, metadata=_metadata(base))


def _renamed(tensors: Mapping[str, Tensor], weights: TextWeights) -> dict[str, Tensor]:
    """Canonical names -> those that the base has for the encoder which is replaced."""
    theirs = weights.tensors
    if missing := sorted(theirs.keys() - tensors.keys() - {PROJECTION}):
        raise ValueError(f"the text encoder lacks {listed(missing)}, which {weights.where} has.")
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} and must be {tuple(tensor.shape)}"
        for name, tensor in theirs.items()
        if name in tensors and name != POSITIONS and tensors[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"the text encoder does not fit into {weights.where}: {listed(wrong)}.")
    projection = tensors.get(PROJECTION, theirs.get(PROJECTION))
    if PROJECTION in theirs and PROJECTION not in tensors:
        logger.warning("%s keeps its own text projection, as the new text encoder has none.", weights.where)
    elif PROJECTION in tensors and PROJECTION not in theirs:
        logger.info("the text projection is left out, as %s has none.", weights.where)
    own = {name: tensor for name, tensor in tensors.items() if name != PROJECTION}
    lead = weights.prefix + weights.layout.prefix
    if weights.layout.openai:
        found = {lead + name: tensor for name, tensor in openai_names(own).items()}
    else:
        found = {weights.own_name(name): tensor for name, tensor in own.items()}
    if weights.layout.kept and weights.layout.trained:  # two tables: both are the merged one
        table = found.pop(weights.own_name(POSITIONS))
        found |= {lead + name: table for name in (weights.layout.kept, weights.layout.trained)}
    if PROJECTION in theirs and projection is not None:
        name = weights.own_name(PROJECTION)
        found[name] = projection if name.endswith(".weight") else projection.T
    return found


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors asks for; most are left where they are."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        start = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if start in seen else tensor
        seen.add(start)
    return found


def _metadata(base: Path) -> dict[str, str]:
    if base.suffix != ".safetensors":
        return {"format": "pt"}
    with safe_open(base, framework="pt") as file:
        found = file.metadata() or {}
    return {"format": "pt"} | {name: text for name, text in found.items() if "hash" not in name}
