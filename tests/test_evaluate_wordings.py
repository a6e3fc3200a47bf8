"""The script behind the wording figures of docs/scenes.md, run as a user runs it."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripts
from diffusers import UNet2DConditionModel
from PIL import Image

from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.scenes import IMAGE_SIZE, describe, render, repainted, sample_scene
from finelip_diffusion.tokenizer import clip_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train" / "evaluate_wordings.py"


def test_the_report_has_every_prompt_and_its_share(tmp_path: Path) -> None:
    flags = ["--num_prompts", 2, "--num_inference_steps", 8, "--sets", "splits", "anywhere", "window", "sample"]
    done = scripts.run(SCRIPT, "--output_dir", tmp_path, *flags, bare=True)
    assert done.returncode == 0, done.stderr[-2000:]
    sets = json.loads((tmp_path / "report.json").read_text())["sets"]
    assert list(sets["splits"]) == ["sentences", "all", "unseen"]
    for rows in sets.values():
        for row in rows.values():
            facts = [fact for prompt in row["prompts"] for fact in prompt["facts"]]
            assert row["found"]["n"] == len(facts)
            assert row["found"]["value"] == pytest.approx(sum(fact["found"] for fact in facts) / len(facts))
            assert row["before"]["n"] + row["after"]["n"] == len(facts)
            assert row["after 190"]["n"] == sum(fact.get("token", 0) > 190 for fact in facts)
    assert all(row["after 190"]["n"] > 1 for row in sets["window"].values())
    assert sets["splits"]["sentences"]["found"]["value"] > 0.6  # what the bundled model was made for
    for name in ("all", "unseen"):
        row = sets["splits"][name]
        assert sum(each["found"]["n"] for each in row["wordings"].values()) == row["found"]["n"]
    text = (tmp_path / "report.md").read_text()
    assert "| sentences |" in text
    assert "## splits, unseen, by wording" in text
    assert "## window, late" not in text  # of one wording
    assert Image.open(tmp_path / "sample.png").size == (5 * (2 * IMAGE_SIZE + 12), IMAGE_SIZE + 6)


def test_a_run_is_compared_with_another_on_the_same_prompts(tmp_path: Path) -> None:
    flags = ["--num_prompts", 3, "--num_inference_steps", 6, "--sets", "splits"]
    done = scripts.run(SCRIPT, "--output_dir", tmp_path / "one", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    flags += ["--compared_with", tmp_path / "one"]
    done = scripts.run(SCRIPT, "--output_dir", tmp_path / "two", *flags, "--long_prompt", "truncate")
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["sets"]["splits"] for name in ("one", "two"))
    for name, row in two.items():
        shares = [
            [sum(fact["found"] for fact in prompt["facts"]) / len(prompt["facts"]) for prompt in side["prompts"]]
            for side in (row, one[name])
        ]
        mean = sum(new - old for new, old in zip(*shares, strict=True)) / 3
        assert row["difference"]["value"] == pytest.approx(mean, abs=1e-6)
        assert row["difference"]["n"] == 3
    assert two["sentences"]["difference"]["value"] < 0  # what follows token 77 is not read
    assert "| after 190 | difference | facts |" in (tmp_path / "two" / "report.md").read_text()
    done = scripts.run(SCRIPT, "--output_dir", tmp_path / "two", *flags, "--first_seed", 1)
    assert "has other prompts of splits, sentences: give both runs the same" in done.stderr.splitlines()[-1]
    done = scripts.run(SCRIPT, "--output_dir", tmp_path / "two", "--compared_with", tmp_path / "none")
    assert f"--compared_with {tmp_path / 'none'} has no report.json in it" in done.stderr.splitlines()[-1]


def test_a_run_goes_on_where_one_was_killed(tmp_path: Path) -> None:
    """Rows that are there stay, others are drawn as they would have been, and other settings are not mixed in."""
    flags = ["--output_dir", tmp_path, "--num_prompts", 2, "--num_inference_steps", 2, "--sets", "splits"]
    done = scripts.run(SCRIPT, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    file = tmp_path / "report.json"
    straight = json.loads(file.read_text())
    cut = json.loads(file.read_text())
    del cut["sets"]["splits"]["unseen"]
    marked = cut["sets"]["splits"]["sentences"]["prompts"][0]["facts"][0]
    marked["found"] = not marked["found"]  # it is seen which rows are drawn again
    cut["sets"]["splits"]["all"]["prompts"][1]["prompt"] = "of an older version of the captions"
    file.write_text(json.dumps(cut))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text(json.dumps(straight))
    done = scripts.run(SCRIPT, *flags, "--resume", True, "--compared_with", tmp_path / "other")
    assert done.returncode == 0, done.stderr[-2000:]
    resumed = json.loads(file.read_text())["sets"]["splits"]
    for name in ("all", "unseen"):
        assert resumed[name].pop("difference")["value"] == 0
        assert resumed[name] == straight["sets"]["splits"][name]
    assert resumed["sentences"]["prompts"] == cut["sets"]["splits"]["sentences"]["prompts"]
    done = scripts.run(SCRIPT, *flags, "--resume", True, "--guidance_scale", 5, "--long_prompt", "chunk")
    assert done.returncode != 0
    assert "has other settings of --guidance_scale, --long_prompt: give the same" in done.stderr.splitlines()[-1]
    done = scripts.run(SCRIPT, *flags, "--sets", "anywhere")
    assert list(json.loads(file.read_text())["sets"]) == ["anywhere"]  # without the flag it begins anew


def test_another_unet_is_the_one_that_draws(tmp_path: Path) -> None:
    config = UNet2DConditionModel.load_config(BUNDLED_MODEL / "unet")
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "unet")  # of random weights
    flags = ["--num_prompts", 2, "--num_inference_steps", 2, "--sets", "people", "--unet", tmp_path / "unet"]
    done = scripts.run(SCRIPT, "--output_dir", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    sets = json.loads((tmp_path / "out" / "report.json").read_text())["sets"]
    assert sets["people"]["people's words"]["found"]["value"] == 0
    done = scripts.run(SCRIPT, "--output_dir", tmp_path / "out", "--unet", tmp_path / "none")
    assert f"--unet {tmp_path / 'none'} has no config.json in it" in done.stderr.splitlines()[-1]


def test_pictures_in_another_style_are_read_back_into_what_was_told(tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    scenes = [sample_scene(seed, "test") for seed in range(4)]
    captions = [describe(scene, seed) for seed, scene in enumerate(scenes)]

    class Painter:
        tokenizer = clip_tokenizer(248)

        def __call__(self, prompts: list[str], **_: object) -> SimpleNamespace:
            return SimpleNamespace(images=[render(repainted(scene)) for scene in scenes])

    shares = []
    for painted in (False, True):
        args = script["Arguments"](output_dir=tmp_path, repainted=painted, unet=BUNDLED_MODEL / "unet")
        facts = [fact for row in script["drawn"](Painter(), captions, args, "sentences") for fact in row["facts"]]
        shares.append(sum(fact["found"] for fact in facts) / len(facts))
    assert shares == [0, 1]
    with pytest.raises(ValueError, match="--repainted is for a UNet of the stage restyle .*: give it as --unet"):
        script["Arguments"](output_dir=tmp_path, repainted=True)


def test_what_find_facts_reads_needs_no_model(tmp_path: Path) -> None:
    flags = ["--sets", "reading", "--num_prompts", 3, "--model", tmp_path / "none"]
    assert scripts.run(SCRIPT, "--output_dir", tmp_path, *flags).returncode == 0
    rows = json.loads((tmp_path / "report.json").read_text())["sets"]["reading"]
    assert rows["people's words"]["precision"]["value"] > 0.95
    assert rows["people's words"]["recall"]["value"] > 0.7


def test_odd_flags_are_one_sentence(tmp_path: Path) -> None:
    done = scripts.run(SCRIPT, "--output_dir", tmp_path / "out", "--sets", "poems")
    assert done.returncode != 0
    assert "--sets has poems: choose among splits" in done.stderr.splitlines()[-1]


def test_peoples_prompts_state_cells_of_their_own() -> None:
    rows = json.loads((ROOT / "examples" / "peoples_words.json").read_text())
    assert len(rows) == 24
    for row in rows:
        cells = [item["cell"] for item in row["objects"]]
        assert cells and len(set(cells)) == len(cells)
