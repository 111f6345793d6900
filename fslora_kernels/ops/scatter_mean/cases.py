"""Shapes that every backend is tested and measured on, declared once, and inputs of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Case:
    """One call's shape and what is special about it.

    Attributes:
        name: readable id.
        sketch_sizes: S of each participant.
        features: F.
        size: R.
        strided: the rows are a transposed view.
        weighted: the denominator is a tensor, 0 in the first rank.
    """

    name: str
    sketch_sizes: tuple[int, ...]
    features: int
    size: int
    strided: bool = False
    weighted: bool = False


CASES = (
    Case("three_participants", (4, 8, 2), 64, 8),
    Case("one_rank_each", (1,) * 9, 48, 16),
    Case("every_rank", (8, 8, 8), 32, 8),
    Case("one_rank_in_all", (1, 1, 1), 33, 1),
    Case("odd_features", (3, 5), 129, 7, weighted=True),
    Case("several_blocks", (2, 3), 1100, 5),
    Case("weighted", (4, 4, 4), 64, 8, weighted=True),
    Case("strided", (4, 2), 40, 8, strided=True),
    Case("no_rows", (), 24, 4),
    Case("no_features", (2,), 0, 4),
)


def inputs(case: Case, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Draw random arguments of ``scatter_mean`` for a case.

    Args:
        case: the shape.
        dtype: of the rows.
        device: where the tensors live.
        seed: of the draw; the same values are drawn for every dtype, then rounded.

    Returns:
        Keyword arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    count = sum(case.sketch_sizes)
    rows = torch.randn(count, case.features, generator=generator, dtype=torch.float64)
    rows = rows.to(device, dtype)
    sketches = [
        torch.randperm(case.size, generator=generator)[:size].sort().values
        for size in case.sketch_sizes
    ]
    index = torch.cat([torch.empty(0, dtype=torch.int64), *sketches])
    denominator: float | torch.Tensor = float(max(len(case.sketch_sizes), 1))
    if case.weighted:
        denominator = torch.rand(case.size, generator=generator) + 0.5
        denominator[0] = 0.0
        denominator = denominator.to(device)
    return {
        "rows": rows.t().contiguous().t() if case.strided else rows,
        "index": index.to(device),
        "size": case.size,
        "denominator": denominator,
    }
