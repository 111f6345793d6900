"""What a run leaves on disk, written so that a crash at any moment loses at most one round.

``checkpoint/state.safetensors`` holds the whole server state, with a checksum;
``checkpoint/previous.safetensors`` that of the round before, from which a run goes on to the same
bits should the newer one ever be damaged. ``rounds.jsonl`` is appended before them, and cut back to
them on resume.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fslora import disk
from fslora.protocol import Adapters, LoRAWeights, ServerState

_FORMAT = "fslora-state-2"
_WITHOUT_CHECKSUM = "fslora-state-1"  # and with one entry for each client's each tensor
STATE_FILE = Path("checkpoint") / "state.safetensors"
PREVIOUS_FILE = Path("checkpoint") / "previous.safetensors"
RECORDS_FILE = Path("rounds.jsonl")

_Clients = dict[str, dict[str, Tensor]]


class _DamagedError(ValueError):
    """A checkpoint is not what was written."""


def save_state(folder: Path, state: ServerState) -> None:
    """Write the state of a run atomically, and keep the one before.

    Args:
        folder: the run folder.
        state: after a round.

    Raises:
        OSError: it cannot be written; what was there before is intact.
    """
    tensors, ids = _stacked(state.client_state)
    for name, pair in state.adapters.items():
        tensors[f"adapter/{name}/a"], tensors[f"adapter/{name}/b"] = pair
    for name, pair in state.base_residual.items():
        tensors[f"residual/{name}/a"], tensors[f"residual/{name}/b"] = pair
    tensors |= {f"extra/{name}": tensor for name, tensor in state.extras.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in state.optimizer.items()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {"round": str(state.round), "key": str(state.key), "clients": json.dumps(ids)}
    # A gradient's norm is summed in the order of the modules, so that the order is state too.
    header |= {"rejections": json.dumps(state.rejections), "lost": str(state.lost)}
    header |= {"order": json.dumps(list(tensors))}
    header |= {"format": _FORMAT, "checksum": str(_checksum(contiguous, header))}
    data = save(contiguous, metadata=header)
    disk.write_atomically(folder / STATE_FILE, data, keep=folder / PREVIOUS_FILE)


def load_state(folder: Path) -> ServerState:
    """Read the state of a run: the newest one that is whole.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    return _newest(folder)[1]


def resume(folder: Path) -> ServerState | None:
    """Read the newest whole state of a run, and take away what a crash left after it.

    Returns:
        The state, or None if the run was stopped before its first one.

    Raises:
        ValueError: the run has been further, and neither state nor records say how far.
        OSError: it cannot be written.
    """
    recorded = [record["round"] for record in read_records(folder)]
    if not has_state(folder):
        if any(recorded):
            raise ValueError(
                f"{folder} has the records of {max(recorded)} rounds and no checkpoint; restore "
                f"{STATE_FILE} from a copy, or start again with another --out"
            )
        return None
    path, state = _newest(folder)
    if recorded[: state.round + 1] != list(range(state.round + 1)):
        raise ValueError(
            f"{folder / RECORDS_FILE} is damaged: not every round up to {state.round}, which the "
            "checkpoint is of, has its line; restore it from a copy, or start again with another "
            "--out"
        )
    if path.name == PREVIOUS_FILE.name:
        path.replace(folder / STATE_FILE)  # or the damaged one would take the place of the good one
        disk.sync_folder(path.parent)
    cut_records(folder, state.round)
    return state


def has_state(folder: Path) -> bool:
    """Whether a run has got as far as its first checkpoint."""
    return any((folder / name).is_file() for name in (STATE_FILE, PREVIOUS_FILE))


def source(folder: Path) -> dict[str, str]:
    """What round 0 recorded of a run's data and model; nothing before the first checkpoint."""
    records = read_records(folder) if has_state(folder) else []
    found: dict[str, str] = records[0].get("source", {}) if records else {}
    return found


def rounds_done(folder: Path) -> int:
    """The number of the last round that a run recorded; 0 before the first."""
    records = folder / RECORDS_FILE
    if not records.is_file():
        return 0
    return max(records.read_bytes().count(b"\n") - 1, 0)


def newest_round(folder: Path) -> str:
    """Name the newest whole checkpoint of a folder, for a message; nothing if there is none."""
    try:
        return f"the checkpoint of round {load_state(folder).round}"
    except ValueError:
        return ""


def _newest(folder: Path) -> tuple[Path, ServerState]:
    damage = ""
    for path in (folder / STATE_FILE, folder / PREVIOUS_FILE):
        try:
            return path, _read(path)
        except FileNotFoundError:
            continue
        except _DamagedError as error:
            damage = damage or f"the checkpoint {path} cannot be read ({error})"
    if not damage:
        raise ValueError(f"{folder} holds no checkpoint to resume; leave out --resume")
    raise ValueError(f"{damage}; restore it from a copy, or start again with another --out")


def _read(path: Path) -> ServerState:
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise _DamagedError(error) from None
    checksum = header.pop("checksum", None)
    kind = header.pop("format", None)
    if kind not in (_FORMAT, _WITHOUT_CHECKSUM):
        raise ValueError(
            f"{path} has the format {kind!r}, this version reads {_FORMAT!r} and "
            f"{_WITHOUT_CHECKSUM!r}; resume with the version that wrote it"
        )
    if kind == _FORMAT and checksum != str(_checksum(tensors, header)):
        raise _DamagedError("its checksum is wrong")
    order = json.loads(header["order"]) if "order" in header else sorted(tensors)
    tensors = {name: tensors[name] for name in order}
    clients = _under(tensors, "client/")
    return ServerState(
        round=int(header["round"]),
        key=int(header["key"]),
        adapters=_adapters(_under(tensors, "adapter/")),
        extras=_under(tensors, "extra/"),
        optimizer=_under(tensors, "optimizer/"),
        base_residual=_adapters(_under(tensors, "residual/")),
        client_state=_by_client(clients)
        if kind == _WITHOUT_CHECKSUM
        else _unstacked(clients, json.loads(header["clients"])),
        rejections=json.loads(header.get("rejections", "{}")),
        lost=int(header.get("lost", 0)),
    )


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> int:
    total = zlib.crc32(json.dumps(sorted(header.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        if tensor.numel():
            total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def _stacked(clients: _Clients) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Put what is alike of several clients into one tensor: a file of 10,000 entries is slow.

    Returns:
        Entries "client/<number>/<name>" ``[clients, …]``, and for each number the clients' ids.
    """
    alike: dict[tuple[tuple[str, torch.dtype, torch.Size], ...], list[str]] = {}
    for client_id in sorted(clients):
        memory = clients[client_id]
        kind = tuple((name, memory[name].dtype, memory[name].shape) for name in sorted(memory))
        alike.setdefault(kind, []).append(client_id)
    tensors, ids = {}, {}
    for number, (kind, own) in enumerate(alike.items()):
        ids[str(number)] = own
        for name, *_ in kind:
            stacked = torch.stack([clients[client_id][name] for client_id in own])
            tensors[f"client/{number}/{name}"] = stacked
    return tensors, ids


def _unstacked(tensors: dict[str, Tensor], ids: dict[str, list[str]]) -> _Clients:
    clients: _Clients = {client_id: {} for own in ids.values() for client_id in own}
    for entry, stacked in tensors.items():
        number, name = entry.split("/", 1)
        for client_id, tensor in zip(ids[number], stacked, strict=True):
            clients[client_id][name] = tensor
    return clients


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _adapters(tensors: dict[str, Tensor]) -> Adapters:
    names = [name.removesuffix("/a") for name in tensors if name.endswith("/a")]
    return {name: LoRAWeights(tensors[f"{name}/a"], tensors[f"{name}/b"]) for name in names}


def _by_client(tensors: dict[str, Tensor]) -> _Clients:
    """Sort "name/client" by client; names of modules and parameters have no slash, clients may."""
    clients: _Clients = {}
    for entry, tensor in sorted(tensors.items()):
        name, client_id = entry.split("/", 1)
        clients.setdefault(client_id, {})[name] = tensor
    return clients


def append_record(folder: Path, record: dict[str, Any]) -> None:
    """Append one round's line and make sure that it is on disk.

    Raises:
        OSError: it cannot be written; a part of the line may be, which ``read_records`` drops.
    """
    disk.append_line(folder / RECORDS_FILE, json.dumps(record, allow_nan=False))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of ``rounds.jsonl`` up to one that is no record, as of a crash in mid-line."""
    path = folder / RECORDS_FILE
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or "round" not in record:
            break
        records.append(record)
    return records


def cut_records(folder: Path, last_round: int) -> list[dict[str, Any]]:
    """Drop the lines after a round, which a resumed run will write again; return the rest."""
    records = [record for record in read_records(folder) if record["round"] <= last_round]
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    disk.write_atomically(folder / RECORDS_FILE, lines.encode())
    return records
