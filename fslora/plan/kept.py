"""What a machine's allocator takes beyond the tensors that are alive, measured while training.

Freed memory does not all go back to the system, and not every hole is used again. How much stays
depends on the C library, on the model and on the order of its tensors, and on S hardly at all; so
it is measured on the device, at one ratio, and not predicted.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fslora.client import LocalTrainer
from fslora.plan.costs import made_bytes
from fslora.protocol import ClientTask

ROUNDS = 8  # the peak grows from one to the next for a while
_PROCESS = Path("/proc/self")


def kept_bytes(trainer: LocalTrainer, task: ClientTask) -> float:
    """Measure the growth of the process while a client trains, less the bytes that it needs.

    Call it before anything has trained in the process: what is kept already is not seen again.

    Args:
        trainer: of the loaded model.
        task: trained on eight times.

    Returns:
        Bytes, not below 0; 0 as well where the system does not say (CPU, and not Linux).
    """
    device = next(trainer.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        trainer(task)
        reserved = torch.cuda.max_memory_reserved(device)
        return float(reserved - torch.cuda.max_memory_allocated(device))
    read_in(trainer.model)  # or their coming in would be taken for growth
    try:
        (_PROCESS / "clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        before = resident_bytes("VmRSS")
    except OSError:
        return 0.0
    for _ in range(ROUNDS):
        trainer(task)
    grown = resident_bytes("VmHWM") - before
    return float(max(0, grown - made_bytes(trainer, task)))


def read_in(model: nn.Module) -> int:
    """Read every weight: those of a mapped file are in memory only from then on.

    Returns:
        Bytes that came in. The system counts them as free all the same: it can read them again.
        0 where the system does not say, and of weights on a GPU: what comes in is its libraries.
    """
    mapped = [parameter for parameter in model.parameters() if parameter.device.type == "cpu"]
    if not mapped:
        return 0
    try:
        before = resident_bytes("RssFile")
        for parameter in mapped:
            parameter.detach().sum()
        return max(0, resident_bytes("RssFile") - before)
    except OSError:
        return 0


def resident_bytes(field: str) -> int:
    """Read this process's resident memory: ``VmRSS``, ``RssFile`` of it, ``VmHWM`` its peak.

    Raises:
        OSError: the system is no Linux.
    """
    lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
