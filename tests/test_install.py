"""The documentation's blocks in environments that hold only what the install line above them brings.

README's blocks run alone. On a page of docs/, blocks run from top to bottom, as a reader types them, and every install
line above counts. Each environment is a virtual one whose packages are links to those of this environment: the ones
that the extra asks for, directly or not, and no other. Of blocks that need a download, the imports run; of scripts,
`--help`. One test installs the package with pip, as a user does.

`make test-install` runs this; the quick run leaves it out.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from test_readme import DOCUMENTS, ROOT, Block, blocks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = [pytest.mark.install, pytest.mark.timeout(1500)]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSTALL = re.compile(r'pip install "?\.(?:\[([\w,]+)\])?')
# Runs in the environment: each piece of code in its own namespace, scripts as far as their --help.
RUNNER = """
import contextlib, io, json, os, runpy, sys, traceback
for number, (name, codes, script) in enumerate(json.load(open("pieces.json"))):
    os.mkdir(f"../{number}")  # what one piece writes, another does not find
    os.chdir(f"../{number}")
    os.symlink("../work/examples", "examples")
    try:
        if script:
            sys.argv[:] = [script, "--help"]
            sys.path.insert(0, script.rsplit("/", 1)[0])
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    runpy.run_path(script, run_name="__main__")
                except SystemExit as stop:
                    assert not stop.code, stop
                finally:
                    sys.path.pop(0)
        namespace = {"__name__": "__main__"}
        for code in codes:
            exec(compile(code, name, "exec"), namespace)
    except BaseException:
        print("FAILED", name, traceback.format_exc(), sep="\\n")
"""


class Piece(NamedTuple):
    """Something to run.

    Attributes:
        name: The document and the line.
        codes: Python, one after the other in one namespace.
        script: A script instead, or "".
    """

    name: str
    codes: list[str]
    script: str


def extras_above(document: Path, line: int) -> frozenset[str]:
    """The extras of the install lines above a line: in README of the last one, elsewhere of all."""
    lines = document.read_text(encoding="utf-8").splitlines()[: line - 1]
    found = [set(filter(None, (match[1] or "").split(","))) for match in INSTALL.finditer("\n".join(lines))]
    if document.name == "README.md":
        found = found[-1:]
    return frozenset().union(*found)


def imports_alone(code: str) -> str:
    tree = ast.parse(code)
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return ast.unparse(tree)


def scripts(block: Block) -> list[str]:
    """The Python scripts that a shell block runs."""
    lines = (shlex.split(line, comments=True) for line in block.code.replace("\\\n", " ").splitlines())
    starters = {"accelerate", "python", "torchrun"}
    found = [word for words in lines if words and words[0] in starters for word in words[1:]]
    return [word for word in found if word.endswith(".py")]


def pieces() -> dict[frozenset[str], list[Piece]]:
    """What is to run, by the extras that are installed for it."""
    found: dict[frozenset[str], list[Piece]] = {}
    done = set()
    for document in DOCUMENTS:
        before: list[str] = []
        for block in blocks(document, "python"):
            code = block.code if block.runs else imports_alone(block.code)
            alone = document.name == "README.md"
            extras = extras_above(document, block.line)
            found.setdefault(extras, []).append(
                Piece(f"{document.name}:{block.line}", [code] if alone else [*before, code], "")
            )
            before += [code] if block.runs else []
        for block in blocks(document, "bash"):
            extras = extras_above(document, block.line + len(block.code.splitlines()))
            for script in scripts(block):
                if (extras, script) not in done:
                    done.add((extras, script))
                    found.setdefault(extras, []).append(
                        Piece(f"{document.name}:{block.line} {script}", [], str(ROOT / script))
                    )
    return found


def last_of_each_page(found: list[Piece]) -> list[Piece]:
    """Without the pieces that a longer one of the same page contains."""
    return [
        piece
        for number, piece in enumerate(found)
        if piece.script or not any(later.codes[: len(piece.codes)] == piece.codes for later in found[number + 1 :])
    ]


def required(extras: frozenset[str]) -> set[str]:
    """The distributions that the package brings with these extras, as they are installed here."""
    own = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    todo = [(Requirement(line), "") for line in own]
    done: set[tuple[str, str]] = set()
    names = set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            assert requirement.name.startswith(("nvidia-", "cuda-")), requirement  # not needed on this machine
            continue
        names.add(requirement.name)
        for wanted in ("", *requirement.extras):
            if (requirement.name, wanted) not in done:
                done.add((requirement.name, wanted))
                todo += [(Requirement(line), wanted) for line in found.requires or []]
    return names


def make_environment(folder: Path, extras: frozenset[str]) -> Path:
    """A virtual environment with links to what the extras bring, and to the package; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    for name in required(extras):
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))
    (site / "finelip_diffusion").symlink_to(ROOT / "finelip_diffusion")
    return folder / "bin" / "python"


def run(python: Path, folder: Path, found: list[Piece]) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "pieces.json").write_text(json.dumps(found), encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(python), "-c", RUNNER]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1400)


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FAILED" not in done.stdout, done.stdout[done.stdout.index("FAILED") :]


ENVIRONMENTS = pieces()


@pytest.mark.parametrize(
    "extras", sorted(ENVIRONMENTS, key=sorted), ids=lambda extras: ",".join(sorted(extras)) or "core"
)
def test_blocks_run_with_what_their_install_line_brings(extras, tmp_path):
    python = make_environment(tmp_path / "venv", extras)
    check(run(python, tmp_path / "work", last_of_each_page(ENVIRONMENTS[extras])))


def test_an_environment_has_no_more_than_its_extra(tmp_path):
    """The check sees what it is for: a package of another extra is not there."""
    python = make_environment(tmp_path / "venv", frozenset())
    done = run(
        python, tmp_path / "work", [Piece("one", ["import torch, diffusers"], ""), Piece("two", ["import compel"], "")]
    )
    assert done.returncode == 0
    assert done.stdout.startswith("FAILED\ntwo\n") and "No module named 'compel'" in done.stdout


def test_the_first_minutes_after_pip_install(tmp_path):
    """A real installation of the core, with what is newest today: README's blocks, the command, and a quiet demo."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "finelip_diffusion", source / "finelip_diffusion", ignore=shutil.ignore_patterns("__pycache__")
    )
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    done = subprocess.run([python, "-m", "pip", "install", "-q", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    core = [piece for piece in ENVIRONMENTS[frozenset()] if piece.name.startswith("README.md")]
    check(run(python, tmp_path / "work", core))

    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    commands = [
        [python, ROOT / "examples" / "demo.py", "--steps", "2", "--out", "demo.png"],
        [
            python.with_name("finelip"),
            "generate",
            "--prompt-file",
            "examples/long_prompt.txt",
            "--out",
            "out",
            "--steps",
            "2",
        ],
    ]
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path / "work", env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
        assert all("%|" in line for line in printed), done.stderr  # the bar of drawing, and no warning
