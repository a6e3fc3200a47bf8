"""`finelip score`: any folders of pictures, with prompts from anywhere, against references that match or do not."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_promptsets import write_dpg, write_tiif
from vision_model import save_vision_model

from finelip_diffusion.cli import main
from finelip_diffusion.evaluation.adherence import clip_scores, load_judge
from finelip_diffusion.evaluation.features import load_extractor
from finelip_diffusion.evaluation.promptsets import read_set, write_pictures
from finelip_diffusion.evaluation.scoring import list_pictures, own_prompt, read_prompt_file
from finelip_diffusion.evaluation.vision import load_vision_judge
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.metrics import FeatureStatistics, cmmd_intervals, frechet_distance, frechet_intervals
from finelip_diffusion.scenes import describe, render, sample_scene

CLIP = ["--judges", "clip=bundled/clip"]
FEATURES = ["--features", "clip_fd=bundled/clip"]  # few, so that a matrix root takes no second
SCENES = [sample_scene(seed, "test") for seed in range(6)]
CAPTIONS = [str(describe(scene, seed)) for seed, scene in enumerate(SCENES)]


def draw(folder: Path, scenes: list, names: list[str] | None = None) -> Path:
    folder.mkdir(parents=True)
    for number, scene in enumerate(scenes):
        render(scene).save(folder / f"{names[number] if names else number}.png")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders for the same prompts: the second shows other scenes."""
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder / "right", SCENES)
    draw(folder / "wrong", [sample_scene(seed, "test") for seed in range(10, 16)])
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    save_vision_model(folder / "vision")
    return folder


def score(*arguments: object) -> dict:
    out = Path(str(arguments[-1]))
    assert main(["score", *map(str, arguments[:-1]), "--out", str(out), "--num-resamples", "8"]) == 0
    return json.loads((out / "report.json").read_text())


def figures(report: dict, name: str) -> dict:
    return report["conditions"][name]["figures"]


@pytest.fixture(scope="module")
def both(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("out")
    return score(
        root / "wrong", root / "right", "--prompts", root / "prompts.txt", *CLIP, "--vqa", f"vqa={root / 'vision'}",
        "--reference", root / "right", *FEATURES, out,
    ), out  # fmt: skip


def test_folders_get_the_figures_of_an_evaluation(both: tuple[dict, Path], root: Path):
    report, out = both
    assert list(report["conditions"]) == ["wrong", "right"]
    assert report["baseline"] == "wrong"
    assert report["prompts"]["n"] == 6
    own = figures(report, "right")
    assert own.keys() == {
        "clip_score/clip", "den_score/clip", "den_score_debiased/clip", "listening_before/clip",
        "listening_after/clip", "vqa_score/vqa", "vqa_score_before/vqa", "vqa_score_after/vqa", "clip_fd",
        "clip_kid",
    }  # fmt: skip
    judge = load_judge("clip", str(BUNDLED_MODEL / "clip"))
    images = [Image.open(root / "right" / f"{number}.png") for number in range(6)]
    expected = clip_scores(judge.embed_images(images), judge.embed_texts(CAPTIONS))
    assert own["clip_score/clip"]["value"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert own["clip_score/clip"]["low"] < own["clip_score/clip"]["value"] < own["clip_score/clip"]["high"]
    difference = own["clip_score/clip"]["value"] - figures(report, "wrong")["clip_score/clip"]["value"]
    assert own["clip_score/clip"]["difference"]["value"] == pytest.approx(difference, abs=1e-9)
    assert {"listening/clip", "den_score/clip", "den_score_debiased/clip", "vqa_score/vqa"} == set(report["curves"])
    assert report["judges"].keys() == {"clip", "vqa"}
    assert load_vision_judge("x", str(root / "vision")).revision in report["judges"]["vqa"]
    page, table = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "UNet" not in page.split("<body>")[1].replace("UNets", "")
    assert "UNet" not in table
    assert "| floor | pictures | value | less wrong | n |" in table  # of distances
    assert "\n| pictures | value | less wrong | n |" in table


def test_a_reference_of_the_same_names_is_paired(both: tuple[dict, Path]):
    report, _ = both
    assert figures(report, "right")["clip_fd"]["value"] == pytest.approx(0, abs=1e-6)  # the very same pictures
    assert figures(report, "right")["clip_fd"]["high"] < 1e-5
    assert figures(report, "wrong")["clip_fd"]["low"] > figures(report, "right")["clip_fd"]["high"]
    assert report["examples"][0]["reference"].endswith("right/" + Path(report["examples"][0]["reference"]).name)


def test_a_reference_of_other_names_is_drawn_by_itself(root: Path, tmp_path: Path):
    others = draw(tmp_path / "others", [sample_scene(seed) for seed in range(9)], [f"x{i}" for i in range(9)])
    report = score(root / "right", "--reference", others, *FEATURES, tmp_path / "out")
    assert any("other names" in text for text in report["warnings"])
    extractor, sides = load_extractor("clip_fd", BUNDLED_MODEL / "clip"), []
    for folder in (root / "right", others):
        statistics = FeatureStatistics()
        statistics.update(extractor([Image.open(file) for file in list_pictures(folder).values()]))
        sides += [statistics.mean, statistics.covariance]
    found = figures(report, "right")["clip_fd"]
    assert found["value"] == pytest.approx(frechet_distance(*sides), rel=1e-5)
    assert found["low"] < found["value"] < found["high"]
    assert report["prompts"]["mean_tokens"] is None


@pytest.mark.parametrize("intervals", [frechet_intervals, cmmd_intervals])
def test_unpaired_sides_scatter_apart(intervals: Callable):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 3))
    paired = intervals({"a": rows}, rows)["a"]
    apart = intervals({"a": rows}, rows, paired=False)["a"]
    assert paired["value"] == pytest.approx(apart["value"], abs=1e-6)
    assert paired["high"] == pytest.approx(0, abs=1e-6)  # whatever prompts are drawn, both sides are alike
    assert apart["high"] > 1e-4
    assert intervals({"a": rows}, rng.normal(size=(25, 3)), paired=False)["a"]["n"] == 40
    with pytest.raises(ValueError, match="give one row for each prompt in both"):
        intervals({"a": rows}, rng.normal(size=(25, 3)))


def test_prompts_come_with_pictures_or_from_a_file(tmp_path: Path):
    def save(name: str, **texts: str) -> Path:
        info = PngInfo()
        for key, value in texts.items():
            info.add_text(key, value)
        Image.new("RGB", (4, 4)).save(tmp_path / name, pnginfo=info)
        return tmp_path / name

    assert own_prompt(save("a.png", prompt="A cat.")) == "A cat."
    assert (
        own_prompt(save("b.png", parameters="A dog,\nold\nNegative prompt: blurry\nSteps: 20, Seed: 1"))
        == "A dog,\nold"
    )
    assert own_prompt(save("c.png", prompt='{"3": {"inputs": {}}}')) == ""
    (tmp_path / "d.txt").write_text("A cow.\n")
    assert own_prompt(save("d.png", prompt="not this")) == "A cow."
    names = ["x/1", "x/2"]
    for file, text in {
        "p.txt": "one\n\ntwo\n",
        "p.json": '{"x/1.png": "one", "x/2.png": "two"}',
        "p.jsonl": '{"file_name": "x/1.png", "text": "one"}\n{"file_name": "x/2.png", "text": "two"}',
        "p.csv": "image,prompt\nx/1.png,one\nx/2.png,two\n",
    }.items():
        (tmp_path / file).write_text(text)
        assert read_prompt_file(tmp_path / file, names) == {"x/1": "one", "x/2": "two"}, file


def test_grids_of_dpg_are_scored_picture_by_picture(root: Path, tmp_path: Path):
    write_dpg(tmp_path / "set")
    items = read_set("dpg", tmp_path / "set")
    pictures = []
    for number, item in enumerate(items):
        files = [tmp_path / f"{number}-{copy}.png" for copy in range(4)]
        for copy, file in enumerate(files):
            render(sample_scene(4 * number + copy)).save(file)
        pictures.append((item, "long", files))
    write_pictures("dpg", pictures, "tool", tmp_path / "out")
    vqa = ["--vqa", f"vqa={root / 'vision'}"]
    report = score(
        tmp_path / "out" / "tool",
        "--prompts",
        f"dpg:{tmp_path / 'set'}",
        "--images-per-prompt",
        4,
        *vqa,
        tmp_path / "r",
    )
    judge = load_vision_judge("vqa", str(root / "vision"))
    expected = []
    for item, _, files in pictures:  # compute_dpg_bench.py, with this judge
        scores = []
        for file in files:
            answers = judge([Image.open(file)] * len(item.questions), item.questions)
            own = [float(answer.right) for answer in answers]
            for place, question in enumerate(item.questions):
                if any(own[parent] == 0 for parent in question.parents):
                    own[place] = 0.0
            scores.append(sum(own) / len(own))
        expected.append(sum(scores) / len(scores))
    found = figures(report, "tool")
    assert found["vqa/vqa"]["value"] == pytest.approx(np.mean(expected))
    assert found["vqa/vqa"]["n"] == 12
    assert report["prompts"]["n"] == 3
    assert report["breakdowns"]["vqa/vqa"]["label"].startswith("Questions of prompts by category")
    assert set(report["conditions"]["tool"]["breakdowns"]["vqa/vqa"]) == {
        "entity - whole", "attribute - color", "relation - spatial"
    }  # fmt: skip
    quirks = score(
        tmp_path / "out" / "tool", "--prompts", f"dpg:{tmp_path / 'set'}", "--images-per-prompt", 4, *vqa,
        "--dpg-quirks", tmp_path / "q",
    )  # fmt: skip
    assert quirks["prompts"]["n"] == 2  # its first prompt fails in the script
    assert figures(quirks, "tool")["vqa/vqa"]["value"] == pytest.approx(np.mean(expected[1:]))
    assert quirks["breakdowns"] == {}  # one category is left


def test_short_and_long_pictures_of_tiif_stand_apart(root: Path, tmp_path: Path):
    write_tiif(tmp_path / "set")
    items = read_set("tiif", tmp_path / "set" / "testmini_prompts")
    pictures = []
    for number, item in enumerate(items):
        for kind in ("long", "short"):
            render(sample_scene(number)).save(tmp_path / f"{number}-{kind}.png")
            pictures.append((item, kind, [tmp_path / f"{number}-{kind}.png"]))
    write_pictures("tiif", pictures, "tool", tmp_path / "out")
    report = score(
        tmp_path / "out", "--prompts", f"tiif:{tmp_path / 'set' / 'testmini_prompts'}",
        "--vqa", f"v={root / 'vision'}", tmp_path / "r",
    )  # fmt: skip
    found = figures(report, "out")
    assert {"tiif/v", "short_tiif/v", "vqa/v", "short_vqa/v"} <= found.keys()
    assert found["short_tiif/v"]["value"] == found["tiif/v"]["value"]  # the same pictures and questions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["{right}"], "the pictures bring no prompts: give --prompts, or --reference"),
        (["{right}", "--features", "fid"], "--features are for distances: give --reference"),
        (["{right}", "--prompts", "{right}/0.png"], "is not .txt, .json, .jsonl or .csv"),
        (["{right}", "--reference", "{right}", "--vqa", "x"], "give --prompts"),
        (["{right}", "--prompts", "dpg:nowhere"], "nowhere does not exist: give the folder of DPG-Bench"),
        (["{right}", "--prompts", "{prompts}", "--preferences", "hps"], "no preference model 'hps'"),
    ],
)
def test_what_cannot_be_scored_is_told_in_one_line(root: Path, capsys: pytest.CaptureFixture, arguments, message):
    filled = [text.format(right=root / "right", prompts=root / "prompts.txt") for text in arguments]
    assert main(["score", *filled]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("finelip score: error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_nothing_is_left_where_no_folder_is_named(root: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    assert main(["score", str(root / "right"), "--prompts", str(root / "prompts.txt"), *CLIP]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# Scores of right")
    assert "CLIPScore, judged by clip" in printed
    assert torch.is_grad_enabled()
