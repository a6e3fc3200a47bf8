"""Low-rank adapters (LoRA, arXiv 2106.09685) of a text encoder or a UNet: put in, taken out again, saved."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from .text_encoder import TextEncoder

ENCODER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def adapt_encoder(encoder: TextEncoder, rank: int) -> None:
    """Puts adapters into every layer of a text encoder; of its own weights the positions alone are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ENCODER_LAYERS)), encoder)
    for name, weight in encoder.named_parameters():
        weight.requires_grad_(".lora_" in name or "position_embedding" in name)


def adapt_unet(unet: UNet2DConditionModel, rank: int) -> None:
    """Puts adapters into a UNet's attention layers, as diffusers' training examples do; they alone are trained."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(UNET_LAYERS))
    unet.add_adapter(config)
    for name, weight in unet.named_parameters():
        weight.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            weight.data = weight.data.float()


def fuse(module: nn.Module) -> None:
    """Adds the product of each adapter to the weights that it adapts, and takes the adapters out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            module.set_submodule(name, layer.get_base_layer())


def save_unet_lora(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Writes the adapters of a pipeline's UNet as `load_lora_weights` reads them."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    kind: Any = type(pipeline)
    state = {
        name: weight.to("cpu", torch.float32) for name, weight in get_peft_model_state_dict(pipeline.unet).items()
    }
    kind.save_lora_weights(folder, unet_lora_layers=convert_state_dict_to_diffusers(state))
