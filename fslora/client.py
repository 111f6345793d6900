"""What a client does with a task: train its own few ranks, answer their change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

import torch
from torch import nn

import fslora_kernels
from fslora.data.tasks import Batch, Examples, Objective
from fslora.lowrank import stack, tail_norm
from fslora.places import Places
from fslora.protocol import Adapters, ClientTask, ClientUpdate, Extras, LocalRule, LoRAWeights
from fslora.ranks import RedrawnRanks, SameRanks
from fslora.residual import applied
from fslora.stacks import Stacks, few_tensors, stacked
from fslora_kernels.nn.peft import Slot, slots
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
        device, layers, own_heads, places = self._resident
        examples = self.data[task.client_id]
        received = _that_train(task.adapters, task.local)
        head = {name: p for name, p in own_heads.items() if name in task.extras}
        for name, parameter in head.items():
            parameter.detach().copy_(task.extras[name])
        frozen = {n: LoRAWeights(*(t.to(device) for t in p)) for n, p in task.frozen.items()}
        ranks: SameRanks | RedrawnRanks
        if task.local.redrawn_ranks:
            ranks = RedrawnRanks(task, received, frozen, list(head.values()), device)
        else:
            ranks = places.place(received, list(head.values()), task.local)
            ranks.take(task, received, frozen)
        try:
            with applied(self.model, task.residual), _seeded(task.key, device):
                loss = self._train(ranks, examples, task)
        finally:
            fslora_kernels.unbind(layers)
            ranks.forget()
        return ClientUpdate(
            round=task.round,
            client_id=task.client_id,
            nonce=task.nonce,
            delta=ranks.changes(received),
            extras={n: head[n].detach().cpu() - old for n, old in task.extras.items()},
            num_examples=len(examples),
            metrics={"loss": loss},
        )

    @cached_property
    def _resident(
        self,
    ) -> tuple[torch.device, dict[str, Slot], dict[str, nn.Parameter], Places]:
        """Walk through the model once, as it stays what it is: device, slots, heads, places."""
        self.model.train()
        device = next(self.model.parameters()).device
        return device, slots(self.model), heads(self.model), Places(device)

    def _train(
        self, ranks: SameRanks | RedrawnRanks, examples: Examples, task: ClientTask
    ) -> float:
        """Run the local steps; return the mean training loss, the penalty not included."""
        rule, (device, layers, _, _) = task.local, self._resident
        batches = _batches(examples, rule.batch_size, fold_in(task.key, "batches"))
        scales = {name: tensor.to(device) for name, tensor in task.rank_scales.items()}
        total = torch.zeros((), device=device)
        bound: Adapters | None = None
        if not self.model.training:
            self.model.train()
        for step in range(rule.steps):
            leaves, frozen = ranks.begin(step)
            if leaves is not bound:
                ranks.bind(layers, scales or task.scale)
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


@contextmanager
def _seeded(key: int, device: torch.device) -> Iterator[None]:
    """Let what a model draws follow from a key; afterwards torch's generators are as before."""
    if device.type != "cpu":
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(key)
            yield
        return
    # torch.manual_seed keeps a stack trace for every kind of GPU that is not in use yet.
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def _that_train(adapters: Adapters, rule: LocalRule) -> Stacks:
    """Return the factors that train; of one that does not, no rows."""
    if all(rule.trained):
        return stacked(adapters)
    pairs = {
        name: LoRAWeights(
            *(t if trains else t[:0] for t, trains in zip(pair, rule.trained, strict=True))
        )
        for name, pair in adapters.items()
    }
    return stacked(pairs)


def _batches(examples: Examples, size: int, key: int) -> Iterator[Batch]:
    """Yield batches for ever: every example once, in a new order each time round.

    A client with fewer examples than ``size`` gives them all in each batch.
    """
    generator = torch.Generator().manual_seed(key)
    size = min(size, len(examples))
    order = torch.randperm(len(examples), generator=generator)
    while True:
        yield examples.take(order[:size])
        order = order[size:]
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(examples), generator=generator)])


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
        sum(factor.nbytes for factor in few_tensors(adapters)),
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
    if all(task.local.trained):
        return payload_bytes(task.adapters, {})[0], head_bytes(task)
    factors = (f for pair in task.adapters.values() for f in compress(pair, task.local.trained))
    return sum(factor.nbytes for factor in factors), head_bytes(task)
