"""LoRAFusion's fused layer as a row, from a checkout that the user points to.

Its kernels (EuroSys 2026) run on NVIDIA GPUs only. Nothing of it is kept here: the checkout is put
on the import path, and its row is checked and timed like every other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.problem import Problem, Row

_MODULE = "lorafusion.ops.lora_v1"


def load(checkout: Path) -> Callable[..., Tensor]:
    """Import ``fused_linear_lora`` from a checkout.

    Raises:
        ValueError: the folder is no checkout, or something that it needs is missing.
    """
    if not (checkout / "lorafusion/ops/lora_v1.py").is_file():
        raise ValueError(
            f"{checkout} is no checkout of LoRAFusion; git clone "
            "https://github.com/CentML/lorafusion and pass its folder"
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    try:
        function: Callable[..., Tensor] = import_module(_MODULE).fused_linear_lora
    except Exception as error:
        raise ValueError(f"LoRAFusion cannot be imported from {checkout}: {error}") from error
    return function


def lorafusion(problem: Problem, *, function: Callable[..., Tensor]) -> Row:
    """LoRAFusion at rank S on the selected factors, without dropout."""
    x = problem.x.detach().requires_grad_()
    a, b = (
        factor.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        for factor in problem.selected()
    )

    def call() -> Tensor:
        # It takes batches of sequences.
        return function(x[None], problem.weight, a, b, alpha=problem.scale)[0]

    return Row("LoRAFusion", call, (x, a, b))
