"""Tasks and updates as bytes, for every transport: a JSON header and safetensors, no pickle.

The header holds schema, run, round, client, nonce, and what the schema adds; ``frame`` is the form
of the whole. What comes in is hostile until shown otherwise: keys must be exactly those of the
schema, and the server builds an update from its own task, so that no index set, shape or client id
is taken from the message. What a decoded update must satisfy beyond its form is in ``validate``.
Who has sent a message is the transport's to know (TLS, keys of nodes): a nonce shows that an answer
belongs to a task, not who wrote it.

Sketches do not travel, neither indices nor seed: they stay with the server. A client that draws
anew in every step draws from its task's key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from fslora.frame import TENSORS_BYTES, WireError, pack, unpack
from fslora.protocol import (
    Adapters,
    ClientFn,
    ClientTask,
    ClientUpdate,
    LocalRule,
    LoRAWeights,
    Sketch,
)
from fslora.sketch import draw_steps

TASK = "fslora-task-1"
UPDATE = "fslora-update-1"
_COMMON = ("schema", "run", "round", "client", "nonce")
_PAIRS = ("adapters", "frozen", "residual")
_METRICS = 16


def encode_task(task: ClientTask, run: str) -> bytes:
    """Return a task as it travels to its client.

    Args:
        task: all of it is sent, also what the client may hold already (``held_bytes``).
        run: id of the run.

    Raises:
        ValueError: the task is private, or its header would be longer than 1 MiB.
    """
    if task.private:
        raise ValueError(f"the task of {task.client_id} is private: run it where the server is")
    header = {
        **_address(TASK, run, task.round, task.client_id, task.nonce),
        "key": task.key,
        "scale": float(task.scale),
        "local": asdict(task.local),
        # A gradient's norm is summed in the order of the modules.
        "modules": list(task.adapters),
        "rank": next((sketch.rank for sketch in task.sketches.values()), 0),
    }
    tensors = {f"extra/{name}": tensor for name, tensor in task.extras.items()}
    tensors |= {f"rank_scales/{name}": tensor for name, tensor in task.rank_scales.items()}
    for kind in _PAIRS:
        tensors |= _named(f"{kind}/", getattr(task, kind))
    return pack(header, tensors)


def decode_task(data: bytes, run: str, most_bytes: int = TENSORS_BYTES) -> ClientTask:
    """Read a task on the client; its sketches stay with the server.

    Raises:
        WireError: it is no task of this run, or larger than ``most_bytes``.
    """
    header, tensors = unpack(
        data, (*_COMMON, "key", "scale", "local", "modules", "rank"), most_bytes
    )
    _expect(header, schema=TASK, run=run)
    if type(header["client"]) is not str or not _finite(header["scale"]):
        raise WireError("its client or its scale is of the wrong type")
    for name in ("round", "nonce", "key", "rank"):
        if type(header[name]) is not int or not 0 <= header[name] < 1 << 63:
            raise WireError(f"its {name} is not a whole number below 2⁶³")
    groups: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*_PAIRS, "extra", "rank_scales")}
    for name, tensor in tensors:
        kind, _, rest = name.partition("/")
        if kind not in groups:
            raise WireError(f"it has a tensor {name[:200]!r} that no task has")
        groups[kind][rest] = tensor
    pairs = {kind: _pairs(groups[kind]) for kind in _PAIRS}
    modules = header["modules"]
    strings = type(modules) is list and all(type(name) is str for name in modules)
    if not strings or sorted(modules) != sorted(pairs["adapters"]):
        raise WireError("its modules are not those that its tensors are of")
    adapters = {name: pairs["adapters"][name] for name in modules}
    local = _local_rule(header["local"])
    return ClientTask(
        round=header["round"],
        client_id=header["client"],
        extras=groups["extra"],
        sketches=_redrawn(header["key"], adapters, header["rank"], local),
        local=local,
        key=header["key"],
        nonce=header["nonce"],
        scale=header["scale"],
        rank_scales=groups["rank_scales"],
        adapters=adapters,
        frozen=pairs["frozen"],
        residual=pairs["residual"],
    )


def encode_update(update: ClientUpdate, run: str) -> bytes:
    """Return an update as it travels to the server; factors that were not trained do not."""
    header = {
        **_address(UPDATE, run, update.round, update.client_id, update.nonce),
        "examples": update.num_examples,
        "metrics": {
            name: float(value) if math.isfinite(value) else None
            for name, value in update.metrics.items()
        },
    }
    factors = {n: t for n, t in _named("delta/", update.delta).items() if t.shape[0]}
    return pack(
        header, factors | {f"extra/{name}": tensor for name, tensor in update.extras.items()}
    )


def decode_update(data: bytes, task: ClientTask, run: str) -> ClientUpdate:
    """Read the answer to a task on the server.

    Args:
        data: as it came.
        task: the server's own copy of what it asked.
        run: id of the run.

    Raises:
        WireError: it is no answer to this task, or larger than one can be.
    """
    wanted = _expected(task)
    header, found = unpack(data, (*_COMMON, "examples", "metrics"), _most_bytes(wanted))
    _expect(header, **_address(UPDATE, run, task.round, task.client_id, task.nonce))
    if type(header["examples"]) is not int:
        raise WireError("its number of examples is not a whole number")
    tensors = dict(found)
    if tensors.keys() != wanted.keys():
        raise WireError("its tensors are not those that were asked for")
    return ClientUpdate(
        round=task.round,
        client_id=task.client_id,
        nonce=task.nonce,
        delta={
            name: LoRAWeights(
                *(
                    tensors.get(f"delta/{name}/{factor}", given[:0])
                    for factor, given in zip("ab", pair, strict=True)
                )
            )
            for name, pair in task.adapters.items()
        },
        extras={name: tensors[f"extra/{name}"] for name in task.extras},
        num_examples=header["examples"],
        metrics=_metrics(header["metrics"]),
    )


def answered(data: bytes, client: ClientFn, run: str, most_bytes: int = TENSORS_BYTES) -> bytes:
    """The client's side: a task's bytes to its update's.

    Raises:
        WireError: as ``decode_task``.
    """
    return encode_update(client(decode_task(data, run, most_bytes)), run)


def received(data: bytes, task: ClientTask, run: str) -> ClientUpdate:
    """The server's side: whatever came in answer to a task, as an update; never raises.

    One that cannot be read says why in ``refused``, and is rejected with that reason.
    """
    try:
        return decode_update(data, task, run)
    except WireError as error:
        return ClientUpdate(
            task.round, task.client_id, task.nonce, {}, {}, 0, {}, refused=str(error)
        )


def _address(schema: str, run: str, number: int, client: str, nonce: int) -> dict[str, Any]:
    return dict(zip(_COMMON, (schema, run, number, client, nonce), strict=True))


def _expect(header: Mapping[str, Any], **wanted: object) -> None:
    """Refuse another run, round, client or nonce; ``True`` is not 1."""
    for name, value in wanted.items():
        if type(header[name]) is not type(value) or header[name] != value:
            raise WireError(f"its {name} is another one: it answers no task that was given")


def _expected(task: ClientTask) -> dict[str, Tensor]:
    """The tensors that an answer has, by name, each with the one that it changes."""
    tensors = {f"extra/{name}": tensor for name, tensor in task.extras.items()}
    for name, pair in task.adapters.items():
        for factor, given, trained in zip("ab", pair, task.local.trained, strict=True):
            if trained:
                tensors[f"delta/{name}/{factor}"] = given
    return tensors


def _most_bytes(tensors: Mapping[str, Tensor]) -> int:
    """How long their safetensors can be: each with its entry in the header."""
    return 1024 + sum(6 * len(name.encode()) + 256 + t.nbytes for name, t in tensors.items())


def _named(prefix: str, adapters: Adapters) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}/{factor}": tensor
        for name, pair in adapters.items()
        for factor, tensor in zip("ab", pair, strict=True)
    }


def _pairs(tensors: Mapping[str, Tensor]) -> Adapters:
    """Put "module/a" and "module/b" together."""
    names = {name.rpartition("/")[0] for name in tensors}
    if tensors.keys() != {f"{name}/{factor}" for name in names for factor in "ab"}:
        raise WireError("its factors do not come in pairs")
    pairs = {n: LoRAWeights(tensors[f"{n}/a"], tensors[f"{n}/b"]) for n in sorted(names)}
    for name, (lora_a, lora_b) in pairs.items():
        if lora_a.ndim != 2 or lora_b.ndim != 2 or len(lora_a) != len(lora_b):
            raise WireError(f"{name[:200]!r} is no pair of factors of one rank")
    return pairs


def _redrawn(key: int, adapters: Adapters, rank: int, local: LocalRule) -> dict[str, Sketch]:
    """Draw the sketches that a client draws itself; those that it does not are the server's."""
    if not local.redrawn_ranks:
        return {}
    try:
        drawn = draw_steps(key, list(adapters), rank, local.redrawn_ranks, local.steps)
    except ValueError as error:
        raise WireError(str(error)) from None
    unions = {name: torch.unique(drawn[:, place]) for place, name in enumerate(adapters)}
    if any(len(unions[name]) != pair.rank for name, pair in adapters.items()):
        raise WireError("its factors have not the ranks that its steps draw")
    return {name: Sketch(index, rank) for name, index in unions.items()}


def _metrics(found: object) -> dict[str, float]:
    """Read metrics: finite numbers, or null for what was no finite number."""
    if not isinstance(found, dict) or len(found) > _METRICS:
        raise WireError("its metrics are not a short table of numbers")
    if not all(value is None or _finite(value) for value in found.values()):
        raise WireError("its metrics are not numbers")
    return {name: math.nan if value is None else value for name, value in found.items()}


def _finite(value: object) -> bool:
    return type(value) is float and math.isfinite(value)


def _local_rule(found: object) -> LocalRule:
    """Read how to train: every field, each of its type."""
    hints = get_type_hints(LocalRule)
    if not isinstance(found, dict) or found.keys() != {item.name for item in fields(LocalRule)}:
        raise WireError("its rule of training has not the fields that it must have")
    for name, value in found.items():
        kind = hints[name]
        allowed = get_args(kind)
        number = kind is float and type(value) is int
        if not (value in allowed if allowed else type(value) is kind or number):
            raise WireError(f"its {name} cannot be {str(value)[:200]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise WireError(f"its {name} is not finite")
    try:
        return LocalRule(**found)
    except ValueError as error:
        raise WireError(str(error)) from None
