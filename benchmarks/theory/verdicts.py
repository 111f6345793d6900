"""What a prediction claims, what was found, and the rule that decides: stated before the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np

from fslora.compare.statistics import spread, t_quantile

Verdict = Literal["confirmed", "refuted", "undecided"]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95% interval.

    Attributes:
        mean: the estimate.
        low: lower end.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Print as ``0.93 [0.91, 0.95]``."""
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, slots=True)
class Claim:
    """A prediction.

    Attributes:
        name: P1 … P6, with a letter where one has several parts.
        text: what is claimed.
        rule: when it is confirmed and when refuted; anything else is undecided.
    """

    name: str
    text: str
    rule: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One claim in one setting.

    Attributes:
        claim: which.
        setting: the toy, or a model.
        predicted: in words or numbers.
        measured: likewise.
        verdict: by the claim's rule.
        data: the figures behind it, plain values.
    """

    claim: Claim
    setting: str
    predicted: str
    measured: str
    verdict: Verdict
    data: dict[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Return it as plain values."""
        return asdict(self)


Experiment = Callable[..., Iterator[Finding]]


def mean_of(values: Sequence[float]) -> Interval:
    """Return the mean of one value a seed, with Student's interval; one value has no end."""
    found = spread(values)
    mean, low, high = (found[key] for key in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return Interval(float(values[0]), -math.inf, math.inf)
    return Interval(mean, low, high)


def ratio_of(ones: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the geometric mean of the quotients of values of the same seeds."""
    logs = mean_of([math.log(a / b) for a, b in zip(ones, others, strict=True)])
    return Interval(*(math.exp(min(end, 700)) for end in (logs.mean, logs.low, logs.high)))


def exponent(x: Sequence[float], y: Sequence[float]) -> Interval:
    """Return p of y ∝ xᵖ by least squares on the logarithms, residuals taken as independent."""
    u, v = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    u = u - u.mean()
    slope = float(u @ v / (u @ u))
    left = v - v.mean() - slope * u
    freedom = len(u) - 2
    half = t_quantile(freedom) * float(np.sqrt(left @ left / freedom / (u @ u)))
    return Interval(slope, slope - half, slope + half)


def inside(found: Interval, low: float, high: float) -> Verdict:
    """Confirmed where the whole interval lies in [low, high], refuted where none of it does."""
    if low <= found.low and found.high <= high:
        return "confirmed"
    return "refuted" if found.high < low or found.low > high else "undecided"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Refuted if one is, else undecided if one is: a claim about all of several."""
    for verdict in ("refuted", "undecided"):
        if verdict in verdicts:
            return verdict
    return "confirmed"
