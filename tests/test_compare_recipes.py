"""The comparison of recipes: what it runs, what it leaves, what it says of what is there and of what is missing."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import scripts
import torch
import yaml

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "compare_recipes.py"
SMALL = {
    "max_train_steps": 1, "train_batch_size": 8, "num_groups": 2, "num_probe_captions": 40, "num_short_prompts": 2,
    "num_drawn_prompts": 2, "num_inference_steps": 1, "recipes": "edited", "seeds": 3, "jobs": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_recipes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_recipes"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def flags(folder: Path, **more: object) -> list[str]:
    return [f"--{name}={value}" for name, value in (SMALL | {"output_dir": folder} | more).items()]


def test_a_run_leaves_small_results_and_is_not_made_again(tmp_path: Path) -> None:
    page = tmp_path / "recipes.md"
    done = scripts.run(SCRIPT, *flags(tmp_path / "out", page=page), bare=True)
    logs = [file.read_text()[-1500:] for file in (tmp_path / "out").glob("logs/*.txt")]
    assert done.returncode == 0, (done.stderr[-2000:], logs)
    files = sorted((tmp_path / "out" / "results").iterdir())
    names = ["chunk", "edited", "segment", "truncate", "untrained"]
    assert [file.stem for file in files] == [f"{name}-3" for name in names]
    assert all(file.stat().st_size < 20_000 for file in files)
    assert not (tmp_path / "out" / "work").exists()
    result = json.loads(files[1].read_text())
    assert len(result["hits"]["whole/global/text_to_image"]) == 16 and len(result["pictures"]) == 2
    text = page.read_text()
    purposes = [line.partition("**: ")[0] for line in text.splitlines()[:8] if line.startswith("- **")]
    assert purposes == ["- **For retrieval", "- **To plug into an unchanged UNet", "- **To tune through a UNet"]
    assert "for all parameters, float32, captions" in text and "No run is missing." in text
    assert "{" not in text and "5 of 5 runs are there" in done.stdout

    files[1].unlink()
    settings = json.loads(files[0].read_text())
    settings["settings"]["num_inference_steps"] = 7  # made under another budget: made again
    files[0].write_text(json.dumps(settings))
    given = {name: SMALL[name] for name in ("recipes", "seeds")} | {"output_dir": tmp_path / "out", "write_only": True}
    done = scripts.run(SCRIPT, *(f"--{name}={value}" for name, value in given.items()))  # the budget is remembered
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 of 5 runs are there" in done.stdout
    assert "Missing: seed 3 of chunk, edited." in done.stdout


def test_sweeps_vary_one_recipe(script: ModuleType, tmp_path: Path) -> None:
    files = sorted(script.SWEEPS.glob("*.yaml"))
    assert {file.stem for file in files} >= {
        "refined_share",
        "separate_shares",
        "adaptive_share",
        "margin",
        "clipping",
    }
    for file in files:
        sweep = script.read_sweep(file)
        names = [name for name, _ in sweep.variants.values()]
        assert len(set(names)) == len(names) >= 4 and not any("/" in name for name in names)
        assert len({json.dumps(content, sort_keys=True) for _, content in sweep.variants.values()}) == len(names)
    shares = script.read_sweep(script.SWEEPS / "refined_share.yaml")
    assert [content["refined_share"] for _, content in shares.variants.values()] == [0.05, 0.1, 0.2, 0.35, 0.5]
    with pytest.raises(ValueError, match="there is no sweep 'width': choose among adaptive_share, clipping, margin"):
        script.read_sweep(script.SWEEPS / "width.yaml")
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"base": "finelip", "title": "x"}))
    with pytest.raises(ValueError, match=r"one.yaml is not a sweep: it has base, title and values"):
        script.read_sweep(tmp_path / "one.yaml")


def test_a_first_stage_has_no_row_of_its_own(script: ModuleType) -> None:
    recipes, sweeps = script.wanted_recipes(script.Arguments())
    stages = {content["after"] for content in recipes.values() if "after" in content}
    assert stages and not stages & recipes.keys() and not sweeps
    with pytest.raises(ValueError, match="there is no recipe 'fineclip': choose among"):
        script.wanted_recipes(script.Arguments(recipes=["fineclip"]))
    with pytest.raises(ValueError, match="--train_batch_size is 12, but groups have eight"):
        script.Arguments(train_batch_size=12)
    with pytest.raises(ValueError, match="--jobs is 0, but must be at least 1"):
        script.Arguments(jobs=0)


def result(recipe: str, seed: int, hits: str, pictures: list[list[int]], **more: Any) -> dict[str, Any]:
    names = [f"{view}/{score}/{way}" for view in ("whole", "without_first") for score in ("global", "finelip")
             for way in ("text_to_image", "image_to_text", "text_to_image/group", "image_to_text/group")]  # fmt: skip
    return {
        "recipe": recipe, "seed": seed, "score": None, "hits": dict.fromkeys(names, hits), "pictures": pictures,
        "probes": {"cell": 0.5, "colour": 0.4, "shape": 0.3, "size": 0.6}, "cpu_seconds": 1.0,
        "drift": {"last": 0.1, "last but one": 0.2}, "settings": {"recipe": {}}, "tune_steps": 0,
    } | more  # fmt: skip


def test_figures_are_means_over_seeds_and_intervals_over_what_was_drawn(script: ModuleType) -> None:
    """Two groups of eight; two prompts, one of three facts and one of one after token 77."""
    one = [result("one", 0, "1" * 8 + "0" * 8, [[2, 2, 3, 3], [0, 1, 0, 1]]),
           result("one", 1, "1" * 16, [[1, 2, 0, 3], [1, 1, 1, 1]])]  # fmt: skip
    other = [result("other", 0, "0" * 16, [[0, 2, 0, 3], [0, 1, 0, 1]])]
    hits = script.pooled(one, "whole/global/text_to_image")
    assert hits.tolist() == [1.0] * 8 + [0.5] * 8 and script.interval(hits)["value"] == 0.75
    assert script.recall(one, "pictures", True)["value"] == pytest.approx((3 * 0.5 + 0.5) / 4)
    assert script.recall(one, "pictures", False)["value"] == pytest.approx((0.75 * 2 + 0.5) / 3)
    assert script.recall(one, "tuned", True) is None
    values, prompts = script.facts(one, "pictures", True)
    assert prompts.tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(values, torch.tensor([0.5] * 4, dtype=torch.float64))
    results = {"untrained": other, "one": one, "other": other, "chunk": [{"pictures": [[0, 2, 1, 3], [0, 1, 1, 1]]}]}
    table = "\n".join(script.tables(results))
    assert "| one | 0.750 [0.500, 1.000] |" in table and "| chunk | – | 0.000" in table
    difference = "\n".join(script.paired(results, "one", ["other"]))
    assert "+0.750 [+0.500, +1.000]" in difference and "1 of 1" in difference
    assert "Higher: `one`. Lower: none. No clear difference: `other`." in script.readings(results)[0]
    assert not any("Tuned" in line for line in script.readings(results))
    tuned = {"tuned": [[2, 2, 3, 3], [1, 1, 1, 1]]}
    both = results | {"untrained": [other[0] | {"tuned": other[0]["pictures"]}], "one": [one[0], one[1] | tuned]}
    said = next(line for line in script.readings(both) if "Tuned" in line)
    assert said.endswith("Higher: `one`. Lower: none. No clear difference: none.")  # the seeds that were tuned
    assert not script.paired(results, "one", ["chunk", "one"])
    assert {"no_atrm", "finelip_local"} <= set(script.bases()["finelip"])
    said = script.choices(results)
    assert (
        said[0].startswith("- **For retrieval**: `one`, R@1 0.750") and "`one`" in said[1] and "chunk 0.000" in said[1]
    )
    none = script.choices({"untrained": one, "other": other})[0]
    assert none.startswith(
        "- **For retrieval**: no recipe clearly beats stretching alone under this budget. The best is `other`"
    )


def test_sweeps_are_plotted_with_their_intervals(script: ModuleType, tmp_path: Path) -> None:
    variants = {"0.1": ("margin=0.1", {}), "0.2": ("margin=0.2", {})}
    sweep = script.Sweep("margin", "finelip", "Margin", variants)
    results = {name: [result(name, 0, "1" * 8 + "0" * 8, [[1, 2, 1, 3]] * 2)] for name, _ in sweep.variants.values()}
    assert not script.plot_sweeps([sweep], {}, tmp_path / "none.svg") and not (tmp_path / "none.svg").exists()
    assert script.plot_sweeps([sweep], results, tmp_path / "sweeps.svg")
    drawing = (tmp_path / "sweeps.svg").read_text()
    assert drawing.count("<svg") == 1 and "LineCollection" in drawing
    assert (
        script.plot_sweeps([sweep], results, tmp_path / "again.svg")
        and (tmp_path / "again.svg").read_text() == drawing
    )
    assert "| 0.1 | 0.500 [0.000, 1.000] |" in "\n".join(script.sweep_tables([sweep], results))
    assert not script.sweep_readings([sweep], results)
    results["finelip"] = [result("finelip", 0, "0" * 16, [[1, 2, 1, 3]] * 2)]
    table = "\n".join(script.sweep_tables([sweep], results))
    assert "| +0.500 [0.000, +1.000] | 0.333 [0.333, 0.333] | 0.000 [0.000, 0.000] |" in table
    said = script.sweep_readings([sweep], results)[0]
    assert said.startswith("- **Margin**, compared with `finelip`. R@1. Higher: none. Lower: none. No clear diff")
    assert "difference: `0.1`, `0.2`." in said
