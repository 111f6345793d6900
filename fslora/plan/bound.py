"""Rounds to a target as the convergence bound has them, fitted to pilot runs.

The bound's leading term grows with the mean inverse ratio. With a client's effort

    e(S) = 1 + β (R/S - 1),        e(R) = 1,

a run needs, to come to any level of its loss or score, rounds in proportion to its clients' mean
effort. So two runs that differ in ratios alone have the same curve in rounds over effort, and the
pilots need not say more of it than when each comes to which level.

Two questions are left to the pilots instead of being assumed. Does the inverse ratio matter? β may
come out as 0, or negative: then small sketches are free. And how do unequal clients add up? The
mean is the power mean of order q: q = 1 is the bound; at q = -1 the clients' speeds 1/e add up,
and slow learners do not hold up the others.

Source: arXiv 2501.19389, the theorem on convergence, for the mean inverse ratio; the power mean is
ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from fslora_kernels.seeds import fold_in

Floats = NDArray[np.float64]

_LEVELS = 16
_MIXING = (-4.0, 4.0)
_DRAWS = 32


@dataclass(frozen=True, slots=True)
class Curve:
    """What one pilot run found.

    Attributes:
        ratios: [kinds] the sketch ratios of its clients.
        shares: [kinds] of each ratio among the used updates.
        values: [rounds + 1] the evaluated figure, from round 0 on.
    """

    ratios: Floats
    shares: Floats
    values: Floats

    def rounds_to(self, levels: Floats) -> Floats:
        """Rounds until it first was at each level, a straight line between rounds; nan: never."""
        falling = levels[-1] < self.values[0]
        best = np.minimum.accumulate(self.values if falling else -self.values)
        wanted = levels if falling else -levels
        after = np.searchsorted(-best, -wanted)
        ends = np.clip(after, 1, len(best) - 1)
        high, low = best[ends - 1], best[ends]
        step = (high - wanted) / np.where(high > low, high - low, 1.0)
        return np.where(after < len(best), ends - 1 + step, np.nan)


@dataclass(frozen=True, slots=True)
class Effort:
    """How many times the rounds of full rank a run needs.

    Attributes:
        inverse: β, per unit of R/S.
        mixing: q, order of the mean over unequal clients.
    """

    inverse: float
    mixing: float = 1.0

    def __call__(self, ratios: Floats, shares: Floats) -> float:
        """The effort of clients with these ratios, of which each has its share."""
        logs = np.log1p(self.inverse * (1 / ratios - 1))
        mean = float(shares @ logs)
        if abs(self.mixing) < 1e-4:  # the power mean's limit, and its slope
            return float(np.exp(mean + self.mixing / 2 * (shares @ (logs - mean) ** 2)))
        total = shares @ np.exp(self.mixing * (logs - mean))
        return float(np.exp(mean + np.log(total) / self.mixing))


@dataclass(frozen=True, slots=True)
class Fit:
    """The pilots' constants, and how sure they are.

    Attributes:
        best: least squares of the logarithm of rounds.
        draws: the same fitted with each run's residuals as they are or turned around.
        levels: [levels] of the figure, the last one the target.
        full_rounds: [levels] that full rank needs to each.
        full_draws: [draws, levels] the same of each draw.
        start: mean figure before training.
        deviation: root mean square of the residuals: relative error of rounds.
    """

    best: Effort
    draws: tuple[Effort, ...]
    levels: Floats
    full_rounds: Floats
    full_draws: Floats
    start: float
    deviation: float

    def rounds(self, ratios: Floats, shares: Floats) -> float:
        """Predicted rounds to the target."""
        return float(self.full_rounds[-1]) * self.best(ratios, shares)

    def interval(self, ratios: Floats, shares: Floats) -> tuple[float, float]:
        """The 5th and 95th percentile of the predicted rounds over the draws."""
        whole = zip(self.draws, self.full_draws[:, -1], strict=True)
        return _interval([rounds * effort(ratios, shares) for effort, rounds in whole])

    def values(self, rounds: Floats, effort: float) -> Floats:
        """The predicted figure after so many rounds, down to the target."""
        at = np.concatenate([[0.0], self.full_rounds])
        found: Floats = np.interp(rounds / effort, at, np.concatenate([[self.start], self.levels]))
        return found

    def slowdown(self, ratio: float) -> tuple[float, float, float]:
        """Rounds at a ratio over those at full rank: fitted, 5th and 95th percentile."""
        every = [1 + effort.inverse * (1 / ratio - 1) for effort in (self.best, *self.draws)]
        return every[0], *_interval(every[1:])

    def mixing(self) -> tuple[float, float, float]:
        """The order of the mean over unequal clients: fitted, 5th and 95th percentile."""
        return self.best.mixing, *_interval([effort.mixing for effort in self.draws])


def fit(curves: Sequence[Curve], target: float, rank: int, seed: int) -> Fit:
    """Fit the effort's constants to pilot runs by least squares.

    Compared are the rounds to 16 levels from halfway to the target on.

    Args:
        curves: of at least two different uniform ratios; without one of unequal clients q is 1.
        target: value of the figure that is to be reached; at least one pilot reached it.
        rank: R: no effort may be negative down to S = 1.
        seed: which residuals are turned around, where there are too many choices to take all.

    Raises:
        ValueError: the pilots do not say what is asked of them.

    Source: Cameron, Gelbach and Miller, "Bootstrap-based improvements for inference with clustered
    errors", 2008: the wild cluster bootstrap, a run being a cluster.
    """
    start = float(np.mean([curve.values[0] for curve in curves]))
    levels = np.linspace((start + target) / 2, target, _LEVELS)
    with np.errstate(divide="ignore", invalid="ignore"):  # a level that a run began beyond
        logs = np.log(np.array([curve.rounds_to(levels) for curve in curves]))
    known = np.isfinite(logs)
    if not known[:, -1].any():
        reached = [curve.values.min() if target < start else curve.values.max() for curve in curves]
        best = min(reached) if target < start else max(reached)
        raise ValueError(
            f"no pilot reaches {target:g}, the best comes to {best:.3f}: raise "
            "--pilot-rounds, or take an easier --targets or another --lr"
        )
    used = [curve for curve, own in zip(curves, known.any(axis=1), strict=True) if own]
    if len({float(curve.ratios[0]) for curve in used if len(curve.ratios) == 1}) < 2:
        raise ValueError(
            "fewer than two pilots of uniform ratios come halfway to the target: raise "
            "--pilot-rounds, or take larger --pilot-ratios"
        )
    problem = _Problem(tuple(curves), known, rank)
    theta = problem.solve(logs, [(one, q) for one in (1.0, 3.0) for q in (-1.0, 1.0)])
    predicted = problem.predict(theta, logs)
    residuals = np.where(known, logs - predicted, 0.0)
    effort, full = problem.effort(theta), problem.full(theta, logs)
    draws, full_draws = [], []
    for signs in _signs(len(curves), seed):
        turned = np.where(known, predicted + np.array(signs)[:, None] * residuals, np.nan)
        again = problem.solve(turned, [(float(theta[0]), float(theta[1]))])
        draws.append(problem.effort(again))
        full_draws.append(problem.full(again, turned))
    deviation = float(np.sqrt(np.mean(residuals[known] ** 2)))
    return Fit(effort, tuple(draws), levels, full, np.array(full_draws), start, deviation)


def _interval(found: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(found, [5, 95], method="nearest")
    return float(low), float(high)


def _signs(runs: int, seed: int) -> list[tuple[float, ...]]:
    if 2**runs <= _DRAWS:
        return list(product((1.0, -1.0), repeat=runs))
    generator = np.random.default_rng(fold_in(seed, "signs"))
    return [tuple(generator.choice((1.0, -1.0), runs)) for _ in range(_DRAWS)]


@dataclass(frozen=True, slots=True)
class _Problem:
    """Least squares over θ = (log effort at S = 1, q); the levels' own rounds follow from it.

    Attributes:
        curves: of the pilots.
        known: [runs, levels] which were reached.
        rank: R.
    """

    curves: tuple[Curve, ...]
    known: NDArray[np.bool_]
    rank: int

    def effort(self, theta: Floats) -> Effort:
        """The constants that θ stands for."""
        mixed = any(len(curve.ratios) > 1 for curve in self.curves)
        inverse = np.expm1(theta[0]) / max(self.rank - 1, 1)
        return Effort(float(inverse), float(theta[1]) if mixed else 1.0)

    def full(self, theta: Floats, logs: Floats) -> Floats:
        """Rounds of full rank to each level: what the runs agree on best."""
        found: Floats = np.exp(self._levels(self._efforts(theta), logs))
        return np.maximum.accumulate(found)

    def predict(self, theta: Floats, logs: Floats) -> Floats:
        """Logarithm of rounds [runs, levels]."""
        efforts = self._efforts(theta)
        predicted: Floats = efforts[:, None] + self._levels(efforts, logs)
        return predicted

    def solve(self, logs: Floats, guesses: Sequence[tuple[float, float]]) -> Floats:
        """Fit the logarithm of rounds from each guess; the best of them."""
        from scipy.optimize import least_squares

        most = np.log(4 * self.rank)
        found = [
            least_squares(
                lambda theta: (self.predict(theta, logs) - logs)[self.known],
                np.clip(guess, (-1.99, _MIXING[0]), (most, _MIXING[1])),
                bounds=((-2.0, _MIXING[0] - 0.1), (most + 0.1, _MIXING[1] + 0.1)),
            )
            for guess in guesses
        ]
        best: Floats = min(found, key=lambda one: one.cost).x
        return best

    def _efforts(self, theta: Floats) -> Floats:
        effort = self.effort(theta)
        return np.log([effort(curve.ratios, curve.shares) for curve in self.curves])

    def _levels(self, efforts: Floats, logs: Floats) -> Floats:
        """Mean over the runs that reached a level of their rounds over their effort."""
        over = np.where(self.known, logs - efforts[:, None], 0.0)
        reached = np.maximum(self.known.sum(axis=0), 1)
        means: Floats = over.sum(axis=0) / reached
        return means
