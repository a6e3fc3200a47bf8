"""Models are judged by the scores that they were trained for: heads are read, and scores equal plain loops."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTokenizer

from finelip_diffusion.data.datasets import Example
from finelip_diffusion.evaluation.retrieval import embed_gallery, evaluate, token_scores
from finelip_diffusion.heads import HEADS_FILE, load_heads, own_score
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.model import FineLIPConfig, FineLIPModel, load_clip
from finelip_diffusion.objective import Objective, TrainingStep
from finelip_diffusion.recipes import Recipe, read_recipe
from finelip_diffusion.scenes import describe, render, sample_scene

E = 16
RECIPES = Path(__file__).resolve().parents[1] / "train" / "recipes"
TOKENIZER = CLIPTokenizer.from_pretrained(BUNDLED_MODEL / "tokenizer")
PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def model() -> FineLIPModel:
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(TOKENIZER), "max_position_embeddings": 248,
                    "bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id}  # fmt: skip
    vision = tower | {"image_size": 32, "patch_size": 8}
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=E, initializer_factor=5.0)
    return FineLIPModel(FineLIPConfig(clip, refine_image=False, refine_text=False)).eval()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    scenes = [sample_scene(seed, num_objects=(2, 6)) for seed in range(5)]
    captions = [describe(scene, 3) for scene in scenes]
    return [Example(render(s), str(c), str(n), str(n)) for n, (s, c) in enumerate(zip(scenes, captions, strict=True))]


def trained(model: FineLIPModel, recipe: str, folder: Path, named: bool = True) -> tuple[Path, Objective]:
    """A folder as training leaves it: the model, and the heads of the recipe's objective, at weights that tell."""
    own = read_recipe(RECIPES / f"{recipe}.yaml")
    torch.manual_seed(1)
    objective = Objective(own, E, 3).eval()
    for parameter in objective.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    term = own.local_loss
    assert term is not None
    model.config.score, model.config.score_settings = (term.name, term.settings) if named else (None, None)
    model.save_pretrained(folder)
    if state := {f"objective.{name}": tensor for name, tensor in objective.state_dict().items()}:
        save_file(state, folder / HEADS_FILE)
    return folder, objective


def plain_laps(objective: Objective, image: Tensor, text: Tensor) -> list[Tensor]:
    """Of one image (1 + P, E) and one caption (T, E) without padding."""
    patches = image[1:]
    directions = F.normalize(patches, dim=-1)
    both = F.normalize(patches.mean(0), dim=0), F.normalize(text.mean(0), dim=0)
    counts = directions @ both[0] + directions @ both[1]
    order = counts.argsort(descending=True)
    chosen, left = order[: len(patches) // 2], order[len(patches) // 2 :]
    fused = (patches[left] * counts[left].softmax(0)[:, None]).sum(0)
    slim = torch.cat([image[:1], objective.aggregation(patches[chosen][None])[0], fused[None]])
    similarity = F.leaky_relu(F.normalize(text, dim=-1) @ F.normalize(slim, dim=-1).T, 0.1)
    return [similarity.amax(1).mean() + similarity.amax(0).mean()] * 2


def plain_flair(objective: Objective, image: Tensor, text: Tensor) -> list[Tensor]:
    """The caption's end token asks, and the answer is compared with it (arXiv 2412.03561, section 3.2)."""
    pooled = objective.pooling(text[None, -1:], image[None, 1:])[0, 0]
    return [F.cosine_similarity(pooled, text[-1], dim=0)] * 2


def plain_filip(objective: Objective, image: Tensor, text: Tensor) -> list[Tensor]:
    similarity = F.normalize(image[1:], dim=-1) @ F.normalize(text, dim=-1).T  # (P, T)
    return [similarity.amax(1).mean(), similarity.amax(0).mean()]


@pytest.mark.parametrize(("recipe", "plain"), [("laps", plain_laps), ("flair", plain_flair), ("filip", plain_filip)])
@torch.no_grad()
def test_the_own_score_of_a_gallery_equals_a_loop_over_pairs(
    model: FineLIPModel, examples: list[Example], recipe: str, plain, tmp_path: Path
) -> None:
    folder, objective = trained(model, recipe, tmp_path)
    again = FineLIPModel.from_pretrained(folder).eval()
    own = own_score(again, load_heads(folder))
    assert own is not None and own.name == recipe
    gallery = embed_gallery(again, TOKENIZER, PROCESSOR, examples, 2, own=own)
    both = [torch.zeros(5, 5), torch.zeros(5, 5)]
    for i, example in enumerate(examples):
        image = model.encode_image(PROCESSOR([example.image], return_tensors="pt").pixel_values)[1][0]
        for j, other in enumerate(examples):
            text = model.encode_text(TOKENIZER(other.caption, return_tensors="pt").input_ids)[1][0]
            for scores, value in zip(both, plain(objective, image, text), strict=True):
                scores[i, j] = value
    for found, wanted in zip(token_scores(gallery, score=recipe), both, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # the same sums in another order, in float32
        assert wanted.std() > 1e-3
    report = evaluate(gallery)
    wanted = (both[1].T.argsort(1, descending=True)[:, 0] == torch.arange(5)).double().mean().item()
    assert report["figures"][f"whole/{recipe}/text_to_image/R@1"]["value"] == pytest.approx(wanted)


def test_a_model_that_names_no_score_is_known_by_its_heads(model: FineLIPModel, tmp_path: Path) -> None:
    for recipe in ("laps", "flair"):
        folder, _ = trained(model, recipe, tmp_path / recipe, named=False)
        own = own_score(FineLIPModel.from_pretrained(folder), load_heads(folder))
        assert own is not None and own.name == recipe
    folder, _ = trained(model, "finelip", tmp_path / "finelip")
    assert load_heads(folder) == {} and own_score(FineLIPModel.from_pretrained(folder), {}) is None
    assert load_heads(BUNDLED_MODEL / "clip") == {}


def test_heads_that_do_not_fit_are_refused_in_a_sentence(model: FineLIPModel, tmp_path: Path) -> None:
    folder, objective = trained(model, "flair", tmp_path)
    with pytest.raises(ValueError, match="trained for the score 'flair', which needs 'pooling'"):
        own_score(FineLIPModel.from_pretrained(folder), {})
    state = {f"objective.{name}": tensor for name, tensor in objective.state_dict().items()}
    state.pop("objective.pooling.norm_tokens.weight")
    save_file(state, folder / HEADS_FILE)
    with pytest.raises(ValueError, match="holds a head 'pooling' that cannot be read"):
        load_heads(folder)
    save_file({"objective.other.weight": torch.ones(2)}, folder / HEADS_FILE)
    with pytest.raises(ValueError, match="a head 'other' that cannot be read: it must be aggregation or pooling"):
        load_heads(folder)


def test_every_sentence_looks_for_its_image(model: FineLIPModel, examples: list[Example]) -> None:
    """The sentences of a caption are queries of their own; one that two captions share is told of both images."""
    shared = examples[0].caption.split(". ")[0] + ". "
    examples = [*examples, Example(examples[1].image, shared + examples[1].caption, "twin", "twin")]
    gallery = embed_gallery(model, TOKENIZER, PROCESSOR, examples, 3, views=("whole", "sentences"))
    captions = gallery.views["sentences"]
    texts = [part.rstrip(".") for example in examples for part in example.caption.split(". ")]
    assert len(captions.rows) == len(texts) and captions.changed == 6
    owners = [n for n, example in enumerate(examples) for _ in example.caption.split(". ")]
    assert captions.image_of.tolist() == owners
    right = gallery.right("sentences")
    for column, text in enumerate(texts):
        told = [text in [part.rstrip(".") for part in example.caption.split(". ")] for example in examples]
        assert right[:, column].tolist() == told
    assert right[[0, 5], 0].all()
    with torch.no_grad():
        row = TOKENIZER(f"{texts[3]}.", return_tensors="pt").input_ids
        torch.testing.assert_close(captions.embeds[captions.rows[3]], model.encode_text(row)[0][0], rtol=0, atol=1e-5)
    report = evaluate(gallery)
    assert len(report["ranks"]["sentences/global/text_to_image"]) == len(texts)
    assert len(report["ranks"]["sentences/global/image_to_text"]) == 6
    assert report["figures"]["sentences/global/text_to_image/R@5"]["n"] == len(texts)


def test_recipes_whose_loss_has_a_score_name_it() -> None:
    def loss_of(path: Path) -> str | None:
        recipe: Recipe = read_recipe(path)
        return recipe.local_loss.name if recipe.local_loss else None

    assert {path.stem for path in RECIPES.glob("*.yaml") if loss_of(path) in ("laps", "flair", "filip")} == {
        "laps",
        "flair",
        "filip",
    }


@pytest.mark.parametrize("recipe", ["flair", "laps"])
def test_what_training_leaves_is_judged_by_its_own_score(
    model: FineLIPModel, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heads of a training step, saved by the script, are those that the score reads."""
    monkeypatch.syspath_prepend(RECIPES.parent)
    script = importlib.import_module("finetune_encoder")
    own = read_recipe(RECIPES / f"{recipe}.yaml")
    torch.manual_seed(2)
    step = TrainingStep(model, Objective(own, E, 3))
    args = script.Arguments(output_dir=tmp_path, recipe=recipe, max_train_steps=1)
    config = FineLIPConfig.from_dict(model.config.to_dict())
    script.save_result(step.state_dict(), config, TOKENIZER, PROCESSOR, args, own, 1, {})
    folder = tmp_path / "finelip_model"
    heads = load_heads(folder)
    (name,) = heads
    for key, tensor in getattr(step.objective, name).state_dict().items():
        assert torch.equal(heads[name].state_dict()[key], tensor)
    score = own_score(load_clip(folder)[0], heads)
    assert score is not None and score.name == recipe
    settings = load_clip(folder)[0].config.score_settings
    assert settings == own.local_loss.settings
