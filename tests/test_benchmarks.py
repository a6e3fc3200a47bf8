"""benchmarks/train_step.py at a tiny size: its steps agree, and its bars can be missed."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "train_step.py"


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module of its own for each test, without a bar for its speed."""
    spec = importlib.util.spec_from_file_location("train_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_step", module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    module.SPEED_BAR = 0.0
    return module


def tiny(train_step: ModuleType, **flags: object):
    return train_step.Arguments(batch_size=4, repeats=1, tiny=True, check="float32", **flags)


def test_the_steps_agree_and_the_table_says_so() -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--batch_size", "4", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line][2:]
    rows = {name: [float(value) for value in values] for name, *values in cells}
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
