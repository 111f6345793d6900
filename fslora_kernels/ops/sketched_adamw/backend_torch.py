"""The operation in torch: gather the selected rows, step them, write them back.

Without an index the moments, and a parameter of their dtype, are stepped in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fslora_kernels.ops.sketched_adamw.op import Arguments


def refuses(_arguments: Arguments) -> str | None:
    """Torch runs everywhere."""
    return None


def update(arguments: Arguments) -> None:
    """Write the selected rows of the parameter and of both moments."""
    index, rule = arguments.index, arguments.rule
    (beta1, beta2), (log_beta1, log_beta2) = rule.betas, rule.log_betas
    m_SF, v_SF = _take(arguments.exp_avg, index), _take(arguments.exp_avg_sq, index)
    dtype = m_SF.dtype
    p_SF = _take(arguments.parameter, index).to(dtype)
    gradient = arguments.gradient
    g_SF = (gradient if arguments.compact else _take(gradient, index)).to(dtype)
    t_S1 = _take(arguments.steps, index).to(dtype)[:, None]

    m_SF.lerp_(g_SF, 1.0 - beta1)
    v_SF.mul_(beta2).addcmul_(g_SF, g_SF, value=1.0 - beta2)
    correction1_S1 = -torch.expm1(t_S1 * log_beta1)
    correction2_S1 = -torch.expm1(t_S1 * log_beta2)
    denominator_SF = v_SF.sqrt().div_(correction2_S1.sqrt()).add_(rule.eps)
    step_SF = (m_SF / denominator_SF).mul_(rule.lr / correction1_S1)
    p_SF.mul_(rule.kept).sub_(step_SF)

    _put(arguments.parameter, index, p_SF)
    _put(arguments.exp_avg, index, m_SF)
    _put(arguments.exp_avg_sq, index, v_SF)


def _take(tensor: Tensor, index: Tensor | None) -> Tensor:
    """Return the selected rows: a copy, or the tensor itself without an index."""
    return tensor if index is None else tensor.index_select(0, index)


def _put(tensor: Tensor, index: Tensor | None, rows: Tensor) -> None:
    """Write the selected rows back; those that ``_take`` did not copy are there already."""
    if index is not None:
        tensor.index_copy_(0, index, rows.to(tensor.dtype))
    elif rows is not tensor:
        tensor.copy_(rows)
