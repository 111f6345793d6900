"""FSLoRA's options: which of them go together, and how far each combination moves a rank.

They are the paper's ``forward`` and ``averaging`` with their alternatives, how the sketches of a
round go together (``sampler``), how often a client draws one (``redraw``), and how many of its
layers, from the top, it trains (``depth``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fslora.depth import read_depth

Forward = Literal["sketched", "full"]
Averaging = Literal["participants", "count", "inverse"]
Sampler = Literal["uniform", "balanced", "nested", "class-shared", "importance"]
Redraw = Literal["round", "step"]

Floats = NDArray[np.float64]

_COHORTS = 256


def check_options(
    forward: Forward,
    averaging: Averaging,
    sampler: Sampler,
    redraw: Redraw = "round",
    depth: str = "all",
    depth_min_probability: float = 1.0,
) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: the sketched forward with averaging by inverse probability; sampling by
            importance where nothing makes up for it; a new sketch for every step from a sampler
            that needs the other clients; or a depth that is none, or is drawn and nothing makes
            up for it.
    """
    if forward == "sketched" and averaging == "inverse":
        raise ValueError(
            "--forward sketched already multiplies by R/S, and --averaging inverse would do it "
            "again; use --forward full with it, or --averaging participants"
        )
    unbiased = {"sketched": "participants", "full": "inverse"}
    if sampler == "importance" and averaging != unbiased[forward]:
        raise ValueError(
            "--sampler importance draws some ranks more often, which only the inverse of their "
            "probabilities makes up for: in the forward pass, use --forward sketched --averaging "
            "participants with it, or in the mean, --forward full --averaging inverse"
        )
    if redraw == "step" and sampler != "uniform":
        raise ValueError(
            f"--redraw step lets a client draw by its own key alone, and --sampler {sampler} needs "
            "more than that; use --sampler uniform with it"
        )
    if not 0 < depth_min_probability <= 1:
        raise ValueError(
            f"--depth-min-probability must be in (0, 1], got {depth_min_probability:g}: a layer "
            "that is never trained cannot be made up for"
        )
    if read_depth(depth).drawn and (forward, averaging) != ("full", "inverse"):
        raise ValueError(
            f"--depth {depth} trains lower layers less often: they stay in the forward pass as "
            "they are, and the inverse of their probability makes up for it; use --forward full "
            "--averaging inverse with it, or the biased --depth top:K"
        )


def expected_step(
    ratios: Sequence[float],
    per_round: int,
    forward: Forward,
    averaging: Averaging,
    sampler: Sampler = "uniform",
    draws: int = 1,
) -> float:
    """Return how far a rank is expected to move, over what the full gradient would move it.

    Of one local SGD step on a loss that is linear in BA. With hᵢ = 1 where client i trains the
    rank, P(hᵢ = 1) = ρᵢ = Sᵢ/R and step gᵢ = 1/ρᵢ (sketched) or 1 (full), n clients a round:

        participants   E[Σ hᵢgᵢ] / n
        count          E[Σ hᵢgᵢ / max(1, Σ hᵢ)]
        inverse        E[Σ hᵢgᵢ/ρᵢ] / n

    Where the client draws anew in each of H steps, of which the rank is in Bᵢ, it is trained with
    P(hᵢ = 1) = 1 - (1 - ρᵢ)ᴴ and moves by gᵢBᵢ/H: this matters to "count" alone, as E[Bᵢ] = ρᵢH.
    A depth that is drawn changes nothing, as its probabilities are made up for; with "top" it is
    the factor of the layers that are trained, and the others' is 0.

    AdamW's steps do not grow with the gradient, so that its clients move a rank by the factor of
    "full" whatever their forward is.

    Args:
        ratios: ρ of every client, sorted by id.
        per_round: n, drawn from them uniformly.
        forward: what the clients compute with.
        averaging: how the server averages.
        sampler: matters to "count" alone. For "uniform" the expectation is exact, for the others
            it is exact for a cohort and the mean over 256 seeded cohorts.
        draws: H where a client draws anew in every step, 1 where its sketch stays for the round.

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
        return _count_of_independent(rho * step, 1 - (1 - rho) ** draws, per_round)
    generator = np.random.default_rng(0)
    cohorts = (
        np.sort(generator.choice(len(rho), per_round, replace=False)) for _ in range(_COHORTS)
    )
    factors = [
        _count_of_classes(rho[cohort], step[cohort])
        if sampler == "class-shared"
        else _count_of_arcs(rho[cohort], step[cohort], nested=sampler == "nested")
        for cohort in cohorts
    ]
    return float(np.mean(factors))


def _count_of_independent(moves: Floats, held: Floats, per_round: int) -> float:
    """The factor of "count" where clients draw independently.

    With mᵢ the expected movement by client i and pₖ = P(hₖ = 1) it is
    Σᵢ mᵢ E[1 / (1 + Σ over k ≠ i of hₖ)] = Σᵢ mᵢ ∫₀¹ Π over k ≠ i of (1 - pₖ + pₖt) dt, and the
    mean of such products over all cohorts with i is a normalised elementary symmetric polynomial.
    """
    nodes, weights = np.polynomial.legendre.leggauss(per_round // 2 + 1)  # exact at this degree
    times = (nodes + 1) / 2
    factors = 1 - held[:, None] * (1 - times)
    kinds = np.stack([moves, held])
    _, first, alike = np.unique(kinds, axis=1, return_index=True, return_counts=True)
    total = 0.0
    for place, clients in zip(first, alike, strict=True):
        products = _mean_product(np.delete(factors, place, axis=0), per_round - 1)
        total += clients * moves[place] * float(weights @ products) / 2
    return total * per_round / len(held)


def _mean_product(values: Floats, size: int) -> Floats:
    """Mean over all subsets of ``size`` rows of the product of their entries, by column."""
    means: Floats = np.zeros((size + 1, values.shape[1]))
    means[0] = 1
    for number, row in enumerate(values, start=1):
        share = np.arange(1, size + 1)[:, None] / number
        means[1:] = (1 - share).clip(min=0) * means[1:] + share * row * means[:-1]
    found: Floats = means[size]
    return found


def _count_of_classes(rho: Floats, step: Floats) -> float:
    """The factor of "count" in a cohort whose clients of one ratio train the same ranks.

    With nⱼ clients of ratio ρⱼ and step gⱼ, as the one of clients who draw independently:
    Σⱼ nⱼρⱼgⱼ ∫₀¹ t^(nⱼ - 1) Π over k ≠ j of (1 - ρₖ + ρₖ t^nₖ) dt.
    """
    classes, first, sizes = np.unique(rho, return_index=True, return_counts=True)
    nodes, weights = np.polynomial.legendre.leggauss(len(rho) // 2 + 1)  # exact at this degree
    times = (nodes + 1) / 2
    factors = 1 - classes[:, None] * (1 - times ** sizes[:, None])
    total = 0.0
    for place, size in enumerate(sizes):
        others = np.delete(factors, place, axis=0).prod(axis=0)
        joint = float(weights @ (times ** (size - 1) * others)) / 2
        total += size * classes[place] * step[first[place]] * joint
    return total


def _count_of_arcs(rho: Floats, step: Floats, *, nested: bool) -> float:
    """The factor of "count" in a cohort whose clients train arcs of ranks, at a random place.

    The rank's place is uniform in [0, 1); the clients' arcs start at 0 where they are nested, else
    each where the last one ends.
    """
    starts = np.zeros_like(rho) if nested else np.cumsum(rho) - rho
    edges = np.unique(np.round(np.concatenate([starts % 1, (starts + rho) % 1, [0, 1]]), 12))
    total = 0.0
    for low, high in pairwise(edges):
        held = ((low + high) / 2 - starts) % 1 < rho
        if held.any():
            total += (high - low) * step[held].mean()
    return float(total)
