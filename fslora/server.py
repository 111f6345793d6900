"""Rounds: cohort → tasks → engine → validation → aggregation → record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from fslora.aggregation import in_task_order
from fslora.clock import CRASHED, FAILED, Clock, Plan
from fslora.errors import StoppedRunError
from fslora.protocol import (
    ClientFn,
    ClientTask,
    ClientUpdate,
    Engine,
    ServerState,
    Strategy,
)
from fslora.records import ClientRecord, RoundRecord, client_record, round_record
from fslora.report.units import format_enough
from fslora.trust import Limits
from fslora.validate import NO_LIMITS, counted, quarantined, rejection
from fslora_kernels.seeds import fold_in

_ABSENT = ("it was not available", FAILED, CRASHED, "it crashed in step")
# Rounds in a row that may be lost to bad luck before a run stops and says why.
_MOST_LOST = 5
_MOST_TOGETHER = 16  # answers that are checked in a row
_PATIENCE = 0.1  # seconds until an answer is checked by itself

_Answer = tuple[ClientTask, ClientUpdate]


class NoUsableUpdateError(StoppedRunError):
    """Every client of a round failed.

    Attributes:
        lost: the round's record, where nobody is to blame: absence, crashes, the deadline.
    """

    def __init__(self, message: str, lost: RoundRecord | None = None) -> None:
        super().__init__(message)
        self.lost = lost


class DivergedError(StoppedRunError):
    """The evaluation loss is no number any more."""


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
    clock: Clock | None = None,
    limits: Limits = NO_LIMITS,
) -> tuple[ServerState, RoundRecord]:
    """Run one round.

    Args:
        state: before the round; not changed.
        strategy: what to assign and how to aggregate.
        engine: how clients are run.
        client: what a client does.
        cohort: the ids of the round's clients.
        on_client: called with each client's record as soon as it is known.
        clock: says who takes part and who answers in time; without one all do.
        limits: what an update is held against, and after how many rejections nobody asks again.

    Returns:
        The next state and the round's record, without its evaluation and running total.

    Raises:
        NoUsableUpdateError: no client's update could be used.
    """
    start = time.perf_counter()
    number = state.round + 1
    present = list(cohort) if clock is None else clock.available(number, cohort)
    tasks = strategy.assign(state, present) if present else []
    plan = Plan() if clock is None else clock.plan(tasks)
    records: dict[str, ClientRecord] = {}
    refused: list[str] = []

    def noted(task: ClientTask, update: ClientUpdate | None, reason: str | None) -> None:
        record = client_record(task, update, reason, plan)
        records[task.client_id] = record
        on_client(record)

    def accepted() -> Iterator[ClientUpdate]:
        for block in _blocks(in_task_order(trained, engine(client, trained))):
            for task, update in block:
                reason = update.failure or rejection(task, update, limits)
                noted(task, None if update.failure else update, reason)
                if reason is None:
                    yield update
                elif update.failure is None:
                    refused.append(task.client_id)

    # Whose work would not be used does not train: the clock knows beforehand.
    trained = [task for task in tasks if task.client_id not in plan.unused]
    for task in tasks:
        if task.client_id in plan.unused:
            noted(task, None, plan.unused[task.client_id])
    unavailable = [client_id for client_id in cohort if client_id not in present]
    asked_nobody = bool(present) and not tasks  # a strategy may: nobody trains
    # Without anybody's answer no optimizer steps, not even by its momentum.
    new_state = strategy.aggregate(state, tasks, accepted()) if trained or asked_nobody else state
    for task in trained:
        if task.client_id not in records:
            noted(task, None, "it did not answer")
    record = round_record(number, tasks, records, plan, time.perf_counter() - start)
    record = replace(record, unavailable=unavailable)
    if not asked_nobody and all(client.rejected for client in record.clients):
        raise _nobody(record, blamed=bool(refused))
    return counted(new_state, refused), record


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
    clock: Clock | None = None,
    limits: Limits = NO_LIMITS,
    sim_seconds: float = 0.0,
) -> Iterator[tuple[ServerState, RoundRecord]]:
    """Yield the state and the record after each round, up to round ``until``.

    Args:
        state: where to begin.
        strategy: as ``run_round``.
        engine: as ``run_round``.
        client: as ``run_round``.
        clients: everybody's id.
        per_round: how many are chosen for a round.
        until: the last round.
        on_client: as ``run_round``.
        clock: as ``run_round``.
        limits: as ``run_round``.
        sim_seconds: what the rounds before have taken on the clock.

    Raises:
        ValueError: more clients a round than clients.
        NoUsableUpdateError: no client's update could be used; what was yielded before stands.
            Rounds that were lost to absence, crashes or the deadline alone are recorded and leave
            the model as it was, unless there are several in a row.
    """
    while state.round < until:
        away = quarantined(state, clients, limits)
        asked = [client_id for client_id in clients if client_id not in away]
        if not asked:
            raise NoUsableUpdateError("every client is in quarantine; raise --quarantine")
        size = min(per_round, len(asked)) if away else per_round
        cohort = draw_cohort(state.key, state.round + 1, asked, size)
        try:
            state, record = run_round(
                state, strategy, engine, client, cohort, on_client, clock, limits
            )
            state = replace(state, lost=0)
        except NoUsableUpdateError as error:
            lost = state.lost + 1
            if error.lost is None or lost == _MOST_LOST:
                raise
            state, record = replace(state, round=state.round + 1, lost=lost), error.lost
        record = replace(record, quarantined=sorted(away))
        if record.sim_seconds is not None:
            sim_seconds += record.sim_seconds
            record = replace(record, sim_seconds_total=sim_seconds)
        yield state, record


def _blocks(answers: Iterable[_Answer]) -> Iterator[list[_Answer]]:
    """Yield a few answers at a time: what is done for several in a row finds warm caches.

    Nobody who watches is kept waiting: an answer that comes late is yielded at once.
    """
    block: list[_Answer] = []
    before = time.perf_counter()
    for answer in answers:
        block.append(answer)
        if len(block) == _MOST_TOGETHER or time.perf_counter() - before > _PATIENCE:
            yield block
            block, before = [], time.perf_counter()
    if block:
        yield block


def _nobody(record: RoundRecord, *, blamed: bool) -> NoUsableUpdateError:
    """The error of a round without a usable update, with the remedy for why it had none."""
    reasons = dict.fromkeys(record.unavailable, "it was not available")
    reasons |= {client.id: client.rejected or "" for client in record.clients}
    remedy = "Lower --lr, set --clip-norm 1, or use --dtype float32"
    late = [
        client.sim_seconds
        for client in record.clients
        if client.sim_seconds and "deadline" in (client.rejected or "")
    ]
    if late:
        remedy = f"Raise --deadline: the fastest of the late needed {format_enough(min(late))} s"
    elif all(reason.startswith(_ABSENT) for reason in reasons.values()):
        remedy = (
            "Raise --per-round or --over-select, lower --faults crash, or give --devices more "
            "availability"
        )
    elif any("memory" in reason for reason in reasons.values()):
        blamed = True
        remedy = "Lower --max-length, or take a smaller model or --dtype bfloat16"
    listed = "; ".join(f"{client_id}: {reason}" for client_id, reason in reasons.items())
    return NoUsableUpdateError(
        f"round {record.round}: no client's update could be used ({listed}). {remedy}",
        None if blamed else record,
    )
