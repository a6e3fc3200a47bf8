"""Checkpoints of a training run: where to go on from, and how they are written."""

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .files import STAGE, failed_to_write, put, reason_of, remove, remove_stages


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """Where a run goes on from; None for a new run.

    Args:
        output_dir: The folder of the run.
        resume_from_checkpoint: `"latest"`, a folder, the name of one in `output_dir`, or None for a new run.

    Raises:
        ValueError: If the folder that was named is not a checkpoint, or a new run would mix its own with older ones.
    """
    latest = max(output_dir.glob("checkpoint-*"), key=step_of, default=None)
    if resume_from_checkpoint == "latest":
        return latest
    if resume_from_checkpoint is None and latest is not None:
        raise ValueError(f"{latest} is there already: give --resume_from_checkpoint latest, or another --output_dir.")
    if resume_from_checkpoint is None:
        return None
    path = Path(resume_from_checkpoint)
    path = path if path.is_dir() else output_dir / path
    if not path.is_dir() or not path.name.startswith("checkpoint-"):
        raise ValueError(f"--resume_from_checkpoint {resume_from_checkpoint} is not a checkpoint folder.")
    return path


def step_of(checkpoint: Path) -> int:
    """The number of updates before a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def save_checkpoint(accelerator: Any, output_dir: Path, step: int, limit: int | None = None) -> None:
    """Writes `checkpoint-STEP` atomically, by all processes together; then deletes the oldest.

    Args:
        accelerator: Of accelerate; what it prepared and what is registered with it is saved.
        output_dir: The folder of the run; one run writes to it at a time.
        step: Updates so far.
        limit: How many checkpoints are kept; None keeps all.

    Raises:
        ValueError: If it cannot be written: a full disk, say. Those before it stay.
    """
    stage, final = output_dir / f"{STAGE}checkpoint", output_dir / f"checkpoint-{step}"
    if accelerator.is_main_process:
        remove_stages(output_dir, "checkpoint")  # of a run that was killed
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(stage / final.name)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not failed_to_write(error, stage):
            raise
        raise ValueError(
            f"checkpoint {step} cannot be written to {output_dir} ({reason_of(error)}): free some space, then go on "
            "from the last whole one with --resume_from_checkpoint latest."
        ) from error
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    put(stage / final.name, final, stage)
    shutil.rmtree(stage)
    if limit is not None:
        for path in sorted(output_dir.glob("checkpoint-*"), key=step_of)[:-limit]:
            remove(path)
