"""Starts the processes that `accelerate launch --cpu --num_processes N` was asked for and does not start."""

import os
import re
import sys

import psutil
from torch.distributed.run import main as torchrun


def start_processes() -> bool:
    """Starts as many processes as `accelerate launch --cpu --num_processes N` was asked for.

    Without MPI that command starts a single one and says nothing (accelerate 1.15, `prepare_simple_launcher_cmd_env`);
    it leaves MASTER_ADDR behind where N > 1, but no WORLD_SIZE, and N itself only on its own command line.

    Returns:
        Whether it did, so that this process has nothing left to do.

    Raises:
        ValueError: If N cannot be found.
    """
    asked = "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if not asked or "WORLD_SIZE" in os.environ:
        return False
    launcher = re.search(r"--num_processes[= ](\d+)", " ".join(psutil.Process(os.getppid()).cmdline()))
    if launcher is None:
        raise ValueError("accelerate started one process of several: use torchrun --nproc_per_node N in its place.")
    flags = [f"--nproc_per_node={launcher[1]}", f"--master_port={os.environ.get('MASTER_PORT', '29500')}"]
    torchrun([*flags, *sys.argv])
    return True
