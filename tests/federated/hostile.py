"""A world without a model, for thousands of rounds: its clients answer noise."""

import torch

from fslora.protocol import ClientUpdate, LocalRule, LoRAWeights
from fslora.strategies import STRATEGIES

CLIENTS = ["one", "two", "three", "four"]
RATIOS = (1 / 4, 1 / 2, 1.0, 1 / 2)
SHAPES = {"first.query": (6, 5), "second.value": (3, 7)}
RANK = 4


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_state(name="fslora", ratios=RATIOS, dtype=torch.float32, **options):
    """(strategy, its first state)."""
    strategy = STRATEGIES[name](dict(zip(CLIENTS, ratios, strict=True)), LocalRule(), **options)
    adapters = {
        module: LoRAWeights(
            normal(RANK, inputs, seed=1, dtype=dtype), normal(RANK, outputs, seed=2, dtype=dtype)
        )
        for module, (inputs, outputs) in SHAPES.items()
    }
    return strategy, strategy.init(adapters, {"head.weight": normal(2, 3, seed=3, dtype=dtype)}, 7)


def honest(task):
    """Answer a task with noise from its key."""
    generator = torch.Generator().manual_seed(task.key)

    def change(tensor, *, trained=True):
        drawn = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        return drawn if trained else tensor[:0]

    return ClientUpdate(
        round=task.round,
        client_id=task.client_id,
        nonce=task.nonce,
        delta={
            name: LoRAWeights(
                *(change(t, trained=on) for t, on in zip(pair, task.local.trained, strict=True))
            )
            for name, pair in task.adapters.items()
        },
        extras={name: change(tensor) for name, tensor in task.extras.items()},
        num_examples=5,
        metrics={"loss": 1.0},
    )
