"""Counting what a step does and keeps: operations, bytes moved, bytes saved, bytes alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def address(tensor: Tensor) -> int:
    """Where the tensor's storage begins: views of one storage count once."""
    return tensor.untyped_storage().data_ptr()


def addresses(tensors: Iterable[Tensor]) -> set[int]:
    """Return the storages of tensors that were there before and are not counted."""
    return {address(tensor) for tensor in tensors}


@contextmanager
def saved_storages(known: set[int]) -> Iterator[dict[int, int]]:
    """Note what autograd keeps for the backward pass, each storage once.

    Args:
        known: storages that do not count: parameters, and inputs if they are somebody else's.

    Yields:
        Address to bytes, filled as the forward pass runs.
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if address(tensor) not in known:
            saved[address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


class AliveBytes(TorchDispatchMode):
    """Follows every storage that an operation makes until it is freed, on any device.

    Scratch space inside one operation is not seen.

    Attributes:
        peak: most bytes alive at once.
    """

    def __init__(self, known: set[int]) -> None:
        """Start at zero; ``known`` are addresses that existed before and do not count."""
        super().__init__()
        self.peak = 0
        self._known = known
        self._alive: dict[int, int] = {}

    @property
    def now(self) -> int:
        """Bytes alive now."""
        return sum(self._alive.values())

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        return result

    def _follow(self, tensor: Tensor) -> None:
        where, storage = address(tensor), tensor.untyped_storage()
        if not where or where in self._known or where in self._alive:
            return
        self._alive[where] = storage.nbytes()
        weakref.finalize(storage, self._alive.pop, where)
        self.peak = max(self.peak, self.now)


class Operations(TorchDispatchMode):
    """Counts the operations that compute something, and the bytes they touch.

    Views and bare allocations are no operations. An operation reads each of its tensors once and
    writes each result once; what it does to them inside is its own affair.

    Attributes:
        count: operations. Without fusion, on a GPU, each is at least one launch.
        bytes_moved: read and written.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.count = 0
        self.bytes_moved = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
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
