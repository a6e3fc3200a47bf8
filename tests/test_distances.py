"""Distances between image sets: against scipy, torch-fidelity, clean-fid, torchmetrics, and plain loops."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from finelip_diffusion import metrics
from finelip_diffusion.metrics import (
    FeatureStatistics,
    cmmd,
    cmmd_intervals,
    frechet_distance,
    frechet_intervals,
    kernel_distance,
    small_sample,
)

Statistics = tuple[np.ndarray, np.ndarray]


def features(n: int, num_features: int = 12, seed: int = 0, shift: float = 0.0, rank: int | None = None) -> np.ndarray:
    """Correlated features, in a subspace where a rank is given."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((rank or num_features, num_features))
    return rng.standard_normal((n, len(mixing))) @ mixing + shift


def statistics(rows: np.ndarray) -> Statistics:
    return rows.mean(0), np.cov(rows, rowvar=False)


def distance_by_sqrtm(a: Statistics, b: Statistics) -> float:
    from scipy.linalg import sqrtm

    root = sqrtm(a[1] @ b[1])
    return float(np.square(a[0] - b[0]).sum() + np.trace(a[1]) + np.trace(b[1]) - 2 * np.trace(root).real)


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("batch_size", [1, 7, 500])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_statistics_are_numpys_whatever_the_batches(batch_size: int, offset: float) -> None:
    """With an offset of 1e6 sums of squares in float64 would keep four digits of a variance of about 10."""
    rows = features(500, shift=offset)
    found = FeatureStatistics()
    for first in range(0, 500, batch_size):
        found.update(torch.from_numpy(rows[first : first + batch_size]))
    mean, covariance = statistics(rows)
    assert found.n == 500
    np.testing.assert_allclose(found.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-8)  # deviations of 1e6 + x: x rounds at 1e-10


def test_a_batch_is_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = features(500)
    whole, blocks = FeatureStatistics(), FeatureStatistics()
    whole.update(rows)
    monkeypatch.setattr(metrics, "BLOCK", 33)
    blocks.update(rows)
    np.testing.assert_allclose(blocks.covariance, whole.covariance, rtol=1e-12, atol=1e-12)


def test_parts_merge_to_the_whole() -> None:
    rows = features(300, shift=50)
    whole, merged = FeatureStatistics(), FeatureStatistics()
    whole.update(rows)
    for part in np.split(rows, [1, 120]):
        statistics_of_part = FeatureStatistics()
        statistics_of_part.update(part)
        merged.merge(statistics_of_part)
    merged.merge(FeatureStatistics())  # of a process that had nothing to do
    assert merged.n == whole.n
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_features_are_summed_in_float64(dtype: torch.dtype) -> None:
    rows = torch.from_numpy(features(200)).to(dtype)
    found = FeatureStatistics()
    found.update(rows)
    np.testing.assert_allclose(found.covariance, np.cov(rows.double().numpy(), rowvar=False), rtol=1e-11, atol=1e-11)


def test_statistics_are_saved_for_others_and_read_back(tmp_path: Path) -> None:
    rows, more = features(40), features(30, seed=1)
    kept = FeatureStatistics()
    kept.update(rows)
    kept.save(tmp_path / "a.stats")
    assert [path.name for path in tmp_path.iterdir()] == ["a.stats"]
    with np.load(tmp_path / "a.stats") as file:  # as pytorch-fid names them
        assert np.array_equal(file["mu"], kept.mean) and np.array_equal(file["sigma"], kept.covariance)
    read = FeatureStatistics.load(tmp_path / "a.stats")
    assert read.n == 40 and np.array_equal(read.mean, kept.mean)
    for statistics_so_far in (kept, read):
        statistics_so_far.update(more)
    np.testing.assert_allclose(read.covariance, kept.covariance, rtol=1e-12, atol=1e-12)


def test_statistics_say_what_is_wrong(tmp_path: Path) -> None:
    one = FeatureStatistics()
    with pytest.raises(ValueError, match="no image"):
        _ = one.mean
    one.update(np.ones((1, 3)))
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        _ = one.covariance
    with pytest.raises(ValueError, match="4 features, but those before have 3"):
        one.update(np.ones((2, 4)))
    with pytest.raises(ValueError, match="row 1 are not finite"):
        one.update(np.array([[1, 1, 1], [1, np.nan, 1]]))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        one.update(np.ones(3))
    with pytest.raises(ValueError, match="missing.npz holds no feature statistics"):
        FeatureStatistics.load(tmp_path / "missing.npz")
    np.savez(tmp_path / "pickle.npz", n=3, mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        FeatureStatistics.load(tmp_path / "pickle.npz")
    np.savez(tmp_path / "odd.npz", n=3, mu=np.ones(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match="sigma \\(2, 2\\)"):
        FeatureStatistics.load(tmp_path / "odd.npz")


# ------------------------------------------------------------------------------------------------ Frechet distance


@pytest.mark.parametrize("n", [400, 40])
def test_frechet_distance_is_that_of_four_others(n: int) -> None:
    """The formula with scipy's matrix root, torch-fidelity's, clean-fid's and torchmetrics' own computation."""
    from cleanfid.fid import frechet_distance as cleanfid_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    a, b = features(n), features(n, seed=1, shift=0.3)
    found = frechet_distance(*statistics(a), *statistics(b))
    theirs = [fid_features_to_statistics(torch.from_numpy(rows)) for rows in (a, b)]
    others = [
        distance_by_sqrtm(statistics(a), statistics(b)),
        fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"],
        cleanfid_distance(*statistics(a), *statistics(b)),
        _compute_fid(*(torch.from_numpy(value) for value in (*statistics(a), *statistics(b)))).item(),
    ]
    assert others == pytest.approx([found] * 4, rel=1e-9)  # float64, well-conditioned


@pytest.mark.parametrize(("n", "rank"), [(400, 5), (8, None)])
def test_singular_covariances_are_no_trouble(n: int, rank: int | None) -> None:
    """Features in a subspace, and fewer images than features. The matrix root of a singular product has few digits."""
    a, b = features(n, rank=rank), features(n, seed=1, shift=0.3, rank=rank)
    found = frechet_distance(*statistics(a), *statistics(b))
    assert found == pytest.approx(distance_by_sqrtm(statistics(a), statistics(b)), rel=1e-4)
    assert found == pytest.approx(frechet_distance(*statistics(b), *statistics(a)), rel=1e-6)


def test_the_distance_of_commuting_gaussians_is_known() -> None:
    a, b = np.array([4.0, 9.0, 0.0]), np.array([1.0, 0.0, 16.0])
    found = frechet_distance(np.zeros(3), np.diag(a), np.array([1.0, 2.0, 0.0]), torch.diag(torch.tensor(b)))
    assert found == pytest.approx(5 + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-12)


@pytest.mark.parametrize("rank", [12, 3, 0])
def test_identical_sets_have_no_distance(rank: int) -> None:
    rows = features(100, rank=rank) if rank else np.ones((100, 12))
    assert 0 <= frechet_distance(*statistics(rows), *statistics(rows)) <= 1e-6  # roots of rounded eigenvalues


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(3), np.eye(3), np.ones(2), np.eye(2)), "give (D,), (D, D), (D,), (D, D)"),
        ((np.ones(3), np.ones(3), np.ones(3), np.eye(3)), "give (D,), (D, D)"),
        ((np.ones((1, 3)), np.eye(3), np.ones((1, 3)), np.eye(3)), "give (D,), (D, D)"),
        ((np.ones(3), np.eye(3), np.ones(3), np.eye(3) * np.nan), "not finite"),
        ((np.ones(3) * np.inf, np.eye(3), np.ones(3), np.eye(3)), "not finite"),
    ],
)
def test_what_is_no_gaussian_is_refused(arguments: tuple[np.ndarray, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        frechet_distance(*arguments)


def test_too_few_images_are_warned_about() -> None:
    assert small_sample(2049, 2048) is None
    warning = small_sample(2048, 2048)
    assert warning is not None and "2,048 images are too few for 2,048 features" in warning


# ------------------------------------------------------------------------------------------------ intervals


def paired(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """References, a baseline and a condition near it: what is odd about a prompt shows in all three."""
    rng = np.random.default_rng(seed)
    prompts = rng.standard_normal((n, 6)) * [3, 2, 1, 1, 1, 1]
    noises = [0.2 * rng.standard_normal((n, 6)) for _ in range(3)]
    return prompts + noises[0], 1.3 * prompts + noises[1], 1.35 * prompts + noises[2]


@pytest.mark.parametrize("n", [60, 5])
def test_a_resample_is_the_distance_of_repeated_rows(n: int) -> None:
    """Against plain statistics of the rows drawn, repeated as often as drawn, with the same generator: of more rows
    than the 6 features, and of fewer."""
    references, base, other = paired(n, 0)
    found = frechet_intervals({"base": base, "other": torch.from_numpy(other)}, references, "base", 20, seed=3)
    rng = np.random.default_rng(3)
    drawn = [np.repeat(np.arange(n), rng.multinomial(n, np.full(n, 1 / n))) for _ in range(20)]

    def distances(values: np.ndarray) -> np.ndarray:
        return np.array([
            frechet_distance(*statistics(references[rows]), *statistics(values[rows]))
            for rows in [np.arange(n), *drawn]
        ])  # fmt: skip

    for figure, expected in (
        (found["base"], distances(base)),
        (found["other"], distances(other)),
        (found["other"]["difference"], distances(other) - distances(base)),
    ):
        value, reach = expected[0], 1.96 * expected[1:].std(ddof=1)
        assert figure["n"] == n
        assert [figure[key] for key in ("value", "low", "high")] == pytest.approx(
            [value, value - reach, value + reach], rel=1e-9
        )
    assert found["base"]["difference"] is None


def test_the_interval_is_as_wide_as_fresh_prompts_scatter() -> None:
    fresh = [paired(300, seed) for seed in range(1, 201)]
    distances = np.array([
        [frechet_distance(*statistics(references), *statistics(values)) for values in (base, other)]
        for references, base, other in fresh
    ])  # fmt: skip
    references, base, other = paired(300, 0)
    found = frechet_intervals({"base": base, "other": other}, references, "base", num_resamples=400)
    reaches = [
        (figure["high"] - figure["low"]) / 2 / 1.96 for figure in (found["other"], found["other"]["difference"])
    ]
    expected = [distances[:, 1].std(), (distances[:, 1] - distances[:, 0]).std()]
    assert reaches == pytest.approx(expected, rel=0.25)  # of 200 and 400 draws, and one sample stands for all
    assert reaches[1] < 0.7 * reaches[0]  # pairing: of independent sets it would be about 1.4 times as wide


def test_intervals_refuse_what_does_not_belong_together() -> None:
    rows = features(20)
    with pytest.raises(ValueError, match="no condition 'c' to compare with: choose among a, b"):
        frechet_intervals({"a": rows, "b": rows}, rows, "c")
    with pytest.raises(ValueError, match=r"features of b are \(19, 12\), those of the references \(20, 12\)"):
        frechet_intervals({"a": rows, "b": rows[1:]}, rows)
    with pytest.raises(ValueError, match="give at least 2"):
        frechet_intervals({"a": rows[:1]}, rows[:1])
    with pytest.raises(ValueError, match="num_resamples is 1"):
        frechet_intervals({"a": rows}, rows, num_resamples=1)


# ------------------------------------------------------------------------------------------------ kernel distances


def test_the_kernel_distance_is_a_plain_loops() -> None:
    a, b = features(9, 4), features(7, 4, seed=1, shift=0.5)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / 4 + 1) ** 3

    rng = np.random.RandomState(5)
    values = []
    for _ in range(3):
        x, y = a[rng.choice(9, 6, replace=False)], b[rng.choice(7, 6, replace=False)]
        within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(6) for j in range(6) if i != j)
        across = sum(kernel(x[i], y[j]) for i in range(6) for j in range(6))
        values.append(within / 30 - 2 * across / 36)
    found = kernel_distance(a, b, subset_size=6, num_subsets=3, seed=5)
    assert found["value"] == pytest.approx(np.mean(values), rel=1e-12)
    assert found["std"] == pytest.approx(np.std(values), rel=1e-12)
    assert min(values) <= found["low"] < found["high"] <= max(values)
    assert found["n"] == 7


def test_the_kernel_distance_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = features(80, seed=0), features(60, seed=1, shift=0.2)
    found = kernel_distance(a, b, subset_size=50, num_subsets=10, seed=7)
    theirs = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subset_size=50, kid_subsets=10, rng_seed=7, verbose=False
    )
    assert found["value"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert found["std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-10)


def test_the_kernel_distance_is_unbiased_and_the_frechet_distance_is_not() -> None:
    kernel, frechet = [], []
    for seed in range(60):
        a, b = (np.random.default_rng([seed, half]).standard_normal((30, 6)) for half in (0, 1))
        kernel.append(kernel_distance(a, b, subset_size=30, num_subsets=1)["value"])
        frechet.append(frechet_distance(*statistics(a), *statistics(b)))
    assert abs(np.mean(kernel)) < 3 * np.std(kernel) / np.sqrt(60)
    assert np.mean(frechet) > 3 * np.std(frechet) / np.sqrt(60)


def test_a_set_smaller_than_its_subsets_is_refused() -> None:
    with pytest.raises(ValueError, match="the smaller set has 40 images: give 2 to 40"):
        kernel_distance(features(50), features(40))
    with pytest.raises(ValueError, match="12 features in one set and 11 in the other"):
        kernel_distance(features(50), features(40)[:, 1:])


def test_cmmd_is_a_plain_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", 4)  # neither set is a multiple
    a, b = features(11, 5), features(9, 5, seed=1)
    before = a.copy()
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))

    def mean_kernel(left: np.ndarray, right: np.ndarray) -> float:
        return float(np.mean([[np.exp(-np.square(p - q).sum() / 200) for q in right] for p in left]))

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(a, b) == pytest.approx(expected, rel=1e-9)
    assert cmmd(5 * a, torch.from_numpy(b)) == pytest.approx(expected, rel=1e-9)  # lengths do not count
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)
    assert np.array_equal(a, before)


def test_cmmd_refuses_an_embedding_without_a_direction() -> None:
    rows = features(4)
    rows[2] = 0
    with pytest.raises(ValueError, match="an embedding of length 0"):
        cmmd(features(4), rows)
    with pytest.raises(ValueError, match="a set is empty"):
        cmmd(features(4), rows[:0])


def test_cmmd_intervals_equal_the_figure_and_a_plain_bootstrap():
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(60, 8))
    sets = {"near": reference + 0.3 * rng.normal(size=(60, 8)), "far": rng.normal(1.0, 1.0, size=(60, 8))}
    found = cmmd_intervals(sets, reference, baseline="far", num_resamples=40, seed=5)
    drawn = np.random.default_rng(5).multinomial(60, np.full(60, 1 / 60), 40)
    values = {name: [] for name in sets}
    for counts in drawn:
        places = np.repeat(np.arange(60), counts)
        for name, rows in sets.items():
            values[name].append(cmmd(rows[places], reference[places]))
    for name, rows in sets.items():
        assert found[name]["value"] == pytest.approx(cmmd(rows, reference), rel=1e-9)
        reach = 1.96 * np.std(values[name], ddof=1)
        assert found[name]["high"] - found[name]["value"] == pytest.approx(reach, rel=1e-6)
    assert found["far"]["difference"] is None
    difference = np.subtract(values["near"], values["far"])
    assert found["near"]["difference"]["value"] == pytest.approx(found["near"]["value"] - found["far"]["value"])
    reach = 1.96 * np.std(difference, ddof=1)
    own = found["near"]["difference"]
    assert own["high"] - own["value"] == pytest.approx(reach, rel=1e-6)
    with pytest.raises(ValueError, match="59 rows"):
        cmmd_intervals({"short": reference[1:]}, reference)
