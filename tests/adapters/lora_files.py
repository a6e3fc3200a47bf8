"""LoRA files, as the two families of trainers write them, and what they make of weights."""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

LORA = "pytorch_lora_weights.safetensors"
UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj")
TEXT_LAYERS = ("q_proj", "v_proj", "out_proj", "fc1", "fc2")


def layers(model: nn.Module, endings: tuple[str, ...]) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in model.named_modules() if n.endswith(endings) and isinstance(m, nn.Linear)]


def kohya_lora(
    parts: dict[str, nn.Module],
    seed: int = 0,
    rank: Callable[[int], int] = lambda layer: 4,
    alpha: Callable[[int], float] = lambda layer: 2.0,
) -> dict[str, Tensor]:
    """kohya-ss's layout: one module for each layer, named with underscores, with its alpha."""
    pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for prefix, model in parts.items():
        for i, (name, layer) in enumerate(layers(model, UNET_LAYERS if "unet" in prefix else TEXT_LAYERS)):
            key = prefix + name.removeprefix("text_model.").replace(".", "_")
            weights[f"{key}.lora_down.weight"] = torch.randn(rank(i), layer.in_features, generator=generator) * 0.3
            weights[f"{key}.lora_up.weight"] = torch.randn(layer.out_features, rank(i), generator=generator) * 0.3
            weights[f"{key}.alpha"] = torch.tensor(alpha(i))
    return weights


def kohya_parts(stock) -> dict[str, nn.Module]:
    return {"lora_unet_": stock.unet, "lora_te_text_model_": stock.text_encoder}


def peft_layers(model: nn.Module, target_modules: list[str], seed: int = 0) -> dict[str, Tensor]:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=target_modules, init_lora_weights=False))
    return peft.get_peft_model_state_dict(model, adapter_name="default")


def write_lora(folder, layout: str, stock, seed: int = 0):
    if layout == "kohya":
        save_file(kohya_lora(kohya_parts(stock), seed), folder / LORA)
    else:
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=peft_layers(stock.unet, ["to_q", "to_v"], seed),
            text_encoder_lora_layers=peft_layers(stock.text_encoder, ["q_proj", "fc1"], seed),
        )
    return folder


def merged(model: nn.Module, lora: dict[str, Tensor], prefix: str) -> nn.Module:
    """A plain loop over kohya's layout: W + alpha / rank * up down."""
    model, found = copy.deepcopy(model), 0
    for name, layer in layers(model, TEXT_LAYERS + UNET_LAYERS):
        key = prefix + name.removeprefix("text_model.").replace(".", "_")
        if f"{key}.lora_up.weight" in lora:
            up, down, alpha = (lora[f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
            layer.weight.data += alpha / len(down) * up @ down
            found += 1
    assert found
    return model
