"""The script that makes the bundled model, run as a user runs it: every stage, then one stopped and resumed."""

import runpy
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scripts
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTextModel

from finelip_diffusion import FineLIPStableDiffusionPipeline
from finelip_diffusion.scenes import IMAGE_SIZE, describe, render, repainted, sample_scene, telling
from finelip_diffusion.tokenizer import clip_tokenizer

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "train_scenes.py"
STEPS = (
    "autoencoder_steps", "decoder_steps", "image_steps", "clip_steps", "unet_steps", "long_clip_steps", "tune_steps",
    "reword_steps",
)  # fmt: skip
SMALL = {
    "mixed_precision": "no",  # bfloat16 takes a CPU without units for it three times as long
    "num_captions": 64,
    "num_latents": 16,
    "num_workers": 1,
    "autoencoder_batch_size": 2,
    "clip_groups": 2,
    "unet_batch_size": 2,
    "tune_batch_size": 2,
    "tune_scenes": 4,
    "reword_batch_size": 2,
    "reword_scenes": 4,
}


def train(folder: Path, steps: int, *flags: str, bare: bool = False) -> subprocess.CompletedProcess[str]:
    counts = [word for name, value in (SMALL | dict.fromkeys(STEPS, steps)).items() for word in (f"--{name}", value)]
    return scripts.run(SCRIPT, "--output_dir", folder, *flags, *counts, bare=bare)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of every stage."""
    folder = tmp_path_factory.mktemp("scenes")
    done = train(folder, 2, bare=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_the_stages_leave_a_folder_that_both_pipelines_draw_with(trained: Path) -> None:
    for stage in ("autoencoder", "unet"):
        assert (trained / f"{stage}.png").stat().st_size > 0
    stock = StableDiffusionPipeline.from_pretrained(trained / "bundled")
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(trained / "bundled", finelip=trained / "bundled" / "finelip")
    assert stock.tokenizer.model_max_length == stock.text_encoder.config.max_position_embeddings == 77
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings == 248
    for drawing in (stock, pipe):
        image = drawing("A red circle.", num_inference_steps=1).images[0]
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE)


def test_finelip_keeps_the_first_positions(trained: Path) -> None:
    tables = []
    for folder in ("model/text_encoder", "long_clip/text_encoder"):
        weights = load_file(trained / folder / "model.safetensors")
        tables += [table for name, table in weights.items() if name.endswith("position_embedding.weight")]
    stock, long = tables
    assert len(stock) == 77
    assert len(long) == 248
    assert torch.equal(long[:20], stock[:20])
    assert not torch.equal(long[20], stock[20])


def test_the_bundle_holds_one_table_of_words(trained: Path) -> None:
    """Each encoder and the CLIP have the weights that their stages left, rounded to half precision."""
    bundled, name = trained / "bundled", "text_model.embeddings.token_embedding.weight"
    assert sum(name in load_file(file) for file in bundled.rglob("*.safetensors")) == 1
    for folder, source in (("text_encoder", "text_encoder"), ("finelip/text_encoder", "finelip/text_encoder")):
        loaded = CLIPTextModel.from_pretrained(bundled / folder, dtype=torch.float32).state_dict()
        for key, weight in CLIPTextModel.from_pretrained(trained / "model" / source).state_dict().items():
            assert torch.equal(loaded[key], weight.half().float()), key
    clip = CLIPModel.from_pretrained(bundled / "clip", dtype=torch.float32).state_dict()
    for key, weight in CLIPModel.from_pretrained(trained / "clip_model").state_dict().items():
        assert torch.equal(clip[key], weight.half().float()), key


def test_scenes_are_painted_as_they_are_rendered() -> None:
    script = runpy.run_path(str(SCRIPT))
    scenes = [sample_scene(seed, num_objects=(1, 9)) for seed in range(40)]
    painted = script["Painter"](torch.device("cpu"))(script["cell_numbers"](scenes))
    for scene, picture in zip(scenes, painted, strict=True):
        rendered = torch.from_numpy(np.array(render(scene))).permute(2, 0, 1)
        assert torch.equal(((picture + 1) * 127.5).round().byte(), rendered)


def test_captions_are_scenes_told_as_they_are_in_training(trained: Path) -> None:
    """Groups of eight; every caption ends with the end token; seven in ten are the very tokens of `describe`."""
    shard = load_file(trained / "captions" / "00000.safetensors")
    group_of, tokenizer = runpy.run_path(str(SCRIPT))["group_of"], clip_tokenizer(248)
    scenes = [scene for seed in range(8) for scene in group_of(seed)]
    captions = [str(describe(scene, turn, **telling("all"))) for turn, scene in enumerate(scenes)]
    own = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    equal = (own == shard["input_ids"]).all(1).float().mean()
    assert shard["input_ids"].shape == (64, 248)
    assert (shard["input_ids"][:, -1] == tokenizer.eos_token_id).all()
    assert 0.5 < equal < 0.9


def test_a_resumed_run_equals_a_straight_one(trained: Path, tmp_path: Path) -> None:
    straight = shutil.copytree(trained, tmp_path / "straight")
    shutil.rmtree(straight / "unet")
    for folder in (trained, straight):  # from step 2, and from the beginning
        done = train(folder, 4, "--stage", "unet")
        assert done.returncode == 0, done.stderr[-2000:]
    one, other = (
        load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors") for folder in (trained, straight)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_style_moves_the_unet_alone(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "restyled")
    done = train(folder, 2, "--stage", "restyle", "--restyle_steps", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    name = "diffusion_pytorch_model.safetensors"
    moved, own = load_file(folder / "restyled" / name), load_file(folder / "model" / "unet" / name)
    assert moved.keys() == own.keys()
    assert any(not torch.equal(moved[key], own[key]) for key in own)
    assert (folder / "model" / "unet" / name).read_bytes() == (trained / "model" / "unet" / name).read_bytes()


def test_another_style_of_no_model_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "captions", tmp_path / "captions")
    done = train(tmp_path, 1, "--stage", "restyle", "--restyle_model", str(tmp_path / "none"))
    assert done.returncode != 0
    assert f"{tmp_path / 'none' / 'unet'}, which is not there: give --restyle_model" in done.stderr.splitlines()[-1]


def test_scenes_in_another_style_are_the_same_scenes_repainted() -> None:
    script = runpy.run_path(str(SCRIPT))
    scenes = [sample_scene(seed, num_objects=(1, 9)) for seed in range(40)]
    numbers = script["restyled"](script["cell_numbers"](scenes))
    assert torch.equal(numbers, script["cell_numbers"](repainted(scene) for scene in scenes))


def test_a_wrong_stage_is_one_sentence(tmp_path: Path) -> None:
    done = train(tmp_path, 1, "--stage", "vae")
    assert done.returncode != 0
    assert "argument --stage: invalid choice: 'vae'" in done.stderr.splitlines()[-1]


def test_a_stage_without_those_before_it_is_one_sentence(tmp_path: Path) -> None:
    done = train(tmp_path, 1, "--stage", "unet")
    assert done.returncode != 0
    assert f"--stage unet needs {tmp_path / 'captions'}" in done.stderr.splitlines()[-1]
