"""What a round costs one client: operations, bytes and memory, counted on the real model.

Each figure is a straight line in the sketch size S, because the adapter's products, leaves,
gradients and moments are. So two counted rounds, at S = 1 and S = R, give it at every S. (With the
full forward the memory is a few per cent off between: at S = R no frozen ranks are held.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fslora.client import LocalTrainer, download_bytes, upload_bytes
from fslora.clock import step_counter
from fslora.data.tasks import Examples
from fslora.devices import Device
from fslora.models import take_state
from fslora.prepare import Run, make_strategy
from fslora.protocol import ClientTask
from fslora_kernels.memory import AliveBytes, addresses

_CLIENTS = ("least", "whole")


class Line(NamedTuple):
    """A figure that is a straight line in S.

    Attributes:
        fixed: what does not depend on S.
        each: for each rank.
    """

    fixed: float
    each: float

    def __call__(self, size: int) -> float:
        """The figure at a sketch size."""
        return self.fixed + self.each * size


@dataclass(frozen=True, slots=True)
class Costs:
    """What one client's round costs, by its sketch size.

    Attributes:
        rank: R.
        flops: of all local steps.
        down_bytes: received, heads included.
        up_bytes: sent, heads included.
        memory_bytes: most alive at once, the base model included.
        memory_bytes_of_one: the same at batch size 1.
        weight_bytes: of the frozen base in its dtype.
        weights_halve: whether bfloat16 would halve them: the base is in float32.
        layer_bytes: of one of its repeated layers; 0 where none are found.
        layers: how many of them there are.
    """

    rank: int
    flops: Line
    down_bytes: Line
    up_bytes: Line
    memory_bytes: Line
    memory_bytes_of_one: Line
    weight_bytes: float
    weights_halve: bool
    layer_bytes: float
    layers: int

    def seconds(self, device: Device, size: int) -> tuple[float, float]:
        """Seconds of a round: those of computing, without jitter, and all others."""
        moving = 8 * self.down_bytes(size) / device.down_bits_per_second
        moving += 8 * self.up_bytes(size) / device.up_bits_per_second
        return self.flops(size) / device.flops_per_second, device.rtt_seconds + moving


def count_costs(run: Run) -> Costs:
    """Count what a round costs by running single steps of it.

    Args:
        run: prepared without devices.
    """
    config, model = run.config, run.model
    ratio_of = dict(zip(_CLIENTS, (1 / config.rank, 1.0), strict=True))
    strategy = make_strategy(config, ratio_of)
    state = strategy.init(*take_state(model), config.seed)
    tasks = strategy.assign(state, _CLIENTS)
    held, fullest = [], run.data.evaluation
    for examples in run.data.clients:
        held.append(min(len(examples), config.batch_size))
        fullest = max(fullest, examples, key=_most_tokens)  # one long text makes a batch as long
    longest = longest_of(fullest, max(held))
    trainer = LocalTrainer(model, run.task, dict.fromkeys(_CLIENTS, longest))
    step_flops = step_counter(trainer, run.data.evaluation)
    # A client with fewer examples than a batch is charged its share of one.
    batches = config.local_steps * config.accumulation
    batches_held = batches * sum(held) / len(held) / max(held)

    def line(figure: Callable[[ClientTask], float]) -> Line:
        least, whole = map(figure, tasks)
        each = (whole - least) / (config.rank - 1) if config.rank > 1 else 0.0
        return Line(least - each, each)

    base = [p for name, p in model.named_parameters() if ".lora_" not in name]
    layer_bytes, layers = _repeated(model)
    return Costs(
        rank=config.rank,
        flops=line(lambda task: batches_held * step_flops(task)),
        down_bytes=line(lambda task: sum(download_bytes(task))),
        up_bytes=line(lambda task: sum(upload_bytes(task))),
        memory_bytes=line(lambda task: round_bytes(trainer, task)),
        memory_bytes_of_one=line(
            lambda task: round_bytes(
                trainer, replace(task, local=replace(task.local, batch_size=1))
            )
        ),
        weight_bytes=sum(parameter.nbytes for parameter in base if not parameter.requires_grad),
        weights_halve=config.dtype == "float32",
        layer_bytes=layer_bytes,
        layers=layers,
    )


def round_bytes(trainer: LocalTrainer, task: ClientTask) -> int:
    """Count the most bytes alive at once while a client trains, model and task included."""
    return sum(tensor.nbytes for tensor in _held(trainer, task)) + made_bytes(trainer, task)


def made_bytes(trainer: LocalTrainer, task: ClientTask) -> int:
    """Count the most bytes alive at once of what a client makes while it trains.

    That is everything that the operations of two local steps make: the leaves, their gradients and
    moments, the saved activations, what passes by. Not counted is scratch space inside one
    operation, and what Python and its libraries take themselves.
    """
    # In the second step the optimizer has its moments.
    short = replace(task, local=replace(task.local, steps=2, accumulation=1), residual={})
    anew = replace(trainer)  # without what an earlier client was trained in
    with AliveBytes(addresses(_held(trainer, task))) as alive:
        anew(short)
    peak: int = alive.peak
    return peak


def _held(trainer: LocalTrainer, task: ClientTask) -> list[Tensor]:
    """The tensors of the model and the task."""
    given = [tensor for pair in (*task.adapters.values(), *task.frozen.values()) for tensor in pair]
    return [*trainer.model.parameters(), *trainer.model.buffers(), *given, *task.extras.values()]


def longest_of(examples: Examples, count: int) -> Examples:
    """Return the examples of most tokens: a device must have the memory for them.

    Where there are fewer than ``count``, some come more than once.
    """
    order = _lengths(examples).argsort(descending=True, stable=True)
    return Examples(examples.take(order[torch.arange(count) % len(order)]))


def _lengths(examples: Examples) -> Tensor:
    return examples.tensors["attention_mask"].sum(dim=1)


def _most_tokens(examples: Examples) -> int:
    return int(_lengths(examples).max())


def _repeated(model: torch.nn.Module) -> tuple[float, int]:
    """Bytes of one of the repeated layers, and how many there are."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    if not lists:
        return 0.0, 0
    layers = max(lists, key=lambda one: sum(p.nbytes for p in one.parameters()))
    return sum(p.nbytes for p in layers.parameters()) / len(layers), len(layers)
