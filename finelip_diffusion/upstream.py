"""Where diffusers is broken for what this package makes: one function for each fix, to be deleted with its cause."""

from collections import Counter
from typing import Any

from torch import Tensor


def name_dtype(options: dict[str, Any]) -> dict[str, Any]:
    """Gives the type of the weights its new name, `dtype`: diffusers warns of the old one, `torch_dtype`.

    Args:
        options: Arguments of a `from_pretrained` or `from_single_file`, with either name, or with none.

    Returns:
        The same arguments.

    Raises:
        ValueError: If both names are there.
    """
    names = [name for name in ("dtype", "torch_dtype") if options.get(name) is not None]
    if len(names) > 1:
        raise ValueError("dtype and torch_dtype are both given: torch_dtype is the old name of dtype, give dtype.")
    rest = {name: value for name, value in options.items() if name not in ("dtype", "torch_dtype")}
    return {**rest, "dtype": options[names[0]]} if names else rest


def even_alphas(
    state_dict: dict[str, Tensor], network_alphas: dict[str, float] | None
) -> tuple[dict[str, Tensor], dict[str, float] | None]:
    """Gives the layers of a LoRA one alpha, what differs from it moved into the weights.

    A layer adds alpha / rank * up(down(x)). Files of kohya's trainer name an alpha for every layer, and they differ
    after resizing by a dynamic method. diffusers 0.42.1 takes the most common alpha and loses the others of all
    attention layers, UNet and text encoder alike, and of all layers of a flattened CLIPTextModel: the names under
    which `get_peft_kwargs` hands them to PEFT fit no module. No issue is known; the code came with
    https://github.com/huggingface/diffusers/pull/5147, and
    https://github.com/huggingface/diffusers/pull/14409 fixed its neighbor, differing ranks without alphas.

    Args:
        state_dict: A LoRA in diffusers' layout, as `lora_state_dict` returns it.
        network_alphas: The alphas beside it, or None.

    Returns:
        Both, with one alpha for each component. What is even already comes back as it is.
    """
    if not network_alphas:
        return state_dict, network_alphas
    weights, alphas = dict(state_dict), dict(network_alphas)
    layers = [name for name in state_dict if name.endswith(".down.weight")]
    for component in {name.split(".")[0] for name in layers}:
        named = [alpha for name, alpha in network_alphas.items() if name.split(".")[0] == component]
        if not named:
            continue
        common = Counter(named).most_common(1)[0][0]
        for down in layers:
            name = f"{down.split('.lora.')[0]}.alpha"
            alpha = network_alphas.get(name, float(len(state_dict[down])))  # without one, it is the rank
            if down.split(".")[0] == component and alpha != common:
                up = down.replace(".down.", ".up.")
                weights[up] = (state_dict[up].float() * (alpha / common)).to(state_dict[up].dtype)
                alphas[name] = common
    return weights, alphas


def fit_text_encoder_names(state_dict: dict[str, Tensor], text_encoder: object, prefix: str) -> dict[str, Tensor]:
    """Names the layers of a text encoder's LoRA as the encoder does.

    transformers 5.6 dropped `text_model` from CLIPTextModel, not from CLIPTextModelWithProjection. diffusers before
    0.41 ends with an IndexError on LoRAs that have it in their names:
    https://github.com/huggingface/diffusers/issues/13984.

    Args:
        state_dict: A LoRA in diffusers' layout.
        text_encoder: The encoder that is to take it.
        prefix: The encoder's part of the names, such as `text_encoder_2`.

    Returns:
        The LoRA, renamed where the encoder has no `text_model`.
    """
    if hasattr(text_encoder, "text_model"):
        return state_dict
    return {name.replace(f"{prefix}.text_model.", f"{prefix}.", 1): value for name, value in state_dict.items()}
