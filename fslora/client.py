"""What a client does with a task: train its own few ranks, answer their change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

import fslora_kernels
from fslora.data.tasks import Batch, Examples, Task
from fslora.lowrank import stack, tail_norm
from fslora.protocol import Adapters, ClientTask, ClientUpdate, Extras, LocalRule, LoRAWeights
from fslora.ranks import RedrawnRanks, SameRanks
from fslora.residual import applied
from fslora_kernels.seeds import fold_in


def heads(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what a PEFT model trains beside its LoRA factors: heads, trained biases."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    }


@dataclass(frozen=True, slots=True)
class LocalTrainer:
    """A ``ClientFn``: trains on one resident fused model, one client at a time.

    Attributes:
        model: fused PEFT model; its own adapter is not touched, its heads are overwritten.
        task: the loss.
        data: client id to its examples.
    """

    model: nn.Module
    task: Task
    data: Mapping[str, Examples]

    def __call__(self, task: ClientTask) -> ClientUpdate:
        """Train for the task's local steps and return the change, on the CPU."""
        device = next(self.model.parameters()).device
        examples = self.data[task.client_id]
        leaves = {name: _leaves(pair, task.local, device) for name, pair in task.adapters.items()}
        head = {name: p for name, p in heads(self.model).items() if name in task.extras}
        with torch.no_grad():
            for name, parameter in head.items():
                parameter.copy_(task.extras[name])
        devices = [device] if device.type == "cuda" else []
        frozen = {n: LoRAWeights(*(t.to(device) for t in p)) for n, p in task.frozen.items()}
        kind = RedrawnRanks if task.local.redrawn_ranks else SameRanks
        ranks = kind(task, leaves, frozen, list(head.values()))
        try:
            with applied(self.model, task.residual), torch.random.fork_rng(devices):
                torch.manual_seed(task.key)
                loss = self._train(ranks, examples, task)
        finally:
            fslora_kernels.unbind(self.model)
        return ClientUpdate(
            round=task.round,
            client_id=task.client_id,
            nonce=task.nonce,
            delta={
                name: LoRAWeights(
                    *(
                        new.detach().cpu() - old if new.requires_grad else old[:0]
                        for new, old in zip(leaves[name], pair, strict=True)
                    )
                )
                for name, pair in task.adapters.items()
            },
            extras={n: head[n].detach().cpu() - old for n, old in task.extras.items()},
            num_examples=len(examples),
            metrics={"loss": loss},
        )

    def _train(
        self, ranks: SameRanks | RedrawnRanks, examples: Examples, task: ClientTask
    ) -> float:
        """Run the local steps; return the mean training loss, the penalty not included."""
        rule = task.local
        batches = _batches(examples, rule.batch_size, fold_in(task.key, "batches"))
        device = next(self.model.parameters()).device
        scales = {name: tensor.to(device) for name, tensor in task.rank_scales.items()}
        total = torch.zeros((), device=device)
        bound: Adapters | None = None
        self.model.train()
        for step in range(rule.steps):
            leaves, frozen = ranks.begin(step)
            if leaves is not bound:
                fslora_kernels.bind(self.model, leaves, scale=scales or task.scale)
                bound = leaves
            for _ in range(rule.accumulation):
                if frozen:
                    whole = {
                        name: stack([leaves[name], pair]) if name in leaves else pair
                        for name, pair in frozen.items()
                    }
                    fslora_kernels.bind(self.model, {**leaves, **whole}, scale=task.scale)
                loss = self.task.loss(self.model, next(batches)) / rule.accumulation
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            if rule.penalty:
                penalty = rule.penalty * tail_norm(leaves, rule.penalty_from)
                penalty.backward()  # type: ignore[no-untyped-call]
            if rule.clip_norm:
                nn.utils.clip_grad_norm_(ranks.parameters, rule.clip_norm)
            ranks.end()
        return float(total) / rule.steps


def _leaves(pair: LoRAWeights, rule: LocalRule, device: torch.device) -> LoRAWeights:
    return LoRAWeights(
        *(
            t.detach().to(device, copy=True).requires_grad_(trained)
            for t, trained in zip(pair, rule.trained, strict=True)
        )
    )


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


def payload_bytes(adapters: Adapters, extras: Extras) -> tuple[int, int]:
    """Return the bytes of the tensors that travel: (adapter, head).

    Index sets and seeds do not travel: the server keeps what it drew. The framing of a message
    (names and shapes) is not counted.
    """
    return (
        sum(pair.size_bytes for pair in adapters.values()),
        sum(tensor.nbytes for tensor in extras.values()),
    )


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
    factors = [
        factor
        for pair in task.adapters.values()
        for factor, trained in zip(pair, task.local.trained, strict=True)
        if trained
    ]
    return sum(factor.nbytes for factor in factors), payload_bytes({}, task.extras)[1]
