"""What each of our modes pays for the score that a rival ends with, beside what the rival paid."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fslora import checkpoint
from fslora.compare.statistics import ratio
from fslora.config import Target
from fslora.data.rows import read_rows
from fslora.report.comparison_tables import ABSENT, Table
from fslora.summary import cost_of

Record = dict[str, Any]

RIVALS = ("hetlora", "flexlora", "flora")
LEAST_SAVED, LEAST_FASTER = 0.32, 1.8
MOST_SAVED, MOST_FASTER = 0.57, 3.4

_NOTE = (
    "In each seed the target is the score that the rival ended with; both are charged until an "
    "evaluation first reached it. Bytes are of both directions; means are geometric, in brackets "
    "the 95% interval over the seeds. The claim to be tested is 32 to 57% fewer bytes and 1.8 to "
    "3.4 times less simulated time at the same score."
)
_OF_GUESSES = (
    " A rival guesses where it ends no better than the share of the larger class: its score is "
    "then reached by chance."
)


def claims_table(data: Record) -> Table:
    """One row for each rival and each mode of ours that has finished.

    Args:
        data: a data set of ``compare.json``.
    """
    read = {each["label"]: _histories(each) for each in data["strategies"]}
    ours = [label for label in read if label.split(":")[0] == "fslora"]
    rivals = [label for label in read if label.split(":")[0] in RIVALS]
    guess = guessed_accuracy(data)
    lost = {e["label"]: [r["seed"] for r in e["runs"] if r["failed"]] for e in data["strategies"]}
    rows = [
        [rival, mode, *_row(data["figure"], read[mode], read[rival], lost[mode], guess)]
        for rival in rivals
        for mode in ours
    ]
    heads = ["rival", "our mode", "reached", "bytes saved", "times faster", "the claim"]
    note = _NOTE if math.isinf(guess) else _NOTE + _OF_GUESSES
    return Table(f"To the score of each rival: {data['name']}", note, heads, rows)


def guessed_accuracy(data: Record) -> float:
    """Return the larger class's share of the evaluation; -inf where no accuracy is compared."""
    if data["metric_name"] != "accuracy" or data["figure"] != "metric":
        return -math.inf
    settings = data["settings"]
    rows = read_rows(settings["eval_data"], reader=settings["reader"], header=settings["header"])
    classes = Counter(row[settings["label_column"]] for row in rows)
    return max(classes.values()) / classes.total()


def _histories(strategy: Record) -> dict[int, list[Record]]:
    return {
        run["seed"]: checkpoint.read_records(Path(run["folder"]))
        for run in strategy["runs"]
        if not run["failed"]
    }


def _row(
    figure: str,
    ours: Mapping[int, Sequence[Record]],
    theirs: Mapping[int, Sequence[Record]],
    failed: Sequence[int],
    guess: float,
) -> list[str]:
    """Reached, saved, faster, verdict."""
    seeds = [seed for seed in ours if seed in theirs]
    targets = {seed: Target(figure, theirs[seed][-1][f"eval_{figure}"]) for seed in seeds}
    costs = [
        (cost_of(target, ours[seed]), cost_of(target, theirs[seed]))
        for seed, target in targets.items()
    ]
    guessing = sum(target.value <= guess for target in targets.values())
    reached = [pair for pair in costs if pair[0]["round"] is not None]
    asked = len(seeds) + len([seed for seed in failed if seed in theirs])  # a failed run did not
    row = [f"{len(reached)} of {asked}"]
    if not seeds or len(reached) < asked:
        return [*row, ABSENT, ABSENT, "no: not reached"]
    found = {
        "bytes": ratio(*_columns(costs, lambda cost: cost["bytes_up"] + cost["bytes_down"])),
        "time": ratio(*_columns(costs, lambda cost: cost["sim_seconds"])),
    }
    if any(each["mean"] is None for each in found.values()):  # the rival paid nothing
        return [*row, ABSENT, ABSENT, "no: the rival ended where it began"]
    saved, faster = 1 - float(found["bytes"]["mean"] or 1), 1 / float(found["time"]["mean"] or 1)
    return [
        *row,
        f"{saved:.0%} {_interval(found['bytes'], lambda value: f'{1 - value:.0%}')}",
        f"{faster:.2f} {_interval(found['time'], lambda value: f'{1 / value:.2f}')}",
        _qualified(verdict(saved, faster), guessing, len(seeds)),
    ]


def _qualified(said: str, guessing: int, seeds: int) -> str:
    if not guessing or said == "no":
        return said
    if guessing == seeds:
        return "no: the rival only guesses"
    return f"{said}, but the rival only guesses in {guessing} of {seeds} seeds"


def verdict(saved: float, faster: float) -> str:
    """Say how much of the claim holds.

    Args:
        saved: the share of bytes saved.
        faster: the rival's simulated time over ours.
    """
    if saved >= MOST_SAVED and faster >= MOST_FASTER:
        return "more than it"
    parts = {"bytes": saved >= LEAST_SAVED, "time": faster >= LEAST_FASTER}
    if all(parts.values()):
        return "yes"
    held = [part for part, holds in parts.items() if holds]
    return f"{held[0]} only" if held else "no"


def _columns(costs: Sequence[tuple[Record, Record]], of: Any) -> tuple[list[float], list[float]]:  # noqa: ANN401
    return [of(one) for one, _ in costs], [of(other) for _, other in costs]


def _interval(found: Mapping[str, Any], form: Any) -> str:  # noqa: ANN401
    if found["low"] is None:
        return ""
    return f"[{form(found['high'])}, {form(found['low'])}]"
