"""FineLIP's own checkpoint files: a whole CLIP under OpenAI's names, with the token refinement under `cross_net.`."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .checkpoints import listed
from .layouts import PROJECTION, openai_layout, openai_name

_REFINEMENTS = {"image_refinement": "cross_net.aggr_net", "text_refinement": "cross_net.cap_aggr_net"}
"""Our name of each refinement, and that of FineLIP's code (`TokenAggregation` in its `model/cross_net.py`)."""
_PARTS = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")  # norm, linear, GELU, linear
_PARAMETERS = {"scale": "scale"} | {f"weigh.{part}": f"weight.{part}" for part in _PARTS}
_IMAGE_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
}
_IMAGE_NORMS = {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}


def refinement_weights(tensors: Mapping[str, Tensor], where: str = "the checkpoint") -> dict[str, Tensor]:
    """Picks FineLIP's token refinement out of a state dict, under the names of `FineLIPModel`.

    Args:
        tensors: A state dict.
        where: What to call the source in error messages.

    Returns:
        `image_refinement.…` and `text_refinement.…`; empty where the source has no `cross_net.…`.

    Raises:
        ValueError: If there is a part of the refinement but not all of it, or other weights under `cross_net.`, or the
            shapes do not belong together. One sentence.
    """
    found = {name: tensor for name, tensor in tensors.items() if name.startswith("cross_net.")}
    if not found:
        return {}
    names = {
        f"{ours}.{own}": f"{theirs}.{their}"
        for ours, theirs in _REFINEMENTS.items()
        for own, their in _PARAMETERS.items()
    }
    if missing := [theirs for theirs in names.values() if theirs not in found]:
        raise ValueError(
            f"{where} holds only a part of FineLIP's token refinement (it lacks {listed(missing)}): give the whole "
            "checkpoint, or leave the refinement out with refine_image=False and refine_text=False."
        )
    if extra := sorted(found.keys() - set(names.values())):
        raise ValueError(
            f"{where} holds weights that FineLIP's token refinement does not have: {listed(extra)}; leave the "
            "refinement out with refine_image=False and refine_text=False."
        )
    weights = {ours: found[theirs].clone() for ours, theirs in names.items()}
    for side in _REFINEMENTS:
        weights[f"{side}.scale"] = weights[f"{side}.scale"].reshape(-1)[0]  # (1, 1, 1) -> ()
    shapes = {side: [tuple(weights[f"{side}.{own}"].shape) for own in _PARAMETERS] for side in _REFINEMENTS}
    hidden, width = (*weights["image_refinement.weigh.1.weight"].shape, 0, 0)[:2]
    number = len(weights["image_refinement.weigh.3.weight"])
    wanted = [(), (width,), (width,), (hidden, width), (hidden,), (number, hidden), (number,)]
    if any(own != wanted for own in shapes.values()):
        raise ValueError(f"{where} holds a token refinement whose shapes do not fit together: {shapes}.")
    return weights


def finelip_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `FineLIPModel` -> that of FineLIP's code, which `FineLIPModel.from_clip` reads back.

    Args:
        state: `FineLIPModel.state_dict()`.

    Returns:
        FineLIP's name -> tensor, contiguous; no two share memory. A position table of more than 77 rows is written
        twice, as `openai_layout` says.

    Raises:
        ValueError: If one of the two refinements is there and the other is not: FineLIP's code has both or none.
    """
    sides = [side for side in _REFINEMENTS if f"{side}.scale" in state]
    if len(sides) == 1:
        raise ValueError(
            f"FineLIP's layout has the refinement of both towers or none, but this model has {sides[0]} alone: "
            "keep it with save_pretrained."
        )
    clip = {name.removeprefix("clip."): tensor for name, tensor in state.items() if name.startswith("clip.")}
    text = {
        name.removeprefix("text_model."): tensor for name, tensor in clip.items() if name.startswith("text_model.")
    }
    found = openai_layout(text | {PROJECTION: clip["text_projection.weight"]})
    found["logit_scale"] = clip["logit_scale"]
    found["visual.proj"] = clip["visual_projection.weight"].T
    parts: dict[str, list[Tensor]] = {}
    image = {name.removeprefix("vision_model."): name for name in clip if name.startswith("vision_model.")}
    for name in sorted(image, key=lambda name: name.replace("q_proj", "a_proj")):  # q, k, v
        parts.setdefault(f"visual.{_image_name(name)}", []).append(clip[image[name]])
    found |= {name: torch.cat(part) if len(part) > 1 else part[0] for name, part in parts.items()}
    for side in sides:
        for own, theirs in _PARAMETERS.items():
            tensor = state[f"{side}.{own}"]
            found[f"{_REFINEMENTS[side]}.{theirs}"] = tensor.reshape(1, 1, 1) if own == "scale" else tensor
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in found.items()}


def _image_name(name: str) -> str:
    """transformers' name of an image weight, without `vision_model.` -> OpenAI's, without `visual.`."""
    if name in _IMAGE_NAMES:
        return _IMAGE_NAMES[name]
    norm = re.fullmatch(r"(pre_layrnorm|post_layernorm)\.(\w+)", name)
    return f"{_IMAGE_NORMS[norm[1]]}.{norm[2]}" if norm else openai_name(name)
