"""How public programs name the weights of a CLIP's text tower, as tables: read from, and written for.

The only module that knows foreign names. Canonical names are those of a flat `CLIPTextModel` (`embeddings.…`,
`encoder.layers.N.…`, `final_layer_norm.…`), and `text_projection.weight`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTextConfig

from .positions import STOCK_POSITIONS

TOKENS, POSITIONS = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
PROJECTION = "text_projection.weight"
HEAD_WIDTH = 64  # every published CLIP text tower, and most image towers
SIZES = {(768, 12): "CLIP-L", (1280, 32): "bigG"}  # (width, layers) of which other programs take long tables


@dataclass(frozen=True)
class Layout:
    """One public way to name a text tower.

    Attributes:
        name: What this package calls it.
        openai: Whether names are OpenAI's (`transformer.resblocks.…`), otherwise those of transformers.
        prefix: What every name of the tower begins with.
        kept, trained: Where there are two position tables: their names without the prefix, of the frozen table
            (first rows) and of the trained one (the rest).
        unused: A table that no long text reads.
        hidden_act: The activation, where the layout itself says it.
    """

    name: str
    openai: bool = False
    prefix: str = ""
    kept: str | None = None
    trained: str | None = None
    unused: str | None = None
    hidden_act: str | None = None

    def own_name(self, name: str) -> str:
        """Canonical name -> the layout's, which is one for queries, keys and values in OpenAI's."""
        if not self.openai:
            return name if name == PROJECTION else self.prefix + name
        return self.prefix + openai_name(name)


_OPENAI_TABLE, _TRAINED = "positional_embedding", "embeddings.position_embedding_res"
LAYOUTS = (  # who publishes each: docs/encoder.md. The first whose names are there is taken.
    Layout("two-table", True, "", _OPENAI_TABLE, f"{_OPENAI_TABLE}_res", hidden_act="quick_gelu"),
    Layout("open_clip", True, "text.", hidden_act="gelu"),
    Layout("openai", True),
    *(
        layout
        for prefix in ("text_model.text_model.", "text_model.", "")
        for layout in (
            Layout(
                "fg-clip",
                prefix=prefix,
                kept="embeddings.position_embedding_ori.weight",
                trained=f"{_TRAINED}.weight",
                unused=POSITIONS,
                hidden_act="quick_gelu",
            ),
            Layout("longclip", prefix=prefix, kept=POSITIONS, trained=_TRAINED, hidden_act="quick_gelu"),
            Layout("huggingface", prefix=prefix),
        )
    ),
)

PLACES = {  # where whole models, ComfyUI and trainers hold text encoders, and diffusers' names of those
    "cond_stage_model.model.": "text_encoder",  # Stable Diffusion 2.x: OpenCLIP's ViT-H
    "cond_stage_model.": "text_encoder",  # 1.x: CLIP-L
    "conditioner.embedders.0.model.": "text_encoder_2",  # the refiner of XL: OpenCLIP's bigG
    "conditioner.embedders.0.": "text_encoder",  # XL: CLIP-L
    "conditioner.embedders.1.model.": "text_encoder_2",  # XL: OpenCLIP's bigG
    "text_encoders.clip_l.": "text_encoder",  # 3.x, Flux
    "text_encoders.clip_g.": "text_encoder_2",  # 3.x
    "clip_l.": "text_encoder",  # ComfyUI's own names
    "clip_h.": "text_encoder",
    "clip_g.": "text_encoder_2",
}
_WRAPPER = re.compile(r"transformer\.(?!resblocks\.)")  # which ComfyUI and Stable Diffusion 1.x put around an encoder
_UNREAD_BLOCK = "cond_stage_model.model.transformer.resblocks.23."  # 2.x is fed the states before its last block

_SET_ASIDE = re.compile(
    r"(visual|vision_model|visual_projection)\..+|logit_scale|logit_bias"
    r"|input_resolution|context_length|vocab_size|(.*\.)?(position_ids|attn_mask)"
    r"|cross_net\..+|mask_net\..+"  # FineLIP, SmartCLIP
    r"|text_filip_projection\..+|logit_scale_\w+"  # FG-CLIP
    r"|scaled_fp8"  # ComfyUI's mark
)
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_OPENAI_NAMES = {
    "token_embedding.weight": TOKENS,
    _OPENAI_TABLE: POSITIONS,
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


def find_layout(names: Collection[str]) -> Layout | None:
    """The first layout whose names are among a tower's; None where there is no text tower.

    Args:
        names: Without what places an encoder in a whole model, and without what is set aside.
    """
    for layout in LAYOUTS:
        inside = {name.removeprefix(layout.prefix) for name in names if name.startswith(layout.prefix)}
        tower = any(map(_BLOCK.match, inside)) if layout.openai else bool(inside & {TOKENS, POSITIONS})
        if tower and (layout.trained is None or layout.trained in inside):
            return layout
    return None


def embedded_encoders(names: Iterable[str]) -> dict[str, str]:
    """The text encoders in a whole model, or in a file of ComfyUI or a trainer that places them like one.

    Args:
        names: Of a state dict.

    Returns:
        `"text_encoder"`, `"text_encoder_2"` or both -> what their names begin with; empty for any other file.
    """
    found: dict[str, str] = {}
    names = [name for name in names if name.startswith(("c", "text_encoder"))]
    for prefix, place in PLACES.items():
        inside = {_WRAPPER.sub("", name.removeprefix(prefix), count=1) for name in names if name.startswith(prefix)}
        if place not in found and find_layout({name for name in inside if not _SET_ASIDE.fullmatch(name)}):
            found[place] = prefix
    return dict(sorted(found.items()))


def tower_names(names: Iterable[str], prefix: str = "") -> dict[str, str]:
    """The names of a text tower, without what places it -> what the checkpoint calls them."""
    return {
        inner: name
        for name in names
        if name.startswith(prefix)
        and not name.startswith(_UNREAD_BLOCK)
        and not _SET_ASIDE.fullmatch(inner := _WRAPPER.sub("", name.removeprefix(prefix), count=1))
    }


def canonical_names(text: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Renames a tower.

    Args:
        text: Name in the layout -> tensor.
        layout: The layout.

    Returns:
        Canonical name -> tensor, canonical name -> name in the layout, and the names that are not the layout's. Where
        there are two position tables, they are left out.
    """
    found: dict[str, Tensor] = {}
    own: dict[str, str] = {}
    extra = []
    for name, tensor in text.items():
        inner = name.removeprefix(layout.prefix)
        if inner in (layout.kept, layout.trained, layout.unused):
            continue
        renamed: dict[str, Tensor] | None
        if name in ("text_projection", f"{layout.prefix}text_projection") and tensor.ndim == 2:
            renamed = {PROJECTION: tensor.T}  # (D, E) -> (E, D), as nn.Linear keeps it; ComfyUI mixes it in, too
        elif name == PROJECTION or not layout.openai:
            renamed = {inner: tensor}
        else:
            renamed = _from_openai(inner, tensor)
        if renamed is None:
            extra.append(name)
            continue
        found |= renamed
        own |= dict.fromkeys(renamed, name)
    return found, own, extra


def _from_openai(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """OpenAI's name -> canonical ones: three for queries, keys and values; None where it is not a name of theirs."""
    if name in _OPENAI_NAMES:
        return {_OPENAI_NAMES[name]: tensor}
    block = _BLOCK.fullmatch(name)
    return openai_block(f"encoder.layers.{block[1]}.", block[2], tensor) if block else None


def openai_block(layer: str, part: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """A weight in a block of OpenAI's -> those of a layer of transformers, in text and image towers; None if unknown.

    A number in place of a matrix gives nothing, so that the check of names finds it missing.
    """
    if part in _OPENAI_BLOCK_NAMES:
        return {layer + _OPENAI_BLOCK_NAMES[part]: tensor}
    if part not in ("attn.in_proj_weight", "attn.in_proj_bias"):
        return None
    kind = part.rsplit("_", 1)[1]
    thirds = zip("qkv", tensor.chunk(3) if tensor.ndim else (), strict=False)  # (3 D, ...) -> (D, ...) each
    return {f"{layer}self_attn.{target}_proj.{kind}": third for target, third in thirds}


def openai_name(name: str) -> str:
    """Canonical name -> OpenAI's, which is one for queries, keys and values."""
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    block, part = (f"transformer.resblocks.{layer[1]}.", layer[2]) if layer else ("", name)
    part = re.sub(r"self_attn\.[qkv]_proj\.", "attn.in_proj_", part)
    return block + _TO_OPENAI.get(part, part)


# ------------------------------------------------------------------------------------------------------------ written


def huggingface_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical names -> those of `transformers` 4, which 5 understands, and which other programs look for in a file.

    ComfyUI takes a file for CLIP-L or bigG by its layers, and for a long one by the rows of
    `text_model.embeddings.position_embedding.weight` (`comfy/sd.py`, before that `comfy/text_encoders/long_clipl.py`).
    kohya's scripts read such files by `--clip_l` and `--clip_g` (`library/flux_utils.py`, `library/sd3_utils.py`).
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
    found = openai_names(tensors)
    if len(found[_OPENAI_TABLE]) > STOCK_POSITIONS:
        found[f"{_OPENAI_TABLE}_res"] = found[_OPENAI_TABLE].clone()
    return found


def openai_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical names -> OpenAI's, with one position table, and a projection if there is one."""
    parts: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=lambda name: name.replace("q_proj", "a_proj")):  # q, k, v
        parts.setdefault(openai_name(name), []).append(tensors[name])
    found = {name: torch.cat(part) for name, part in parts.items()}  # 3 times (D, ...) -> (3 D, ...)
    if "text_projection" in found:
        found["text_projection"] = found["text_projection"].T.contiguous()  # (E, D) -> (D, E)
    return found


WRITTEN: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "openai": openai_layout,
    "comfyui": huggingface_layout,
    "kohya": huggingface_layout,
}
"""Layouts of one file: canonical names -> the layout's."""


def caveat(layout: str, config: CLIPTextConfig) -> str | None:
    """Why the programs that read a layout make something else of an encoder, or fail; None where they do not.

    They find weights in a file, but have their own idea of activation, heads and sizes.

    Args:
        layout: One of `WRITTEN`.
        config: The encoder's.
    """
    head_width = config.hidden_size // config.num_attention_heads
    if layout == "openai" and (config.hidden_act, head_width) != ("quick_gelu", HEAD_WIDTH):
        return (
            f"the code of OpenAI, Long-CLIP and FineLIP has quick_gelu and heads of width {HEAD_WIDTH}, but this "
            f"encoder has {config.hidden_act} and heads of width {head_width}: there it is another function."
        )
    size, rows = (config.hidden_size, config.num_hidden_layers), config.max_position_embeddings
    known = ", ".join(f"{name} ({width} wide with {depth} layers)" for (width, depth), name in SIZES.items())
    if layout == "comfyui" and rows > STOCK_POSITIONS and size not in SIZES:
        return f"ComfyUI takes long encoders of the sizes of {known}, but this one is {size[0]} wide with {size[1]}."
    if layout == "kohya" and size not in SIZES:
        return f"kohya's scripts take encoders of the sizes of {known}, but this one is {size[0]} wide with {size[1]}."
    if layout == "kohya" and rows != STOCK_POSITIONS:
        return (
            f"kohya's scripts give the encoder of a file {STOCK_POSITIONS} positions and refuse one with {rows}: "
            f"they load a long one from a whole model in diffusers' folders (finelip merge FOLDER ENCODER FOLDER)."
        )
    return None
