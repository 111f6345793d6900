"""Which of its ranks a client trains in each local step, and the optimizer that steps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import fslora_kernels
from fslora.lowrank import stack
from fslora.protocol import Adapters, ClientTask, LocalRule, LoRAWeights
from fslora.sketch import draw_steps
from fslora.stacks import Stacks
from fslora_kernels import sketched_adamw
from fslora_kernels.nn.peft import Binding, Slot

Rows = dict[str, Tensor]
"""Module name to the places of some ranks among those that a client has, int64 ``[S]``."""


class SameRanks:
    """All ranks that a client has, trained in every step.

    Serves one client after another whose factors lie alike: leaves, optimizer and bindings are made
    once.

    Attributes:
        parameters: what the step trains, heads included.
    """

    def __init__(
        self,
        leaves: Stacks,
        gradients: Sequence[Tensor],
        head: Sequence[nn.Parameter],
        rule: LocalRule,
    ) -> None:
        """Take the memory for the ranks of any client and for their gradients, and the heads."""
        leaves.require_gradients(gradients)
        self._leaves, self._gradients, self._head = leaves, gradients, head
        self.parameters: list[Tensor] = [*filter(Tensor.numel, leaves.tensors), *head]
        self._optimizer = _optimizer(self.parameters, rule)
        self._bindings: dict[float, Binding] = {}
        self._used: tuple[Adapters, Adapters] = leaves, {}

    def take(self, task: ClientTask, received: Stacks, frozen: Adapters) -> None:
        """Begin with a client's own ranks, and the frozen ones of its task."""
        for leaf, given in zip(self._leaves.tensors, received.tensors, strict=True):
            leaf.copy_(given)
        used: Adapters = self._leaves
        if not all(task.local.trained):
            used = {name: _whole(task.adapters[name], pair) for name, pair in used.items()}
        self._used = used, frozen

    def begin(self, _step: int) -> tuple[Adapters, Adapters]:
        """Forget the gradients; return the ranks that train, and those frozen beside them."""
        for gradient in self._gradients:
            gradient.zero_()
        for parameter in self._head:
            parameter.grad = None
        return self._used

    def bind(self, layers: Mapping[str, Slot], scale: float | Mapping[str, Tensor]) -> None:
        """Let the layers compute with the ranks that train."""
        used, _ = self._used
        if used is not self._leaves or not isinstance(scale, float):
            fslora_kernels.bind(layers, used, scale=scale)
        elif scale in self._bindings:
            self._bindings[scale].again()
        else:
            self._bindings[scale] = fslora_kernels.bind(layers, used, scale=scale)

    def end(self) -> None:
        """Step by the gradients."""
        self._optimizer.step()

    def changes(self, received: Stacks) -> Stacks:
        """Return what became of the ranks, less what they were."""
        return _changes(self._leaves, received)

    def forget(self) -> None:
        """Keep nothing of the client, however its training ended, but its ranks."""
        self._optimizer.state.clear()
        self._used = self._leaves, {}
        for parameter in self._head:
            parameter.grad = None


def _whole(given: LoRAWeights, trains: LoRAWeights) -> LoRAWeights:
    """Put the factor that was given beside the one that trains."""
    return LoRAWeights(
        *(new if len(new) else old.to(new.device) for old, new in zip(given, trains, strict=True))
    )


def _changes(leaves: Stacks, received: Stacks) -> Stacks:
    """Return the change, on the CPU."""
    both = zip(leaves.tensors, received.tensors, strict=True)
    return Stacks(received.layout, [leaf.cpu() - given for leaf, given in both])


class RedrawnRanks:
    """The union of a client's sketches, of which each step trains its own.

    What a step leaves out keeps its bits and its moments: each rank is stepped as torch steps a
    parameter that has a gradient in some steps only. The optimizer remembers the whole union.

    Attributes:
        parameters: what the step trains, heads included.
    """

    def __init__(
        self,
        task: ClientTask,
        received: Stacks,
        frozen: Adapters,
        head: Sequence[nn.Parameter],
        device: torch.device,
    ) -> None:
        """Copy a client's own ranks; take the frozen ones and its heads."""
        self._rule, self._frozen = task.local, frozen
        copies = [tensor.to(device, copy=True) for tensor in received.tensors]
        self._union = Stacks(received.layout, copies)
        self._rows = [
            {name: rows.to(device) for name, rows in drawn.items()} for drawn in step_rows(task)
        ]
        self._memory = {
            name: tuple(_Memory(tensor, task.local) for tensor in pair)
            for name, pair in self._union.items()
        }
        self._head = list(head)
        self._head_optimizer = _optimizer(self._head, task.local) if head else None
        self._step = 0
        self._drawn: Adapters = {}
        self.parameters: list[Tensor] = []

    def begin(self, step: int) -> tuple[Adapters, Adapters]:
        """Take the step's ranks out; return them, and those that are frozen beside them."""
        self._step = step
        self._drawn, beside = split(self._union, self._frozen, self._rows[step])
        drawn = [tensor.requires_grad_() for pair in self._drawn.values() for tensor in pair]
        self.parameters = [*drawn, *self._head]
        for parameter in self._head:
            parameter.grad = None
        return self._drawn, beside

    def bind(self, layers: Mapping[str, Slot], scale: float | Mapping[str, Tensor]) -> None:
        """Let the layers compute with the ranks that train in this step."""
        fslora_kernels.bind(layers, self._drawn, scale=scale)

    @torch.no_grad()
    def end(self) -> None:
        """Step the rows that the step's ranks were taken from, by their gradients."""
        for name, rows in self._rows[self._step].items():
            pairs = zip(self._union[name], self._drawn[name], self._memory[name], strict=True)
            for factor, drawn, memory in pairs:
                if drawn.grad is not None:
                    memory.update(factor, drawn.grad, rows, self._rule)
        if self._head_optimizer is not None:
            self._head_optimizer.step()

    def changes(self, received: Stacks) -> Stacks:
        """Return what became of the ranks, less what they were."""
        return _changes(self._union, received)

    def forget(self) -> None:
        """Nothing: another client has another union."""


class _Memory:
    """What an optimizer remembers of each rank of one factor ``[U, F]``."""

    def __init__(self, factor: Tensor, rule: LocalRule) -> None:
        """Begin with nothing."""
        slots = 2 if rule.optimizer == "adamw" else int(rule.momentum > 0)
        self._moments = [torch.zeros_like(factor) for _ in range(slots)]
        self._steps = torch.zeros(len(factor), device=factor.device)

    def update(self, factor: Tensor, gradient: Tensor, rows: Tensor, rule: LocalRule) -> None:
        """Step some rows of the factor, in place, by the gradient of those alone."""
        if rule.optimizer == "adamw":
            first, second = self._moments
            sketched_adamw(
                factor,
                gradient,
                first,
                second,
                self._steps,
                rows,
                lr=rule.lr,
                weight_decay=rule.weight_decay,
            )
            return
        if rule.weight_decay:
            gradient = gradient.add(factor[rows], alpha=rule.weight_decay)
        for moment in self._moments:
            gradient = gradient.add(moment[rows], alpha=rule.momentum)
            moment[rows] = gradient
        factor.index_add_(0, rows, gradient, alpha=-rule.lr)


def step_rows(task: ClientTask) -> list[Rows]:
    """Draw the sketches of a task's steps; return where their ranks are in their union."""
    rule, modules = task.local, list(task.adapters)
    rank = task.sketches[modules[0]].rank
    drawn = draw_steps(task.key, modules, rank, rule.redrawn_ranks, rule.steps)
    places = [
        torch.unique(drawn[:, number], return_inverse=True)[1] for number in range(len(modules))
    ]
    return [
        {module: place[step] for module, place in zip(modules, places, strict=True)}
        for step in range(rule.steps)
    ]


def split(
    union: Adapters, frozen: Adapters, rows: Mapping[str, Tensor]
) -> tuple[Adapters, Adapters]:
    """Copy out what one step trains, and what is in its forward pass beside that.

    Args:
        union: the client's own ranks.
        frozen: those of the others that its forward pass uses too. A module that is not among them
            computes with the step's ranks alone.
        rows: what the step trains.

    Returns:
        The step's ranks, and the frozen ones with the rest of the union.
    """
    drawn = {name: LoRAWeights(*(t[rows[name]] for t in pair)) for name, pair in union.items()}
    beside = dict(frozen)
    for name in (name for name in frozen if name in union):
        left = torch.ones(union[name].rank, dtype=torch.bool, device=rows[name].device)
        left[rows[name]] = False
        rest = LoRAWeights(*(factor[left] for factor in union[name]))
        beside[name] = stack([rest, frozen[name]])
    return drawn, beside


def one_step(task: ClientTask) -> ClientTask:
    """Return the task that a client's first step is by itself, with one batch."""
    rule = replace(task.local, steps=1, accumulation=1, redrawn_ranks=0)
    if not task.local.redrawn_ranks:
        return replace(task, local=rule)
    rows = step_rows(task)[0]
    adapters, frozen = split(task.adapters, task.frozen, rows)
    sketches = {
        name: replace(
            sketch,
            index=None if sketch.index is None else sketch.index[rows[name]],
            probability=None if sketch.probability is None else sketch.probability[rows[name]],
        )
        for name, sketch in task.sketches.items()
    }
    return replace(task, local=rule, adapters=adapters, frozen=frozen, sketches=sketches)


def _optimizer(parameters: Sequence[Tensor], rule: LocalRule) -> torch.optim.Optimizer:
    # fused: one call for all the small matrices instead of a dozen for each.
    if rule.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rule.lr, weight_decay=rule.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=rule.lr,
        momentum=rule.momentum,
        weight_decay=rule.weight_decay,
        fused=True,
    )
