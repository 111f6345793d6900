"""What clients run on and talk through: built-in classes, and fleets as text or as a TOML file.

Whose the built-in figures are:

- Measured by others. The *ratios* between ``gpu``, ``laptop``, ``phone`` and ``budget-phone`` are
  those of QVAC's LoRA benchmark, training tokens a second of Qwen3-1.7B at 8 bits in steps of 128
  tokens: RTX 4090 116, M3 Pro 17.5, Snapdragon 8 Elite 6.1, Mali G715 1.3. Its software is young
  and the ratios vary with the model (the two phones are nearly equal on Gemma-3-1B), so nothing
  but the ratios is taken. ``median``: a download of 61.5 Mbit/s (Ookla, mobile, worldwide, November
  2024) and 28 ms (mobile, 2022), rounded; the upload of ``5g``: 21.1 Mbit/s (2021), rounded.
- Assumptions: that the ``gpu`` sustains 20 TFLOP/s, about an eighth of its dense 16-bit peak (this
  puts the laptop at 3 TFLOP/s, within its own), and a ``datacentre`` card the same share of its
  peak; the memory, as such machines are sold; every network figure not named above; every
  availability, dropout and jitter.

What is left out: downloading the base model, which a device does once and every strategy pays
alike, and what memory a local step needs beyond the model's own weights.
"""

from __future__ import annotations

import json
import math
import sys
import tomllib
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

_GPU_FLOPS = 20e12


class Compute(NamedTuple):
    """A kind of machine: the attributes of ``Device`` that depend on it."""

    flops_per_second: float
    memory_bytes: float
    availability: float
    dropout: float
    jitter: float


class Network(NamedTuple):
    """A kind of connection: the attributes of ``Device`` that depend on it."""

    down_bits_per_second: float
    up_bits_per_second: float
    rtt_seconds: float


COMPUTE = {
    "budget-phone": Compute(_GPU_FLOPS * 1.3 / 116, 8e9, 0.7, 0.1, 0.3),
    "phone": Compute(_GPU_FLOPS * 6.1 / 116, 12e9, 0.8, 0.05, 0.3),
    "laptop": Compute(_GPU_FLOPS * 17.5 / 116, 18e9, 0.9, 0.02, 0.2),
    "gpu": Compute(_GPU_FLOPS, 24e9, 0.95, 0.01, 0.1),
    "datacentre": Compute(120e12, 80e9, 1.0, 0.0, 0.05),
}
NETWORKS = {
    "poor": Network(5e6, 1e6, 0.1),
    "median": Network(60e6, 10e6, 0.028),
    "5g": Network(150e6, 20e6, 0.02),
    "silo": Network(1e9, 1e9, 0.005),
}
_MAY_BE_ZERO = ("rtt_seconds", "dropout", "jitter", "watts", "ratio")


@dataclass(frozen=True, slots=True)
class Device:
    """One class of a fleet: a machine on a network, and how far it can be relied on.

    Attributes:
        name: of the class, such as ``phone:poor``.
        share: of the clients that have it.
        flops_per_second: what it sustains in local steps.
        memory_bytes: for tensors: the base model and what training adds; what the allocator keeps
            beside them is not in it.
        down_bits_per_second: server to client.
        up_bits_per_second: client to server.
        rtt_seconds: paid once a round.
        availability: probability that it takes part when asked.
        dropout: probability that it fails in the middle of a round.
        jitter: σ of the lognormal factor, of mean 1, on a round's compute time.
        watts: drawn while it takes part in a round; 0 where nobody knows.
        ratio: sketch ratio S/R of the clients that have it; 0 leaves it to ``--ratios``.
    """

    name: str
    share: float
    flops_per_second: float
    memory_bytes: float
    down_bits_per_second: float
    up_bits_per_second: float
    rtt_seconds: float
    availability: float = 1.0
    dropout: float = 0.0
    jitter: float = 0.0
    watts: float = 0.0
    ratio: float = 0.0

    def __post_init__(self) -> None:
        """Refuse figures that no device has."""
        for field in fields(self)[1:]:
            value, zero = getattr(self, field.name), field.name in _MAY_BE_ZERO
            if not (0 <= value < math.inf and (value or zero)):
                least = "not be negative" if zero else "be positive"
                raise ValueError(f"device {self.name}: {field.name} must {least}, got {value}")
        if self.availability > 1 or self.dropout >= 1:
            raise ValueError(
                f"device {self.name}: availability is at most 1 and dropout below 1, got "
                f"{self.availability} and {self.dropout}"
            )
        if self.ratio > 1:
            raise ValueError(f"device {self.name}: ratio is at most 1, got {self.ratio}")


@dataclass(frozen=True, slots=True)
class Fleet:
    """The classes of devices that clients have.

    Attributes:
        devices: of different names, their shares summing to 1.
    """

    devices: tuple[Device, ...]

    def __post_init__(self) -> None:
        """Refuse shares that do not sum to 1, and names given twice."""
        names = [device.name for device in self.devices]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"--devices: {twice.pop()} is there twice; add its shares up")
        total = sum(device.share for device in self.devices)
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"--devices: the shares must sum to 1, they sum to {total:.9g}; for thirds write "
                "1/3, and in a file 0.3333333"
            )
        if 0 in self.ratios and any(self.ratios):
            raise ValueError("--devices: give every device its own ratio, or none")

    @property
    def ratios(self) -> tuple[float, ...]:
        """The devices' own sketch ratios; all 0 where clients are dealt those of ``--ratios``."""
        return tuple(device.ratio for device in self.devices)

    def to_json(self) -> list[dict[str, object]]:
        """Return one table of plain values a device, which ``read_fleet`` reads as JSON."""
        return [asdict(device) for device in self.devices]

    def counts(self, clients: int) -> list[int]:
        """How many of so many clients have each device: shares rounded by largest remainder."""
        exact = [device.share * clients for device in self.devices]
        counts = [math.floor(value + 1e-9) for value in exact]
        # Of equal remainders the first in the fleet goes first.
        by_remainder = sorted(range(len(exact)), key=lambda n: round(counts[n] - exact[n], 9))
        for number in by_remainder[: clients - sum(counts)]:
            counts[number] += 1
        return counts


def read_fleet(text: str) -> Fleet:
    """Read a fleet.

    Args:
        text: ``phone:poor=0.5,laptop:median=0.5`` (compute, network, share of the clients; without
            a share it is all of them), or a TOML file with one ``[[device]]`` table a class, or
            such tables as JSON, which is how a run's ``config.json`` keeps them. A table has
            ``share`` and may name a built-in ``compute`` and ``network``, whose figures its own
            (the attributes of ``Device``) replace or complete.

    Raises:
        ValueError: it is none of these, or a figure is impossible.
        FileNotFoundError: there is no such TOML file.
    """
    if text.startswith("["):
        try:
            return _from_tables(json.loads(text), "--devices")
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"--devices {text[:20]!r} is not valid JSON: {error}") from None
    if text.endswith(".toml"):
        path = Path(text).expanduser()
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8")).get("device")
        except FileNotFoundError:
            raise FileNotFoundError(f"--devices: there is no file {path}") from None
        except OSError as error:
            raise ValueError(f"--devices: cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from None
        return _from_tables(tables, str(path))
    return _from_tables([_table(part.strip()) for part in text.split(",")], "--devices")


def _table(part: str) -> dict[str, Any]:
    name, _, share = part.partition("=")
    compute, colon, network = name.partition(":")
    try:
        table = {"compute": compute, "network": network, "share": float(Fraction(share or 1))}
    except (ValueError, ArithmeticError):
        colon = ""
    if not colon:
        raise ValueError(
            f"--devices {part!r} is not COMPUTE:NETWORK=SHARE, such as phone:poor=0.5, nor a file "
            "FLEET.toml"
        )
    return table


def _from_tables(tables: object, source: str) -> Fleet:
    whole = isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
    if not isinstance(tables, list) or not tables or not whole:
        raise ValueError(f"{source}: write one [[device]] table for each class of devices")
    return Fleet(tuple(_device(dict(table), source) for table in tables))


def _device(table: dict[str, Any], source: str) -> Device:
    """Build a device from its table, which is used up."""
    built_in: dict[str, float] = {}
    names = []
    for kind, known in (("compute", COMPUTE), ("network", NETWORKS)):
        name = table.pop(kind, None)
        if name is not None:
            if not isinstance(name, str) or name not in known:
                choice = ", ".join(known)
                raise ValueError(f"{source}: there is no {kind} {name!r}; there is {choice}")
            names.append(name)
            built_in.update(known[name]._asdict())
    figures: dict[str, Any] = {"name": ":".join(names), **built_in, **table}
    allowed = [field.name for field in fields(Device)]
    if unknown := [key for key in figures if key not in allowed]:
        raise ValueError(
            f"{source}: a device has no {unknown[0]!r}; it has compute, network, "
            f"{', '.join(allowed)}"
        )
    needed = allowed[: allowed.index("availability")]
    if missing := [key for key in needed if figures.get(key, "") == ""]:
        raise ValueError(
            f"{source}: device {figures['name'] or table} lacks {', '.join(missing)}; give it, or "
            "name a built-in compute and network"
        )
    name = str(figures.pop("name"))
    for key, value in figures.items():
        if type(value) not in (int, float) or abs(value) > sys.float_info.max:
            said = f"{value!r:.60}"
            raise ValueError(f"{source}: device {name}: {key} = {said} is not a number")
    return Device(name, **{key: float(value) for key, value in figures.items()})
