"""``python -m benchmarks theory``: every prediction of docs/math.md, with a verdict and a picture.

The rule of each verdict is printed before anything is run. The toy is quadratic, in float64; the
real models are stories260K on Shakespeare's speakers, two layers of MiniLM on SST-2 (P1, P2, P4)
and all of it on AG News (P3, P5, P6), each through the simulator's own rounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import process_time

import torch

from benchmarks.theory import floor, models, moments, rounds, steps
from benchmarks.theory.effort import FULL, QUICK, Effort
from benchmarks.theory.pictures import draw
from benchmarks.theory.toy import toy
from benchmarks.theory.verdicts import Claim, Finding
from benchmarks.theory.worlds import World
from benchmarks.timing import append_record, provenance

CLAIMS: tuple[Claim, ...] = (*moments.CLAIMS, *steps.CLAIMS, *rounds.CLAIMS, *floor.CLAIMS)
MODELS = {"stories": models.STORIES, "minilm": models.MINILM, "agnews": models.TOPICS}
PARTS = ("P1", "P2", "P3", "P4", "P5", "P6")


def on_toy(effort: Effort, parts: Sequence[str]) -> Iterator[Finding]:
    """Run the toy's experiments."""
    if "P1" in parts:
        yield from moments.sampling(effort.draws)
        world = toy(0)
        state = moments.trained(world, 10, 0.05)
        yield from moments.gradient(world, state, effort.gradients)
    if "P2" in parts:
        worlds = [toy(seed) for seed in range(effort.seeds)]
        yield from steps.stable_steps(worlds, 2**-10, 4, effort.halvings, effort.toy_rounds // 6)
    if "P3" in parts:
        seeds = range(effort.seeds)
        yield from rounds.noise_level(seeds, 0.5, 0.002, effort.toy_rounds)
        worlds = [toy(seed, clients=6, steps=2, noise=0.5, spread=0.0) for seed in seeds]
        yield from rounds.against_ratios(
            worlds, rounds.to_loss(0.35), _grid(0.32, effort.toy_steps), effort.toy_rounds * 2
        )
    if "P4" in parts:
        world = toy(0)
        state = moments.trained(world, 10, 0.02)
        yield from moments.averages(world, state, (1, 2, 4, 8), effort.gradients, 0.02)
        grid = ((2, 2), (4, 2), (8, 2), (2, 5), (4, 5), (8, 5))
        yield from rounds.speedup(
            range(effort.seeds),
            grid,
            0.5,
            0.35,
            _grid(0.16, effort.toy_steps),
            effort.toy_rounds * 3,
        )
    if "P5" in parts:
        yield from floor.floor(0, effort.toy_rounds * 2)
    if "P6" in parts:
        worlds = [toy(seed, steps=2) for seed in range(effort.seeds)]
        yield from floor.order(
            worlds, (1 / 8, 1 / 4, 1 / 2, 1.0), 0.02, _grid(0.32, 3, 2.0), effort.toy_rounds // 3
        )


def on_model(name: str, effort: Effort, parts: Sequence[str]) -> Iterator[Finding]:
    """Run the experiments that a model is for."""
    worlds = [
        models.model_world(name, seed)
        for seed in range(2 if name == models.MINILM else effort.seeds)
    ]
    if name != models.TOPICS:
        yield from at_one_point(worlds, effort, parts)
    if "P5" in parts and name != models.MINILM:
        yield from floor.forwards(worlds, 1e-2, effort.model_rounds)
    races = models.RACES.get(name, ())
    if "P3" in parts:
        for race in races:
            count = rounds.to_loss(race.target, race.optimizer)
            setting = f"{name}, {race.optimizer}"
            yield from rounds.against_ratios(worlds, count, race.steps, race.limit, setting)
    if "P6" in parts:
        for race in races[:1]:
            yield from floor.order(
                worlds, rounds.MIX, race.target, race.steps, race.limit, race.optimizer
            )


def at_one_point(
    worlds: Sequence[World], effort: Effort, parts: Sequence[str]
) -> Iterator[Finding]:
    """Run a model's P1, P2 and P4."""
    if "P1" in parts or "P4" in parts:  # by AdamW: SGD hardly moves MiniLM's B at first
        state = moments.trained(worlds[0], 4, 3e-3, "adamw")
    if "P1" in parts:
        yield from moments.gradient(worlds[0], state, effort.gradients // 5)
    if "P4" in parts:
        counts = (1, 2, 3, 4, 6)
        yield from moments.averages(worlds[0], state, counts, effort.updates, 0.05)
    if "P2" in parts:
        yield from steps.stable_steps(
            worlds[:2], 2**-9, 8, effort.halvings, effort.model_rounds // 6
        )


def _grid(top: float, count: int, factor: float = 1.6) -> list[float]:
    return [top / factor**place for place in range(count)]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks theory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="the toy alone, fewer seeds")
    parser.add_argument("--only", default=",".join(PARTS), help="such as P1,P4")
    parser.add_argument("--settings", help=f"of toy,{','.join(MODELS)}; default: all")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/theory"), help="folder; findings are added to it"
    )
    chosen = parser.parse_args(arguments)
    every = ["toy"] if chosen.quick else ["toy", *MODELS]
    parts, wanted = chosen.only.split(","), (chosen.settings or ",".join(every)).split(",")
    if unknown := {*parts} - {*PARTS} | {*wanted} - {"toy", *MODELS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if others := {*wanted} - {*every}:
        parser.error(f"--quick is of the toy alone, not of {', '.join(sorted(others))}")
    if {*wanted} - {"toy"}:
        models.shared_folder()
    torch.set_num_threads(1)
    effort = QUICK if chosen.quick else FULL
    runs = [on_toy(effort, parts)] if "toy" in wanted else []
    runs += [on_model(name, effort, parts) for word, name in MODELS.items() if word in wanted]
    return report(runs, parts, chosen.out, effort)


def report(
    runs: Sequence[Iterator[Finding]], parts: Sequence[str], out: Path, effort: Effort
) -> int:
    """Print rules, then findings as they come; keep them and draw them."""
    print("the rules, before the data\n")
    for claim in CLAIMS:
        if claim.name[:2] in parts:
            print(f"  {claim.name:<4} {claim.text}\n       {claim.rule}")
    print()
    record, file = (
        {"benchmark": "theory", **provenance("cpu"), **effort.to_json()},
        out / "findings.jsonl",
    )
    start, count = process_time(), 0
    for run in runs:
        for finding in run:
            print(f"{finding.claim.name} on {finding.setting}: {finding.verdict.upper()}")
            print(f"  predicted {finding.predicted}\n  measured  {finding.measured}", flush=True)
            seconds = process_time() - start
            append_record(file, {**record, "cpu_seconds": seconds, **finding.to_json()})
            count += 1
    if not count:
        raise ValueError(f"these settings have no experiment for {', '.join(parts)}")
    for path in draw(read(file), out):
        print(f"drawn: {path}")
    return 0


def read(file: Path) -> list[Finding]:
    """Read the latest finding of each claim and setting."""
    latest = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        claim = Claim(**found["claim"])
        words = (found[key] for key in ("setting", "predicted", "measured", "verdict", "data"))
        finding = Finding(claim, *words)
        latest[claim.name, finding.setting] = finding
    return list(latest.values())
