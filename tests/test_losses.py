"""Every term against a plain loop written from its source; what must not matter, and where gradients go."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from finelip_diffusion.scores import laps_scores

B, P, T, S, E = 5, 6, 7, 3, 4
IDS = [3, 1, 3, 8, 5]  # captions 0 and 2 are of one image
LENGTHS = [7, 4, 2, 6, 5]
EDITS = [[1, 1], [1, 0], [0, 0], [1, 1], [1, 1]]  # the second caption has one edit, the third none
SPANS = [[[1, 4], [4, 6], [1, 6]], [[1, 3], [0, 0], [0, 0]], [[0, 0]] * 3, [[1, 2], [2, 5], [0, 0]], [[1, 4]] * 3]

Batch = dict[str, Any]


def pool(queries: Tensor, tokens: Tensor) -> Tensor:
    return (queries @ tokens.mT).softmax(-1) @ tokens


def aggregate(tokens: Tensor) -> Tensor:
    return torch.stack([tokens[:, ::2].mean(1), tokens[:, 1::2].mean(1)], dim=1)


def make_batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """What terms may name, each tensor a leaf that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, unit: bool = True) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (F.normalize(values, dim=-1) if unit else values).to(dtype).requires_grad_()

    ids, mask = torch.tensor(IDS), torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    return {
        "image_embeds": draw(B, E),
        "text_embeds": draw(B, E),
        "short_embeds": draw(B, E),
        "sub_embeds": draw(B, S, E, unit=False),
        "span_embeds": draw(B, S, E, unit=False),
        "sub_spans": torch.tensor(SPANS),
        "edited_embeds": draw(B, 2, E),
        "edited_valid": torch.tensor(EDITS).bool(),
        "progress": torch.full((B,), 0.25),
        "image_tokens": draw(B, 1 + P, E, unit=False),
        "text_tokens": draw(B, T, E, unit=False),
        "text_mask": mask,
        "local_image_tokens": draw(B, 3, E),
        "local_image_mask": torch.arange(3) < torch.tensor([3, 2, 1, 3, 2])[:, None],
        "local_text_tokens": draw(B, T, E),
        "local_text_mask": mask,
        "logit_scale": torch.tensor(4.0, dtype=dtype, requires_grad=True),
        "logit_bias": torch.tensor(-2.0, dtype=dtype, requires_grad=True),
        "pooling": pool,
        "aggregation": aggregate,
        "same": ids[:, None] == ids,
    }


# ------------------------------------------------------------------------------------------------------ plain loops


def mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def cross_entropy(logits: list[Tensor], right: int, smoothing: float = 0.0) -> Tensor:
    total = sum(x.exp() for x in logits)
    shares = [(x.exp() / total).log() for x in logits]
    return -(1 - smoothing) * shares[right] - smoothing * mean(shares)


def plain_triplet(scores: Tensor, margin: float, same: Tensor, hardest: bool = False) -> Tensor:
    loss = torch.zeros((), dtype=scores.dtype)
    for i in range(len(scores)):
        others = [j for j in range(len(scores)) if not same[i, j]]
        captions = [(margin + scores[i, j] - scores[i, i]).relu() for j in others]
        images = [(margin + scores[j, i] - scores[i, i]).relu() for j in others]
        for costs in (captions, images):
            loss = loss + (max(costs) if hardest else sum(costs))
    return loss


def plain_infonce(logits: Tensor, smoothing: float, same: Tensor) -> Tensor:
    terms = []
    for i in range(len(logits)):
        classes = [j for j in range(len(logits)) if j == i or not same[i, j]]
        right = classes.index(i)
        terms.append(cross_entropy([logits[i, j] for j in classes], right, smoothing))
        terms.append(cross_entropy([logits[j, i] for j in classes], right, smoothing))
    return mean(terms)


def plain_sigmoid(logits: Tensor, same: Tensor) -> Tensor:
    loss = torch.zeros((), dtype=logits.dtype)
    for i in range(len(logits)):
        for j in range(len(logits)):
            if i == j or not same[i, j]:
                loss = loss - (1 / (1 + (-logits[i, j] if i == j else logits[i, j]).exp())).log()
    return loss / len(logits)


def matrix(score: Callable[[int, int], Tensor], number: int = B) -> Tensor:
    return torch.stack([torch.stack([score(i, j) for j in range(number)]) for i in range(number)])


def loop_infonce(image_embeds, text_embeds, logit_scale, same, label_smoothing=0.1):
    return plain_infonce(matrix(lambda i, j: logit_scale * (image_embeds[i] @ text_embeds[j])), label_smoothing, same)


def loop_sigmoid(image_embeds, text_embeds, logit_scale, logit_bias, same):
    return plain_sigmoid(matrix(lambda i, j: logit_scale * (image_embeds[i] @ text_embeds[j]) + logit_bias), same)


def loop_pca_image(image_embeds, short_embeds, logit_scale, same, components, label_smoothing=0.1):
    centre = mean(list(image_embeds))
    centred = torch.stack([embed - centre for embed in image_embeds])
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:components]
    coarse = [centre + sum((row @ axis) * axis for axis in axes) for row in centred]
    return plain_infonce(matrix(lambda i, j: logit_scale * (coarse[i] @ short_embeds[j])), label_smoothing, same)


def loop_hn_clip(image_embeds, text_embeds, logit_scale, same, gamma=0.5, label_smoothing=0.0):
    def logit(i: int, j: int) -> Tensor:
        alike = 0 if i == j else (text_embeds[i] @ text_embeds[j]).detach()
        return logit_scale * (image_embeds[i] @ text_embeds[j] + gamma * alike)

    return plain_infonce(matrix(logit), label_smoothing, same)


def plain_infoloob(logits: Tensor, same: Tensor) -> Tensor:
    terms = []
    for i in range(len(logits)):
        others = [logits[i, j].exp() for j in range(len(logits)) if not same[i, j]]
        terms.append(sum(others).log() - logits[i, i] if others else -logits[i, i])
    return mean(terms)


def loop_infoloob(image_embeds, text_embeds, logit_scale, same):
    scale = logit_scale.detach()
    logits = matrix(lambda i, j: scale * (image_embeds[i] @ text_embeds[j]))
    return (plain_infoloob(logits, same) + plain_infoloob(logits.T, same)) / scale


def loop_cloob(image_embeds, text_embeds, logit_scale, same, retrieval_scale=8.0):
    scale = logit_scale.detach()

    def retrieved(state: Tensor, stored: Tensor) -> Tensor:
        powers = [(retrieval_scale * (state @ pattern)).exp() for pattern in stored]
        found = sum(power * pattern for power, pattern in zip(powers, stored, strict=True)) / sum(powers)
        return found / found.norm()

    loss = torch.zeros((), dtype=image_embeds.dtype)
    for anchors, others in ((image_embeds, text_embeds), (text_embeds, image_embeds)):
        own = [retrieved(state, anchors) for state in anchors]
        theirs = [retrieved(state, anchors) for state in others]
        logits = matrix(lambda i, j, own=own, theirs=theirs: scale * (own[i] @ theirs[j]))
        loss = loss + plain_infoloob(logits, same) / scale
    return loss


def loop_softened(image_embeds, text_embeds, logit_scale, same, progress, softness=0.2, among="all", rise="none"):
    share = softness * (float(progress[0]) if rise == "linear" else 1)
    logits = matrix(lambda i, j: logit_scale * (image_embeds[i] @ text_embeds[j]))
    terms = []
    for rows in (logits, logits.T):
        for i in range(B):
            classes = [j for j in range(B) if j == i or not same[i, j]]
            total = sum(rows[i, j].exp() for j in classes)
            shares = {j: (rows[i, j].exp() / total).log() for j in classes}
            wrong = [j for j in classes if j != i]
            parts = {j: rows[i, j].detach().exp() if among == "alike" else torch.tensor(1.0) for j in wrong}
            soft = sum(parts[j] / sum(parts.values()) * shares[j] for j in wrong)
            terms.append(-(1 - share) * shares[i] - share * soft)
    return mean(terms)


def loop_edited(image_embeds, text_embeds, edited_embeds, edited_valid, logit_scale):
    terms = []
    for i in range(B):
        edits = [edited_embeds[i, n] for n in range(2) if edited_valid[i, n]]
        if edits:
            terms.append(cross_entropy([logit_scale * (image_embeds[i] @ t) for t in (text_embeds[i], *edits)], 0))
    return mean(terms)


def loop_neg_clip(image_embeds, text_embeds, edited_embeds, edited_valid, logit_scale, same):
    terms = []
    for i in range(B):
        classes = [j for j in range(B) if j == i or not same[i, j]]
        texts = [text_embeds[j] for j in classes]
        wrong = [edited_embeds[j, n] for j in range(B) for n in range(2) if edited_valid[j, n]]
        right = classes.index(i)
        terms.append(cross_entropy([logit_scale * (image_embeds[i] @ text) for text in texts + wrong], right))
        terms.append(cross_entropy([logit_scale * (image_embeds[j] @ text_embeds[i]) for j in classes], right))
    return mean(terms)


def loop_finelip(
    images, image_mask, texts, mask, logit_scale, same, interaction="clim", objective="triplet", margin=0.2
):
    def score(i: int, j: int) -> Tensor:
        tokens, patches = texts[j][mask[j]], images[i][image_mask[i]]
        if interaction == "mean":
            return cosine(mean(list(patches)), mean(list(tokens)))
        alike = [[F.leaky_relu(token @ patch, 0.1) for patch in patches] for token in tokens]
        of_text = mean([max(row) for row in alike])
        return of_text + mean([max(column) for column in zip(*alike, strict=True)])

    scores = matrix(score)
    if objective == "infonce":
        return plain_infonce(logit_scale * scores, 0.0, same)
    return plain_triplet(scores, margin, same)


def loop_filip(image_tokens, text_tokens, text_mask, logit_scale, same):
    def score(i: int, j: int, of_image: bool) -> Tensor:
        patches, tokens = list(image_tokens[i, 1:]), list(text_tokens[j][text_mask[j]])
        rows, columns = (patches, tokens) if of_image else (tokens, patches)
        return logit_scale * mean([max(cosine(row, column) for column in columns) for row in rows])

    terms = []
    for i in range(B):
        classes = [j for j in range(B) if j == i or not same[i, j]]
        terms.append(cross_entropy([score(i, j, True) for j in classes], classes.index(i)))
        terms.append(cross_entropy([score(j, i, False) for j in classes], classes.index(i)))
    return mean(terms)


def loop_sparc(image_tokens, text_tokens, text_mask, logit_scale):
    terms = []
    for i in range(B):
        patches, tokens = image_tokens[i, 1:], text_tokens[i][text_mask[i]]
        grouped = []
        for token in tokens:
            alike = [token @ patch for patch in patches]
            alike = [(value - min(alike)) / (max(alike) - min(alike)) for value in alike]
            alike = [value if value >= 1 / P else value * 0 for value in alike]
            grouped.append(sum((w / sum(alike)) * patch for w, patch in zip(alike, patches, strict=True)))
        logits = [[logit_scale * cosine(group, token) for token in tokens] for group in grouped]
        to_tokens = [cross_entropy(row, j) for j, row in enumerate(logits)]
        to_groups = [cross_entropy(list(column), j) for j, column in enumerate(zip(*logits, strict=True))]
        terms += [(one + other) / 2 for one, other in zip(to_tokens, to_groups, strict=True)]
    return mean(terms)


def loop_laps(image_tokens, text_tokens, text_mask, aggregation, same, keep=0.5, margin=0.2):
    return plain_triplet(laps_scores(image_tokens, text_tokens, text_mask, aggregation, keep), margin, same)


def loop_flair(image_tokens, image_embeds, sub_embeds, pooling, logit_scale, logit_bias, same):
    def log_sigmoid(value: Tensor) -> Tensor:
        return (1 / (1 + (-value).exp())).log()

    conditioned = multi = torch.zeros((), dtype=image_embeds.dtype)
    for i in range(B):
        for j in range(B):
            if i != j and same[i, j]:
                continue
            sign = 1 if i == j else -1
            for s in range(S):
                text = sub_embeds[j, s]
                alike = image_embeds[i] @ text / text.norm()
                multi = multi - log_sigmoid(sign * (logit_scale * alike + logit_bias))
                if i == j or s == 0:
                    pooled = pooling(text[None, None], image_tokens[i : i + 1, 1:])[0, 0]
                    conditioned = conditioned - log_sigmoid(sign * (logit_scale * cosine(pooled, text) + logit_bias))
    return (conditioned / (S + B - 1) + multi / (B * S)) / 2


def loop_beta_clip(image_tokens, sub_embeds, pooling, logit_scale, same, beta=0.5, objective="ce"):
    texts = [(j, s) for j in range(B) for s in range(S)]
    logits, counts = {}, {}
    for row, (i, r) in enumerate(texts):
        pooled = pooling(sub_embeds[i, r][None, None], image_tokens[i : i + 1, 1:])[0, 0]
        for column, (j, s) in enumerate(texts):
            if i == j or not same[i, j]:
                logits[row, column] = logit_scale * cosine(pooled, sub_embeds[j, s])
                counts[row, column] = 1.0 if (i, r) == (j, s) else beta if i == j else 0.0
    number = len(texts)
    terms = []
    for n in range(number):
        for line in ([(n, m) for m in range(number)], [(m, n) for m in range(number)]):
            places = [place for place in line if place in logits]
            if objective == "ce":
                total, norm = sum(logits[place].exp() for place in places), sum(counts[place] for place in places)
                terms.append(-sum(counts[p] / norm * (logits[p].exp() / total).log() for p in places))
            else:
                for place in places:
                    right = counts[place] > 0
                    sign, weight = (1, counts[place]) if right else (-1, 1.0)
                    terms.append(-weight * (1 / (1 + (-sign * logits[place]).exp())).log() / number)
    return sum(terms) / (2 * number)


def loop_goal_text_span(span_embeds, sub_embeds, sub_spans):
    terms = []
    for i in range(B):
        for s in range(S):
            first, end = sub_spans[i, s]
            if end > first:
                terms.append((1 - cosine(span_embeds[i, s], sub_embeds[i, s])) ** 2)
    return mean(terms)


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
