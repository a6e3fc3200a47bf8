"""Files and folders are written atomically, by every library that writes them."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from finelip_diffusion.files import remove, remove_stages, writing

ZEROS = torch.zeros(50_000)  # 200,000 bytes


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files may have a hundred thousand bytes, which stands for a disk that is full there."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, usual[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def numpy_file(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, ZEROS.numpy())


def noise_picture(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)).save(path, "PNG")


def whole_folder(path: Path) -> None:
    path.mkdir()
    (path / "first").write_text("new")
    torch.save({"zeros": ZEROS}, path / "second")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("0" * 200_000),
        numpy_file,
        lambda path: torch.save(ZEROS, path),
        lambda path: save_file({"zeros": ZEROS}, path),
        noise_picture,
        whole_folder,
    ],
    ids=["text", "numpy", "torch", "safetensors", "PNG", "folder"],
)  # fmt: skip
def test_a_full_disk_is_one_sentence_and_what_was_there_stays(
    write: Callable[[Path], object], full_disk: None, tmp_path: Path
) -> None:
    path = tmp_path / "result"
    path.write_text("before")
    sentence = r"result cannot be written \(.*\): free some space or choose another folder"
    with pytest.raises(ValueError, match=sentence), writing(path) as part:
        write(part)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["result"]


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with writing(tmp_path / "deep" / "result") as part:
            part.mkdir()
            (part / text).write_text(text)
    assert os.listdir(tmp_path / "deep") == ["result"]
    assert os.listdir(tmp_path / "deep" / "result") == ["new"]


def test_errors_of_the_block_are_passed_on(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no/such/image"), writing(tmp_path / "result") as part:
        part.write_text("half")
        Image.open("no/such/image")
    assert os.listdir(tmp_path) == []


def test_files_of_one_block_are_all_complete_before_the_first_is_in_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text("before")
    with pytest.raises(KeyError), writing(tmp_path / "one") as one, writing(tmp_path / "two") as two:
        one.write_text("after")
        two.write_text(dict[str, str]()["after"])
    assert {(tmp_path / name).read_text() for name in ("one", "two")} == {"before"}


def test_a_place_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="result cannot be written"), writing(tmp_path / "file" / "result"):
        pass


def test_a_killed_process_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    code = f"""if True:
        import os, signal
        from finelip_diffusion.files import writing
        with writing({str(tmp_path / "result")!r}) as part:
            part.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".writing-result-")
    remove_stages(tmp_path, "other")
    assert os.listdir(tmp_path) == [left]
    remove_stages(tmp_path, "result")
    assert os.listdir(tmp_path) == []


def test_a_folder_is_removed(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("text")
    remove(tmp_path / "old")
    assert os.listdir(tmp_path) == []
