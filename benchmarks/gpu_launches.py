"""Launch the Triton kernels, and nothing else worth looking at: what a tool is run on.

``python -m benchmarks.gpu_launches tiny`` runs every operation once, forward and backward, on small
and odd shapes; ``large`` runs one layer of an 8B model, its base product left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from fslora_kernels import (
    grouped_sketched_linear,
    scatter_mean,
    sketched_adamw,
    sketched_linear,
)
from fslora_kernels._dispatch import interpreting
from fslora_kernels.ops.grouped_sketched_linear import cases as grouped_cases
from fslora_kernels.ops.scatter_mean import cases as scatter_cases
from fslora_kernels.ops.sketched_adamw import cases as adamw_cases
from fslora_kernels.ops.sketched_linear.cases import Case
from fslora_kernels.testing import inputs, value_and_gradients

DONE = "every launch is done"
TINY = (
    Case("view", 33, 64, 96, 16, 5, base=False, bias=True),
    Case("dropout", 37, 64, 80, 8, None, base=False, rank_major_b=True, dropout=0.25),
    Case("many_ranks", 20, 96, 64, 80, 72, base=False),
)
LARGE = Case("8b-q", 8192, 4096, 4096, 16, None, base=False, rank_major_b=True)


def layer(case: Case, dtype: torch.dtype, device: str) -> None:
    """Run ``sketched_linear`` forward and backward."""
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(case.tokens, case.out_features, generator=generator).to(device, dtype)
    arguments = inputs(case, dtype, device=device)
    arguments |= {"dropout": case.dropout, "seed": 3, "implementation": "triton"}
    value_and_gradients(sketched_linear, arguments, dy)


def tiny(dtype: torch.dtype, device: str) -> None:
    """Run every operation that has a kernel."""
    for case in TINY:
        layer(case, dtype, device)
    groups = grouped_cases.Case("groups", (20, 33, 0, 9), (1, 17, 4, 40), 64, 48, 40, base=False)
    arguments = grouped_cases.inputs(groups, dtype, device=device)
    dy = torch.ones(sum(groups.tokens), groups.out_features, dtype=dtype, device=device)
    value_and_gradients(grouped_sketched_linear, arguments | {"implementation": "triton"}, dy)
    for mean in scatter_cases.CASES[:5]:
        scatter_mean(**scatter_cases.inputs(mean, dtype, device=device), implementation="triton")
    for step in adamw_cases.CASES:
        sketched_adamw(**adamw_cases.inputs(step, dtype, device=device), implementation="triton")


def main(arguments: Sequence[str]) -> int:
    """Launch; on a CPU in Triton's interpreter, which has no bf16 products."""
    device, dtype = ("cpu", torch.float32) if interpreting() else ("cuda", torch.bfloat16)
    if list(arguments) == ["large"]:
        layer(LARGE, dtype, device)
    else:
        tiny(dtype, device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(DONE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
