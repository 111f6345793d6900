"""Summing a finished run up: what each capacity class paid, and what it got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel

from fslora.client import payload_bytes
from fslora.config import SimulateConfig, Target
from fslora.models import take_state
from fslora.protocol import ServerState
from fslora.report.units import score_name
from fslora_kernels._dispatch import unavailable
from fslora_kernels.sampling import sketch_size

Record = dict[str, Any]

_BYTES = tuple(f"{part}bytes_{way}" for part in ("adapter_", "head_", "") for way in ("up", "down"))
_TIMES = ("sim_seconds", "sim_down_seconds", "sim_compute_seconds", "sim_up_seconds")


def summarise(
    config: SimulateConfig,
    state: ServerState,
    ratio_of: Mapping[str, float],
    records: Sequence[Record],
    model: PeftModel,
) -> Record:
    """Sum a run up, its bytes against those of FedAvg-LoRA at full rank in the same rounds.

    FedAvg-LoRA trains every layer that has an adapter, with as many clients: for centralised
    training ``per_round`` of them in place of the one.

    Args:
        config: the run's settings.
        state: after the last round.
        ratio_of: client id to sketch ratio, whatever share of the ranks its strategy gives it.
        records: lines of ``rounds.jsonl``, round 0 first.
        model: the fused model, where it ran.

    Returns:
        What ``summary.json`` holds.
    """
    full = sum(payload_bytes(*take_state(model)))
    device = next(model.parameters()).device
    before, after = records[0], records[-1]
    entries = [entry for record in records for entry in record["clients"]]
    stands_for = config.per_round if config.strategy == "centralised" else 1
    classes = []
    for ratio in sorted(set(ratio_of.values())):
        own = [entry for entry in entries if ratio_of.get(entry["id"]) == ratio]
        moved = sum(entry["bytes_up"] + entry["bytes_down"] for entry in own)
        answers = sum(map(_answered, own))
        classes.append(
            {
                "ratio": ratio,
                "sketch_size": _ranks(config.rank, ratio, own),
                "clients": sum(value == ratio for value in ratio_of.values()),
                "participations": len(own),
                "bytes_up": sum(entry["bytes_up"] for entry in own),
                "bytes_down": sum(entry["bytes_down"] for entry in own),
                "share_of_full_rank": moved / (full * (len(own) + answers)) if own else None,
                "loss_before": before["eval_loss_by_ratio"].get(f"{ratio:g}"),
                "loss_after": after["eval_loss_by_ratio"].get(f"{ratio:g}"),
            }
        )
    return {
        "classes": classes,
        **{f"eval_{what}_before": before[f"eval_{what}"] for what in ("loss", "metric")},
        **{f"eval_{what}_after": after[f"eval_{what}"] for what in ("loss", "metric")},
        "score": score_name(config.task, config.metric),
        **{way: sum(record[way] for record in records) for way in ("bytes_up", "bytes_down")},
        "full_rank_bytes_up": full * stands_for * sum(map(_answered, entries)),
        "full_rank_bytes_down": full * stands_for * len(entries),
        "sim_seconds": after.get("sim_seconds_total"),
        "epsilon": after.get("epsilon"),
        "delta": config.dp_delta,
        "devices": device_classes(entries),
        "targets": [cost_of(target, records) for target in config.target_values],
        "wall_seconds": sum(record["wall_seconds"] for record in records),
        "modules": len(state.adapters),
        "parameters": sum(t.numel() for pair in state.adapters.values() for t in pair),
        "implementation": _implementation(config.implementation, device),
        "device": str(device),
        "versions": {"torch": torch.__version__},
    }


def _ranks(rank: int, ratio: float, entries: Sequence[Record]) -> int:
    """How many ranks the clients of a class trained, the most of them where that changed."""
    if not entries:
        return sketch_size(rank, ratio)
    most: float = max(entry["ratio"] for entry in entries)
    return round(rank * most)


def _implementation(asked: str, device: torch.device) -> str:
    """What "auto" takes on a device, but for calls that do not suit it."""
    if asked != "auto":
        return asked
    return "torch" if unavailable("triton", device.type) else "triton"


def _answered(entry: Record) -> bool:
    return entry["rejected"] is None or entry["bytes_up"] > 0


def device_classes(entries: Sequence[Record]) -> list[Record]:
    """Sum up what the clients of each class of devices did, the slowest class first.

    Args:
        entries: the clients' records of all rounds.

    Returns:
        For each class how often it was asked, how often its work was used, and the mean seconds
        of a round that it needs; nothing without devices.
    """
    by_device: dict[str, list[Record]] = {}
    for entry in entries:
        if entry.get("device") is not None:
            by_device.setdefault(entry["device"], []).append(entry)
    rows = [
        {
            "device": device,
            "asked": len(own),
            "used": sum(entry["rejected"] is None for entry in own),
            **{time: sum(entry[time] for entry in own) / len(own) for time in _TIMES},
        }
        for device, own in by_device.items()
    ]
    return sorted(rows, key=lambda row: -row["sim_seconds"])


def cost_of(target: Target, records: Sequence[Record]) -> Record:
    """Say what had been paid when a target was first reached, in an evaluated round.

    Args:
        target: a metric to reach from below, or a loss from above.
        records: lines of ``rounds.jsonl``, round 0 first.

    Returns:
        The target, and the round, the bytes in each direction (adapter, head and both) and the
        simulated seconds until then; all None if it never was reached, the seconds also where
        there is no clock.
    """
    paid = dict.fromkeys(_BYTES, 0)
    for record in records:
        paid = {way: so_far + record[way] for way, so_far in paid.items()}
        value = record[f"eval_{target.figure}"]
        if value is None:
            continue
        if value >= target.value if target.figure == "metric" else value <= target.value:
            seconds = record.get("sim_seconds_total")
            return {**target._asdict(), "round": record["round"], **paid, "sim_seconds": seconds}
    return {**target._asdict(), "round": None, **dict.fromkeys(_BYTES), "sim_seconds": None}
