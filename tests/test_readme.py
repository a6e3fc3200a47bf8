"""The documentation keeps its word: its Python runs, and its commands name files, targets and flags that exist."""

import ast
import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import scripts

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
NO_RUN = re.compile(r"<!-- no-run: .+ -->")
# Commands that prepare a machine; there is nothing of ours in their arguments.
FOREIGN_COMMANDS = {"apt", "cd", "git", "pre-commit", "source"}


class Block(NamedTuple):
    document: Path
    line: int  # of the block's first line of code, counted from 1
    code: str
    runs: bool


def blocks(document: Path, language: str) -> list[Block]:
    """The fenced blocks of one language. A block directly below a `<!-- no-run: reason -->` does not run."""
    found, lines = [], document.read_text(encoding="utf-8").splitlines()
    opened = None
    for number, line in enumerate(lines):
        if opened is None and line.startswith("```"):
            opened = number
        elif opened is not None and line == "```":
            if lines[opened] == f"```{language}":
                runs = not (opened > 0 and NO_RUN.fullmatch(lines[opened - 1]))
                found.append(Block(document, opened + 2, "\n".join(lines[opened + 1 : number]), runs))
            opened = None
    assert opened is None, f"{document.name}:{opened + 1}: the block is never closed"
    return found


def in_place(block: Block):
    """The block's code, compiled so that a traceback names the document and its line."""
    return compile("\n" * (block.line - 1) + block.code, str(block.document), "exec")


def commands() -> list:
    """One parameter for each command line of the shell blocks, continued lines joined, comments dropped."""
    found = []
    for document in DOCUMENTS:
        for block in blocks(document, "bash"):
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found.append(pytest.param(words, id=f"{document.name}: {' '.join(words)[:60]}"))
    return found


@cache
def help_text(script: str) -> str:
    done = scripts.run(ROOT / script, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def help_of_finelip(command: str) -> str:
    code = "from finelip_diffusion.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def check_flags(words: list[str], text: str) -> None:
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text))
    unknown = {word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)} - known
    assert not unknown, f"no such flag: {sorted(unknown)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run(document, tmp_path, monkeypatch):
    """README's blocks each alone, a page of docs/ from top to bottom; files are written beside a link to examples/."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(document, "python"):
        if document.name == "README.md":
            namespace = {"__name__": "__main__"}
        code = in_place(block)
        if block.runs:
            exec(code, namespace)


def test_the_readme_is_read_in_a_minute():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert all(line.count("|") <= 6 for line in text.splitlines() if line.startswith("|"))  # five columns


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_imports_of_all_python_blocks_exist(document):
    """Blocks that need a download are not run, but what they import from the package has to be there."""
    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "finelip_diffusion":
                exec(compile(ast.Module([node], []), f"{document.name}:{block.line}", "exec"), {})


@pytest.mark.parametrize("words", commands())
def test_commands_exist(words):
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # VARIABLE=value in front
        words = words[1:]
    program, *rest = words
    if program in FOREIGN_COMMANDS:
        return
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        provided = set(importlib.metadata.metadata("finelip-diffusion").get_all("Provides-Extra"))
        assert {extra for group in extras for extra in group.split(",")} <= provided
    elif program == "finelip":
        check_flags(rest, help_of_finelip(rest[0]))
    elif program in {"python", "accelerate", "torchrun"}:
        if program != "python":  # a launcher's own flags stand before the script
            rest = rest[next(place for place, word in enumerate(rest) if word.endswith(".py")) :]
        script, *rest = rest
        if script == "-m":
            assert importlib.util.find_spec(rest[0]), f"no module {rest[0]}"
            return
        assert (ROOT / script).is_file(), f"no file {script}"
        check_flags(rest, help_text(script))
    else:
        pytest.fail(f"no check is written for '{program}': add one here, or leave the command out")


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
