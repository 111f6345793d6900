"""From finished runs to what `compare.json` holds: figures, costs, curves, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fslora import checkpoint
from fslora.compare.settings import CompareConfig, Entry
from fslora.compare.statistics import difference, ratio, spread, verdict
from fslora.config import SimulateConfig, Target
from fslora.report.records import is_number, read_object
from fslora.report.units import score_name
from fslora.summary import cost_of

Record = dict[str, Any]

COSTS = ("bytes_up", "bytes_down", "bytes", "adapter_bytes", "head_bytes", "sim_seconds")


def tabulate(
    config: CompareConfig,
    runs: Mapping[tuple[str, int], SimulateConfig],
    failures: Mapping[str, str],
    tried: Sequence[Record],
) -> Record:
    """Sum the runs of one data set up.

    Args:
        config: the comparison.
        runs: the config of each strategy's and seed's run.
        failures: run folder to why it could not come to its end.
        tried: the trials of the search.

    Returns:
        What `compare.json` holds of a data set.

    Raises:
        ValueError: runs of one seed have different splits, or a run is damaged.
    """
    read = {
        key: checkpoint.read_records(Path(run.out))
        for key, run in runs.items()
        if run.out not in failures
    }
    figure = config.figure
    targets = config.run.target_values
    strategies = [
        _strategy(entry, config, runs, read, failures, targets, figure) for entry in config.entries
    ]
    first = strategies[0]
    return {
        "name": config.title,
        "figure": figure,
        "metric_name": score_name(config.run.task, config.run.metric),
        "settings": config.run.to_json(),
        "seeds": list(config.seed_values),
        "splits": check_splits({key: runs[key] for key in read}),
        "search": {"grid": config.grid, "trials": list(tried)} if tried else None,
        "strategies": strategies,
        "pairs": [_pair(first, other, figure) for other in strategies[1:]],
    }


def check_splits(runs: Mapping[tuple[str, int], SimulateConfig]) -> Record:
    """Return each seed's split.

    Raises:
        ValueError: two runs of one seed had different clients or another evaluation, or any two
            another model.
    """
    splits: Record = {}
    owners: dict[str, str] = {}
    models: dict[str, str] = {}
    for (_, seed), run in runs.items():
        # Runs from before it was recorded go unchecked.
        source = checkpoint.read_records(Path(run.out))[0].get("source") or {}
        models |= {source["model"]: run.out} if source.get("model") else {}
        if len(models) > 1:
            raise ValueError(
                f"the runs {' and '.join(models.values())} were not made of the same --model: did "
                "its files change between them? Remove the folders of one and run them again"
            )
        split = read_object(Path(run.out) / "summary.json")["split"]
        if splits.setdefault(str(seed), split) != split:
            raise ValueError(
                f"the runs {owners[str(seed)]} and {run.out} have the same seed but not the same "
                "data: did a file change between them? Remove one of the folders and run it again"
            )
        owners.setdefault(str(seed), run.out)
    return splits


def _strategy(
    entry: Entry,
    config: CompareConfig,
    runs: Mapping[tuple[str, int], SimulateConfig],
    read: Mapping[tuple[str, int], list[Record]],
    failures: Mapping[str, str],
    targets: Sequence[Target],
    figure: str,
) -> Record:
    """All seeds of one strategy."""
    seeds = [
        {
            "seed": seed,
            "folder": runs[entry.label, seed].out,
            "lr": runs[entry.label, seed].lr,
            "server_lr": runs[entry.label, seed].server_lr,
            "failed": failures.get(runs[entry.label, seed].out),
            **(_totals(read[entry.label, seed]) if (entry.label, seed) in read else {}),
        }
        for seed in config.seed_values
    ]
    done = [run for run in seeds if not run["failed"]]
    histories = [read[entry.label, run["seed"]] for run in done]
    return {
        "label": entry.label,
        "options": entry.options,
        "runs": seeds,
        "final": {
            key: spread([run[key] for run in done if is_number(run[key])])
            for key in ("metric", "loss", *COSTS, "wall_seconds")
        },
        "targets": [_target(target, done, histories) for target in targets],
        "curve": _curve(histories, figure),
    }


def _totals(records: Sequence[Record]) -> Record:
    """What a run came to and what it cost."""
    last = records[-1]
    totals = {key: sum(record[key] for record in records) for key in _ways()}
    return {
        "metric": last["eval_metric"],
        "loss": last["eval_loss"],
        **_both_ways(totals),
        "sim_seconds": last.get("sim_seconds_total"),
        "wall_seconds": sum(record["wall_seconds"] for record in records),
    }


def _target(target: Target, runs: Sequence[Record], histories: Sequence[list[Record]]) -> Record:
    """What reaching a target cost in each seed; over the seeds only if all reached it."""
    costs = []
    for run, records in zip(runs, histories, strict=True):
        cost = cost_of(target, records)
        reached = cost["round"] is not None
        paid = _both_ways(cost) if reached else dict.fromkeys(COSTS)
        paid |= {"round": cost["round"], "sim_seconds": cost["sim_seconds"]}
        costs.append({"seed": run["seed"], **paid})
    reached_by = [cost for cost in costs if cost["round"] is not None]
    return {
        **target._asdict(),
        "reached": len(reached_by),
        "seeds": costs,
        **{
            key: spread([cost[key] for cost in reached_by if is_number(cost[key])])
            for key in ("round", *COSTS)
        },
    }


def _curve(histories: Sequence[list[Record]], figure: str) -> list[Record]:
    """The figure and the costs so far, over the seeds, at each evaluated round."""
    if not histories:
        return []
    points: dict[int, list[Record]] = {}
    for records in histories:
        moved = 0
        for record in records:
            moved += record["bytes_up"] + record["bytes_down"]
            value = record[f"eval_{figure}"]
            if is_number(value):
                seconds = record.get("sim_seconds_total")
                point = {"value": value, "bytes": moved, "sim_seconds": seconds}
                points.setdefault(record["round"], []).append(point)
    return [
        {
            "round": number,
            **{
                key: spread([point[key] for point in at if is_number(point[key])])
                for key in ("value", "bytes", "sim_seconds")
            },
        }
        for number, at in sorted(points.items())
        if len(at) == len(histories)
    ]


def _pair(one: Record, other: Record, figure: str) -> Record:
    """One strategy held against another, seed by seed."""
    ones = {run["seed"]: run for run in one["runs"] if not run["failed"]}
    others = {run["seed"]: run for run in other["runs"] if not run["failed"]}
    seeds = [seed for seed in ones if seed in others]
    every = [run["seed"] for run in one["runs"]]
    found = difference([ones[s][figure] for s in seeds], [others[s][figure] for s in seeds])
    said = {"higher": figure == "metric", "lower": figure == "loss"}
    better = said.get(verdict(found, 0))
    return {
        "one": one["label"],
        "other": other["label"],
        "difference": found,
        "winner": None if better is None else (one if better else other)["label"],
        "targets": [
            _pair_target(mine, theirs, every, one["label"], other["label"])
            for mine, theirs in zip(one["targets"], other["targets"], strict=True)
        ],
    }


def _pair_target(
    mine: Record, theirs: Record, seeds: Sequence[int], one: str, other: str
) -> Record:
    """Quotients of the costs of reaching a target, where both reached it in every seed.

    A run that failed did not: the seeds that are left would be the easier ones.
    """
    ours = {cost["seed"]: cost for cost in mine["seeds"]}
    its = {cost["seed"]: cost for cost in theirs["seeds"]}
    result: Record = {"figure": mine["figure"], "value": mine["value"]}
    for key in ("bytes_up", "bytes_down", "bytes", "sim_seconds"):
        known = all(
            seed in costs and is_number(costs[seed][key]) for costs in (ours, its) for seed in seeds
        )
        found = (
            ratio([ours[s][key] for s in seeds], [its[s][key] for s in seeds])
            if known
            else spread([])
        )
        cheaper = {"lower": one, "higher": other}.get(verdict(found, 1))
        result[key] = {**found, "winner": cheaper}
    return result


def _ways() -> tuple[str, ...]:
    parts = ("", "adapter_", "head_")
    return tuple(f"{part}bytes_{way}" for part in parts for way in ("up", "down"))


def _both_ways(paid: Mapping[str, Any]) -> Record:
    """Bytes in each direction, together, and of adapter and head apart."""
    both = {
        f"{part}bytes": paid[f"{part}bytes_up"] + paid[f"{part}bytes_down"]
        for part in ("", "adapter_", "head_")
    }
    return {"bytes_up": paid["bytes_up"], "bytes_down": paid["bytes_down"], **both}
