"""Compile the Triton kernels ahead of time, without a GPU, and say what each compilation needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

from fslora_kernels._dispatch import interpreting

# Modules with a function variants(target) that yields what their dispatch can select.
BACKENDS = (
    "fslora_kernels.ops.sketched_linear.configurations",
    "fslora_kernels.ops.grouped_sketched_linear.configurations",
    "fslora_kernels.ops.scatter_mean.configurations",
    "fslora_kernels.ops.sketched_adamw.configurations",
)
MAX_DIVISIBILITY = 16
_READING = Lock()


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU to compile for.

    Attributes:
        name: as people say it.
        backend: Triton's name of the vendor's compiler.
        arch: the compiler's name of the architecture.
        warp_size: threads.
        shared_limit_bytes: shared memory that one program may use.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit_bytes: int


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 166_912),
    Target("sm_90", "cuda", 90, 32, 232_448),
    Target("sm_100", "cuda", 100, 32, 232_448),
    Target("gfx942", "hip", "gfx942", 64, 65_536),
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation that a launch can ask for.

    Attributes:
        function: the kernel.
        dtype: of the activations, then of the factors where it differs, then the arithmetic.
        signature: Triton's type of every runtime argument that is not None.
        constants: value of every compile-time argument.
        aligned: runtime arguments known to be multiples of 16 (addresses: in bytes).
        within_2gb: addresses known to lie in storages below 2 GiB (matters on AMD only).
        warps: of one program.
        stages: of the load pipeline.
    """

    function: Any
    dtype: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    within_2gb: frozenset[str]
    warps: int
    stages: int

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return str(self.function.__name__).removesuffix("_kernel")

    @property
    def configuration(self) -> str:
        """The compile-time arguments, flags that are off left out."""
        shown = [
            name if value is True else f"{name}={value}"
            for name, value in self.constants.items()
            if value is not False
        ]
        if "gain" in self.signature and self.signature["gain"].startswith("*"):
            shown.append("gain tensor")
        return " ".join([*shown, f"warps={self.warps}", f"stages={self.stages}"])

    def attributes(self, backend: str) -> dict[tuple[int], list[list[str | int]]]:
        """What the compiler is told of each runtime argument, by its position."""
        told: dict[tuple[int], list[list[str | int]]] = {}
        for name in self.signature:
            hints: list[list[str | int]] = []
            if name in self.aligned:
                hints.append(["tt.divisibility", MAX_DIVISIBILITY])
            if backend == "hip" and name in self.within_2gb:
                hints.append(["tt.pointer_range", 32])
            if hints:
                told[(self.function.arg_names.index(name),)] = hints
        return told

    def types(self) -> dict[str, str]:
        """Triton's type of every argument; what is not there at run time is a constant."""
        return {name: self.signature.get(name, "constexpr") for name in self.function.arg_names}

    def values(self) -> dict[tuple[int], Any]:
        """Value of every constant by its position; an argument that is absent is None."""
        names = self.function.arg_names
        return {
            (position,): self.constants.get(name)
            for position, name in enumerate(names)
            if name not in self.signature
        }


@dataclass(frozen=True, slots=True)
class Report:
    """What one compilation needs.

    Attributes:
        kernel: its name.
        dtype: as in the variant.
        configuration: as in the variant.
        target: the target's name.
        registers: of one thread.
        spilled: registers spilled anywhere (AMD), else 0.
        stack_bytes: of one thread: spills and local arrays.
        shared_bytes: shared memory of one program.
        shared_limit_bytes: what the target has.
        matrix_unit: the instruction of the products: "wgmma", "tcgen05", "mma", "mfma", or "none".
    """

    kernel: str
    dtype: str
    configuration: str
    target: str
    registers: int
    spilled: int
    stack_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    matrix_unit: str

    def problems(self) -> list[str]:
        """Why dispatch must not select this compilation; empty if it may."""
        found = []
        if self.spilled or self.stack_bytes:
            found.append(f"spills ({self.spilled} registers, {self.stack_bytes} bytes of stack)")
        if self.shared_bytes > self.shared_limit_bytes:
            found.append(f"{self.shared_bytes} bytes of shared memory > {self.shared_limit_bytes}")
        return found


def variants(target: Target) -> list[Variant]:
    """List every compilation that dispatch can select on a target."""
    return [
        variant for module in BACKENDS for variant in import_module(module).variants(target.name)
    ]


def representatives(every: Sequence[Variant], count: int, *, rotate: int = 0) -> list[Variant]:
    """Choose up to ``count`` variants of each kernel and dtype, evenly spaced and always the same.

    Args:
        every: what to choose from.
        count: per kernel and dtype.
        rotate: moves the choice, so that several targets together cover more.

    Returns:
        The chosen variants, in their order.
    """
    groups: dict[tuple[str, str], list[Variant]] = {}
    for variant in every:
        groups.setdefault((variant.kernel, variant.dtype), []).append(variant)
    chosen = []
    for number, group in enumerate(groups.values()):
        picks = min(count, len(group))
        # A prime that divides no group's size: flags and ranks vary from group to group.
        first = 37 * (number + rotate)
        chosen += [
            group[(pick * len(group) // picks + first) % len(group)] for pick in range(picks)
        ]
    return chosen


def compile_all(
    pairs: Iterable[tuple[Variant, Target]] | None = None, *, workers: int = 1
) -> list[Report]:
    """Compile variants in a cache of their own, which is removed afterwards.

    Args:
        pairs: what to compile for what; None takes every variant of every target (thousands).
        workers: threads that compile at the same time.

    Returns:
        One report per pair, in their order.

    Raises:
        ValueError: kernels are being interpreted, so there is nothing to compile.
    """
    if interpreting():
        raise ValueError("nothing is compiled under TRITON_INTERPRET=1; unset it and start again")
    if pairs is None:
        pairs = [(variant, target) for target in TARGETS for variant in variants(target)]
    with private_cache(), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda pair: compile_variant(*pair), pairs))


@contextmanager
def private_cache() -> Iterator[None]:
    """Let Triton cache compilations in a folder of our own, removed on leaving."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        yield


def compile_for(variant: Variant, target: Target) -> Any:  # noqa: ANN401
    """Compile one variant for one target through Triton's cache; Triton's own result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    class Source(ASTSource):  # type: ignore[misc]
        """Reads Python one at a time: CPython 3.11 cannot build two syntax trees at once."""

        def make_ir(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            with _READING:
                return super().make_ir(*args, **kwargs)

    with _READING:
        _ = variant.function.cache_key  # it reads the source too, and keeps what it found
    source = Source(
        variant.function, variant.types(), variant.values(), variant.attributes(target.backend)
    )
    options = {
        "num_warps": variant.warps,
        "num_stages": variant.stages,
        "enable_fp_fusion": True,
    }
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=gpu, options=options)


def compile_variant(variant: Variant, target: Target) -> Report:
    """Compile one variant for one target through Triton's cache and say what it needs."""
    compiled = compile_for(variant, target)
    read = _read_amd if target.backend == "hip" else _read_nvidia
    registers, spilled, stack_bytes, unit = read(compiled.asm)
    return Report(
        variant.kernel,
        variant.dtype,
        variant.configuration,
        target.name,
        registers,
        spilled,
        stack_bytes,
        compiled.metadata.shared,
        target.shared_limit_bytes,
        unit,
    )


def _read_nvidia(asm: Mapping[str, Any]) -> tuple[int, int, int, str]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage; it printed: {usage!r}")
    registers, stack_bytes, local_bytes = (int(number) for number in found.groups())
    ptx = asm["ptx"]
    units = (("tcgen05.mma", "tcgen05"), ("wgmma.mma", "wgmma"), ("mma.sync", "mma"))
    unit = next((name for text, name in units if text in ptx), "none")
    return registers, 0, stack_bytes + local_bytes, unit


def _read_amd(asm: Mapping[str, Any]) -> tuple[int, int, int, str]:
    text = asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"the assembly has no {key!r}; this Triton writes it differently")
        return int(found[1])

    spilled = number("vgpr_spill_count") + number("sgpr_spill_count")
    unit = "mfma" if "v_mfma" in text else "none"
    return number("vgpr_count"), spilled, number("private_segment_fixed_size"), unit


def table(reports: Sequence[Report]) -> str:
    """Lay reports out as text, one line each."""
    head = ("kernel", "dtype", "target", "unit", "regs", "spill", "stack B", "shared B", "config")
    rows = [head] + [
        (
            report.kernel,
            report.dtype,
            report.target,
            report.matrix_unit,
            str(report.registers),
            str(report.spilled),
            str(report.stack_bytes),
            str(report.shared_bytes),
            report.configuration,
        )
        for report in reports
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
