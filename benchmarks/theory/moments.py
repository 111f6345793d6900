"""P1: the moments of the sketches, what they do to a gradient; P4: to an average of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.theory.verdicts import Claim, Finding, Verdict, exponent, inside, mean_of, worst
from benchmarks.theory.worlds import Ratios, World, losses
from fslora.aggregation import mean_update
from fslora.options import Sampler
from fslora.protocol import Adapters, ClientTask, LoRAWeights, ServerState
from fslora.sketch import draw_sketches
from fslora.strategies import fslora
from fslora_kernels.seeds import fold_in

MOMENTS = Claim(
    "P1a",
    "E[Ω] = I, E[Ωⱼⱼ²] = R/S and E[ΩⱼⱼΩₗₗ] = R(S−1)/(S(R−1)) for the sketches that clients draw",
    "confirmed if every moment lies within 4.5 standard errors, else refuted",
)
ROWS = Claim(
    "P1b",
    "a client's update of A and of B is non-zero in exactly the S ranks of its sketch",
    "confirmed if so in every module, else refuted",
)
SECOND = Claim(
    "P1c",
    "at fixed X a sketched gradient's mean square over the full gradient's is R/S",
    "confirmed if the interval of (measured / (R/S)) lies in [0.8, 1.25] at every ratio; refuted "
    "if at one ratio it lies outside",
)
VARIANCE = Claim(
    "P4a",
    "the variance of the averaged update at fixed X falls as 1/N, with independent sketches",
    "confirmed if the exponent's interval lies in [−1.2, −0.8], refuted if outside",
)
SHARED = Claim(
    "P4b",
    "with one sketch for all clients the variance over that of independent sketches is αN, with "
    "α = ‖mean gᵢ‖² / mean ‖gᵢ‖² of the clients' full updates: what they agree on stays",
    "confirmed if the quotient is within 25% of the prediction, refuted if off by more than half",
)
BALANCED = Claim(
    "P4c",
    "where balanced sets cover each rank once the quotient is (1 − α)N/(N − 1): what the clients "
    "agree on cancels",
    "confirmed if the quotient is within 25% of the prediction, refuted if off by more than half",
)
CLAIMS = (MOMENTS, ROWS, SECOND, VARIANCE, SHARED, BALANCED)
Optimizer = Literal["adamw", "sgd"]
RATIOS = (1 / 2, 1 / 4, 1 / 8)


def sampling(draws: int, rank: int = 16) -> Iterator[Finding]:
    """Check the moments of ``draw_sketches``, one module a draw."""
    worst_z, data = 0.0, {}
    modules = [f"module {n}" for n in range(draws)]
    for size in (1, 2, 4, 8):
        held = torch.zeros(draws, rank, dtype=torch.float64)
        for row, sketch in zip(held, draw_sketches(1, modules, rank, size).values(), strict=True):
            row[sketch.index] = 1
        pairs = (held.t() @ held / draws)[~torch.eye(rank, dtype=torch.bool)]
        for name, found, chance in (
            ("one", held.mean(dim=0), size / rank),
            ("two", pairs, size * (size - 1) / (rank * (rank - 1))),
        ):
            error = (chance * (1 - chance) / draws) ** 0.5
            z = float((found - chance).abs().max()) / error if error else float(found.abs().max())
            data[f"S={size} {name}"] = z
            worst_z = max(worst_z, z)
    yield Finding(
        MOMENTS,
        "sampling code",
        "0",
        f"largest deviation {worst_z:.2f} standard errors",
        "confirmed" if worst_z < 4.5 else "refuted",
        data,
    )


def gradient(world: World, state: ServerState, draws: int) -> Iterator[Finding]:
    """Check the rows of a sketched gradient and its mean square at a state.

    One step of size 1: a smaller one would lose small gradients in the rounding of the factors.
    """
    (whole, *_) = tasks_of(world, state, (1.0,), 0, lr=1.0, steps=1)
    reference = square(world.client(whole).delta)
    exact, verdicts, parts, data = True, [], [], {}
    for ratio in RATIOS:
        squares = []
        for draw in range(draws):
            (task, *_) = tasks_of(world, state, (ratio,), draw, lr=1.0, steps=1)
            update = world.client(replace(task, key=whole.key))
            squares.append(square(update.delta) / reference * ratio)
            exact &= all(
                _moves(pair, task.adapters[name]) and pair.rank == ratio * world.rank
                for name, pair in update.delta.items()
            )
        found = mean_of(squares)
        verdicts.append(inside(found, 0.8, 1.25))
        parts.append(f"{found} at {ratio:g}")
        data[f"{ratio:g}"] = squares
    yield Finding(ROWS, world.name, "S rows", "S rows" if exact else "other", _yes(holds=exact), {})
    yield Finding(SECOND, world.name, "1 at each ratio", ", ".join(parts), worst(verdicts), data)


def averages(
    world: World, state: ServerState, counts: Sequence[int], draws: int, lr: float
) -> Iterator[Finding]:
    """Check how the variance falls with the number of clients; batches are held fixed."""
    ratio = 1 / 4
    samplers: tuple[Sampler, ...] = ("uniform", "nested", "balanced")
    found = {s: variances(world, state, ratio, s, counts, draws, lr) for s in samplers}
    data: dict[str, object] = {"counts": list(counts), "ratio": ratio, **found}
    falls = exponent(counts, found["uniform"])
    yield Finding(VARIANCE, world.name, "−1", str(falls), inside(falls, -1.2, -0.8), data)
    number = round(1 / ratio)  # balanced sets of so many clients cover each rank once
    agreed = agreement(world, state, number, lr)
    for claim, sampler, predicted in (
        (SHARED, "nested", agreed * number),
        (BALANCED, "balanced", (1 - agreed) * number / (number - 1)),
    ):
        place = counts.index(number)
        quotient = found[sampler][place] / found["uniform"][place]
        off = max(quotient / predicted, predicted / quotient)
        yield Finding(
            claim,
            world.name,
            f"{predicted:.3g} (α = {agreed:.3g}, N = {number})",
            f"{quotient:.3g}",
            "confirmed" if off <= 1.25 else "refuted" if off > 1.5 else "undecided",
            {"alpha": agreed, "predicted": predicted, "quotient": quotient},
        )


def agreement(world: World, state: ServerState, number: int, lr: float) -> float:
    """Return α = ‖mean gᵢ‖² / mean ‖gᵢ‖² of the first clients' updates at full rank."""
    tasks = _fixed_batches(tasks_of(world, state, (1.0,), 0, lr=lr)[:number])
    rows = torch.stack([_flat(world.client(task).delta) for task in tasks])
    return float(rows.mean(dim=0).square().sum() / rows.square().sum(dim=1).mean())


def variances(
    world: World,
    state: ServerState,
    ratio: float,
    sampler: Sampler,
    counts: Sequence[int],
    draws: int,
    lr: float,
) -> list[float]:
    """Return Var of the averaged update for each N: the sum over all entries."""
    seen: dict[int, list[Tensor]] = {count: [] for count in counts}
    for draw in range(draws):
        every = tasks_of(world, state, (ratio,), draw, lr=lr, sampler=sampler)
        tasks = _fixed_batches(every[: max(counts)])
        updates = [world.client(task) for task in tasks]
        for count in counts:
            mean, _ = mean_update(state.adapters, state.extras, tasks[:count], updates[:count])
            seen[count].append(_flat(mean))
    return [float(torch.stack(seen[n]).var(dim=0).sum()) for n in counts]


def tasks_of(
    world: World,
    state: ServerState,
    ratios: Ratios,
    draw: int,
    *,
    lr: float,
    steps: int = 0,
    sampler: Sampler = "uniform",
) -> list[ClientTask]:
    """Return the round's tasks with sketches of their own for each draw."""
    local = replace(world.rule, lr=lr, steps=steps or world.rule.steps)
    strategy = fslora(world.deal(ratios), local, sampler=sampler)
    return strategy.assign(replace(state, key=fold_in(world.seed, "draw", draw)), world.clients)


def trained(world: World, rounds: int, lr: float, optimizer: Optimizer = "sgd") -> ServerState:
    """Return the state after some rounds at ratio 1/4."""
    local = replace(world.rule, lr=lr, optimizer=optimizer)
    *_, (state, _) = losses(world, world.strategy((1 / 4,), local), rounds)
    return state


def square(delta: Adapters) -> float:
    """Return ‖Δ‖² over all factors."""
    return sum(float(factor.double().square().sum()) for pair in delta.values() for factor in pair)


def _fixed_batches(tasks: Sequence[ClientTask]) -> list[ClientTask]:
    return [replace(task, key=fold_in(0, task.client_id)) for task in tasks]


def _flat(delta: Adapters) -> Tensor:
    return torch.cat([factor.flatten() for pair in delta.values() for factor in pair]).double()


def _moves(delta: LoRAWeights, given: LoRAWeights) -> bool:
    """Whether every rank moves: B's each, A's each where B is not zero."""
    moved = [(factor != 0).any(dim=1) for factor in delta]
    return bool(moved[1].all()) and bool((moved[0] | (given.lora_b == 0).all(dim=1)).all())


def _yes(*, holds: bool) -> Verdict:
    return "confirmed" if holds else "refuted"
