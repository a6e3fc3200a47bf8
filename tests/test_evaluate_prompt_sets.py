"""The evaluation on prompts that others publish, and judged by a vision-language model: run as a user runs it."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
import pytest
from PIL import Image
from test_promptsets import write_dpg
from vision_model import save_vision_model

from finelip_diffusion.evaluation.comparison import Findings, agree
from finelip_diffusion.evaluation.images import Prompt
from finelip_diffusion.evaluation.judging import Verdicts
from finelip_diffusion.evaluation.promptsets import read_set
from finelip_diffusion.evaluation.questions import Answer, scene_answers, scene_questions
from finelip_diffusion.evaluation.vision import load_vision_judge
from finelip_diffusion.scenes import IMAGE_SIZE, Caption, describe, sample_scene

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "evaluate_fid.py"
ENCODERS = ["truncate", "chunk"]


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module(SCRIPT.stem)
    sys.path.remove(str(SCRIPT.parent))


def run(script: ModuleType, *flags: object) -> dict:
    """In this process: that a bare interpreter suffices is shown in test_evaluate_fid.py."""
    common = ["--num_inference_steps", 1, "--num_drift", 1, "--encoders", *ENCODERS]
    script.main(script.read_arguments([str(flag) for flag in (*common, *flags)]))
    return json.loads((Path(str(flags[-1])) / "report.json").read_text())


@pytest.fixture(scope="module")
def dpg(
    script: ModuleType, vision: Path, stable_diffusion_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, Path]:
    root = tmp_path_factory.mktemp("dpg")
    write_dpg(root)
    flags = [
        "--model", stable_diffusion_folder, "--data", f"dpg:{root}", "--images_per_prompt", 4, "--num_short", 0,
        "--num_changed", 0, "--judges", "clip=bundled/clip", "--vqa", f"vqa={vision}", "--output_dir", root / "run",
    ]  # fmt: skip
    report = run(script, *flags)
    assert report["conditions"] == run(script, *flags)["conditions"]  # nothing is drawn or asked again
    return report, root


def test_a_prompt_set_is_drawn_asked_and_laid_out(dpg: tuple[dict, Path], vision: Path):
    report, root = dpg
    own = report["conditions"]["base/chunk"]["figures"]
    assert own.keys() == {
        "vqa/vqa", "vqa_before/vqa", "vqa_after/vqa", "soft/vqa", "soft_gm/vqa", "vqa_score/vqa", "clip_score/clip",
        "den_score/clip", "den_score_debiased/clip", "listening_before/clip", "listening_after/clip",
    }  # fmt: skip
    assert report["prompts"]["n"] == 3
    assert own["vqa/vqa"]["n"] == 12
    items, judge = read_set("dpg", root), load_vision_judge("vqa", str(vision))
    images = root / "run" / "images" / "base" / "chunk" / "long"
    expected = []
    for number, item in enumerate(items):
        scores = []
        for copy in range(4):
            file = images / (f"{number:06d}-{copy}.png" if copy else f"{number:06d}.png")
            with Image.open(file) as image:
                assert image.info["prompt"] == item.text
                assert image.info["seed"] == str(number + 1_000_000 * copy)
                answers = judge([image] * len(item.questions), item.questions)
                right = [float(answer.right) for answer in answers]
                for place, question in enumerate(item.questions):
                    right[place] *= all(right[parent] for parent in question.parents)
                scores.append(sum(right) / len(right))
        grid = np.asarray(Image.open(root / "run" / "official" / "base-chunk" / f"{item.name}.png"))
        side = grid.shape[0] // 2
        assert np.array_equal(grid[side:, :side], np.asarray(Image.open(images / f"{number:06d}-2.png")))
        expected.append(np.mean(scores))
    assert own["vqa/vqa"]["value"] == pytest.approx(np.mean(expected))
    assert judge.revision in report["judges"]["vqa"]
    lines = (root / "run" / "answers" / "answers-0.jsonl").read_text().split()
    assert len(lines) > 0
    assert "## Judges" in (root / "run" / "report.md").read_text()


def test_pictures_of_scenes_are_judged_beside_the_reader(
    script: ModuleType, vision: Path, stable_diffusion_folder: Path, tmp_path: Path
):
    report = run(
        script, "--model", stable_diffusion_folder, "--height", IMAGE_SIZE, "--width", IMAGE_SIZE, "--num_prompts", 2,
        "--num_short", 1, "--num_changed", 0, "--num_resamples", 2, "--kid_subset_size", 2,
        "--vqa", f"vqa={vision}", "--features", "clip_fd=bundled/clip", "--output_dir", tmp_path,
    )  # fmt: skip
    own = report["conditions"]["base/truncate"]["figures"]
    facts = own["found_before"]["n"] + own["found_after"]["n"]
    assert own["vqa_before/vqa"]["n"] + own["vqa_after/vqa"]["n"] == 3 * facts
    assert own["judge_no/vqa"]["n"] >= 2 * facts  # noise shows next to nothing
    assert "short_vqa/vqa" in own
    assert set(report["conditions"]["base/truncate"]["breakdowns"]["vqa/vqa"]) == {"color", "shape", "size"}


def test_agreement_with_the_reader_has_two_sides():
    """The reader itself agrees with itself, one who always says yes with what is there alone."""
    scenes = [sample_scene(seed, "test") for seed in range(4)]
    shown = [*scenes[:2], *(sample_scene(seed, "test") for seed in (20, 21))]
    prompts = [
        Prompt("long", seed, describe(scene, seed), scene=scene, questions=scene_questions(describe(scene, seed)))
        for seed, scene in enumerate(scenes)
    ]

    def answered(always: bool | None) -> dict[str, list[float]]:
        found, own = Findings(), list[Verdicts]()
        for prompt, scene in zip(prompts, shown, strict=True):
            truths = scene_answers(cast("Caption", prompt.text), scene)
            own.append(Verdicts(answers=[[Answer(1.0, truth if always is None else always) for truth in truths]]))
        found.verdicts["vqa", "long"] = own
        agree(found, shown, prompts)
        return {key: [value for own in values for value in own] for key, values in found.values.items()}

    assert {key: np.mean(own) for key, own in answered(None).items()} == {"judge_yes/vqa": 1, "judge_no/vqa": 1}
    assert {key: np.mean(own) for key, own in answered(True).items()} == {"judge_yes/vqa": 1, "judge_no/vqa": 0}
    assert {key: np.mean(own) for key, own in answered(False).items()} == {"judge_yes/vqa": 0, "judge_no/vqa": 1}
    assert len(answered(True)["judge_no/vqa"]) > 20


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data", "dpg:no/such/folder"], "no/such/folder does not exist: give the folder of DPG-Bench"),
        (["--images_per_prompt", "4"], "--images_per_prompt is for --data NAME:FOLDER of a set of prompts"),
        (["--data", "dpg:x", "--images_per_prompt", "3"], "give 1, or 4 for a grid two by two"),
        (["--dpg_quirks", "True"], "--dpg_quirks is for --data dpg:FOLDER alone"),
        (["--vqa", "no/such/model/here"], "is not a vision-language model that transformers can load"),
        (["--preferences", "hps"], "no preference model 'hps'"),
    ],
)
def test_bad_input_is_one_sentence(
    script: ModuleType, stable_diffusion_folder: Path, tmp_path: Path, flags: list[str], says: str
):
    common = ["--model", str(stable_diffusion_folder), "--encoders", "truncate"]
    extractor = ["--features", "clip_fd=bundled/clip", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=says) as error:
        script.main(script.read_arguments([*common, *extractor, *flags]))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.png"))
