"""Every term against a plain loop written from its source; what must not matter, and where gradients go."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from plain_losses import (
    IDS,
    B,
    Batch,
    E,
    S,
    T,
    loop_beta_clip,
    loop_cloob,
    loop_edited,
    loop_filip,
    loop_finelip,
    loop_flair,
    loop_goal_text_span,
    loop_hn_clip,
    loop_infoloob,
    loop_infonce,
    loop_laps,
    loop_neg_clip,
    loop_pca_image,
    loop_sigmoid,
    loop_softened,
    loop_sparc,
    make_batch,
    plain_infoloob,
    plain_infonce,
    plain_sigmoid,
    plain_triplet,
)
from torch import Tensor

from finelip_diffusion import losses
from finelip_diffusion.losses import infonce_loss, sigmoid_loss, triplet_margin_loss
from finelip_diffusion.losses.embeddings import (
    cloob,
    edited,
    hn_clip,
    infoloob,
    infonce,
    infonce_short,
    neg_clip,
    pca_image,
    sigmoid,
    softened,
)
from finelip_diffusion.losses.primitives import infoloob_loss
from finelip_diffusion.losses.tokens import beta_clip, filip, finelip, flair, goal_text_span, laps, sparc

CASES: list[tuple[Callable[..., Tensor], Batch, Callable[..., Tensor], str]] = [
    (infonce, {}, loop_infonce, "image_embeds text_embeds logit_scale"),
    (infonce, {"label_smoothing": 0.0}, loop_infonce, "image_embeds text_embeds logit_scale"),
    (infonce_short, {"label_smoothing": 0.1}, loop_infonce, "image_embeds short_embeds logit_scale"),
    (sigmoid, {}, loop_sigmoid, "image_embeds text_embeds logit_scale logit_bias"),
    (hn_clip, {}, loop_hn_clip, "image_embeds text_embeds logit_scale"),
    (hn_clip, {"gamma": 2.0, "label_smoothing": 0.1}, loop_hn_clip, "image_embeds text_embeds logit_scale"),
    (infoloob, {}, loop_infoloob, "image_embeds text_embeds"),
    (cloob, {}, loop_cloob, "image_embeds text_embeds"),
    (cloob, {"retrieval_scale": 2.0}, loop_cloob, "image_embeds text_embeds"),
    (softened, {}, loop_softened, "image_embeds text_embeds logit_scale"),
    (softened, {"softness": 0.4, "among": "alike"}, loop_softened, "image_embeds text_embeds logit_scale"),
    (softened, {"among": "alike", "rise": "linear"}, loop_softened, "image_embeds text_embeds logit_scale"),
    (edited, {}, loop_edited, "image_embeds text_embeds edited_embeds logit_scale"),
    (neg_clip, {}, loop_neg_clip, "image_embeds text_embeds edited_embeds logit_scale"),
    (pca_image, {"components": 2}, loop_pca_image, "image_embeds short_embeds logit_scale"),
    (finelip, {}, loop_finelip, "local_image_tokens local_text_tokens"),
    (finelip, {"margin": 0.5, "interaction": "mean"}, loop_finelip, "local_image_tokens local_text_tokens"),
    (finelip, {"objective": "infonce"}, loop_finelip, "local_image_tokens local_text_tokens logit_scale"),
    (filip, {}, loop_filip, "image_tokens text_tokens logit_scale"),
    (sparc, {}, loop_sparc, "image_tokens text_tokens logit_scale"),
    (laps, {"keep": 0.6}, loop_laps, "image_tokens text_tokens"),
    (flair, {}, loop_flair, "image_tokens image_embeds sub_embeds logit_scale logit_bias"),
    (beta_clip, {}, loop_beta_clip, "image_tokens sub_embeds logit_scale"),
    (beta_clip, {"beta": 0.2, "objective": "bce"}, loop_beta_clip, "image_tokens sub_embeds logit_scale"),
    (goal_text_span, {}, loop_goal_text_span, "span_embeds sub_embeds"),
]
TERMS = [(term, settings) for term, settings, *_ in CASES]
NAMES = [f"{term.__name__}-{'-'.join(map(str, settings.values()))}".rstrip("-") for term, settings in TERMS]


def reads(term: Callable[..., Tensor]) -> tuple[str, ...]:
    """What the table of losses says that a term is given."""
    (found,) = [loss.reads for loss in losses.CONTRASTIVE.values() if loss.function is term]
    return found


def apply(term: Callable[..., Tensor], batch: Batch, settings: Batch) -> Tensor:
    """A term takes what it reads, as `Objective` gives it."""
    return term(*(batch[name] for name in reads(term)), **settings)


def gradients(value: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Of a value, by name; of what it does not use, zeros."""
    leaves = {name: leaf for name, leaf in batch.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def test_every_term_has_its_loop() -> None:
    assert {term.__name__: losses.CONTRASTIVE[term.__name__] for term, _ in TERMS} == losses.CONTRASTIVE


@pytest.mark.parametrize("name", [*losses.CONTRASTIVE, *losses.PRESERVING])
def test_the_table_says_what_the_function_takes(name: str) -> None:
    """In its order, under its names."""
    loss = (losses.CONTRASTIVE | losses.PRESERVING)[name]
    parameters = inspect.signature(loss.function).parameters.values()
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == list(loss.reads)
    assert loss.function.__name__ == name
    assert (loss.prompts is not None) == any(read.startswith("kept_") for read in loss.reads)


@pytest.mark.parametrize(("term", "settings", "loop", "reached"), CASES, ids=NAMES)
def test_a_term_equals_its_loop_in_value_and_gradients(term, settings, loop, reached) -> None:
    batch = make_batch()
    value = apply(term, batch, settings)
    wanted = loop(*(batch[name] for name in reads(term)), **settings)
    torch.testing.assert_close(value, wanted)  # float64: 1e-7
    found = gradients(value, batch)
    torch.testing.assert_close(found, gradients(wanted, batch))
    assert {name for name, gradient in found.items() if gradient.any()} == set(reached.split())


@pytest.mark.parametrize("term", [filip, sparc, flair, beta_clip])
def test_cls_takes_no_part_among_the_patches(term) -> None:
    batch = make_batch()
    gradient = gradients(apply(term, batch, {}), batch)["image_tokens"]
    assert not gradient[:, 0].any()
    assert gradient[:, 1:].any()


@pytest.mark.parametrize(("term", "settings"), TERMS, ids=NAMES)
def test_the_order_of_the_batch_does_not_matter(term, settings) -> None:
    batch, order = make_batch(1), torch.tensor([3, 0, 4, 2, 1])
    shuffled = {
        name: entry[order] if isinstance(entry, Tensor) and entry.ndim else entry for name, entry in batch.items()
    }
    shuffled["same"] = batch["same"][order][:, order]
    torch.testing.assert_close(apply(term, shuffled, settings), apply(term, batch, settings))


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
@pytest.mark.parametrize(
    ("term", "settings"), [case for case in TERMS if {"text_tokens", "local_text_tokens"} & {*reads(case[0])}]
)
def test_padding_does_not_matter(term, settings, garbage) -> None:
    batch = make_batch(2)
    padded = dict(batch)
    image_tokens = batch["local_image_tokens"].detach().masked_fill(~batch["local_image_mask"][..., None], garbage)
    padded["local_image_tokens"] = image_tokens.requires_grad_()
    for prefix in ("", "local_"):
        tokens, mask = batch[f"{prefix}text_tokens"].detach(), batch[f"{prefix}text_mask"]
        tokens = F.pad(tokens.masked_fill(~mask[..., None], garbage), (0, 0, 0, 2), value=garbage)
        padded[f"{prefix}text_tokens"] = tokens.requires_grad_()
        padded[f"{prefix}text_mask"] = F.pad(mask, (0, 2))
    value, wanted = apply(term, padded, settings), apply(term, batch, settings)
    torch.testing.assert_close(value, wanted)
    found = gradients(value, padded)
    found |= {name: found[name][:, :T] for name in ("text_tokens", "local_text_tokens")}
    torch.testing.assert_close(found, gradients(wanted, batch))


@pytest.mark.parametrize(("term", "settings"), TERMS, ids=NAMES)
def test_half_precision_is_for_inputs_alone(term, settings) -> None:
    halves = make_batch(3, torch.bfloat16)
    wide = {
        name: entry.detach().float().requires_grad_() if getattr(entry, "requires_grad", False) else entry
        for name, entry in halves.items()
    }
    wanted = apply(term, wide, settings)
    # Token similarities and the pooling run in the dtype they get: bfloat16 keeps 8 bits, a hinge sums 40 such errors.
    loose = term in (finelip, filip, laps, flair, beta_clip)
    tolerance: Batch = {"rtol": 0.05, "atol": 0.05} if loose else {"rtol": 1e-5, "atol": 1e-6}
    value = apply(term, halves, settings)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, **tolerance)
    for gradient in gradients(value, halves).values():
        assert gradient.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        value = apply(term, wide, settings)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, **tolerance)


# ------------------------------------------------------------------------------------------------------- primitives


def make_scores(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(IDS)
    return torch.randn(B, B, generator=generator, dtype=torch.float64).requires_grad_(), ids[:, None] == ids


PRIMITIVES = [
    (lambda scores, same: triplet_margin_loss(scores, same=same), lambda s, same: plain_triplet(s, 0.2, same)),
    (
        lambda scores, same: triplet_margin_loss(scores, 1.0, same, hardest=True),
        lambda s, same: plain_triplet(s, 1.0, same, hardest=True),
    ),
    (lambda scores, same: infonce_loss(scores, same=same), lambda s, same: plain_infonce(s, 0.0, same)),
    (lambda scores, same: infonce_loss(scores, 0.1, same), lambda s, same: plain_infonce(s, 0.1, same)),
    (lambda scores, same: sigmoid_loss(scores, same), plain_sigmoid),
    (infoloob_loss, lambda scores, same: plain_infoloob(scores, torch.eye(B).bool() if same is None else same)),
]


@pytest.mark.parametrize(("loss", "loop"), PRIMITIVES)
def test_a_primitive_equals_its_loop(loss, loop) -> None:
    scores, same = make_scores()
    diagonal = torch.eye(B, dtype=torch.bool)
    for given, meant in ((same, same), (diagonal, diagonal), (None, diagonal)):
        value, wanted = loss(scores, given), loop(scores, meant)
        torch.testing.assert_close(value, wanted)
        (found,), (gradient,) = torch.autograd.grad(value, scores), torch.autograd.grad(wanted, scores)
        torch.testing.assert_close(found, gradient)
        assert not found[meant & ~diagonal].any()


@pytest.mark.parametrize("loss", [loss for loss, _ in PRIMITIVES])
def test_a_primitive_widens_its_scores(loss) -> None:
    scores, same = make_scores()
    halves = (10 * scores).detach().bfloat16()
    value = loss(halves, same)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(halves.float(), same))


def test_infonce_is_the_cross_entropy_of_pytorch() -> None:
    scores, right = make_scores()[0], torch.arange(B)
    both = [F.cross_entropy(rows, right, label_smoothing=0.1) for rows in (scores, scores.T)]
    torch.testing.assert_close(infonce_loss(scores, 0.1), sum(both) / 2)


def test_a_batch_of_one_image_has_no_negatives() -> None:
    scores, same = make_scores()[0], torch.ones(B, B, dtype=torch.bool)
    assert triplet_margin_loss(scores, same=same) == 0
    assert triplet_margin_loss(scores, same=same, hardest=True) == 0
    assert infonce_loss(scores, 0.1, same) == 0


@pytest.mark.parametrize("loss", [triplet_margin_loss, infonce_loss, sigmoid_loss])
def test_scores_and_same_that_do_not_fit_are_refused(loss) -> None:
    scores, _ = make_scores()
    with pytest.raises(ValueError, match="scores have shape .4, 5., but each image needs one caption"):
        loss(scores[:4])
    with pytest.raises(ValueError, match="same has shape .5,., but scores have .5, 5."):
        loss(scores, same=torch.tensor(IDS))


# ------------------------------------------------------------------------------------------------------- pca, goal


@pytest.mark.parametrize("images", [1, 2, 3, 6])
@pytest.mark.parametrize(("size", "width"), [(12, 16), (12, 7)])
def test_repeated_images_leave_principal_components_a_finite_gradient(size, width, images) -> None:
    generator = torch.Generator().manual_seed(0)
    distinct = F.normalize(torch.randn(images, width, generator=generator), dim=-1)
    ids = torch.arange(size) % images
    embeds, short = distinct[ids].requires_grad_(), torch.randn(size, width, generator=generator)
    loss = pca_image(embeds, short, torch.tensor(10.0), ids[:, None] == ids, components=4)
    (gradient,) = torch.autograd.grad(loss, embeds)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 100


def test_principal_components_keep_what_has_few_dimensions() -> None:
    batch = make_batch()
    flat = batch["image_embeds"].detach().clone()
    flat[:, 2:] = 0.5  # two dimensions vary: two components hold all
    batch["image_embeds"] = flat
    coarse = apply(pca_image, batch, {"components": 2})
    batch["text_embeds"] = batch["short_embeds"]
    torch.testing.assert_close(coarse, apply(infonce, batch, {}))


@pytest.mark.parametrize(("components", "width"), [(B, 2 * B), (B - 1, B - 1), (32, 512)])
def test_components_that_leave_nothing_out_are_refused(components, width) -> None:
    embeds = torch.randn(B, width)
    with pytest.raises(ValueError, match=f"components={components} of a batch of 5 images of width {width}"):
        pca_image(embeds, embeds, torch.tensor(1.0), torch.eye(B).bool(), components=components)


def test_no_span_that_fits_is_no_loss() -> None:
    batch = make_batch() | {"sub_spans": torch.zeros(B, S, 2, dtype=torch.int64)}
    loss = apply(goal_text_span, batch, {})
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(loss, batch).values())


def test_a_caption_whose_spans_mean_what_they_say_alone_has_no_loss() -> None:
    batch = make_batch()
    batch["sub_embeds"] = 2 * batch["span_embeds"]
    assert apply(goal_text_span, batch, {}).abs() < 1e-12


@pytest.mark.parametrize("term", [edited, neg_clip])
def test_what_stands_in_for_a_missing_edit_does_not_matter(term) -> None:
    batch = make_batch()
    other = batch["edited_embeds"].detach().clone()
    other[~batch["edited_valid"]] = 7.0
    assert torch.equal(apply(term, batch | {"edited_embeds": other}, {}), apply(term, batch, {}))
    none = torch.zeros(B, 2, dtype=torch.bool)
    value = apply(term, batch | {"edited_valid": none}, {})
    assert value == (0 if term is edited else apply(infonce, batch, {"label_smoothing": 0.0}))


def test_softened_targets_without_softness_and_hn_clip_without_gamma_are_infonce() -> None:
    batch = make_batch()
    plain = apply(infonce, batch, {"label_smoothing": 0.0})
    torch.testing.assert_close(apply(softened, batch, {"softness": 0.0, "among": "alike"}), plain)
    torch.testing.assert_close(apply(hn_clip, batch, {"gamma": 0.0}), plain)
    start = batch | {"progress": torch.zeros(B)}
    torch.testing.assert_close(apply(softened, start, {"rise": "linear"}), plain)


@pytest.mark.parametrize(
    ("term", "changes", "message"),
    [
        (finelip, {"interaction": "max"}, "interaction is 'max': choose"),
        (finelip, {"objective": "sigmoid"}, "objective is 'sigmoid': choose"),
        (beta_clip, {"objective": "hinge"}, "objective is 'hinge': choose"),
        (laps, {"keep": 1.0}, "keep=1.0"),
        (flair, {"sub_embeds": torch.ones(B, E)}, "sub_embeds has shape .5, 4., but 5 images need"),
        (flair, {"sub_embeds": torch.ones(B - 1, S, E)}, "sub_embeds has shape .4, 3, 4., but 5 images need"),
        (goal_text_span, {"sub_embeds": torch.ones(B, S + 1, E)}, "sub_spans has shape .5, 3, 2., but"),
    ],
)
def test_misuse_is_refused_in_a_sentence(term, changes, message) -> None:
    batch = make_batch()
    fields = {name: value for name, value in changes.items() if name in batch}
    settings = {name: value for name, value in changes.items() if name not in batch}
    with pytest.raises(ValueError, match=message):
        apply(term, batch | fields, settings)
