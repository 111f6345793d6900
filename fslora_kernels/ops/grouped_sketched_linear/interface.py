"""The public function: checks, dtypes, dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import index as as_int

import torch
from torch import Tensor

from fslora_kernels.ops.grouped_sketched_linear.op import Arguments, GroupedSketchedLinear, choose
from fslora_kernels.ops.sketched_linear.interface import in_compute_dtype, plus_base, widens
from fslora_kernels.weights import check_devices, check_index, check_index_kind


def grouped_sketched_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    token_offsets: Sequence[int] | Tensor,
    rank_offsets: Sequence[int] | Tensor,
    index: Tensor | None = None,
    *,
    scale: Tensor | Sequence[float],
    bias: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Return ``x Wᵀ + bias + scale_g · (x A[I_g]ᵀ) B[I_g]`` on the rows of every group g.

    Group g's tokens are the rows ``token_offsets[g]`` to ``token_offsets[g + 1]`` of x, its ranks
    the rows ``I_g = index[rank_offsets[g]:rank_offsets[g + 1]]`` of the pool. Gradients flow to
    ``x``, ``lora_a``, ``lora_b`` and, where they require them, to ``weight`` and ``bias``. Those
    of the pool have its shape, are zero outside the index, and are summed in the order of the
    groups where groups share rows. What an adapter contributes does not depend on the other
    groups of the batch. Dtypes are those of ``sketched_linear``.

    The offsets live on the host: they decide which products are launched, and reading them from a
    GPU would wait for it. The Triton kernels copy a map of them to the GPU, once for the same
    offsets in all layers and steps.

    Args:
        x: ``[tokens, in_features]``, any strides, the tokens of one group after the other's.
        weight: ``[out_features, in_features]``, any strides; None gives the deltas alone.
        lora_a: ``[pool, in_features]``.
        lora_b: ``[pool, out_features]``, rank-major: the transpose of sketched_linear's.
        token_offsets: ``[groups + 1]``, from 0 to tokens, ascending; equal neighbours are a group
            without tokens. Integers or a CPU tensor.
        rank_offsets: ``[groups + 1]``, from 0 to the length of the index, strictly ascending.
            Integers or a CPU tensor.
        index: int64 ``[ΣS]``, rows of the pool, ascending within a group; groups may share rows.
            None takes the pool's rows in their order, each once. Its values are checked on a CPU;
            on a GPU, where that would wait for the device, they are not.
        scale: ``[groups]``, factor of each group's delta, the correction rank / sketch_size
            included. Not differentiated. A tensor on x's device saves a copy.
        bias: ``[out_features]``.
        implementation: "torch", "triton", or None for "auto".

    Returns:
        ``[tokens, out_features]``.

    Raises:
        ValueError: shapes, offsets, devices or the index do not fit together.
        NotImplementedError: the requested implementation cannot run this call.

    Example:
        >>> x, weight = torch.ones(3, 8), torch.eye(8)
        >>> pool_a, pool_b = torch.ones(4, 8), torch.ones(4, 8)
        >>> index = torch.tensor([0, 2, 3])
        >>> y = grouped_sketched_linear(
        ...     x, weight, pool_a, pool_b, [0, 1, 3], [0, 2, 3], index, scale=[0.5, 1.0]
        ... )
        >>> y[:, 0].tolist()
        [9.0, 9.0, 9.0]

    Source: arXiv 2501.19389, for many clients at once.
    """
    token_offsets = _offsets("token_offsets", token_offsets)
    rank_offsets = _offsets("rank_offsets", rank_offsets)
    _check_shapes(x, weight, lora_a, lora_b, bias)
    _check_groups(x, lora_a, index, token_offsets, rank_offsets)
    check_devices(
        x.device, "x", weight=weight, lora_a=lora_a, lora_b=lora_b, index=index, bias=bias
    )
    x = in_compute_dtype(x)
    gain = _gain(x, scale, len(token_offsets) - 1)
    wide = widens(x, lora_a, lora_b)
    arguments = Arguments(
        x.float() if wide else x,
        None if wide else weight,
        lora_a,
        lora_b,
        index,
        None if wide else bias,
        gain,
        token_offsets,
        rank_offsets,
    )
    choice = choose(arguments, implementation)
    y_TE: Tensor = GroupedSketchedLinear.apply(  # type: ignore[no-untyped-call]
        arguments.x,
        arguments.weight,
        lora_a,
        lora_b,
        index,
        arguments.bias,
        gain,
        token_offsets,
        rank_offsets,
        choice.implementation,
    )
    return plus_base(y_TE, x, weight, bias) if wide else y_TE


def _offsets(name: str, offsets: Sequence[int] | Tensor) -> tuple[int, ...]:
    if isinstance(offsets, Tensor):
        if offsets.device.type != "cpu":
            raise ValueError(
                f"{name} is on {offsets.device}, and reading it there would wait for the device; "
                "keep the offsets on the host"
            )
        offsets = offsets.tolist()
    try:
        return tuple(as_int(offset) for offset in offsets)
    except TypeError:
        raise ValueError(f"{name} must be integers, one after the other, got {offsets}") from None


def _gain(x: Tensor, scale: Tensor | Sequence[float], groups: int) -> Tensor:
    """Return the scales on x's device, in float32 or better."""
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise ValueError("scale is not differentiated; pass it detached")
    dtype = torch.promote_types(x.dtype, torch.float32)
    gain = torch.as_tensor(scale, dtype=dtype, device=x.device)
    if gain.shape != (groups,):
        raise ValueError(f"scale must be [{groups}], one number per group, got {tuple(gain.shape)}")
    return gain


def _check_shapes(
    x: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None
) -> None:
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != lora_b.shape[0]:
        raise ValueError(
            "lora_a must be [pool, in_features] and lora_b [pool, out_features], got "
            f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}; pass lora_b rank-major"
        )
    in_features, out_features = lora_a.shape[1], lora_b.shape[1]
    if x.ndim != 2 or x.shape[1] != in_features:
        raise ValueError(f"x must be [tokens, {in_features}] as lora_a asks, got {tuple(x.shape)}")
    if weight is not None and weight.shape != (out_features, in_features):
        raise ValueError(
            f"weight must be [{out_features}, {in_features}] as lora_b and lora_a ask, got "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must be [{out_features}], got {tuple(bias.shape)}")


def _check_groups(
    x: Tensor,
    lora_a: Tensor,
    index: Tensor | None,
    token_offsets: tuple[int, ...],
    rank_offsets: tuple[int, ...],
) -> None:
    if len(token_offsets) != len(rank_offsets) or len(token_offsets) < 2:
        raise ValueError(
            "token_offsets and rank_offsets must both be [groups + 1] for at least one group, got "
            f"{len(token_offsets)} and {len(rank_offsets)} offsets"
        )
    if index is not None:
        check_index_kind(index)
    rows, entries = ("lora_a", lora_a) if index is None else ("index", index)
    for name, offsets, of, size in (
        ("token_offsets", token_offsets, "x", x.shape[0]),
        ("rank_offsets", rank_offsets, rows, entries.shape[0]),
    ):
        if offsets[0] != 0 or offsets[-1] != size:
            raise ValueError(
                f"{name} must go from 0 to {size}, the rows of {of}, but goes from {offsets[0]} "
                f"to {offsets[-1]}"
            )
        if any(last < first for first, last in pairwise(offsets)):
            raise ValueError(f"{name} must be ascending, got {list(offsets)}")
    for group, (first, last) in enumerate(pairwise(rank_offsets)):
        if first == last:
            raise ValueError(f"group {group} has no ranks; a sketch keeps at least one rank")
    if index is not None and index.device.type == "cpu":
        _check_index(index, rank_offsets, lora_a.shape[0])


def _check_index(index: Tensor, rank_offsets: tuple[int, ...], pool: int) -> None:
    """Check all groups at once, and one by one only to say what is wrong."""
    ascending = index[1:] > index[:-1]
    ascending[[first - 1 for first in rank_offsets[1:-1]]] = True
    low, high = (int(bound) for bound in index.aminmax())
    if low >= 0 and high < pool and bool(ascending.all()):
        return
    for group, (first, last) in enumerate(pairwise(rank_offsets)):
        try:
            check_index(index[first:last], pool)
        except ValueError as error:
            raise ValueError(f"group {group}: {error}") from None
