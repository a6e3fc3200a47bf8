"""The script behind the figures of docs/app.md, run as a user runs it."""

import json
import subprocess
from pathlib import Path

import pytest
import scripts

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "evaluate_attention.py"


def evaluate(folder: Path, *flags: str, bare: bool = False) -> subprocess.CompletedProcess[str]:
    return scripts.run(SCRIPT, "--output_dir", folder, *flags, bare=bare)


def test_the_report_counts_every_sentence_that_was_read(tmp_path: Path) -> None:
    flags = ["--num_prompts", "4", "--num_inference_steps", "8", "--strategies", "stretch", "truncate"]
    done = evaluate(tmp_path, *flags, bare=True)
    assert done.returncode == 0, done.stderr[-2000:]
    strategies = json.loads((tmp_path / "report.json").read_text())["strategies"]
    for result in strategies.values():
        assert [row["seed"] for row in result["rows"]] == sorted(row["seed"] for row in result["rows"])
        for part in ("sentence", "fact"):
            hits = [row[part] == row["cell"] for row in result["rows"]]
            assert result[part]["value"] == pytest.approx(sum(hits) / len(hits))
            assert result[part]["n"] == len(hits)
    assert strategies["stretch"]["sentence"]["value"] > 0.8
    assert len(strategies["truncate"]["rows"]) < len(strategies["stretch"]["rows"])
    assert (tmp_path / "report.md").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--num_prompts", "1"), "--num_prompts is 1"), (("--strategies", "auto"), "--strategies are auto")],
)
def test_odd_flags_are_one_sentence(flags, words, tmp_path: Path) -> None:
    done = evaluate(tmp_path / "out", *flags)
    assert done.returncode != 0
    assert words in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
