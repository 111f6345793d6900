"""LoRAFusion's fused layer as a row, from a checkout that the user points to.

Its kernels (EuroSys 2026) run on NVIDIA GPUs only. Nothing of it is kept here: the checkout is put
on the import path, and its row is checked and timed like every other. What its row needs to run
where its authors did not run it is in ``_lift_limits``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Problem, Row

_MODULE, _TILES = "lorafusion.ops.lora_v1", "lorafusion.ops.triton_ops.config"


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
        module = import_module(_MODULE)
        _lift_limits(module)
        function: Callable[..., Tensor] = module.fused_linear_lora
    except Exception as error:
        raise ValueError(f"LoRAFusion cannot be imported from {checkout}: {error}") from error
    return function


def _lift_limits(module: ModuleType) -> None:
    """Lift two limits that would leave no row; neither way costs it time.

    Without dropout its backward pass asks for the shape of a mask that its kernel does not read: it
    gets one byte in that shape. Its tiles are listed by a GPU's name: Hopper GPUs that are not in
    the list take the H100's.
    """
    backward = module.fused_lora_dyw_dsa_func

    def with_mask(*, dropout_mask: Tensor | None, dy: Tensor, w: Tensor, **others: Any) -> Tensor:  # noqa: ANN401
        if dropout_mask is None:
            one = torch.ones((), dtype=torch.bool, device=dy.device)
            dropout_mask = one.expand(dy.shape[0], w.shape[1])
        found: Tensor = backward(dropout_mask=dropout_mask, dy=dy, w=w, **others)
        return found

    module.fused_lora_dyw_dsa_func = with_mask  # type: ignore[attr-defined]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        tiles = import_module(_TILES)
        tiles.HARDWARE_CONFIGS.setdefault(tiles.get_device_short_name(), tiles.H100_CONFIG)


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
