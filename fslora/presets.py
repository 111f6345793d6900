"""Ready-made settings, as functions that return a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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


def chaos() -> SimulateConfig:
    """The demo's clients on devices that are away, slow, short of memory and apt to fail."""
    return replace(
        demo(),
        rounds=5,
        per_round=8,
        devices="budget-phone:poor=0.5,laptop:median=0.3,gpu:5g=0.2",
        over_select=1.5,
        deadline=1.5,
        faults="crash=0.1,nan=0.1,oom=0.2,slow=0.2",
        seed=3,  # in which each of them happens
        out="runs/chaos",
    )


PRESETS: dict[str, Callable[[], SimulateConfig]] = {"demo": demo, "chaos": chaos}
