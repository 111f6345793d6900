"""The operation as one Triton kernel: one visit to each selected element, nothing else touched.

Strides are not compiled in and the index is always there, so that one compilation per dtype serves
both factors, any widths, full and compact gradients. The price is that loads are one element per
thread, side by side where the features are, and that lora_B as PEFT stores it, of which one rank is
one column, is read in pieces of one element: a tile takes several ranks so that neighbours share
what the memory delivers. Nothing was timed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fslora_kernels._dispatch import interpreting
from fslora_kernels.ops.sketched_adamw.op import Arguments

RANKS = 8  # of one program
FEATURES = 128
WARPS = 4
STAGES = 3
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def bias_correction(t, log_beta):
    """Return 1 − betaᵗ: where that is small by its series, for the difference would lose digits."""
    x = t * log_beta
    near = tl.maximum(x, -0.5)
    series = tl.full(x.shape, 1.0, tl.float32)
    for n in tl.static_range(10, 1, -1):
        series = 1.0 + series * near * (1.0 / n)
    return tl.where(x > -0.5, -near * series, 1.0 - tl.exp(x))


@triton.jit(
    do_not_specialize=[
        *("ranks", "features", "compact", "parameter_row", "parameter_column", "gradient_row"),
        *("gradient_column", "m_row", "m_column", "v_row", "v_column"),
    ],
    do_not_specialize_on_alignment=["parameter", "gradient", "m", "v", "steps", "index"],
)
def sketched_adamw_kernel(
    parameter,  # [rows, features], any strides, written
    gradient,  # [rows, features], or [ranks, features] where compact; any strides
    m,  # fp32 [rows, features], any strides, written
    v,  # fp32 [rows, features], any strides, written
    steps,  # fp32 [rows], this step counted already
    index,  # int64 [ranks]
    ranks,
    features,
    compact,  # 0 or 1
    parameter_row,
    parameter_column,
    gradient_row,
    gradient_column,
    m_row,
    m_column,
    v_row,
    v_column,
    lr,
    kept,
    eps,
    beta1,
    rest1,  # 1 − beta1, which float32 would not give from beta1
    log_beta1,
    beta2,
    rest2,
    log_beta2,
    S: tl.constexpr,
    F: tl.constexpr,
):
    """Step the rows of the index. One program: S ranks, F features."""
    f = tl.program_id(0).to(tl.int64) * F + tl.arange(0, F)
    s = tl.program_id(1).to(tl.int64) * S + tl.arange(0, S)
    exists = s < ranks
    mask = exists[:, None] & (f < features)[None, :]
    row = tl.load(index + s, mask=exists, other=0)
    t = tl.load(steps + row, mask=exists, other=1.0)
    gradient_at = tl.where(compact != 0, s, row)[:, None] * gradient_row + f * gradient_column
    parameter_at = parameter + row[:, None] * parameter_row + f[None, :] * parameter_column
    m_at = m + row[:, None] * m_row + f[None, :] * m_column
    v_at = v + row[:, None] * v_row + f[None, :] * v_column
    g_SF = tl.load(gradient + gradient_at, mask=mask, other=0.0).to(tl.float32)
    m_SF = tl.load(m_at, mask=mask, other=0.0) * beta1 + g_SF * rest1
    v_SF = tl.load(v_at, mask=mask, other=0.0) * beta2 + g_SF * g_SF * rest2
    root_S = tl.sqrt_rn(bias_correction(t, log_beta2))
    size_S = lr / bias_correction(t, log_beta1)
    denominator_SF = tl.sqrt_rn(v_SF) / root_S[:, None] + eps
    p_SF = tl.load(parameter_at, mask=mask, other=0.0).to(tl.float32)
    p_SF = p_SF * kept - size_S[:, None] * (m_SF / tl.where(mask, denominator_SF, 1.0))
    tl.store(parameter_at, p_SF.to(parameter.dtype.element_ty), mask=mask)
    tl.store(m_at, m_SF, mask=mask)
    tl.store(v_at, v_SF, mask=mask)


def _launch(kernel, grid: tuple[int, ...], like: Tensor, **arguments) -> None:
    with torch.cuda.device_of(like):
        kernel[grid](**arguments, num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=True)


def refuses(arguments: Arguments) -> str | None:
    """Say why the kernel cannot run this call."""
    parameter, gradient = arguments.parameter, arguments.gradient
    if parameter.dtype not in DTYPES:
        return f"parameter is {parameter.dtype}; the kernel takes float32, float16 and bfloat16"
    if gradient.dtype != parameter.dtype:
        return f"gradient is {gradient.dtype} but parameter is {parameter.dtype}"
    if interpreting() and parameter.dtype == torch.bfloat16:
        return "Triton's interpreter truncates to bfloat16 rather than rounding (use float32)"
    return None


def update(arguments: Arguments) -> None:
    """Write the selected rows of the parameter and of both moments."""
    parameter, gradient, rule = arguments.parameter, arguments.gradient, arguments.rule
    m, v, index = arguments.exp_avg, arguments.exp_avg_sq, arguments.index
    if index is None:
        index = torch.arange(len(parameter), device=parameter.device)
    features = parameter.shape[1]
    # A float in every case: an int would be compiled in, one kernel per value.
    (beta1, beta2), (log_beta1, log_beta2) = rule.betas, rule.log_betas
    _launch(
        sketched_adamw_kernel,
        (-(-features // FEATURES), -(-len(index) // RANKS)),
        parameter,
        parameter=parameter,
        gradient=gradient,
        m=m,
        v=v,
        steps=arguments.steps.to(torch.float32).contiguous(),
        index=index.contiguous(),
        ranks=len(index),
        features=features,
        compact=int(arguments.compact),
        parameter_row=parameter.stride(0),
        parameter_column=parameter.stride(1),
        gradient_row=gradient.stride(0),
        gradient_column=gradient.stride(1),
        m_row=m.stride(0),
        m_column=m.stride(1),
        v_row=v.stride(0),
        v_column=v.stride(1),
        lr=float(rule.lr),
        kept=float(rule.kept),
        eps=float(rule.eps),
        beta1=float(beta1),
        rest1=1.0 - beta1,
        log_beta1=log_beta1,
        beta2=float(beta2),
        rest2=1.0 - beta2,
        log_beta2=log_beta2,
        S=RANKS,
        F=FEATURES,
    )
    # Autograd does not see what a kernel writes; as after any optimizer, a graph must.
    torch.autograd.graph.increment_version((parameter, m, v))
