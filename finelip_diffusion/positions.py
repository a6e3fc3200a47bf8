"""Position tables: knowledge-preserved stretching to longer prompts, and the merging of kept and trained tables.

Source of the method: Long-CLIP (Zhang et al., ECCV 2024, arXiv 2403.15378, section 3.1); FineLIP uses it unchanged.
"""

import torch
from torch import Tensor

KEPT_POSITIONS = 20
"""Rows that stay as they are: the ones that CLIP's training captions reached often."""

STOCK_POSITIONS = 77
"""Rows of CLIP's text tower as it was published: an encoder with more of them is a long one."""

STRETCH_RATIO = 4
"""Steps that one old step becomes, after the kept rows; 77 rows become 248."""


def stretched_length(rows: int, keep: int = KEPT_POSITIONS, ratio: int = STRETCH_RATIO) -> int:
    """Rows of a table of `rows` rows after stretching: `keep + ratio * (rows - keep)`.

    Args:
        rows: Rows of the old table, at least `keep + 2` (the tail is extrapolated from the last two).
        keep: Rows that are kept, at least 0.
        ratio: New steps for an old one, at least 1.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if keep < 0 or rows < keep + 2:
        raise ValueError(f"keep is {keep}, but a table of {rows} rows can keep 0 to {rows - 2}: lower keep.")
    if ratio < 1:
        raise ValueError(f"ratio is {ratio}, but a table is stretched by a whole number of at least 1.")
    return keep + ratio * (rows - keep)


def find_ratio(rows: int, target: int, keep: int = KEPT_POSITIONS) -> int:
    """The ratio that stretches `rows` rows to exactly `target` rows.

    Args:
        rows: Rows of the old table, at least `keep + 2`.
        target: Wanted rows.
        keep: Rows that are kept.

    Returns:
        The ratio, at least 1 (1 where `target == rows`).

    Raises:
        ValueError: If no whole ratio reaches `target`; the sentence names the nearest lengths that can be reached.
    """
    stretched_length(rows, keep, 1)
    ratio, rest = divmod(target - keep, rows - keep)
    if ratio < 1:
        raise ValueError(f"max_length={target} is shorter than the {rows} rows of the table: ask for at least {rows}.")
    if rest:
        below, above = stretched_length(rows, keep, ratio), stretched_length(rows, keep, ratio + 1)
        raise ValueError(
            f"max_length={target} cannot be reached from {rows} rows with {keep} kept: "
            f"the nearest lengths are {below} (ratio {ratio}) and {above} (ratio {ratio + 1})."
        )
    return ratio


def stretch_positions(table: Tensor, keep: int = KEPT_POSITIONS, ratio: int = STRETCH_RATIO) -> Tensor:
    """Stretches a position table after its first rows (knowledge-preserved stretching, Long-CLIP section 3.1).

    With N the new table and E the old one of L rows, i counting from 0 and j = 0..ratio-1:

        N[p]                    = E[p]                                                 p < keep
        N[keep + ratio * i + j] = (1 - j/ratio) E[keep + i] + (j/ratio) E[keep + i + 1]    i < L - 1 - keep
        N[keep + ratio * (L - 1 - keep) + j] = E[L-1] + (j/ratio) (E[L-1] - E[L-2])

    The last line, a linear extrapolation, is not in the printed formula; the authors' code does it. Rows with j = 0,
    and so rows 0..keep, are the old rows bit for bit.

    Args:
        table: (L, D), any floating dtype; the arithmetic is done in float64 and cast back.
        keep: Rows that are kept, 0 to L - 2.
        ratio: New steps for an old one, at least 1.

    Returns:
        (keep + ratio * (L - keep), D), in the dtype and on the device of `table`.

    Raises:
        ValueError: If the table is not two-dimensional, or `keep` or `ratio` is out of its range.
    """
    if table.ndim != 2:
        raise ValueError(f"a position table has shape (rows, width), but this one has shape {tuple(table.shape)}.")
    length = stretched_length(table.shape[0], keep, ratio)
    old = table.detach().cpu().double()  # float64 does not exist on every accelerator
    old = torch.cat([old, 2 * old[-1:] - old[-2:-1]])  # (L, D) -> (L + 1, D): the tail's far end
    step = torch.arange(length - keep)
    left, weight = keep + step // ratio, (step % ratio / ratio).double().unsqueeze(-1)
    after = torch.where(weight == 0, old[left], (1 - weight) * old[left] + weight * old[left + 1])
    return torch.cat([table.detach()[:keep], after.to(table)])  # (keep, D), (ratio * (L - keep), D)


def merge_positions(kept: Tensor, trained: Tensor, keep: int = KEPT_POSITIONS) -> Tensor:
    """One table out of the two that FineLIP and Long-CLIP checkpoints hold.

    Their forward pass adds `mask1 * kept + mask2 * trained`, where mask1 is 1 on rows `[0, keep)` and mask2 on the
    rest; a table with those rows is the same function.

    Args:
        kept: (L, D), the frozen table.
        trained: (L, D), the table that was trained.
        keep: Rows taken from `kept`, 0 to L.

    Returns:
        (L, D), a new tensor.

    Raises:
        ValueError: If the shapes differ or `keep` is out of its range.
    """
    if kept.shape != trained.shape or kept.ndim != 2:
        raise ValueError(
            f"the two position tables must have one shape (rows, width), "
            f"but they have {tuple(kept.shape)} and {tuple(trained.shape)}."
        )
    if not 0 <= keep <= kept.shape[0]:
        raise ValueError(f"keep is {keep}, but tables of {kept.shape[0]} rows can keep 0 to {kept.shape[0]}.")
    return torch.cat([kept[:keep], trained[keep:]])


def is_only_stretched(table: Tensor, keep: int = KEPT_POSITIONS) -> bool:
    """Whether a long table is one of 77 rows that was stretched and never trained after its kept rows.

    Such a table lies, after its kept rows, exactly on straight lines from every old row to the next. So do tables of
    encoders that were stretched and nothing more, and the frozen one of the two tables of Long-CLIP's and FineLIP's
    checkpoints, which some conversions took for the only one.

    Args:
        table: (L, D).
        keep: Rows that stretching left as they were.

    Returns:
        False for tables of at most 77 rows, and of lengths that no stretching of 77 rows reaches. "Exactly" is up to
        the rounding of the coarsest type that holds every number of the table: the stretching may have been done in
        float16 and saved in float32.
    """
    rows = table.shape[0] if table.ndim == 2 else 0
    ratio, rest = divmod(rows - keep, STOCK_POSITIONS - keep)
    if ratio < 2 or rest or keep < 0:
        return False
    old = torch.cat([table[:keep], table[keep::ratio]])  # (L, D) -> (77, D)
    line = stretch_positions(old, keep, ratio).double()
    exact = [dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(table.to(dtype).to(table), table)]
    precision = torch.finfo(exact[0] if exact else table.dtype)
    ends = old[keep:].double().abs()
    size = ends + torch.cat([ends[1:], ends[-2:-1]])  # the last line goes on from the one before
    size = size.repeat_interleave(ratio, dim=0)  # (77 - keep, D) -> (L - keep, D)
    away = (table.double() - line).abs()[keep:]
    return bool((away <= 2 * precision.eps * size + precision.smallest_normal).all())
