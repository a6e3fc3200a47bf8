"""What a user installs: the wheel, built offline from a copy of the sources, looked into."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import finelip_diffusion

ROOT = Path(__file__).resolve().parents[1]
NOT_INSTALLED = ["app", "benchmarks", "docs", "examples", "pipelines", "tests", "train"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, opened. Built from a copy, so that no build/ of an earlier day leaks into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    for name in ["finelip_diffusion", *NOT_INSTALLED]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def metadata_file(wheel, name):
    (path,) = [entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_only_the_package_is_installed(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"finelip_diffusion", f"finelip_diffusion-{finelip_diffusion.__version__}.dist-info"}


def test_every_file_of_the_package_is_installed(wheel):
    """Modules, py.typed and the whole bundled model: nothing that is in the folder is left behind."""
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "finelip_diffusion").rglob("*") if path.is_file()}
    here = {name for name in here if "__pycache__" not in name}
    there = {name for name in wheel.namelist() if name.startswith("finelip_diffusion/")}
    assert there == here
    assert "finelip_diffusion/py.typed" in there


def test_the_command_is_installed(wheel):
    scripts = configparser.ConfigParser()
    scripts.read_string(metadata_file(wheel, "entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"finelip": "finelip_diffusion.cli:main"}


def test_metadata(wheel):
    metadata = HeaderParser().parsestr(metadata_file(wheel, "METADATA"))
    assert metadata["Version"] == finelip_diffusion.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in metadata_file(wheel, "licenses/LICENSE")
    assert {"convert", "train", "eval", "app", "dev"} <= set(metadata.get_all("Provides-Extra"))
    # What the scripts and the page need stays out of a plain installation.
    plain = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in plain if line.startswith(("datasets", "gradio", "tensorboard"))]
