"""A simulated round against what a PEFT user would write: a loop over the clients.

Both sides do the same local steps on the same batches from the same factors, at the same ranks, one
client after another, with AdamW as torch ships it on the loop's side. Our side is one whole
``run_round``: it draws sketches, gathers, trains, validates, aggregates and keeps the record. The
loop's side is only the training: its models are built beforehand, one for each rank, its batches
lie ready, and nobody aggregates. The clock is CPU time, in one thread, and the two sides take turns
client by client, so that a neighbour's load hits both.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import process_time
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from benchmarks.flags import at_least
from benchmarks.timing import Pairs, append_record, provenance, summary_ms
from benchmarks.workload import bare, default_model, with_adapter
from fslora.client import LocalTrainer
from fslora.config import SimulateConfig
from fslora.data.tasks import Batch, Examples, Task
from fslora.engines import sequential
from fslora.models import take_state
from fslora.prepare import Run, prepare
from fslora.protocol import ClientFn, ClientTask, ClientUpdate, LoRAWeights, ServerState
from fslora.records import RoundRecord
from fslora.server import run_round
from fslora_kernels.seeds import fold_in

TOLERANCE = 1e-4  # of a client's mean loss: the same arithmetic, in another order


@dataclass(frozen=True, slots=True)
class Observed(Task):
    """A task that notes what is asked of it.

    Attributes:
        task: does the work.
        batches: every batch, in order.
        started: CPU seconds when a loss was asked for.
    """

    task: Task
    batches: list[Batch] = field(default_factory=list)
    started: list[float] = field(default_factory=list)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task's loss."""
        self.started.append(process_time())
        self.batches.append(batch)
        return self.task.loss(model, batch)


@dataclass(frozen=True, slots=True)
class Simulator:
    """Our side: a prepared run and the state that every round starts from.

    Attributes:
        run: model, data, strategy.
        state: its B is random, so that a wrong scale or sketch changes the loss from step one.
    """

    run: Run
    state: ServerState

    @property
    def data(self) -> dict[str, Examples]:
        """Client to examples."""
        return dict(zip(self.run.data.names, list(self.run.data.clients), strict=True))

    def trainer(self, task: Task | None = None) -> LocalTrainer:
        """What clients do; the task is the run's own, or one that watches it."""
        return LocalTrainer(self.run.model, task or self.run.task, self.data)

    def round(self, client: ClientFn) -> RoundRecord:
        """Run one round with the whole registry as its cohort."""
        names = self.run.data.names
        return run_round(self.state, self.run.strategy, sequential, client, names)[1]

    def tasks(self) -> list[ClientTask]:
        """What the round's clients are asked: the factors that the loop starts from too."""
        return self.run.strategy.assign(self.state, self.run.data.names)


@dataclass(frozen=True, slots=True)
class PlainLoop:
    """The other side: vanilla PEFT models, one for each rank, trained client by client.

    Attributes:
        models: rank to model.
        tasks: in order.
        batches: client to its batches.
    """

    models: dict[int, PeftModel]
    tasks: list[ClientTask]
    batches: dict[str, list[Batch]]

    def round(self) -> dict[str, float]:
        """Train every client; return the mean losses."""
        return {task.client_id: self.client(task) for task in self.tasks}

    def client(self, task: ClientTask) -> float:
        """Train one client; return its mean loss."""
        model = self.models[next(iter(task.sketches.values())).size]
        _reset(model, task)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=task.local.lr
        )
        total = torch.zeros(())
        torch.manual_seed(task.key)  # the base model's own dropout, as on our side
        for batch in self.batches[task.client_id]:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return float(total) / len(self.batches[task.client_id])


@torch.no_grad()
def _reset(model: PeftModel, task: ClientTask) -> None:
    """Give the model the client's factors and head."""
    parameters = dict(model.named_parameters())
    for name, tensor in task.extras.items():
        parameters[name].copy_(tensor)
    for name, pair in task.adapters.items():
        layer = model.get_submodule(name)
        layer.lora_A["default"].weight.copy_(pair.lora_a)
        layer.lora_B["default"].weight.copy_(pair.lora_b.t())


def make_simulator(config: SimulateConfig) -> Simulator:
    """Prepare our side."""
    run = prepare(config)
    adapters, extras = take_state(run.model)
    generator = torch.Generator().manual_seed(fold_in(config.seed, "trained-looking B"))
    adapters = {
        name: replace_b(pair, torch.randn(pair.lora_b.shape, generator=generator) * 0.02)
        for name, pair in adapters.items()
    }
    return Simulator(run, run.strategy.init(adapters, extras, config.seed))


def replace_b(pair: LoRAWeights, lora_b: Tensor) -> LoRAWeights:
    """Return the pair with another B."""
    return LoRAWeights(pair.lora_a, lora_b)


def make_loop(simulator: Simulator) -> tuple[PlainLoop, float]:
    """Prepare the other side and check that both compute the same.

    Returns:
        The loop, and the largest relative deviation of a client's mean loss.

    Raises:
        ValueError: the losses differ; no time may be compared.
    """
    config = simulator.run.config
    observed = {name: Observed(simulator.run.task) for name in simulator.data}

    def client(task: ClientTask) -> ClientUpdate:
        return simulator.trainer(observed[task.client_id])(task)

    record = simulator.round(client)
    tasks = simulator.tasks()
    # The sketched scale (alpha / R) (R / S) is that of a plain adapter of rank S.
    classes = simulator.run.model.config.num_labels if config.task == "classification" else 0
    models = {
        size: with_adapter(
            bare(config.model, classes=classes), size, alpha=config.alpha, classes=classes
        )
        for size in {next(iter(task.sketches.values())).size for task in tasks}
    }
    loop = PlainLoop(models, tasks, {name: seen.batches for name, seen in observed.items()})
    theirs = loop.round()
    deviation = max(
        abs((entry.loss or 0.0) / theirs[entry.id] - 1.0) if entry.rejected is None else 1.0
        for entry in record.clients
    )
    if not deviation <= TOLERANCE:
        raise ValueError(
            f"a client's mean loss differs by {deviation:.1e} between the round and the plain "
            f"loop (allowed {TOLERANCE:.0e}): they do not compute the same, so no time is printed"
        )
    return loop, deviation


def take_turns(simulator: Simulator, loop: PlainLoop, repeats: int) -> Pairs:
    """Time whole rounds of both sides, which take turns client by client.

    Returns:
        CPU seconds of each round of ours (all of it, also what the server does) and of the loop.
    """
    pairs = Pairs([], [])
    trainer = simulator.trainer()
    for number in range(repeats):
        peer_s = 0.0

        def client(task: ClientTask, number: int = number) -> ClientUpdate:
            nonlocal peer_s
            update = trainer(task) if number % 2 else None
            start = process_time()
            loop.client(task)
            peer_s += process_time() - start
            return update or trainer(task)

        start = process_time()
        simulator.round(client)
        pairs.ours_s.append(process_time() - start - peer_s)
        pairs.peer_s.append(peer_s)
    return pairs


def where_time_goes(simulator: Simulator) -> dict[str, float]:
    """Split the CPU seconds of one round into the server's work, set-up, and local steps."""
    seen = Observed(simulator.run.task)
    asked: list[float] = []
    answered: list[float] = []
    trainer = simulator.trainer(seen)

    def client(task: ClientTask) -> ClientUpdate:
        asked.append(process_time())
        update = trainer(task)
        answered.append(process_time())
        return update

    start = process_time()
    simulator.round(client)
    total = process_time() - start
    firsts = seen.started[:: len(seen.started) // len(asked)]
    clients = sum(answered) - sum(asked)
    set_up = sum(firsts) - sum(asked)
    return {
        "server: sketches, gathering, validation, aggregation, record": total - clients,
        "clients: copying factors in, binding them": set_up,
        "clients: local steps, and taking the change out": clients - set_up,
    }


def profile(simulator: Simulator, lines: int = 25) -> None:
    """Print where our round's own time goes, first plainly, then by function."""
    parts = where_time_goes(simulator)
    total = sum(parts.values())
    print("\nwhere our round's CPU time goes")
    for name, seconds in parts.items():
        print(f"  {1e3 * seconds:9.1f} ms  {seconds / total:6.1%}  {name}")
    print("\nby function, slowed down by the profiler, which counts Python calls dearly")
    profiler = cProfile.Profile(process_time)
    profiler.runcall(simulator.round, simulator.trainer())
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(lines)


def report(pairs: Pairs) -> None:
    """Print the figures."""
    print(f"  a simulated round  {summary_ms(pairs.ours_s)}")
    print(f"  plain PEFT loop    {summary_ms(pairs.peer_s)}")
    print(f"  ratio {pairs.ratio} over {len(pairs.ours_s)} pairs: {pairs.verdict}")
    print(f"  A/A   {pairs.spread}, our round over our last one: what the noise alone does")


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks round", description=__doc__)
    parser.add_argument("--model", default=default_model(), help="folder, hub id, or docs-base")
    parser.add_argument("--data", default="python-docs", help="any text: it changes no time")
    parser.add_argument("--task", default="causal-lm", help="or classification: then the columns")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--no-header", action="store_true", help="columns are numbers, from 0")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="local steps of a client")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of an example")
    parser.add_argument("--rank", type=int, default=16, help="of the shared adapter")
    parser.add_argument("--ratios", default="1/8,1/4,1/2", help="sketch ratios of the clients")
    parser.add_argument("--repeats", type=at_least(2), default=5, help="how many pairs of rounds")
    parser.add_argument("--out", type=Path, help="append the result to this JSONL file")
    parser.add_argument("--profile", action="store_true", help="print where our own time goes")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = SimulateConfig(
        model=chosen.model,
        data=chosen.data,
        task=chosen.task,
        text_column=chosen.text_column,
        label_column=chosen.label_column,
        header=not chosen.no_header,
        clients=chosen.clients,
        per_round=chosen.clients,
        rank=chosen.rank,
        ratios=chosen.ratios,
        local_steps=chosen.steps,
        batch_size=chosen.batch_size,
        max_length=chosen.length,
        weight_decay=0.01,  # torch's default, which the loop takes
        device="cpu",
        eval_examples=1,
    )
    simulator = make_simulator(config)
    print(
        f"{chosen.clients} clients × {chosen.steps} steps × {chosen.batch_size}×{chosen.length} "
        f"tokens, R={chosen.rank}, ratios {chosen.ratios}, {Path(chosen.model).name}, one thread"
    )
    try:
        loop, deviation = make_loop(simulator)
    except ValueError as error:
        print(f"  red: {error}")
        return 1
    print(f"  correct: mean losses equal the plain loop's within {deviation:.0e}")
    pairs = take_turns(simulator, loop, chosen.repeats)
    report(pairs)
    if chosen.out:
        settings = {key: value for key, value in vars(chosen).items() if key != "out"}
        append_record(chosen.out, to_record(settings, pairs, deviation))
    if chosen.profile:
        profile(simulator)
    return 0


def to_record(settings: dict[str, Any], pairs: Pairs, deviation: float) -> dict[str, object]:
    """Return everything that was measured, and under what circumstances, as plain values."""
    return {
        "benchmark": "round",
        **provenance("cpu"),
        "settings": settings,
        "threads": torch.get_num_threads(),
        "clock": "process CPU seconds",
        "loss_deviation": deviation,
        "ours_median_s": statistics.median(pairs.ours_s),
        "peer_median_s": statistics.median(pairs.peer_s),
        "ratio": asdict(pairs.ratio),
        "spread": asdict(pairs.spread),
        "ours_s": pairs.ours_s,
        "peer_s": pairs.peer_s,
    }
