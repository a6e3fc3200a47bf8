"""Scripts in processes of their own, forked from one that has read the libraries, which takes seconds of a core.

What a user's `python script.py` has, a process here has, too: arguments, streams, folder, exit status and signals of
its own, and the script's folder first on `sys.path`. That a bare interpreter suffices is left to one run of each
script, with `bare=True`.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 280  # seconds; a test has 300
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "accelerate",
        "datasets",
        "tensorboard",
        "torchvision",
        "finelip_diffusion.data.datasets",
        "finelip_diffusion.objective",
        "finelip_diffusion.pipeline",
        "finelip_diffusion.evaluation.report",
    ]
)


def start(
    script: Path, *flags: object, out: Path | None = None, before: Callable[[], object] | None = None
) -> BaseProcess:
    """Starts a script.

    Args:
        script: Its file.
        *flags: Its arguments.
        out: Folder for its streams, `stdout` and `stderr`; None drops them.
        before: Called in the new process, before anything else.
    """
    process = FORKS.Process(target=_be, args=(script, [str(flag) for flag in flags], out, before))
    process.start()
    return process


def run(
    script: Path, *flags: object, bare: bool = False, before: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end, in a new interpreter if it is to be `bare`."""
    if bare:
        command = [sys.executable, str(script), *map(str, flags)]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False, cwd=ROOT)
    with tempfile.TemporaryDirectory() as folder:
        process = start(script, *flags, out=Path(folder), before=before)
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{script.name} ran for more than {TIMEOUT} seconds.")
        streams = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    assert process.exitcode is not None
    return subprocess.CompletedProcess([str(script), *map(str, flags)], process.exitcode, *streams)


def _be(script: Path, flags: list[str], out: Path | None, before: Callable[[], object] | None) -> None:
    """What the new process does: it becomes the script."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(out / name if out else os.devnull, os.O_WRONLY | os.O_CREAT, 0o600), number)
    if before is not None:
        before()
    os.chdir(ROOT)
    of_tests = (str(ROOT / "tests"), str(ROOT / "app"))
    sys.path[:] = [str(script.parent), *(path for path in sys.path if not path.startswith(of_tests))]
    sys.argv = [str(script), *flags]
    runpy.run_path(str(script), run_name="__main__")
