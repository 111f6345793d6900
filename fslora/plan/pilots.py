"""Pilot runs: short simulations at uniform ratios and at a mixture, with seeds of their own."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fslora import checkpoint
from fslora.config import SimulateConfig, Target
from fslora.plan.bound import Curve
from fslora.plan.settings import NO_CLOCK, PlanConfig
from fslora.records import RoundRecord
from fslora.simulate import Watcher, checked_folder, simulate
from fslora_kernels.seeds import fold_in


class _ReachedError(Exception):
    """Ends a run that has reached what it was for."""


def pilots_of(config: PlanConfig) -> list[SimulateConfig]:
    """The pilot runs of a plan: no devices, so that one set serves every fleet."""
    run, sizes = config.run, config.pilot_sizes
    folder = Path(config.pilots or Path(run.out) / "pilots").expanduser()
    mixtures = [(size,) for size in sizes] + [(sizes[0], sizes[-1])]
    return [
        replace(
            run,
            **NO_CLOCK,
            targets="",
            eval_every=1,
            eval_sketched=False,
            ratios=",".join(repr(size / run.rank) for size in mixture),
            rounds=config.pilot_rounds or run.rounds,
            seed=fold_in(run.seed, "pilot", number),
            out=str(folder / f"{number}-{'-'.join(map(str, mixture))}"),
            resume=False,
        )
        for number in range(config.pilot_seeds)
        for mixture in mixtures
    ]


def run_to(config: SimulateConfig, target: Target) -> list[dict[str, Any]]:
    """Run or continue a simulation until it reaches a target or its last round.

    Returns:
        Its records, up to the first evaluated round at the target.

    Raises:
        StoppedRunError: it diverged.
        ValueError: the folder holds another run.
    """
    folder = Path(config.out)
    config = checked_folder(replace(config, resume=(folder / "config.json").is_file()))
    begun = (folder / checkpoint.RECORDS_FILE).is_file()
    records = checkpoint.read_records(folder) if begun else []

    def watch(record: RoundRecord) -> None:
        if reached(record.to_json(), target):
            raise _ReachedError

    done = any(reached(record, target) for record in records)
    if not done and len(records) <= config.rounds:
        with suppress(_ReachedError):
            simulate(config, Watcher(on_round=watch))
        records = checkpoint.read_records(folder)
    last = next((n for n, record in enumerate(records) if reached(record, target)), len(records))
    return records[: last + 1]


def reached(record: dict[str, Any], target: Target) -> bool:
    """Whether an evaluation is at the target or beyond.

    Raises:
        ValueError: the target is a score, and there is none.
    """
    value: float | None = record[f"eval_{target.figure}"]
    if value is None:
        raise ValueError(
            f"--targets {target.value:g} is a score, and answers have none here (they have one "
            "where 2 to 32 different ones are held out); name a loss, such as loss:2.5"
        )
    return value <= target.value if target.figure == "loss" else value >= target.value


def curve_of(config: SimulateConfig, target: Target) -> Curve:
    """Run a pilot and return its curve.

    Raises:
        ValueError: there is nothing to learn before the target.
    """
    records = run_to(config, target)
    if reached(records[0], target):
        raise ValueError(
            f"the target {target.value:g} is reached before any training; name a better score "
            "with --targets"
        )
    used = [
        client["ratio"]
        for record in records
        for client in record["clients"]
        if client["rejected"] is None
    ]
    ratios, counts = np.unique(np.array(used), return_counts=True)
    values = [record[f"eval_{target.figure}"] for record in records]
    return Curve(ratios, counts / counts.sum(), np.array(values, dtype=np.float64))
