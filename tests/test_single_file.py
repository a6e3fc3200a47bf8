"""Stable Diffusion 1.x, 2.x and XL in one file, as their authors wrote them, with text encoders of any length."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from packaging.version import Version
from public_layouts import hugging_face, open_clip, prefixed, renamed
from safetensors.torch import load_file, save_file
from tiny_models import as_published, make_stable_diffusion, make_stable_diffusion_xl, tiny_text_encoder, tiny_unet
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finelip_diffusion import (
    FineLIPStableDiffusionPipeline,
    FineLIPStableDiffusionXLPipeline,
    load_text_encoder,
)
from finelip_diffusion.positions import stretch_positions
from finelip_diffusion.text_encoder import text_embeddings
from finelip_diffusion.tokenizer import clip_tokenizer

KINDS = ["1.x", "2.x", "xl"]
with_loader = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.42"),
    reason="older ones fail on CLIPTextModel: https://github.com/huggingface/diffusers/issues/13833",
)
UNET_PARTS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
RESNET_PARTS = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
VAE_PARTS = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
    "resnets.": "block.",
    "conv_shortcut.": "nin_shortcut.",
    "conv_norm_out.": "norm_out.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}


def unet_names(name: str) -> str:
    """diffusers' names -> the authors', for two blocks of one layer, attention in the inner ones."""
    block = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.0\.(.+)", name)
    layered = re.fullmatch(r"up_blocks\.(\d)\.(resnets|attentions)\.1\.(.+)", name)
    if layered:
        number, sort, rest = layered.groups()
        name = f"output_blocks.{2 * int(number) + 1}.{int(sort == 'attentions')}.{rest}"
    elif block:
        way, number, sort, rest = block.groups()
        step = 2 * int(number)
        name = {
            ("down", "resnets"): f"input_blocks.{1 + step}.0.{rest}",
            ("down", "attentions"): f"input_blocks.{1 + step}.1.{rest}",
            ("down", "downsamplers"): f"input_blocks.{2 + step}.0.{rest.replace('conv', 'op')}",
            ("up", "resnets"): f"output_blocks.{step}.0.{rest}",
            ("up", "attentions"): f"output_blocks.{step}.1.{rest}",
            ("up", "upsamplers"): f"output_blocks.{1 + step}.2.{rest}",
        }[way, sort]
    elif not name.startswith("mid_block."):
        return renamed(name, UNET_PARTS)
    name = renamed(name, UNET_PARTS)
    return name if re.match(r"(input|output)_blocks\.\d\.[12]|middle_block\.1", name) else renamed(name, RESNET_PARTS)


def vae_names(name: str) -> str:
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{1 - int(found[1])}", name)  # of two, counted from the end
    return renamed(name, VAE_PARTS)


def single_file(pipe: Any, kind: str, path: Path) -> Path:
    """Writes a pipeline in the layout of its authors."""
    tensors = prefixed("model.diffusion_model.", {unet_names(k): v for k, v in pipe.unet.state_dict().items()})
    vae = {vae_names(name): tensor for name, tensor in pipe.vae.state_dict().items()}
    vae = {k: v[..., None, None] if "attn_1" in k and v.ndim == 2 and "norm" not in k else v for k, v in vae.items()}
    tensors |= prefixed("first_stage_model.", vae)
    if kind == "1.x":
        tensors |= prefixed("cond_stage_model.transformer.", hugging_face(pipe.text_encoder))
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    elif kind == "2.x":
        tower = open_clip(pipe.text_encoder)
        last = {k.replace("resblocks.0.", "resblocks.23."): v * 2 for k, v in tower.items() if "resblocks.0." in k}
        tensors |= prefixed("cond_stage_model.model.", tower | last)  # the last of 24 blocks is in the file, unread
    elif kind == "refiner":
        tensors |= prefixed("conditioner.embedders.0.model.", open_clip(pipe.text_encoder_2))
    else:
        tensors |= prefixed("conditioner.embedders.0.transformer.", hugging_face(pipe.text_encoder))
        tensors |= prefixed("conditioner.embedders.1.model.", open_clip(pipe.text_encoder_2))
    save_file(tensors, path)
    return path


class Base:
    """A tiny model of a kind: as a file, and as a folder of diffusers."""

    def __init__(self, kind: str, folder: Path) -> None:
        # the encoders of XL have two widths: diffusers tells them apart by that
        pipe: Any = make_stable_diffusion_xl(second_width=64) if kind == "xl" else make_stable_diffusion()
        if kind == "2.x":
            pipe.text_encoder.config.hidden_act = "gelu"
            pipe.text_encoder = CLIPTextModel(pipe.text_encoder.config).eval()
        self.kind, self.folder = kind, folder / "folder"
        self.file = single_file(pipe, kind, folder / "base.safetensors")
        pipe.save_pretrained(self.folder)
        as_published(self.folder)
        self.stock: Any = StableDiffusionXLPipeline if kind == "xl" else StableDiffusionPipeline
        self.ours: Any = FineLIPStableDiffusionXLPipeline if kind == "xl" else FineLIPStableDiffusionPipeline
        self.pipe = pipe


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Base]:
    return {kind: Base(kind, tmp_path_factory.mktemp("base")) for kind in KINDS}


def draw(pipe: DiffusionPipeline, prompt: str, **options: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=1, generator=noise, output_type="np", **options).images


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- as diffusers ---------------------------------------------------------------------------------------------------


@with_loader
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_own_loader_is_the_judge_of_the_files(bases, kind, text_of):
    base, prompt = bases[kind], text_of(100)
    pipe = base.stock.from_single_file(str(base.file), config=str(base.folder))
    assert np.array_equal(draw(pipe, prompt), draw(base.pipe, prompt))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_draws_what_its_folder_draws(bases, kind, text_of):
    """Cut at 77 tokens, as diffusers' own pipeline does; in windows, the default; and stretched where asked."""
    base, prompt = bases[kind], text_of(100)
    pipe = base.ours.from_single_file(base.file, config=base.folder)
    assert np.array_equal(draw(pipe, prompt, long_prompt="truncate"), draw(base.pipe, prompt))
    assert same_weights(pipe.text_encoder, base.pipe.text_encoder) and pipe.tokenizer.model_max_length == 77
    folder = base.ours.from_pretrained(base.folder)
    assert pipe.long_prompt == folder.long_prompt == "chunk"
    assert np.array_equal(draw(pipe, prompt), draw(folder, prompt))
    pipe = base.ours.from_single_file(base.file, long_prompt="stretch", config=base.folder)
    assert same_weights(pipe.stock_text_encoder, base.pipe.text_encoder)
    assert pipe.stock_tokenizer.model_max_length == 77 and pipe.tokenizer.model_max_length == 248
    folder = base.ours.from_pretrained(base.folder, long_prompt="stretch")
    assert np.array_equal(draw(pipe, prompt), draw(folder, prompt))


def test_a_long_encoder_takes_the_place_of_the_files_own(bases, finelip_folder, text_of):
    base, prompt = bases["1.x"], text_of(100)
    pipe = base.ours.from_single_file(base.file, finelip_folder, "auto", config=base.folder)
    folder = base.ours.from_pretrained(base.folder, finelip_folder, "auto")
    assert pipe.long_prompt == "auto" and same_weights(pipe.unet, folder.unet)  # the one adapted to the encoder
    assert not same_weights(pipe.unet, base.pipe.unet) and same_weights(pipe.text_encoder, folder.text_encoder)
    assert np.array_equal(draw(pipe, prompt), draw(folder, prompt))


def test_dtypes_and_components_are_as_in_diffusers(bases, finelip_folder):
    base, given = bases["1.x"], tiny_text_encoder(5)
    half = base.ours.from_single_file(base.file, config=base.folder, torch_dtype=torch.float16)
    assert {part.dtype for name, part in half.components.items() if hasattr(part, "parameters")} == {torch.float16}
    parts = {"text_encoder": given, "unet": base.pipe.unet}
    pipe = base.ours.from_single_file(base.file, finelip_folder, config=base.folder, **parts)
    assert pipe.stock_text_encoder is given and pipe.stock_tokenizer.model_max_length == 77
    assert pipe.unet is base.pipe.unet and pipe.text_encoder.dtype == torch.float32
    xl = bases["xl"]
    options = {"second_encoder": "window", "hidden_state": "last_norm"}
    pipe = xl.ours.from_single_file(xl.file, config=xl.folder, **options)
    assert (pipe.second_encoder, pipe.hidden_state) == ("window", "last_norm")
    assert pipe.tokenizer_2.pad_token == "!" and same_weights(pipe.text_encoder_2, xl.pipe.text_encoder_2)


def test_the_refiner_has_the_second_encoder_alone(bases, tmp_path):
    xl = bases["xl"]
    refiner_unet = tiny_unet(4, cross_attention_dim=64)
    parts = xl.pipe.components | {"text_encoder": None, "tokenizer": None, "unet": refiner_unet}
    refiner = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=False, add_watermarker=False)
    refiner.save_pretrained(tmp_path / "folder")
    file = single_file(refiner, "refiner", tmp_path / "refiner.safetensors")
    pipe = xl.ours.from_single_file(file, config=tmp_path / "folder", add_watermarker=False)
    assert pipe.text_encoder is None and same_weights(pipe.stock_text_encoder_2, xl.pipe.text_encoder_2)
    assert same_weights(pipe.unet, refiner.unet) and pipe.tokenizer_2.pad_token == "!"


# --- lengths that disagree ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["1.x", "xl"])
def test_a_merged_file_of_248_rows_where_the_configuration_says_77(bases, kind, text_of, tmp_path):
    base, prompt = bases[kind], text_of(100)
    long = tiny_text_encoder(7, positions=248)
    merged: Any = base.stock(**{**base.pipe.components, "text_encoder": long, "tokenizer": clip_tokenizer(248)})
    if kind == "xl":  # both, as SDXL needs them
        merged.text_encoder_2 = tiny_text_encoder(8, width=64, positions=248, projection=True)
        merged.tokenizer_2 = clip_tokenizer(248, "!")
    file = single_file(merged, kind, tmp_path / "merged.safetensors")
    pipe = base.ours.from_single_file(file, config=base.folder)
    assert np.array_equal(draw(pipe, prompt), draw(merged, prompt))
    assert pipe.stock_text_encoder is None
    with pytest.raises(ValueError, match="'truncate' reads with stock_text_encoder, which this pipeline does not hav"):
        draw(pipe, prompt, long_prompt="truncate")
    stock = {
        name: part for name, part in base.pipe.components.items() if name.startswith(("text_encoder", "tokenizer"))
    }
    pipe.register_modules(**{f"stock_{name}": part for name, part in stock.items()})
    assert np.array_equal(draw(pipe, prompt, long_prompt="truncate"), draw(base.pipe, prompt))


@with_loader
def test_diffusers_itself_fails_where_file_and_configuration_disagree(bases, tmp_path):
    """https://github.com/huggingface/diffusers/issues/11285; once it does not, `single_file_components` can shrink."""
    base = bases["1.x"]
    tensors = prefixed("cond_stage_model.transformer.", hugging_face(tiny_text_encoder(7, positions=248)))
    save_file(load_file(base.file) | tensors, tmp_path / "merged.safetensors")
    with pytest.raises(ValueError, match=r"77, 32.*248, 32|248, 32.*77, 32"):
        base.stock.from_single_file(str(tmp_path / "merged.safetensors"), config=str(base.folder))


def test_a_file_of_77_rows_where_the_configuration_says_248(bases, text_of, tmp_path):
    """A folder that our pipeline saved, stock encoders and all, is a configuration as good as any."""
    base, prompt = bases["1.x"], text_of(100)
    base.ours.from_pretrained(base.folder, long_prompt="stretch").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "text_encoder/config.json").read_text())["max_position_embeddings"] == 248
    pipe = base.ours.from_single_file(base.file, long_prompt="stretch", config=tmp_path)
    assert np.array_equal(draw(pipe, prompt, long_prompt="truncate"), draw(base.pipe, prompt))
    table = text_embeddings(base.pipe.text_encoder).position_embedding.weight
    assert torch.equal(text_embeddings(pipe.text_encoder).position_embedding.weight, stretch_positions(table))


def test_what_does_not_fit_is_one_sentence(bases, tmp_path, finelip_folder):
    one, xl = bases["1.x"], bases["xl"]
    wide = tmp_path / "wide"
    tiny_text_encoder(7, width=64, positions=248).save_pretrained(wide / "text_encoder")
    clip_tokenizer(248).save_pretrained(wide / "tokenizer")
    narrow = tmp_path / "narrow"
    shutil.copytree(one.folder, narrow)
    described = json.loads((narrow / "text_encoder/config.json").read_text())
    (narrow / "text_encoder/config.json").write_text(json.dumps(described | {"hidden_size": 64}))
    (tmp_path / "empty").mkdir()
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_down.alpha": torch.ones(1)}, lora)
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (one, one.file, {"finelip": wide}, "text encoder is 64 wide, but the UNet reads states of width 32"),
        (xl, xl.file, {"finelip": wide}, r"is 128 wide \(64 \+ 64\), but the UNet reads .* width 96"),
        (one, xl.file, {}, "holds text_encoder and text_encoder_2, but .* reads with text_encoder: .*1.x or 2"),
        (xl, one.file, {}, "holds text_encoder, but the pipeline reads with text_encoder and text_encoder_2: .* XL"),
        (one, lora, {}, r"holds no text encoder \(its names begin with lora_unet_down\.alpha\)"),
        (one, one.file, {"config": narrow}, r"token_embedding\.weight.* is \(49408, 32\) and must be \(49408, 64\)"),
        (one, one.file, {"config": tmp_path / "empty"}, "empty holds no CLIP text model"),
        (one, one.file, {"config": None}, r"base\.safetensors needs the conf.*-v1-5 is not a folder .* as config=\.$"),
        (one, one.folder, {}, "is not a file, and not a link to one on the hub: .*from_pretrained"),
        (one, "https://huggingface.co/owner/name/blob/main/x.safetensors", {}, "cannot be reached and is not cached"),
        (one, one.file, {"long_prompt": "clip"}, "long_prompt='clip' is unknown"),
    ]  # fmt: skip
    for base, source, options, sentence in cases:
        with pytest.raises(ValueError, match=sentence) as caught:
            base.ours.from_single_file(source, **{"config": base.folder, **options})
        assert "\n" not in str(caught.value)


# --- the encoder alone ----------------------------------------------------------------------------------------------


def test_text_encoders_out_of_a_file(bases):
    for kind, place, expected in [
        ("2.x", "text_encoder", "text_encoder"),
        ("xl", None, "text_encoder"),
        ("xl", "text_encoder_2", "text_encoder_2"),
    ]:
        base = bases[kind]
        model, tokenizer = load_text_encoder(base.file, subfolder=place, config=base.folder)
        inside = getattr(base.pipe, expected)
        assert type(model) is type(inside) and model.config.hidden_act == inside.config.hidden_act
        folder, other = load_text_encoder(base.folder, subfolder=expected)
        assert same_weights(model, folder) and tokenizer.get_vocab() == other.get_vocab()
        assert tokenizer.pad_token == other.pad_token


def test_without_a_configuration_the_kind_of_the_file_says_the_activation(bases, caplog):
    """Heads are width / 64 then, which the tiny width does not allow."""
    for kind, place, act in [("1.x", None, "quick_gelu"), ("2.x", None, "gelu"), ("xl", "text_encoder_2", "gelu")]:
        file = bases[kind].file
        model, tokenizer = load_text_encoder(file, subfolder=place, num_attention_heads=2)
        assert model.config.hidden_act == act and isinstance(tokenizer, CLIPTokenizer)
        assert isinstance(model, CLIPTextModelWithProjection) == (place == "text_encoder_2")
    assert "assumed" not in caplog.text


def test_wrong_places_and_configurations_are_one_sentence(bases, tmp_path):
    one, xl = bases["1.x"], bases["xl"]
    for source, options, sentence in [
        (one.file, {"subfolder": "text_encoder_2"}, "has no subfolder 'text_encoder_2': choose from text_encoder"),
        (xl.file, {"subfolder": "unet"}, "choose from text_encoder, text_encoder_2"),
        (one.folder, {"config": one.folder}, r"has a config\.json of its own: config=.* goes with a checkpoint file"),
        (one.file, {"config": "owner/name"}, "owner/name is not a folder here, and as a hub id it cannot be reached"),
        (one.file, {}, "base.safetensors is 32 wide, .*give num_attention_heads"),
    ]:
        with pytest.raises(ValueError, match=sentence) as caught:
            load_text_encoder(source, **options)
        assert "\n" not in str(caught.value)


def test_missing_weights_bear_the_names_of_the_file(bases, tmp_path):
    tensors = prefixed("cond_stage_model.model.", open_clip(bases["2.x"].pipe.text_encoder))
    del tensors["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"]
    save_file(tensors, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"lacks .* cond_stage_model\.model\.transformer\.resblocks\.1\.attn\.in_p"):
        load_text_encoder(tmp_path / "two.safetensors", num_attention_heads=2)
    tensors = prefixed("cond_stage_model.transformer.", hugging_face(bases["1.x"].pipe.text_encoder))
    del tensors["cond_stage_model.transformer.text_model.final_layer_norm.bias"]
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"lacks .* cond_stage_model\.transformer\.text_model\.final_layer_norm\.b"):
        load_text_encoder(tmp_path / "one.safetensors", num_attention_heads=2)
