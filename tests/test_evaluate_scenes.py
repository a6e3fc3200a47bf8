"""The script behind the model card's figures, run as a user runs it, and its interval against the textbook's."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "evaluate_scenes.py"


def evaluate(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--output_dir", str(folder), "--num_prompts", "6", "--batch_size", "3"]
    command += ["--unets", "adapted", "--num_inference_steps", "8", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def ratio():
    spec = importlib.util.spec_from_file_location("evaluate_scenes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ratio


def test_the_report_counts_every_fact_and_a_second_run_draws_nothing(tmp_path: Path) -> None:
    done = evaluate(tmp_path, "--encoders", "long_encoder")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    rows = json.loads((tmp_path / "adapted-long_encoder.json").read_text())["prompts"]
    assert [row["seed"] for row in rows] == list(range(6))
    facts = [fact for row in rows for fact in row["facts"]]
    figures = report["conditions"]["adapted-long_encoder"]
    assert figures["found_all"]["facts"] == len(facts)
    assert figures["found_before"]["facts"] + figures["found_behind"]["facts"] == len(facts)
    assert figures["found_all"]["value"] == pytest.approx(np.mean([fact["found"] for fact in facts]))
    assert report["reader_on_rendered_scenes"] >= 0.995
    assert "| adapted | long_encoder |" in (tmp_path / "report.md").read_text()

    drawn = (tmp_path / "adapted-long_encoder.json").stat().st_mtime_ns
    assert evaluate(tmp_path, "--encoders", "long_encoder").returncode == 0
    assert (tmp_path / "adapted-long_encoder.json").stat().st_mtime_ns == drawn

    done = evaluate(tmp_path, "--encoders", "long_encoder", "--guidance_scale", "5")
    assert done.returncode != 0
    assert "choose another --output_dir" in done.stderr.splitlines()[-1]


def test_batches_change_nothing(tmp_path: Path) -> None:
    """The same findings whatever is drawn together; single pixels may differ in the last bit."""
    for name, size in (("one", "6"), ("two", "2")):
        done = evaluate(tmp_path / name, "--encoders", "truncate", "--batch_size", size)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / "adapted-truncate.json").read_text()) for name in ("one", "two"))
    assert one == two


def test_an_unknown_encoder_is_one_sentence(tmp_path: Path) -> None:
    done = evaluate(tmp_path, "--encoders", "t5")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("Unknown condition 't5': encoders are")


def test_bad_flags_are_one_sentence_before_anything_is_drawn(tmp_path: Path) -> None:
    for flags, words in (
        (("--num_prompts", "0"), "--num_prompts is at least 2"),
        (("--model", str(tmp_path)), "holds no finelip/unet"),
    ):
        done = evaluate(tmp_path / "out", *flags)
        assert done.returncode != 0
        assert words in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_interval_of_a_share_is_near_the_normal_one(ratio) -> None:
    """With one fact a prompt, the bootstrap's interval is the binomial's, to the noise of 2,000 resamples."""
    hits = np.random.default_rng(0).random(2000) < 0.7
    figure = ratio([(int(hit), 1) for hit in hits])
    share, spread = hits.mean(), 1.96 * np.sqrt(hits.mean() * (1 - hits.mean()) / len(hits))
    assert figure["value"] == pytest.approx(share)
    assert figure["low"] == pytest.approx(share - spread, abs=0.004)
    assert figure["high"] == pytest.approx(share + spread, abs=0.004)
    assert ratio([(1, 1)] * 10 + [(0, 0)])["prompts"] == 10
    assert ratio([(0, 0)])["value"] is None
