"""Counting what a step does: operations, bytes moved, launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from fslora_kernels.flops import UNCOUNTED
from fslora_kernels.memory import addresses

_FLOPS = {**flop_registry, **{op: shape_wrapper(flops) for op, flops in UNCOUNTED.items()}}


class Operations(TorchDispatchMode):
    """Counts the operations that compute something, the bytes they touch, and the products' FLOPs.

    Views and bare allocations are no operations. An operation reads each of its tensors once and
    writes each result once; what it does to them inside is its own affair. Unlike torch's counter
    this hooks no module: under hooks a fused layer leaves the base product to the base layer.

    Attributes:
        count: operations. Without fusion, on a GPU, each is at least one launch.
        bytes_moved: read and written.
        flops: of matrix products, a multiply and an add counted as two.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.count = 0
        self.bytes_moved = 0
        self.flops = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        if count := _FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        views = addresses(read) & addresses(written) and not func._schema.is_mutable
        if written and not views and "empty" not in str(func):
            self.count += 1
            self.bytes_moved += sum(_touched(tensor) for tensor in [*read, *written])
        return result


def _touched(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; an expanded one is no larger than its storage."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def launches(step: Callable[[], object]) -> int:
    """Count the kernels that a step starts on a GPU, once it is warm."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(e.count for e in profiler.key_averages() if e.device_type == on_device)
