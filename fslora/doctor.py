"""What can run here, and why not."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from fslora_kernels import _onednn
from fslora_kernels._dispatch import IMPLEMENTATIONS, interpreting, unavailable

_PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "matplotlib", "datasets")


def version(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> dict[str, str]:
    """Return the devices that torch sees, each with its name."""
    found = {
        "cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    }
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            memory = properties.total_memory / 2**30
            found[f"cuda:{number}"] = f"{properties.name}, {memory:.0f} GiB"
    return found


def tiles(device_name: str) -> str:
    """Say where the Triton kernels' tiles on a GPU come from."""
    from fslora_kernels.tuning import table_path

    path = table_path(device_name)
    if path is None:
        return f"tiles on {device_name}: chosen by compiling; `fslora tune` measures better ones"
    return f"tiles on {device_name}: measured, from {path}"


def doctor(console: Console) -> None:
    """Print devices, implementations with the reason why one cannot run, tiles, and versions."""
    table = Table(title="Implementations", title_justify="left")
    for column in ("device", "what it is", "implementation", "runs", "why not"):
        table.add_column(column)
    for device, description in devices().items():
        for name in IMPLEMENTATIONS:
            reason = unavailable(name, device.split(":")[0])
            table.add_row(device, description, name, "no" if reason else "yes", reason or "")
    console.print(table)
    console.print(
        '"auto" takes triton where it runs and the call suits it, else torch, which on a CPU in '
        "float32 merges the delta into a copy of the weight where tokens are many; a layer that is "
        "asked for one that cannot run refuses and says why."
    )
    if _onednn.faster():
        console.print(
            "Large products with base weights in float32, where a batch's tokens are a multiple of "
            "256: by oneDNN, the faster library on this processor; "
            "torch.backends.mkldnn.enabled = False leaves them to torch's usual one."
        )
    if torch.cuda.is_available() and unavailable("triton", "cuda") is None:
        for number in range(torch.cuda.device_count()):
            console.print(tiles(torch.cuda.get_device_name(number)), markup=False)
    if interpreting():
        console.print("TRITON_INTERPRET=1: Triton kernels run in the interpreter, very slowly.")
    console.print("  ".join(f"{name} {version(name)}" for name in _PACKAGES))
