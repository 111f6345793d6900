"""Compile what dispatch can select, without a GPU, and refuse what would spill or not fit."""

import os
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch

from fslora_kernels import _launch, aot
from fslora_kernels._dispatch import interpreting
from fslora_kernels.ops.sketched_linear.cases import Case
from fslora_kernels.ops.sketched_linear.op import Arguments
from fslora_kernels.testing import inputs

if interpreting():
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
from fslora_kernels.ops.sketched_linear import backend_triton, configurations

pytestmark = pytest.mark.aot

BY_NAME = {target.name: target for target in aot.TARGETS}
PER_COMMIT = 2  # compilations of each kernel, dtype and target
# What sm_80's tiles may use: the processors of 8.6 and 8.9 have less than 8.0 and share them.
SMALLEST_AMPERE_BYTES = 101_376


def expected_units(report):
    """The matrix instructions that are good enough for a kernel's products."""
    if report.kernel.endswith("reduce") or report.kernel in (
        "mask",
        "scatter_mean",
        "sketched_adamw",
    ):
        return {"none"}
    if report.target == "gfx942":
        return {"mfma"}
    if report.dtype.endswith("ieee"):
        return {"none"}
    if report.target == "sm_90" and "DROP_X" in report.configuration:
        return {"mma"}  # wgmma would race for its registers: see ``DROPPING``
    return {"sm_80": {"mma"}, "sm_90": {"wgmma"}, "sm_100": {"tcgen05"}}[report.target]


def check(reports):
    problems = [
        f"{report.kernel} {report.dtype} {report.target}: {problem} [{report.configuration}]"
        for report in reports
        for problem in [
            *report.problems(),
            *([report.matrix_unit] if report.matrix_unit not in expected_units(report) else []),
            *(
                ["too much for compute capability 8.6"]
                if report.target == "sm_80" and report.shared_bytes > SMALLEST_AMPERE_BYTES
                else []
            ),
        ]
    ]
    assert not problems, "\n".join(problems)


def test_a_few_compilations_of_every_kernel_dtype_and_target():
    pairs = [
        (variant, target)
        for number, target in enumerate(aot.TARGETS)
        for variant in aot.representatives(aot.variants(target), PER_COMMIT, rotate=number)
    ]
    assert len(pairs) <= 150
    reports = aot.compile_all(pairs, workers=os.cpu_count() or 1)
    check(reports)
    assert len(aot.table(reports).splitlines()) == 1 + len(reports)
    covered = {(report.kernel, report.dtype, report.target) for report in reports}
    every = {
        (variant.kernel, variant.dtype, target.name)
        for target in aot.TARGETS
        for variant in aot.variants(target)
    }
    assert covered == every


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS, ids=lambda target: target.name)
def test_every_compilation(target):
    pairs = [(variant, target) for variant in aot.variants(target)]
    reports = aot.compile_all(pairs, workers=os.cpu_count() or 1)
    check(reports)


def test_masked_x_never_meets_an_asynchronous_product():
    target = BY_NAME["sm_90"]
    pairs = [
        (variant, target)
        for variant in configurations.variants("sm_90")
        if variant.constants.get("DROP_X") and variant.dtype == "bf16 half"
    ]
    # With all that can be added, which takes the most registers.
    added = {"HAS_BIAS", "HAS_GAIN_TENSOR", "EXPAND"}
    full = [(v, t) for v, t in pairs if all(v.constants.get(name, True) for name in added)]
    assert len({(v.kernel, v.constants["P"]) for v, _ in full}) == 6
    check(aot.compile_all(full, workers=os.cpu_count() or 1))


def test_a_compilation_that_spills_or_does_not_fit_is_reported():
    target = BY_NAME["sm_90"]
    fine = next(v for v in aot.variants(target) if v.kernel == "apply" and v.dtype == "bf16 half")
    wide = replace(fine, constants={**fine.constants, "P": 128, "T": 128}, warps=4)
    small = replace(target, shared_limit_bytes=1000)
    spilling, crowded = aot.compile_all([(wide, target), (fine, small)])
    assert any("spills" in problem for problem in spilling.problems())
    assert crowded.problems() == [f"{crowded.shared_bytes} bytes of shared memory > 1000"]


def test_offsets_along_rows_are_64_bit():
    target = BY_NAME["sm_90"]
    for kernel in ("apply", "wgrad", "reduce"):
        variant = next(v for v in aot.variants(target) if v.kernel == kernel)
        with aot.private_cache():
            code = aot.compile_for(variant, target).asm["ttir"]
        products = re.findall(r"arith\.muli .*: tensor<\d+x\d+x(i\d+)>", code)
        assert products, kernel
        assert set(products) == {"i64"}, kernel


# -- what launches ask for is what is compiled ----------------------------------------------------


@cache
def binder(kernel, target):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    compiler = make_backend(GPUTarget(target.backend, target.arch, target.warp_size))
    return compiler, create_function_from_signature(kernel.signature, kernel.params, compiler)


def specialisation(kernel, target, arguments, tiles):
    """Return what Triton's own launcher would compile for these arguments."""
    compiler, bind = binder(kernel, target)
    bound, found, _ = bind(**arguments)
    types = {
        parameter.name: kind for parameter, (kind, _) in zip(kernel.params, found, strict=True)
    }
    values = {
        (position,): bound[name]
        for position, (name, kind) in enumerate(types.items())
        if kind == "constexpr"
    }
    attributes = {
        (position,): compiler.parse_attr(hint)
        for position, (kind, hint) in enumerate(found)
        if kind != "constexpr" and hint
    }
    return freeze(kernel, types, values, attributes, tiles.warps, tiles.stages)


def freeze(kernel, types, values, attributes, warps, stages):
    told = str(sorted(attributes.items()))
    return (kernel.__name__, str(types), str(values), told, warps, stages)


@contextmanager
def fp32_precision(precision):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


KINDS = (
    (torch.float32, torch.float32, "none"),
    (torch.float32, torch.float32, "tf32"),
    (torch.float16, torch.float16, "none"),
    (torch.float16, torch.float32, "none"),
    (torch.bfloat16, torch.bfloat16, "none"),
    (torch.bfloat16, torch.float32, "none"),
)


def calls(dtype, factor_dtype):
    """Every kind of call that dispatch accepts."""
    for rank in (8, 24, 48, 100):
        for bits in range(64):
            index, bias, weighted, tensor_scale, rank_major, drop = (
                bits >> n & 1 for n in range(6)
            )
            shape = Case("call", 3, 32, 48, rank, rank - 1 if index else None, bool(bias))
            shape = replace(shape, rank_weight=bool(weighted), tensor_scale=bool(tensor_scale))
            tensors = inputs(replace(shape, rank_major_b=bool(rank_major)), dtype)
            gain = 1 if rank == 8 and not tensor_scale else tensors["scale"]
            if weighted:
                gain = gain * tensors["rank_weight"]
            yield Arguments(
                tensors["x"],
                tensors["weight"],
                tensors["lora_a"].to(factor_dtype),
                tensors["lora_b"].to(factor_dtype).t(),
                tensors["index"],
                tensors["bias"],
                gain,
                0.25 * drop,
                0,
            )


@pytest.mark.parametrize("target", aot.TARGETS, ids=lambda target: target.name)
def test_launches_ask_for_the_enumerated_compilations_and_no_others(target, monkeypatch):
    asked = set()

    def record(kernel, grid, tiles, like, **arguments):
        assert all(size > 0 for size in grid)
        asked.add(specialisation(kernel, target, arguments, tiles))

    monkeypatch.setattr(_launch, "launch", record)
    monkeypatch.setattr(_launch, "target_of", lambda device: (target.name, 100))
    for dtype, factor_dtype, precision in KINDS:
        with fp32_precision(precision):
            for arguments in calls(dtype, factor_dtype):
                if arguments.dropout and (dtype == torch.float32 or len(arguments.lora_a) > 64):
                    assert "spill" in backend_triton.refuses(arguments)
                    continue
                assert backend_triton.refuses(arguments) is None
                y, kept = backend_triton.forward(arguments)
                for needs_x in (True, False):
                    backend_triton.backward(arguments, kept, y, (needs_x, True, True))
    small = [
        v
        for v in configurations.variants(target.name)
        if "x" in v.within_2gb or "x" not in v.signature
    ]
    enumerated = [
        freeze(v.function, v.types(), v.values(), v.attributes(target.backend), v.warps, v.stages)
        for v in small
    ]
    assert len(set(enumerated)) == len(enumerated)
    assert asked == set(enumerated)


def gpu_call(monkeypatch, target="sm_90", **changes):
    monkeypatch.setattr(_launch, "target_of", lambda device: (target, 132))
    tensors = {**inputs(Case("call", 3, 32, 48, 8, 4), torch.bfloat16), **changes}
    tensors["lora_b"] = tensors["lora_b"].t()
    names = ("x", "weight", "lora_a", "lora_b", "index", "bias", "scale")
    return backend_triton.refuses(Arguments(*(tensors[name] for name in names), 0.0, 0))


def test_on_a_gpu_what_was_not_compiled_is_refused(monkeypatch):
    assert gpu_call(monkeypatch) is None
    assert "no tiles were chosen for sm_70" in gpu_call(monkeypatch, target="sm_70")
    odd = inputs(Case("odd", 3, 32, 40, 8, 4), torch.bfloat16)
    assert "multiples of 16" in gpu_call(monkeypatch, **odd)
    transposed = torch.zeros(32, 8, dtype=torch.bfloat16).t()
    assert "lora_a.contiguous()" in gpu_call(monkeypatch, lora_a=transposed)
    shifted = torch.zeros(48 * 8 + 1, dtype=torch.bfloat16)[1:].view(48, 8)
    assert "lora_b.clone()" in gpu_call(monkeypatch, lora_b=shifted)


def test_misaligned_activations_are_copied_once_and_others_not():
    good = torch.zeros(4, 96, dtype=torch.bfloat16)
    for view in (good, good[:, :32], good[:1, :32], good[:1].expand(4, 96)):
        rows, stride = _launch.rows(view)
        assert rows is view
        assert stride % 16 == 0
    for view in (good.t(), good[:, 1:33], torch.zeros(4, 100)[:, :32], good[0, 0].expand(4, 96)):
        rows, stride = _launch.rows(view)
        assert rows is not view
        assert torch.equal(rows, view)
        assert rows.stride() == (stride, 1)
        assert rows.data_ptr() % 16 == 0


def test_nothing_is_compiled_while_interpreting(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="unset it"):
        aot.compile_all([])
