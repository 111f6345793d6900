"""The equal search: every strategy tries the same settings, and is never judged by test rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fslora import checkpoint
from fslora.compare.runs import run_all
from fslora.compare.settings import CompareConfig, Entry
from fslora.config import SimulateConfig

Record = dict[str, Any]


def trials_of(config: CompareConfig) -> list[tuple[Entry, int, Record, SimulateConfig]]:
    """Every trial as (strategy, seed, settings tried, run); none without a search."""
    seeds = sorted({config.search_seed(seed) for seed in config.seed_values})
    return [
        (entry, seed, values, config.of_trial(entry, seed, values))
        for entry in config.entries
        for seed in seeds
        for values in config.trials
        if values
    ]


def search(config: CompareConfig, on_round: Callable[[], None] = lambda: None) -> list[Record]:
    """Try the grid for every strategy and mark the best of each.

    The best has the highest metric (classification) or the lowest loss on the validation rows
    after the last round; in a tie the lowest loss, then the smallest values.

    Returns:
        A record for each trial: `label`, `seed`, `values`, `metric`, `loss`, `failed` (why it has
        none) and `chosen`.

    Raises:
        ValueError: no trial of a strategy came to its end.
    """
    trials = trials_of(config)
    failures = run_all([run for *_, run in trials], config.jobs, on_round)
    records = []
    for entry, seed, values, run in trials:
        reason = failures.get(run.out)
        last = {} if reason else checkpoint.read_records(Path(run.out))[-1]
        records.append(
            {
                "label": entry.label,
                "seed": seed,
                "values": values,
                "metric": last.get("eval_metric"),
                "loss": last.get("eval_loss"),
                "failed": reason,
                "chosen": False,
            }
        )
    for label, of_seed in dict.fromkeys((record["label"], record["seed"]) for record in records):
        both = [r for r in records if r["label"] == label and r["seed"] == of_seed]
        own = [record for record in both if not record["failed"]]
        if not own:
            raise ValueError(
                f"no setting of --search {config.search!r} works for {label}: every trial lost all "
                "its clients' work; search lower values"
            )
        min(own, key=lambda record: _rank(record, config.figure))["chosen"] = True
    return records


def found_for(records: list[Record], label: str, seed: int) -> Record:
    """The settings that the search chose for a strategy; nothing without a search."""
    for record in records:
        if record["chosen"] and record["label"] == label and record["seed"] == seed:
            return dict(record["values"])
    return {}


def _rank(record: Record, figure: str) -> tuple[float, float, tuple[Any, ...]]:
    metric = record["metric"] if figure == "metric" else None
    return (-(metric or 0.0), record["loss"], tuple(record["values"].values()))
