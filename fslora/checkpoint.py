"""What a run leaves on disk, written so that a crash at any moment loses at most one round.

``checkpoint/state.safetensors`` holds the whole server state in one file that is replaced
atomically; ``rounds.jsonl`` is appended before it, and cut back to it on resume.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fslora.protocol import Adapters, LoRAWeights, ServerState

_FORMAT = "fslora-state-1"
STATE_FILE = Path("checkpoint") / "state.safetensors"
RECORDS_FILE = Path("rounds.jsonl")


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file by new content in one step: readers see the old or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def save_state(folder: Path, state: ServerState) -> None:
    """Write the state of a run atomically.

    Args:
        folder: the run folder.
        state: after a round.

    Raises:
        OSError: it cannot be written; what was there before is intact.
    """
    tensors: dict[str, Tensor] = {}
    for name, pair in state.adapters.items():
        tensors[f"adapter/{name}/a"], tensors[f"adapter/{name}/b"] = pair
    for name, pair in state.base_residual.items():
        tensors[f"residual/{name}/a"], tensors[f"residual/{name}/b"] = pair
    for client_id, memory in state.client_state.items():
        tensors |= {f"client/{name}/{client_id}": tensor for name, tensor in memory.items()}
    tensors |= {f"extra/{name}": tensor for name, tensor in state.extras.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in state.optimizer.items()}
    tensors |= {f"rejections/{c}": torch.tensor(n) for c, n in state.rejections.items()}
    header = {"format": _FORMAT, "round": str(state.round), "key": str(state.key)}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / STATE_FILE, save(contiguous, metadata=header))


def load_state(folder: Path) -> ServerState:
    """Read the state of a run.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no checkpoint to resume; leave out --resume")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ValueError(
                    f"{path} has the format {header.get('format')!r}, this version reads "
                    f"{_FORMAT!r}; resume with the version that wrote it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"the checkpoint {path} cannot be read ({error}); restore it from a copy, or start "
            "again with another --out"
        ) from None
    return ServerState(
        round=int(header["round"]),
        key=int(header["key"]),
        adapters=_adapters(_under(tensors, "adapter/")),
        extras=_under(tensors, "extra/"),
        optimizer=_under(tensors, "optimizer/"),
        base_residual=_adapters(_under(tensors, "residual/")),
        client_state=_by_client(_under(tensors, "client/")),
        rejections={c: int(n) for c, n in sorted(_under(tensors, "rejections/").items())},
    )


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _adapters(tensors: dict[str, Tensor]) -> Adapters:
    names = sorted(name.removesuffix("/a") for name in tensors if name.endswith("/a"))
    return {name: LoRAWeights(tensors[f"{name}/a"], tensors[f"{name}/b"]) for name in names}


def _by_client(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort "name/client" by client; names of modules and parameters have no slash, clients may."""
    clients: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in sorted(tensors.items()):
        name, client_id = entry.split("/", 1)
        clients.setdefault(client_id, {})[name] = tensor
    return clients


def save_residual(folder: Path, residual: Adapters) -> None:
    """Write what a model's base weights have gained beside its adapter, if anything.

    ``base_residual.safetensors`` holds "<module>/a" ``[K, D]`` and "<module>/b" ``[K, E]``; the
    base weight ``[E, D]`` is to be increased by the adapter's scaling times bᵀa.
    """
    if residual:
        tensors = {
            f"{name}/{factor}": tensor.contiguous()
            for name, pair in residual.items()
            for factor, tensor in zip("ab", pair, strict=True)
        }
        write_atomically(folder / "base_residual.safetensors", save(tensors))


def append_record(folder: Path, record: dict[str, Any]) -> None:
    """Append one round's line and make sure that it is on disk.

    Raises:
        OSError: it cannot be written; a part of the line may be, which ``read_records`` drops.
    """
    line = json.dumps(record, allow_nan=False) + "\n"
    with (folder / RECORDS_FILE).open("ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read the whole lines of ``rounds.jsonl``; a line that a crash cut off is left out."""
    path = folder / RECORDS_FILE
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def cut_records(folder: Path, last_round: int) -> list[dict[str, Any]]:
    """Drop the lines after a round, which a resumed run will write again; return the rest."""
    records = [record for record in read_records(folder) if record["round"] <= last_round]
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    write_atomically(folder / RECORDS_FILE, lines.encode())
    return records


def replace_folder(folder: Path, write: Callable[[str], object]) -> None:
    """Let ``write`` fill a folder, and put it in place only when it is whole."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        write(str(partial))
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def explained_io_errors(folder: Path, round_number: int) -> Iterator[None]:
    """Turn a full disk or a read-only folder into one message with the remedy.

    Raises:
        ValueError: in place of any error of writing inside.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        kept = f"the checkpoint of round {round_number} is intact" if round_number else "nothing"
        raise ValueError(
            f"cannot write to {folder}: {reason}; {kept}. Make room or choose another "
            "--out, then go on with --resume"
        ) from error
