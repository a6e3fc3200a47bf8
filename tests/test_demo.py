"""`make demo`'s script, run as a user runs it."""

import re
import subprocess
from pathlib import Path

import scripts
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "demo.py"


def demo(folder: Path, *flags: str, bare: bool = False) -> subprocess.CompletedProcess[str]:
    return scripts.run(SCRIPT, "--out", folder / "demo.png", *flags, bare=bare)


def test_the_demo_prints_both_reports_and_writes_one_picture(tmp_path: Path) -> None:
    done = demo(tmp_path, "--steps", "2", bare=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "135 tokens, long_prompt='truncate'" in done.stdout
    assert "60 of 135 tokens dropped" in done.stdout
    assert "nothing dropped" in done.stdout
    assert re.search(r"Objects drawn as the prompt asks: \d of 8 \| \d of 8\n", done.stdout)
    assert Image.open(tmp_path / "demo.png").width > 900


def test_a_prompt_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, words in (("empty.txt", "is empty"), ("binary.txt", "as UTF-8 text"), ("none.txt", "No such file")):
        done = demo(tmp_path, "--prompt-file", str(tmp_path / name))
        assert done.returncode != 0
        assert words in done.stderr.splitlines()[-1]
        assert not (tmp_path / "demo.png").exists()


def test_a_picture_that_cannot_be_written_is_one_sentence_before_drawing(tmp_path: Path) -> None:
    done = demo(tmp_path, "--out", str(tmp_path / "missing" / "demo.png"))
    assert done.returncode != 0
    assert "must be a .png in a folder that exists" in done.stderr.splitlines()[-1]
