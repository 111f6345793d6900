"""How long a round takes and who is in it, over drawn cohorts that all plans share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fslora.devices import Fleet

Floats = NDArray[np.float64]

_DRAWS = 256


@dataclass(frozen=True, slots=True)
class MeanRound:
    """A round on average; by class, arrays [classes].

    Attributes:
        seconds: until it is over.
        shares: of a class in the mean of a round's used updates; they sum to 1, or are all 0
            where no update could ever be used.
        asked: clients that are sent something.
        answered: clients that send something back in time, used or not.
        useful: share of the rounds in which any update is used; the others move no model.
    """

    seconds: float
    shares: Floats
    asked: Floats
    answered: Floats
    useful: float


@dataclass(frozen=True, slots=True)
class Cohorts:
    """Cohorts drawn once, so that two plans differ by their ratios and not by luck.

    The rule of who is waited for is that of ``fslora.clock.Clock.plan``.

    Attributes:
        member: [draws, cohort] the class of each client.
        present: [draws, cohort] whether it is available.
        fails: [draws, cohort] whether it fails in mid-round.
        jitter: [draws, cohort] factor on its compute time.
        classes: how many there are.
        per_round: answers that a round waits for.
        deadline: seconds after which it takes none; 0 waits for all.
    """

    member: NDArray[np.int64]
    present: NDArray[np.bool_]
    fails: NDArray[np.bool_]
    jitter: Floats
    classes: int
    per_round: int
    deadline: float

    def mean_round(self, compute: Floats, rest: Floats) -> MeanRound:
        """Average over the cohorts.

        Args:
            compute: [classes] seconds of computing.
            rest: [classes] seconds of all else.
        """
        limit = self.deadline or np.inf
        seconds = rest[self.member] + compute[self.member] * self.jitter
        in_time = self.present & ~self.fails & (seconds <= limit)
        finish = np.where(in_time, seconds, np.inf)
        order = np.argsort(finish, axis=1, kind="stable")
        place = np.argsort(order, axis=1, kind="stable")
        used = in_time & (place < self.per_round)
        kth = np.take_along_axis(finish, order[:, self.per_round - 1, None], axis=1)[:, 0]
        waited = np.where(self.present, np.minimum(seconds, limit), 0.0).max(axis=1)
        count = used.sum(axis=1, keepdims=True)
        weight = used / np.maximum(count, 1)
        useful = float((count > 0).mean())
        return MeanRound(
            seconds=float(np.where(np.isfinite(kth), kth, waited).mean()),
            shares=self._by_class(weight) / (useful or 1.0),
            asked=self._by_class(self.present),
            answered=self._by_class(in_time),
            useful=useful,
        )

    def _by_class(self, weight: NDArray[np.generic]) -> Floats:
        weights = weight.ravel().astype(np.float64)
        totals = np.bincount(self.member.ravel(), weights=weights, minlength=self.classes)
        means: Floats = totals / len(self.member)
        return means


def draw_cohorts(
    fleet: Fleet, clients: int, cohort: int, per_round: int, deadline: float, key: int
) -> Cohorts:
    """Draw 256 cohorts.

    Args:
        fleet: what clients have.
        clients: how many there are.
        cohort: how many are chosen for a round.
        per_round: how many answers it waits for.
        deadline: of a round in seconds; 0 waits for all.
        key: of the draws.
    """
    generator = np.random.default_rng(key)
    population = np.repeat(np.arange(len(fleet.devices)), fleet.counts(clients))
    member = generator.permuted(np.tile(population, (_DRAWS, 1)), axis=1)[:, :cohort]

    def figure(name: str) -> Floats:
        of_class: Floats = np.array([getattr(device, name) for device in fleet.devices])
        of_member: Floats = of_class[member]
        return of_member

    uniform = generator.random((2, *member.shape))
    sigma = figure("jitter")
    return Cohorts(
        member=member,
        present=uniform[0] < figure("availability"),
        fails=uniform[1] < figure("dropout"),
        jitter=np.exp(sigma * generator.standard_normal(member.shape) - sigma**2 / 2),
        classes=len(fleet.devices),
        per_round=per_round,
        deadline=deadline,
    )
