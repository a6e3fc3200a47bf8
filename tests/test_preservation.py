"""Every preserving term against a plain loop; the teacher is never taught."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_diffusion.losses import PRESERVING, preservation

B, T, D, E = 4, 6, 5, 3
LENGTHS = [6, 2, 4, 3]

Batch = dict[str, Any]


def make_batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """Student and teacher, both leaves that want a gradient: the teacher's must not get one all the same."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (F.normalize(values, dim=-1) if len(shape) == 2 else values).to(dtype).requires_grad_()

    batch = {"kept_mask": torch.arange(T) < torch.tensor(LENGTHS)[:, None]}
    batch["logit_scale"] = torch.tensor(6.0, dtype=dtype, requires_grad=True)
    for who in ("", "teacher_"):
        batch |= {f"{who}kept_states": draw(B, T, D), f"{who}kept_penultimate": draw(B, T, D)}
        batch |= {f"{who}kept_embeds": draw(B, E), f"{who}image_embeds": draw(B, E)}
    return batch


def loop_token(states, penultimate, mask, teacher_states, teacher_penultimate):
    loss = torch.zeros((), dtype=states.dtype)
    for own, stock in ((states, teacher_states), (penultimate, teacher_penultimate)):
        errors = [(own[i, t] - stock[i, t]) ** 2 for i in range(len(own)) for t in range(T) if mask[i, t]]
        loss = loss + sum(error.sum() for error in errors) / (len(errors) * D)
    return loss


def loop_distill(states, penultimate, embeds, mask, teacher_states, teacher_penultimate, teacher_embeds):
    loss = sum(1 - own @ stock for own, stock in zip(embeds, teacher_embeds, strict=True)) / B
    return loss + loop_token(states, penultimate, mask, teacher_states, teacher_penultimate)


def softmax(images: Tensor, texts: Tensor, scale: Tensor, i: int) -> list[Tensor]:
    powers = [(scale * (images[i] @ text)).exp() for text in texts]
    return [power / sum(powers) for power in powers]


def loop_hycd(images, prompts, teacher_images, teacher_prompts, scale):
    loss = torch.zeros((), dtype=images.dtype)
    for own, stock in (
        ((images, prompts), (teacher_images, teacher_prompts)),
        ((prompts, images), (teacher_prompts, teacher_images)),
    ):
        for i in range(B):
            for j, (p, q) in enumerate(zip(softmax(*own, scale, i), softmax(*stock, scale, i), strict=True)):
                target = (q + (1 if i == j else 0)) / 2
                loss = loss + target * (target.log() - p.log()) / B / 2
    return loss


def loop_affinity(images, prompts, teacher_images, teacher_prompts, scale):
    loss = torch.zeros((), dtype=images.dtype)
    for own, stock in (
        ((images, prompts), (teacher_images, teacher_prompts)),
        ((prompts, images), (teacher_prompts, teacher_images)),
    ):
        number = len(own[0])
        for i in range(number):
            for p, q in zip(softmax(*own, scale, i), softmax(*stock, scale, i), strict=True):
                loss = loss - q * p.log() / number / 2
    return loss


def loop_proclip(own, stock):
    def smooth(x: Tensor) -> Tensor:
        return x**2 / 2 if x.abs() < 1 else x.abs() - 0.5

    loss = sum(((s - t) ** 2).sum() for s, t in zip(own, stock, strict=True))
    for i in range(B):
        for j in range(i):
            loss = loss + smooth((own[i] - own[j]).norm() - (stock[i] - stock[j]).norm())
    return loss


CASES = [
    (preservation.token, loop_token, {"kept_states", "kept_penultimate"}),
    (preservation.distill, loop_distill, {"kept_states", "kept_penultimate", "kept_embeds"}),
    (preservation.hycd, loop_hycd, {"image_embeds", "kept_embeds"}),
    (preservation.affinity, loop_affinity, {"image_embeds", "kept_embeds"}),
    (preservation.lwf, loop_affinity, {"image_embeds", "kept_embeds"}),
    (preservation.proclip, loop_proclip, {"kept_embeds"}),
]
TERMS = [term for term, *_ in CASES]


def fields(term: Any, batch: Batch) -> list[Tensor]:
    return [batch[name] for name in PRESERVING[term.__name__].reads]


def gradients(value: Tensor, batch: Batch) -> dict[str, Tensor]:
    leaves = {name: leaf for name, leaf in batch.items() if leaf.requires_grad}
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def test_every_term_has_its_loop() -> None:
    assert {loss.function for loss in PRESERVING.values()} == {*TERMS}


def test_without_states_only_embeddings_are_distilled() -> None:
    batch = make_batch()
    value = preservation.distill(*fields(preservation.distill, batch), states=0.0)
    assert {name for name, gradient in gradients(value, batch).items() if gradient.any()} == {"kept_embeds"}


@pytest.mark.parametrize(("term", "loop", "reached"), CASES)
def test_a_term_equals_its_loop_and_reaches_the_student_alone(term, loop, reached) -> None:
    batch = make_batch()
    value, wanted = term(*fields(term, batch)), loop(*fields(term, batch))
    torch.testing.assert_close(value, wanted)  # float64: 1e-7
    found, expected = gradients(value, batch), gradients(wanted, batch)
    for name, gradient in found.items():
        if name in reached:
            assert gradient.any()
            torch.testing.assert_close(gradient, expected[name])
        else:
            assert not gradient.any(), name


@pytest.mark.parametrize("term", TERMS)
def test_the_order_of_the_batch_does_not_matter(term) -> None:
    batch, order = make_batch(1), torch.tensor([2, 0, 3, 1])
    shuffled = {name: entry[order] if entry.ndim else entry for name, entry in batch.items()}
    torch.testing.assert_close(term(*fields(term, shuffled)), term(*fields(term, batch)))


@pytest.mark.parametrize("term", TERMS)
def test_half_precision_is_for_inputs_alone(term) -> None:
    halves = make_batch(2, torch.bfloat16)
    wide = {
        name: entry.detach().float().requires_grad_() if entry.is_floating_point() else entry
        for name, entry in halves.items()
    }
    wanted = term(*fields(term, wide))
    with torch.autocast("cpu", torch.bfloat16):
        values = [term(*fields(term, halves)), term(*fields(term, wide))]
    for value in [term(*fields(term, halves)), *values]:
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("term", [preservation.token, preservation.affinity, preservation.lwf, preservation.proclip])
def test_an_encoder_that_has_not_moved_is_not_moved(term) -> None:
    batch = make_batch(3)
    batch |= {name.removeprefix("teacher_"): batch[name] for name in batch if name.startswith("teacher_")}
    batch = {name: entry.detach().clone() for name, entry in batch.items()}
    for name in ("kept_states", "kept_penultimate", "kept_embeds", "image_embeds"):
        batch[name].requires_grad_()
    value = term(*fields(term, batch))
    if term in (preservation.token, preservation.proclip):
        assert value == 0
    for gradient in gradients(value, batch).values():
        assert gradient.abs().max() < 1e-12  # softmax and its teacher's differ in rounding


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_padding_does_not_matter(garbage) -> None:
    batch = make_batch(4)
    padded = {"kept_mask": F.pad(batch["kept_mask"], (0, 2))}
    for name in ("kept_states", "kept_penultimate", "teacher_kept_states", "teacher_kept_penultimate"):
        states = batch[name].detach().masked_fill(~batch["kept_mask"][..., None], garbage)
        padded[name] = F.pad(states, (0, 0, 0, 2), value=garbage).requires_grad_()
    value, wanted = (preservation.token(*fields(preservation.token, each)) for each in (padded, batch))
    torch.testing.assert_close(value, wanted)
    expected = gradients(wanted, batch)
    for name, gradient in gradients(value, padded).items():
        torch.testing.assert_close(gradient, F.pad(expected[name], (0, 0, 0, 2)))


def test_replayed_prompts_may_be_more_than_the_images() -> None:
    batch = make_batch(5)
    for name in ("image_embeds", "teacher_image_embeds"):
        batch[name] = batch[name][:2]
    arguments = fields(preservation.lwf, batch)
    torch.testing.assert_close(preservation.lwf(*arguments), loop_affinity(*arguments))


def test_repeated_prompts_have_distances_with_a_finite_gradient() -> None:
    own = torch.ones(3, E).requires_grad_()
    (gradient,) = torch.autograd.grad(preservation.proclip(own, torch.eye(3)), own)
    assert gradient.isfinite().all()
