"""What ``benchmarks.gpu_operations`` checks beside each operation's own cases: sizes of models.

The operations' own cases fit into one or two tiles. The long ones here go round the kernels' loops
many times, so that pipelined loads and the last, partial turn take part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fslora_kernels.ops.grouped_sketched_linear.cases import Case as GroupedCase
from fslora_kernels.ops.sketched_linear.cases import Case
from fslora_kernels.ops.sketched_linear.op import PADDED_RANKS

LARGE_CASES = (
    Case("8B_q_view", 4096, 4096, 4096, 64, 8),
    Case("8B_down_compact", 2048, 14336, 4096, 16, None, rank_major_b=True),
    Case("many_tokens", 70_001, 256, 512, 32, 32),
)
# One for each number of padded ranks, each partly filled but the first.
LONG_CASES = tuple(
    Case(f"long_{size}", 777, 1040, 1072, 128, size, bias=True) for size in (16, 24, 48, 100)
)
LONG_DROPOUT_CASES = tuple(
    replace(case, name=f"{case.name}_dropout", rank=64, dropout=0.25) for case in LONG_CASES[:3]
)
LONG_GROUPED_CASES = (
    GroupedCase("long_64", (300, 257, 220), (40, 64, 33), 1040, 1072, pool=96, bias=True),
)
DROPOUT_RUNS = 20  # a race shows now and then
_LONG = 1024  # features or tokens


class SharedCase(NamedTuple):
    """Projections of one input."""

    name: str
    projections: tuple[Case, ...]


SHARED_CASES = (
    SharedCase(
        "qkv",
        (
            Case("q", 40, 48, 64, 16, 4, bias=True),
            Case("k", 40, 48, 32, 8, None, rank_major_b=True),
            Case("v", 40, 48, 29, 16, 1, base=False),
        ),
    ),
    SharedCase("gate_up", (Case("gate", 33, 64, 96, 8, 8), Case("up", 33, 64, 96, 8, 8))),
)
DRY_CASES = {
    "sketched_linear": ("half", "odd_everything", "compact_leaf", "tensor_scale", "dropout"),
    "scatter_mean": ("odd_features", "strided"),
    "sketched_adamw": ("half_as_columns", "odd_everything"),
    "grouped_sketched_linear": ("one_group_bias_by_index", "middle_without_tokens"),
    "shared_sketched_linear": ("qkv",),
}


@dataclass(frozen=True, slots=True)
class Task:
    """One case of one operation.

    Attributes:
        operation: its name.
        case: one of those that the operation declares.
        dtype: of everything.
        implementation: that is asked for.
        device: torch's device type.
        factors: of the factors, where it is another one.
        tf32: float32 is multiplied in TF32.
        runs: how many must give the same bits.
    """

    operation: str
    case: Any
    dtype: torch.dtype
    implementation: str
    device: str
    factors: torch.dtype | None = None
    tf32: bool = False
    runs: int = 2

    @property
    def what(self) -> str:
        """What is checked, in words."""
        kind = str(self.dtype).removeprefix("torch.")
        kind += "/float32" * (self.factors is not None) + " (TF32)" * self.tf32
        return f"{self.implementation} {self.operation} {kind} {self.case.name}"

    @property
    def refused_by_design(self) -> bool:
        """Whether a kernel may refuse it; on a GPU a refusal of what models have is a defect."""
        features = (getattr(self.case, name, 0) for name in ("in_features", "out_features"))
        masked = self.dtype == torch.float32 and getattr(self.case, "dropout", 0.0) > 0.0
        return self.device != "cuda" or masked or any(size % 16 for size in features)

    @property
    def factor(self) -> float:
        """How much larger than the eager error ours may be.

        Ours adds a long sum in float32 term by term; the vendor's product may split it, and the
        error of a chain grows with the root of its length.
        """
        names = ("tokens", "in_features", "out_features")
        sizes = [n for n in (getattr(self.case, name, 0) for name in names) if isinstance(n, int)]
        return 6.0 if self.dtype == torch.float32 and max(sizes, default=0) >= _LONG else 2.0


def long_tasks(device: str, implementations: Iterable[str], *, dropout: bool) -> Iterator[Task]:
    """Yield the long cases of ``sketched_linear``, and of groups, in every arithmetic."""
    half = (torch.bfloat16, torch.float16)
    for name in implementations:
        if dropout:
            for case in LONG_DROPOUT_CASES:
                for dtype in half:
                    yield Task("sketched_linear", case, dtype, name, device, runs=DROPOUT_RUNS)
            for dtype in half:
                yield Task("grouped_sketched_linear", LONG_GROUPED_CASES[0], dtype, name, device)
            continue
        for case in LONG_CASES:
            for dtype in (*half, torch.float32):
                yield Task("sketched_linear", case, dtype, name, device)
            yield Task("sketched_linear", case, torch.float32, name, device, tf32=True)
            wide = torch.float32
            yield Task("sketched_linear", case, torch.bfloat16, name, device, factors=wide)


def tuned_tasks(device: str, changed: Iterable[tuple[str, str, int]]) -> Iterator[Task]:
    """Yield the long cases that run in tiles which a table changed: (kernel, arithmetic, ranks)."""
    ranks = {padded for _, arithmetic, padded in changed if arithmetic == "half"}
    numbers = [n for n, padded in enumerate(PADDED_RANKS) if padded in ranks]
    cases = [LONG_CASES[n] for n in numbers]
    cases += [LONG_DROPOUT_CASES[n] for n in numbers if n < len(LONG_DROPOUT_CASES)]
    for case in cases:
        for dtype in (torch.bfloat16, torch.float16):
            yield Task("sketched_linear", case, dtype, "triton", device)
        wide = torch.float32
        yield Task("sketched_linear", case, torch.bfloat16, "triton", device, factors=wide)
