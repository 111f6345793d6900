"""Calls that every backend is tested, tuned and measured on, declared once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Case:
    """One call's shape and what is special about it.

    Attributes:
        name: readable id.
        tokens: of each group.
        ranks: of each group.
        in_features: D.
        out_features: E.
        pool: rank rows that the groups draw their index sets from, each its own; None for no
            index: the pool is the groups' rows one after the other.
        bias: the layer has a bias.
        base: False computes the deltas alone.
        strided_x: x is a transposed view.
    """

    name: str
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    in_features: int
    out_features: int
    pool: int | None = None
    bias: bool = False
    base: bool = True
    strided_x: bool = False


CASES = (
    Case("one_group", (48,), (8,), 64, 96),
    Case("one_group_bias_by_index", (33,), (5,), 48, 80, pool=16, bias=True),
    Case("compact_leaves", (32, 40, 17), (4, 16, 8), 64, 96),
    Case("one_to_all_ranks", (20, 33, 8, 16), (1, 5, 17, 40), 64, 48, pool=40),
    Case("shared_rank_rows", (16, 40, 24, 9), (16, 8, 8, 12), 64, 64, pool=16, bias=True),
    Case("odd_everything", (7, 1, 37), (3, 13, 1), 51, 29, pool=13, bias=True),
    Case("deltas_alone", (24, 24), (4, 20), 64, 64, pool=32, base=False),
    Case("deltas_alone_bias", (17, 18), (16, 2), 64, 32, base=False, bias=True),
    Case("strided_x", (30, 18), (4, 6), 64, 64, pool=16, strided_x=True),
    Case("first_without_tokens", (0, 33), (4, 20), 64, 64, pool=24, bias=True),
    Case("middle_without_tokens", (20, 0, 0, 9), (4, 16, 40, 4), 64, 48),
    Case("last_without_tokens", (20, 13, 0), (4, 2, 8), 64, 48, base=False),
    Case("no_tokens", (0, 0), (4, 8), 64, 64, pool=16, bias=True),
    Case("many_ranks", (40, 33), (72, 8), 96, 64, pool=76),
    Case("unequal_groups", (300, 1, 5), (2, 2, 2), 32, 32),
)


def inputs(case: Case, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Draw random arguments of ``grouped_sketched_linear`` for a case.

    Args:
        case: the shape.
        dtype: of every floating-point tensor but the scales.
        device: where the tensors live.
        seed: of the draw; the same values are drawn for every dtype, then rounded.

    Returns:
        Keyword arguments, of the sizes of a trained layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * std
        return values.to(device=device, dtype=dtype)

    pool = sum(case.ranks) if case.pool is None else case.pool
    index = None
    if case.pool is not None:
        chosen = [torch.randperm(pool, generator=generator)[:ranks] for ranks in case.ranks]
        index = torch.cat([rows.sort().values for rows in chosen]).to(device)
    x = draw(sum(case.tokens), case.in_features)
    return {
        "x": x.t().contiguous().t() if case.strided_x else x,
        "weight": draw(case.out_features, case.in_features, std=case.in_features**-0.5)
        if case.base
        else None,
        "lora_a": draw(pool, case.in_features, std=case.in_features**-0.5),
        "lora_b": draw(pool, case.out_features, std=pool**-0.5),
        "token_offsets": [0, *accumulate(case.tokens)],
        "rank_offsets": [0, *accumulate(case.ranks)],
        "index": index,
        "bias": draw(case.out_features) if case.bias else None,
        # Exact in every dtype, and another one for each group.
        "scale": [0.5 + group / 4 for group in range(len(case.tokens))],
    }
