"""A client that may fail without taking the run with it.

Out of memory, real or on purpose: it tries again with each batch in twice as many pieces, whose
gradients add up to that of the batch, down to single examples. What cannot be helped becomes an
answer that says why there is nothing. Mistakes of the program are not faults, and are raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from math import nan

import torch
from torch import Tensor, nn

from fslora.client import LocalTrainer
from fslora.data.tasks import Batch, Objective
from fslora.faults import Faults
from fslora.protocol import ClientTask, ClientUpdate
from fslora_kernels.seeds import fold_in, uniform

_CPU_MEMORY = "DefaultCPUAllocator"  # torch's CPU allocator raises a bare RuntimeError


class ClientCrashError(RuntimeError):
    """A simulated client is no more."""


@dataclass(frozen=True, slots=True)
class Guarded:
    """A ``ClientFn``: a trainer whose failures are answers.

    Attributes:
        trainer: does the work.
        seed: of the faults.
        faults: what goes wrong on purpose.
    """

    trainer: LocalTrainer
    seed: int = 0
    faults: Faults = field(default_factory=Faults)

    def __call__(self, task: ClientTask) -> ClientUpdate:
        """Train, in smaller pieces where memory asks for it, or say why not."""
        update, tried = self._attempt(task), task
        while update is None:
            most = min(task.local.batch_size, len(self.trainer.data[task.client_id]))
            if tried.local.pieces >= most:
                return _failed(task, "it ran out of memory, even with one example at a time")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            rule = replace(task.local, pieces=min(2 * tried.local.pieces, most))
            tried = replace(task, local=rule)
            update = self._attempt(tried)
        if tried is task:
            return update
        return replace(update, metrics={**update.metrics, "pieces": float(tried.local.pieces)})

    def _attempt(self, task: ClientTask) -> ClientUpdate | None:
        """Train once; None is out of memory, which is free again when this returns."""
        try:
            struck = self._struck(task)
            trainer = self.trainer
            return (trainer if struck is trainer.task else replace(trainer, task=struck))(task)
        except ClientCrashError as error:
            return _failed(task, str(error))
        except (torch.OutOfMemoryError, MemoryError):
            return None
        except RuntimeError as error:
            if _CPU_MEMORY in str(error):
                return None
            raise

    def _struck(self, task: ClientTask) -> Objective:
        """The trainer's task, or one that strikes in the middle of the client's steps."""
        rule, faults = task.local, self.faults
        struck = self.trainer.task
        for name in ("crash", "nan", "oom"):
            if not (share := getattr(faults, name)):
                continue
            # Smaller pieces are another attempt; a crash and a loss are not to depend on them.
            attempt = (rule.pieces,) if name == "oom" else ()
            key = ("fault", name, task.round, task.client_id, *attempt)
            if uniform(self.seed, *key) < share:
                step = fold_in(self.seed, *key, "step") % rule.steps + 1
                first = (step - 1) * rule.accumulation * rule.pieces
                struck = _Struck(struck, first, _STRIKES[name](step, rule.steps))
        return struck


def _failed(task: ClientTask, reason: str) -> ClientUpdate:
    return ClientUpdate(
        round=task.round,
        client_id=task.client_id,
        nonce=task.nonce,
        delta={},
        extras={},
        num_examples=0,
        metrics={},
        failure=reason,
    )


@dataclass(frozen=True, slots=True)
class _Struck(Objective):
    """A task whose losses are altered from some one on.

    Attributes:
        task: whose losses.
        first: how many losses are as they are.
        strike: what becomes of the others.
    """

    task: Objective
    first: int
    strike: Callable[[Tensor], Tensor]
    asked: Iterator[int] = field(default_factory=count)

    def supervised(self, batch: Batch) -> Tensor:
        """The task's."""
        return self.task.supervised(batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task's, struck: after the forward pass, before the backward pass."""
        loss = self.task.loss(model, batch)
        return loss if next(self.asked) < self.first else self.strike(loss)


def _crash(step: int, steps: int) -> Callable[[Tensor], Tensor]:
    def strike(_: Tensor) -> Tensor:
        raise ClientCrashError(f"it crashed in step {step} of {steps}")

    return strike


def _no_number(_step: int, _steps: int) -> Callable[[Tensor], Tensor]:
    return lambda loss: loss * nan


def _no_memory(step: int, _steps: int) -> Callable[[Tensor], Tensor]:
    def strike(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(f"simulated, in step {step}")

    return strike


_STRIKES = {"crash": _crash, "nan": _no_number, "oom": _no_memory}
