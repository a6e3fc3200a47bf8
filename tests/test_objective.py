"""From a batch of scenes to gradients: every recipe trains what it says, and in parts as it does at once."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from finelip_diffusion.data.batches import Collator
from finelip_diffusion.data.datasets import ScenesDataset
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.model import FineLIPConfig, FineLIPModel
from finelip_diffusion.objective import HEADS, SIGMOID_BIAS, Objective, TrainingStep, cached_backward
from finelip_diffusion.recipes import Recipe, make_recipe, read_content
from finelip_diffusion.refinement import AttentionPooling, TokenRefinement
from finelip_diffusion.tokenizer import VOCAB_SIZE

FOLDER = Path(__file__).resolve().parents[1] / "train" / "recipes"
B, E = 7, 16
SCENES = [0, 1, 2, 8, 8, 9, 16]  # near-duplicates, and two captions of one image
POSITIONS = "model.clip.text_model.embeddings.position_embedding.weight"
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONTENTS = {path.stem: read_content(path) for path in sorted(FOLDER.glob("*.yaml"))}
CONTENTS |= {  # losses that no preset has
    "sigmoid": {"global_loss": "sigmoid"},
    "adaptive": {
        "local_loss": "finelip",
        "refine": ["image", "text"],
        "adaptive_share": 0.1,
        "refined_text_share": 0.5,
    },
}
NOT_OF_A_STEP = ("description", "edit_place", "rewrites", "length_curriculum", "max_grad_norm", "logit_scale")
KINDS = {  # recipes that differ in data or schedule alone are one kind of step
    str(sorted((key, value) for key, value in content.items() if key not in NOT_OF_A_STEP)): name
    for name, content in reversed(CONTENTS.items())
}
every_recipe = pytest.mark.parametrize("name", KINDS.values())


def recipe_of(name: str) -> Recipe:
    """As in its file, but for principal components, of which a small batch has few."""
    content: dict[str, Any] = {**CONTENTS[name]}
    if "pca_image" in content.get("coarse", {}):
        content["coarse"] = {"pca_image": {**content["coarse"]["pca_image"], "components": 3}}
    return make_recipe(name, content)


def make_step(name: str, dtype: torch.dtype = torch.float64, **tower: float) -> TrainingStep:
    """A tiny model of random weights, its objective, and a teacher of other weights."""
    recipe = recipe_of(name)
    last = VOCAB_SIZE - 1
    text = TOWER | {"vocab_size": VOCAB_SIZE, "bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    vision = TOWER | {"image_size": 32, "patch_size": 8}

    def config(length: int) -> CLIPConfig:
        more = tower | {"initializer_factor": 3.0}
        long = text | more | {"max_position_embeddings": length}
        return CLIPConfig(text_config=long, vision_config=vision | more, projection_dim=E)

    torch.manual_seed(0)
    parts = {f"refine_{part}": part in recipe.refine for part in ("image", "text")}
    settings = {key: value for key, value in recipe.refinement.items() if key in ("adaptive_share", "global_tokens")}
    model = FineLIPModel(FineLIPConfig(config(248), **parts, **settings))
    if recipe.image_tower == "frozen":
        model.clip.vision_model.requires_grad_(False)
        model.clip.visual_projection.requires_grad_(False)
    objective = Objective(recipe, E, model.config.num_refined_tokens)
    teacher = CLIPModel(config(77)).requires_grad_(False).to(dtype)
    return TrainingStep(model, objective, teacher).to(dtype).train()


@pytest.fixture(scope="module")
def batch_for() -> Callable[..., dict[str, Tensor]]:
    return make_batches()


def make_batches() -> Callable[..., dict[str, Tensor]]:
    """Makes the batch that a recipe asks for, of real scenes and captions."""
    dataset = ScenesDataset("train", num_scenes=24)
    dataset.with_edits = True
    examples = [dataset[index, draw] for draw, index in enumerate(SCENES)]
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED_MODEL, subfolder="tokenizer")
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)

    def make(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        recipe = recipe_of(name)
        assert recipe.prompts == (None if recipe.preserve is None else "random" if name == "lwf" else "short")
        collator = Collator(
            tokenizer, processor, recipe.captions, recipe.num_sub_captions, recipe.longest_sub_caption, recipe.prompts,
            num_edits=recipe.num_edits, edit_place=recipe.edit_place,
        )  # fmt: skip
        batch = {key: value for key, value in collator(examples).items() if isinstance(value, Tensor)}
        progress = torch.full((B,), 0.5, dtype=dtype)
        return batch | {"pixel_values": batch["pixel_values"].to(dtype), "progress": progress}

    return make


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


# --- what is encoded, and what is trained ---------------------------------------------------------------------------


@every_recipe
def test_a_step_trains_what_the_recipe_says_and_nothing_else(name: str, batch_for: Any) -> None:
    step, batch = make_step(name), batch_for(name)
    recipe, objective = step.objective.recipe, step.objective
    assert step.encode(batch).keys() == objective.needs
    terms = step(batch)
    assert terms.keys() == {term.name for term in recipe.terms.values()}
    assert all(value.ndim == 0 and value.isfinite() and value > 0 for value in terms.values())
    total(terms).backward()

    named = dict(step.named_parameters())
    kinds = {parameter.split(".")[0] for parameter in named}
    assert kinds == {"model"} | ({"objective"} if objective.names & HEADS.keys() else set())
    for part in ("image", "text"):
        assert any(f"{part}_refinement" in parameter for parameter in named) == (part in recipe.refine)
    scaled = {"infonce", "infonce_short", "sigmoid", "pca_image", "filip", "sparc", "flair", "hn_clip", "softened",
              "edited", "neg_clip", "beta_clip"} & terms.keys()  # fmt: skip
    scaled |= {term.name for term in recipe.terms.values() if term.settings.get("objective") == "infonce"}
    for parameter, tensor in named.items():
        if not tensor.requires_grad:
            assert recipe.image_tower == "frozen" and ".vis" in parameter and tensor.grad is None
            continue
        if parameter == "model.clip.logit_scale" and not scaled:
            assert tensor.grad is None or tensor.grad == 0
            continue
        assert tensor.grad is not None and tensor.grad.isfinite().all(), parameter
        # A bias that shifts all logits of a softmax alike has no effect: its gradient is rounding.
        assert tensor.grad.any() or parameter.endswith(("k_proj.bias", "weigh.3.bias")), parameter
    positions: Any = named[POSITIONS].grad
    assert not positions[:20].any() and positions[20:40].any(1).all()
    teacher: Any = step._teacher[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(key.startswith("_teacher") for key in step.state_dict())


@pytest.mark.parametrize("name", ["finelip", "kps_infonce", "long_clip", "laps", "flair", "finelip_preserve"])
def test_a_frozen_image_tower_gets_no_gradient(name: str, batch_for: Any) -> None:
    step, batch = make_step(name), batch_for(name)
    clip = step.model.clip
    frozen = [*clip.vision_model.parameters(), *clip.visual_projection.parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for backward in (lambda: total(step(batch)).backward(), lambda: cached_backward(step, batch, 3, Tensor.backward)):
        step.zero_grad()
        backward()
        assert all(parameter.grad is None for parameter in frozen)
        trained = {key: tensor.grad for key, tensor in step.named_parameters() if tensor.requires_grad}
        trained.pop("model.clip.logit_scale")
        assert all(gradient is not None for gradient in trained.values())


@pytest.mark.parametrize("name", ["finelip_preserve", "hycd"])
def test_what_is_kept_is_what_a_unet_reads(name: str, batch_for: Any) -> None:
    """The last states, after the final norm, and what the last but one layer puts out; and CLIP's own embeddings."""
    step, batch = make_step(name), batch_for(name)
    found, pixels, ids = step.encode(batch), batch["pixel_values"], batch["kept_ids"]
    assert ids.shape[1] <= 77
    clips: dict[str, Any] = {"": step.model.clip, "teacher_": step._teacher[0]}
    for prefix, clip in clips.items():
        outputs: list[Tensor] = []
        keep: Any = lambda _, __, output, outputs=outputs: outputs.append(output)  # noqa: E731
        with torch.no_grad(), clip.text_model.encoder.layers[-2].register_forward_hook(keep):
            expected = {
                "kept_states": clip.text_model(ids).last_hidden_state,
                "kept_embeds": F.normalize(clip.get_text_features(ids).pooler_output, dim=-1),
                "image_embeds": F.normalize(clip.get_image_features(pixels).pooler_output, dim=-1),
            }
        expected["kept_penultimate"] = outputs[0]
        for key in expected.keys() & {key.removeprefix("teacher_") for key in step.objective.needs}:
            torch.testing.assert_close(found[prefix + key], expected[key], rtol=0, atol=1e-12)
            assert found[prefix + key].requires_grad != bool(prefix)


@pytest.mark.parametrize("name", ["finelip", "kps_infonce"])
def test_a_tower_that_is_trained_in_part_gets_its_gradients(name: str, batch_for: Any) -> None:
    """As with adapters: the projection behind them is frozen."""
    step, batch = make_step(name), batch_for(name)
    clip = step.model.clip.requires_grad_(False)
    inside = clip.vision_model.encoder.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    for backward in (lambda: total(step(batch)).backward(), lambda: cached_backward(step, batch, 3, Tensor.backward)):
        step.zero_grad()
        backward()
        assert inside.grad is not None and inside.grad.any()


def test_heads_are_made_where_a_loss_names_them() -> None:
    def heads(name: str) -> Any:
        return Objective(recipe_of(name), width=512, num_refined_tokens=39)

    assert not list(heads("finelip").parameters())
    aggregation = heads("laps").aggregation
    assert isinstance(aggregation, TokenRefinement) and aggregation.weigh[-1].out_features == 39
    flair = heads("flair")
    assert isinstance(flair.pooling, AttentionPooling) and flair.pooling.attention.num_heads == 8
    assert flair.logit_bias.item() == SIGMOID_BIAS and not hasattr(flair, "aggregation")


def test_weights_and_settings_reach_the_loss(batch_for: Any) -> None:
    step, batch = make_step("kps_infonce"), batch_for("kps_infonce")
    once = step(batch)["infonce"]
    step.objective.recipe = make_recipe("twice", {"global_loss": {"infonce": {"weight": 2}}})
    torch.testing.assert_close(step(batch)["infonce"], 2 * once, rtol=1e-12, atol=0)
    step.objective.recipe = make_recipe("plain", {"global_loss": {"infonce": {"label_smoothing": 0}}})
    assert step(batch)["infonce"] != once


def test_captions_of_one_image_are_no_negatives(batch_for: Any) -> None:
    """The fourth and fifth caption are of one image: without its other caption the hinge has fewer terms."""
    step, batch = make_step("finelip"), batch_for("finelip")
    assert batch["image_ids"][3] == batch["image_ids"][4] and len(batch["image_ids"].unique()) == B - 1
    apart = batch | {"image_ids": torch.arange(B)}
    assert total(step(batch)) < total(step(apart))


# --- in parts -------------------------------------------------------------------------------------------------------


def gradients(step: TrainingStep) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in step.named_parameters() if parameter.grad is not None}
    step.zero_grad()
    return found


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance", "sizes"),
    [
        *((name, torch.float64, 1e-9, (3,)) for name in KINDS.values()),
        *((name, torch.float64, 1e-9, (1, B)) for name in ("finelip", "flair", "edited")),
        *((name, torch.float32, 1e-5, (3,)) for name in ("finelip", "kps_infonce", "goal")),
    ],
)
def test_cached_gradients_equal_the_plain_step(
    name: str, dtype: torch.dtype, tolerance: float, sizes: tuple[int, ...], batch_for: Any
) -> None:
    """To rounding, relative to the largest gradient: the same sums in another order."""
    step, batch = make_step(name, dtype), batch_for(name, dtype)
    terms = step(batch)
    total(terms).backward()
    expected = gradients(step)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for micro_batch_size in sizes:
        cached = cached_backward(step, batch, micro_batch_size, Tensor.backward)
        assert not any(value.requires_grad for value in cached.values())
        for key, value in terms.items():
            torch.testing.assert_close(cached[key], value.detach(), rtol=tolerance, atol=0)
        found = gradients(step)
        assert found.keys() == expected.keys()
        for key, gradient in found.items():
            assert (gradient - expected[key]).abs().max() <= tolerance * largest, key


def test_cached_gradients_are_scaled(batch_for: Any) -> None:
    step, batch = make_step("infonce"), batch_for("infonce")
    terms = cached_backward(step, batch, 3, Tensor.backward)
    once = gradients(step)
    again = cached_backward(step, batch, 3, Tensor.backward, scale=0.25)
    assert torch.equal(terms["finelip"], again["finelip"])
    for key, gradient in gradients(step).items():
        torch.testing.assert_close(gradient, once[key] / 4, rtol=1e-9, atol=1e-12)


def test_cached_gradients_hold_one_part_at_a_time(batch_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step, batch = make_step("finelip"), batch_for("finelip")
    sizes = []
    encode = step.encode

    def watched(part: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes.append((len(part["input_ids"]), torch.is_grad_enabled()))
        return encode(part)

    monkeypatch.setattr(step, "encode", watched)
    cached_backward(step, batch, 3, Tensor.backward)
    assert sizes == [(3, False), (3, False), (1, False), (3, True), (3, True), (1, True)]


class CacheOfTorch26(TorchFunctionMode):
    """Autocast's cache as torch 2.6 keeps it: a weight that was cast without gradients is given out with them, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.cast: dict[int, Tensor] = {}
        clear = torch.clear_autocast_cache
        monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (self.cast.clear(), clear()))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear and torch.is_autocast_enabled("cpu"):
            tokens, weight, *bias = args
            half = self.cast.setdefault(id(weight), weight.to(torch.bfloat16))
            return function(tokens, half, *bias, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["finelip", "kps_infonce", "flair", "finelip_preserve"])
@pytest.mark.parametrize("cache", ["own", "2.6"])
def test_cached_gradients_under_mixed_precision(
    name: str, cache: str, batch_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every parameter that the plain step trains, as near to float32 as plain autocast is: three roundings at most."""
    step, batch = make_step(name, torch.float32), batch_for(name, torch.float32)
    total(step(batch)).backward()
    exact = gradients(step)
    with torch.autocast("cpu", torch.bfloat16):
        total(step(batch)).backward()
    plain = gradients(step)
    with CacheOfTorch26(monkeypatch) if cache == "2.6" else nullcontext(), torch.autocast("cpu", torch.bfloat16):
        cached_backward(step, batch, 3, Tensor.backward)
    cached = gradients(step)
    assert cached.keys() == plain.keys() == exact.keys()
    largest = max(gradient.abs().max() for gradient in exact.values())
    rounding = max((plain[key] - gradient).abs().max() for key, gradient in exact.items())
    assert 0 < rounding < largest / 4
    for key, gradient in exact.items():
        assert (cached[key] - gradient).abs().max() <= 3 * rounding, key


def test_cached_gradients_drop_out_what_the_loss_dropped_out(batch_for: Any) -> None:
    """Each part is encoded twice, with one draw; and the random state goes on as if it were encoded once."""
    step, batch = make_step("finelip", attention_dropout=0.5), batch_for("finelip")
    parts = [{name: tensor[first : first + 3] for name, tensor in batch.items()} for first in range(0, B, 3)]
    torch.manual_seed(1)
    encoded = [step.encode(part) for part in parts]
    joined = {name: torch.cat([one[name] for one in encoded]) for name in encoded[0] if encoded[0][name].ndim}
    terms = step.objective(joined | {"logit_scale": encoded[0]["logit_scale"]})
    total(terms).backward()
    state, expected = torch.get_rng_state(), gradients(step)

    torch.manual_seed(1)
    cached = cached_backward(step, batch, 3, Tensor.backward)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(cached["finelip"], terms["finelip"].detach(), rtol=1e-9, atol=0)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in gradients(step).items():
        assert (gradient - expected[key]).abs().max() <= 1e-9 * largest, key
    torch.manual_seed(2)
    assert cached_backward(step, batch, 3, Tensor.backward)["finelip"] != cached["finelip"]  # it does drop out
