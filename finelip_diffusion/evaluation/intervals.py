"""How sure a figure is: means with bootstrap intervals, and how they are written, alone and in tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 2000


def bootstrap_interval(values: Tensor, clusters: Tensor | None = None) -> dict[str, float | int | None]:
    """A mean with its 95% percentile bootstrap interval.

    Clusters are drawn anew, not values: captions of one image, and near-duplicates, stand or fall together.

    Args:
        values: (N,).
        clusters: (N,), integers; values of the same number belong together. By default each stands alone.

    Returns:
        `value`, `low`, `high`, and `n`, the number of values. The interval is None with fewer than two clusters, and
        so is the value where there is none.
    """
    from scipy.stats import bootstrap

    members = torch.arange(len(values)) if clusters is None else clusters.unique(return_inverse=True)[1]
    sums = np.bincount(members.numpy(), values.double().numpy())
    sizes = np.bincount(members.numpy()).astype(float)

    def mean(sums: np.ndarray, sizes: np.ndarray, axis: int = -1) -> np.ndarray:
        return sums.sum(axis) / sizes.sum(axis)

    figure: dict[str, float | int | None] = {"value": None, "low": None, "high": None, "n": len(values)}
    if len(sums):
        figure["value"] = float(mean(sums, sizes))
    if len(sums) > 1:
        batch = max(1, 10**7 // len(sums))  # resamples at once: 80 MB of each array
        interval = bootstrap(
            (sums, sizes), mean, paired=True, n_resamples=RESAMPLES, batch=batch, method="percentile", rng=0
        ).confidence_interval
        figure |= {"low": float(interval.low), "high": float(interval.high)}
    return figure


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A value as text; "–" where there is none."""
    if value is None:
        return "–"
    rounded = round(value, digits) + 0.0  # no minus before zero
    return f"{rounded:{'+' if sign and rounded else ''},.{digits}f}".replace("-", "−")


def interval(figure: Mapping[str, Any] | None, digits: int = 3, sign: bool = False) -> str:
    """`[low, high]`; empty where there is none."""
    if figure is None or figure.get("low") is None or figure.get("high") is None:
        return ""
    return f"[{number(figure['low'], digits, sign)}, {number(figure['high'], digits, sign)}]"


def shown(figure: Mapping[str, Any] | None, digits: int = 3, sign: bool = False) -> str:
    """A figure with its interval as text: `0.458 [0.412, 0.501]`."""
    value = number(None if figure is None else figure["value"], digits, sign)
    return f"{value} {interval(figure, digits, sign)}".rstrip()


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    escaped = [[str(cell).replace("|", "\\|") for cell in line] for line in (heads, ["---"] * len(heads), *rows)]
    return [f"| {' | '.join(line)} |" for line in escaped]
