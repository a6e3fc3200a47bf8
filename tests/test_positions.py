"""Stretching and merging of position tables, against loops written from the papers."""

import pytest
import torch

from finelip_diffusion.positions import find_ratio, merge_positions, stretch_positions, stretched_length


def stretch_by_loop(table, keep, ratio):
    """REFERENCE: the formula of `stretch_positions`, one row at a time, in float64."""
    old, last = table.double(), len(table) - 1
    rows = [old[p] for p in range(keep)]
    for i in range(last - keep):
        rows += [(1 - j / ratio) * old[keep + i] + j / ratio * old[keep + i + 1] for j in range(ratio)]
    rows += [old[last] + j / ratio * (old[last] - old[last - 1]) for j in range(ratio)]
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("rows", "keep", "ratio", "length"),
    [(77, 20, 4, 248), (77, 20, 5, 305), (77, 20, 1, 77), (77, 0, 3, 231), (77, 75, 4, 83), (9, 3, 7, 45)],
)
def test_stretching_equals_the_loop(rows, keep, ratio, length):
    table = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    stretched = stretch_positions(table, keep, ratio)
    assert stretched.shape == (length, 16) == (stretched_length(rows, keep, ratio), 16)
    # Both work in float64; the extrapolated rows associate differently, at most one float32 rounding apart.
    torch.testing.assert_close(stretched, stretch_by_loop(table, keep, ratio).float(), rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_old_rows_stay_bit_for_bit(dtype):
    table = torch.randn(77, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    stretched = stretch_positions(table)
    assert stretched.dtype == dtype and stretched.shape == (248, 32)
    assert torch.equal(stretched[:21], table[:21])
    assert torch.equal(stretched[20::4], table[20:])


def test_the_tail_goes_on_in_a_line():
    table = torch.arange(77.0).unsqueeze(1)
    assert torch.equal(stretch_positions(table)[20:, 0], 20 + torch.arange(228) / 4)


def test_a_table_that_needs_grad_gives_one_that_does_not_share_its_memory():
    table = torch.nn.Parameter(torch.randn(77, 4))
    stretched = stretch_positions(table)
    assert not stretched.requires_grad
    stretched.zero_()
    assert table.abs().min() > 0


def test_merging_takes_the_first_rows_of_the_first():
    kept, trained = torch.randn(248, 8), torch.randn(248, 8)
    mask = (torch.arange(248) < 20).float().unsqueeze(1)
    assert torch.equal(merge_positions(kept, trained), mask * kept + (1 - mask) * trained)


@pytest.mark.parametrize("ratio", [1, 2, 4, 9])
def test_the_ratio_is_found_back(ratio):
    assert find_ratio(77, stretched_length(77, 20, ratio)) == ratio


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: find_ratio(77, 250), r"max_length=250 .* 77 rows .* 248 \(ratio 4\) and 305 \(ratio 5\)"),
        (lambda: find_ratio(248, 77), "max_length=77 is shorter than the 248 rows"),
        (lambda: find_ratio(77, -3), "max_length=-3 is shorter"),
        (lambda: stretch_positions(torch.zeros(77, 4), keep=76), "keep is 76.* 0 to 75"),
        (lambda: stretch_positions(torch.zeros(77, 4), keep=-1), "keep is -1"),
        (lambda: stretch_positions(torch.zeros(77, 4), ratio=0), "ratio is 0"),
        (lambda: stretch_positions(torch.zeros(77)), r"shape \(77,\)"),
        (lambda: merge_positions(torch.zeros(248, 4), torch.zeros(77, 4)), r"\(248, 4\) and \(77, 4\)"),
        (lambda: merge_positions(torch.zeros(8, 4), torch.zeros(8, 4), keep=9), "keep is 9"),
    ],
)
def test_errors_name_value_and_limit(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
