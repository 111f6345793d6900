"""Ten thousand clients: what a round costs beside the local steps, and how that grows.

Every cell is one real run in a process of its own: data for all clients, a hundred of them a
round, one local step each, checkpoint and record after every round. The clock is CPU time in one
thread, split by what asked for it; all that is neither a local step, nor tokenising a client's
rows the first time, nor evaluating, is orchestration. Two figures put it into proportion: the same
less the optimizer and the first batch of a client, which any training loop makes; and a naive loop
over randperm, gather, clone, subtract and index_add, with the same local steps in between, because
what runs between local steps finds cold caches, and takes several times as long as alone.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import fslora_kernels
from benchmarks.timing import append_record, provenance
from fslora import checkpoint, client, evaluation, prepare, ranks, simulate
from fslora.config import SimulateConfig
from fslora.data.causal_lm import CausalLM
from fslora.errors import StoppedRunError
from fslora.models import take_state
from fslora.protocol import LoRAWeights
from fslora.records import RoundRecord
from fslora_kernels.nn.peft import slots

Cell = dict[str, Any]

BASE: Cell = {"clients": 10_000, "per_round": 100, "rank": 16, "layers": 2, "rounds": 4}
GROWTH: dict[str, list[int]] = {
    "clients": [100, 1_000, 10_000],
    "per_round": [25, 50, 100],
    "rank": [4, 16, 64],
    "layers": [1, 2, 3],
    "rounds": [4, 40],
}
ORCHESTRATION, STEPS, TOKENS, EVALUATION = (
    "orchestration",
    "local steps",
    "tokenising",
    "evaluation",
)
LOOP = "optimizer and first batch"  # of orchestration
NAIVE = "naive loop"
START, MODEL = "start", "loading the model"
OTHER = (STEPS, TOKENS, EVALUATION)
WARM_UP = 1  # rounds in which torch and the caches warm up


@dataclass
class Clock:
    """CPU seconds by what asked for them.

    Attributes:
        spent: part to seconds, since it was last emptied.
        first_loss: when a client's first loss was asked for, None before.
    """

    spent: dict[str, float] = field(default_factory=dict)
    first_loss: float | None = None

    def add(self, part: str, seconds: float) -> None:
        """Note seconds."""
        self.spent[part] = self.spent.get(part, 0.0) + seconds

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time is noted."""

        def call(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
            start = process_time()
            try:
                return function(*arguments, **named)
            finally:
                self.add(part, process_time() - start)

        return call

    def batches(self, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Return ``client._batches`` with the time of each client's first batch noted."""

        def call(*arguments: Any) -> Iterator[Any]:  # noqa: ANN401
            start = process_time()
            found = function(*arguments)
            first = next(found)
            self.add(LOOP, process_time() - start)
            yield first
            yield from found

        return call

    def loss(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a task's loss that notes when a client is first asked for it."""

        def call(*arguments: Any) -> Tensor:  # noqa: ANN401
            if self.first_loss is None:
                self.first_loss = process_time()
            return function(*arguments)

        return call

    def steps(self, train: Callable[..., float]) -> Callable[..., float]:
        """Return ``LocalTrainer._train`` with the time from its first loss on noted."""

        def call(*arguments: Any) -> float:  # noqa: ANN401
            self.first_loss = None
            loss = train(*arguments)
            self.add(STEPS, process_time() - (self.first_loss or process_time()))
            return loss

        return call


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Note where the time of everything within goes."""
    parts = [
        *(
            (evaluation, f"evaluate_{kind}", EVALUATION)
            for kind in ("mean", "sketched", "by_ratio")
        ),
        (evaluation, "effective_rank", "effective rank"),
        (checkpoint, "save_state", "checkpoint and record"),
        (checkpoint, "append_record", "checkpoint and record"),
        (prepare, "load_model", MODEL),
        (prepare, "load_tokenizer", MODEL),
        (prepare, "prepare", START),
        (CausalLM, "encode", TOKENS),
        (ranks, "_optimizer", LOOP),
    ]
    with ExitStack() as stack:
        for owner, name, part in parts:
            stack.enter_context(patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        stack.enter_context(patch.object(CausalLM, "loss", clock.loss(CausalLM.loss)))
        stack.enter_context(patch.object(client, "_batches", clock.batches(client._batches)))
        steps = clock.steps(client.LocalTrainer._train)
        stack.enter_context(patch.object(client.LocalTrainer, "_train", steps))
        yield


def write_texts(path: Path, clients: int) -> None:
    """Write two short texts for each client, of few different words."""
    draw = random.Random(0)
    words = ["returns", "the", "value", "that", "its", "argument", "names", "or", "raises"]
    with path.open("w") as file:
        for number in range(2 * clients):
            text = " ".join(draw.choices(words, k=12))
            file.write(json.dumps({"client": f"client {number % clients}", "text": text}) + "\n")


def measure(cell: Cell, folder: Path) -> Cell:
    """Run one cell in this process.

    Returns:
        "start_s" beyond loading the model, "rss_mb" at most, "modules", and "rounds": the CPU
        seconds of each round by part, "orchestration" being what is in none of the others, and of
        a naive round after it.
    """
    torch.set_num_threads(1)
    data = folder / "texts.jsonl"
    write_texts(data, cell["clients"])
    config = SimulateConfig(
        model=cell.get("model", "docs-base"),
        data=str(data),
        partition="natural:client",
        clients=cell["clients"],
        per_round=cell["per_round"],
        rank=cell["rank"],
        alpha=16.0,
        layers=cell["layers"],
        rounds=cell["rounds"] + 1,
        local_steps=1,
        batch_size=1,
        max_length=16,
        eval_every=cell["rounds"] + 1,
        eval_examples=8,
        strategy=cell.get("strategy", "fslora"),
        device="cpu",
        threads=1,
        out=str(folder / "run"),
    )
    clock, runs, rounds, last = Clock(), [], [], 0.0
    start_s = 0.0

    def kept(config: SimulateConfig) -> prepare.Run:
        runs.append(prepare.prepare(config))
        return runs[0]

    def on_start(*_: int) -> None:
        nonlocal start_s, last
        start_s = clock.spent[START] - clock.spent[MODEL]
        clock.spent.clear()
        last = process_time()

    def on_round(record: RoundRecord) -> None:
        nonlocal last
        now = process_time()
        parts = {ORCHESTRATION: now - last - sum(clock.spent.get(part, 0.0) for part in OTHER)}
        parts |= clock.spent
        if record.round <= cell["rounds"]:  # the round after them is evaluated
            rounds.append({**parts, NAIVE: naive(runs[0], [one.id for one in record.clients])})
        clock.spent.clear()
        last = process_time()

    with watched(clock), patch.object(simulate, "prepare", kept):
        summary = simulate.simulate(config, simulate.Watcher(on_start, on_round=on_round))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "cell": cell,
        "start_s": start_s,
        "rss_mb": peak,
        "modules": summary["modules"],
        "rounds": rounds,
    }


def naive(run: prepare.Run, cohort: Sequence[str]) -> float:
    """Measure the least that a loop can do beside the same local steps, in CPU seconds.

    Each client draws its ranks, gathers them twice, trains one copy, subtracts, adds to a sum.
    Nothing is checked, recorded or kept.
    """
    model, examples = run.model.train(), prepare.examples_of(run)
    adapters, _ = take_state(model)
    total = {n: LoRAWeights(*map(torch.zeros_like, pair)) for n, pair in adapters.items()}
    layers, ratio_of, spent = slots(model), run.ratio_of_id, 0.0
    for name in cohort:
        own, size = examples[name], round(run.config.rank * ratio_of[name])
        start = process_time()
        drawn = {n: torch.randperm(pair.rank)[:size] for n, pair in adapters.items()}
        sent = {n: LoRAWeights(*(t[drawn[n]] for t in pair)) for n, pair in adapters.items()}
        leaves = {
            n: LoRAWeights(*(t.clone().requires_grad_() for t in pair)) for n, pair in sent.items()
        }
        spent += process_time() - start
        fslora_kernels.bind(layers, leaves)
        factors = [factor for pair in leaves.values() for factor in pair]
        optimizer = torch.optim.AdamW(factors, lr=run.config.lr, fused=True)
        run.task.loss(model, own.take(torch.randperm(len(own))[:1])).backward()
        optimizer.step()
        start = process_time()
        for n, pair in leaves.items():
            for rows, new, old in zip(total[n], pair, sent[n], strict=True):
                rows.index_add_(0, drawn[n], new.detach() - old)
        spent += process_time() - start
    fslora_kernels.unbind(layers)
    return spent


def apart(cell: Cell) -> Cell:
    """Measure a cell in a process of its own, whose memory is nobody else's.

    Raises:
        StoppedRunError: it failed.
    """
    command = [sys.executable, "-m", "benchmarks", "scale", "--cell", json.dumps(cell)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise StoppedRunError(f"the cell's process ended with code {done.returncode}; see above")
    found: Cell = json.loads(done.stdout.splitlines()[-1])
    return found


def median_of(found: Cell, part: str, rounds: slice = slice(WARM_UP, None)) -> float:
    """The median seconds of a part over a cell's rounds."""
    return statistics.median(one.get(part, 0.0) for one in found["rounds"][rounds])


def unit_ms(found: Cell, seconds: float) -> float:
    """Seconds of a round as milliseconds for each client, round and adapted module."""
    return 1e3 * seconds / (found["cell"]["per_round"] * found["modules"])


def line(found: Cell) -> str:
    """A cell as a row of the table."""
    cell, all_of_it = found["cell"], median_of(found, ORCHESTRATION)
    names = "  ".join(f"{cell[name]:>9}" for name in BASE if name != "layers")
    seconds = (all_of_it, all_of_it - median_of(found, LOOP), median_of(found, NAIVE))
    units = "  ".join(f"{unit_ms(found, each):>9.4f}" for each in seconds)
    return (
        f"{names}  {found['modules']:>7}  {units}  {1e3 * all_of_it:>8.0f}  "
        f"{1e3 * median_of(found, STEPS):>8.0f}  {found['rss_mb']:>7.0f}  {found['start_s']:>7.2f}"
    )


def parts_of(found: Cell) -> Iterator[str]:
    """Where a round's time goes, a line for each part."""
    names = dict.fromkeys(name for one in found["rounds"] for name in one if name != NAIVE)
    total = sum(median_of(found, name) for name in (ORCHESTRATION, *OTHER))
    for name in names:
        seconds = median_of(found, name)
        inside = "" if name in (ORCHESTRATION, *OTHER) else "  of it: "
        yield f"  {1e3 * seconds:9.1f} ms  {seconds / total:6.1%}  {inside}{name}"


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale", description=__doc__)
    parser.add_argument("--only", choices=sorted(GROWTH), help="grow this and nothing else")
    parser.add_argument("--model", default="docs-base", help="a causal language model")
    parser.add_argument("--strategy", default="fslora")
    parser.add_argument("--out", type=Path, help="append the results to this JSONL file")
    parser.add_argument("--cell", type=json.loads, help="measure this one alone: print its JSON")
    parser.add_argument("--profile", action="store_true", help="the base cell, by function")
    chosen = parser.parse_args(arguments)
    base = {**BASE, "model": chosen.model, "strategy": chosen.strategy}
    with tempfile.TemporaryDirectory() as folder:
        if chosen.cell:
            print(json.dumps(measure({**base, **chosen.cell}, Path(folder))))
            return 0
        if chosen.profile:
            profiler = cProfile.Profile(process_time)
            profiler.runcall(measure, base, Path(folder))
            pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(30)
            return 0
    print("one thread, CPU time, medians; ms for each client, round and module: orchestration, the")
    print("same less optimizer and first batch, and a naive loop between the same local steps")
    heads = [*(f"{name:>9}" for name in BASE if name != "layers"), "modules"]
    print(
        "  ".join(
            [
                *heads,
                "       ms",
                "     less",
                "    naive",
                "ms/round",
                "   steps",
                " RSS MB",
                "start s",
            ]
        )
    )
    for name, values in GROWTH.items():
        if chosen.only in (None, name):
            for value in values:
                found = apart({**base, name: value})
                print(line(found), flush=True)
                if chosen.out:
                    append_record(chosen.out, {"benchmark": "scale", **provenance("cpu"), **found})
            print("\n".join(parts_of(found)))
    return 0
