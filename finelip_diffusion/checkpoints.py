"""Foreign checkpoints: safe reading, and strict maps from their names to those of `transformers`' CLIP text model.

The only room that knows foreign names. Canonical names are those of a flat `CLIPTextModel` (`embeddings.…`,
`encoder.layers.N.…`, `final_layer_norm.…`), and `text_projection.weight`.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig

from .positions import KEPT_POSITIONS, STOCK_POSITIONS, merge_positions

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
TOKENS, POSITIONS = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
PROJECTION = "text_projection.weight"
HEAD_WIDTH = 64  # every published CLIP text tower, and image towers of up to MOST_IMAGE_HEADS heads
MOST_IMAGE_HEADS = 16  # wider image towers (ViT-H, ViT-g, bigG) have wider heads
OPENAI_DEPTH = 12  # every text tower that OpenAI published

CONFIGURATION = "finelip_diffusion.config"
"""Metadata of a .safetensors file that this package writes: a `config.json`, for what shapes cannot say."""
COMFYUI_SIZES = {(768, 12): "CLIP-L", (1280, 32): "bigG"}  # (width, layers) of what it looks for a long table in

_EMBEDDED = {  # where the single files of Stable Diffusion hold their text encoders, and diffusers' names of those
    "cond_stage_model.transformer.": "text_encoder",  # 1.x: CLIP-L, named as in transformers
    "cond_stage_model.model.": "text_encoder",  # 2.x: OpenCLIP's ViT-H
    "conditioner.embedders.0.transformer.": "text_encoder",  # XL: CLIP-L
    "conditioner.embedders.1.model.": "text_encoder_2",  # XL: OpenCLIP's bigG
    "conditioner.embedders.0.model.": "text_encoder_2",  # the refiner of XL
}
_UNREAD_BLOCK = "cond_stage_model.model.transformer.resblocks.23."  # 2.x is fed the states before its last block

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ADVICE = "give .safetensors, or a state dict of tensors only saved by torch.save"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_SET_ASIDE = re.compile(
    r"(visual|vision_model|visual_projection|cross_net)\..+|logit_scale|logit_bias"
    r"|input_resolution|context_length|vocab_size|(.*\.)?(position_ids|attn_mask)"
)
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_OPENAI_NAMES = {
    "token_embedding.weight": TOKENS,
    "positional_embedding": POSITIONS,
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
    "text_projection": PROJECTION,
}
_OPENAI_BLOCK_NAMES = {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }.items()
    for kind in ("weight", "bias")
}
_TO_OPENAI = {ours: theirs for theirs, ours in (_OPENAI_NAMES | _OPENAI_BLOCK_NAMES).items()}
_IMAGE_SHAPES = {  # what an image tower's sizes are read from, and its dimensions
    "vision_model.embeddings.patch_embedding.weight": 4,
    "vision_model.embeddings.position_embedding.weight": 2,
    "vision_model.encoder.layers.0.mlp.fc1.weight": 2,
    "visual_projection.weight": 2,
}
_OPENAI_IMAGE_NAMES = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
} | {
    f"{theirs}.{kind}": f"vision_model.{ours}.{kind}"
    for theirs, ours in {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}.items()
    for kind in ("weight", "bias")
}


@dataclass(frozen=True)
class TextWeights:
    """The text tower of a checkpoint, under canonical names.

    Attributes:
        layout: `"huggingface"`, `"openai"` (OpenAI and open_clip name them alike), `"open_clip"` (a text tower of its
            own, `text.…`, or that of a Stable Diffusion) or `"two-table"` (FineLIP, Long-CLIP).
        tensors: Canonical name -> tensor; no two share memory.
        set_aside: Names in the checkpoint that are no part of the text tower, sorted.
        where: What the tensors were read from, for error messages.
        prefix: What precedes the layout's names in the checkpoint.
        place: `"text_encoder"` or `"text_encoder_2"` in a single file of Stable Diffusion, else None.
    """

    layout: str
    tensors: dict[str, Tensor]
    set_aside: tuple[str, ...]
    where: str
    prefix: str = ""
    place: str | None = None

    def config(self, hidden_act: str | None = None, num_attention_heads: int | None = None) -> CLIPTextConfig:
        """The configuration that the shapes imply.

        Shapes say neither the activation nor the heads. Heads are width / 64. The activation is GELU for open_clip's
        own layout and for towers of more than 12 layers (ViT-H, ViT-g, bigG), quick GELU otherwise (OpenAI, FineLIP,
        Long-CLIP); `activation_is_known` says whether more than the shapes spoke for it.

        Args:
            hidden_act: `"quick_gelu"` or `"gelu"` in place of the rule.
            num_attention_heads: In place of the rule.

        Raises:
            ValueError: If the tensors that give the shapes are missing or have too few dimensions, or the heads do
                not divide the width.
        """
        depth = 1 + max(
            (int(name.split(".")[2]) for name in self.tensors if name.startswith("encoder.layers.")), default=-1
        )
        first = "encoder.layers.0.mlp.fc1.weight"
        missing = [name for name in (TOKENS, POSITIONS, first) if name not in self.tensors]
        if missing:
            raise ValueError(f"{self.where} lacks the text weights {listed(map(self.own_name, missing))}.")
        for name in (TOKENS, POSITIONS, first):
            if self.tensors[name].ndim != 2:
                shape = tuple(self.tensors[name].shape)
                raise ValueError(f"{self.where} holds {self.own_name(name)} in shape {shape}, not in two dimensions.")
        (vocab_size, width), positions = self.tensors[TOKENS].shape, self.tensors[POSITIONS].shape[0]
        heads = num_attention_heads or width // HEAD_WIDTH
        if heads < 1 or width % heads or (num_attention_heads is None and width % HEAD_WIDTH):
            raise ValueError(
                f"{self.where} is {width} wide, which {heads} attention heads"
                f"{'' if num_attention_heads else ' of 64'} do not divide: give num_attention_heads."
            )
        projection = self.tensors.get(PROJECTION)
        return CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=self.tensors[first].shape[0],
            projection_dim=projection.shape[0] if projection is not None and projection.ndim == 2 else width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            max_position_embeddings=positions,
            hidden_act=hidden_act or ("gelu" if self.layout == "open_clip" or depth > OPENAI_DEPTH else "quick_gelu"),
        )

    def own_name(self, name: str) -> str:
        """What the checkpoint calls the tensor of a canonical name."""
        return self.prefix + (name if self.layout == "huggingface" else openai_name(name))

    @property
    def activation_is_known(self) -> bool:
        """Whether the checkpoint itself tells OpenAI's quick GELU from open_clip's GELU."""
        return (
            self.layout in ("two-table", "open_clip")
            or self.place is not None
            or "input_resolution" in self.set_aside
            or (f"encoder.layers.{OPENAI_DEPTH}.mlp.fc1.weight" in self.tensors)
        )


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
        ValueError: If the file is no checkpoint, is damaged, is a TorchScript archive, or would have to run code.
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
        ValueError: If the file is no such index.
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
        raise ValueError(f"{path} has metadata {CONFIGURATION} that is no JSON object: convert it again.")
    return content or None


def embedded_encoders(names: Iterable[str]) -> dict[str, str]:
    """The text encoders in a single file of Stable Diffusion 1.x, 2.x or XL.

    Args:
        names: Of a state dict.

    Returns:
        `"text_encoder"`, `"text_encoder_2"` or both -> the prefix of their names; empty for any other file.
    """
    heads = {".".join(name.split(".")[:n]) + "." for name in names for n in (2, 4)}
    return {place: prefix for prefix, place in _EMBEDDED.items() if prefix in heads}


def text_weights(
    tensors: Mapping[str, Tensor],
    where: str = "the checkpoint",
    keep: int = KEPT_POSITIONS,
    place: str | None = None,
) -> TextWeights:
    """Picks the text tower out of a state dict, under canonical names.

    Args:
        tensors: A state dict in the layout of `transformers` (any version, text model or whole CLIP), OpenAI,
            open_clip, FineLIP or Long-CLIP; or a single file of Stable Diffusion 1.x, 2.x or XL.
        where: What to call the source in error messages.
        keep: Rows that a two-table checkpoint takes from its frozen table.
        place: Which encoder of a single file, `"text_encoder"` or `"text_encoder_2"`; by default its first.

    Returns:
        The weights. Whether they are complete and of the right shapes is checked by `check_weights`.

    Raises:
        ValueError: If there is no CLIP text tower, there are names that no part of a CLIP bears, or nothing at
            `place`.
    """
    embedded = embedded_encoders(tensors)
    if place is not None and place not in embedded:
        raise ValueError(
            f"{where} is a file and has no subfolder {place!r}: "
            f"{'choose from ' + ', '.join(embedded) if embedded else 'leave subfolder out'}."
        )
    place = place or next(iter(embedded), None)
    prefix = embedded[place] if place else ""
    inside = {name for name in tensors if name.startswith(prefix) and not name.startswith(_UNREAD_BLOCK)}
    inside -= {name for name in inside if _SET_ASIDE.fullmatch(name.removeprefix(prefix))}
    aside = tuple(sorted(tensors.keys() - inside))
    text = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name in inside}
    layout = _layout(text)
    if layout is None:
        raise ValueError(
            f"{where} holds no CLIP text tower in the layout of transformers, OpenAI or open_clip "
            f"(its names begin with {', '.join(sorted(tensors)[:3])})."
        )
    inner = {"huggingface": "text_model.", "open_clip": "text."}.get(layout, "")
    text = {name.removeprefix(inner): tensor for name, tensor in text.items()}
    found, extra = text, list[str]()
    if layout == "huggingface":
        inner = inner if place else ""  # whole CLIPs are told in canonical names
    else:
        found, extra = _from_openai(text, keep, where)
        layout = "open_clip" if place else layout
    if extra:
        named = listed(f"{prefix}{inner}{name}" for name in extra)
        raise ValueError(f"{where} holds text weights that a CLIP does not have: {named}.")
    found = {name: tensor.clone().contiguous() for name, tensor in found.items()}
    return TextWeights(layout, found, aside, where, prefix + inner, place)


def check_weights(weights: TextWeights, expected: Mapping[str, Tensor]) -> None:
    """Compares weights with those that a model has, strictly.

    Args:
        weights: The weights.
        expected: Canonical name -> tensor of the right shape (a model's on the meta device will do).

    Raises:
        ValueError: If names are missing or too many, shapes differ, or numbers are not floating or not finite; each
            named.
    """
    tensors, where = weights.tensors, weights.where
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{where} lacks the text weights {listed(map(weights.own_name, missing))}.")
    if extra := sorted(tensors.keys() - expected.keys() - {PROJECTION}):
        named = listed(map(weights.own_name, extra))
        raise ValueError(f"{where} holds text weights that the model does not have: {named}.")
    misshapen = [
        f"{_both_names(weights, name)} is {tuple(tensors[name].shape)} and must be {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if tensors[name].shape != tensor.shape
    ]
    if misshapen:
        raise ValueError(f"{where} holds text weights of the wrong shape: {listed(misshapen)}.")
    for name in expected:
        named = _both_names(weights, name)
        if tensors[name].dtype not in _DTYPES:
            raise ValueError(f"{where} holds {named} as {tensors[name].dtype}: give floats of 16, 32 or 64 bits.")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{where} holds NaN or infinite numbers in {named}: the weights are damaged.")


def image_tower(
    tensors: Mapping[str, Tensor], where: str = "the checkpoint", hidden_act: str = "quick_gelu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Picks the image tower out of a CLIP's state dict, under the names of `transformers`' `CLIPModel`.

    Shapes do not say the heads: width / 64 and at most 16, as OpenAI's and open_clip's vision transformers have it.

    Args:
        tensors: A state dict in the layout of `transformers`, OpenAI, open_clip, FineLIP or Long-CLIP.
        where: What to call the source in error messages.
        hidden_act: Of the text tower, which an image tower shares.

    Returns:
        Weights (`vision_model.…`, `visual_projection.weight`, `logit_scale`), and what the shapes say of the
        `CLIPVisionConfig`.

    Raises:
        ValueError: If there is no image tower, or it is no vision transformer.
    """
    kept = {name: tensor for name, tensor in tensors.items() if name == "logit_scale" or name.startswith("vis")}
    found = {name: tensor for name, tensor in kept.items() if not name.startswith("visual.")}
    for name, tensor in kept.items():
        if name.startswith("visual."):
            found |= _image_names(name.removeprefix("visual."), tensor)
    found = {name: tensor.clone() for name, tensor in found.items() if not name.endswith("position_ids")}
    if lacking := [name for name, ndim in _IMAGE_SHAPES.items() if name not in found or found[name].ndim != ndim]:
        raise ValueError(
            f"{where} holds no image tower that is a vision transformer (it lacks {listed(lacking)}): "
            f"give a whole CLIP with a ViT."
        )
    patches, table, inner, projection = (found[name] for name in _IMAGE_SHAPES)
    layers = {name.split(".")[3] for name in found if name.startswith("vision_model.encoder.layers.")}
    width, size = patches.shape[0], patches.shape[-1]
    return found, {
        "hidden_size": width,
        "intermediate_size": inner.shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": min(width // HEAD_WIDTH, MOST_IMAGE_HEADS),
        "patch_size": size,
        "image_size": size * round((table.shape[0] - 1) ** 0.5),
        "projection_dim": projection.shape[0],
        "hidden_act": hidden_act,
    }


def _image_names(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """OpenAI's name of an image weight, without `visual.` -> the names of `transformers`."""
    if name in _OPENAI_IMAGE_NAMES:
        return {_OPENAI_IMAGE_NAMES[name]: tensor}
    if name == "proj":
        return {"visual_projection.weight": tensor.T}  # (D, E) -> (E, D), as nn.Linear keeps it
    block = _BLOCK.fullmatch(name)
    layer, part = (f"vision_model.encoder.layers.{block[1]}.", block[2]) if block else ("", name)
    if part in _OPENAI_BLOCK_NAMES:
        return {layer + _OPENAI_BLOCK_NAMES[part]: tensor}
    if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = part.rsplit("_", 1)[1]
        thirds = zip("qkv", tensor.chunk(3) if tensor.ndim else (), strict=False)  # (3 D, ...) -> (D, ...) each
        return {f"{layer}self_attn.{target}_proj.{kind}": third for target, third in thirds}
    return {f"visual.{name}": tensor}


def huggingface_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical names -> those of `transformers` 4, which 5 understands, and which ComfyUI looks for in a file.

    ComfyUI takes a file for CLIP-L or bigG by its layers, and for a long one by the rows of
    `text_model.embeddings.position_embedding.weight` (`comfy/text_encoders/long_clipl.py`).
    """
    return {name if name == PROJECTION else f"text_model.{name}": tensor for name, tensor in tensors.items()}


def openai_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical names -> OpenAI's, which open_clip, Long-CLIP and FineLIP share.

    More than 77 rows are written twice, as `positional_embedding` and `positional_embedding_res`: Long-CLIP's and
    FineLIP's code take the first rows from the one and the rest from the other, so that it sees the same table.

    Args:
        tensors: Canonical name -> tensor, with the projection.

    Returns:
        OpenAI's name -> tensor, contiguous; no two share memory.

    Raises:
        ValueError: If there is no text projection.
    """
    if PROJECTION not in tensors:
        raise ValueError(
            "OpenAI's layout has a text projection, but this encoder has none: load it with projection=True "
            "(--projection) from a source that has one, or choose another layout."
        )
    parts: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=lambda name: name.replace("q_proj", "a_proj")):  # q, k, v
        parts.setdefault(openai_name(name), []).append(tensors[name])
    found = {name: torch.cat(part) for name, part in parts.items()}  # 3 times (D, ...) -> (3 D, ...)
    found["text_projection"] = found["text_projection"].T.contiguous()  # (E, D) -> (D, E)
    if len(found["positional_embedding"]) > STOCK_POSITIONS:
        found["positional_embedding_res"] = found["positional_embedding"].clone()
    return found


LAYOUTS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "openai": openai_layout,
    "comfyui": huggingface_layout,
}
"""Layouts of one file: canonical names -> the layout's."""


def caveat(layout: str, config: CLIPTextConfig) -> str | None:
    """Why the programs that read a layout make something else of an encoder, or fail; None where they do not.

    They find weights in a file, but have their own idea of activation, heads and sizes.

    Args:
        layout: One of `LAYOUTS`.
        config: The encoder's.
    """
    head_width = config.hidden_size // config.num_attention_heads
    if layout == "openai" and (config.hidden_act, head_width) != ("quick_gelu", HEAD_WIDTH):
        return (
            f"the code of OpenAI, Long-CLIP and FineLIP has quick_gelu and heads of width {HEAD_WIDTH}, but this "
            f"encoder {config.hidden_act} and heads of width {head_width}: there it is another function."
        )
    size = (config.hidden_size, config.num_hidden_layers)
    if layout == "comfyui" and config.max_position_embeddings > STOCK_POSITIONS and size not in COMFYUI_SIZES:
        known = ", ".join(
            f"{name} ({width} wide with {depth} layers)" for (width, depth), name in COMFYUI_SIZES.items()
        )
        return f"ComfyUI takes long encoders of the sizes of {known}, but this one is {size[0]} wide with {size[1]}."
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: If the file is missing, no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable JSON file: download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: download it again.")
    return content


def openai_name(name: str) -> str:
    """Canonical name -> OpenAI's, which is one for queries, keys and values."""
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    block, part = (f"transformer.resblocks.{layer[1]}.", layer[2]) if layer else ("", name)
    part = re.sub(r"self_attn\.[qkv]_proj\.", "attn.in_proj_", part)
    return block + _TO_OPENAI.get(part, part)


def _layout(text: Iterable[str]) -> str | None:
    names = set(text)
    if names & {TOKENS, f"text_model.{TOKENS}", POSITIONS, f"text_model.{POSITIONS}"}:
        return "huggingface"
    if any(name.startswith("text.transformer.resblocks.") for name in names):
        return "open_clip"
    if any(_BLOCK.match(name) for name in names):
        return "two-table" if "positional_embedding_res" in names else "openai"
    return None


def _from_openai(text: dict[str, Tensor], keep: int, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """OpenAI's names -> canonical names, and the names that are in neither."""
    found: dict[str, Tensor] = {}
    extra = []
    trained = text.pop("positional_embedding_res", None)
    for name, tensor in text.items():
        block = _BLOCK.fullmatch(name)
        layer, part = (f"encoder.layers.{block[1]}.", block[2]) if block else ("", name)
        if block and part in _OPENAI_BLOCK_NAMES:
            found[layer + _OPENAI_BLOCK_NAMES[part]] = tensor
        elif block and part in ("attn.in_proj_weight", "attn.in_proj_bias"):
            for target, third in zip(
                "qkv", tensor.chunk(3) if tensor.ndim else (), strict=False
            ):  # (3 D, ...) -> (D, ...) each
                found[f"{layer}self_attn.{target}_proj.{part.rsplit('_', 1)[1]}"] = third
        elif name == "text_projection" and tensor.ndim == 2:
            found[PROJECTION] = tensor.T  # (D, E) -> (E, D), as nn.Linear keeps it
        elif name in _OPENAI_NAMES:
            found[_OPENAI_NAMES[name]] = tensor
        else:
            extra.append(name)
    if trained is not None:
        if POSITIONS not in found:
            raise ValueError(
                f"{where} lacks the text weights positional_embedding, though it has positional_embedding_res."
            )
        try:
            found[POSITIONS] = merge_positions(found[POSITIONS], trained, keep)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return found, extra


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}): download or save it again.") from error


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
            else "is no checkpoint, or one that wants to run code"
        )
        raise ValueError(f"{path} {what}, and was refused unread: {_ADVICE}.") from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint, or a damaged one: {_ADVICE}.") from error


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


def _both_names(weights: TextWeights, name: str) -> str:
    own = weights.own_name(name)
    return name if own == name else f"{own} ({name})"


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first names, and how many there are besides."""
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:limit]) + (f" and {len(unique) - limit} more" if len(unique) > limit else "")


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: If it cannot be written, on a full disk say; safetensors' own error is none.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}): make room, or choose another place.") from error
