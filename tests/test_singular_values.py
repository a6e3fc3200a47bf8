"""Layers by their singular values: the same layer, other gradients, plain weights again."""

import runpy
from dataclasses import replace
from pathlib import Path

import torch
from test_objective import make_batches, make_step, total
from torch import nn

from finelip_diffusion.singular_values import VALUES, multiplied_out, train_singular_values

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "finetune_encoder.py"


def make_layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).double()


def test_layers_compute_the_same_and_only_values_are_trained() -> None:
    layers, states = make_layers(), torch.randn(4, 5, dtype=torch.float64)
    expected = layers(states)
    weight = layers[0].weight.detach().clone()
    train_singular_values([layers[0], layers[2]])
    torch.testing.assert_close(layers(states), expected)
    trained = {name: value for name, value in layers.named_parameters() if value.requires_grad}
    assert {name: tuple(value.shape) for name, value in trained.items()} == {f"0{VALUES}": (5,), f"2{VALUES}": (3,)}
    torch.testing.assert_close(trained[f"0{VALUES}"], torch.linalg.svdvals(weight))


def test_gradients_are_those_of_the_product_by_hand() -> None:
    layers, states = make_layers(), torch.randn(4, 5, dtype=torch.float64)
    weight = layers[0].weight.detach().clone()
    train_singular_values([layers[0]])
    layers(states).square().sum().backward()
    plain = make_layers()
    plain(states).square().sum().backward()
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    by_hand = torch.stack([left[:, r] @ plain[0].weight.grad @ right[r] for r in range(5)])
    torch.testing.assert_close(layers[0].parametrizations.weight.original.grad, by_hand)


def test_what_was_trained_becomes_plain_weights() -> None:
    layers, states = make_layers(), torch.randn(4, 5, dtype=torch.float64)
    train_singular_values([layers[0]])
    layers[0].parametrizations.weight.original.data += 1
    state = multiplied_out(layers.state_dict())
    plain = make_layers(1)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(states), layers(states))
    assert multiplied_out(state).keys() == make_layers().state_dict().keys()


def test_the_training_script_trains_them_and_saves_plain_weights() -> None:
    script, step, batch = runpy.run_path(str(SCRIPT)), make_step("clip_svd"), make_batches()("clip_svd")
    recipe = replace(step.objective.recipe, parameters="svd")
    before = total(step(batch)).item()
    script["adapt"](step.model, recipe)
    torch.testing.assert_close(total(step(batch)).item(), before)  # float64
    groups = {group["name"]: group for group in script["parameter_groups"](step, recipe, 1)}
    assert set(groups) == {"positions and scale"} and groups["positions and scale"]["weight_decay"] == 0
    trained = [name for name, weight in step.named_parameters() if weight.requires_grad]
    assert sum(name.endswith(VALUES) for name in trained) == len(trained) - 2  # the position table, and the scale
    total(step(batch)).backward()
    for weight in groups["positions and scale"]["params"]:
        weight.data -= 0.1 * weight.grad
    saved = script["whole_model"](step.state_dict(), step.model.config).double()
    assert saved.state_dict().keys() == make_step("clip_svd").model.state_dict().keys()
    with torch.no_grad():
        ours, theirs = (model.encode_image(batch["pixel_values"])[0] for model in (saved, step.model))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # the saved model is made in float32
