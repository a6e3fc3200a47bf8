"""The benchmarks at a tiny size: what they compare agrees, and their bars can be missed."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module of its own for each test."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *flags: str) -> str:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def table_of(output: str) -> dict[str, list[float]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if "|" in line][2:]
    return {name: [float(value) for value in values] for name, *values in cells}


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Without a bar for its speed."""
    module = load_script("train_step", monkeypatch)
    module.SPEED_BAR = 0.0
    return module


def tiny(train_step: ModuleType, **flags: object):
    return train_step.Arguments(batch_size=4, repeats=1, tiny=True, check="float32", **flags)


def test_the_steps_agree_and_the_table_says_so() -> None:
    rows = table_of(run_script("train_step", "--tiny", "--batch_size", "4", "--repeats", "1"))
    rate, speed, loss, difference, gradient = rows["ours, float32"]
    assert rate > 0 and speed > 0
    assert loss == pytest.approx(rows["reference, float32"][2], rel=1e-4)
    assert difference <= 1e-6  # a sum of 24 hinges, each rounded to float32
    assert gradient <= 1e-5  # rounding, through two towers of two layers
    assert rows["ours, bfloat16 autocast"][4] > 1e-4  # so differences are seen


def test_every_bar_can_be_met_and_missed(train_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step.main(tiny(train_step))
    monkeypatch.setattr(train_step, "SPEED_BAR", math.inf)
    with pytest.raises(SystemExit, match="times the reference's images per second"):
        train_step.main(tiny(train_step))
    monkeypatch.setattr(train_step, "SPEED_BAR", 0.0)
    monkeypatch.setattr(train_step, "MARGIN", 0.3)  # of the reference alone
    with pytest.raises(SystemExit, match="the loss differs"):
        train_step.main(tiny(train_step))


@pytest.mark.parametrize("name", ["reference, float32", "ours, float32"])
def test_captions_are_read_to_their_last_word(train_step: ModuleType, name: str) -> None:
    args = tiny(train_step)
    step = train_step.make_step(args)
    batch = train_step.make_batch(args, 0, train_step.clip_tokenizer(248, pad_token="!"), 32)
    row = batch["attention_mask"].sum(1).argmax()
    before = train_step.loss_of(name, step, batch).item()
    batch["input_ids"][row, batch["attention_mask"][row].sum() - 2] += 1  # in front of the end token
    assert train_step.loss_of(name, step, batch).item() != pytest.approx(before, rel=1e-6)


def test_the_tools_agree_on_the_distance_and_the_table_says_so() -> None:
    output = run_script(
        "evaluate", "--num_images", "4", "--repeats", "1", "--batch_size", "3", "--memory_images", "30", "90"
    )
    rows = table_of(output)
    assert list(rows) == ["ours", "torch-fidelity", "clean-fid"]
    for rate, speed, features, seconds, distance in rows.values():
        assert min(rate, speed, features, seconds) > 0
        assert distance == pytest.approx(rows["ours"][-1], rel=1e-3)
    peaks = dict(re.findall(r"(\d+) images (\d+) MB", output))
    assert 0.9 * float(peaks["30"]) < float(peaks["90"]) < 1.1 * float(peaks["30"])


def test_every_bar_of_scoring_can_be_met_and_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    missed_bars = load_script("evaluate", monkeypatch).missed_bars
    assert missed_bars({"a": 1.0}, {"a": 1e-3}, {1_000: 100.0, 20_000: 105.0}) == []
    missed = missed_bars({"a": 0.99, "b": 1.5}, {"a": 1e-4, "b": math.nan}, {1_000: 100.0, 20_000: 106.0})
    assert [sentence.split(",")[0] for sentence in missed] == [
        "0.99 times the images per second of a",
        "the distance differs by nan from that of b",
        "20000 images take 1.06 times the memory of 1000",
    ]
