"""Summing a finished run up: what each capacity class paid, and what it got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fslora.client import payload_bytes
from fslora.config import SimulateConfig
from fslora.protocol import ServerState
from fslora_kernels.sampling import sketch_size

Record = dict[str, Any]


def summarise(
    config: SimulateConfig,
    state: ServerState,
    ratio_of: Mapping[int, float],
    records: Sequence[Record],
    wall_seconds: float,
    device: str,
) -> Record:
    """Sum a run up, its bytes against those of FedAvg-LoRA at full rank in the same rounds.

    Args:
        config: the run's settings.
        state: after the last round.
        ratio_of: client position to sketch ratio.
        records: lines of ``rounds.jsonl``, round 0 first.
        wall_seconds: of this process, loading not included.
        device: where it ran.

    Returns:
        What ``summary.json`` holds.
    """
    full = sum(payload_bytes(state.adapters, state.extras))
    before, after = records[0], records[-1]
    entries = [entry for record in records for entry in record["clients"]]
    classes = []
    for ratio in sorted(set(ratio_of.values())):
        own = [entry for entry in entries if entry["ratio"] == ratio]
        moved = sum(entry["bytes_up"] + entry["bytes_down"] for entry in own)
        classes.append(
            {
                "ratio": ratio,
                "sketch_size": sketch_size(config.rank, ratio),
                "clients": sum(value == ratio for value in ratio_of.values()),
                "participations": len(own),
                "bytes_up": sum(entry["bytes_up"] for entry in own),
                "bytes_down": sum(entry["bytes_down"] for entry in own),
                "share_of_full_rank": moved / (2 * full * len(own)) if own else None,
                "loss_before": before["eval_loss_by_ratio"].get(f"{ratio:g}"),
                "loss_after": after["eval_loss_by_ratio"].get(f"{ratio:g}"),
            }
        )
    return {
        "classes": classes,
        **{f"eval_{what}_before": before[f"eval_{what}"] for what in ("loss", "metric")},
        **{f"eval_{what}_after": after[f"eval_{what}"] for what in ("loss", "metric")},
        **{way: sum(record[way] for record in records) for way in ("bytes_up", "bytes_down")},
        "full_rank_bytes_up": full * len(entries),
        "full_rank_bytes_down": full * len(entries),
        "wall_seconds": wall_seconds,
        "modules": len(state.adapters),
        "parameters": sum(t.numel() for pair in state.adapters.values() for t in pair),
        "implementation": config.implementation,
        "device": device,
        "versions": {"torch": torch.__version__},
    }
