"""FSLoRA's options: which of them go together, and how far each combination moves a rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Forward = Literal["sketched", "full"]
Averaging = Literal["participants", "count", "inverse"]
Sampler = Literal["uniform", "balanced", "nested", "class-shared", "importance"]

Floats = NDArray[np.float64]

_COHORTS = 256


def check_options(forward: Forward, averaging: Averaging, sampler: Sampler) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: the sketched forward with averaging by inverse probability, or sampling by
            importance without it.
    """
    if forward == "sketched" and averaging == "inverse":
        raise ValueError(
            "--forward sketched already multiplies by R/S, and --averaging inverse would do it "
            "again; use --forward full with it, or --averaging participants"
        )
    if sampler == "importance" and averaging != "inverse":
        raise ValueError(
            "--sampler importance draws some ranks more often, which only the inverse of their "
            "probabilities makes up for; use --forward full --averaging inverse with it"
        )


def expected_step(
    ratios: Sequence[float],
    per_round: int,
    forward: Forward,
    averaging: Averaging,
    sampler: Sampler = "uniform",
) -> float:
    """Return how far a rank is expected to move, over what the full gradient would move it.

    Of one local SGD step on a loss that is linear in BA. With hᵢ = 1 where client i trains the
    rank, P(hᵢ = 1) = ρᵢ = Sᵢ/R and step gᵢ = 1/ρᵢ (sketched) or 1 (full), n clients a round:

        participants   E[Σ hᵢgᵢ] / n
        count          E[Σ hᵢgᵢ / max(1, Σ hᵢ)]
        inverse        E[Σ hᵢgᵢ/ρᵢ] / n

    AdamW's steps do not grow with the gradient, so that its clients move a rank by the factor of
    "full" whatever their forward is.

    Args:
        ratios: ρ of every client, sorted by id.
        per_round: n, drawn from them uniformly.
        forward: what the clients compute with.
        averaging: how the server averages.
        sampler: matters to "count" alone. For "uniform" the expectation is exact, for the others
            it is exact for a cohort and the mean over 256 seeded cohorts.

    Returns:
        The factor; 1 is the full gradient's.
    """
    rho = np.array(ratios, dtype=np.float64)
    step = 1 / rho if forward == "sketched" else np.ones_like(rho)
    if averaging == "participants":
        return float(np.mean(rho * step))
    if averaging == "inverse":
        return float(np.mean(step))
    if sampler == "uniform":
        return _count_of_independent(rho, per_round, forward)
    generator = np.random.default_rng(0)
    draws = (np.sort(generator.choice(len(rho), per_round, replace=False)) for _ in range(_COHORTS))
    factors = [
        sum(weight * step[cohort][held].mean() for weight, held in _holders(rho[cohort], sampler))
        for cohort in draws
    ]
    return float(np.mean(factors))


def _count_of_independent(rho: Floats, per_round: int, forward: Forward) -> float:
    """The factor of "count" where clients draw independently.

    E[Σ hᵢ/ρᵢ / max(1, Σ hᵢ)] = Σᵢ E[1 / (1 + Σ over k ≠ i of hₖ)] = Σᵢ ∫₀¹ Π (1 - ρₖ + ρₖt) dt, and
    the mean of such products over all cohorts is a normalised elementary symmetric polynomial.
    """
    if forward == "full":  # P(somebody trains it)
        return 1.0 - float(_mean_product(1 - rho[:, None], per_round)[0])
    nodes, weights = np.polynomial.legendre.leggauss(per_round // 2 + 1)  # exact at this degree
    times = (nodes + 1) / 2
    products = _mean_product(1 - rho[:, None] * (1 - times), per_round - 1)
    return per_round * float(weights @ products) / 2


def _mean_product(values: Floats, size: int) -> Floats:
    """Mean over all subsets of ``size`` rows of the product of their entries, by column."""
    means: Floats = np.zeros((size + 1, values.shape[1]))
    means[0] = 1
    for number, row in enumerate(values, start=1):
        share = np.arange(1, size + 1)[:, None] / number
        means[1:] = (1 - share).clip(min=0) * means[1:] + share * row * means[:-1]
    found: Floats = means[size]
    return found


def _holders(rho: Floats, sampler: Sampler) -> Iterator[tuple[float, NDArray[np.bool_]]]:
    """Who trains a rank together: probabilities and masks over the cohort; nobody is left out."""
    if sampler == "class-shared":
        classes, member = np.unique(rho, return_inverse=True)
        for drawn in product((False, True), repeat=len(classes)):
            chosen = np.array(drawn)
            if chosen.any():
                yield float(np.where(chosen, classes, 1 - classes).prod()), chosen[member]
        return
    # The rank's place is uniform in [0, 1); the clients' arcs start at 0, or end to end.
    starts = np.zeros_like(rho) if sampler == "nested" else np.cumsum(rho) - rho
    edges = np.unique(np.round(np.concatenate([starts % 1, (starts + rho) % 1, [0, 1]]), 12))
    for low, high in pairwise(edges):
        held = ((low + high) / 2 - starts) % 1 < rho
        if held.any():
            yield float(high - low), held
