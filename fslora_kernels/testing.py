"""What a test of an operation needs: inputs, the error budget, poisoned allocations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fslora_kernels.ops.sketched_linear.cases import Case

_ALLOCATIONS = ("empty", "empty_like", "empty_strided")


def inputs(case: Case, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Draw random arguments of ``sketched_linear`` for a case.

    Args:
        case: the shape.
        dtype: of every floating-point tensor.
        device: where the tensors live.
        seed: of the draw; the same values are drawn for every dtype, then rounded.

    Returns:
        Keyword arguments. Sizes are those of a trained layer: unit inputs, weights of
        1/√in_features.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * std
        return values.to(device=device, dtype=dtype)

    rank = case.rank
    x = draw(case.tokens, case.in_features)
    lora_b = draw(case.out_features, rank, std=rank**-0.5)
    index = None
    if case.sketch_size is not None:
        chosen = torch.randperm(rank, generator=generator)[: case.sketch_size]
        index = chosen.sort().values.to(device)
    size = rank if case.sketch_size is None else case.sketch_size
    return {
        "x": x.t().contiguous().t() if case.strided_x else x,
        "weight": draw(case.out_features, case.in_features, std=case.in_features**-0.5)
        if case.base
        else None,
        "lora_a": draw(rank, case.in_features, std=case.in_features**-0.5),
        "lora_b": lora_b.t().contiguous().t() if case.rank_major_b else lora_b,
        "index": index,
        "bias": draw(case.out_features) if case.bias else None,
        "scale": torch.tensor(1.5, device=device) if case.tensor_scale else 1.5,
        "rank_weight": draw(size).abs() if case.rank_weight else None,
    }


def value_and_gradients(
    function: Callable[..., Tensor], arguments: dict[str, Any], dy: Tensor
) -> dict[str, Tensor]:
    """Call ``function`` and pull ``dy`` back.

    Args:
        function: takes ``arguments`` as keywords.
        arguments: as ``inputs`` makes them.
        dy: gradient of the output; only its leading part that fits is used.

    Returns:
        "y" and the gradient of each floating-point matrix argument and of the bias by its name.
    """
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if name in ("x", "weight", "lora_a", "lora_b", "bias") and value is not None
    }
    y = function(**{**arguments, **leaves})
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def check_error_budget(
    actual: Tensor, eager: Tensor, exact: Tensor, *, name: str, factor: float = 2.0
) -> None:
    """Check a result against what the same dtype can be expected to give.

    The root-mean-square error against float64 may be at most ``factor`` times that of the eager
    computation in the same dtype, plus one rounding unit of the result's size (so that an eager
    result which happens to be exact does not forbid any rounding at all).

    Args:
        actual: the result under test.
        eager: plain torch in the same dtype.
        exact: plain torch in float64.
        name: for the message.
        factor: how much worse than eager is still fine.

    Raises:
        AssertionError: with both errors; also on NaN, a wrong dtype or a wrong shape.
    """
    if actual.shape != exact.shape or actual.dtype != eager.dtype:
        raise AssertionError(
            f"{name}: got {actual.dtype} {tuple(actual.shape)}, want {eager.dtype} "
            f"{tuple(exact.shape)}"
        )
    if exact.numel() == 0:
        return
    exact = exact.double()
    size = exact.square().mean().sqrt()
    error = (actual.to(exact.device).double() - exact).square().mean().sqrt()
    allowed = (eager.to(exact.device).double() - exact).square().mean().sqrt() * factor
    allowed = allowed + size * torch.finfo(eager.dtype).eps
    if not bool(error <= allowed):
        raise AssertionError(
            f"{name}: rms error {error:.3e} exceeds its budget {allowed:.3e} (values {size:.3e})"
        )


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill every uninitialised floating-point allocation with NaN, so that a hole shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))
            return tensor

        return wrapper

    patches = [patch.object(torch, name, poisoned(getattr(torch, name))) for name in _ALLOCATIONS]
    patches += [
        patch.object(Tensor, name, poisoned(getattr(Tensor, name)))
        for name in ("new_empty", "new_empty_strided")
    ]
    for item in patches:
        item.start()
    try:
        yield
    finally:
        for item in patches:
            item.stop()
