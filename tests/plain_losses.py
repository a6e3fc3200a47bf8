"""Each loss as a plain loop over pairs, written from its paper, and a batch to compare on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
