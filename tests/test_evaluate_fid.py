"""The evaluation, run as a user runs it: on scenes, on an imagefolder, interrupted, in two processes, and refused."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scripts
from PIL import Image

from finelip_diffusion.evaluation.images import BASELINE
from finelip_diffusion.metrics import FeatureStatistics, frechet_distance
from finelip_diffusion.scenes import describe, render, sample_scene

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train" / "evaluate_fid.py"
SMALL = [
    "--config", ROOT / "train/configs/scenes.yaml", "--encoders", "truncate", "finelip", "--unets", "base",
    "--num_prompts", 6, "--num_short", 2, "--num_changed", 2, "--num_drift", 1, "--num_inference_steps", 2,
    "--num_resamples", 4, "--kid_subset_size", 4, "--num_examples", 1, "--batch_size", 4,
]  # fmt: skip
SCENES = [*SMALL, "--ladder", 1]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module(SCRIPT.stem)
    sys.path.remove(str(SCRIPT.parent))


def pixels(folder: Path) -> dict[str, np.ndarray]:
    files = [file for file in sorted((folder / "images").rglob("*.png")) if ".writing-" not in str(file)]
    return {str(file.relative_to(folder)): np.asarray(Image.open(file).convert("RGB")) for file in files}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    done = scripts.run(SCRIPT, *SCENES, "--output_dir", folder, bare=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def figures(folder: Path) -> dict[tuple[str, str], float]:
    return {
        (name, key): figure["value"]
        for name, condition in report(folder)["conditions"].items()
        for key, figure in condition["figures"].items()
    }


def assert_alike(ours: dict, theirs: dict) -> None:
    """One level of 255 in a few pixels moves features in the third digit at most."""
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert (value is None) == (theirs[key] is None), key
        assert value is None or value == pytest.approx(theirs[key], rel=0.02, abs=1e-3), key


def test_the_report_has_every_figure_with_its_interval_and_its_difference(straight: Path):
    found = report(straight)
    assert list(found["conditions"]) == ["base/truncate", "base/finelip"]
    assert found["prompts"]["n"] == 6
    assert found["prompts"]["seeds"] == [0, 5]
    own = found["conditions"]["base/finelip"]["figures"]
    assert own.keys() == {
        "effnet_fd", "effnet_kid", "effnet_fd/reconstructed", "effnet_kid/reconstructed",
        "found_before", "found_after", "uncalled", "background", "clip_score/clip", "den_score/clip",
        "den_score_debiased/clip",
        "listening_before/clip", "listening_after/clip", "short_found", "short_background", "short_clip_score/clip",
        "change", "change_inside", "state_drift", "prediction_drift",
    }  # fmt: skip
    assert own.keys() == found["figures"].keys()
    for key, figure in own.items():
        assert figure["value"] is not None, key
        assert figure["n"] >= 1, key
        if key not in ("change_inside", "state_drift", "prediction_drift"):  # the baseline has none
            assert figure["difference"] is not None, key
    assert any("too few" in text for text in found["warnings"])  # 6 images for 1,280 features
    for name in ("found_after", "listening_after/clip"):
        base = found["conditions"]["base/truncate"]["figures"][name]["value"]
        assert own[name]["difference"]["value"] == pytest.approx(own[name]["value"] - base, abs=1e-9)


def test_floors_and_the_ladder_are_distances_of_the_features_kept(straight: Path):
    floors = report(straight)["floors"]
    assert set(floors) == {"effnet_fd", "effnet_fd/reconstructed", "effnet_kid", "effnet_kid/reconstructed"}
    assert set(floors["effnet_fd"]) == {"autoencoder", "halves", "wrong_1"}
    kept = {
        name: np.load(straight / "features" / "effnet_fd" / f"{name}.npy")
        for name in ("reference", "reconstructed", "wrong_1", "wrong_1-reconstructed")
    }
    for key, floor, rows, others in (
        ("effnet_fd", "autoencoder", kept["reconstructed"], kept["reference"]),
        ("effnet_fd", "halves", kept["reference"][::2], kept["reference"][1::2]),
        ("effnet_fd", "wrong_1", kept["wrong_1"], kept["reference"]),
        ("effnet_fd/reconstructed", "wrong_1", kept["wrong_1-reconstructed"], kept["reconstructed"]),
    ):
        sides = [side for features in (rows, others) for side in (features.mean(0), np.cov(features.T))]
        assert floors[key][floor]["value"] == pytest.approx(frechet_distance(*sides), rel=1e-5)
    for condition in report(straight)["conditions"].values():  # two steps of six images: nothing can be told
        assert condition["figures"]["effnet_fd"]["floor"] in (None, "autoencoder", "halves")
    assert "= floor: the figure cannot be told" in (straight / "report.md").read_text()


def test_truncate_does_not_see_a_change_after_token_77(straight: Path):
    found = figures(straight)
    assert found["base/truncate", "change"] < 1e-4  # batches of other sizes round otherwise: 0 with torch 2.15
    assert found["base/finelip", "change"] > 0.001
    assert ("base/truncate", "state_drift") not in found


def test_the_distance_is_that_of_the_features_kept(straight: Path):
    reference = np.load(straight / "features" / "effnet_fd" / "reference.npy")
    for name in ("truncate", "finelip"):
        rows = np.load(straight / "features" / "effnet_fd" / "base" / f"{name}-long.npy")
        sides = []
        for features in (rows, reference):
            statistics = FeatureStatistics()
            statistics.update(features)
            sides += [statistics.mean, statistics.covariance]
        expected = frechet_distance(*sides)
        assert figures(straight)[f"base/{name}", "effnet_fd"] == pytest.approx(expected, rel=1e-6)


def test_every_image_keeps_its_prompt_and_its_seed(straight: Path):
    for index in range(6):
        with Image.open(straight / f"images/base/finelip/long/{index:06d}.png") as image:
            assert image.info["prompt"] == str(describe(sample_scene(index, "test"), index))
            assert image.info["seed"] == str(index)
            assert json.loads(image.info["settings"])["num_inference_steps"] == 2


def test_the_page_shows_the_examples(straight: Path):
    class Images(HTMLParser):
        number = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.number += tag == "img"
            assert not any(key in ("src", "href") and (value or "").startswith("http") for key, value in attrs)

    page = Images()
    page.feed((straight / "report.html").read_text())
    assert page.number >= 3 * 3  # best, worst and first, each with a reference and two encoders
    assert "Found after token 77" in (straight / "report.md").read_text()


def test_a_killed_run_goes_on_and_ends_the_same(straight: Path, tmp_path: Path):
    process = scripts.start(SCRIPT, *SCENES, "--output_dir", tmp_path)
    deadline = time.monotonic() + 200
    while not (kept := list(tmp_path.glob("images/*/*/*/*.png"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert kept
    times = {file: file.stat().st_mtime_ns for file in kept}
    done = scripts.run(SCRIPT, *SCENES, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {file: file.stat().st_mtime_ns for file in kept} == times
    ours, theirs = pixels(tmp_path), pixels(straight)
    assert ours.keys() == theirs.keys()
    for name, image in ours.items():  # after a kill within a batch its rest is drawn in smaller ones: rounding
        assert np.abs(image.astype(int) - theirs[name]).max() <= 1, name
    assert_alike(figures(tmp_path), figures(straight))


def test_two_processes_equal_one(straight: Path, tmp_path: Path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29731"]
    command = [sys.executable, *launcher, SCRIPT, *SCENES, "--output_dir", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = pixels(tmp_path), pixels(straight)
    assert ours.keys() == theirs.keys()
    for name, image in ours.items():
        assert np.abs(image.astype(int) - theirs[name]).max() <= 1, name
    assert_alike(figures(tmp_path), figures(straight))


def test_other_settings_are_not_mixed_in(script: ModuleType, straight: Path, tmp_path: Path):
    shutil.copytree(straight, tmp_path / "copy")
    before = pixels(tmp_path / "copy")
    for flag, says in (("--guidance_scale", "other settings"), ("--seed", "was begun with seed = 0, not 4")):
        with pytest.raises(ValueError, match=says):
            script.main(script.read_arguments([*map(str, SCENES), flag, "4", "--output_dir", str(tmp_path / "copy")]))
    assert pixels(tmp_path / "copy").keys() == before.keys()


# --------------------------------------------------------------------------------------- other data, other models


@pytest.fixture(scope="module")
def imagefolder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captioned images of several sizes, one of them broken."""
    folder = tmp_path_factory.mktemp("imagefolder")
    rows = []
    for index in range(12):
        scene = sample_scene(100 + index, "test", (5, 8))
        image = render(scene).resize((40 + 8 * index, 64))
        image.save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": str(describe(scene, index))})
    (folder / "4.png").write_bytes(b"no image")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_captioned_images_and_a_model_of_ones_own(
    imagefolder: Path, stable_diffusion_folder: Path, finelip_folder: Path, tmp_path: Path
):
    flags = [
        "--model", stable_diffusion_folder, "--data", imagefolder, "--encoders", "truncate", f"ours={finelip_folder}",
        "--unets", "base", f"own={finelip_folder}", "--num_prompts", 12, "--num_short", 3, "--num_changed", 2,
        "--num_drift", 1, "--num_inference_steps", 1, "--num_resamples", 4, "--judges", "clip=bundled/clip",
        "--max_bad_fraction", 0.2, "--output_dir", tmp_path,
    ]  # fmt: skip
    done = scripts.run(SCRIPT, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    found = report(tmp_path)
    assert list(found["conditions"]) == ["base/truncate", "base/ours", "own/truncate", "own/ours"]
    assert found["prompts"]["n"] == 11
    assert any("12 prompts were asked for; 11" in text for text in found["warnings"])
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == 1
    assert "4.png" in skipped[0]["name"] or "unreadable" in skipped[0]["reason"]
    own = found["conditions"]["own/ours"]["figures"]
    assert "found_after" not in own  # no reader for these
    assert own["listening_after/clip"]["n"] > 10
    assert own["change_inside"]["value"] is None
    changed = found["changes"][0]
    assert changed["before"] != changed["after"]


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--encoders", "truncate", "runs/no-such-encoder/x"], "runs/no-such-encoder/x"),
        (["--encoders", "chunk"], "--encoders lack truncate"),
        (["--unets", "runs/none"], "no runs/none/unet with a config.json"),
        (["--data", "no/such/data/here"], "no/such/data/here"),
        (["--features", "fid"], "Inception"),
        (["--features", "inception"], "no features 'inception'"),
        (["--features", "fid=no/such/file.pth"], "no/such/file.pth"),
        (["--judges", "clip=no/such/judge/here"], "no/such/judge/here"),
        (["--judges", "effnet_fd=bundled/clip"], "have one name"),
        (["--num_prompts", "1"], "--num_prompts is 1"),
        (["--noise", "in_order"], "--num_changed 0"),
        (["--reference", "drawn"], "--reference is drawn: give original or reconstructed, or both"),
        (["--ladder", "9"], "--ladder is of scenes, and of 1 to 4 wrong facts"),
        (["--config", "no/such.yaml"], "no/such.yaml"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_drawn(
    script: ModuleType, tmp_path: Path, flags: list[str], says: str
):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        script.main(script.read_arguments([*map(str, SMALL), "--output_dir", str(tmp_path), *flags]))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.png"))


def test_a_reference_folder_with_one_image_is_refused(
    script: ModuleType, imagefolder: Path, stable_diffusion_folder: Path, tmp_path: Path
):
    shutil.copy(imagefolder / "0.png", tmp_path)
    (tmp_path / "metadata.jsonl").write_text((imagefolder / "metadata.jsonl").read_text().splitlines()[0] + "\n")
    flags = [
        "--model",
        stable_diffusion_folder,
        "--data",
        tmp_path,
        "--encoders",
        BASELINE,
        "--output_dir",
        tmp_path / "out",
    ]
    with pytest.raises(ValueError, match="has 1 images to compare with: give at least 2"):
        script.main(script.read_arguments([*map(str, flags)]))


def test_the_script_says_its_sentence_and_fails(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("guidance: 3\n")
    done = scripts.run(SCRIPT, "--config", tmp_path / "mine.yaml", "--output_dir", tmp_path)
    assert done.returncode != 0
    assert "unknown key 'guidance'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["scenes", "sd15", "sdxl_paper"])
def test_a_preset_is_flags_of_the_script(script: ModuleType, name: str):
    args = script.read_arguments(["--config", str(ROOT / "train" / "configs" / f"{name}.yaml")])
    assert args.num_prompts >= 1000
    assert args.judges
    if name == "sdxl_paper":
        assert (args.num_inference_steps, args.refiner_start, args.guidance_scale) == (40, 0.8, 5.0)
        assert (args.seed, args.noise, args.negative_prompt) == (1971, "in_order", None)


def test_a_flag_goes_before_the_configuration(script: ModuleType):
    args = script.read_arguments(["--config", str(ROOT / "train/configs/scenes.yaml"), "--guidance_scale", "4"])
    assert args.guidance_scale == 4
    assert args.num_prompts == 2000
