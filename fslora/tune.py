"""Measure the best tiles for a GPU, and say where they are kept."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from fslora_kernels import tuning
from fslora_kernels._dispatch import unavailable


def tune(device: str, out: Path | None, console: Console) -> Path:
    """Tune, print and keep each result as it comes, so that an interruption costs only the rest.

    Args:
        device: torch's device.
        out: file of the table; None is where later runs look for it.
        console: where to print.

    Returns:
        The file.

    Raises:
        NotImplementedError: Triton kernels cannot run there, so there is nothing to tune.
        ValueError: there is no such device, or the table has no place, or cannot be written there.
    """
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use cuda, cuda:1 …") from None
    reason = unavailable("triton", where.type)
    if where.type == "cuda" and not torch.cuda.is_available():
        reason = "torch sees no GPU"
    if reason is not None:
        raise NotImplementedError(
            f"nothing to tune on {device!r}: {reason}. On a CPU the torch implementation runs, "
            "which has no tiles; call this on the machine with the GPU"
        )
    if (where.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"there is no device {device!r}: torch sees {count} (cuda:0 is the first)")
    from triton.testing import do_bench

    from fslora_kernels._launch import target_of

    name = torch.cuda.get_device_name(where)
    path = out or tuning.own_folder() / tuning.file_name(name)
    rows = []
    with torch.cuda.device(where):  # do_bench times the current device's stream
        for row in tuning.tune(where, measure=do_bench):
            rows.append(row)
            tuning.save(path, name, target_of(where)[0], rows)
            console.print(
                f"{row.kernel:<6} {row.ranks:>4} ranks   {1 / row.over_default:5.2f} × as fast as "
                f"the default   best of {row.tried}: {row.tiles}"
            )
    console.print(f"kept in {path}", markup=False, soft_wrap=True)
    return path
