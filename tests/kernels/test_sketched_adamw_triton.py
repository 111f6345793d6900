"""The Triton kernel in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter."""

import pytest
import torch

from fslora_kernels import sketched_adamw
from fslora_kernels._dispatch import interpreting
from fslora_kernels.ops.sketched_adamw.cases import CASES, inputs
from fslora_kernels.ops.sketched_adamw.op import Arguments, Rule, choose

from .test_sketched_adamw_torch import WRITTEN, SketchedAdamWContract, copied

if not interpreting():
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter


class TestTriton(SketchedAdamWContract):
    implementation = "triton"
    dtypes = (torch.float32, torch.float16)  # bfloat16 is refused, see below


def test_bias_corrections_are_accurate_from_the_first_step_to_the_millionth():
    counts = torch.tensor([0, 1, 9, 99, 499, 511, 999, 9999, 999_999])
    arguments = {
        **inputs(CASES[0], torch.float32),
        "parameter": torch.zeros(9, 1),
        "gradient": torch.ones(9, 1),
        "exp_avg": torch.zeros(9, 1),
        "exp_avg_sq": torch.zeros(9, 1),
        "steps": counts.clone(),
        "lr": 1.0,
        "eps": 0.0,
    }
    sketched_adamw(**arguments, implementation="triton")
    t = (counts + 1).double()
    wanted = -(0.1 / (1 - 0.9**t)) / (0.001 / (1 - 0.999**t)).sqrt()
    got = arguments["parameter"].flatten().double()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0.0)


def refusal(arguments):
    before = copied(arguments)
    with pytest.raises(NotImplementedError) as refused:
        sketched_adamw(**arguments, implementation="triton")
    for name in WRITTEN:
        assert torch.equal(arguments[name], before[name])
    return str(refused.value)


def test_what_the_kernel_does_not_do_is_refused_with_the_reason():
    assert "truncates" in refusal(inputs(CASES[0], torch.bfloat16))
    assert "float64" in refusal(inputs(CASES[0], torch.float64))
    mixed = inputs(CASES[0], torch.float16)
    mixed["gradient"] = mixed["gradient"].float()
    assert "gradient is torch.float32 but parameter is torch.float16" in refusal(mixed)
    sketched_adamw(**mixed)


def test_auto_takes_the_kernel_and_says_why_not():
    def chosen(dtype):
        tensors = inputs(CASES[0], dtype)
        names = ("parameter", "gradient", "exp_avg", "exp_avg_sq", "steps", "index")
        rule = Rule(0.1, (0.9, 0.999), 1e-8, 0.0)
        return choose(Arguments(*(tensors[name] for name in names), rule), "auto")

    assert chosen(torch.float32).implementation == "triton"
    passed_over = chosen(torch.float64)
    assert passed_over.implementation == "torch"
    assert "not triton: parameter is torch.float64" in passed_over.reason
