"""Rounds: cohort → tasks → engine → validation → aggregation → record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fslora.aggregation import in_task_order
from fslora.client import download_bytes, head_bytes, upload_bytes
from fslora.clock import CRASHED, FAILED, Clock, Plan, Times
from fslora.errors import StoppedRunError
from fslora.faults import SLOWDOWN
from fslora.protocol import (
    ClientFn,
    ClientTask,
    ClientUpdate,
    Engine,
    ServerState,
    Strategy,
    ranks_of,
)
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


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """What one client did in one round.

    Attributes:
        id: who.
        ratio: S/R of its sketch, in each step; 0 where no adapter travels.
        bytes_up: sent by the client, used or not, head included.
        bytes_down: sent to the client, head included.
        examples: distinct examples it has.
        loss: mean training loss.
        rejected: why its update was not used, or None.
        device: name of its class, None without ``--devices``.
        sim_seconds: what the round takes it, or would have taken, the round trip included; the
            parts of it follow.
        sim_down_seconds: receiving.
        sim_compute_seconds: training.
        sim_up_seconds: sending.
        fault: what went wrong although it answered; left out of the file where nothing did.
    """

    id: str
    ratio: float
    bytes_up: int
    bytes_down: int
    examples: int
    loss: float | None
    rejected: str | None
    device: str | None = None
    sim_seconds: float | None = None
    sim_down_seconds: float | None = None
    sim_compute_seconds: float | None = None
    sim_up_seconds: float | None = None
    fault: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return it as plain values for one JSON object."""
        values = _values(self)
        if self.fault is None:
            del values["fault"]
        return values


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
        effective_rank: participation rank of what the base weights gain, mean over modules.
        clients: in task order.
        sim_seconds: of the round on the clients' devices; None without ``--devices``.
        sim_seconds_total: of all rounds so far.
        unavailable: who was chosen but did not take part; nothing was sent to them.
        quarantined: who was not asked, for what it had sent before.
        epsilon: ε of the differential privacy spent so far; None without ``--dp-noise``.
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
    effective_rank: float | None = None
    clients: list[ClientRecord] = field(default_factory=list)
    sim_seconds: float | None = None
    sim_seconds_total: float | None = None
    unavailable: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    epsilon: float | None = None

    def to_json(self) -> dict[str, object]:
        """Return it as plain values for one JSON object."""
        return _values(self) | {"clients": [client.to_json() for client in self.clients]}


def _values(record: ClientRecord | RoundRecord) -> dict[str, object]:
    # dataclasses.asdict copies all values, which takes as long as to write them.
    return {name: getattr(record, name) for name in record.__slots__}


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
        record = _client_record(task, update, reason, plan)
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
    record = _round_record(number, tasks, records, plan, time.perf_counter() - start)
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


def _client_record(
    task: ClientTask, update: ClientUpdate | None, reason: str | None, plan: Plan
) -> ClientRecord:
    sketch = next(iter(task.sketches.values()), None)
    loss = None if update is None else update.metrics.get("loss")
    sent = update is not None or task.client_id in plan.wasted
    times = plan.times.get(task.client_id)
    return ClientRecord(
        id=task.client_id,
        ratio=0.0 if sketch is None else (task.local.redrawn_ranks or sketch.size) / sketch.rank,
        bytes_up=sum(upload_bytes(task)) if sent else 0,
        bytes_down=sum(download_bytes(task)),
        examples=0 if update is None else update.num_examples,
        loss=loss if loss is not None and math.isfinite(loss) else None,
        rejected=reason,
        device=None if times is None else times.device,
        sim_seconds=None if times is None else times.seconds,
        sim_down_seconds=None if times is None else times.down_seconds,
        sim_compute_seconds=None if times is None else times.compute_seconds,
        sim_up_seconds=None if times is None else times.up_seconds,
        fault=_fault(update, times),
    )


def _fault(update: ClientUpdate | None, times: Times | None) -> str | None:
    found = []
    if update is not None and "pieces" in update.metrics:
        pieces = update.metrics["pieces"]
        found.append(f"it ran out of memory, and computed each batch in {pieces:.0f} pieces")
    if times is not None and times.slowed:
        found.append(f"it was {SLOWDOWN} times as slow as its device")
    return "; ".join(found) or None


def _round_record(
    number: int,
    tasks: Sequence[ClientTask],
    records: dict[str, ClientRecord],
    plan: Plan,
    seconds: float,
) -> RoundRecord:
    clients = [records[task.client_id] for task in tasks]
    sent = [task for task, client in zip(tasks, clients, strict=True) if client.bytes_up]
    used = [task for task, client in zip(tasks, clients, strict=True) if client.rejected is None]
    losses = [c.loss for c in clients if c.rejected is None and c.loss is not None]
    up, head_up = sum(client.bytes_up for client in clients), sum(map(head_bytes, sent))
    down, head_down = sum(client.bytes_down for client in clients), sum(map(head_bytes, tasks))
    return RoundRecord(
        round=number,
        train_loss=sum(losses) / len(losses) if losses else None,
        bytes_up=up,
        bytes_down=down,
        adapter_bytes_up=up - head_up,
        adapter_bytes_down=down - head_down,
        head_bytes_up=head_up,
        head_bytes_down=head_down,
        wall_seconds=seconds,
        coverage=_coverage(used),
        clients=clients,
        sim_seconds=plan.seconds,
    )


def _coverage(tasks: Sequence[ClientTask]) -> list[float]:
    drawn = [task.sketches for task in tasks if task.sketches]
    if not drawn:
        return []
    rank = next(iter(drawn[0].values())).rank
    counts = torch.cat([ranks_of(own, own) for own in drawn]).bincount(minlength=rank)
    pairs = sum(len(task.sketches.keys() | task.frozen.keys()) for task in tasks)
    return [round(share, 6) for share in (counts.double() / pairs).tolist()]
