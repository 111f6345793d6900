"""What every Triton backend needs around a launch: the target, layouts, the call itself."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from fslora_kernels._dispatch import interpreting
from fslora_kernels._tiles import ROW_UNIT

ALIGNMENT = 16  # elements of a row stride, bytes of an address
MAX_RANKS = 127
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def _gpu(device: torch.device) -> tuple[str, int]:
    """Return the target's name, in ``TILES`` or not, and the number of processors."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}0", properties.multi_processor_count


def target_of(device: torch.device) -> tuple[str, int]:
    """Return the name of what is compiled for, in ``TILES`` or not, and how many processors."""
    return ("interpreter", 2) if interpreting() else _gpu(device)


def arithmetic_of(dtype: torch.dtype, target: str) -> str:
    """Return how products of a dtype are computed, as ``TILES`` names it."""
    if target == "interpreter":
        return "ieee"
    if dtype != torch.float32:
        return "half"
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and target.startswith("sm_")
    return "tf32" if tf32 else "ieee"


def refuses(x: Tensor, lora_a: Tensor, lora_b: Tensor, ranks: int, of: str) -> str | None:
    """Say why no kernel of an adapter's products takes a call on any device, or None.

    Args:
        x: the input.
        lora_a: the factors.
        lora_b: of the same dtype.
        ranks: the most that are selected.
        of: who has them, for the message.
    """
    if x.dtype not in DTYPES:
        return f"x is {x.dtype} and the kernels take float32, float16 and bfloat16"
    if lora_a.dtype != lora_b.dtype or lora_a.dtype not in (x.dtype, torch.float32):
        return (
            f"lora_a is {lora_a.dtype} and lora_b {lora_b.dtype}, and the kernels take both in "
            f"x's {x.dtype} or both in float32"
        )
    if ranks > MAX_RANKS:
        return (
            f"{of} has more than {MAX_RANKS} ranks, for which torch's matrix products are better "
            "suited"
        )
    if interpreting() and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the raw bits of bfloat16 (use float32)"
    return None


def unknown_target(device: torch.device, tiles: Iterable[tuple[str, str, str]]) -> str | None:
    """Say that no tiles were chosen for a device's target, or None."""
    target, _ = target_of(device)
    known = {key[1] for key in tiles} - {"interpreter"}
    if target in known:
        return None
    return f"no tiles were chosen for {target} (there are some for {', '.join(sorted(known))})"


def launch(kernel, grid: tuple[int, ...], tiles, like: Tensor, **arguments) -> None:
    """Launch a kernel with its tiles' warps and stages, on the device of a tensor."""
    with torch.cuda.device_of(like):
        kernel[grid](
            **arguments, num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True
        )


def rows(x_TF: Tensor) -> tuple[Tensor, int]:
    """Return x, or one copy, with rows of consecutive, aligned features; and its row stride."""
    tokens, features = x_TF.shape
    stride = x_TF.stride(0) if tokens > 1 else features
    aligned = stride % ALIGNMENT == 0 and x_TF.data_ptr() % ALIGNMENT == 0
    if x_TF.stride(1) == 1 and (aligned or interpreting()):
        return x_TF, stride
    return x_TF.clone(memory_format=torch.contiguous_format), features


def strides(factor_RF: Tensor) -> tuple[int, int, bool]:
    """Return the strides of a factor as ``factor_tile`` takes them: ranks, features, ROWS."""
    ranks, features = factor_RF.shape
    row = factor_RF.stride(0) if ranks > 1 else features
    if factor_RF.stride(1) == 1 and row % ROW_UNIT.value == 0:
        return row // ROW_UNIT.value, 1, True
    return row, factor_RF.stride(1), False
