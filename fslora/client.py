"""What a client does with a task: train its own few ranks, answer their change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

import torch
from torch import nn

import fslora_kernels
from fslora.data.tasks import Batch, Examples, Objective
from fslora.lowrank import stack, tail_norm
from fslora.protocol import Adapters, ClientTask, ClientUpdate, Extras, LocalRule, LoRAWeights
from fslora.ranks import RedrawnRanks, SameRanks
from fslora.residual import applied
from fslora_kernels.nn.fuse import FusedLayers, fused_layers
from fslora_kernels.seeds import fold_in


def heads(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what a PEFT model trains beside its LoRA factors: heads, trained biases."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    }


@dataclass(frozen=True)  # no slots: the walk through the model is kept
class LocalTrainer:
    """A ``ClientFn``: trains on one resident fused model, one client at a time.

    Attributes:
        model: fused PEFT model; its own adapter is not touched, its heads are overwritten.
        task: the loss.
        data: client id to its examples.
    """

    model: nn.Module
    task: Objective
    data: Mapping[str, Examples]

    def __call__(self, task: ClientTask) -> ClientUpdate:
        """Train for the task's local steps and return the change, on the CPU."""
        device, layers, own_heads = self._resident
        examples = self.data[task.client_id]
        leaves = _leaves(task.adapters, task.local, device)
        head = {name: p for name, p in own_heads.items() if name in task.extras}
        with torch.no_grad():
            for name, parameter in head.items():
                parameter.copy_(task.extras[name])
        devices = [device] if device.type == "cuda" else []
        frozen = {n: LoRAWeights(*(t.to(device) for t in p)) for n, p in task.frozen.items()}
        kind = RedrawnRanks if task.local.redrawn_ranks else SameRanks
        ranks = kind(task, leaves, frozen, list(head.values()))
        try:
            with applied(self.model, task.residual), torch.random.fork_rng(devices):
                _seed(task.key, device)
                loss = self._train(ranks, examples, task)
        finally:
            fslora_kernels.unbind(layers)
        return ClientUpdate(
            round=task.round,
            client_id=task.client_id,
            nonce=task.nonce,
            delta=_changes(leaves, task.adapters),
            extras={n: head[n].detach().cpu() - old for n, old in task.extras.items()},
            num_examples=len(examples),
            metrics={"loss": loss},
        )

    @cached_property
    def _resident(self) -> tuple[torch.device, FusedLayers, dict[str, nn.Parameter]]:
        """Walk through the model once, as it stays what it is: device, fused layers, heads."""
        self.model.train()
        device = next(self.model.parameters()).device
        return device, fused_layers(self.model), heads(self.model)

    def _train(
        self, ranks: SameRanks | RedrawnRanks, examples: Examples, task: ClientTask
    ) -> float:
        """Run the local steps; return the mean training loss, the penalty not included."""
        rule, (device, layers, _) = task.local, self._resident
        batches = _batches(examples, rule.batch_size, fold_in(task.key, "batches"))
        scales = {name: tensor.to(device) for name, tensor in task.rank_scales.items()}
        total = torch.zeros((), device=device)
        bound: Adapters | None = None
        if not self.model.training:
            self.model.train()
        for step in range(rule.steps):
            leaves, frozen = ranks.begin(step)
            if leaves is not bound:
                fslora_kernels.bind(layers, leaves, scale=scales or task.scale)
                bound = leaves
            for batch, parts in _parts(self.task, batches, rule):
                if frozen:
                    whole = {
                        name: stack([leaves[name], pair]) if name in leaves else pair
                        for name, pair in frozen.items()
                    }
                    fslora_kernels.bind(layers, {**leaves, **whole}, scale=task.scale)
                loss = self.task.loss(self.model, batch) / parts
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            if rule.penalty:
                penalty = rule.penalty * tail_norm(leaves, rule.penalty_from)
                penalty.backward()  # type: ignore[no-untyped-call]
            if rule.clip_norm:
                nn.utils.clip_grad_norm_(ranks.parameters, rule.clip_norm)
            ranks.end()
        return float(total) / rule.steps


@torch.no_grad()
def _changes(leaves: Adapters, received: Adapters) -> Adapters:
    """Turn what was trained into its change, on the CPU: in place, and in one call for all.

    A factor that is not trained has no rows.
    """
    found, trained, before = [], [], []
    for name, pair in received.items():
        for new, old in zip(leaves[name], pair, strict=True):
            if new.requires_grad:
                new.grad = None
                found.append(new.detach_().cpu())
                trained.append(found[-1])
                before.append(old)
            else:
                found.append(old[:0])
    if trained:
        torch._foreach_sub_(trained, before)
    return dict(zip(received, map(LoRAWeights, found[::2], found[1::2]), strict=True))


def _seed(key: int, device: torch.device) -> None:
    """Seed what a model draws from."""
    if device.type == "cpu":
        # torch.manual_seed keeps a stack trace for every kind of GPU that is not in use yet.
        torch.default_generator.manual_seed(key)
    else:
        torch.manual_seed(key)


def _leaves(adapters: Adapters, rule: LocalRule, device: torch.device) -> Adapters:
    """Copy the factors out as leaves."""
    factors = (factor for pair in adapters.values() for factor in pair)
    cpu = device.type == "cpu"  # where a clone takes three quarters of the time of `to`
    copies = [factor.clone() if cpu else factor.to(device, copy=True) for factor in factors]
    leaves = zip(copies, rule.trained * len(adapters), strict=True)
    found = (leaf.requires_grad_(trained) for leaf, trained in leaves)
    return {name: LoRAWeights(next(found), next(found)) for name in adapters}


def _batches(examples: Examples, size: int, key: int) -> Iterator[Batch]:
    """Yield batches for ever: every example once, in a new order each time round.

    A client with fewer examples than ``size`` gives them all in each batch.
    """
    generator = torch.Generator().manual_seed(key)
    size = min(size, len(examples))
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(examples), generator=generator)])
        rows, order = order[:size], order[size:]
        yield examples.take(rows)


def _parts(
    task: Objective, batches: Iterator[Batch], rule: LocalRule
) -> Iterator[tuple[Batch, float]]:
    """Yield what one step is computed on, and what each mean loss is to be divided by."""
    for _ in range(rule.accumulation):
        batch = next(batches)
        if rule.pieces == 1:
            yield batch, rule.accumulation
            continue
        whole = float(task.supervised(batch))
        for rows in torch.arange(len(batch["labels"])).tensor_split(rule.pieces):
            piece = {name: tensor[rows] for name, tensor in batch.items()}
            if supervised := float(task.supervised(piece)):
                yield piece, rule.accumulation * whole / supervised


def payload_bytes(adapters: Adapters, extras: Extras) -> tuple[int, int]:
    """Return the bytes of the tensors that travel: (adapter, head).

    Index sets and seeds do not travel: the server keeps what it drew. The framing of a message
    (names and shapes) is not counted.
    """
    return (
        sum(pair.size_bytes for pair in adapters.values()),
        sum(tensor.nbytes for tensor in extras.values()),
    )


def head_bytes(task: ClientTask) -> int:
    """Return the bytes of a task's heads, which travel whole, there and back."""
    return 0 if task.private else payload_bytes({}, task.extras)[1]


def download_bytes(task: ClientTask) -> tuple[int, int]:
    """Return what the server sends one client: (adapter, head)."""
    if task.private:
        return 0, 0
    adapter, head = payload_bytes(task.adapters, task.extras)
    beside = [*task.frozen.values(), *task.residual.values()]
    adapter += sum(pair.size_bytes for pair in beside)
    scales = sum(tensor.nbytes for tensor in task.rank_scales.values())
    return adapter + scales - task.held_bytes, head


def upload_bytes(task: ClientTask) -> tuple[int, int]:
    """Return what a client answers to a task: (adapter, head)."""
    if task.private:
        return 0, 0
    trained = task.local.trained
    factors = (factor for pair in task.adapters.values() for factor in compress(pair, trained))
    return sum(factor.nbytes for factor in factors), head_bytes(task)
