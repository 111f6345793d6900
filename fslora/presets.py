"""Ready-made settings, as functions that return a config."""

from __future__ import annotations

from collections.abc import Callable

from fslora.config import SimulateConfig


def demo() -> SimulateConfig:
    """Twenty clients, each with one package's documentation; no download, under two minutes."""
    return SimulateConfig(
        model="docs-base",
        data="python-docs",
        partition="natural:package",
        clients=20,
        per_round=10,
        rank=16,
        alpha=16.0,
        ratios="1/8,1/4,1/2",
        rounds=6,
        local_steps=10,
        batch_size=8,
        max_length=128,
        lr=5e-3,
        server_lr=2.0,
        threads=1,
        eval_examples=128,
        out="runs/demo",
    )


PRESETS: dict[str, Callable[[], SimulateConfig]] = {"demo": demo}
