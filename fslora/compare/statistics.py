"""Means over seeds and what can be said about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

Record = dict[str, float | int | None]

# Two-sided 95% quantiles of Student's t for 1, 2, … degrees of freedom.
_T = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.306, 2.26216, 2.22814)


def t_quantile(freedom: int) -> float:
    """The two-sided 95% quantile of Student's t.

    Source: Abramowitz and Stegun 26.7.5 beyond ten degrees of freedom, right to 1.2e-4.

    Raises:
        ValueError: no degree of freedom.
    """
    if freedom < 1:
        raise ValueError("an interval needs at least two values: give more seeds")
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def spread(values: Sequence[float]) -> Record:
    """Mean, standard deviation and 95% interval of the mean, assuming normal values.

    Args:
        values: one a seed.

    Returns:
        `count`, `mean`, `std` (of a seed, with n − 1), `low` and `high`; what too few values do
        not tell is None.
    """
    count = len(values)
    mean = fmean(values) if count else None
    if mean is None or count < 2:
        return {"count": count, "mean": mean, "std": None, "low": None, "high": None}
    std = stdev(values)
    half = t_quantile(count - 1) * std / math.sqrt(count)
    return {"count": count, "mean": mean, "std": std, "low": mean - half, "high": mean + half}


def difference(ones: Sequence[float], others: Sequence[float]) -> Record:
    """The spread of the differences, one less the other, of values of the same seeds."""
    return spread([one - other for one, other in zip(ones, others, strict=True)])


def ratio(ones: Sequence[float], others: Sequence[float]) -> Record:
    """The geometric mean of the quotients, one by the other, and its 95% interval.

    Returns:
        As `spread`, but `std` is of the quotients' logarithms; empty where a cost is 0.
    """
    if not all(value > 0 for value in (*ones, *others)):
        return spread([])
    logs = spread(
        [math.log(one) - math.log(other) for one, other in zip(ones, others, strict=True)]
    )
    back = {key: _exp(logs[key]) for key in ("mean", "low", "high")}
    return {**logs, **back}


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(min(value, 700.0))  # e^710 is not a float


def verdict(found: Record, neutral: float) -> str:
    """Whether an interval leaves out "no difference": higher, lower or undecided.

    Args:
        found: from `difference` or `ratio`.
        neutral: 0 for a difference, 1 for a quotient.
    """
    low, high = found["low"], found["high"]
    if low is None or high is None:
        return "undecided"
    if low > neutral:
        return "higher"
    return "lower" if high < neutral else "undecided"
