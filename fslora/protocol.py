"""What travels between server, engine and client, and the three shapes that code plugs into.

Everything here is frozen data; a strategy is three pure functions over it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fslora_kernels import Adapters, LoRAWeights, check_index

__all__ = [
    "POOLED",
    "Adapters",
    "ClientFn",
    "ClientTask",
    "ClientUpdate",
    "Engine",
    "Extras",
    "LoRAWeights",
    "LocalRule",
    "ServerState",
    "Sketch",
    "Sketches",
    "Strategy",
    "ranks_of",
]

POOLED = "all clients"
"""The id of the one client that has everybody's data."""

Extras = dict[str, Tensor]
"""What is trained beside the adapters, whole: classification heads, by parameter name."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """Which ranks of one module a client works on; A and B share it.

    Attributes:
        index: int64 ``[S]``, ascending; None means every rank.
        rank: R, the rank of the global adapter.
        probability: float64 ``[S]``, with which each rank of the index trains in a step; None is
            S/R.
    """

    index: Tensor | None
    rank: int
    probability: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse an index set that does not fit the rank."""
        if self.index is not None:
            check_index(self.index, self.rank)

    @property
    def size(self) -> int:
        """S, how many ranks are used."""
        return self.rank if self.index is None else int(self.index.shape[0])

    @property
    def rows(self) -> Tensor:
        """The ranks that are used, int64 ``[S]``."""
        return torch.arange(self.rank) if self.index is None else self.index

    @property
    def correction(self) -> float:
        """R / S, which makes the sketched adapter right on average."""
        return self.rank / self.size

    @property
    def inverse_probability(self) -> Tensor:
        """1/π of each rank of the index, float64 ``[S]``."""
        if self.probability is None:
            return torch.full((self.size,), self.correction, dtype=torch.float64)
        return 1 / self.probability

    def thinned(self, share: float) -> Sketch:
        """Return the same ranks, of a module that is trained with a probability of its own."""
        if share == 1.0:
            return self
        own = self.probability
        if own is None:
            own = torch.full((self.size,), 1 / self.correction, dtype=torch.float64)
        return replace(self, probability=share * own)


class Sketches(Mapping[str, Sketch]):
    """A client's sketches of several modules, all of one size, in one tensor.

    Attributes:
        names: of the modules.
        index: int64 ``[modules, S]``, each row as ``Sketch.index``, checked when it is asked for;
            None means every rank.
        rank: R.
    """

    __slots__ = ("index", "names", "rank")

    def __init__(self, names: tuple[str, ...], index: Tensor | None, rank: int) -> None:
        self.names = names
        self.index = index
        self.rank = rank

    def __getitem__(self, name: str) -> Sketch:
        """Return a module's sketch."""
        if name not in self.names:
            raise KeyError(name)
        own = None if self.index is None else self.index[self.names.index(name)]
        return Sketch(own, self.rank)

    @property
    def size(self) -> int:
        """S, how many ranks are used in each module."""
        return self.rank if self.index is None else int(self.index.shape[1])

    def __contains__(self, name: object) -> bool:
        """Whether there is such a module."""
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        """Iterate over the modules' names."""
        return iter(self.names)

    def __len__(self) -> int:
        """How many modules there are."""
        return len(self.names)


def ranks_of(sketches: Mapping[str, Sketch], names: Collection[str]) -> Tensor:
    """Return the ranks of modules, one module after the other, int64 ``[ΣS]``."""
    if isinstance(sketches, Sketches) and sketches.names == tuple(names):
        if sketches.index is None:
            return torch.arange(sketches.rank).repeat(len(names))
        return sketches.index.flatten()
    return torch.cat([sketches[name].rows for name in names])


@dataclass(frozen=True, slots=True)
class LocalRule:
    """What a strategy asks of a client's local training.

    Attributes:
        optimizer: "adamw" or "sgd".
        lr: learning rate.
        steps: H, optimizer steps in one round.
        batch_size: examples in one batch.
        accumulation: batches in one optimizer step.
        pieces: in which a batch is computed, one after the other, to save memory; the gradient is
            the batch's but for rounding.
        clip_norm: the gradient's norm is clipped to this; 0 does not clip.
        weight_decay: decoupled for AdamW.
        momentum: of SGD.
        trainable: which factors are trained; the other one is in the forward and does not travel
            back.
        penalty: λ, times Σ over modules of ‖B[:, j:]‖ ‖A[j:]‖ (Frobenius) is added to the loss.
        penalty_from: j, the first rank that is penalised.
        redrawn_ranks: S: of the rows that it has, a client trains in each step the ranks that
            ``sketch.draw_steps`` draws anew; 0: all of them in every step.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    steps: int = 10
    batch_size: int = 8
    accumulation: int = 1
    pieces: int = 1
    clip_norm: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    trainable: Literal["both", "a", "b"] = "both"
    penalty: float = 0.0
    penalty_from: int = 0
    redrawn_ranks: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        for name in ("steps", "batch_size", "accumulation", "pieces"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        for name in ("clip_norm", "weight_decay", "momentum", "penalty", "penalty_from"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.redrawn_ranks and (self.trainable != "both" or self.penalty):
            raise ValueError("a new sketch for every step is of both factors and has no penalty")

    @property
    def trained(self) -> tuple[bool, bool]:
        """Whether A is trained, and whether B is."""
        return self.trainable != "b", self.trainable != "a"


@dataclass(frozen=True, slots=True)
class ClientTask:
    """What one client is asked to do in one round; the server keeps it until the answer is in.

    Attributes:
        round: counted from 1.
        client_id: who.
        adapters: module name to the client's compact factors ``[S, D]`` and ``[S, E]``.
        extras: heads, whole.
        sketches: module name to the ranks that the factors are; the server's own copy is what
            an answer is applied by.
        local: how to train.
        key: of the client's batches, of what its model draws, and of the sketches of its steps.
        nonce: echoed by the answer.
        scale: of the client's delta, relative to the global adapter's own α/R: R/S where the
            sketch is corrected for, else 1.
        rank_scales: module name to a scale for each rank, ``[S]``, in place of ``scale``, where
            the ranks of a sketch were not drawn alike: 1/π.
        frozen: ranks that are in the client's forward beside its own and are not trained; of
            modules that are not in ``adapters``, all that there are.
        residual: what the base weights have gained, as ``ServerState.base_residual``.
        held_bytes: how much of the adapters, frozen and residual the client has already, from an
            earlier round or from the seed, so that it does not travel.
        private: nothing travels, neither way: client and server are one.
    """

    round: int
    client_id: str
    adapters: Adapters
    extras: Extras
    sketches: Mapping[str, Sketch]
    local: LocalRule
    key: int
    nonce: int
    scale: float = 1.0
    rank_scales: dict[str, Tensor] = field(default_factory=dict)
    frozen: Adapters = field(default_factory=dict)
    residual: Adapters = field(default_factory=dict)
    held_bytes: int = 0
    private: bool = False


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """What a client answers: its change, in the shapes that it was given.

    Attributes:
        round: of the task.
        client_id: of the task.
        nonce: of the task.
        delta: module name to trained minus received factors; a factor that is not trained has no
            rows, because it does not travel.
        extras: trained minus received heads.
        num_examples: distinct examples that the client has.
        metrics: "loss", the mean training loss; "pieces", in how many it had to compute each batch
            for want of memory; more where a client reports more.
        failure: why there is no change; then all the rest is empty.
        refused: why what came in could not be read as an update, None for one that was.
    """

    round: int
    client_id: str
    nonce: int
    delta: Adapters
    extras: Extras
    num_examples: int
    metrics: dict[str, float]
    failure: str | None = None
    refused: str | None = None

    def tensors(self) -> list[Tensor]:
        """Return the whole change: each module's A and B, then the heads."""
        return [factor for pair in self.delta.values() for factor in pair] + [*self.extras.values()]


@dataclass(frozen=True, slots=True)
class ServerState:
    """All that a server needs to go on.

    Attributes:
        round: rounds finished.
        adapters: module name to the global factors ``[R, D]`` and ``[R, E]``.
        extras: heads.
        optimizer: the server optimizer's tensors.
        key: the run's seed.
        base_residual: module name to a low-rank pair ``[K, D]`` and ``[K, E]``: the base weight is
            W₀ plus the adapter's own scaling α/R times its product.
        client_state: client id to what the server remembers of it, by name; only of clients that
            have taken part, and only where a strategy needs it. Under ``POOLED`` what it counts of
            them all.
        rejections: client id to how many of its updates were no use, of those with any.
        lost: rounds in a row, up to this one, that nobody's update came of.
    """

    round: int
    adapters: Adapters
    extras: Extras
    key: int
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    base_residual: Adapters = field(default_factory=dict)
    client_state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rejections: dict[str, int] = field(default_factory=dict)
    lost: int = 0


class Strategy(NamedTuple):
    """A federated algorithm as three pure functions.

    Attributes:
        init: adapters, heads and seed to the first state.
        assign: a state and the cohort's ids to one task each.
        aggregate: a state, its tasks, and the accepted updates in task order, to the next state.
        evaluated: a state to those whose mean score is the strategy's: itself, but where every
            client has a model of its own.
    """

    init: Callable[[Adapters, Extras, int], ServerState]
    assign: Callable[[ServerState, Sequence[str]], list[ClientTask]]
    aggregate: Callable[[ServerState, Sequence[ClientTask], Iterable[ClientUpdate]], ServerState]
    evaluated: Callable[[ServerState], list[ServerState]] = lambda state: [state]


ClientFn = Callable[[ClientTask], ClientUpdate]


class Engine(Protocol):
    """Runs clients; updates may come back in any order."""

    def __call__(self, client: ClientFn, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate]:
        """Yield one update for each task."""
        ...
