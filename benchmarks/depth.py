"""What training the upper layers alone spares a client: counted, and timed in turns.

A client's local steps, as the simulator runs them, with its ranks in the top K layers training and
the whole adapter in the forward pass, for every K; beside them the same ranks of all layers in the
paper's forward pass, and every rank. Operations are those that the simulated clock charges. Bytes
are of one step: "saved" is what the forward pass keeps for the backward, "peak" the most alive at
once, both without the model and its inputs. Before anything is printed, one step of SGD must move
the upper layers' ranks exactly as if the lower ones trained too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch

import fslora_kernels
from benchmarks.cost import language_batch
from benchmarks.flags import at_least
from benchmarks.timing import Interval, Pairs, append_record, clock, provenance, take_turns
from benchmarks.workload import bare, default_model, shared_model, with_adapter
from fslora.assignment import client_tasks, first_state, gather_rest
from fslora.client import LocalTrainer, upload_bytes
from fslora.clock import step_counter
from fslora.data.causal_lm import CausalLM
from fslora.data.classification import Classification
from fslora.data.tasks import Examples
from fslora.depth import Depth, layers_of
from fslora.models import take_state
from fslora.protocol import ClientTask, LocalRule, LoRAWeights, ServerState
from fslora.sketch import draw_sketches
from fslora_kernels.memory import AliveBytes, addresses, saved_storages
from fslora_kernels.sampling import sketch_size

CLIENT = "client"
STEPS = 4  # of a timed run


@dataclass(frozen=True, slots=True)
class DepthRow:
    """A client's local step at one depth.

    Attributes:
        row: what trains, and what is in the forward pass.
        layers: that train.
        flops: of the step.
        saved_bytes: kept by the forward pass for the backward, ranks included.
        peak_bytes: most alive at once, ranks, gradients and moments included.
        upload_bytes: of the adapter.
    """

    row: str
    layers: int
    flops: float
    saved_bytes: int
    peak_bytes: int
    upload_bytes: int


class Client:
    """One client on one model, asked for any depth."""

    def __init__(self, model: str, classes: int, rank: int, batch_size: int, length: int) -> None:
        """Load the model, give it an adapter as of some training, and draw a batch of examples."""
        peft_model = with_adapter(bare(model, classes=classes), rank, classes=classes)
        fslora_kernels.fuse(peft_model)
        adapters, extras = take_state(peft_model)
        for name, parameter in peft_model.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(requires_grad=False)
        generator = torch.Generator().manual_seed(1)
        adapters = {
            name: LoRAWeights(a, torch.randn(b.shape, generator=generator) * 0.02)
            for name, (a, b) in adapters.items()
        }
        batch = language_batch(peft_model, batch_size, length)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        task: CausalLM | Classification = CausalLM(max_length=length)
        if classes:
            batch["labels"] = torch.arange(batch_size) % classes
            task = Classification(("text",), "label", length, "accuracy")
        self.examples = Examples(batch)
        self.model = peft_model
        self.state: ServerState = first_state(adapters, extras, 0)
        self.trainer = LocalTrainer(peft_model, task, {CLIENT: self.examples})
        self.flops = step_counter(self.trainer, self.examples)
        self.rule = LocalRule(lr=1e-6, steps=1, batch_size=batch_size)

    @property
    def layers(self) -> int:
        """How many layers have an adapter."""
        return len(layers_of(self.state.adapters))

    def task(self, ratio: float, layers: int, *, whole: bool) -> ClientTask:
        """Ask for some ranks of the top layers, with the whole adapter beside them or alone."""
        modules = list(self.state.adapters)
        rank = self.state.adapters[modules[0]].rank
        size = sketch_size(rank, ratio)
        drawn = draw_sketches(0, modules, rank, size)
        sketches = {name: drawn[name] for name in Depth("top", layers).ever_trained(modules)}
        (task,) = client_tasks(self.state, {CLIENT: sketches}, self.rule)
        if not whole:
            return replace(task, scale=rank / size)
        return replace(task, frozen=gather_rest(self.state.adapters, sketches))

    def measure(self, row: str, task: ClientTask) -> DepthRow:
        """Count one step."""
        known = addresses([*self.model.parameters(), *self.model.buffers()])
        known |= addresses(self.examples.tensors.values())
        self.trainer(task)
        with saved_storages(known) as saved:
            self.trainer(task)
        with AliveBytes(known) as alive:
            self.trainer(task)
        return DepthRow(
            row=row,
            layers=len(layers_of(task.adapters)),
            flops=self.flops(task),
            saved_bytes=sum(saved.values()),
            peak_bytes=alive.peak,
            upload_bytes=upload_bytes(task)[0],
        )

    def check(self, ratio: float) -> None:
        """Compare what one step of SGD does to the upper layers' ranks with and without the lower.

        Raises:
            ValueError: it is not the same, or nothing.
        """
        rule = LocalRule(optimizer="sgd", lr=1.0, steps=1, batch_size=self.rule.batch_size)
        every = self.task(ratio, self.layers, whole=True)
        wanted = self.trainer(replace(every, local=rule)).delta
        for layers in range(1, self.layers):
            task = replace(self.task(ratio, layers, whole=True), key=every.key, local=rule)
            for name, pair in self.trainer(task).delta.items():
                for change, other in zip(pair, wanted[name], strict=True):
                    if not change.any() or not torch.allclose(change, other, rtol=1e-3, atol=1e-7):
                        raise ValueError(f"{layers} layers train {name} otherwise than all do")


def tasks_of(client: Client, ratio: float) -> dict[str, ClientTask]:
    """Return everything that is measured, what it is held against first."""
    share = Fraction(ratio).limit_denominator(64)
    every = client.layers
    found = {f"top {every}, all layers": client.task(ratio, every, whole=True)}
    for layers in range(every - 1, 0, -1):
        found[f"top {layers}"] = client.task(ratio, layers, whole=True)
    found[f"S/R = {share}, sketched forward"] = client.task(ratio, every, whole=False)
    found["every rank"] = client.task(1.0, every, whole=False)
    return found


def timed(client: Client, tasks: dict[str, ClientTask], repeats: int) -> dict[str, Interval]:
    """Return CPU time over that of the first task, by name."""
    rule = replace(client.rule, steps=STEPS)
    longer = {name: replace(task, local=rule) for name, task in tasks.items()}
    runs = {name: lambda task=task: client.trainer(task) for name, task in longer.items()}
    first, *others = runs
    peers = {name: runs[name] for name in others}
    turns = take_turns(runs[first], peers, clock("cpu"), seconds=0, rounds=repeats)
    pairs = {name: Pairs(turns.peer_s[name], turns.beside_s[name]) for name in others}
    return {first: turns.spread, **{name: both.ratio for name, both in pairs.items()}}


def table(rows: Sequence[DepthRow], times: dict[str, Interval]) -> str:
    """Lay the rows out, each with its share of the first row's."""
    first = rows[0]
    columns = (("Mflop", "flops", 1e6), ("saved kB", "saved_bytes", 1e3))
    columns = (*columns, ("peak kB", "peak_bytes", 1e3), ("up kB", "upload_bytes", 1e3))
    lines = [f"{'':<28}" + "".join(f"{title:>18}" for title, *_ in columns) + "   CPU time"]
    for row in rows:
        cells = (
            f"{getattr(row, name) / unit:10.1f} {getattr(row, name) / getattr(first, name):7.1%}"
            for _, name, unit in columns
        )
        lines.append(f"{row.row:<28}" + "".join(cells) + f"   {times[row.row]}")
    return "\n".join(lines)


def _workloads(chosen: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield model and classes."""
    yield chosen.model, chosen.classes
    minilm = shared_model("all-MiniLM-L6-v2-fp16")
    if minilm and chosen.model == default_model():
        yield minilm, 2


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return 1 if a result is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks depth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=default_model(), help="folder, hub id, or docs-base")
    parser.add_argument("--classes", type=int, default=0, help="of a classifier; 0: language model")
    parser.add_argument("--rank", type=int, default=16, help="R")
    parser.add_argument("--ratio", type=Fraction, default=Fraction(1, 4), help="S/R")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of an example")
    parser.add_argument("--repeats", type=at_least(2), default=9, help="runs of each row")
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ratio, wrong = float(chosen.ratio), 0
    for model, classes in _workloads(chosen):
        client = Client(model, classes, chosen.rank, chosen.batch_size, chosen.length)
        name, shape = Path(model).name, f"{chosen.batch_size}×{chosen.length}"
        print(f"{name}, R={chosen.rank}, S/R={chosen.ratio}, steps of {shape}, one thread")
        try:
            client.check(ratio)
        except ValueError as error:
            print(f"  red: {error}")
            wrong = 1
            continue
        tasks = tasks_of(client, ratio)
        rows = [client.measure(row, task) for row, task in tasks.items()]
        times = timed(client, tasks, chosen.repeats)
        print(f"{table(rows, times)}\n(the first row's time: a run over the one before)\n")
        for row in rows if chosen.out else ():
            record = {"benchmark": "depth", "model": name, "ratio": ratio, **provenance("cpu")}
            record |= {**asdict(row), "cpu_time": asdict(times[row.row])}
            append_record(chosen.out, record)
    return wrong
