"""What the operation means, in plain torch: new tensors, nothing in place."""

import torch
from torch import Tensor


def reference(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    index: Tensor | None = None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> dict[str, Tensor]:
    """Return the parameter, both moments and the step counts after one step, by their names.

    The arguments are those of ``sketched_adamw``; everything is computed in the moments' dtype.

    Source: arXiv 1711.05101 (AdamW), algorithm 2, with a step count of its own for each row.
    """
    dtype, (beta1, beta2) = exp_avg.dtype, betas
    if index is None:
        index = torch.arange(len(parameter), device=parameter.device)
    compact = gradient if len(gradient) == len(index) else gradient[index]
    g, p = compact.to(dtype), parameter[index].to(dtype)
    t = steps[index] + 1
    m = beta1 * exp_avg[index] + (1 - beta1) * g
    v = beta2 * exp_avg_sq[index] + (1 - beta2) * g.square()
    corrected_m = m / (1 - beta1 ** t.double()).to(dtype)[:, None]
    corrected_v = v / (1 - beta2 ** t.double()).to(dtype)[:, None]
    p = p - lr * weight_decay * p - lr * corrected_m / (corrected_v.sqrt() + eps)
    return {
        "parameter": parameter.index_copy(0, index, p.to(parameter.dtype)),
        "exp_avg": exp_avg.index_copy(0, index, m),
        "exp_avg_sq": exp_avg_sq.index_copy(0, index, v),
        "steps": steps.index_copy(0, index, t),
    }
