"""The training script, run as a user runs it: on the bundled CLIP and scenes, killed, resumed, on two processes."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import scripts
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_sharding import needs_sharding

from finelip_diffusion import FineLIPStableDiffusionPipeline
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.model import FineLIPModel
from finelip_diffusion.scenes import IMAGE_SIZE, describe, render, sample_scene

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train" / "finetune_encoder.py"
KILLS = int(os.environ.get("KILLS", "3"))
SMALL = {  # four updates of sixteen pairs, with rates at which weights visibly move
    "train_data": "scenes",
    "num_scenes": 128,
    "train_batch_size": 16,
    "max_train_steps": 4,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 1,
    "checkpointing_steps": 2,
    "num_validation_examples": 16,
    "validation_steps": 100,
    "report_to": "none",
}

SMOOTH = {"adam_epsilon": 1, "learning_rate": 0.1, "head_learning_rate": 0.1, "max_grad_norm": 1}


def flags_of(folder: Path, **flags: object) -> list[str]:
    return [f"--{name}={value}" for name, value in (SMALL | {"output_dir": folder} | flags).items()]


def train(folder: Path, *, bare: bool = False, **flags: object) -> subprocess.CompletedProcess[str]:
    return scripts.run(SCRIPT, *flags_of(folder, **flags), bare=bare)


def set_environment(values: dict[str, str]) -> None:
    """What torchrun tells each of its processes."""
    os.environ.update(values)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "finelip_model" / "model.safetensors")


def stock_text() -> dict[str, torch.Tensor]:
    """The bundled stock encoder's weights, from however many files."""
    files = sorted((BUNDLED_MODEL / "text_encoder").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_close(one: Path, other: Path) -> None:
    for (name, left), right in zip(weights(one).items(), weights(other).values(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Updates in proportion to gradients, which AdamW's are not where a gradient is nothing but rounding."""
    folder = tmp_path_factory.mktemp("smooth")
    done = train(folder, **SMOOTH)
    assert done.returncode == 0, done.stderr[-2000:]
    stock = stock_text()
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert (weights(folder)[f"clip.{name}"] - stock[name].float()).abs().max() > 1e-4  # it trains
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    done = train(folder, report_to="tensorboard", validation_steps=4, bare=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_it_leaves_what_a_pipeline_loads(straight: Path) -> None:
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(finelip=straight)
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings == 248
    assert len(pipe("A red circle.", num_inference_steps=1).images) == 1
    model = FineLIPModel.from_pretrained(straight / "finelip_model")
    assert torch.equal(
        model.text_encoder().state_dict()["embeddings.position_embedding.weight"],
        pipe.text_encoder.state_dict()["embeddings.position_embedding.weight"],
    )
    assert yaml.safe_load((straight / "recipe.yaml").read_text())["learning_rate"] == 1e-3
    figures = json.loads((straight / "training.json").read_text())["figures"]
    assert 0 <= figures["whole/global/text_to_image/R@1"] <= 1
    assert "R@1" in (straight / "README.md").read_text()
    assert list((straight / "logs").rglob("events.*"))


def test_weights_move_but_for_the_kept_positions(straight: Path) -> None:
    table = weights(straight)["clip.text_model.embeddings.position_embedding.weight"]
    stock = stock_text()
    stock_table = stock["text_model.embeddings.position_embedding.weight"].float()
    assert torch.equal(table[:20], stock_table[:20])
    assert not torch.equal(table[20], stock_table[20])


def test_a_killed_run_ends_as_a_straight_one(straight: Path, tmp_path: Path) -> None:
    """SIGKILL at any moment: each kill comes a random while after a checkpoint was begun or made."""
    rng, folder = random.Random(0), tmp_path / "killed"
    flags = {"resume_from_checkpoint": "latest", "checkpointing_steps": 1}
    for _ in range(KILLS):
        before = set(folder.glob("*"))
        process = scripts.start(SCRIPT, *flags_of(folder, **flags))
        while process.is_alive() and set(folder.glob("*")) <= before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
    done = train(folder, **flags)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(folder)[name]), name


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(straight: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(straight, tmp_path / "cut")
    shutil.rmtree(folder / "checkpoint-4")
    unfinished = folder / ".writing-checkpoint" / "checkpoint-4"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half")
    done = train(folder, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Going on from {folder / 'checkpoint-2'}" in done.stdout
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not unfinished.parent.exists()
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(folder)[name]), name


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """Files may have fifty million bytes: the weights fit, the optimizer's state does not."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (5 * 10**7, 5 * 10**7))
    done = scripts.run(SCRIPT, *flags_of(tmp_path), before=limit)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert f"checkpoint 2 cannot be written to {tmp_path}" in last and "--resume_from_checkpoint latest" in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("checkpoint-*"))


def test_two_processes_equal_one(smooth: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    port = f"--master_port={20000 + os.getpid() % 20000}"
    command = [*launcher, port, str(SCRIPT), *flags_of(tmp_path / "two", train_batch_size=8, **SMOOTH)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_close(smooth, tmp_path / "two")


@needs_sharding
def test_a_sharded_run_that_is_killed_ends_as_one_process(smooth: Path, tmp_path: Path) -> None:
    """Killed after a checkpoint, and started again as docs/training.md says."""
    flags = flags_of(tmp_path, shard=True, train_batch_size=8, resume_from_checkpoint="latest", **SMOOTH)
    port = str(20001 + os.getpid() % 20000)
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    both = [
        scripts.start(SCRIPT, *flags, before=partial(set_environment, {**meeting, "RANK": rank, "LOCAL_RANK": rank}))
        for rank in "01"
    ]
    while all(process.is_alive() for process in both) and not (tmp_path / "checkpoint-2").exists():
        time.sleep(0.01)
    for process in both:
        process.kill()
        process.join()
    assert not (tmp_path / "checkpoint-4").exists()

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    done = subprocess.run([*torchrun, str(SCRIPT), *flags], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Going on from {tmp_path / 'checkpoint-2'}" in done.stdout
    assert_close(smooth, tmp_path)
    refused = train(tmp_path, resume_from_checkpoint="checkpoint-4", max_train_steps=5)
    assert "checkpoint-4 was written with --shard: go on as it was." in refused.stderr.splitlines()[-1]


def test_micro_batches_change_memory_alone(smooth: Path, tmp_path: Path) -> None:
    done = train(tmp_path / "micro", micro_batch_size=5, **SMOOTH)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_close(smooth, tmp_path / "micro")


def test_adapters_are_merged(straight: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((ROOT / "train/recipes/finelip.yaml").read_text())
    file = tmp_path / "lora.yaml"
    file.write_text(yaml.safe_dump(recipe | {"parameters": "lora", "image_tower": "frozen"}))
    done = train(tmp_path / "lora", recipe=file, max_train_steps=2)
    assert done.returncode == 0, done.stderr[-2000:]
    found, start = (
        weights(tmp_path / "lora"),
        load_file(BUNDLED_MODEL / "clip" / "image_tower.safetensors"),
    )
    assert found.keys() == weights(straight).keys()
    for name, tensor in start.items():
        if name.startswith("vision_model"):
            assert torch.equal(found[f"clip.{name}"], tensor.float()), name
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    text = stock_text()
    assert not torch.equal(found[f"clip.{name}"], text[name].float())
    assert torch.equal(
        found["clip.text_model.final_layer_norm.weight"], text["text_model.final_layer_norm.weight"].float()
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of forty scenes, one of them no image."""
    folder = tmp_path_factory.mktemp("pictures")
    with open(folder / "metadata.jsonl", "w") as file:
        for number in range(40):
            scene = sample_scene(number)
            render(scene).save(folder / f"{number}.png")
            file.write(json.dumps({"file_name": f"{number}.png", "text": str(describe(scene))}) + "\n")
    (folder / "7.png").write_bytes(b"no image")
    assert Image.open(folder / "8.png").size == (IMAGE_SIZE, IMAGE_SIZE)
    return folder


def test_bad_examples_are_named_and_training_goes_on(pictures: Path, tmp_path: Path) -> None:
    done = train(tmp_path, train_data=pictures, train_batch_size=8, max_train_steps=5, max_bad_fraction=0.1)
    assert done.returncode == 0, done.stderr[-2000:]
    (skip,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert "metadata.jsonl:8" in skip["name"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"recipe": "no_such"}, "there is no recipe 'no_such'; beside it are: affinity, "),
        ({"train_batch_size": 1}, "--train_batch_size is 1, but must be at least 2"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "is not a checkpoint folder"),
        ({"train_data": "no/such.json"}, "no/such.json"),
        ({"shard": True}, "--shard shares weights out over processes: start several"),
        ({"pretrained_model_name_or_path": "no/such/folder"}, "no/such/folder"),
    ],
)  # fmt: skip
def test_bad_flags_get_one_sentence(flags: dict[str, object], sentence: str, tmp_path: Path) -> None:
    done = train(tmp_path, **flags)
    assert done.returncode != 0
    assert sentence in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_too_many_bad_examples_end_the_run(pictures: Path, tmp_path: Path) -> None:
    done = train(tmp_path, train_data=pictures, train_batch_size=8, max_train_steps=5)
    assert done.returncode != 0
    assert "metadata.jsonl:8" in done.stderr.splitlines()[-1]


def test_a_dry_run_says_what_it_would_do(tmp_path: Path) -> None:
    done = train(tmp_path / "dry", dry_run=True, recipe="finelip_preserve")
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("local_loss:", "positions and scale: 31,745", "lr 0.001", "weight decay 0\n", "heads:", "AdamW:"):
        assert word in done.stdout
    assert not (tmp_path / "dry").exists()
