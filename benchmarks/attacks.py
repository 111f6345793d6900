"""What hostile clients do to a run, and what each robust rule saves of it.

MiniLM's first two layers classify SST-2. Ten clients with even shares of 9,622 sentences train in
every round, two of them hostile (20%), at sketch ratios 1/4, 1/2 and 1, so that a rank is trained
by six of them on average. From a fresh head this model stands at chance for some hundred steps
whoever trains it, so the server first trains alone, with 3,208 other sentences, until it has begun
to learn; every run of a seed begins there. The whole development set is scored after the last
round.

Every run is a line of runs.jsonl as soon as it is done, and is not repeated. The table is of the
runs with the schedule that is asked for.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any, get_args

import torch

from benchmarks.timing import append_record, provenance
from benchmarks.workload import shared_data, shared_model
from fslora import disk, evaluation
from fslora.client import LocalTrainer
from fslora.config import SimulateConfig
from fslora.data.tasks import Evaluation
from fslora.engines import sequential
from fslora.errors import StoppedRunError
from fslora.models import take_state
from fslora.prepare import (
    Run,
    examples_of,
    limits_of,
    make_client,
    make_strategy,
    prepare,
    trusting,
)
from fslora.protocol import ServerState
from fslora.server import rounds
from fslora.trust import Attack, Robust

RESULTS = Path(__file__).parent / "results/attacks"
BAND = 0.03
"""How far below the clean run a defended one may end."""


def main(arguments: Sequence[str]) -> int:
    """Run what is missing; print the table and write it."""
    chosen = _flags().parse_args(arguments)
    model, glue = shared_model("all-MiniLM-L6-v2-fp16"), shared_data() / "glue/SST-2"
    if model is None or not glue.is_dir():
        raise FileNotFoundError(
            f"{shared_data()} has no all-MiniLM-L6-v2-fp16 or no SST-2; point FSLORA_SHARED at the "
            "shared folder"
        )
    torch.set_num_threads(1)
    runs = chosen.out / "runs.jsonl"
    schedule = {name: getattr(chosen, name) for name in SCHEDULE}
    with TemporaryDirectory() as folder:
        deal(glue / "train.tsv.gz", Path(folder))
        for seed in chosen.seeds:
            done = {_cell(line) for line in of_schedule(read(runs), schedule)}
            facts = {"seed": seed, "strength": chosen.strength}
            cells = [
                {**facts, "attack": attack, "rule": rule}
                for attack in chosen.attacks
                for rule in chosen.rules
            ]
            missing = [cell for cell in cells if _cell(cell) not in done]
            if not missing:
                continue
            config = SimulateConfig(
                model=model,
                layers=2,
                data=str(Path(folder) / "clients.tsv"),
                eval_data=str(glue / "dev.tsv.gz"),
                task="classification",
                text_column="sentence",
                clients=10,
                per_round=10,
                rank=16,
                alpha=4,
                target_modules="query,value",
                ratios="1/4,1/2,1",
                rounds=chosen.rounds,
                local_steps=chosen.local_steps,
                batch_size=chosen.batch_size,
                max_length=24,
                lr=chosen.lr,
                threads=1,
                seed=seed,
            )
            start = warm(config, Path(folder) / "public.tsv", chosen.warm_loss)
            run = prepare(config)
            begun = score(run, start)
            print(f"seed {seed}: begins at {begun.metric:.4f}", flush=True)
            for cell in missing:
                changed = replace(config, attack=cell["attack"], robust=cell["rule"])
                if cell["attack"] in STRENGTH:
                    changed = replace(changed, attack_strength=chosen.strength)
                line = {**cell, "begun": begun.metric, **outcome_of(run, changed, start)}
                print(line, flush=True)
                append_record(runs, {**line, **schedule, **provenance()})
    text = table(of_schedule(read(runs), schedule))
    disk.write_atomically(chosen.out / "table.md", text.encode())
    print(text)
    return 0


STRENGTH = ("sign-flip", "scale", "noise")
SCHEDULE = ("rounds", "local_steps", "batch_size", "lr", "warm_loss")


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks attacks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--attacks", nargs="+", choices=get_args(Attack), default=get_args(Attack))
    parser.add_argument("--rules", nargs="+", choices=get_args(Robust), default=get_args(Robust))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--local-steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--warm-loss", type=float, default=0.6, help="until which it trains alone")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--strength", type=float, default=10.0, help="of the attacks that have one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def deal(source: Path, folder: Path) -> None:
    """Write every seventh row for the clients, and other ones for the server."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        head, *rows = file.read().splitlines()
    for name, part in (("clients", rows[::7]), ("public", rows[1::21])):
        (folder / f"{name}.tsv").write_text("\n".join([head, *part]) + "\n", encoding="utf-8")


def warm(config: SimulateConfig, public: Path, loss: float) -> ServerState:
    """Return what the server learns alone at the full rank, twenty steps at a time.

    It stops when the mean loss of twenty steps is below ``loss``.
    """
    alone = replace(
        config,
        data=str(public),
        clients=1,
        per_round=1,
        ratios="1",
        local_steps=20,
        batch_size=16,
        lr=5e-3,
    )
    run = prepare(alone)
    first = run.strategy.init(*take_state(run.model), config.seed)
    trainer = LocalTrainer(run.model, run.task, examples_of(run))
    steps = rounds(first, run.strategy, sequential, trainer, run.data.names, per_round=1, until=30)
    for state, record in steps:  # noqa: B007
        if record.train_loss is not None and record.train_loss < loss:
            break
    return ServerState(0, state.adapters, state.extras, config.seed)


def score(run: Run, state: ServerState) -> Evaluation:
    """Score the whole adapter on the development set."""
    return evaluation.evaluate_mean(run.model, [state], run.task, run.data.evaluation, 64)


def outcome_of(run: Run, config: SimulateConfig, state: ServerState) -> dict[str, Any]:
    """Run one attack under one rule, on the model and data of ``run``, and score its end.

    A run that stops because nothing is usable any more counts as what it had come to.
    """
    began = process_time()
    names = run.data.names
    strategy = trusting(config, make_strategy(config, run.ratio_of_id), len(names))
    run = replace(run, config=config, strategy=strategy)
    trainer = LocalTrainer(run.model, run.task, examples_of(run))
    client, limits = make_client(run, trainer), limits_of(run)
    rejected, stopped = 0, None
    steps = rounds(
        state,
        strategy,
        sequential,
        client,
        names,
        per_round=config.per_round,
        until=config.rounds,
        limits=limits,
    )
    try:
        for reached, record in steps:
            state = reached
            rejected += sum(entry.rejected is not None for entry in record.clients)
    except StoppedRunError as error:
        stopped = str(error)[:200]
    found = score(run, state)
    loss = found.loss if math.isfinite(found.loss) else None
    return {
        "metric": found.metric,
        "loss": loss,
        "rejected": rejected,
        "stopped": stopped,
        "cpu_seconds": round(process_time() - began, 1),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """Read the runs that are done."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_schedule(lines: Sequence[dict[str, Any]], schedule: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs that trained as long and as fast."""
    return [line for line in lines if all(line[name] == schedule[name] for name in SCHEDULE)]


def _cell(line: dict[str, Any]) -> tuple[int, str, float | None, str]:
    return line["seed"], *_attack(line), line["rule"]


def _attack(line: dict[str, Any]) -> tuple[str, float | None]:
    """The attack and its strength, None of one that has none."""
    return line["attack"], line["strength"] if line["attack"] in STRENGTH else None


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the accuracy of every attack and rule, mean over the seeds and each seed's.

    "ok" is within ``BAND`` of the clean run without a rule, seed by seed.
    """
    found = {_cell(line): line["metric"] for line in lines}
    seeds = sorted({line["seed"] for line in lines})
    clean = [found.get((seed, "none", None, "none"), math.inf) for seed in seeds]
    begun = {line["seed"]: f"{line['begun']:.3f}" for line in lines}
    rows = [
        f"The server alone comes to {', '.join(begun[seed] for seed in seeds)} "
        f"(seeds {', '.join(map(str, seeds))}).",
        "",
        "| attack | " + " | ".join(get_args(Robust)) + " |",
        "|---" * (1 + len(get_args(Robust))) + "|",
    ]
    for attack, strength in dict.fromkeys(map(_attack, lines)):
        cells = []
        for rule in get_args(Robust):
            own = [found.get((seed, attack, strength, rule)) for seed in seeds]
            known = [one for one in own if one is not None]
            if len(known) < len(seeds):
                cells.append("–")
                continue
            ok = all(one >= best - BAND for one, best in zip(known, clean, strict=True))
            each = ", ".join(f"{one:.3f}" for one in known)
            cells.append(f"{statistics.mean(known):.3f} ({each}){' ok' if ok else ''}")
        times = "" if strength is None else f" × {strength:g}"
        rows.append(f"| {attack}{times} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"
