"""The script that makes the bundled model, run as a user runs it: every stage, then one stopped and resumed."""

import shutil
import subprocess
from pathlib import Path

import pytest
import scripts
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from finelip_diffusion import FineLIPStableDiffusionPipeline
from finelip_diffusion.scenes import IMAGE_SIZE

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "train_scenes.py"
STEPS = ("autoencoder_steps", "image_steps", "clip_steps", "unet_steps", "long_clip_steps", "adapt_steps")


def train(folder: Path, steps: int, *flags: str, bare: bool = False) -> subprocess.CompletedProcess[str]:
    counts = [word for name in STEPS for word in (f"--{name}", steps)]
    return scripts.run(SCRIPT, "--output_dir", folder, "--num_scenes", 64, *flags, *counts, bare=bare)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of every stage."""
    folder = tmp_path_factory.mktemp("scenes")
    done = train(folder, 2, bare=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_the_stages_leave_a_folder_that_both_pipelines_draw_with(trained: Path) -> None:
    for stage in ("autoencoder", "unet", "adapt"):
        assert (trained / f"{stage}.png").stat().st_size > 0
    stock = StableDiffusionPipeline.from_pretrained(trained / "model")
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(trained / "model", finelip=trained / "model" / "finelip")
    assert stock.tokenizer.model_max_length == stock.text_encoder.config.max_position_embeddings == 77
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings == 248
    for drawing in (stock, pipe):
        image = drawing("A red circle.", num_inference_steps=1).images[0]
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE)


def test_the_long_encoder_keeps_its_first_positions(trained: Path) -> None:
    tables = []
    for folder in ("model/text_encoder", "model/finelip/text_encoder"):
        weights = load_file(trained / folder / "model.safetensors")
        tables += [table for name, table in weights.items() if name.endswith("position_embedding.weight")]
    stock, long = tables
    assert len(stock) == 77
    assert len(long) == 248
    assert torch.equal(long[:20], stock[:20])
    assert not torch.equal(long[20], stock[20])


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


def test_a_wrong_stage_is_one_sentence(tmp_path: Path) -> None:
    done = train(tmp_path, 1, "--stage", "vae")
    assert done.returncode != 0
    assert "argument --stage: invalid choice: 'vae'" in done.stderr.splitlines()[-1]


def test_a_stage_without_those_before_it_is_one_sentence(tmp_path: Path) -> None:
    done = train(tmp_path, 1, "--stage", "unet")
    assert done.returncode != 0
    assert f"--stage unet needs {tmp_path / 'model/vae'}" in done.stderr.splitlines()[-1]
