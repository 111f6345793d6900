"""What an experiment runs on: clients, a first state, a loss; and how far a run of it comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fslora.engines import sequential
from fslora.protocol import ClientFn, LocalRule, ServerState, Strategy
from fslora.server import NoUsableUpdateError, rounds
from fslora.strategies import STRATEGIES

STABLE_WITHIN = 1.05  # of the loss at the start: what a stable run never exceeds

Ratios = tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """A federated problem, small enough to be run hundreds of times.

    Attributes:
        name: of the setting.
        seed: of everything random in it.
        clients: their ids.
        first: the state that every run starts from.
        client: what a client does.
        loss: of the whole adapter (Ω = I).
        rule: the clients' local training, of which experiments change the step size.
    """

    name: str
    seed: int
    clients: tuple[str, ...]
    first: ServerState
    client: ClientFn
    loss: Callable[[ServerState], float]
    rule: LocalRule

    @property
    def rank(self) -> int:
        """R."""
        return next(iter(self.first.adapters.values())).rank

    def deal(self, ratios: Ratios) -> dict[str, float]:
        """Give the ratios to the clients in turn.

        Raises:
            ValueError: some ratios would have more clients than others.
        """
        if len(self.clients) % len(ratios):
            raise ValueError(f"{len(self.clients)} clients do not share {len(ratios)} ratios")
        return {name: ratios[n % len(ratios)] for n, name in enumerate(self.clients)}

    def strategy(self, ratios: Ratios, local: LocalRule, name: str = "fslora") -> Strategy:
        """Build one of the project's strategies; ``fslora/full/count`` names fslora's options."""
        kind, *options = name.split("/")
        named: dict[str, Any] = dict(zip(("forward", "averaging"), options, strict=False))
        if kind == "hetlora":
            named["penalty"] = 0.0  # plain zero padding
        return STRATEGIES[kind](self.deal(ratios), local, **named)


def losses(world: World, strategy: Strategy, until: int) -> Iterator[tuple[ServerState, float]]:
    """Yield state and loss after each round; a run that diverges ends with an infinite loss."""
    state, clients = world.first, list(world.clients)
    run = rounds(
        state,
        strategy,
        sequential,
        world.client,
        clients,
        per_round=len(clients),
        until=until,
    )
    try:
        for state, _ in run:
            loss = world.loss(state)
            if not math.isfinite(loss):
                break
            yield state, loss
        else:
            return
    except NoUsableUpdateError:
        pass
    yield state, math.inf


def rounds_to(world: World, strategy: Strategy, target: float, limit: int) -> int | None:
    """Return the first round whose loss is at most the target; None within the limit."""
    for number, (_, loss) in enumerate(losses(world, strategy, limit), start=1):
        if loss <= target:
            return number
    return None


def inverse(world: World, ratios: Ratios) -> float:
    """Return mean(R/S)."""
    return sum(1 / ratio for ratio in world.deal(ratios).values()) / len(world.clients)


def share(ratios: Sequence[float]) -> float:
    """Return mean(S/R)."""
    return sum(ratios) / len(ratios)
