"""Recipes: every preset is read, every mistake is one sentence, and a new loss is one function."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finelip_diffusion import losses
from finelip_diffusion.model import FineLIPOutput
from finelip_diffusion.objective import HEADS, Objective
from finelip_diffusion.recipes import Recipe, make_recipe, read_content, read_recipe

FOLDER = Path(__file__).resolve().parents[1] / "train" / "recipes"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
FURTHER = {  # what losses may name beside the model's output and heads
    "same", "short_embeds", "sub_embeds", "sub_spans", "kept_embeds", "kept_states", "kept_penultimate", "kept_mask",
    "teacher_kept_embeds", "teacher_kept_states", "teacher_kept_penultimate", "teacher_image_embeds",
    "span_embeds", "edited_embeds", "edited_valid", "progress",
}  # fmt: skip
LOSSES = {
    "global_loss": ["infonce", "sigmoid", "hn_clip", "infoloob", "cloob", "softened", "neg_clip"],
    "coarse": ["pca_image", "edited"],
    "local_loss": ["finelip", "filip", "sparc", "laps", "flair", "beta_clip", "goal_text_span"],
    "preserve": ["token", "hycd", "affinity", "proclip", "lwf"],
}
CAPTIONS = {
    "pca_image": "debias", "flair": "merged_captions", "beta_clip": "sub_captions", "goal_text_span": "sub_captions",
}  # fmt: skip


def content(name: str) -> dict[str, Any]:
    return read_content(FOLDER / f"{name}.yaml")


# --- presets --------------------------------------------------------------------------------------------------------


def test_the_presets_are_there() -> None:
    wanted = "finelip no_atrm no_clim visual_only infonce kps_infonce long_clip debias filip sparc laps flair goal"
    later = "finelip_local edited edited_before edited_after neg_clip hn_clip beta_clip infoloob cloob pyramid_clip "
    later += "light_clip la_clip curriculum hycd affinity lwf proclip finelip_preserve"
    assert set(PRESETS) >= {*wanted.split(), *later.split()}


def test_every_loss_is_in_a_preset_or_named_here() -> None:
    """A loss that no row of the comparison has was never trained side by side with the others."""
    used = {term.name for name in PRESETS for term in read_recipe(FOLDER / f"{name}.yaml").terms.values()}
    assert losses.CONTRASTIVE.keys() | losses.PRESERVING.keys() == used | {"sigmoid"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_read(name: str) -> None:
    recipe = read_recipe(FOLDER / f"{name}.yaml")
    assert recipe.name == name and recipe.description and recipe.terms
    assert recipe.resolved == content(name)
    assert recipe.logit_scale is not None
    assert (recipe.learning_rate == 1e-6) == (recipe.position == "kps")  # rotary positions have all to learn


def test_finelip_is_as_published() -> None:
    """The numbers of the authors' training script."""
    recipe = read_recipe(FOLDER / "finelip.yaml")
    ((key, term),) = recipe.terms.items()
    assert (key, term.name, term.weight, term.loss) == ("local_loss", "finelip", 1.0, losses.CONTRASTIVE["finelip"])
    assert term.settings == {"interaction": "clim", "objective": "triplet", "margin": 0.2}
    assert (recipe.position, recipe.captions, recipe.refine) == ("kps", "full", ("image", "text"))
    assert (recipe.parameters, recipe.image_tower, recipe.logit_scale) == ("full", "trained", 100)
    assert (recipe.learning_rate, recipe.head_learning_rate, recipe.weight_decay) == (1e-6, 2e-4, 0.01)
    assert (recipe.lr_warmup_steps, recipe.loss_warmup_epochs, recipe.max_grad_norm) == (200, 1, 0)


@pytest.mark.parametrize(("name", "norm"), [("finelip", 0), ("long_clip", 0), ("laps", 2), ("flair", 0), ("goal", 0)])
def test_gradients_are_clipped_where_the_authors_clip_them(name: str, norm: float) -> None:
    assert "max_grad_norm" in content(name)
    assert read_recipe(FOLDER / f"{name}.yaml").max_grad_norm == norm


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("finelip_local", {"global_tokens": False}),
        ("no_atrm", {"refine": []}),
        ("visual_only", {"refine": ["image"]}),
        ("no_clim", {"local_loss": {"finelip": {"interaction": "mean", "objective": "triplet", "margin": 0.2}}}),
        ("infonce", {"local_loss": {"finelip": {"interaction": "clim", "objective": "infonce"}}}),
    ],
)
def test_an_ablation_changes_one_thing(name: str, changed: dict[str, Any]) -> None:
    ablation = content(name)
    expected = content("finelip") | changed | {"description": ablation["description"]}
    assert ablation == expected


def test_finelip_preserve_adds_one_term() -> None:
    ours, finelip = content("finelip_preserve"), content("finelip")
    assert list(ours.pop("preserve")) == ["token"]
    assert ours | {"description": ""} == finelip | {"description": ""}


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, names in LOSSES.items() for name in names])
def test_a_loss_reads_what_there_is(key: str, name: str) -> None:
    recipe = make_recipe("one", {key: name, "captions": CAPTIONS.get(name, "full"), "num_edits": 2})
    ((found, term),) = recipe.terms.items()
    assert (found, term.name, term.weight, term.settings) == (key, name, 1.0, {})
    assert set(term.loss.reads) <= {field.name for field in fields(FineLIPOutput)} | FURTHER | HEADS.keys()
    assert not set(term.loss.reads) & {"margin", "label_smoothing", "keep", "components"}


def test_a_base_lends_what_a_recipe_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("local_loss: finelip\nrefine: [image]\nlearning_rate: 3e-5")
    (tmp_path / "middle.yaml").write_text("base: below\nrefine: []\nrefined_share: 0.1")
    (tmp_path / "top.yaml").write_text("base: middle\ndescription: of two")
    recipe = read_recipe(tmp_path / "top.yaml")
    assert (recipe.name, recipe.description, recipe.refine) == ("top", "of two", ())
    assert (recipe.learning_rate, recipe.refinement["refined_share"]) == (3e-5, 0.1)
    assert "base" not in recipe.resolved
    (tmp_path / "below.yaml").write_text("base: top")
    assert_one_sentence("below.yaml: base is 'top', not the name of another", read_recipe, tmp_path / "top.yaml")
    (tmp_path / "top.yaml").write_text("base: absent")
    assert_one_sentence("there is no recipe 'absent'", read_recipe, tmp_path / "top.yaml")


def test_weight_and_settings() -> None:
    recipe = make_recipe("one", {"local_loss": {"finelip": {"weight": 0.5, "margin": 0.1}}, "preserve": "none"})
    (term,) = recipe.terms.values()
    assert (term.weight, term.settings) == (0.5, {"margin": 0.1})
    assert recipe.preserve is None
    assert (
        make_recipe("one", {"local_loss": {"filip": None}}).local_loss
        == make_recipe("one", {"local_loss": "filip"}).local_loss
    )


def test_numbers_may_be_written_as_text() -> None:
    """YAML reads 1e-6, without a point, as text."""
    recipe = make_recipe("one", {"local_loss": "filip", "learning_rate": "1e-6", "logit_scale": "none"})
    assert recipe.learning_rate == 1e-6 and recipe.logit_scale is None


def test_a_new_loss_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def cosine(image_embeds: Tensor, text_embeds: Tensor, logit_bias: Tensor, *, power: float = 1.0) -> Tensor:
        return (1 - (image_embeds * text_embeds).sum(-1)).pow(power).sum() + 0 * logit_bias

    reads = ("image_embeds", "text_embeds", "logit_bias")
    monkeypatch.setitem(losses.CONTRASTIVE, "cosine", losses.Loss(cosine, reads))
    recipe = make_recipe("mine", {"global_loss": {"cosine": {"power": 2, "weight": 3}}, "local_loss": "filip"})
    objective = Objective(recipe, width=2, num_refined_tokens=1)
    assert objective.needs >= {"image_embeds", "text_embeds", "image_tokens"}
    assert [name for name, _ in objective.named_parameters()] == ["logit_bias"]
    tokens, ids = torch.eye(2).expand(2, 2, 2), torch.arange(2)
    embeds = {"image_embeds": torch.eye(2), "text_embeds": torch.eye(2).flip(0), "image_tokens": tokens}
    rest = {"text_tokens": tokens, "text_mask": torch.ones(2, 2, dtype=torch.bool), "logit_scale": torch.ones(())}
    terms = objective(embeds | rest | {"image_ids": ids})
    assert terms.keys() == {"cosine", "filip"} and terms["cosine"] == 3 * (1 + 1)


# --- mistakes -------------------------------------------------------------------------------------------------------


def assert_one_sentence(sentence: str, function: Any, *args: Any) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        function(*args)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"learning_rat": 1},
            "the unknown key 'learning_rat': choose among description, after, position, max_length",
        ),
        ({"name": "mine"}, "unknown key 'name'"),
        ({"local_loss": "fineclip"}, "local_loss is 'fineclip', not none or one of beta_clip, cloob, edited"),
        ({"local_loss": "token"}, "local_loss is 'token', not none or one of"),
        ({"local_loss": "triplet_margin_loss"}, "is 'triplet_margin_loss', not none or one of"),
        ({"local_loss": "_valid"}, "is '_valid', not none or one of"),
        ({"local_loss": "late_interaction"}, "is 'late_interaction', not none or one of"),
        (
            {"preserve": "finelip"},
            "preserve is 'finelip', not none or one of affinity, distill, hycd, lwf, proclip, token",
        ),
        ({"local_loss": 3}, "local_loss is 3, not none or one of"),
        ({"local_loss": {"finelip": {"margn": 1}}}, "has no setting 'margn'; it has weight, interaction, objective"),
        ({"local_loss": {"filip": {"logit_scale": 1}}}, "filip has no setting 'logit_scale'; it has weight"),
        ({"local_loss": "none"}, "has no loss: give global_loss, local_loss"),
        ({"position": "alibi"}, "position is 'alibi', not one of kps"),
        ({"captions": "short"}, "captions is 'short', not one of full, first_sentence, debias, sub_captions, mer"),
        ({"captions": None}, "captions is None, not one of full"),
        ({"parameters": "half"}, "parameters is 'half', not one of full, lora, svd"),
        ({"image_tower": "locked"}, "image_tower is 'locked', not one of trained, frozen"),
        ({"refine": ["image", "video"]}, "refine holds 'video', not image or text"),
        ({"coarse": "pca_image"}, "pca_image compares short_embeds, .* choose captions: first_sentence or debias"),
        ({"local_loss": "flair"}, "flair compares sub_embeds, .* captions: full does not draw; .*: sub_captions or m"),
        ({"local_loss": "goal_text_span", "captions": "merged_captions"}, "goal_text_span compares span_embeds"),
        ({"coarse": "edited"}, "edited compares edits of captions: choose num_edits"),
        ({"after": 3}, "after is 3, not a text"),
        ({"edit_place": "late"}, "edit_place is 'late', not one of any, before, after"),
        ({"rewrites": "yes"}, "rewrites is 'yes', not true or false"),
        ({"length_curriculum": 1.5}, "length_curriculum is 1.5, but a share is at most 1"),
        ({"refined_share": 0}, "refined_share is 0, but must be a number of at least 0.001"),
        ({"local_loss": "flair", "captions": "debias"}, "flair compares sub_embeds"),
        ({"coarse": "pca_image", "captions": "sub_captions"}, "pca_image compares short_embeds"),
        ({"max_grad_norm": -1}, "max_grad_norm is -1, but must be a number of at least 0"),
        ({"learning_rate": -1e-6}, "learning_rate is -1e-06, but"),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps is -1"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', not a number"),
        ({"lora_rank": [8]}, "lora_rank is .8., not a number"),
        ({"learning_rate": None}, "learning_rate is None, not a number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, but must be a number of at least 0"),
        ({"num_sub_captions": 2.5}, "num_sub_captions is 2.5, but must be a whole number of at least 1"),
        ({"logit_scale": 0}, "logit_scale is 0, but must be a number of at least 1"),
        ({"refine": 3}, "refine holds 3, not image or text"),
        ({3: 4, "x": 5}, "the unknown key 3"),
        ({"local_loss": {"finelip": {}, "filip": {}}}, "not none or one of"),
        ({"local_loss": ["finelip"]}, "local_loss is .'finelip'., not none or one of"),
        ({"local_loss": {"finelip": 3}}, "the settings of finelip are 3, not .setting: value."),
        ({"local_loss": {"finelip": {"weight": -1}}}, "weight is -1, but must be a number of at least 0"),
        ({"local_loss": {"finelip": {"weight": "much"}}}, "weight is 'much', not a number"),
        ({"local_loss": {"finelip": {"margin": "wide"}}}, "margin is 'wide', not a number"),
        ({"local_loss": {"finelip": {"interaction": "sum"}}}, "interaction is 'sum', not one of clim, mean"),
        ({"coarse": {"pca_image": {"components": 2.5}}}, "components is 2.5, but must be a whole number"),
        ({"global_loss": "finelip"}, "names finelip twice: give it once"),
    ],
)
def test_a_mistake_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    assert_one_sentence(f"the recipe.*{sentence}", make_recipe, "mine", {"local_loss": "finelip"} | change)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("local_loss: finelip")
    assert_one_sentence("no recipe 'absent'; beside it are: other", read_recipe, tmp_path / "absent.yaml")
    assert_one_sentence("beside it are: none", read_recipe, tmp_path / "folder/absent.yaml")
    for name, written in {
        "broken.yaml": b"local_loss: {finelip: [",
        "tag.yaml": b"local_loss: !!python/object/apply:os.getcwd []",
        "latin.yaml": b"description: caf\xe9",
    }.items():
        (tmp_path / name).write_bytes(written)
        assert_one_sentence(f"{name} is not a readable YAML file", read_recipe, tmp_path / name)
    assert_one_sentence("is not a readable YAML file", read_recipe, tmp_path)
    for text in ("", "finelip", "- finelip"):
        (tmp_path / "list.yaml").write_text(text)
        assert_one_sentence("list.yaml holds no recipe: a mapping of keys", read_recipe, tmp_path / "list.yaml")
    (tmp_path / "typo.yaml").write_text("local_los: finelip")
    assert_one_sentence("typo.yaml has the unknown key 'local_los'", read_recipe, tmp_path / "typo.yaml")


def test_a_recipe_cannot_be_changed() -> None:
    recipe = make_recipe("one", {"local_loss": "filip"})
    assert isinstance(recipe, Recipe)
    with pytest.raises(AttributeError):
        recipe.learning_rate = 1.0  # type: ignore[misc]
