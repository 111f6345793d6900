"""What launches of the grouped kernels ask for, and what their offsets are computed in."""

import re
from dataclasses import replace

import pytest
import torch

from fslora_kernels import _launch, aot
from fslora_kernels._dispatch import interpreting
from fslora_kernels.ops.grouped_sketched_linear.cases import Case, inputs
from fslora_kernels.ops.grouped_sketched_linear.op import Arguments

if interpreting():
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
from fslora_kernels.ops.grouped_sketched_linear import backend_triton, configurations

from .test_aot import BY_NAME, KINDS, fp32_precision, freeze, specialisation

pytestmark = pytest.mark.aot


def as_arguments(tensors):
    tensors = {**tensors, "gain": torch.tensor(tensors["scale"])}
    del tensors["scale"]
    return Arguments(
        **tensors | {name: tuple(tensors[name]) for name in ("token_offsets", "rank_offsets")}
    )


def calls(dtype, factor_dtype):
    """Every kind of call that dispatch accepts, all paddings of the ranks in each."""
    case = Case("call", (3, 2, 0, 7, 1), (8, 24, 3, 48, 100), 32, 48)
    for pool, bias in ((None, False), (None, True), (100, False), (100, True)):
        tensors = inputs(replace(case, pool=pool, bias=bias), dtype)
        for name in ("lora_a", "lora_b"):
            tensors[name] = tensors[name].to(factor_dtype)
        yield as_arguments(tensors)


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
                assert backend_triton.refuses(arguments) is None
                y, h = backend_triton.forward(arguments)
                for needs_x in (True, False):
                    backend_triton.backward(arguments, h, y, (needs_x, True, True))
    enumerated = [
        freeze(v.function, v.types(), v.values(), v.attributes(target.backend), v.warps, v.stages)
        for v in configurations.variants(target.name)
        if "x" in v.within_2gb or "x" not in v.signature
    ]
    assert len(set(enumerated)) == len(enumerated)
    assert asked == set(enumerated)


def test_offsets_along_rows_are_64_bit():
    for kernel in ("grouped_apply", "grouped_wgrad"):
        variant = next(v for v in configurations.variants("sm_90") if v.kernel == kernel)
        with aot.private_cache():
            code = aot.compile_for(variant, BY_NAME["sm_90"]).asm["ttir"]
        products = re.findall(r"arith\.muli .*: tensor<\d+x\d+x(i\d+)>", code)
        assert products, kernel
        assert set(products) == {"i64"}, kernel


def test_offsets_of_the_reduction_are_64_bit():
    *_, variant = configurations.variants("sm_90")
    with aot.private_cache():
        code = aot.compile_for(variant, BY_NAME["sm_90"]).asm["ttir"]
    products = re.findall(r"arith\.muli (%\w+), (%\w+) : (i\d+)", code)
    by_features = [kind for *_, kind in products if kind == "i64"]
    assert len(by_features) >= 3, "of a place in parts, a row of partial sums, a row of the result"
    assert [kind for *_, kind in products if kind != "i64"] == ["i32"], "columns: F times a program"


def refusal(monkeypatch, target="sm_90", **changes):
    monkeypatch.setattr(_launch, "target_of", lambda device: (target, 132))
    tensors = inputs(Case("call", (3, 2), (8, 4), 32, 48, pool=8), torch.bfloat16)
    return backend_triton.refuses(as_arguments(tensors | changes))


def test_on_a_gpu_what_was_not_compiled_is_refused(monkeypatch):
    assert refusal(monkeypatch) is None
    assert "no tiles were chosen for sm_70" in refusal(monkeypatch, target="sm_70")
    odd = inputs(Case("odd", (3, 2), (8, 4), 32, 40, pool=8), torch.bfloat16)
    assert "multiples of 16" in refusal(monkeypatch, **odd)
    for name, features in (("lora_a", 32), ("lora_b", 48)):
        transposed = torch.zeros(features, 8, dtype=torch.bfloat16).t()
        assert f"{name}.contiguous()" in refusal(monkeypatch, **{name: transposed})
        shifted = torch.zeros(8 * features + 1, dtype=torch.bfloat16)[1:].view(8, features)
        assert f"{name}.clone()" in refusal(monkeypatch, **{name: shifted})
