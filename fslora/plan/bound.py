"""Rounds to a target as the convergence bound has them, fitted to pilot runs.

The bound's leading term grows with the mean inverse ratio: a run's rounds are in proportion to

    effort = mean over participants of eᵢ,    eᵢ = a + b R/Sᵢ.

All runs are taken to follow one curve in rounds over effort, from where they start to where they
would end,

    value(t) = end + (start - end) (1 + t / effort)^(-p).

Two questions are left to the pilots instead of being assumed. Does the inverse ratio matter? b may
come out as 0, or negative: then small sketches are free. And how do unequal clients add up? The
effort of a mixed cohort is the power mean of order q of its eᵢ: q = 1 is the bound; at q = -1 the
clients' speeds 1/eᵢ add up, and one slow learner does not hold up the others.

Source: arXiv 2501.19389, the theorem on convergence, for the mean inverse ratio; the curve and the
power mean are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from fslora_kernels.seeds import fold_in

Floats = NDArray[np.float64]

_MIXING = (-3.0, 3.0)
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


@dataclass(frozen=True, slots=True)
class Bound:
    """Rounds as a function of ratios.

    Attributes:
        end: the figure after infinitely many rounds.
        power: p, how fast the curve falls.
        fixed: a, in rounds.
        inverse: b, in rounds.
        mixing: q, order of the mean over unequal clients.
    """

    end: float
    power: float
    fixed: float
    inverse: float
    mixing: float = 1.0

    def effort(self, ratios: Floats, shares: Floats) -> float:
        """The effort of clients with these ratios, of which each has its share."""
        each = self.fixed + self.inverse / ratios
        if abs(self.mixing) < 1e-6:
            return float(np.exp(np.sum(shares * np.log(each))))
        return float(np.sum(shares * each**self.mixing) ** (1 / self.mixing))

    def values(self, start: float, rounds: Floats, effort: float) -> Floats:
        """The figure after so many rounds."""
        left: Floats = (1 + rounds / effort) ** -self.power
        return self.end + (start - self.end) * left

    def rounds_to(self, start: float, target: float, effort: float) -> float:
        """Rounds until the figure is at the target; infinite where it ends before it."""
        left = (target - self.end) / (start - self.end)
        return effort * (min(left, 1.0) ** (-1 / self.power) - 1) if left > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class Fit:
    """The bound with the pilots' constants, and how sure they are.

    Attributes:
        best: least squares.
        draws: the same fitted to the curves with each run's residuals as they are or turned
            around, all or 32 such choices.
        start: mean figure before training.
        deviation: root mean square of the residuals.
    """

    best: Bound
    draws: tuple[Bound, ...]
    start: float
    deviation: float

    def rounds_to(self, target: float, ratios: Floats, shares: Floats) -> float:
        """Predicted rounds to a target."""
        return self.best.rounds_to(self.start, target, self.best.effort(ratios, shares))

    def interval(self, target: float, ratios: Floats, shares: Floats) -> tuple[float, float]:
        """The 5th and 95th percentile of the predicted rounds over the draws."""
        found = [
            bound.rounds_to(self.start, target, bound.effort(ratios, shares))
            for bound in self.draws
        ]
        low, high = np.percentile(found, [5, 95], method="nearest")
        return float(low), float(high)

    def slowdown(self, ratio: float) -> tuple[float, float, float]:
        """Rounds at a ratio over those at full rank: fitted, 5th and 95th percentile."""

        def over(bound: Bound) -> float:
            return (bound.fixed + bound.inverse / ratio) / (bound.fixed + bound.inverse)

        low, high = np.percentile([over(bound) for bound in self.draws], [5, 95], method="nearest")
        return over(self.best), float(low), float(high)

    def mixing(self) -> tuple[float, float, float]:
        """The order of the mean over unequal clients: fitted, 5th and 95th percentile."""
        orders = [bound.mixing for bound in self.draws]
        low, high = np.percentile(orders, [5, 95], method="nearest")
        return self.best.mixing, float(low), float(high)


def fit(curves: Sequence[Curve], seed: int) -> Fit:
    """Fit the bound's constants to pilot runs by least squares.

    Args:
        curves: of at least two different uniform ratios; without one of unequal clients q is 1.
        seed: which residuals are turned around, where there are too many choices to take all.

    Raises:
        ValueError: the pilots say nothing about ratios, or did not learn.

    Source: Cameron, Gelbach and Miller, "Bootstrap-based improvements for inference with clustered
    errors", 2008: the wild cluster bootstrap, a run being a cluster.
    """
    uniform = {float(c.ratios[0]) for c in curves if len(c.ratios) == 1}
    if len(uniform) < 2:
        raise ValueError("pilots of two different uniform ratios are needed, such as 1/8,1")
    values = np.concatenate([curve.values[1:] for curve in curves])
    starts = [curve.values[0] for curve in curves]
    start = float(np.mean(starts))
    falling = np.median(values) < start
    if max(abs(values.min() - start), abs(values.max() - start)) < 1e-9:
        raise ValueError("the pilots learnt nothing: raise --lr, or give them more --pilot-rounds")
    mixed = any(len(curve.ratios) > 1 for curve in curves)
    problem = _Problem(tuple(curves), 1 / min(uniform), falling=bool(falling), mixed=mixed)
    fitted, theta = problem.solve(values, problem.guesses(values))
    predicted = problem.predict(theta)
    residuals = values - predicted
    lengths = [len(curve.values) - 1 for curve in curves]
    draws = []
    for signs in _signs(len(curves), seed):
        turned = predicted + np.repeat(signs, lengths) * residuals
        draws.append(problem.solve(turned, [theta])[0])
    return Fit(fitted, tuple(draws), start, float(np.sqrt(np.mean(residuals**2))))


def _signs(runs: int, seed: int) -> list[tuple[float, ...]]:
    if 2**runs <= _DRAWS:
        return list(product((1.0, -1.0), repeat=runs))
    generator = np.random.default_rng(fold_in(seed, "signs"))
    return [tuple(generator.choice((1.0, -1.0), runs)) for _ in range(_DRAWS)]


@dataclass(frozen=True, slots=True)
class _Problem:
    """Least squares over θ: log distance of the end from the best value, log p, log efforts at
    ratios 1 and the lowest, which keeps all efforts between them positive, and q.
    """

    curves: tuple[Curve, ...]
    most: float
    falling: bool
    mixed: bool

    def bound(self, theta: Floats) -> Bound:
        """The constants that θ stands for."""
        one, many = np.exp(theta[2]), np.exp(theta[3])
        inverse = (many - one) / (self.most - 1)
        values = np.concatenate([curve.values for curve in self.curves])
        beyond = np.exp(theta[0])
        end = values.min() - beyond if self.falling else values.max() + beyond
        mixing = float(theta[4]) if self.mixed else 1.0
        constants = map(float, (end, np.exp(theta[1]), one - inverse, inverse))
        return Bound(*constants, mixing)

    def predict(self, theta: Floats) -> Floats:
        """All curves at θ, one after another, round 0 left out."""
        bound = self.bound(theta)
        return np.concatenate(
            [
                bound.values(
                    curve.values[0],
                    np.arange(1.0, len(curve.values)),
                    bound.effort(curve.ratios, curve.shares),
                )
                for curve in self.curves
            ]
        )

    def guesses(self, values: Floats) -> list[Floats]:
        """Where to begin."""
        spread = float(np.ptp([*values, self.curves[0].values[0]]))
        rounds = max(len(curve.values) for curve in self.curves)
        return [
            np.array([np.log(0.3 * spread), np.log(p), np.log(one), np.log(one * more), 0.0])
            for p in (0.5, 1.5)
            for one in (rounds / 30, rounds / 3)
            for more in (1.0, 5.0)
        ]

    def solve(self, values: Floats, guesses: Sequence[Floats]) -> tuple[Bound, Floats]:
        """Fit values from each guess; the best of them."""
        from scipy.optimize import least_squares

        spread = float(np.ptp([*values, self.curves[0].values[0]]))
        log = np.log
        low = np.array([log(1e-3 * spread), log(0.1), log(1e-2), log(1e-2), _MIXING[0]])
        high = np.array([log(3 * spread), log(10.0), log(1e5), log(1e5), _MIXING[1]])
        found = [
            least_squares(
                lambda theta: self.predict(theta) - values,
                np.clip(guess, low + 1e-6, high - 1e-6),
                bounds=(low, high),
            )
            for guess in guesses
        ]
        best = min(found, key=lambda one: one.cost)
        return self.bound(best.x), best.x
