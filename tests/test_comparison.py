"""From findings to the report: labels, distances with their differences, warnings, and which prompts are shown."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from transformers import CLIPTokenizer

from finelip_diffusion.evaluation import comparison
from finelip_diffusion.evaluation.adherence import Judge
from finelip_diffusion.evaluation.comparison import Findings, about, distances
from finelip_diffusion.evaluation.images import Condition, Prompt
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.metrics import cmmd, frechet_intervals, kernel_distance

CONDITIONS = [
    Condition("base", name, None, source, "truncate", "")
    for name, source in (("truncate", None), ("chunk", None), ("finelip", "runs/long"))
]


@pytest.mark.parametrize(
    ("key", "label", "group"),
    [
        ("found_after", "found after token 77", comparison.LONG),
        ("clip_score/long_clip", "CLIPScore, judged by long_clip", comparison.LONG),
        ("short_clip_score/clip", "CLIPScore, judged by clip", comparison.SHORT),
        ("fid", "Frechet distance, Inception", comparison.LIKENESS),
        ("inception_kid", "kernel distance, inception", comparison.LIKENESS),
        ("dinov2_fd", "Frechet distance, dinov2", comparison.LIKENESS),
        ("effnet_kid", "kernel distance, effnet", comparison.LIKENESS),
        ("cmmd", "CMMD", comparison.LIKENESS),
        ("cmmd/reconstructed", "CMMD", comparison.RECONSTRUCTED),
        ("effnet_fd/reconstructed", "Frechet distance, effnet", comparison.RECONSTRUCTED),
        ("fid/reconstructed", "Frechet distance, Inception", comparison.RECONSTRUCTED),
        ("state_drift_2", "drift, second encoder", comparison.SHORT),
        ("change_inside", "of it in the right cell", comparison.CHANGED),
    ],
)
def test_a_figure_says_what_it_is(key: str, label: str, group: str):
    found = about(key)
    assert (found["label"], found["group"]) == (label, group)
    assert found["better"] == (
        "lower" if group in (comparison.LIKENESS, comparison.RECONSTRUCTED) or "drift" in key else "higher"
    )


def test_distances_are_those_of_metrics_with_paired_differences():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(50, 6))
    seen = {"base/truncate": rng.normal(0.5, 1, (50, 6)), "base/finelip": reference + 0.1 * rng.normal(size=(50, 6))}
    found = distances("effnet_fd", seen, reference, "base/truncate", 20, 10)
    expected = frechet_intervals(seen, reference, baseline="base/truncate", num_resamples=10)
    kid = {key: kernel_distance(own, reference, 20) for key, own in seen.items()}
    for key in seen:
        assert found[key]["effnet_fd"] == expected[key]
        assert found[key]["effnet_kid"]["value"] == kid[key]["value"]
        assert "subsets" not in found[key]["effnet_kid"]
    paired = np.subtract(kid["base/finelip"]["subsets"], kid["base/truncate"]["subsets"])
    difference = found["base/finelip"]["effnet_kid"]["difference"]
    assert difference["value"] == pytest.approx(paired.mean())
    assert (difference["low"], difference["high"]) == pytest.approx(tuple(np.quantile(paired, (0.025, 0.975))))
    assert difference["high"] < 0
    assert found["base/truncate"]["effnet_kid"]["difference"] is None
    found = distances("effnet_fd", seen, reference, "base/truncate", 1000, 10)  # a subset is at most half of all
    assert (
        found["base/finelip"]["effnet_kid"]["value"] == kernel_distance(seen["base/finelip"], reference, 25)["value"]
    )
    assert distances("fid", seen, reference, "base/truncate", 20, 10)["base/finelip"].keys() == {
        "fid",
        "inception_kid",
    }
    found = distances("cmmd", seen, reference, "base/truncate", 20, 10)
    assert found["base/finelip"]["cmmd"]["value"] == pytest.approx(cmmd(seen["base/finelip"], reference))


def judge(source: str) -> Judge:
    return Judge("long", source, *[cast("Any", None)] * 3)


@pytest.mark.parametrize("source", ["runs/long", "runs/long/finelip_model"])
def test_an_encoder_that_judges_itself_alone_is_told(source: str):
    (found,) = comparison._warnings(5000, {"long": judge(source)}, CONDITIONS)
    assert "long judges its own encoder" in found
    assert comparison._warnings(5000, {"long": judge(source), "clip": judge("other")}, CONDITIONS) == []
    assert comparison._warnings(5000, {"clip": judge(str(BUNDLED_MODEL / "clip"))}, CONDITIONS) == []


def test_too_few_images_are_told():
    eye = cast("Any", SimpleNamespace(name="fid", dim=2048))
    (few,) = comparison._warnings(500, {"fid": eye}, CONDITIONS)
    assert "500 images are too few for 2,048 features" in few
    assert comparison._warnings(5000, {"fid": eye}, CONDITIONS) == []


def test_examples_are_the_best_the_worst_and_the_first():
    gains = [0.0, 3.0, -2.0, 1.0]
    base = Findings(points={"found": [[(10, 4.0)] for _ in gains]})
    own = Findings(points={"found": [[(10, 4.0 + gain)] for gain in gains]})
    findings = {CONDITIONS[0]: base, CONDITIONS[2]: own}
    prompts = [Prompt("long", index, f"prompt {index}") for index in range(4)]
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED_MODEL / "tokenizer")
    found = comparison._examples(findings, prompts, tokenizer, 2)
    assert [(each["kind"], each["index"]) for each in found] == [
        ("best", 1), ("best", 3), ("worst", 2), ("worst", 0), ("first", 0), ("first", 1)
    ]  # fmt: skip
    assert found[0]["scores"] == {"base/truncate": "4 of 1", "base/finelip": "7 of 1"}
    assert found[0]["images"]["base/finelip"] == str(Path("images/base/finelip/long/000001.png"))
    assert found[0]["kept_characters"] == len("prompt 1")
