"""The curves of all runs for TensorBoard, written by its own library."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fslora import checkpoint

# Where TensorBoard shows a figure of `rounds.jsonl`.
_TAGS = {
    "eval_metric": "evaluation/metric",
    "eval_loss": "evaluation/loss",
    "train_loss": "training/loss",
    "bytes_up": "round/bytes_up",
    "bytes_down": "round/bytes_down",
    "sim_seconds_total": "simulated/seconds",
}


def summary_writer() -> type[Any]:
    """The class that writes TensorBoard's files.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard needs TensorBoard: pip install tensorboard, or leave the flag out"
        ) from error
    return SummaryWriter


def write_curves(folder: Path, runs: Iterable[Path]) -> None:
    """Write one TensorBoard run for each of our runs, in place of an earlier one of its name.

    Args:
        folder: of TensorBoard's files.
        runs: the run folders, STRATEGY/seed-N.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    writer_class = summary_writer()
    for run in runs:
        place = folder / run.parent.name / run.name
        for earlier in place.glob("events.out.tfevents.*"):
            earlier.unlink()  # files can only be added to: points would double
        with writer_class(str(place)) as writer:
            for record in checkpoint.read_records(run):
                for key, tag in _TAGS.items():
                    if record.get(key) is not None:
                        writer.add_scalar(tag, record[key], record["round"])
