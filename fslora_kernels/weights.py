"""The low-rank pair of one layer, and what a valid index set is."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LoRAWeights(NamedTuple):
    """One layer's low-rank pair, both factors rank-major so that one rank is one contiguous row.

    Attributes:
        lora_a: ``[S, D]``, rows of A.
        lora_b: ``[S, E]``, columns of B stored as rows; PEFT's ``lora_B.weight`` is its transpose.
    """

    lora_a: Tensor
    lora_b: Tensor

    @property
    def rank(self) -> int:
        """How many ranks the pair has."""
        return self.lora_a.shape[0]

    @property
    def size_bytes(self) -> int:
        """Bytes of both factors, as they travel."""
        return self.lora_a.nbytes + self.lora_b.nbytes


Adapters = Mapping[str, LoRAWeights]
"""Module name (as in ``model.named_modules()``) to its low-rank pair."""


def check_devices(device: torch.device, of: str, **tensors: Tensor | None) -> None:
    """Check that tensors are on one device.

    Args:
        device: the device that they must be on.
        of: whose device that is, for the message.
        tensors: by the names that the user knows; None is passed over.

    Raises:
        ValueError: naming the first that is elsewhere.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device} but {of} is on {device}; move both to one device"
            )


def check_whole(tensor: Tensor, name: str, remedy: str) -> None:
    """Check that a tensor is plain: not a shard of one that several processes share.

    Args:
        tensor: as a parameter or a gradient is found.
        name: that the user knows.
        remedy: what to do instead.

    Raises:
        ValueError: naming what it is, and the remedy.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(f"{name} is a {type(tensor).__name__}, not a plain tensor; {remedy}")


def check_index_kind(index: object) -> None:
    """Check what can be checked of an index set without waiting for a GPU.

    Args:
        index: int64 ``[S]``.

    Raises:
        ValueError: it is no tensor, of another dtype, or has other dimensions.
    """
    if not isinstance(index, Tensor):
        got = f"a {type(index).__name__}"
    elif index.ndim != 1 or index.dtype != torch.int64:
        got = f"{index.dtype} of shape {tuple(index.shape)}"
    else:
        return
    raise ValueError(
        f"an index set is a one-dimensional int64 tensor, got {got}; build it with "
        "torch.tensor([...], dtype=torch.int64)"
    )


def check_index(index: Tensor, rank: int) -> None:
    """Check that ``index`` is a valid index set of a rank-``rank`` adapter.

    Args:
        index: int64 ``[S]``; strictly ascending, each in ``[0, rank)``, at least one.
        rank: R, the rank of the global adapter.

    Raises:
        ValueError: naming what is wrong and what a valid index set is.
    """
    check_index_kind(index)
    if index.numel() == 0:
        raise ValueError("the index set is empty; a sketch keeps at least one rank")
    ranks = index.tolist()  # once off the device; and for so few faster than operations on tensors
    low, high = min(ranks), max(ranks)
    if low < 0 or high >= rank:
        raise ValueError(
            f"the index set reaches from {low} to {high}, but the adapter has ranks 0 to {rank - 1}"
        )
    if ranks != sorted(set(ranks)):
        raise ValueError(
            "the index set must be ascending without repeats; sort it with torch.unique(index)"
        )
