"""Two stages of ``benchmarks.gpu``: what the device can do at best, how near the kernels come."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu import Row, Setting
from benchmarks.peers import peft_layer
from benchmarks.roofline import least_time
from fslora_kernels import sketched_linear
from fslora_kernels.ops.sketched_linear.reference import reference
from fslora_kernels.testing import check_error_budget

PASSES = 2  # each is timed so often, in turns; their difference is the noise


def median_ms(function: Callable[[], object], setting: Setting) -> float:
    """Return the median time of a call on the device, its caches flushed before each."""
    if not setting.dry:
        from triton.testing import do_bench

        return float(do_bench(function, warmup=20, rep=80, return_mode="median"))
    times = []
    for _ in range(3):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return 1e3 * statistics.median(times)


# -- environment -----------------------------------------------------------------------------------


def environment(setting: Setting) -> Iterator[Row]:
    """Say what the machine is and measure its two ceilings on random data."""
    row: Row = {"what": "machine", "ok": True, "cuda": torch.version.cuda}
    if not setting.dry:
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
        }
    named = (f"{name} {value}" for name, value in row.items() if name not in ("what", "ok"))
    row["line"] = ", ".join(named)
    yield row
    generator = torch.Generator(setting.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=setting.device, dtype=torch.bfloat16)

    source = draw(1 << (14 if setting.dry else 30))
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), setting)
    rate = 2 * source.nbytes / copy_ms / 1e6
    line = f"copy {rate:.0f} GB/s, read and written"
    yield {"what": "copy", "ok": True, "gb_per_s": rate, "line": line}
    size = 64 if setting.dry else 8192
    left, right = draw(size, size), draw(size, size)
    product_ms = median_ms(lambda: torch.mm(left, right), setting)
    rate = 2 * size**3 / product_ms / 1e9
    line = f"bf16 product {rate:.0f} TFLOP/s at {size}³"
    yield {"what": "bf16 product", "ok": True, "tflop_per_s": rate, "line": line}


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


def _ceilings(setting: Setting) -> tuple[float, float] | None:
    """Return bytes and operations per millisecond as the first stage measured them."""
    path = setting.out / "environment.json"
    if setting.dry or not path.is_file():
        return None
    rows = {row["what"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    if not {"copy", "bf16 product"} <= rows.keys():
        return None
    return rows["copy"]["gb_per_s"] * 1e6, rows["bf16 product"]["tflop_per_s"] * 1e9


# -- kernels ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """One projection.

    Attributes:
        name: model and projection.
        tokens: T.
        in_features: D.
        out_features: E.
    """

    name: str
    tokens: int
    in_features: int
    out_features: int


SHAPES = (
    Shape("8B q", 8192, 4096, 4096),
    Shape("8B k", 8192, 4096, 1024),
    Shape("8B gate", 8192, 4096, 14336),
    Shape("8B down", 8192, 14336, 4096),
)
SKETCH_SIZES = (8, 16, 64)
DRY_SHAPES = (Shape("tiny", 32, 32, 48),)
DRY_SIZES = (8,)


def kernels(setting: Setting) -> Iterator[Row]:
    """Time one layer, forward and backward (dx, dA, dB), against the bare base and PEFT.

    bf16 throughout, compact mode. A row prints no time while its results are wrong.
    """
    ceilings = _ceilings(setting)
    for shape in DRY_SHAPES if setting.dry else SHAPES:
        for size in DRY_SIZES if setting.dry else SKETCH_SIZES:
            yield from _compare(shape, size, setting, ceilings)


def _compare(
    shape: Shape, size: int, setting: Setting, ceilings: tuple[float, float] | None
) -> Iterator[Row]:
    generator = torch.Generator(setting.device).manual_seed(0)
    # Triton's interpreter has no bf16 products.
    dtype = torch.float32 if setting.dry else torch.bfloat16

    def draw(*sizes: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*sizes, generator=generator, device=setting.device)
        return (values * std).to(dtype)

    x = draw(shape.tokens, shape.in_features).requires_grad_()
    weight = draw(shape.out_features, shape.in_features, std=shape.in_features**-0.5)
    lora_a = draw(size, shape.in_features, std=shape.in_features**-0.5).requires_grad_()
    leaf_b = draw(size, shape.out_features, std=size**-0.5).requires_grad_()
    dy = draw(shape.tokens, shape.out_features)
    peft = peft_layer(weight, lora_a, leaf_b.t(), scale=2.0)

    def ours(implementation: str) -> Callable[[], Tensor]:
        return lambda: sketched_linear(
            x, weight, lora_a, leaf_b.t(), scale=2.0, implementation=implementation
        )

    leaves = {"x": x, "lora_a": lora_a, "leaf_b": leaf_b}
    peft_leaves = [x, peft.lora_A["default"].weight, peft.lora_B["default"].weight]
    sides: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "base": (lambda: functional.linear(x, weight), [x]),
        "peft": (lambda: peft(x), peft_leaves),
        **{name: (ours(name), list(leaves.values())) for name in setting.implementations},
    }
    errors = _errors({n: sides[n][0] for n in setting.implementations}, leaves, weight, dy)
    right = {name: side for name, side in sides.items() if name not in errors}
    times = _times(right, dy, setting)
    graphs = {} if setting.dry else {name: _graph(*side, dy) for name, side in right.items()}
    base_ms = statistics.median(times["base"]["step"])
    for name in sides:
        row: Row = {"what": f"{shape.name} S={size} {name}", "ok": name not in errors}
        if name in errors:
            yield row | {"error": errors[name]}
            continue
        step, forward = (statistics.median(times[name][what]) for what in ("step", "forward"))
        row |= {"forward_ms": forward, "step_ms": step, "over_base": step / base_ms}
        row |= {"noise": max(times[name]["step"]) / min(times[name]["step"]) - 1.0}
        row |= graphs.get(name, {})
        if ceilings is not None:
            row["share_of_roofline"] = _floor_ms(shape, size, name, ceilings) / step
        yield row | {"line": _line(row)}


def _line(row: Row) -> str:
    graph = f"{row['graph_step_ms']:8.3f}" if "graph_step_ms" in row else "       –"
    roofline = f"{row['share_of_roofline']:6.0%}" if "share_of_roofline" in row else "     –"
    return (
        f"{row['what']:<22} forward {row['forward_ms']:8.3f} ms   step {row['step_ms']:8.3f} ms   "
        f"in a graph {graph} ms   {row['over_base']:6.3f} × base (noise {row['noise']:.1%})   "
        f"{roofline} of the roofline"
    )


def _errors(
    functions: dict[str, Callable[[], Tensor]],
    leaves: dict[str, Tensor],
    weight: Tensor,
    dy: Tensor,
) -> dict[str, str]:
    """Check results and gradients against float64; return what is wrong, by side."""

    def results(
        function: Callable[[], Tensor], wanted: dict[str, Tensor], dy: Tensor
    ) -> dict[str, Tensor]:
        y = function()
        gradients = torch.autograd.grad(y, list(wanted.values()), dy)
        return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}

    def plain(leaves: dict[str, Tensor], weight: Tensor) -> Callable[[], Tensor]:
        x, lora_a, leaf_b = leaves.values()
        return lambda: reference(x, weight, lora_a, leaf_b.t(), scale=2.0)

    exact_leaves = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    exact = results(plain(exact_leaves, weight.double()), exact_leaves, dy.double())
    eager = results(plain(leaves, weight), leaves, dy)
    errors: dict[str, str] = {}
    for name, function in functions.items():
        try:
            for part, value in results(function, leaves, dy).items():
                check_error_budget(value, eager[part], exact[part], name=part)
        except Exception as error:  # a side that fails is recorded, not timed
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def _times(
    sides: dict[str, tuple[Callable[[], Tensor], list[Tensor]]], dy: Tensor, setting: Setting
) -> dict[str, dict[str, list[float]]]:
    """Time every side in turns: forward alone, and the step."""
    times = {name: {"forward": [], "step": []} for name in sides}
    for _ in range(PASSES):
        for name, (function, leaves) in sides.items():
            times[name]["forward"].append(median_ms(function, setting))
            times[name]["step"].append(median_ms(_step(function, leaves, dy), setting))
    return times


def _step(function: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(), leaves, dy)


def _graph(function: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor) -> Row:
    """Time the step inside a CUDA graph: without what Python and launching cost."""
    from triton.testing import do_bench_cudagraph

    try:
        step = _step(function, leaves, dy)
        return {"graph_step_ms": float(do_bench_cudagraph(step, return_mode="median"))}
    except RuntimeError as error:
        return {"graph_error": str(error)}


def _floor_ms(shape: Shape, size: int, name: str, ceilings: tuple[float, float]) -> float:
    """The least that a step can take."""
    bytes_per_ms, flops_per_ms = ceilings
    return least_time(
        shape.tokens,
        shape.in_features,
        shape.out_features,
        0 if name == "base" else size,
        itemsize_bytes=2,
        flop_rate=flops_per_ms,
        byte_rate=bytes_per_ms,
        pad_ranks_to=16,
    )
