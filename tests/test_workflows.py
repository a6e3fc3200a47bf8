"""GitHub's workflows as far as they can be checked here: they parse, and what they name exists."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".github"
WORKFLOWS = sorted((FOLDER / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def read(path: Path) -> dict:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in content.items()}  # YAML 1.1 reads `on` as true


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_names_what_exists(path):
    workflow = read(path)
    assert set(workflow) <= {"name", "on", "permissions", "concurrency", "jobs", "env"}
    assert workflow["permissions"] == {"contents": "read"}  # each job asks for more by itself
    for job in workflow["jobs"].values():
        assert {"runs-on", "steps", "timeout-minutes"} <= set(job)
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(workflow["jobs"])
        matrix = job.get("strategy", {}).get("matrix", {})
        assert set(re.findall(r"matrix\.(\w+)", str(job))) == set(matrix)
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"])
                named = step.get("with", {}).get("cache-dependency-path")
                assert named is None or (ROOT / named).is_file()
            elif step["run"].startswith("make "):
                assert set(step["run"].split()[1:]) <= TARGETS
            for file in re.findall(r"--[a-z]+-file (\S+)", step.get("run", "")):
                assert (ROOT / file).is_file()


def test_the_suite_runs_on_every_python_that_is_supported():
    jobs = read(FOLDER / "workflows" / "tests.yml")["jobs"]
    assert jobs["newest"]["strategy"]["matrix"]["python"] == jobs["oldest"]["strategy"]["matrix"]["python"] == PYTHONS
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project) == PYTHONS
    assert f'requires-python = ">={PYTHONS[0]}"' in project


def test_publishing_needs_no_password():
    workflow = read(FOLDER / "workflows" / "publish.yml")
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["steps"][-1]["uses"] == "pypa/gh-action-pypi-publish@release/v1"
    assert "secrets." not in str(workflow)


@pytest.mark.parametrize("path", sorted((FOLDER / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.name)
def test_an_issue_template_is_a_form(path):
    form = read(path)
    assert set(form) == {"name", "description", "labels", "body"}
    for part in form["body"]:
        assert part["type"] in {"textarea", "input", "markdown", "dropdown", "checkboxes"}
        assert part["attributes"]["label"]
    assert len({part["id"] for part in form["body"]}) == len(form["body"])
