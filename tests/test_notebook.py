"""The notebook: its cells run in order on the bundled model, and show what its text says."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "first_steps.ipynb"


@pytest.fixture(scope="module")
def cells():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert all({"id", "cell_type", "metadata", "source"} <= set(cell) for cell in notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)  # small diffs: it is kept without
    return ["".join(cell["source"]) for cell in code]


def test_the_cells_run(cells, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    install, *rest = cells
    assert install == "%pip install -q finelip-diffusion"  # the one cell that only a notebook can run
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(rest, start=1):
        exec(compile(cell, f"{NOTEBOOK.name}, cell {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "tokens dropped" in printed and "nothing dropped" in printed
    found = dict(re.findall(r"(77 tokens|whole prompt): (\d) of 8 objects", printed))
    assert int(found["whole prompt"]) > int(found["77 tokens"])
    assert namespace["both"].size == (600, 290)
