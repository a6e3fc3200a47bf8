"""The one way in which files and folders are written: whole, or not at all; and how a picture says what it is."""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError

STAGE = ".writing-"
"""How the names of folders begin in which something is being written; a run that is killed leaves them."""

_FAILED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Gives a path to write a file or a folder to, which takes the place of `path` when the block has ended.

    What was at `path` stays as it is until then, and for good if the block raises. The parent folder is made if it
    does not exist. Several things that belong together go into one `with`: all are complete before the first one is
    renamed. A file is replaced in one step of the operating system; for a folder there are two, because the old one is
    renamed first, and a process that is killed between them leaves it as `.writing-*/replaced`.

        with writing(folder / "report.json") as json, writing(folder / "report.md") as markdown:
            json.write_text(...)
            markdown.write_text(...)

    Args:
        path: Of the file or folder.

    Yields:
        A path of the same name in a folder beside `path`; nothing is there yet.

    Raises:
        ValueError: If it cannot be written: on a full disk, in a folder that is read-only. One sentence. Every other
            error of the block is passed on.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{STAGE}{path.name}-"))
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield stage / path.name
        put(stage / path.name, path, stage)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not failed_to_write(error, stage):
            raise
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def png_text(**chunks: Any) -> PngInfo:
    """How a picture was drawn, as text inside its PNG file: give it to `Image.save(pnginfo=)`.

    Args:
        **chunks: By name, such as `prompt` and `settings`. What is not text is written as JSON.
    """
    info = PngInfo()
    for name, content in chunks.items():
        info.add_itxt(name, content if isinstance(content, str) else json.dumps(content, ensure_ascii=False))
    return info


def put(source: Path, path: Path, stage: Path) -> None:
    """Renames a complete file or folder to `path`; a folder that is there is moved into `stage` first."""
    if path.is_dir():
        path.rename(stage / "replaced")
    source.replace(path)


def remove(path: Path) -> None:
    """Deletes a folder so that a process that is killed never leaves half of it under its name."""
    stage = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{STAGE}{path.name}-"))
    path.rename(stage / "replaced")
    shutil.rmtree(stage)


def remove_stages(folder: Path, name: str = "") -> None:
    """Deletes what killed processes left unfinished in a folder, of names that begin with `name`."""
    for stage in folder.glob(f"{STAGE}{name}*"):
        shutil.rmtree(stage, ignore_errors=True)


def unwritable(path: Path, error: BaseException) -> ValueError:
    """The sentence about a file or folder that cannot be written."""
    return ValueError(
        f"{path} cannot be written ({reason_of(error)}): free some space or choose another folder; what was there is "
        "unchanged."
    )


def reason_of(error: BaseException) -> str:
    """An error in a few words, for a sentence."""
    return getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")


def failed_to_write(error: BaseException, stage: Path) -> bool:
    """Whether an error says that writing failed: blocks may read and compute as well."""
    if isinstance(error, OSError):
        named = error.filename is not None and stage in Path(str(error.filename)).parents
        cut_short = error.errno is None and str(error).endswith(" written")  # numpy, of an array
        return named or cut_short or error.errno in _FAILED_WRITES
    if isinstance(error, SafetensorError):
        return "serializing" in str(error)
    return "PytorchStreamWriter" in str(error) or "inline_container" in str(error)  # torch.save
