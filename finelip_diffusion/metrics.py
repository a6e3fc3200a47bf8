"""Figures: how far sets of images are apart, what a reader finds of a prompt in an image, a probe in text states."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from .files import writing
from .probing import mean_states, stated_facts
from .scenes import ATTRIBUTES, describe, sample_scene

BLOCK = 1024  # rows that are taken into float64, or compared with as many others, at once
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # as its authors have them

Features: TypeAlias = np.ndarray | Tensor

# ---------------------------------------------------------------------------------------- distances between image sets


def _rows(features: Features) -> np.ndarray:
    """Features (N, D) in float64.

    Raises:
        ValueError: If they have another shape, or are not finite.
    """
    if isinstance(features, Tensor):
        features = features.detach().cpu().double().numpy()
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"features have the shape {rows.shape}: give (images, features).")
    if not np.isfinite(rows).all():
        wrong = int(np.isfinite(rows).all(1).argmin())
        raise ValueError(f"the features of row {wrong} are not finite: compute them in float32, or drop that image.")
    return rows


class FeatureStatistics:
    """Number, mean and covariance of features that come batch after batch, in float64.

    Deviations are taken from the mean of what has come so far (Chan, Golub and LeVeque, "Updating formulae and a
    pairwise algorithm for computing sample variances", 1979): sums of squares would lose all digits where the mean is
    large. Memory is that of one covariance, however many features come and in batches of whatever size.

    Attributes:
        n: how many features have come.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))  # sum of the outer products of deviations from the mean

    def update(self, features: Features) -> None:
        """Takes in a batch.

        Args:
            features: (N, D), of any type, on any device.

        Raises:
            ValueError: If they are not finite, or D is not that of the batches before.
        """
        for first in range(0, len(features), BLOCK):
            rows = _rows(features[first : first + BLOCK])
            mean = rows.mean(0)
            self._add(len(rows), mean, (rows - mean).T @ (rows - mean))

    def merge(self, other: "FeatureStatistics") -> None:
        """Takes in what others have counted: of several processes, say.

        Raises:
            ValueError: If the numbers of features differ.
        """
        if other.n:
            self._add(other.n, other._mean, other._scatter)

    def _add(self, n: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not self.n:
            self._mean, self._scatter = np.zeros_like(mean), np.zeros_like(scatter)
        if mean.shape != self._mean.shape:
            raise ValueError(f"images have {len(mean)} features, but those before have {len(self._mean)}.")
        offset, total = mean - self._mean, self.n + n
        self._mean = self._mean + offset * (n / total)
        self._scatter = self._scatter + scatter + np.outer(offset, offset) * (self.n * n / total)
        self.n = total

    @property
    def mean(self) -> np.ndarray:
        """(D,). Needs one image."""
        if self.n < 1:
            raise ValueError("there is no image: a mean needs at least 1.")
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), unbiased. Needs two images."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.n}.")
        return self._scatter / (self.n - 1)

    def save(self, path: str | Path) -> None:
        """Writes `n`, `mu` and `sigma` as .npz, atomically; other tools read the latter two."""
        with writing(path) as part, part.open("wb") as file:
            np.savez(file, n=self.n, mu=self.mean, sigma=self.covariance)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """Reads what `save` has written.

        Raises:
            ValueError: If the file is missing or damaged, would have to run code, or holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                n, mean, covariance = int(file["n"]), file["mu"], file["sigma"]
            if covariance.shape != mean.shape * 2:
                raise ValueError(f"mu is {mean.shape}, sigma {covariance.shape}")
        except Exception as error:  # a broken archive may raise anything: OSError, BadZipFile, KeyError, ...
            raise ValueError(f"{path} holds no feature statistics (n, mu, sigma): {error}.") from error
        statistics = cls()
        statistics._add(n, mean, covariance * (n - 1))
        return statistics


def small_sample(n: int, num_features: int) -> str | None:
    """A sentence of warning where a Frechet distance rests on too few images, else None.

    With no more images than features a covariance is singular; for Inception's 2048 that is the field's rule.
    """
    if n > num_features:
        return None
    return (
        f"{n:,} images are too few for {num_features:,} features: the covariance is singular and the Frechet distance "
        "far too large; compare it with others of as many images only, or read the kernel distance."
    )


def frechet_distance(mean_a: Features, cov_a: Features, mean_b: Features, cov_b: Features) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al., arXiv 1706.08500, equation 6).

    |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)). The last trace is that of the symmetric
    (R^T C_b R)^(1/2), where C_a = R R^T: its eigenvalues are real, and where C_a is singular, R has fewer columns.

    Args:
        mean_a, mean_b: (D,).
        cov_a, cov_b: (D, D), symmetric, of any rank.

    Returns:
        At least 0.

    Raises:
        ValueError: If the shapes do not fit or a value is not finite.
    """
    mean_a, cov_a, mean_b, cov_b = (
        np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float64)
        for value in (mean_a, cov_a, mean_b, cov_b)
    )
    shapes = [value.shape for value in (mean_a, cov_a, mean_b, cov_b)]
    if mean_a.ndim != 1 or shapes != [shapes[0], shapes[0] * 2] * 2:
        raise ValueError(f"means and covariances have the shapes {shapes}: give (D,), (D, D), (D,), (D, D).")
    if not all(np.isfinite(value).all() for value in (mean_a, cov_a, mean_b, cov_b)):
        raise ValueError("a mean or covariance is not finite: look for NaN or infinity in the features.")
    root = _root(cov_a)
    shared = np.sqrt(np.linalg.eigvalsh(root.T @ cov_b @ root).clip(0)).sum()
    return max(0.0, float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * shared))


def _root(covariance: np.ndarray) -> np.ndarray:
    """R (D, rank) with R R^T = covariance."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps  # what is below is a rounded zero
    return vectors[:, kept] * np.sqrt(values[kept])


def frechet_intervals(
    features: Mapping[str, Features],
    references: Features,
    baseline: str | None = None,
    num_resamples: int = 100,
    seed: int = 0,
    paired: bool = True,
) -> dict[str, dict[str, Any]]:
    """Frechet distances of several conditions to one set of references, and how sure they and their differences are.

    Row i of all sets belongs to prompt i. Prompts are drawn anew, with replacement and the same for all sets, so what
    makes a prompt hard for every condition alike leaves their difference. The interval is normal: 1.96 standard
    deviations over the resamples to either side of the value of all prompts. A percentile interval would be wrong:
    a resample holds 63% of the prompts, many of them twice, so its distances lie well above the value, mostly outside
    of it where images are few.

    Args:
        features: (N, D) of each condition's images.
        references: (N, D) of the real images.
        baseline: name of the condition that the others are compared with.
        num_resamples: how often prompts are drawn.
        seed: any integer.
        paired: whether row i of the references belongs to prompt i, too; otherwise they may be more or fewer, and are
            drawn by themselves.

    Returns:
        `value`, `low`, `high` and `n` of each condition, and as `difference` the same of its value less the
        baseline's; None for the baseline itself, or where there is none.

    Raises:
        ValueError: If the sets differ in shape, have fewer than two rows or values that are not finite, or there is no
            such baseline.
    """
    if baseline is not None and baseline not in features:
        raise ValueError(f"there is no condition {baseline!r} to compare with: choose among {', '.join(features)}.")
    if num_resamples < 2:
        raise ValueError(f"num_resamples is {num_resamples}: a standard deviation needs at least 2.")
    shape = tuple(references.shape) if paired else (len(next(iter(features.values()))), references.shape[1])
    n = shape[0]
    if min(n, len(references)) < 2:
        raise ValueError(f"the references have {len(references)} rows: give at least 2.")
    for name, rows in features.items():
        if rows.shape != shape:
            raise ValueError(
                f"the features of {name} are {tuple(rows.shape)}, those of the references {tuple(references.shape)}: "
                "give one row for each prompt in both."
            )

    def distances(weights: np.ndarray, others: np.ndarray) -> list[float]:
        reference = _weighted_statistics(references, others)
        return [_squared_distance(*reference, *_weighted_statistics(rows, weights)) for rows in features.values()]

    values = dict(zip(features, distances(np.ones(n), np.ones(len(references))), strict=True))
    rng = np.random.default_rng(seed)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        weights = rng.multinomial(n, np.full(n, 1 / n))
        m = len(references)
        return weights, weights if paired else rng.multinomial(m, np.full(m, 1 / m))

    drawn = np.array([distances(*draw()) for _ in range(num_resamples)])
    resampled = dict(zip(features, drawn.T, strict=True))
    figures: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        figures[name] = _normal_interval(value, resampled[name], n) | {"difference": None}
        if baseline not in (None, name):
            figures[name]["difference"] = _normal_interval(
                value - values[baseline], resampled[name] - resampled[baseline], n
            )
    return figures


def _weighted_statistics(features: Features, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of features (N, D) of which each counts `weights` (N,) times, and F (at most D, D): F^T F, unbiased, is
    their covariance."""
    kept = np.flatnonzero(weights)
    rows, weights, n = _rows(features[kept]), weights[kept], weights.sum()  # a copy, which is changed in place
    mean = weights @ rows / n
    rows -= mean
    rows *= np.sqrt(weights / (n - 1))[:, None]
    return mean, np.asarray(np.linalg.qr(rows, mode="r")) if len(rows) > rows.shape[1] else rows


def _squared_distance(mean_a: np.ndarray, factor_a: np.ndarray, mean_b: np.ndarray, factor_b: np.ndarray) -> float:
    """`frechet_distance` by factors of the covariances: tr((C_a C_b)^(1/2)) is the sum of the singular values of
    F_a F_b^T, a matrix as small as the number of images where that is below the number of features."""
    shared = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    return max(0.0, float(sum(np.square(part).sum() for part in (mean_a - mean_b, factor_a, factor_b)) - 2 * shared))


def _normal_interval(value: float, resampled: np.ndarray, n: int) -> dict[str, float | int]:
    reach = 1.96 * float(resampled.std(ddof=1))
    return {"value": value, "low": value - reach, "high": value + reach, "n": n}


def kernel_distance(
    a: Features, b: Features, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> dict[str, Any]:
    """Kernel distance (KID; Binkowski et al., arXiv 1801.01401, section 4): unbiased, also for few images.

    The unbiased squared MMD under the kernel (x . y / D + 1)^3, averaged over random subsets, which are those that
    torch-fidelity draws from the same seed.

    Args:
        a, b: (N, D) and (M, D).
        subset_size: images of each set in a subset.
        num_subsets: how many are drawn.
        seed: from 0 to 2^32 - 1.

    Returns:
        `value`, the mean over subsets, which may be below 0 where the sets are alike; `std` over subsets, and `low`
        and `high`, between which 95% of them lie: what a distance of `subset_size` images scatters. A subset that is
        nearly the whole set does not scatter, and then they say nothing. `n`, the size of the smaller set; `subsets`,
        the value of each: sets of one size are compared on the same rows, so their values can be paired.

    Raises:
        ValueError: If a set is smaller than a subset, the features' numbers differ, or a value is not finite.
    """
    a, b = _pair(a, b)
    n = min(len(a), len(b))
    if not 2 <= subset_size <= n:
        raise ValueError(f"subset_size is {subset_size}, but the smaller set has {n} images: give 2 to {n}.")
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        x, y = (rows[rng.choice(len(rows), subset_size, replace=False)] for rows in (a, b))
        within = sum(kernel.sum() - np.trace(kernel) for kernel in (_cubic_kernel(x, x), _cubic_kernel(y, y)))
        values.append(within / (subset_size * (subset_size - 1)) - 2 * _cubic_kernel(x, y).mean())
    low, high = np.quantile(values, (0.025, 0.975))
    return {
        "value": float(np.mean(values)),
        "std": float(np.std(values)),
        "low": float(low),
        "high": float(high),
        "n": n,
        "subsets": values,
    }


def _pair(a: Features, b: Features) -> tuple[np.ndarray, np.ndarray]:
    a, b = _rows(a), _rows(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"images have {a.shape[1]} features in one set and {b.shape[1]} in the other.")
    return a, b


def _cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def cmmd(a: Features, b: Features, sigma: float = CMMD_SIGMA, scale: float = CMMD_SCALE) -> float:
    """CMMD (Jayasumana et al., arXiv 2401.09603): the squared MMD of CLIP embeddings under a Gaussian kernel.

    The biased estimate, as in the authors' code: kernels of an image with itself count. Embeddings are brought to
    length 1 here. Kernels are then all above 0.98, so the differences of their means are taken in float64.

    Args:
        a, b: (N, D) and (M, D), of the image tower of CLIP ViT-L/14 at 336 pixels for figures as published.
        sigma: bandwidth of the kernel.
        scale: what the figure is multiplied by.

    Raises:
        ValueError: If a set is empty, the features' numbers differ, or an embedding is not finite or zero.
    """
    x, y = (_of_length_1(rows) for rows in _pair(a, b))
    means = [_mean_kernel(*pair, sigma) for pair in ((x, x), (y, y), (x, y))]
    return scale * (means[0] + means[1] - 2 * means[2])


def cmmd_intervals(
    features: Mapping[str, Features],
    references: Features,
    baseline: str | None = None,
    num_resamples: int = 100,
    seed: int = 0,
    paired: bool = True,
) -> dict[str, dict[str, Any]]:
    """CMMD of several conditions to one set of references, and how sure it and their differences are.

    Rows, arguments, intervals and the result are as those of `frechet_intervals`. A resample counts each row as often
    as it was drawn, so every kernel is computed once.
    """
    rng = np.random.default_rng(seed)
    n, m = len(references) if paired else len(next(iter(features.values()))), len(references)
    counts = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), num_resamples)]) / n  # (1 + R, N), sums 1
    others = counts
    if not paired:
        others = np.vstack([np.ones(m), rng.multinomial(m, np.full(m, 1 / m), num_resamples)]) / m  # (1 + R, M)
    y = _of_length_1(_rows(references))
    own = _mean_kernels(y, y, others, others)
    resampled = {}
    for name, rows in features.items():
        x = _of_length_1(_pair(rows, references)[0])
        if len(x) != n:
            raise ValueError(f"{name} has {len(x)} rows, the references {n}: give one row for each prompt in both.")
        pairs = _mean_kernels(x, x, counts, counts) + own - 2 * _mean_kernels(x, y, counts, others)
        resampled[name] = CMMD_SCALE * pairs
    figures: dict[str, dict[str, Any]] = {}
    for name, drawn in resampled.items():
        figures[name] = _normal_interval(float(drawn[0]), drawn[1:], n) | {"difference": None}
        if baseline not in (None, name):
            difference = drawn - resampled[baseline]
            figures[name]["difference"] = _normal_interval(float(difference[0]), difference[1:], n)
    return figures


def _mean_kernels(x: np.ndarray, y: np.ndarray, weights: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Mean kernels of x (N, D) with y (M, D), rows weighted by each of `weights` (R, N) and `others` (R, M): (R,)."""
    sums = np.zeros(len(weights))
    for first in range(0, len(x), BLOCK):
        rows = slice(first, first + BLOCK)
        kernel = np.exp((x[rows] @ y.T - 1) / CMMD_SIGMA**2)  # |x - y|^2 = 2 - 2 x.y
        sums += ((weights[:, rows] @ kernel) * others).sum(1)
    return sums


def _of_length_1(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (len(rows) and norms.all()):
        raise ValueError("a set is empty, or has an embedding of length 0: compute the embeddings anew.")
    return rows / norms


def _mean_kernel(x: np.ndarray, y: np.ndarray, sigma: float) -> float:
    """Mean over all pairs of exp(-|x - y|^2 / (2 sigma^2)), of rows of length 1, block by block."""
    total = sum(
        np.exp((x[i : i + BLOCK] @ y[j : j + BLOCK].T - 1) / sigma**2).sum()
        for i in range(0, len(x), BLOCK)
        for j in range(0, len(y), BLOCK)
    )
    return float(total) / (len(x) * len(y))


# --------------------------------------------------------------------------------------- prompts, images, text states


def linear_probe(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Accuracy of a linear classifier, fitted by ridge regression to one-hot labels.

    Args:
        features: (N, D), and test_features (M, D), of any scale.
        labels: (N,), and test_labels (M,), classes from 0.
    """
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    train, test = (
        F.pad((values.double() - mean) / deviation, (0, 1), value=1.0) for values in (features, test_features)
    )
    targets = F.one_hot(labels).double()
    gram = train.T @ train + 1e-3 * len(train) * torch.eye(train.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, train.T @ targets)
    return ((test @ weights).argmax(1) == test_labels).double().mean().item()


@torch.inference_mode()
def probe_text_states(
    encoder: CLIPTextModel,
    tokenizer: PreTrainedTokenizerBase,
    num_captions: int = 600,
    num_objects: tuple[int, int] = (1, 9),
) -> dict[str, dict[str, float]]:
    """What a linear probe reads of a fact from the token states that a UNet attends to.

    Half of the captions, from the training split, fit the probe; the other half, from the test split, are scored.
    Facts that do not fit the encoder's window are left out.

    Returns:
        Accuracies by attribute (`cell`, `colour`, `shape`, `size`), from the state of the fact's last token (`"last"`)
        and from the mean over its tokens (`"mean"`). Chance: 0.11, 0.13, 0.17, 0.50.
    """
    length = encoder.config.max_position_embeddings
    features: dict[str, dict[str, list[Tensor]]] = {split: {"last": [], "mean": []} for split in ("train", "test")}
    labels: dict[str, list[Tensor]] = {"train": [], "test": []}
    for split in features:
        for seed in range(num_captions // 2):
            caption = describe(sample_scene(seed, split, num_objects), seed)
            batch = tokenizer(str(caption), truncation=True, max_length=length, return_tensors="pt")
            states = encoder(batch.input_ids).last_hidden_state.float()  # (1, T, D)
            facts = stated_facts([caption], tokenizer, length)
            features[split]["last"].append(states[0, facts[:, 2]])
            features[split]["mean"].append(mean_states(states, facts))
            labels[split].append(facts[:, 3:])
    targets = {split: torch.cat(rows) for split, rows in labels.items()}
    return {
        name: {
            kind: linear_probe(
                torch.cat(features["train"][kind]), targets["train"][:, column],
                torch.cat(features["test"][kind]), targets["test"][:, column],
            )
            for kind in ("last", "mean")
        }
        for column, name in enumerate(ATTRIBUTES)
    }  # fmt: skip


@torch.inference_mode()
def state_drift(
    encoder: CLIPTextModel, stock_encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> dict[str, dict[str, float | list[float]]]:
    """How far the token states of short prompts have moved from the stock encoder's, layer by layer.

    A UNet of Stable Diffusion 1.x attends to `last_hidden_state`, one of SDXL to `hidden_states[-2]`. The start token
    is left out: its state is the same for every prompt. So is padding.

    Args:
        encoder: the long encoder.
        stock_encoder: the one that it was made of.
        tokenizer: of both.
        prompts: texts that fit the stock encoder.

    Returns:
        For `hidden_states[0]` (the embeddings), ..., `hidden_states[L]`, and `last_hidden_state` (after the final
        norm):

        - `rms`: root mean square of the difference, relative to that of the stock states, over all tokens,
        - `cosine`: mean over all tokens of the cosine with the stock state,
        - `prompt_rms`, `prompt_cosine`: the same over the tokens of each prompt.

    Raises:
        ValueError: if there is no prompt, one is longer than the stock encoder reads or empty, or the encoders' layers
            or widths differ.
    """
    shapes = [(model.config.num_hidden_layers, model.config.hidden_size) for model in (encoder, stock_encoder)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The encoders have (layers, width) {shapes[0]} and {shapes[1]}: compare two of one shape.")
    rows = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts]
    limit = stock_encoder.config.max_position_embeddings
    if not rows or not all(3 <= len(row) <= limit for row in rows):
        wrong = next((len(row) for row in rows if not 3 <= len(row) <= limit), None)
        found = "There is no prompt" if wrong is None else f"A prompt has {wrong} tokens"
        raise ValueError(f"{found}: drift is measured on prompts of 3 to {limit} tokens, start and end included.")
    sums = []
    for row in rows:
        moved, kept = (_states(model, row) for model in (encoder, stock_encoder))  # (L + 2, T - 1, D)
        cosines = F.cosine_similarity(moved, kept, dim=-1)
        squares = [states.square().sum((1, 2)) for states in (moved - kept, kept)]
        sums.append(torch.stack([*squares, cosines.sum(1)]))
    difference, size, cosine = torch.stack(sums, dim=2)  # (L + 2, prompts) each
    counts = torch.tensor([len(row) - 1 for row in rows])
    names = [*(f"hidden_states[{layer}]" for layer in range(len(size) - 1)), "last_hidden_state"]
    return {
        name: {
            "rms": (difference[layer].sum() / size[layer].sum()).sqrt().item(),
            "cosine": (cosine[layer].sum() / counts.sum()).item(),
            "prompt_rms": (difference[layer] / size[layer]).sqrt().tolist(),
            "prompt_cosine": (cosine[layer] / counts).tolist(),
        }
        for layer, name in enumerate(names)
    }


def _states(encoder: CLIPTextModel, row: list[int]) -> Tensor:
    """A prompt's states, the start token's aside: embeddings, every layer, final norm, (L + 2, T - 1, D)."""
    output = encoder(torch.tensor([row], device=encoder.device), output_hidden_states=True)
    return torch.cat([*output.hidden_states, output.last_hidden_state])[:, 1:].double().cpu()
