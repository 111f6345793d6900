"""Which sketch size for each class: the cheapest way to the target that keeps all limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fslora.devices import Fleet
from fslora.plan.bound import Fit
from fslora.plan.cohorts import Cohorts, Floats
from fslora.plan.costs import Costs
from fslora.plan.settings import Goal
from fslora_kernels.seeds import fold_in

_ENUMERATED = 5000

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a choice of sizes is predicted to take to the target.

    Attributes:
        sizes: S of each class.
        rounds: to the target, those without a used update among them.
        rounds_low: 5th percentile.
        rounds_high: 95th percentile.
        round_seconds: mean of a round.
        seconds: simulated, to the target.
        moved_bytes: both ways, all clients, to the target.
        joules: to the target, of devices with known watts.
        asked: [classes] participations of the whole run.
    """

    sizes: Sizes
    rounds: float
    rounds_low: float
    rounds_high: float
    round_seconds: float
    seconds: float
    moved_bytes: float
    joules: float
    asked: tuple[float, ...]

    def cost(self, goal: Goal) -> float:
        """What the goal asks to have least of."""
        return {"time": self.seconds, "bytes": self.moved_bytes, "energy": self.joules}[goal]


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything that a choice of sizes is judged by.

    Attributes:
        costs: of a client's round.
        fleet: the classes.
        cohorts: drawn once for all choices.
        fit: rounds to a target.
        goal: what to spend least of.
        feasible: sizes that each class can have, ascending.
    """

    costs: Costs
    fleet: Fleet
    cohorts: Cohorts
    fit: Fit
    goal: Goal
    feasible: tuple[Sizes, ...]

    def outlook(self, sizes: Sizes, *, interval: bool = True) -> Outlook:
        """Predict what a choice takes."""
        devices = self.fleet.devices
        pairs = [self.costs.seconds(device, s) for device, s in zip(devices, sizes, strict=True)]
        compute, rest = np.array(pairs).T
        mean = self.cohorts.mean_round(compute, rest)
        ratios = np.array(sizes) / self.costs.rank
        if not mean.shares.any():
            never = [math.inf] * 7
            return Outlook(sizes, *never, asked=tuple(mean.asked))  # type: ignore[misc,arg-type]
        rounds = self.fit.rounds(ratios, mean.shares) / mean.useful
        low = high = rounds
        if interval:
            low, high = (end / mean.useful for end in self.fit.interval(ratios, mean.shares))
        down = np.array([self.costs.down_bytes(size) for size in sizes])
        up = np.array([self.costs.up_bytes(size) for size in sizes])
        watts = np.array([device.watts for device in devices])
        rtt = np.array([device.rtt_seconds for device in devices])
        busy: Floats = compute + rest - rtt
        return Outlook(
            sizes=sizes,
            rounds=rounds,
            rounds_low=low,
            rounds_high=high,
            round_seconds=mean.seconds,
            seconds=rounds * mean.seconds,
            moved_bytes=rounds * float(mean.asked @ down + mean.answered @ up),
            joules=rounds * float(mean.asked @ (watts * busy)),
            asked=tuple(map(float, rounds * mean.asked)),
        )

    def cost(self, sizes: Sizes) -> float:
        """What the goal asks to have least of, for a choice."""
        return self.outlook(sizes, interval=False).cost(self.goal)

    def uniform(self) -> list[Sizes]:
        """One size for all, as near to it as each class's limits allow; all such choices."""
        ranks = range(1, self.costs.rank + 1)
        return list(dict.fromkeys(self.limited_to(size) for size in ranks))

    def limited_to(self, size: int) -> Sizes:
        """For each class the largest feasible size up to one, or its smallest."""
        return tuple(
            max((own for own in sizes if own <= size), default=sizes[0]) for sizes in self.feasible
        )


@dataclass(frozen=True, slots=True)
class Solution:
    """The choice, and whether all were looked at.

    Attributes:
        outlook: of the chosen sizes.
        exact: every choice was compared; otherwise a seeded search found it.
    """

    outlook: Outlook
    exact: bool


def solve(problem: Problem, seed: int, *, enumerated: int = _ENUMERATED) -> Solution:
    """Find the cheapest choice: by comparing all if they are few, else by differential evolution.

    Args:
        problem: what is to be solved.
        seed: of the search.
        enumerated: up to so many choices are all compared.

    Raises:
        ValueError: no answer could ever be used.
    """
    choices = math.prod(map(len, problem.feasible))
    exact = choices <= enumerated
    if exact:
        best = min(itertools.product(*problem.feasible), key=problem.cost)
    else:
        best = _evolve(problem, seed)
    outlook = problem.outlook(best)
    if not math.isfinite(outlook.cost(problem.goal)):
        raise ValueError(
            "whatever the ratios, no answer would be used: nobody is available, or all are too "
            "late; raise --deadline or the devices' availability"
        )
    return Solution(outlook, exact)


def _evolve(problem: Problem, seed: int) -> Sizes:
    """Search by scipy's differential evolution over whole numbers, from the best uniform choice."""
    from scipy.optimize import differential_evolution

    feasible = problem.feasible

    def sizes_at(places: Sequence[float]) -> Sizes:
        return tuple(own[round(place)] for own, place in zip(feasible, places, strict=True))

    cost = lru_cache(maxsize=None)(problem.cost)
    start = min(problem.uniform(), key=cost)
    result = differential_evolution(
        lambda places: min(cost(sizes_at(places)), 1e300),
        [(0, len(own) - 1) for own in feasible],
        integrality=[True] * len(feasible),
        x0=[own.index(size) for own, size in zip(feasible, start, strict=True)],
        popsize=20,
        maxiter=100,
        tol=0.0,  # until all of the population agree
        polish=False,
        rng=np.random.default_rng(fold_in(seed, "evolution")),
    )
    return sizes_at(result.x)
