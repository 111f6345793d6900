"""A simulated clock: counted operations and bytes become seconds on each client's device.

One client in one round takes

    rtt + bytes down / bandwidth + steps · step FLOPs / FLOP/s · jitter + bytes up / bandwidth,

and a round as long as its slowest client that is waited for, or the deadline. Operations are
counted on the real model (the products of one real local step of this task's shapes), so that what
a sketch saves in compute is what it really saves. Not counted: elementwise work, the optimizer, and
merging what the base weights gained, once a round.

Every draw (device, availability, failure, jitter) has its own key of the seed, the round and the
client. So all is known before a client trains, and one whose work will not be used does not train.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fslora.client import LocalTrainer, download_bytes, upload_bytes
from fslora.data.tasks import Examples
from fslora.devices import Device, Fleet
from fslora.faults import SLOWDOWN
from fslora.protocol import POOLED, ClientTask
from fslora.ranks import one_step
from fslora_kernels.flops import count_flops
from fslora_kernels.nn.linear import SketchedForward
from fslora_kernels.seeds import fold_in, uniform

FAILED = "it failed in mid-round"
CRASHED = "it crashed before it answered"

StepFlops = Callable[[ClientTask], float]


@dataclass(frozen=True, slots=True)
class Times:
    """What one client needs for one round; the round trip is in the sum only.

    Attributes:
        device: name of its class.
        seconds: from being asked to its answer being in.
        down_seconds: receiving.
        compute_seconds: training.
        up_seconds: sending.
        slowed: whether a fault struck it, which is in its compute seconds.
    """

    device: str
    seconds: float
    down_seconds: float
    compute_seconds: float
    up_seconds: float
    slowed: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """How a round will go; empty where nothing is simulated.

    Attributes:
        times: client id to what it needs, or would have needed had it not failed.
        unused: client id to why its work is not used.
        wasted: those of them who send it all the same.
        seconds: of the round.
    """

    times: dict[str, Times] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    wasted: frozenset[str] = frozenset()
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Clock:
    """When clients answer.

    Attributes:
        seed: of all draws.
        device_of: client id to its device.
        step_flops: operations of one batch, forward and backward, of a task.
        per_round: how many answers a round waits for.
        deadline: seconds after which a round takes no answer; 0 waits for everybody, and so does
            a task that does not travel.
        slow: probability that a client computes ``SLOWDOWN`` times as long.
        crash: probability that it crashes and never answers.
    """

    seed: int
    device_of: Mapping[str, Device]
    step_flops: StepFlops
    per_round: int
    deadline: float = 0.0
    slow: float = 0.0
    crash: float = 0.0

    def available(self, round_number: int, cohort: Sequence[str]) -> list[str]:
        """Return those of a cohort who take part when asked, in its order."""
        return [
            client
            for client in cohort
            if uniform(self.seed, "available", round_number, client)
            < self.device_of[client].availability
        ]

    def times(self, task: ClientTask) -> Times:
        """Say what a task takes on its client's device."""
        device, rule = self.device_of[task.client_id], task.local
        key = (self.seed, "jitter", task.round, task.client_id)
        down = 8 * sum(download_bytes(task)) / device.down_bits_per_second
        up = 8 * sum(upload_bytes(task)) / device.up_bits_per_second
        flops = rule.steps * rule.accumulation * self.step_flops(task)
        compute = flops / device.flops_per_second * lognormal(device.jitter, *key)
        slowed = self._struck("slow", self.slow, task)
        compute *= SLOWDOWN if slowed else 1
        rtt = 0.0 if task.private else device.rtt_seconds
        return Times(device.name, rtt + down + compute + up, down, compute, up, slowed)

    def plan(self, tasks: Sequence[ClientTask]) -> Plan:
        """Say how a round goes: who is waited for, who fails, who is late, how long it takes.

        The first ``per_round`` to finish are used; of two at the same time, the first in task
        order. A client that fails is noticed when its answer is due.
        """
        times = {task.client_id: self.times(task) for task in tasks}
        last, unused = 0.0, {}
        for task in tasks:
            client, device = task.client_id, self.device_of[task.client_id]
            limit = math.inf if task.private or not self.deadline else self.deadline
            last = max(last, min(times[client].seconds, limit))
            if uniform(self.seed, "dropout", task.round, client) < device.dropout:
                unused[client] = FAILED
            elif self._struck("crash", self.crash, task):
                unused[client] = CRASHED
            elif times[client].seconds > limit:
                unused[client] = f"it missed the deadline of {self.deadline:g} s"
        in_time = [client for client in times if client not in unused]
        in_time.sort(key=lambda client: times[client].seconds)
        wasted = in_time[self.per_round :]
        unused |= dict.fromkeys(wasted, f"the first {self.per_round} answers were in before it")
        if len(in_time) >= self.per_round:
            last = times[in_time[self.per_round - 1]].seconds
        return Plan(times, unused, frozenset(wasted), last)

    def _struck(self, fault: str, share: float, task: ClientTask) -> bool:
        return uniform(self.seed, "fault", fault, task.round, task.client_id) < share


def lognormal(sigma: float, seed: int, *path: int | str) -> float:
    """Draw exp(σz - σ²/2), z standard normal: lognormal with mean 1."""
    return math.exp(sigma * NormalDist().inv_cdf(uniform(seed, *path)) - sigma * sigma / 2)


def deal_devices(
    fleet: Fleet, ratio_of: Mapping[str, float], seed: int, *, by_ratio: bool
) -> dict[str, Device]:
    """Deal a fleet to clients in an order drawn from the seed, each class as often as its share.

    Args:
        fleet: what is dealt.
        ratio_of: client id to sketch ratio.
        seed: of the run.
        by_ratio: slower devices go to clients of smaller ratios; else no matter the ratio.

    Returns:
        Client id to device; under ``POOLED``, for centralised training, the fastest, never failing.
    """
    clients = list(ratio_of)
    order = np.random.default_rng(fold_in(seed, "devices")).permutation(len(clients))
    dealt = [clients[place] for place in order]
    dealing = zip(fleet.devices, fleet.counts(len(clients)), strict=True)
    devices = [device for device, count in dealing for _ in range(count)]
    if by_ratio:
        dealt.sort(key=lambda client: ratio_of[client])
        devices.sort(key=lambda device: (device.flops_per_second, device.up_bits_per_second))
    fastest = max(fleet.devices, key=lambda device: device.flops_per_second)
    dependable = replace(fastest, availability=1.0, dropout=0.0)
    return {**dict(zip(dealt, devices, strict=True)), POOLED: dependable}


def check_memory(fleet: Fleet, model: nn.Module) -> None:
    """Refuse a model whose weights alone do not fit a device.

    Raises:
        ValueError: names the device.
    """
    needed = sum(parameter.nbytes for parameter in model.parameters())
    for device in fleet.devices:
        if needed > device.memory_bytes:
            raise ValueError(
                f"the model's weights are {needed / 1e9:.1f} GB and {device.name} has "
                f"{device.memory_bytes / 1e9:.1f} GB of memory; leave it out of --devices, or take "
                "a smaller model or --dtype"
            )


def step_counter(trainer: LocalTrainer, examples: Examples) -> StepFlops:
    """Count the operations of a batch by running one, once for each shape that a task can have.

    Args:
        trainer: what clients run.
        examples: of which an even choice is the batch that stands for every client's; a client
            with fewer examples than a batch is charged its share of one.
    """
    counted: dict[object, int] = {}

    def flops(task: ClientTask) -> float:
        step = replace(one_step(task), residual={})
        shapes = _shapes(step)
        if shapes not in counted:
            counted[shapes] = _counted(trainer, step, examples)
        own, batch = len(trainer.data[task.client_id]), task.local.batch_size
        return counted[shapes] * min(own, batch) / batch

    return flops


def _counted(trainer: LocalTrainer, step: ClientTask, examples: Examples) -> int:
    rows = torch.linspace(0, len(examples) - 1, step.local.batch_size).round().long()
    batch = Examples({name: tensor[rows] for name, tensor in examples.tensors.items()})
    client = replace(trainer, data={step.client_id: batch})
    # Fused attention is not counted on every device; its plain products are.
    with _torch_layers(trainer.model), sdpa_kernel(SDPBackend.MATH), count_flops() as count:
        client(step)
    return count.total


@contextmanager
def _torch_layers(model: nn.Module) -> Iterator[None]:
    """Run the fused layers on torch, delta first, for a while: the same count on every device.

    Launches of Triton kernels are not counted, and where a layer is merged depends on the machine.
    """
    layers = [module for module in model.modules() if isinstance(module, SketchedForward)]
    before = [layer.implementation for layer in layers]
    try:
        for layer in layers:
            layer.implementation = "torch"
        yield
    finally:
        for layer, implementation in zip(layers, before, strict=True):
            layer.implementation = implementation


def _shapes(value: object) -> object:
    """All of a task that its operations can depend on, hashable: shapes in place of tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return tuple((name, _shapes(item)) for name, item in value.items())
    if is_dataclass(value):
        named = {item.name: getattr(value, item.name) for item in fields(value)}
        return _shapes({n: v for n, v in named.items() if n not in _NOT_SHAPES})
    if isinstance(value, tuple | list):
        return tuple(_shapes(item) for item in value)
    return value


# Of no consequence for the operations of a step, and different from round to round.
_NOT_SHAPES = ("round", "client_id", "key", "nonce", "lr", "held_bytes")
