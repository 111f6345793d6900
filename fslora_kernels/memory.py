"""Counting bytes: saved for the backward pass, and alive at once, whoever holds them."""

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


def kept_storages(result: Tensor, known: set[int]) -> dict[int, int]:
    """Return what the graph of a result keeps for the backward pass, each storage once.

    As ``saved_storages`` finds, but from the graph afterwards, so that nothing which depends on
    hooks computes otherwise.

    Args:
        result: of a forward pass that was recorded.
        known: as there.

    Returns:
        Address to bytes.
    """
    kept: dict[int, int] = {}
    seen: set[Any] = set()
    left: list[Any] = [result.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [before for before, _ in node.next_functions]
        names = [name for name in dir(node) if name.startswith("_saved_")]
        saved = [*(getattr(node, name) for name in names), *getattr(node, "saved_tensors", ())]
        for tensor in tree_leaves(saved):
            if isinstance(tensor, Tensor) and tensor.ndim and address(tensor) not in known:
                kept[address(tensor)] = tensor.untyped_storage().nbytes()
    return kept


class AliveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that an operation makes until it is freed, on any device.

    Scratch space inside one operation is not seen.

    Attributes:
        peak: most bytes alive at once.
        now: bytes alive now.
    """

    def __init__(self, known: set[int]) -> None:
        """Start at zero; ``known`` are addresses that existed before and do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.now = 0
        self._known = known
        self._alive: set[int] = set()

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
        self._alive.add(where)
        self.now += storage.nbytes()
        weakref.finalize(storage, self._freed, where, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _freed(self, where: int, size: int) -> None:
        self._alive.discard(where)
        self.now -= size
