"""What a run keeps of each round: one line of ``rounds.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fslora.client import download_bytes, head_bytes, upload_bytes
from fslora.clock import Plan, Times
from fslora.faults import SLOWDOWN
from fslora.protocol import ClientTask, ClientUpdate, ranks_of


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


def client_record(
    task: ClientTask, update: ClientUpdate | None, reason: str | None, plan: Plan
) -> ClientRecord:
    """Record one client's part in a round.

    Args:
        task: what it was asked.
        update: what it answered, None if nothing came of it.
        reason: why its answer is not used, None if it is.
        plan: the clock's.
    """
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


def round_record(
    number: int,
    tasks: Sequence[ClientTask],
    records: dict[str, ClientRecord],
    plan: Plan,
    seconds: float,
) -> RoundRecord:
    """Record a round, its evaluation and running total left out.

    Args:
        number: counted from 1.
        tasks: all that were given.
        records: client id to what it did.
        plan: the clock's.
        seconds: that the round took.
    """
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
    pairs = sum(len({*task.sketches, *task.frozen}) for task in tasks)
    return [round(share, 6) for share in (counts.double() / pairs).tolist()]
