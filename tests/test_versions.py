"""The table of versions is what a run was on, and its oldest column what pyproject.toml allows."""

import json
import re
from pathlib import Path

import pytest
import versions

ROOT = Path(__file__).resolve().parents[1]
REPORT = '<testsuites><testsuite errors="0" failures="{}" skipped="2" tests="12" time="90"/></testsuites>'


def test_a_run_that_passed_is_recorded_and_written(tmp_path, monkeypatch, capsys):
    page, report = tmp_path / "versions.md", tmp_path / "newest.xml"
    page.write_text("Before\n\n| | oldest | newest |\n|---|---|---|\n| torch | 2.6.0 | 1.0 |\n\nAfter | all\n")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "PAGE", page)
    monkeypatch.setattr(versions, "RECORDS", tmp_path)
    report.write_text(REPORT.format(1))
    with pytest.raises(SystemExit, match="only a run that passed is recorded"):
        versions.record("newest", report)
    report.write_text(REPORT.format(0))
    versions.record("newest", report)
    versions.write()
    run = json.loads((tmp_path / "newest.json").read_text())
    text = page.read_text()
    assert text.startswith("Before\n\n| | oldest | newest |\n") and text.endswith("|\n\nAfter | all\n")
    table = versions.rows(text)
    assert table["torch"] == {"oldest": "2.6.0", "newest": run["torch"]}
    assert table["tests"] == {"oldest": "", "newest": "10 passed, 2 skipped"}
    assert table["minutes"]["newest"] == "1.5"
    versions.write()
    assert page.read_text() == text


def test_the_oldest_column_is_the_lower_bounds():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = versions.rows(versions.PAGE.read_text(encoding="utf-8"))
    for package in versions.PACKAGES:
        bound = re.search(rf'"{package}>=([\d.]+)', project)
        assert bound, package
        assert table[package]["oldest"].startswith(bound[1]), package
