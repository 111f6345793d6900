"""Which sketch sizes each class can have at all, and what would help one that can have none."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fslora.devices import Device, Fleet
from fslora.plan.costs import Costs
from fslora.report.units import format_bytes, format_enough, format_seconds


class InfeasibleFleetError(ValueError):
    """Some class of devices cannot take part at any ratio."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a round may cost one client beside its device's memory.

    Attributes:
        deadline: seconds of a round, at the device's mean speed; 0 is no limit.
        traffic_bytes: moved in a round, both ways; 0 is no limit.
    """

    deadline: float = 0.0
    traffic_bytes: float = 0.0


def broken(costs: Costs, device: Device, limits: Limits, size: int) -> str | None:
    """Say which limit a sketch size breaks on a device: memory, deadline or traffic."""
    if costs.memory_bytes(size) > device.memory_bytes:
        return "memory"
    if limits.deadline and sum(costs.seconds(device, size)) > limits.deadline:
        return "deadline"
    moved = costs.down_bytes(size) + costs.up_bytes(size)
    return "traffic" if limits.traffic_bytes and moved > limits.traffic_bytes else None


def feasible_sizes(costs: Costs, fleet: Fleet, limits: Limits) -> list[tuple[int, ...]]:
    """List the sketch sizes that each class can have, ascending.

    Raises:
        InfeasibleFleetError: names every class that can have none, why, and the nearest remedy.
    """
    sizes = [
        tuple(size for size in range(1, costs.rank + 1) if not broken(costs, device, limits, size))
        for device in fleet.devices
    ]
    stuck = [device for device, own in zip(fleet.devices, sizes, strict=True) if not own]
    if stuck:
        lines = "\n".join(f"  {_why(costs, device, limits)}" for device in stuck)
        raise InfeasibleFleetError(f"no sketch ratio is small enough for\n{lines}")
    return sizes


def _why(costs: Costs, device: Device, limits: Limits) -> str:
    reason = broken(costs, device, limits, 1)
    if reason == "memory":
        return _memory_remedy(costs, device)
    if reason == "deadline":
        compute, rest = costs.seconds(device, 1)
        return (
            f"{device.name}: a round at S = 1 takes {format_seconds(compute + rest)} "
            f"({format_seconds(compute)} of it computing) and the deadline is "
            f"{format_seconds(limits.deadline)}; raise --deadline to "
            f"{format_enough(compute + rest)}, lower "
            "--local-steps, or leave it out of --devices"
        )
    moved = costs.down_bytes(1) + costs.up_bytes(1)
    return (
        f"{device.name}: a round at S = 1 moves {format_bytes(moved)} and --traffic-mb allows "
        f"{format_bytes(limits.traffic_bytes)}; raise it to {format_enough(moved / 1e6)}, or adapt "
        "fewer --target-modules"
    )


def _memory_remedy(costs: Costs, device: Device) -> str:
    """Name what is missing, and the first single change that suffices, else two, else none."""
    need, least = costs.memory_bytes(1), costs.memory_bytes_of_one(1)
    has = device.memory_bytes
    what = "its frozen base alone takes" if costs.weight_bytes > has else "training at S = 1 takes"
    shown = costs.weight_bytes if costs.weight_bytes > has else need
    half = costs.weight_bytes / 2 if costs.weights_halve else 0.0
    fits = (
        ("lower --batch-size, down to 1, and raise --accumulation instead", least <= has),
        (f"--dtype bfloat16 (about {format_bytes(need - half)})", need - half <= has),
        (_fewer_layers(costs, need, has, 1.0), _layers_that_fit(costs, need, has, 1.0) > 0),
        (
            f"--dtype bfloat16 with {_fewer_layers(costs, need - half, has, 0.5)}",
            half > 0 and _layers_that_fit(costs, need - half, has, 0.5) > 0,
        ),
    )
    remedy = next((text for text, enough in fits if enough), "leave it out of --devices")
    return (
        f"{device.name}: it has {format_bytes(has)} of memory and {what} {format_bytes(shown)}; "
        f"the nearest change: {remedy}"
    )


def _layers_that_fit(costs: Costs, need: float, has: float, weight_share: float) -> int:
    """How many layers' weights and activations fit, the rest of the model staying as it is."""
    if not costs.layers:
        return 0
    activations = costs.memory_bytes(1) - costs.weight_bytes
    one = weight_share * costs.layer_bytes + activations / costs.layers
    return max(0, math.floor(costs.layers - (need - has) / one))


def _fewer_layers(costs: Costs, need: float, has: float, weight_share: float) -> str:
    return f"--layers {_layers_that_fit(costs, need, has, weight_share)} of {costs.layers}"
