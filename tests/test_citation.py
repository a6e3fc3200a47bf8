"""CITATION.cff stays readable and in step with the package."""

from pathlib import Path

import yaml

import finelip_diffusion

ROOT = Path(__file__).resolve().parents[1]


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == finelip_diffusion.__version__
    assert citation["license"] == "Apache-2.0"
    papers = {reference["url"].rsplit("/", 1)[-1] for reference in citation["references"]}
    assert {"2504.01916", "2403.15378"} <= papers
    for entry in [citation, *citation["references"]]:
        assert entry["title"]
        for author in entry["authors"]:
            assert author.get("name") or (author["family-names"] and author["given-names"])
