"""What training scripts share: flags, launching, means, schedule, checkpoints, cards."""

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from finelip_diffusion.resuming import find_checkpoint, save_checkpoint
from finelip_diffusion.runs import Means, RunFlags, check_launch, count_updates, make_schedule, model_card, run_script


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(300, 300))
    yield accelerator
    accelerator.free_memory()


def test_means_are_of_all_batches() -> None:
    means = Means()
    for value in (1.0, 2.0, 6.0):
        means.add({"one": torch.tensor(value), "other": torch.tensor(2 * value)})
    assert means.take(1) == {"one": 3.0, "other": 6.0}
    means.add({"one": torch.tensor(5.0)})
    assert means.take(2) == {"one": 5.0}


def test_a_loss_that_is_not_finite_is_seen_in_any_batch() -> None:
    means = Means()
    for value in (1.0, float("inf"), 1.0):
        means.add({"loss": torch.tensor(value)})
    with pytest.raises(ValueError, match="the loss is not finite at update 7: .*; try a lower --learning_rate"):
        means.take(7)


def test_checkpoints_beyond_the_limit_are_deleted(accelerator: Accelerator, tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(accelerator, tmp_path, step, limit=2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-2"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert find_checkpoint(tmp_path, "checkpoint-2") == tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match="checkpoint-10 is there already"):
        find_checkpoint(tmp_path, None)
    with pytest.raises(ValueError, match="checkpoint-3 is not a checkpoint folder"):
        find_checkpoint(tmp_path, "checkpoint-3")


def test_a_full_disk_leaves_the_checkpoints_before(accelerator: Accelerator, tmp_path: Path) -> None:
    save_checkpoint(accelerator, tmp_path, 1)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, usual[1]))  # stands for the disk
    try:
        with pytest.raises(ValueError, match="checkpoint 2 cannot be written to .*: free some space, then go on from"):
            save_checkpoint(accelerator, tmp_path, 2, limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    save_checkpoint(accelerator, tmp_path, 2, limit=1)
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_one_process_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate 1.15 leaves in the environment of `launch --cpu --num_processes 2`."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="one process of several: use torchrun --nproc_per_node N"):
        check_launch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch()


def test_a_warm_up_longer_than_the_run_is_said(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    make_schedule("cosine", optimizer, 5, 10)
    assert not caplog.records
    make_schedule("cosine", optimizer, 200, 10)
    assert "the warm-up of the learning rate takes 200 updates and the run 10" in caplog.text


def test_the_length_of_a_run(tmp_path: Path) -> None:
    assert count_updates(RunFlags(tmp_path, num_train_epochs=3), 100, 30) == 9
    assert count_updates(RunFlags(tmp_path, max_train_steps=5), None, 30) == 5
    with pytest.raises(ValueError, match="a stream has no epochs: give --max_train_steps"):
        count_updates(RunFlags(tmp_path), None, 30)


def test_bad_flags_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--checkpointing_steps is 0, but must be at least 1"):
        RunFlags(tmp_path, checkpointing_steps=0)
    with pytest.raises(ValueError, match="--max_bad_fraction is 1.5, but a share lies in 0..1"):
        RunFlags(tmp_path, max_bad_fraction=1.5)


def test_a_card_holds_the_command_without_the_token(tmp_path: Path) -> None:
    flags = RunFlags(tmp_path / "a name", hub_token="secret", dry_run=True, resume_from_checkpoint="latest")
    card = model_card("Title", ["First.", "Second."], {"recall": 0.5, "note": "text"}, flags, "train/script.py")
    assert "# Title\n\nFirst.\n\nSecond.\n\n## Figures\n\n- recall: 0.5\n" in card
    assert f"accelerate launch train/script.py --output_dir '{tmp_path}/a name' " in card
    assert "--dry_run True" in card
    for word in ("secret", "resume_from_checkpoint", "None", "note"):
        assert word not in card


def test_errors_that_a_user_can_fix_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @dataclass
    class Flags(RunFlags):
        number: int = 1

    def main(flags: Flags) -> None:
        raise OSError(28, "No space left on device", "file")

    monkeypatch.setattr("sys.argv", ["script.py", "--output_dir", str(tmp_path), "--number", "2"])
    with pytest.raises(SystemExit, match=r"^script.py: \[Errno 28\] No space left on device: 'file'$"):
        run_script(main, Flags, "train/script.py")
