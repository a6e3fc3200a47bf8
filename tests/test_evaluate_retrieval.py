"""The script, run as a user runs it: two models on three kinds of galleries, and what it refuses."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import scripts
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from finelip_diffusion.evaluation.retrieval import embed_gallery, gallery_scores, ranks, scenes_gallery
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.model import FineLIPModel, load_clip
from finelip_diffusion.scenes import describe, render, sample_scene

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "evaluate_retrieval.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_retrieval", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A 77-token CLIP, and the stretched model made of it."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED_MODEL / "tokenizer")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
                    "eos_token_id": tokenizer.eos_token_id, "projection_dim": 12}  # fmt: skip
    vision = tower | {"image_size": 32, "patch_size": 8, "projection_dim": 12}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12, initializer_factor=5.0))
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    processor.save_pretrained(folder / "clip")
    FineLIPModel.from_clip(folder / "clip").save_pretrained(folder / "finelip")
    CLIPTokenizer.from_pretrained(folder / "clip", model_max_length=248).save_pretrained(folder / "finelip")
    processor.save_pretrained(folder / "finelip")
    return folder / "clip", folder / "finelip"


@pytest.fixture(scope="module")
def urban(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images as Urban1k has them, one of them broken and one without a caption."""
    folder = tmp_path_factory.mktemp("Urban1k")
    for name in ("image", "caption"):
        (folder / name).mkdir()
    for seed in range(6):
        scene = sample_scene(seed)
        render(scene).save(folder / "image" / f"{seed}.jpg")
        (folder / "caption" / f"{seed}.txt").write_text(describe(scene, seed))
    (folder / "image" / "2.jpg").write_bytes(b"no image")
    (folder / "image" / "6.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of five captions, as COCO has them."""
    folder = tmp_path_factory.mktemp("coco")
    images, annotations = [], []
    for seed in range(3):
        scene = sample_scene(seed, num_objects=(1, 1))
        render(scene).save(folder / f"{seed}.jpg")
        images.append({"id": seed, "file_name": f"{seed}.jpg"})
        captions = [describe(scene, turn).split(". ")[-1] for turn in range(5)]
        annotations += [{"image_id": seed, "caption": caption} for caption in captions]
    file = folder / "captions_val2017.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


def test_every_gallery_is_measured_with_every_model(
    models: tuple[Path, Path], urban: Path, coco: Path, tmp_path: Path
) -> None:
    done = scripts.run(
        SCRIPT, "--model", models[0], "--model", models[1], "--data", "scenes", urban, coco, "--output_dir", tmp_path,
        "--num_groups", 2, "--batch_size", 7, "--global_share", 0.5,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["global_share"] == 0.5
    assert list(report["galleries"]) == ["scenes", str(urban), str(coco)]
    scenes, cities, short = (
        [report["galleries"][name][str(model)] for model in models] for name in report["galleries"]
    )
    for stock, long in (scenes, cities, short):
        for result in (stock, long):
            for name, found in result["ranks"].items():
                figure = f"{name}_R@1" if name.endswith("group") else f"{name}/R@1"
                assert result["figures"][figure]["value"] == pytest.approx(found.count(0) / len(found))
                assert len(found) == result["images" if "image_to_text" in name else "captions"]
    assert (scenes[0]["images"], scenes[0]["groups"], scenes[0]["captions"]) == (16, 2, 16)
    assert max(scenes[0]["views"]["whole"]["read"]) == 77 < max(scenes[1]["views"]["whole"]["read"])
    assert scenes[0]["figures"]["whole/finelip/text_to_image/group_R@1"]["value"] == 0.125
    assert "truncated" in scenes[1]["views"] and "truncated" not in scenes[0]["views"]
    assert (cities[0]["images"], cities[0]["groups"]) == (5, 5)
    assert [Path(skip["name"]).name for skip in cities[0]["skipped"]] == ["6.jpg", "2.txt"]
    assert (short[0]["images"], short[0]["captions"], list(short[0]["views"])) == (3, 15, ["whole"])
    assert set(scenes[0]["figures"]["whole/global/text_to_image/R@1"]) == {"value", "low", "high", "n"}

    text = (tmp_path / "report.md").read_text()
    assert "16 images in 2 groups, 16 captions." in text
    assert f"| {models[1]} | without_first | FineLIP* (0.5 global) |" in text
    assert "16 of 16 | 77 tokens" in text


def test_the_same_command_gives_the_same_figures(
    script: ModuleType, models: tuple[Path, Path], coco: Path, tmp_path: Path
) -> None:
    """A CLIP without refinement is compared on all of its tokens: nothing that is drawn has a part in its score."""
    reports = []
    for run in ("one", "two"):
        out = tmp_path / run
        script.main(script.Arguments(output_dir=out, model=[str(models[0])], data=["scenes", str(coco)], num_groups=2))
        reports.append(json.loads((out / "report.json").read_text())["galleries"])
        torch.rand(3)  # whatever the process draws meanwhile
    assert reports[0] == reports[1]
    model, tokenizer, image_processor = load_clip(models[0])
    scores = gallery_scores(embed_gallery(model, tokenizer, image_processor, scenes_gallery(2)))
    found = ranks(scores.T, torch.eye(16, dtype=torch.bool)).tolist()
    assert found == reports[0]["scenes"][str(models[0])]["ranks"]["whole/finelip/text_to_image"]
    assert model.local_image(torch.rand(1, 17, 12))[0].shape == (1, 17, 12)


def test_half_precision_and_a_launcher_work(models: tuple[Path, Path], coco: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", str(SCRIPT)]
    command += ["--model", str(models[1]), "--data", str(coco), "--num_captions", "12", "--views", "whole",
                "--mixed_precision", "bf16", "--output_dir", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads((tmp_path / "report.json").read_text())["galleries"][str(coco)].values()
    assert result["captions"] == 12


def test_what_cannot_be_measured_is_refused_before_anything_is(
    script: ModuleType, models: tuple[Path, Path], urban: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", [str(models[0])]
    for flags, words in (
        ({"model": model, "views": ["without_first"]}, "--views are without_first: give whole"),
        ({"model": model, "batch_size": 0}, "--batch_size is 0, but must be at least 1."),
        ({"model": model, "global_share": 1.5}, "--global_share is 1.5, but a share lies in 0..1."),
        ({"model": [*model, str(tmp_path / "no_model")]}, "no_model does not exist"),
        ({"model": model, "data": [str(urban), str(tmp_path / "no_data")]}, "no_data is not there"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            script.main(script.Arguments(output_dir=out, **flags))
    assert not out.exists()


def test_a_refusal_is_one_sentence(tmp_path: Path) -> None:
    done = scripts.run(SCRIPT, "--model", tmp_path / "no_model", "--output_dir", tmp_path / "out")
    assert done.returncode != 0
    assert "no_model does not exist" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
