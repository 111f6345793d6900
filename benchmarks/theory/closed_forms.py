"""What docs/math.md derives for the squared loss, as functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def inverse_ratio(rank: int, sizes: Sequence[int]) -> float:
    """Return mean(R/S) over clients."""
    return sum(rank / size for size in sizes) / len(sizes)


def sketched_gap(lora_a: Tensor, lora_b: Tensor, x: Tensor, excess: float) -> Tensor:
    """Return E ½‖BΩAx − y‖² − ½‖BAx − y‖², mean over the inputs, whatever y is.

        ½ e [ R/(R−1) Σⱼ ‖bⱼ‖² (aⱼᵀx)² − ‖BAx‖² / (R−1) ],    e = mean(R/S) − 1

    Args:
        lora_a: ``[R, D]``.
        lora_b: ``[R, E]``.
        x: ``[T, D]``; ``√D · I`` stands for white inputs, with a mean square of 1.
        excess: e.
    """
    rank = lora_a.shape[0]
    if rank == 1:  # a sketch has one rank of one: there is no other
        return x.new_zeros(())
    hidden = x @ lora_a.t()
    alone = (hidden.square() * lora_b.square().sum(dim=1)).sum()
    together = (hidden @ lora_b).square().sum()
    return 0.5 * excess * (rank * alone - together) / (rank - 1) / x.shape[0]


def sketched_objective(lora_a: Tensor, lora_b: Tensor, target: Tensor, excess: float) -> Tensor:
    """Return f^S = E ½‖BΩA − W*‖² (white inputs), the mean over clients of any ratios.

    Args:
        lora_a: ``[R, D]``.
        lora_b: ``[R, E]``.
        target: W*, ``[E, D]``.
        excess: mean(R/S) − 1.
    """
    inputs = lora_a.shape[1]
    white = inputs**0.5 * torch.eye(inputs, dtype=lora_a.dtype)
    whole = 0.5 * (lora_b.t() @ lora_a - target).square().sum()
    return whole + sketched_gap(lora_a, lora_b, white, excess)


def shrunk(singular: Sequence[float], rank: int, excess: float) -> list[float]:
    """Return the singular values of BA where f^S is least, of a target with the given ones.

    σᵢ = (σᵢ* − cτ)₊ / (1 − c), τ = Σ σ, c = e / (R − 1): a soft threshold that depends on the
    ratios by their mean inverse alone. At c = 1 (all S = 1) only the largest is left.

    Args:
        singular: of W*, descending, none negative, at most R of them.
        rank: R.
        excess: e = mean(R/S) − 1.
    """
    share = excess / (rank - 1) if rank > 1 else 0.0
    if share > 1 - 1e-12:
        return [singular[0], *(0.0 for _ in singular[1:])]
    for kept in range(len(singular), 0, -1):
        threshold = share * sum(singular[:kept]) / (1 - share + share * kept)
        if singular[kept - 1] > threshold:
            break
    return [max(0.0, value - threshold) / (1 - share) for value in singular]


def minimiser(target: Tensor, rank: int, excess: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the factors where f^S is least, ``[R, D]`` and ``[R, E]``, by L-BFGS."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        (torch.randn(rank, size, generator=generator).double() * 0.3).requires_grad_()
        for size in (target.shape[1], target.shape[0])
    )
    optimizer = torch.optim.LBFGS(
        [a, b], max_iter=2000, tolerance_grad=1e-9, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sketched_objective(a, b, target, excess)
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    return a.detach(), b.detach()


def participation(singular: Sequence[float]) -> float:
    """Return (Σσ²)² / Σσ⁴."""
    squares = [value**2 for value in singular]
    return sum(squares) ** 2 / sum(square**2 for square in squares)


def relative_error(found: Sequence[float], singular: Sequence[float]) -> float:
    """Return ‖BA − W*‖² / ‖W*‖² of two matrices that share their singular vectors."""
    missed = sum((one - other) ** 2 for one, other in zip(found, singular, strict=True))
    return missed / sum(value**2 for value in singular)
