"""Pipelines loaded, saved, and loaded again, by this package and by plain diffusers, with every option there is."""

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from tiny_models import WIDTH, pixels, tiny_text_encoder, tiny_unet

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline, attach
from finelip_diffusion.positions import stretch_positions
from finelip_diffusion.prompts import LONG_PROMPTS
from finelip_diffusion.tokenizer import clip_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def _pipe(stable_diffusion_folder, finelip_folder):
    return quiet(FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip=finelip_folder))


@pytest.fixture
def pipe(_pipe):
    """A long encoder with other weights than the base's; shared weights, so to be left as they are."""
    return copy.copy(_pipe)


def test_a_finelip_folder_brings_its_unet_unless_one_is_given(pipe, stable_diffusion_folder, finelip_folder):
    assert torch.equal(pipe.unet.conv_in.weight, tiny_unet(8).conv_in.weight)
    own = tiny_unet(9)
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip_folder, unet=own)
    assert pipe.unet is own


def test_where_it_is_asked_for_the_base_encoder_is_stretched_with_a_warning(stable_diffusion_folder, caplog):
    with caplog.at_level(logging.WARNING, logger="finelip_diffusion"):
        pipe = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, long_prompt="stretch")
    assert "without training" in caplog.text
    table = pipe.stock_text_encoder.embeddings.position_embedding.weight
    assert torch.equal(pipe.text_encoder.embeddings.position_embedding.weight, stretch_positions(table))
    assert pipe.text_encoder.config.max_position_embeddings == pipe.tokenizer.model_max_length == 248
    assert pipe.stock_text_encoder.config.max_position_embeddings == pipe.stock_tokenizer.model_max_length == 77


def test_a_long_base_encoder_is_used_as_it_is(stable_diffusion_folder, tokenizer, caplog):
    long = tiny_text_encoder(5, positions=248)
    with caplog.at_level(logging.WARNING, logger="finelip_diffusion"):
        pipe = FineLIPStableDiffusionPipeline.from_pretrained(
            stable_diffusion_folder, text_encoder=long, tokenizer=tokenizer
        )
    assert not [record for record in caplog.records if record.name.startswith("finelip")]
    assert pipe.text_encoder is long
    assert pipe.tokenizer.model_max_length == 248  # the base's tokenizer, widened, in a copy
    assert tokenizer.model_max_length == 77
    with pytest.raises(
        ValueError, match="truncate.* reads with stock_text_encoder, which this pipeline does not have"
    ):
        pipe("a cat", long_prompt="truncate")


def test_the_components_of_another_pipeline_are_left_alone(stock, text_of):
    before = stock.text_encoder.embeddings.position_embedding.weight.clone()
    FineLIPStableDiffusionPipeline(**stock.components, requires_safety_checker=False, long_prompt="stretch")
    attach(copy.copy(stock), long_prompt="stretch")
    assert torch.equal(stock.text_encoder.embeddings.position_embedding.weight, before)
    assert stock.text_encoder.config.max_position_embeddings == stock.tokenizer.model_max_length == 77


def test_a_saved_pipeline_gives_the_same_pixels_in_plain_diffusers(pipe, text_of, tmp_path):
    """In a process of its own: no trace of this package, and what a user would see on stderr."""
    pipe.save_pretrained(tmp_path)
    code = f"""
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r})
assert type(pipe).__module__.startswith("diffusers."), type(pipe)
images = pipe({text_of(200)!r}, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
torch.save(torch.from_numpy(images.images), {str(tmp_path / "images.pt")!r})
assert not any(name.startswith("finelip") for name in sys.modules)

from finelip_diffusion import FineLIPStableDiffusionPipeline
pipe = FineLIPStableDiffusionPipeline.from_pretrained({str(tmp_path)!r})
for how in ("stretch", "chunk", "segment", "auto"):
    pipe({text_of(600)!r}, long_prompt=how, num_inference_steps=1)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = FineLIPStableDiffusionPipeline.from_pretrained(tmp_path)
    # weights in a mapped file lie at other addresses, and the kernels for them may round the last bit otherwise
    for each in (again, pipe):
        torch.testing.assert_close(torch.load(tmp_path / "images.pt"), pixels(each, text_of(200)), rtol=0, atol=1e-5)
    # No word about the stock encoder, which plain diffusers cannot use, nor about text that is not dropped at all.
    for misleading in ("not expected", "longer than", "truncated", "dropped"):
        assert misleading not in done.stderr


@pytest.mark.parametrize("how", LONG_PROMPTS)
def test_a_saved_pipeline_comes_back_whole(_pipe, text_of, tmp_path_factory, how):
    folder = tmp_path_factory.getbasetemp() / "whole"
    if not folder.exists():
        _pipe.save_pretrained(folder)
    again = FineLIPStableDiffusionPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    ours, theirs = (pixels(each, text_of(300), long_prompt=how) for each in (_pipe, again))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)  # as above


def test_model_index_names_only_stock_classes(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert "finelip" not in json.dumps(index).lower()


def test_a_wrong_width_is_refused_before_anything_is_drawn(stable_diffusion_folder, tmp_path):
    tiny_text_encoder(1, width=WIDTH // 2, positions=248).save_pretrained(tmp_path / "text_encoder")
    clip_tokenizer(248).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"16 wide.* 32"):
        FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip=tmp_path)


def test_unknown_names_are_refused(stable_diffusion_folder, tmp_path):
    with pytest.raises(ValueError, match="long_prompt='fold'"):
        FineLIPStableDiffusionPipeline.from_pretrained(tmp_path / "missing", long_prompt="fold")
    with pytest.raises(ValueError, match="missing"):
        FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip=tmp_path / "missing")
    with pytest.raises((ValueError, OSError), match="missing"):
        FineLIPStableDiffusionPipeline.from_pretrained(tmp_path / "missing")


def test_custom_pipeline(stable_diffusion_folder, finelip_folder, _pipe, text_of, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    pipe = DiffusionPipeline.from_pretrained(
        stable_diffusion_folder,
        custom_pipeline=str(ROOT / "pipelines" / "finelip_stable_diffusion.py"),
        trust_remote_code=True,
        finelip=finelip_folder,
        long_prompt="auto",
        unet=UNet2DConditionModel.from_pretrained(finelip_folder / "unet"),
    )
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "FineLIPStableDiffusionPipeline"
    assert pipe.long_prompt == "auto"
    for how in ("stretch", "chunk"):
        assert torch.equal(pixels(pipe, text_of(120), long_prompt=how), pixels(_pipe, text_of(120), long_prompt=how))


def test_from_pipe_both_ways(pipe, stock, text_of):
    ours = FineLIPStableDiffusionPipeline.from_pipe(stock, long_prompt="chunk")
    assert ours.text_encoder is stock.text_encoder  # nothing is stretched that nobody asked for
    assert ours.long_prompt == "chunk"
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.text_encoder is pipe.text_encoder
    assert other.tokenizer.model_max_length == 248


# diffusers' own options


@pytest.fixture(scope="module")
def pipes(_stock, _stock_xl, encoder_folder):
    sd = FineLIPStableDiffusionPipeline(**_stock.components, finelip=encoder_folder, requires_safety_checker=False)
    xl = FineLIPStableDiffusionXLPipeline(**_stock_xl.components, finelip=encoder_folder, add_watermarker=False)
    return {"sd": quiet(sd), "xl": quiet(xl)}


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ({"variant": "fp16"}, {"variant": "fp16"}),
        ({"max_shard_size": "2MB"}, {}),
        ({"variant": "fp16", "max_shard_size": "2MB"}, {"variant": "fp16"}),
        ({"safe_serialization": False}, {}),
    ],
    ids=str,
)
def test_saved_and_loaded_with_diffusers_own_options(pipes, tmp_path, text_of, kind, saving, loading):
    pipe = pipes[kind]
    pipe.save_pretrained(tmp_path, **saving)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert not [name for name in index if name.startswith("stock_")]  # plain diffusers sees stock names alone
    files = [path.name for path in (tmp_path / "stock_text_encoder").iterdir()]
    assert "variant" not in saving or any(".fp16" in name for name in files), files
    assert "max_shard_size" not in saving or any("-of-" in name for name in files), files
    extra = {"add_watermarker": False} if kind == "xl" else {}
    again = quiet(type(pipe).from_pretrained(tmp_path, **loading, **extra))
    plain = quiet(DiffusionPipeline.from_pretrained(tmp_path, **loading, **extra))
    assert again.stock_text_encoder is not None
    # weights in a mapped file lie at other addresses, and the kernels for them may round the last bit otherwise
    for how in ("stretch", "chunk"):
        found, expected = (pixels(each, text_of(120), long_prompt=how) for each in (again, pipe))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    second = {"second_encoder": "stretch"} if kind == "xl" else {}
    stretched = quiet(type(pipe).from_pretrained(tmp_path, **loading, **extra, **second))
    torch.testing.assert_close(pixels(plain, text_of(120)), pixels(stretched, text_of(120)), rtol=0, atol=1e-5)
