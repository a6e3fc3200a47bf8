"""The towers of a CLIP, picked out of a foreign state dict, renamed, and checked weight by weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPTextConfig

from .checkpoints import listed
from .layouts import (
    HEAD_WIDTH,
    POSITIONS,
    PROJECTION,
    TOKENS,
    Layout,
    canonical_names,
    embedded_encoders,
    find_layout,
    openai_block,
    tower_names,
)
from .positions import KEPT_POSITIONS, merge_positions

MOST_IMAGE_HEADS = 16  # wider image towers (ViT-H, ViT-g, bigG) have wider heads
OPENAI_DEPTH = 12  # every text tower that OpenAI published

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # float16 holds every number of either
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
        layout: The layout that its names were in.
        tensors: Canonical name -> tensor; no two share memory.
        set_aside: Names in the checkpoint that are no part of the text tower, sorted.
        where: What the tensors were read from, for error messages.
        own: Canonical name -> the checkpoint's.
        prefix: What precedes the layout's names in the checkpoint.
        place: `"text_encoder"` or `"text_encoder_2"` in a whole model, else None.
        notes: What was done to weights besides renaming, a sentence each.
    """

    layout: Layout
    tensors: dict[str, Tensor]
    set_aside: tuple[str, ...]
    where: str
    own: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    place: str | None = None
    notes: tuple[str, ...] = ()

    def config(self, hidden_act: str | None = None, num_attention_heads: int | None = None) -> CLIPTextConfig:
        """The configuration that the shapes imply.

        Shapes say neither the activation nor the heads. Heads are width / 64. The activation is GELU for open_clip's
        own layout, for OpenAI's names inside a whole model (OpenCLIP's towers) and for towers of more than 12 layers
        (ViT-H, ViT-g, bigG), quick GELU otherwise (OpenAI, FineLIP, Long-CLIP); `activation_is_known` says whether
        more than the shapes spoke for it.

        Args:
            hidden_act: `"quick_gelu"` or `"gelu"` in place of the rule.
            num_attention_heads: In place of the rule.

        Raises:
            ValueError: If the tensors that give the shapes are missing or have too few dimensions, or the heads do
                not divide the width.
        """
        depth = self.depth
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
        gelu = self.layout.hidden_act == "gelu" or (self.place and self.layout.openai) or depth > OPENAI_DEPTH
        return CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=self.tensors[first].shape[0],
            projection_dim=projection.shape[0] if projection is not None and projection.ndim == 2 else width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            max_position_embeddings=positions,
            hidden_act=hidden_act or ("gelu" if gelu else "quick_gelu"),
        )

    @property
    def depth(self) -> int:
        """The number of layers."""
        layers = (int(name.split(".")[2]) for name in self.tensors if name.startswith("encoder.layers."))
        return 1 + max(layers, default=-1)

    def own_name(self, name: str) -> str:
        """What the checkpoint calls the tensor of a canonical name."""
        return self.own.get(name, self.prefix + self.layout.own_name(name))

    @property
    def activation_is_known(self) -> bool:
        """Whether the checkpoint itself tells OpenAI's quick GELU from open_clip's GELU."""
        return (
            self.layout.hidden_act is not None
            or self.place is not None
            or "input_resolution" in self.set_aside
            or (f"encoder.layers.{OPENAI_DEPTH}.mlp.fc1.weight" in self.tensors)
        )


def text_weights(
    tensors: Mapping[str, Tensor],
    where: str = "the checkpoint",
    keep: int = KEPT_POSITIONS,
    place: str | None = None,
) -> TextWeights:
    """Picks the text tower out of a state dict, under canonical names.

    Args:
        tensors: A state dict in any of `layouts.LAYOUTS`; or a whole model, or a file of ComfyUI's or a trainer's that
            places its encoders as one of `layouts.PLACES`.
        where: What to call the source in error messages.
        keep: Rows that a two-table checkpoint takes from its frozen table.
        place: Which encoder of a whole model, `"text_encoder"` or `"text_encoder_2"`; by default its first.

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
    names = tower_names(tensors, prefix)
    aside = tensors.keys() - names.values()
    text, notes = _multiplied_out({inner: tensors[name] for inner, name in names.items()})
    layout = find_layout(text)
    if layout is None:
        raise ValueError(
            f"{where} holds no CLIP text tower in the layout of transformers, OpenAI or open_clip "
            f"(its names begin with {', '.join(sorted(tensors)[:3])})."
        )
    found, own, extra = canonical_names(text, layout)
    if extra:
        named = listed(names.get(name, prefix + name) for name in extra)
        raise ValueError(f"{where} holds text weights that a CLIP does not have: {named}.")
    own = {ours: names.get(theirs, prefix + theirs) for ours, theirs in own.items()}
    whole = next((own[name] for name in (TOKENS, POSITIONS) if name in own), "")
    if layout.trained is not None:
        found[POSITIONS], own[POSITIONS] = _merged_table(text, layout, keep, where)
        if (unused := f"{layout.prefix}{layout.unused}") in text:
            aside |= {names[unused]}
            notes.append(f"{names[unused]} ({len(text[unused])} rows, which no long text reads) was set aside")
    found, widened = _widened(found)
    inner = layout.own_name(TOKENS)
    return TextWeights(
        layout,
        {name: tensor.clone().contiguous() for name, tensor in found.items()},
        tuple(sorted(aside)),
        where,
        own,
        whole.removesuffix(inner) if whole.endswith(inner) else prefix,
        place,
        (*notes, *widened),
    )


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
            raise ValueError(f"{where} holds {named} as {tensors[name].dtype}: give floats of 8, 16, 32 or 64 bits.")
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
        ValueError: If there is no image tower, or it is not a vision transformer.
    """
    kept = {name: tensor for name, tensor in tensors.items() if name == "logit_scale" or name.startswith("vis")}
    found: dict[str, Tensor] = {}
    for name, tensor in _multiplied_out(kept)[0].items():
        inner = name.removeprefix("visual.")
        found |= _image_names(inner, tensor) if inner != name else {_once(name): tensor}
    found = {name: tensor.clone() for name, tensor in found.items() if not name.endswith("position_ids")}
    if lacking := [name for name, ndim in _IMAGE_SHAPES.items() if name not in found or found[name].ndim != ndim]:
        raise ValueError(
            f"{where} holds no image tower that is a vision transformer (it lacks {listed(lacking)}): "
            f"give a whole CLIP with a ViT."
        )
    patches, table, inner_layer, projection = (found[name] for name in _IMAGE_SHAPES)
    layers = {name.split(".")[3] for name in found if name.startswith("vision_model.encoder.layers.")}
    width, size = patches.shape[0], patches.shape[-1]
    return found, {
        "hidden_size": width,
        "intermediate_size": inner_layer.shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": min(width // HEAD_WIDTH, MOST_IMAGE_HEADS),
        "patch_size": size,
        "image_size": size * round((table.shape[0] - 1) ** 0.5),
        "projection_dim": projection.shape[0],
        "hidden_act": hidden_act,
    }


def _once(name: str) -> str:
    """longclip-transformers holds its image tower as `vision_model.vision_model.…`."""
    return name.replace("vision_model.vision_model.", "vision_model.", 1)


def _image_names(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """OpenAI's name of an image weight, without `visual.` -> the names of `transformers`."""
    if name in _OPENAI_IMAGE_NAMES:
        return {_OPENAI_IMAGE_NAMES[name]: tensor}
    if name == "proj":
        return {"visual_projection.weight": tensor.T}  # (D, E) -> (E, D), as nn.Linear keeps it
    _, _, block = name.partition("transformer.resblocks.")
    number, _, part = block.partition(".")
    found = openai_block(f"vision_model.encoder.layers.{number}.", part, tensor) if number.isdigit() else None
    return {f"visual.{name}": tensor} if found is None else found


def _multiplied_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Matrices that a file holds in two factors, as one.

    - `W.r` (out, 1) and `W.theta` (out, in): r * theta / |theta|, row by row (zer0int's GeometricLinear, before his
      own script converts it back).
    - float8 `W.weight` and a scalar `W.scale_weight` (ComfyUI): their product.

    Products are formed in float32, and kept in it where one factor was float8, else cast to the dtype of `theta`.
    """
    found = dict(tensors)
    polar = [name.removesuffix("theta") for name in tensors if name.endswith(".theta")]
    polar = [name for name in polar if f"{name}r" in tensors and tensors[f"{name}theta"].ndim == 2]
    for name in polar:
        theta, radius = found.pop(f"{name}theta"), found.pop(f"{name}r")
        found[f"{name}weight"] = (radius.float() * normalize(theta.float(), dim=1)).to(theta.dtype)
    scaled = [name.removesuffix("scale_weight") for name in tensors if name.endswith(".scale_weight")]
    scaled = [name for name in scaled if f"{name}weight" in tensors]
    for name in scaled:
        found[f"{name}weight"] = found[f"{name}weight"].float() * found.pop(f"{name}scale_weight").float()
        found.pop(f"{name}scale_input", None)
    notes = []
    if polar:
        notes.append(f"{len(polar)} matrices in polar form (r and theta) were multiplied out")
    if scaled:
        notes.append(f"{len(scaled)} scaled matrices of float8 were multiplied out to float32")
    return found, notes


def _merged_table(text: Mapping[str, Tensor], layout: Layout, keep: int, where: str) -> tuple[Tensor, str]:
    """One table out of two, and the name of the trained one."""
    kept, trained = (f"{layout.prefix}{name}" for name in (layout.kept, layout.trained))
    if kept not in text:
        raise ValueError(f"{where} lacks the text weights {kept}, though it has {trained}.")
    try:
        return merge_positions(text[kept], text[trained], keep), trained
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _widened(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """float8 becomes float16; what dtypes there are besides is said."""
    small = [name for name, tensor in tensors.items() if tensor.dtype in _FLOAT8]
    notes = [f"{len(small)} tensors of float8 became float16, which holds the same numbers"] if small else []
    tensors = {name: tensor.half() if name in small else tensor for name, tensor in tensors.items()}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 and dtypes <= set(_DTYPES):
        named = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        notes.append(f"it mixes {named}: the encoder has the type that holds both, unless dtype says otherwise")
    return tensors, notes


def _both_names(weights: TextWeights, name: str) -> str:
    own = weights.own_name(name)
    return name if own == name else f"{own} ({name})"
