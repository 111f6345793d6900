"""The Triton kernel in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter."""

import pytest
import torch

from fslora_kernels import scatter_mean
from fslora_kernels._dispatch import interpreting
from fslora_kernels.ops.scatter_mean.cases import CASES, inputs
from fslora_kernels.ops.scatter_mean.op import Arguments, choose

from .test_scatter_mean_torch import ScatterMeanContract

if not interpreting():
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter


class TestTriton(ScatterMeanContract):
    implementation = "triton"
    dtypes = (torch.float32, torch.float16)  # bfloat16 is refused, see below


def test_rows_of_a_wider_matrix_are_read_in_place():
    arguments = inputs(CASES[0], torch.float32)
    wide = torch.full((14, 100), float("nan"))
    wide[:, 7:71] = arguments["rows"]
    strided = {**arguments, "rows": wide[:, 7:71]}
    wanted = scatter_mean(**arguments, implementation="torch")
    assert torch.equal(scatter_mean(**strided, implementation="triton"), wanted)


@pytest.mark.parametrize(
    ("dtype", "reason"), [(torch.bfloat16, "truncates"), (torch.float64, "float64")]
)
def test_what_the_kernel_does_not_do_is_refused_with_the_reason(dtype, reason):
    arguments = inputs(CASES[0], dtype)
    with pytest.raises(NotImplementedError, match=reason):
        scatter_mean(**arguments, implementation="triton")
    rows, index = arguments["rows"], arguments["index"]
    passed_over = choose(Arguments(rows, index, torch.ones(8)), "auto")
    assert passed_over.implementation == "torch"
    assert reason in passed_over.reason
    assert choose(Arguments(rows.float(), index, torch.ones(8)), None).implementation == "triton"
