"""Tiles measured on one kind of device: how they are found, kept, and read back.

A table is a JSON file named after the device. Those in ``tuned/`` beside this file are shipped;
``fslora tune`` writes one's own into the user's cache folder, which comes first. Nothing is read
before the first launch on a device, and nothing is ever measured in passing.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fslora_kernels.ops.sketched_linear.configurations import TILES, Tiles
from fslora_kernels.ops.sketched_linear.op import PADDED_RANKS

Key = tuple[str, str, int]
"""Kernel, arithmetic, padded ranks."""

SHIPPED = Path(__file__).with_name("tuned")
# (tokens, features in, features out): layers of 3B and 8B models. Benchmarks measure others too.
SHAPES = ((8192, 4096, 4096), (8192, 4096, 14336), (2048, 14336, 4096), (8192, 3072, 1024))
# What is tried beside the tiles that were chosen by compiling.
CANDIDATES: dict[str, tuple[Tiles, ...]] = {
    "apply": (
        Tiles(128, 64, warps=8, stages=3),
        Tiles(128, 128, warps=8, stages=3),
        Tiles(64, 128, warps=8, stages=4),
        Tiles(64, 64, warps=4, stages=4),
        Tiles(32, 128, warps=4, stages=4),
    ),
    "wgrad": (
        Tiles(64, 64, warps=4, stages=4, features_first=True),
        Tiles(64, 256, warps=8, stages=3, features_first=True),
        Tiles(128, 128, warps=8, stages=3, features_first=True),
        Tiles(128, 64, warps=4, stages=3, features_first=True),
        Tiles(32, 128, warps=4, stages=4, features_first=True),
    ),
}
WORTH_IT = 0.98  # a candidate replaces the default if it takes at most this share of its time


@dataclass(frozen=True, slots=True)
class Measured:
    """The best tiles of one kernel at one number of padded ranks.

    Attributes:
        kernel: "apply" or "wgrad".
        arithmetic: of the products, as in ``TILES``.
        ranks: padded.
        tiles: the best that were tried.
        over_default: their time over that of the default tiles, geometric mean over the shapes.
        tried: how many candidates ran, the default among them.
    """

    kernel: str
    arithmetic: str
    ranks: int
    tiles: Tiles
    over_default: float
    tried: int


# -- reading ---------------------------------------------------------------------------------------


def file_name(device_name: str) -> str:
    """Return the name of a device's table: "NVIDIA H200" has ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def own_folder() -> Path:
    """Return the folder of the user's own tables.

    Raises:
        ValueError: there is no home folder.
    """
    try:
        return Path.home() / ".cache/fslora/tuned"
    except RuntimeError as error:
        raise ValueError(f"{error}; set HOME, or say --out FILE to `fslora tune`") from error


def table_path(device_name: str) -> Path | None:
    """Return the table that a device uses: the user's own, the shipped one, or None.

    A home folder that is missing or closed to us is one without a table.
    """
    shipped = SHIPPED / file_name(device_name)
    with suppress(OSError, ValueError):
        own = own_folder() / file_name(device_name)
        if own.is_file():
            return own
    return shipped if shipped.is_file() else None


@cache
def measured_tiles(device_name: str) -> Mapping[Key, Tiles]:
    """Return what was measured on a device; empty without a table. Read once in a process."""
    path = table_path(device_name)
    return {} if path is None else load(path)


def load(path: Path) -> dict[Key, Tiles]:
    """Read a table.

    Raises:
        ValueError: it is not a table; the message says what to do.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["tiles"]
        tiles = {_key(entry): Tiles(**entry["tiles"]) for entry in entries}
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, repr(error)) from error
    for (kernel, _, ranks), tile in tiles.items():
        sizes = (tile.tokens, tile.features, tile.warps)
        if any(type(n) is not int or n < 1 or n & (n - 1) for n in sizes) or ranks < 1:
            raise _unreadable(path, f"{kernel} at {ranks} ranks has sizes that are no power of 2")
    return tiles


def shipped(target: str) -> list[dict[Key, Tiles]]:
    """Return the shipped tables of all devices of one target, such as "sm_90"."""
    files = sorted(SHIPPED.glob("*.json"))
    return [load(file) for file in files if json.loads(file.read_text("utf-8"))["target"] == target]


def _key(entry: Mapping[str, Any]) -> Key:
    return str(entry["kernel"]), str(entry["arithmetic"]), int(entry["ranks"])


def _unreadable(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} is not a table of tiles ({why}); delete it, or make it anew with `fslora tune`"
    )


# -- measuring -------------------------------------------------------------------------------------


def tune(
    device: torch.device,
    *,
    measure: Callable[[Callable[[], object]], float],
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Measured]:
    """Try the candidates of every kernel and number of ranks, and yield the best of each.

    A candidate that does not compile, does not fit, or computes something else is left out, be it
    with factors of x's dtype, or with a layer's own in view mode: float32, as PEFT has them by
    default, B column-major, gathered, and with dropout.

    Args:
        device: where to measure.
        measure: the time of a call, in any unit.
        shapes: (tokens, features in, features out), each measured.
        dtype: of everything.

    Yields:
        For each kernel and number of padded ranks, the best tiles.

    Raises:
        NotImplementedError: no tiles were chosen for the device, so that the kernels refuse it.
    """
    from fslora_kernels import _launch

    target, _ = _launch.target_of(device)
    arithmetic = _launch.arithmetic_of(dtype, target)
    if ("apply", target, arithmetic) not in TILES:
        reason = _launch.unknown_target(device, TILES)
        raise NotImplementedError(f"nothing to tune: {reason}, and the torch implementation runs")
    for kernel in ("apply", "wgrad"):
        for ranks in PADDED_RANKS:
            default = TILES[kernel, target, arithmetic][ranks]
            problems = [_problem(kernel, ranks, shape, device, dtype) for shape in shapes]
            checked = [*problems, _view_problem(kernel, ranks, shapes[0], device, dtype)]
            wanted = [problem(default) for problem in checked]
            times = {default: [measure(_bind(problem, default)) for problem in problems]}
            for tiles in CANDIDATES[kernel]:
                if tiles != default and _computes(checked, tiles, wanted, dtype):
                    times[tiles] = [measure(_bind(problem, tiles)) for problem in problems]
            shares = {
                tiles: statistics.geometric_mean(
                    [a / b for a, b in zip(taken, times[default], strict=True)]
                )
                for tiles, taken in times.items()
            }
            best = min(shares, key=lambda tiles: shares[tiles])
            if shares[best] > WORTH_IT:
                best = default
            yield Measured(kernel, arithmetic, ranks, best, shares[best], len(times))


def _bind(problem: Callable[[Tiles], Tensor], tiles: Tiles) -> Callable[[], Tensor]:
    return lambda: problem(tiles)


def _draw(
    device: torch.device, dtype: torch.dtype, *sizes: int, std: float = 1.0, key: int = 0
) -> Tensor:
    generator = torch.Generator(device).manual_seed(key)
    values = torch.randn(*sizes, generator=generator, device=device, dtype=torch.float32)
    return (values * std).to(dtype)


def _problem(
    kernel: str,
    ranks: int,
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[Tiles], Tensor]:
    """Return a call of one kernel on random data of one dtype, for given tiles."""
    from fslora_kernels._launch import MAX_RANKS
    from fslora_kernels.ops.sketched_linear import backend_triton
    from fslora_kernels.ops.sketched_linear.op import Arguments

    tokens, features_in, features_out = shape
    ranks = min(ranks, MAX_RANKS)
    x = _draw(device, dtype, tokens, features_in)
    lora_a = _draw(device, dtype, ranks, features_in, std=features_in**-0.5, key=1)
    lora_b = _draw(device, dtype, ranks, features_out, std=ranks**-0.5, key=2)
    arguments = Arguments(x, None, lora_a, lora_b, None, None, 1.0, 0.0, 0)
    if kernel == "apply":
        return lambda tiles: _output(
            backend_triton.apply(arguments, x, lora_a, lora_b, tiles=tiles)
        )
    h_TP, _ = backend_triton.apply(arguments, x, lora_a, None)
    return lambda tiles: backend_triton.wgrad(arguments, h_TP, x, lora_a, tiles=tiles)


def _view_problem(
    kernel: str,
    ranks: int,
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[Tiles], Tensor]:
    """Return both calls that a layer in view mode makes of one kernel, forward and backward.

    Its factors are float32 and twice as many ranks as are selected, with B as PEFT stores it.
    """
    from fslora_kernels._launch import MAX_RANKS
    from fslora_kernels.ops.sketched_linear import backend_triton
    from fslora_kernels.ops.sketched_linear.configurations import MAX_PADDED_WITH_DROPOUT
    from fslora_kernels.ops.sketched_linear.op import Arguments

    tokens, features_in, features_out = shape
    dropout = 0.5 if ranks <= MAX_PADDED_WITH_DROPOUT and dtype != torch.float32 else 0.0
    ranks = min(ranks, MAX_RANKS)
    x, dy = _draw(device, dtype, tokens, features_in), _draw(device, dtype, tokens, features_out)
    wide = torch.float32
    lora_a = _draw(device, wide, 2 * ranks, features_in, std=features_in**-0.5, key=1)
    lora_b = _draw(device, wide, features_out, 2 * ranks, std=ranks**-0.5, key=2).t()
    bias = _draw(device, dtype, features_out, key=3)
    index = torch.arange(0, 2 * ranks, 2, device=device)
    arguments = Arguments(x, None, lora_a, lora_b, index, None, 1.0, dropout, 0)
    mask = backend_triton.draw_mask(arguments) if dropout else None
    h_TP, _ = backend_triton.apply(arguments, x, lora_a, None, drop_x=mask)

    def apply(tiles: Tiles) -> Tensor:
        y = backend_triton.apply(arguments, x, lora_a, lora_b, bias, drop_x=mask, tiles=tiles)
        dx = backend_triton.apply(arguments, dy, lora_b, lora_a, drop_y=mask, tiles=tiles)
        return torch.cat([_output(y), _output(dx)], dim=1)

    def wgrad(tiles: Tiles) -> Tensor:
        return backend_triton.wgrad(arguments, h_TP, x, lora_a, mask, tiles=tiles)

    return apply if kernel == "apply" else wgrad


def _output(result: tuple[Tensor, Tensor | None]) -> Tensor:
    y_TG = result[1]
    if y_TG is None:
        raise ValueError("the kernel was asked for h alone")
    return y_TG


def _computes(
    problems: list[Callable[[Tiles], Tensor]],
    tiles: Tiles,
    wanted: list[Tensor],
    dtype: torch.dtype,
) -> bool:
    """Whether tiles compile, fit, and give the default's results up to rounding.

    Sums in float32 of products in half precision differ by more than float32's rounding when they
    are split otherwise: a matrix unit aligns a product's terms before it adds them.
    """
    try:
        for problem, want in zip(problems, wanted, strict=True):
            found = problem(tiles)
            error = float((found.float() - want.float()).norm() / want.float().norm())
            epsilon = max(torch.finfo(found.dtype).eps, torch.finfo(dtype).eps / 16)
            if not error <= 4 * epsilon:
                return False
    except Exception:  # whatever the compiler or the driver says, also later: not this one
        return False
    return True


def save(path: Path, device_name: str, target: str, rows: list[Measured]) -> None:
    """Write a table in one piece.

    Raises:
        ValueError: it cannot be written there.
    """
    # Not by the names of their distributions: ROCm's Triton has another.
    versions = {name: str(import_module(name).__version__) for name in ("torch", "triton")}
    table = {
        "device": device_name,
        "target": target,
        "versions": versions,
        "shapes": [list(shape) for shape in SHAPES],
        "tiles": [asdict(row) for row in rows],
    }
    partial = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ValueError(
            f"the table of tiles cannot be written: {error}; say where with --out FILE"
        ) from error
    measured_tiles.cache_clear()
