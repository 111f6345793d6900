"""Shapes that every backend is tested and measured on, declared once, and inputs of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Case:
    """One call's shape and what is special about it.

    Attributes:
        name: readable id.
        rank: R.
        features: F.
        sketch_size: S, or None for no index at all.
        compact: the gradient has the selected rows alone.
        columns: parameter and gradient are transposes, as those of lora_B are.
        counts: dtype of the step counts.
    """

    name: str
    rank: int
    features: int
    sketch_size: int | None
    compact: bool = False
    columns: bool = False
    counts: torch.dtype = torch.float32


CASES = (
    Case("every_row", 16, 64, None),
    Case("every_row_as_columns", 12, 40, None, columns=True),
    Case("half", 16, 64, 8),
    Case("half_compact", 16, 64, 8, compact=True),
    Case("half_as_columns", 16, 64, 8, columns=True),
    Case("compact_as_columns", 16, 64, 8, compact=True, columns=True),
    Case("one_row", 16, 48, 1, compact=True),
    Case("one_rank_in_all", 1, 33, None),
    Case("every_row_by_index", 8, 64, 8),
    Case("odd_everything", 13, 131, 5, counts=torch.int64),
    Case("no_features", 4, 0, 2),
)


def inputs(case: Case, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Draw random arguments of ``sketched_adamw`` for a case, in the middle of training.

    Args:
        case: the shape.
        dtype: of the parameter and the gradient.
        device: where the tensors live.
        seed: of the draw; the same values are drawn for every dtype, then rounded.

    Returns:
        Keyword arguments; the learning rate is such that a step is as large as the parameter.
    """
    generator = torch.Generator().manual_seed(seed)
    moment = torch.promote_types(dtype, torch.float32)

    def draw(rows: int, std: float, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(rows, case.features, generator=generator, dtype=torch.float64)
        return (values * std).to(device=device, dtype=dtype)

    def laid_out(rows: Tensor) -> Tensor:
        return rows.t().contiguous().t() if case.columns else rows

    index = None
    if case.sketch_size is not None:
        index = torch.randperm(case.rank, generator=generator)[: case.sketch_size]
        index = index.sort().values.to(device)
    size = case.sketch_size if case.compact and case.sketch_size else case.rank
    steps = torch.randint(0, 2000, (case.rank,), generator=generator)
    steps[: case.rank // 2] %= 3
    return {
        "parameter": laid_out(draw(case.rank, 0.1)),
        "gradient": laid_out(draw(size, 0.01)),
        "exp_avg": draw(case.rank, 0.01, moment),
        "exp_avg_sq": draw(case.rank, 0.01, moment).square(),
        "steps": steps.to(device, case.counts),
        "index": index,
        "lr": 0.1,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
