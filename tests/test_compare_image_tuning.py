"""The questions of image tuning at a tiny size: each run once, gone on with, and written as tables."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scripts
from transformers import HfArgumentParser

from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.scenes import IMAGE_SIZE
from finelip_diffusion.tuning import load_parts

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train" / "compare_image_tuning.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module, with its folder on the path, as when it runs."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("compare_image_tuning", SCRIPT)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["compare_image_tuning"] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, at the size that the reader of scenes reads."""
    copy = tmp_path_factory.mktemp("base")
    shutil.copytree(BUNDLED_MODEL, copy, dirs_exist_ok=True)
    size = IMAGE_SIZE // load_parts(None).pipeline.vae_scale_factor
    file = copy / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": size}))
    return copy


@pytest.fixture(scope="module")
def flags(folder: Path, base: Path) -> list[str]:
    small = {
        "output_dir": folder, "pretrained_model_name_or_path": base, "questions": "starts", "starts": "stretched",
        "images": 8, "seeds": 1, "max_train_steps": 2, "train_batch_size": 4, "num_curve_points": 2,
        "num_curve_prompts": 2, "num_prompts": 3, "num_other_prompts": 2, "num_short": 4, "num_drift": 2,
        "num_groups": 2, "num_probe_captions": 0, "num_inference_steps": 1, "dataloader_num_workers": 0,
    }  # fmt: skip
    return [word for name, value in small.items() for word in (f"--{name}", *str(value).split())]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    done = scripts.run(SCRIPT, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_each_run_is_done_once_and_tables_say_what_was_found(
    script: ModuleType, folder: Path, flags: list[str], base: Path
) -> None:
    first = run(*flags)
    files = {file: file.stat().st_mtime_ns for file in (folder / "results").glob("*.json")}
    assert len(files) == 3  # the base, the start, and what becomes of it
    assert "| start | 0 updates | 1 | 2 |" in first.stdout and "| stretched, tuned |" in first.stdout
    lost = next(file for file in files if json.loads(file.read_text())["run"]["flags"] is not None)
    lost.unlink()
    document = folder / "answers.md"
    marks = ("<!-- tables of train/compare_image_tuning.py -->", "<!-- end of the tables -->")
    document.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter")
    again = run(*flags, "--other_unet", f"again={base}")
    assert lost.exists() and "| encoder | the UNet it was tuned through | again |" in again.stdout
    results = [json.loads(file.read_text()) for file in files]
    assert all(set(result["others"]) == {"again"} for result in results)
    for result in results:
        assert result["others"]["again"] == result["long"][:2]  # the same UNet
        assert [point["update"] for point in result["curve"]] == ([1, 2] if result["run"]["flags"] is not None else [])
    parser = HfArgumentParser(script.Arguments)
    words = [*flags, "--other_unet", f"again={base}", "--write", str(document)]
    script.main(parser.parse_args_into_dataclasses(words)[0])
    text = document.read_text()
    assert (
        text.startswith("before\n")
        and text.endswith("after")
        and "old" not in text
        and "### What tuning costs" in text
    )


def test_a_start_of_two_stages_goes_on_from_its_first(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, str, float]] = []

    def train(args: Any) -> None:
        (args.output_dir / "text_encoder").mkdir(parents=True)
        trained.append((args.recipe, args.pretrained_model_name_or_path, args.learning_rate))

    monkeypatch.setattr(script.finetune_encoder, "main", train)
    args = script.Arguments(output_dir=tmp_path, clip="CLIP", start_learning_rate=0.5)
    for _ in range(2):  # the second time nothing is left to do
        script.train_start("rotary", args)
    first = tmp_path / "work" / "starts" / "rotary_distill" / "finelip_model"
    assert trained == [("rotary_distill", "CLIP", 0.5), ("rotary", str(first), 0.5)]


def test_wrong_flags_are_one_sentence(folder: Path, script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--questions has colour: choose among starts, images"):
        script.Arguments(questions=["colour"])
    with pytest.raises(ValueError, match="--starts has nothing: give stretched, NAME=FOLDER, or"):
        script.Arguments(starts=["nothing"])
    args = script.Arguments(output_dir=tmp_path)
    script.check_settings(args)
    with pytest.raises(ValueError, match="was begun with --max_train_steps 800, not 5: choose another folder"):
        script.check_settings(script.Arguments(output_dir=tmp_path, max_train_steps=5))
    (tmp_path / "x.md").write_text("nothing")
    with pytest.raises(ValueError, match="lacks the lines"):
        script.write_document(tmp_path / "x.md", "tables")


def test_settings_that_are_the_same_are_one_run(script: ModuleType) -> None:
    args = script.Arguments(seeds=[0, 1])
    runs = script.runs_of(args)
    assert len(runs) == len(set(runs)) == len({run.name for run in runs})
    asked = script.settings(args)
    base = {setting for own in asked.values() for setting in own.values()}
    assert len(runs) == 1 + len(args.starts) + 2 * len(base) and len(base) < sum(map(len, asked.values()))
    assert [run.seed for run in runs if run.flags is not None] == [0] * len(base) + [1] * len(base)


def test_intervals_are_of_prompts_and_seeds(script: ModuleType) -> None:
    """As wide as fresh draws of both scatter: prompts differ by a deviation of 0.2, seeds by 0.1."""
    rng = np.random.default_rng(0)

    def fresh() -> list:
        seeds, prompts = rng.normal(0.5, 0.1, (4, 1)), rng.normal(0, 0.2, (1, 100))
        return np.stack([seeds + prompts, np.ones((4, 100))], axis=-1).tolist()

    spread = np.std([np.mean(np.array(fresh())[..., 0]) for _ in range(300)])
    widths = [found["high"] - found["low"] for found in (script.resampled(fresh()) for _ in range(20))]
    assert np.mean(widths) / (2 * 1.96) == pytest.approx(spread, rel=0.3)  # four seeds understate their deviation
    table = [[[1, 2], [3, 4]], [[2, 2], [0, 4]]]
    assert script.resampled(table)["value"] == 0.5 and script.resampled(table)["seeds"] == [4 / 6, 2 / 6]
    assert script.resampled([[[0, 0]]])["value"] is None
