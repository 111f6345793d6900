"""P2: the largest step size that a client can take, by sketch ratio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import sqrt

from benchmarks.theory.verdicts import Claim, Finding, exponent, inside
from benchmarks.theory.worlds import STABLE_WITHIN, Ratios, World, losses

STEP = Claim(
    "P2",
    "the largest stable step size of SGD clients grows with the sketch ratio as (S/R)ᵖ, 1 ≤ p ≤ 2",
    "confirmed if the interval of p lies in [0.9, 2.1], refuted if outside",
)
CLAIMS = (STEP,)
RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0)


def stable_steps(
    worlds: Sequence[World], low: float, high: float, halvings: int, rounds: int
) -> Iterator[Finding]:
    """Find the limit of each ratio in each world (seeds of one setting)."""
    found = {
        ratio: [largest_stable(world, (ratio,), low, high, halvings, rounds) for world in worlds]
        for ratio in RATIOS
    }
    points = [(ratio, step) for ratio, steps in found.items() for step in steps]
    power = exponent(*zip(*points, strict=True))
    yield Finding(
        STEP,
        worlds[0].name,
        "p in [1, 2]",
        f"p = {power}",
        inside(power, 0.9, 2.1),
        {"steps": {f"{ratio:g}": steps for ratio, steps in found.items()}, "rounds": rounds},
    )


def largest_stable(
    world: World, ratios: Ratios, low: float, high: float, halvings: int, rounds: int
) -> float:
    """Halve the bracket [low, high] on a logarithmic scale, low taken as stable, high as not."""
    for _ in range(halvings):
        middle = sqrt(low * high)
        if is_stable(world, ratios, middle, rounds):
            low = middle
        else:
            high = middle
    return low


def is_stable(world: World, ratios: Ratios, lr: float, rounds: int) -> bool:
    """Whether no round's loss exceeds the start's by more than a twentieth."""
    limit = STABLE_WITHIN * world.loss(world.first)
    strategy = world.strategy(ratios, replace(world.rule, lr=lr))
    return all(loss <= limit for _, loss in losses(world, strategy, rounds))
