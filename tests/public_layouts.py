"""One tiny encoder, written as each public layout has it: names typed from their authors' sources, not from ours."""

from collections.abc import Callable

import torch
from tiny_models import WIDTH
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Tensors = dict[str, Tensor]
CLIP_PARTS = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "self_attn.out_proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "final_layer_norm.": "ln_final.",
}


BYTES = [character + end for end in ("", "</w>") for character in pre_tokenizers.ByteLevel.alphabet()]
TOKENIZER = CLIPTokenizer(  # single bytes: it is copied for every encoder
    vocab={word: i for i, word in enumerate([*BYTES, "<|startoftext|>", "<|endoftext|>"])},
    merges=[],
    model_max_length=77,
)
AS_IS = {"max_length": None, "num_attention_heads": 2, "hidden_act": "quick_gelu", "tokenizer": TOKENIZER}


def small_encoder(seed: int, positions: int = 248) -> CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        initializer_factor=5.0,
    )
    return CLIPTextModelWithProjection(config).eval()


def renamed(name: str, parts: dict[str, str]) -> str:
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def flat(encoder: CLIPTextModel | CLIPTextModelWithProjection) -> Tensors:
    """The names of transformers from 5.6 on."""
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def hugging_face(encoder: CLIPTextModel | CLIPTextModelWithProjection) -> Tensors:
    """Those of transformers before, which files on the hub have."""
    return {name if "projection" in name else f"text_model.{name}": t for name, t in flat(encoder).items()}


def open_clip(encoder: CLIPTextModel | CLIPTextModelWithProjection) -> Tensors:
    """OpenAI's names; a tower without a projection gets one, as SD 2.x has it in its file."""
    state = flat(encoder)
    found = {
        "text_projection": state.pop("text_projection.weight", torch.eye(encoder.config.hidden_size)).T,
        "logit_scale": torch.ones(()),
    }
    for name, tensor in state.items():
        if "q_proj" in name:
            three = torch.cat([state[name.replace("q_proj", f"{target}_proj")] for target in "qkv"])
            found[renamed(name, CLIP_PARTS).replace("self_attn.q_proj.", "attn.in_proj_")] = three
        elif "k_proj" not in name and "v_proj" not in name:
            found[renamed(name, CLIP_PARTS)] = tensor
    return found


def two_tables(merged: Tensor) -> tuple[Tensor, Tensor]:
    """A frozen and a trained table that amount to the merged one; what neither is read for is other numbers."""
    frozen, trained = merged.clone(), merged.clone()
    frozen[20:] += 1.0
    trained[:20] -= 1.0
    return frozen, trained


def long_clip(encoder: CLIPTextModelWithProjection) -> Tensors:
    """beichenzbc/Long-CLIP, `model/model_longclip.py`: a whole CLIP; its image tower here is one weight."""
    found = open_clip(encoder)
    found["positional_embedding"], found["positional_embedding_res"] = two_tables(found["positional_embedding"])
    return found | {"visual.conv1.weight": torch.ones(2, 3, 4, 4), "visual.class_embedding": torch.ones(2)}


def in_polar_form(tensors: Tensors) -> Tensors:
    """zer0int/Long-CLIP, `longgmp/model_longclip.py`: both matrices of each MLP, with a norm for each output row."""
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith(("mlp.c_fc.weight", "mlp.c_proj.weight"))]:
        matrix = found.pop(name)
        radius = matrix.norm(dim=1, keepdim=True)  # (out, 1)
        found[name.replace("weight", "r")] = radius
        found[name.replace("weight", "theta")] = 3 * matrix / radius  # its length says nothing
    return found


def registers(tensors: Tensors) -> Tensors:
    """zer0int/CLIP-fine-tune-registers-gated, `longTRAINgmpCLIPregXGATED/model.py`: all of it in the image tower."""
    return tensors | {
        "visual.register_tokens": torch.ones(4, 2),
        "visual.transformer.intermediate_fusion_mlps.0.0.weight": torch.ones(2, 4),
        "visual.fusion_mlp.0.weight": torch.ones(2, 4),
    }


def fg_clip(encoder: CLIPTextModelWithProjection) -> Tensors:
    """360CVGroup/FG-CLIP, branch v1.0, `fgclip/model/clip_strc/modeling_clip.py` and `fgclip.py`."""
    found, place = hugging_face(encoder), "text_model.embeddings.position_embedding"
    frozen, trained = two_tables(found[f"{place}.weight"])
    return found | {
        f"{place}.weight": torch.full((77, WIDTH), 9.0),  # for short texts
        f"{place}_ori.weight": frozen,
        f"{place}_res.weight": trained,
        "text_filip_projection.weight": torch.ones(WIDTH, WIDTH),
        "visual_projection.weight": torch.ones(WIDTH, 2),
        "vision_model.embeddings.class_embedding": torch.ones(2),
        "logit_scale": torch.ones(()),
        "logit_scale_finegraind": torch.ones(()),
        "logit_scale_hardneg": torch.ones(()),
    }


def longclip_transformers(encoder: CLIPTextModelWithProjection, whole: bool = True) -> Tensors:
    """creative-graphic-design/longclip-transformers, `src/longclip/modeling_longclip.py`."""
    found = prefixed("text_model.text_model." if whole else "text_model.", flat(encoder))
    place = next(name.removesuffix(".weight") for name in found if "position_embedding" in name)
    found[f"{place}.weight"], found[f"{place}_res"] = two_tables(found[f"{place}.weight"])
    projection = next(name for name in found if "projection" in name)
    tensor = found.pop(projection)
    if whole:
        found |= {"text_projection.weight": tensor, "visual_projection.weight": torch.ones(2, 2)}
        found |= {"vision_model.vision_model.embeddings.class_embedding": torch.ones(2), "logit_scale": torch.ones(())}
    return found


def clip_save(encoder: CLIPTextModelWithProjection) -> Tensors:
    """What ComfyUI's node CLIPSave once wrote: transformers' names, but OpenAI's projection (`comfy/sd.py`)."""
    found = hugging_face(encoder)
    found["text_projection"] = found.pop("text_projection.weight").T.contiguous()
    return found | {"logit_scale": torch.ones(())}


REST = {  # of a whole model: never read here
    "model.diffusion_model.input_blocks.0.0.weight": torch.ones(1),
    "first_stage_model.decoder.conv_in.weight": torch.ones(1),
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.k.weight": torch.ones(1),
}
PREFIXES = [
    "clip_l.",
    "clip_l.transformer.",
    "clip_g.transformer.",
    "text_encoders.clip_l.",
    "text_encoders.clip_l.transformer.",  # Stable Diffusion 3.x, Flux with everything in one file
    "text_encoders.clip_g.transformer.",
    "cond_stage_model.transformer.",  # Stable Diffusion 1.x
    "conditioner.embedders.0.transformer.",  # XL
]
LAYOUTS: dict[str, Callable[[CLIPTextModelWithProjection], Tensors]] = {
    "transformers": hugging_face,
    "transformers 5.6": flat,
    "openai": open_clip,
    "open_clip": lambda encoder: {
        name if name == "logit_scale" else f"text.{name}": tensor for name, tensor in open_clip(encoder).items()
    },
    "OpenAI's names, transformers' projection": lambda encoder: {
        **{name: tensor for name, tensor in open_clip(encoder).items() if name != "text_projection"},
        "text_projection.weight": encoder.text_projection.weight.detach(),
    },
    "Long-CLIP": long_clip,
    "HiMo-CLIP": long_clip,  # UnicomAI/HiMo-CLIP, model/model_himo.py: the same names
    "FineLIP": lambda encoder: {**long_clip(encoder), "cross_net.aggr_net.scale": torch.ones(1, 1, 1)},
    "SmartCLIP": lambda encoder: {**long_clip(encoder), "mask_net.0.weight": torch.ones(2, 2)},
    "GmP": lambda encoder: in_polar_form(open_clip(encoder)),
    "Long-CLIP, GmP": lambda encoder: in_polar_form(long_clip(encoder)),
    "Long-CLIP, GmP, registers, gates": lambda encoder: registers(in_polar_form(long_clip(encoder))),
    "registers in transformers' names": lambda encoder: {
        **hugging_face(encoder),
        "vision_model.embeddings.register_embeddings": torch.ones(4, 2),
        "vision_model.fusion_mlp.0.weight": torch.ones(2, 4),
    },
    "FG-CLIP": fg_clip,
    "longclip-transformers": longclip_transformers,
    "longclip-transformers, text model": lambda encoder: longclip_transformers(encoder, whole=False),
    "CLIPSave": clip_save,
    "XL's second": lambda encoder: prefixed("conditioner.embedders.1.model.", open_clip(encoder)) | REST,
    **{
        f"{prefix}text_model.": lambda encoder, prefix=prefix: prefixed(prefix, hugging_face(encoder)) | REST
        for prefix in PREFIXES
    },
}
"""Name -> the state dict of an encoder in that layout."""
