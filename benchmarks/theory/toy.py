"""The quadratic toy: client i's loss is ½‖sBA − Wᵢ*‖², in float64, with noise on ∂/∂W if asked.

Strategies, sketches, rounds and averages are the project's own; only what a client computes is
written out here, because thousands of rounds through autograd would take an hour. A test holds it
against ``LocalTrainer`` on a fused layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.theory.worlds import World
from fslora.protocol import ClientTask, ClientUpdate, LocalRule, LoRAWeights, ServerState
from fslora_kernels.seeds import fold_in

INPUTS, RANK = 24, 16
SINGULAR = (1.0, 0.75, 0.5, 0.25)
MODULE = "layer"


@dataclass(frozen=True, slots=True)
class QuadraticClient:
    """A ``ClientFn``.

    Attributes:
        targets: client id to Wᵢ*, ``[E, D]``.
        noise: standard deviation of what is added to each entry of ∂/∂W.
    """

    targets: dict[str, Tensor]
    noise: float = 0.0

    def __call__(self, task: ClientTask) -> ClientUpdate:
        """Take the task's SGD steps."""
        given = task.adapters[MODULE]
        a, b = (factor.clone() for factor in given)
        target, rule = self.targets[task.client_id], task.local
        frozen = task.frozen.get(MODULE)
        if frozen is not None:
            target = target - frozen.lora_b.t() @ frozen.lora_a
        generator = torch.Generator().manual_seed(task.key)
        step_a, step_b = (rule.lr * task.scale * trained for trained in rule.trained)
        total = 0.0
        for _ in range(rule.steps):
            residual = torch.addmm(target, b.t(), a, beta=-1, alpha=task.scale)
            total += 0.5 * float(residual.square().sum())
            if self.noise:
                drawn = torch.randn(residual.shape, generator=generator, dtype=residual.dtype)
                residual = residual.add_(drawn, alpha=self.noise)
            gradient_a, gradient_b = b @ residual, a @ residual.t()
            a.sub_(gradient_a, alpha=step_a)
            b.sub_(gradient_b, alpha=step_b)
        change = LoRAWeights(a - given.lora_a, b - given.lora_b)
        return ClientUpdate(
            task.round, task.client_id, task.nonce, {MODULE: change}, {}, 1, {"loss": total}
        )


def target_of(seed: int, singular: Sequence[float] = SINGULAR) -> Tensor:
    """Return W*, ``[E, D]``, with the given singular values."""
    generator = torch.Generator().manual_seed(fold_in(seed, "target"))
    left, right = (
        torch.linalg.qr(torch.randn(INPUTS, len(singular), generator=generator).double()).Q
        for _ in range(2)
    )
    return left * torch.tensor(singular, dtype=torch.float64) @ right.t()


def toy(
    seed: int,
    *,
    clients: int = 8,
    steps: int = 5,
    noise: float = 0.0,
    spread: float = 0.02,
) -> World:
    """Build the toy.

    Args:
        seed: of the targets and the first factors.
        clients: N.
        steps: H.
        noise: as ``QuadraticClient``.
        spread: standard deviation of an entry of Wᵢ* − W*; these sum to zero over the clients.

    Returns:
        Its loss is ‖BA − W*‖² / ‖W*‖².
    """
    names = tuple(f"client-{n:02}" for n in range(clients))
    target = target_of(seed)
    generator = torch.Generator().manual_seed(fold_in(seed, "first factors"))
    a = torch.randn(RANK, INPUTS, generator=generator).double() / INPUTS**0.5
    apart = torch.randn(clients, INPUTS, INPUTS, generator=generator).double() * spread
    apart -= apart.mean(dim=0)
    adapters = {MODULE: LoRAWeights(a, torch.zeros_like(a))}
    size = float(target.square().sum())

    def loss(state: ServerState) -> float:
        (pair,) = state.adapters.values()
        return float((pair.lora_b.t() @ pair.lora_a - target).square().sum()) / size

    client = QuadraticClient(dict(zip(names, target + apart, strict=True)), noise)
    first = ServerState(round=0, adapters=adapters, extras={}, key=seed)
    rule = LocalRule(optimizer="sgd", lr=0.01, steps=steps)
    return World("toy", seed, names, first, client, loss, rule)


def starting(world: World, factors: LoRAWeights) -> World:
    """Return the toy with other first factors."""
    return replace(world, first=replace(world.first, adapters={MODULE: factors}))
