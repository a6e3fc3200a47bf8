"""What the suite last ran on: recorded after a run that passed, and written into docs/versions.md.

python tests/versions.py record newest build/tests/newest.xml   # `make test` and `make test-oldest` end with this
python tests/versions.py write                                  # `make versions`
"""

import json
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "build" / "tests"
PAGE = ROOT / "docs" / "versions.md"
COLUMNS = ("oldest", "newest")
PACKAGES = (
    "torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "accelerate", "numpy", "pillow", "peft",
    "compel", "gradio",
)  # fmt: skip


def record(name: str, report: Path) -> None:
    """Writes the versions of this environment and what pytest's JUnit report says of the run."""
    suite = next(ElementTree.parse(report).getroot().iter("testsuite")).attrib
    tests, bad, skipped = (int(suite[key]) for key in ("tests", "failures", "skipped"))
    if bad or int(suite["errors"]):
        raise SystemExit(f"{report} holds failures: only a run that passed is recorded.")
    run = {"Python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    run |= {"tests": f"{tests - skipped} passed, {skipped} skipped", "minutes": f"{float(suite['time']) / 60:.1f}"}
    (RECORDS / f"{name}.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def rows(text: str) -> dict[str, dict[str, str]]:
    """The table of a page: row name to column to cell."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in cells[2:]}


def table(known: dict[str, dict[str, str]], runs: dict[str, dict[str, str]]) -> str:
    """The table with the columns of `runs` replaced."""
    names = ["Python", *PACKAGES, "tests", "minutes"]
    lines = ["| | oldest | newest |", "|---|---|---|"]
    for name in names:
        cells = [runs.get(column, {}).get(name) or known.get(name, {}).get(column, "") for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write() -> None:
    """Puts what was recorded into the page; a column without a record stays as it is."""
    text = PAGE.read_text(encoding="utf-8")
    records = {name: RECORDS / f"{name}.json" for name in COLUMNS}
    runs = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in records.items() if path.is_file()}
    new = table(rows(text), runs)
    PAGE.write_text(re.sub(r"(?:^\|.*\n)+", lambda _: new + "\n", text, count=1, flags=re.MULTILINE), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {' and '.join(runs) or 'nothing'} from the last runs")


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"]:
        record(sys.argv[2], Path(sys.argv[3]))
    else:
        write()
