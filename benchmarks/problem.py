"""The tensors of one cell, and what a way to compute it has to offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.shapes import Cell

ALPHA = 16.0


@dataclass(frozen=True, slots=True)
class Problem:
    """The tensors of one cell, sized as in a trained layer.

    Attributes:
        cell: what was asked for.
        x: ``[T, D]``.
        weight: ``[E, D]``.
        lora_a: ``[R, D]``.
        lora_b: ``[E, R]``.
        index: int64 ``[S]``, ascending.
        dy: ``[T, E]``.
    """

    cell: Cell
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    index: Tensor
    dy: Tensor

    @property
    def scale(self) -> float:
        """Of the sketch: alpha / S."""
        return ALPHA / self.cell.sketch_size

    @property
    def full_scale(self) -> float:
        """Of the whole adapter: alpha / R."""
        return ALPHA / self.cell.rank

    def selected(self) -> tuple[Tensor, Tensor]:
        """Return fresh copies of the selected factors: ``[S, D]`` and ``[E, S]``."""
        return self.lora_a[self.index], self.lora_b[:, self.index]


def make_problem(cell: Cell) -> Problem:
    """Draw a cell's tensors."""
    generator = torch.Generator(cell.device).manual_seed(0)
    dtype: torch.dtype = getattr(torch, cell.dtype)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=cell.device) * std
        return values.to(dtype)

    tokens, in_features, out_features = cell.tokens, cell.in_features, cell.out_features
    order = torch.randperm(cell.rank, generator=torch.Generator().manual_seed(0))
    return Problem(
        cell=cell,
        x=draw(tokens, in_features),
        weight=draw(out_features, in_features, std=in_features**-0.5),
        lora_a=draw(cell.rank, in_features, std=in_features**-0.5),
        lora_b=draw(out_features, cell.rank, std=cell.rank**-0.5),
        index=order[: cell.sketch_size].sort().values.to(cell.device),
        dy=draw(tokens, out_features),
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One way to compute a cell.

    Attributes:
        name: in the table.
        call: the forward pass.
        leaves: x; and A and B, ranks first or (where ``rank_major_b`` is False) B with ranks last.
        computes: the bare base layer, the sketched adapter, or the whole one.
        ours: the row is no peer.
        rank_major_b: B is ``[S, E]``.
        compiled: by torch.compile, which counting cannot look into.
    """

    name: str
    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    computes: Literal["base", "sketch", "full"] = "sketch"
    ours: bool = False
    rank_major_b: bool = False
    compiled: bool = False

    def step(self, dy: Tensor) -> tuple[Tensor, ...]:
        """Run forward and backward; return the gradients of the leaves."""
        return torch.autograd.grad(self.call(), self.leaves, dy)


def missing_for(cell: Cell) -> str | None:
    """Say why a cell is not worth timing on this processor, or None."""
    if cell.device == "cuda" or cell.dtype == "float32":
        return None
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        flags = []
    if {"avx512_bf16", "amx_bf16"} & set(flags):
        return None
    return "this processor has neither AVX512-bf16 nor AMX (as /proc/cpuinfo tells)"
