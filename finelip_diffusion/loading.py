"""Where a pipeline's parts come from: one file, or a UNet that was adapted to an encoder beside it."""

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import fetch_diffusers_config

from .checkpoints import listed, read_checkpoint
from .layouts import embedded_encoders
from .locations import checkpoint_file, configuration_folder
from .text_encoder import load_text_encoder

logger = logging.getLogger(__name__)

UNET_LORA = "pytorch_lora_weights.safetensors"
"""diffusers' name of a file of LoRA."""


def adapted_unet(finelip: str | Path | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The UNet beside a long encoder, for the arguments of a loader that gives none itself."""
    if "unet" in kwargs or finelip is None or not (Path(finelip) / "unet").is_dir():
        return {}
    logger.info("the UNet in %s was adapted to the encoder beside it and replaces that of the base", finelip)
    options = {name: kwargs[name] for name in ("dtype", "torch_dtype", "device_map") if name in kwargs}
    unet = UNet2DConditionModel.from_pretrained(finelip, subfolder="unet", **options)
    return {"unet": unet}


def fuse_adapters(pipe: Any, finelip: str | Path | None, kwargs: dict[str, Any]) -> None:
    """Adds a LoRA of the UNet that lies beside a long encoder to the base's weights, unless a UNet was given."""
    adapted = finelip is not None and (Path(finelip) / UNET_LORA).is_file()
    if not adapted or "unet" in kwargs:
        return
    logger.info("the LoRA in %s was trained for the encoder beside it and is fused into the UNet of the base", finelip)
    state_dict, network_alphas = pipe.lora_state_dict(str(finelip), weight_name=UNET_LORA)[:2]
    pipe.load_lora_into_unet(state_dict, network_alphas=network_alphas, unet=pipe.unet, _pipeline=pipe)
    pipe.fuse_lora(["unet"])
    pipe.unet.unload_lora()


def single_file_components(
    source: str | Path,
    places: tuple[str, ...],
    given: set[str],
    *,
    config: str | Path | None,
    dtype: torch.dtype,
    hub: dict[str, Any],
) -> tuple[Path, Path, dict[str, Any]]:
    """Reads the text encoders of a Stable Diffusion in one file, whatever number of positions they have.

    diffusers would build them by the `config.json` and fail where the file has another number of positions
    (https://github.com/huggingface/diffusers/issues/11285), and tell the two of SDXL apart by their widths alone.

    Args:
        source: A file, or a link to one on the hub.
        places: Endings of the names of the pipeline's encoders: `""`, `"_2"`.
        given: Names of components that are not to be read.
        config: Folder or hub id of a pipeline of the same kind, in diffusers' layout; None is the one that diffusers
            takes for such a file.
        dtype: Of the encoders.
        hub: `token`, `local_files_only`, `cache_dir`.

    Returns:
        The file, a folder with the configurations, and the encoders and tokenizers by name; what is not in the file
        is None (the first encoder of SDXL's refiner).

    Raises:
        ValueError: If there is no such file, it holds the encoders of another kind of model, or the configurations
            cannot be had; and whatever `load_text_encoder` raises. One sentence.
    """
    file = checkpoint_file(source, hub)
    if file is None:
        raise ValueError(
            f"{source} is not a file, and not a link to one on the hub: give one, or use from_pretrained."
        )
    tensors = read_checkpoint(file)
    names = [f"text_encoder{place}" for place in places]
    found = list(embedded_encoders(tensors))
    if (names[-1] not in found and names[-1] not in given) or set(found) - set(names):
        held = " and ".join(found) or f"no text encoder (its names begin with {listed(sorted(tensors), 3)})"
        raise ValueError(
            f"{file} holds {held}, but the pipeline reads with {' and '.join(names)}: "
            f"give a whole Stable Diffusion {'XL' if '_2' in places else '1.x or 2.x'} in one file."
        )
    try:
        folder = configuration_folder(config or fetch_diffusers_config(tensors)["pretrained_model_name_or_path"], hub)
    except ValueError as error:
        reason = str(error).removesuffix(".")
        raise ValueError(f"{file} needs the configurations of a pipeline of its kind: {reason} as config=.") from error
    components: dict[str, Any] = {}
    for name in names:
        tokenizer = name.replace("text_encoder", "tokenizer")
        if name in given:
            continue
        components[name] = components[tokenizer] = None
        if name in found:
            components[name], components[tokenizer] = load_text_encoder(
                file, subfolder=name, config=folder, max_length=None, dtype=dtype
            )
    return file, folder, components
