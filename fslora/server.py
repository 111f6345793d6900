"""Rounds: cohort → tasks → engine → validation → aggregation → record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from fslora.aggregation import in_task_order
from fslora.client import payload_bytes
from fslora.protocol import ClientFn, ClientTask, ClientUpdate, Engine, ServerState, Strategy
from fslora.validate import rejection
from fslora_kernels.seeds import fold_in


class NoUsableUpdateError(RuntimeError):
    """Every client of a round failed; the state before the round is the last good one."""


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """What one client did in one round.

    Attributes:
        id: who.
        ratio: S/R of its sketch; 0 where no adapter travels.
        bytes_up: sent by the client, head included; 0 if nothing usable came.
        bytes_down: sent to the client, head included.
        examples: distinct examples it has.
        loss: mean training loss.
        rejected: why its update was not used, or None.
    """

    id: str
    ratio: float
    bytes_up: int
    bytes_down: int
    examples: int
    loss: float | None
    rejected: str | None


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One line of ``rounds.jsonl``. Losses in nats, bytes summed over the cohort.

    Attributes:
        round: counted from 1; 0 is the evaluation before training.
        train_loss: mean over the accepted clients.
        eval_loss: of the whole adapter (Ω = I).
        eval_metric: of the whole adapter.
        eval_loss_sketched: under sketches like the cohort's.
        eval_loss_by_ratio: of the whole adapter on the held-out text of the clients of each
            ratio, in the rounds where it was measured.
        bytes_up: clients to server.
        bytes_down: server to clients.
        adapter_bytes_up: the adapters' part of it.
        adapter_bytes_down: the adapters' part of it.
        head_bytes_up: the heads' part of it.
        head_bytes_down: the heads' part of it.
        wall_seconds: of the round, its evaluation not included.
        coverage: for each rank the share of (accepted client, module) pairs that trained it.
        clients: in task order.
    """

    round: int
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_metric: float | None = None
    eval_loss_sketched: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    adapter_bytes_up: int = 0
    adapter_bytes_down: int = 0
    head_bytes_up: int = 0
    head_bytes_down: int = 0
    eval_loss_by_ratio: dict[str, float] = field(default_factory=dict)
    wall_seconds: float = 0.0
    coverage: list[float] = field(default_factory=list)
    clients: list[ClientRecord] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """Return it as plain values for one JSON object."""
        return asdict(self)


def draw_cohort(seed: int, round_number: int, clients: Sequence[str], per_round: int) -> list[str]:
    """Draw the clients of a round, uniformly without replacement, in the registry's order.

    Raises:
        ValueError: more clients a round than clients.
    """
    if not 1 <= per_round <= len(clients):
        raise ValueError(
            f"{per_round} clients a round are asked for, but there are {len(clients)}; "
            f"choose per_round between 1 and {len(clients)}"
        )
    generator = np.random.default_rng(fold_in(seed, "cohort", round_number))
    chosen = np.sort(generator.choice(len(clients), per_round, replace=False))
    return [clients[position] for position in chosen]


def run_round(
    state: ServerState,
    strategy: Strategy,
    engine: Engine,
    client: ClientFn,
    cohort: Sequence[str],
    on_client: Callable[[ClientRecord], None] = lambda _: None,
) -> tuple[ServerState, RoundRecord]:
    """Run one round.

    Args:
        state: before the round; not changed.
        strategy: what to assign and how to aggregate.
        engine: how clients are run.
        client: what a client does.
        cohort: the ids of the round's clients.
        on_client: called with each client's record as soon as it is known.

    Returns:
        The next state and the round's record, without its evaluation.

    Raises:
        NoUsableUpdateError: no client's update could be used.
    """
    start = time.perf_counter()
    tasks = strategy.assign(state, cohort)
    records: dict[str, ClientRecord] = {}

    def accepted() -> Iterator[ClientUpdate]:
        for task, update in in_task_order(tasks, engine(client, tasks)):
            reason = rejection(task, update)
            records[task.client_id] = _client_record(task, update, reason)
            on_client(records[task.client_id])
            if reason is None:
                yield update

    new_state = strategy.aggregate(state, tasks, accepted())
    for task in tasks:
        if task.client_id not in records:
            records[task.client_id] = _client_record(task, None, "it did not answer")
    used = [record for record in records.values() if record.rejected is None]
    if not used:
        reasons = "; ".join(f"{record.id}: {record.rejected}" for record in records.values())
        raise NoUsableUpdateError(
            f"round {state.round + 1}: no client's update could be used ({reasons}). "
            "Lower --lr, set --clip-norm 1, or use --dtype float32"
        )
    return new_state, _round_record(tasks, records, time.perf_counter() - start)


def rounds(
    state: ServerState,
    strategy: Strategy,
    engine: Engine,
    client: ClientFn,
    clients: Sequence[str],
    *,
    per_round: int,
    until: int,
    on_client: Callable[[ClientRecord], None] = lambda _: None,
) -> Iterator[tuple[ServerState, RoundRecord]]:
    """Yield the state and the record after each round, up to round ``until``.

    Raises:
        ValueError: more clients a round than clients.
        NoUsableUpdateError: no client's update could be used; what was yielded before stands.
    """
    while state.round < until:
        cohort = draw_cohort(state.key, state.round + 1, clients, per_round)
        state, record = run_round(state, strategy, engine, client, cohort, on_client)
        yield state, record


def _client_record(
    task: ClientTask, update: ClientUpdate | None, reason: str | None
) -> ClientRecord:
    sketch = next(iter(task.sketches.values()), None)
    loss = None if update is None else update.metrics.get("loss")
    return ClientRecord(
        id=task.client_id,
        ratio=0.0 if sketch is None else sketch.size / sketch.rank,
        bytes_up=0 if update is None else sum(payload_bytes(update.delta, update.extras)),
        bytes_down=sum(payload_bytes(task.adapters, task.extras)),
        examples=0 if update is None else update.num_examples,
        loss=loss if loss is not None and np.isfinite(loss) else None,
        rejected=reason,
    )


def _round_record(
    tasks: Sequence[ClientTask], records: dict[str, ClientRecord], seconds: float
) -> RoundRecord:
    answered = [task for task in tasks if records[task.client_id].bytes_up]
    used = [task for task in tasks if records[task.client_id].rejected is None]
    down, up = _split(tasks), _split(answered)
    losses = [loss for task in used if (loss := records[task.client_id].loss) is not None]
    return RoundRecord(
        round=tasks[0].round,
        train_loss=sum(losses) / len(losses),
        bytes_up=sum(up),
        bytes_down=sum(down),
        adapter_bytes_up=up[0],
        adapter_bytes_down=down[0],
        head_bytes_up=up[1],
        head_bytes_down=down[1],
        wall_seconds=seconds,
        coverage=_coverage(used),
        clients=[records[task.client_id] for task in tasks],
    )


def _split(tasks: Iterable[ClientTask]) -> tuple[int, int]:
    """Adapter and head bytes of tasks, or of their answers, which have the same shapes."""
    sizes = [payload_bytes(task.adapters, task.extras) for task in tasks]
    return sum(adapter for adapter, _ in sizes), sum(head for _, head in sizes)


def _coverage(tasks: Sequence[ClientTask]) -> list[float]:
    sketches = [sketch for task in tasks for sketch in task.sketches.values()]
    if not sketches:
        return []
    counts = np.zeros(sketches[0].rank)
    for sketch in sketches:
        counts[slice(None) if sketch.index is None else sketch.index.numpy()] += 1
    return [round(float(share), 6) for share in counts / len(sketches)]
