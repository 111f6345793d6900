"""The public function: checks, the step counts, dispatch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fslora_kernels.ops.sketched_adamw.op import Arguments, Rule, backend, choose, count_step
from fslora_kernels.weights import check_devices, check_index, check_index_kind, check_whole


@torch.no_grad()
def sketched_adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    index: Tensor | None = None,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    implementation: str | None = None,
) -> None:
    """Take one AdamW step on the selected rows of a rank-major factor, in place.

    Rows outside the index keep their bits, and so do their moments and step counts: neither weight
    decay nor old momentum moves them. Each row corrects its bias by the steps that it took itself.
    With no index and equal step counts it is ``torch.optim.AdamW``. Everything is computed in the
    moments' dtype and the parameter is rounded once.

    Args:
        parameter: ``[R, F]``, any strides: lora_A as it is, lora_B as its transpose.
        gradient: ``[R, F]``, of which the selected rows are read, or those alone, ``[S, F]``.
        exp_avg: ``[R, F]`` float32 (float64 with a float64 parameter), zero at first.
        exp_avg_sq: likewise.
        steps: int64 or float32 ``[R]``, the steps that each row took so far, zero at first.
        index: int64 ``[S]``, ascending; None steps every row. Its values are checked on a CPU; on
            a GPU, where that would wait for the device, they are not.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, of the selected rows only.
        implementation: "torch", "triton", or None for "auto".

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or a setting is out of range.
        NotImplementedError: the requested implementation cannot run this call.

    Example:
        >>> lora_a, moments = torch.ones(3, 2), torch.zeros(2, 3, 2)
        >>> steps, index = torch.zeros(3), torch.tensor([1])
        >>> sketched_adamw(lora_a, torch.ones(3, 2), *moments, steps, index, lr=0.5, weight_decay=0)
        >>> lora_a[:, 0], steps
        (tensor([1.0000, 0.5000, 1.0000]), tensor([0., 1., 0.]))

    Source: arXiv 1711.05101 (AdamW), algorithm 2, with a step count of its own for each row.
    """
    rule = Rule(lr, betas, eps, weight_decay)
    arguments = Arguments(parameter, gradient, exp_avg, exp_avg_sq, steps, index, rule)
    _check(arguments)
    if index is not None and len(index) == len(parameter):
        arguments = replace(arguments, index=None)  # every row: nothing to gather
    choice = choose(arguments, implementation)
    count_step(steps, arguments.index)
    if parameter.numel():
        backend(choice.implementation).update(arguments)


def _check(arguments: Arguments) -> None:
    parameter, gradient, index = arguments.parameter, arguments.gradient, arguments.index
    if parameter.ndim != 2 or not parameter.is_floating_point():
        raise ValueError(
            "parameter must be [R, F] of a floating-point dtype, one rank per row (pass "
            f"lora_B.weight.t()), got {parameter.dtype} {tuple(parameter.shape)}"
        )
    check_whole(parameter, "parameter", "use torch.optim.AdamW under fully_shard")
    ranks, features = parameter.shape
    if index is not None:
        check_index_kind(index)
        if index.device.type == "cpu":
            check_index(index, ranks)
    size = ranks if index is None else len(index)
    if gradient.shape not in ((ranks, features), (size, features)):
        raise ValueError(
            f"gradient must be [{ranks}, {features}] or, for the selected rows alone, "
            f"[{size}, {features}], got {tuple(gradient.shape)}"
        )
    moment = torch.promote_types(parameter.dtype, torch.float32)
    for name in ("exp_avg", "exp_avg_sq"):
        found = getattr(arguments, name)
        if found.shape != parameter.shape or found.dtype != moment:
            raise ValueError(
                f"{name} must be {moment} [{ranks}, {features}], got {found.dtype} "
                f"{tuple(found.shape)}"
            )
    steps = arguments.steps
    if steps.shape != (ranks,) or steps.dtype not in (torch.int64, torch.float32):
        raise ValueError(
            f"steps must be int64 or float32 [{ranks}], one count per row, got {steps.dtype} "
            f"{tuple(steps.shape)}"
        )
    names = ("gradient", "exp_avg", "exp_avg_sq", "steps", "index")
    tensors = {name: getattr(arguments, name) for name in names}
    check_devices(parameter.device, "parameter", **tensors)
