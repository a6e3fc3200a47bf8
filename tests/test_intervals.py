"""Bootstrap intervals cover what they say; figures and tables are written in one way."""

import numpy as np
import pytest
import torch

from finelip_diffusion.evaluation.intervals import bootstrap_interval, interval, markdown_table, number, shown


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Of 100 samples, 95 give or take three standard deviations (2.2 each)."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        figure = bootstrap_interval(torch.from_numpy(rng.random(100) < 0.6))
        covered += figure["low"] <= 0.6 <= figure["high"]
    assert 88 <= covered <= 100


def test_values_of_one_cluster_count_as_one() -> None:
    """Five copies of each value say nothing new: the same interval, and a narrower one where each stands alone."""
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    alone, copied = bootstrap_interval(values), values.repeat_interleave(5)
    together = bootstrap_interval(copied, torch.arange(50).repeat_interleave(5))
    for key in ("value", "low", "high"):
        assert together[key] == pytest.approx(alone[key])
    assert together["n"] == 250
    apart = bootstrap_interval(copied)
    assert apart["high"] - apart["low"] < 0.6 * (alone["high"] - alone["low"])


def test_there_is_no_interval_of_one_cluster_and_no_value_of_nothing() -> None:
    one = bootstrap_interval(torch.tensor([1.0, 0.0]), torch.tensor([7, 7]))
    assert one == {"value": 0.5, "low": None, "high": None, "n": 2}
    assert bootstrap_interval(torch.tensor([]))["value"] is None


def test_figures_are_written_in_one_way() -> None:
    figure = {"value": -0.12345, "low": -1234.5, "high": 0.00001, "n": 3}
    assert shown(figure) == "−0.123 [−1,234.500, 0.000]"
    assert shown(figure, 2, sign=True) == "−0.12 [−1,234.50, 0.00]"
    assert number(-0.0001, 3) == "0.000"  # no minus before zero
    assert (number(None), interval(None), shown(None)) == ("–", "", "–")
    assert shown({"value": 0.5, "low": None, "high": None}) == "0.500"


def test_a_table_is_markdown_whatever_its_cells_hold() -> None:
    assert markdown_table(["a", "b|c"], [["1", "2"]]) == ["| a | b\\|c |", "| --- | --- |", "| 1 | 2 |"]
