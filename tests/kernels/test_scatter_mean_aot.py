"""What launches of the Triton kernel ask for, and what its offsets are computed in."""

import re
from types import SimpleNamespace

import pytest
import torch

from fslora_kernels import aot
from fslora_kernels._dispatch import interpreting

if interpreting():
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
from fslora_kernels.ops.scatter_mean import backend_triton, configurations
from fslora_kernels.ops.scatter_mean.cases import CASES, inputs
from fslora_kernels.ops.scatter_mean.op import Arguments

from .test_aot import BY_NAME, freeze, specialisation

pytestmark = pytest.mark.aot
TILES = SimpleNamespace(warps=backend_triton.WARPS, stages=backend_triton.STAGES)


@pytest.mark.parametrize("target", aot.TARGETS, ids=lambda target: target.name)
def test_launches_ask_for_the_enumerated_compilations_and_no_others(target, monkeypatch):
    asked = set()

    def record(kernel, grid, like, **arguments):
        assert all(size > 0 for size in grid)
        asked.add(specialisation(kernel, target, arguments, TILES))

    monkeypatch.setattr(backend_triton, "_launch", record)
    for dtype in backend_triton.DTYPES:
        for case in CASES:
            tensors = inputs(case, dtype)
            arguments = Arguments(tensors["rows"], tensors["index"], torch.ones(case.size))
            if arguments.rows.numel():
                assert backend_triton.refuses(arguments) is None
                backend_triton.forward(arguments)
    enumerated = [
        freeze(v.function, v.types(), v.values(), v.attributes(target.backend), v.warps, v.stages)
        for v in configurations.variants(target.name)
        if "rows" in v.within_2gb
    ]
    assert len(set(enumerated)) == len(enumerated)
    assert asked == set(enumerated)


def test_offsets_are_64_bit():
    variant = next(configurations.variants("sm_90"))
    with aot.private_cache():
        code = aot.compile_for(variant, BY_NAME["sm_90"]).asm["ttir"]
    products = re.findall(r"arith\.muli .*: (?:tensor<\d+x)?(i\d+)", code)
    assert products
    assert set(products) == {"i64"}
