"""P5: where training ends at full-rank evaluation; P6: which method arrives first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from math import exp, isinf, log

from benchmarks.theory.closed_forms import minimiser, participation, relative_error, shrunk
from benchmarks.theory.rounds import MIX, best, named
from benchmarks.theory.toy import SINGULAR, starting, target_of, toy
from benchmarks.theory.verdicts import Claim, Finding, Verdict, ratio_of, worst
from benchmarks.theory.worlds import Ratios, World, inverse, losses, rounds_to
from fslora.evaluation import effective_rank
from fslora.protocol import LoRAWeights

FLOOR = Claim(
    "P5a",
    "sketched training ends where the closed form says: singular values soft-thresholded by "
    "mean(R/S), so that the whole adapter's error has a floor and BA loses rank",
    "confirmed if at every choice the error is within 10% (or 0.003) of the prediction "
    "and the participation rank within 0.15; refuted if one is off by twice that",
)
NO_FLOOR = Claim(
    "P5b",
    "with the full forward there is no floor",
    "confirmed if the error ends below a tenth of the sketched forward's, refuted if above a half",
)
RANK = Claim(
    "P5c",
    "the sketched forward ends at a lower effective rank of BA than the full forward, at equal "
    "ratio and steps (AdamW, whose steps both forwards move alike)",
    "confirmed if the interval of the quotient lies below 1, refuted if above",
)
LOSS = Claim(
    "P5d",
    "the sketched forward ends at a higher loss of the whole adapter than the full, likewise",
    "confirmed if the interval of the quotient lies above 1, refuted if below",
)
ORDER = Claim(
    "P6",
    "rounds to a target: full rank ≤ full forward by count < full forward by participants < zero "
    "padding < sketched forward, each at its best step size",
    "confirmed if the means are in this order, refuted if two neighbours are the other way round "
    "in every seed",
)
CLAIMS = (FLOOR, NO_FLOOR, RANK, LOSS, ORDER)
SETS: tuple[Ratios, ...] = ((1.0,), (1 / 2,), (1 / 4,), MIX, (1 / 8,))
METHODS = ("fedit", "fslora/full/count", "fslora/full/participants", "hetlora", "fslora")


def floor(seed: int, rounds: int) -> Iterator[Finding]:
    """Train the toy and compare its end with the prediction.

    With one local step from where f^S is least, which has to stay there, and with five steps from
    LoRA's own start, which has to arrive; their steps at one fixed sketch drift a little.
    """
    ends = {}
    for steps in (1, 5):
        verdicts: list[Verdict] = []
        parts, wanted, data = [], [], {}
        for ratios in SETS:
            world = toy(seed, clients=6, steps=steps)
            excess = inverse(world, ratios) - 1
            schedule = ((0.02, rounds), (0.005, rounds), (0.002, rounds // 2))
            if steps == 1:
                factors = minimiser(target_of(seed), world.rank, excess, seed)
                world = starting(world, LoRAWeights(*factors))
                schedule = ((0.004, rounds),)
            values = shrunk(SINGULAR, world.rank, excess)
            predicted = relative_error(values, SINGULAR), participation(values)
            measured = ends[ratios] = settled(world, ratios, "fslora", schedule)
            off = max(
                abs(measured[0] - predicted[0]) / max(0.1 * predicted[0], 0.003),
                abs(measured[1] - predicted[1]) / 0.15,
            )
            verdicts.append("confirmed" if off <= 1 else "refuted" if off > 2 else "undecided")
            wanted.append(f"{predicted[0]:.3g} and {predicted[1]:.3g} at {named(ratios)}")
            parts.append(f"{measured[0]:.3g} and {measured[1]:.3g}")
            data[named(ratios)] = {"predicted": predicted, "measured": measured}
        found = ", ".join(wanted), ", ".join(parts), worst(verdicts)
        yield Finding(FLOOR, f"toy, H = {steps}", *found, data)
    world, method = toy(seed, clients=6), "fslora/full/participants"
    error, rank = settled(world, (1 / 4,), method, schedule)
    quotient = error / ends[(1 / 4,)][0]
    yield Finding(
        NO_FLOOR,
        "toy, H = 5",
        "error 0, rank as the target's",
        f"error {error:.2g}, rank {rank:.3g} ({quotient:.2g} of the sketched error)",
        "confirmed" if quotient < 0.1 else "refuted" if quotient > 0.5 else "undecided",
        {"error": error, "rank": rank, "target_rank": participation(SINGULAR)},
    )


def settled(
    world: World, ratios: Ratios, method: str, schedule: Sequence[tuple[float, int]]
) -> tuple[float, float]:
    """Return the error and the participation rank, means over the schedule's last third.

    Args:
        world: the toy.
        ratios: of its clients.
        method: as ``World.strategy``.
        schedule: step sizes and for how many rounds each.
    """
    errors, ranks = [], []
    until = world.first.round
    for lr, span in schedule:
        strategy = world.strategy(ratios, replace(world.rule, lr=lr), method)
        until += span
        errors, ranks = [], []
        for state, loss in losses(world, strategy, until):
            if state.round > until - span // 3 or isinf(loss):
                errors.append(loss)
                ranks.append(effective_rank([state]))
        world = replace(world, first=state)
    return mean(errors), mean(ranks)


def forwards(worlds: Sequence[World], lr: float, rounds: int) -> Iterator[Finding]:
    """Train each world by both forwards at ratio 1/4, with AdamW."""
    ends: dict[str, list[tuple[float, float]]] = {}
    for method in ("fslora", "fslora/full/participants", "fedit"):
        ends[method] = []
        for world in worlds:
            local = replace(world.rule, lr=lr, optimizer="adamw")
            *_, (state, loss) = losses(world, world.strategy((1 / 4,), local, method), rounds)
            ends[method].append((loss, effective_rank([state])))
    data: dict[str, object] = {"loss and rank": ends, "lr": lr, "rounds": rounds}
    for claim, place, sign in ((RANK, 1, -1), (LOSS, 0, 1)):
        ours, theirs = (
            [end[place] for end in ends[m]] for m in ("fslora", "fslora/full/participants")
        )
        quotient = ratio_of(ours, theirs)
        ordered = sorted([sign * (quotient.low - 1), sign * (quotient.high - 1)])
        yield Finding(
            claim,
            worlds[0].name,
            "below 1" if sign < 0 else "above 1",
            f"{quotient} ({mean(ours):.3g} against {mean(theirs):.3g}; full rank "
            f"{mean([end[place] for end in ends['fedit']]):.3g})",
            "confirmed" if ordered[0] > 0 else "refuted" if ordered[1] < 0 else "undecided",
            data,
        )


def order(
    worlds: Sequence[World],
    ratios: Ratios,
    target: float,
    steps: Sequence[float],
    limit: int,
    optimizer: str = "sgd",
) -> Iterator[Finding]:
    """Count rounds to a target for every method, at its best step size."""

    def counter(method: str, world: World, lr: float, most: int) -> int | None:
        local = replace(world.rule, lr=lr, optimizer=optimizer)
        return rounds_to(world, world.strategy(ratios, local, method), target, most)

    counts: dict[str, list[int]] = {}
    taken: dict[str, list[float | None]] = {}
    for method in METHODS:
        found = [
            best(w, ratios, lambda w, _, lr, most, m=method: counter(m, w, lr, most), steps, limit)
            for w in worlds
        ]
        taken[method] = [each and each[1] for each in found]
        counts[method] = [limit + 1 if each is None else each[0] for each in found]
    means = [exp(mean([log(number) for number in counts[method]])) for method in METHODS]
    right = all(
        low <= high if place == 0 else low < high
        for place, (low, high) in enumerate(pairwise(means))
    )
    reversed_everywhere = any(
        all(a > b for a, b in zip(counts[one], counts[other], strict=True))
        for one, other in pairwise(METHODS)
    )
    yield Finding(
        ORDER,
        worlds[0].name,
        " < ".join(METHODS),
        ", ".join(f"{method} {in_words(counts[method], limit)}" for method in METHODS),
        "confirmed" if right else "refuted" if reversed_everywhere else "undecided",
        {
            "rounds": counts,
            "steps": taken,
            "limit": limit,
            "ratios": named(ratios),
            "target": target,
        },
    )


def in_words(counts: Sequence[int], limit: int) -> str:
    """Say the mean number of rounds, or what one can say where seeds were cut off by the limit."""
    late = sum(number > limit for number in counts)
    if late == len(counts):
        return "never"
    middle = exp(mean([log(number) for number in counts]))
    return f"over {middle:.3g} ({late} of {len(counts)} never)" if late else f"{middle:.3g}"


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)
