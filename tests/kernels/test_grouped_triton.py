"""The grouped kernels in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora_kernels import grouped_sketched_linear
from fslora_kernels._dispatch import interpreting
from fslora_kernels.ops.grouped_sketched_linear.cases import Case, inputs
from fslora_kernels.ops.grouped_sketched_linear.op import Arguments, choose
from fslora_kernels.ops.grouped_sketched_linear.plan import TOKENS_PER_SPLIT, plan
from fslora_kernels.ops.grouped_sketched_linear.reference import reference
from fslora_kernels.testing import value_and_gradients

from .test_grouped_contract import GroupedContract, draw_dy, exact, named
from .test_grouped_torch import any_case

if not interpreting():
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter


class TestTriton(GroupedContract):
    implementation = "triton"
    dtypes = (torch.float32, torch.float16)  # bfloat16 is refused, see below


def triton(**arguments):
    return grouped_sketched_linear(**arguments, implementation="triton")


def check_against_float64(case, *, seed=0, dy=None, **changes):
    """Compare in float32 with float64, for shapes whose eager error is not worth computing."""
    arguments = inputs(case, torch.float32, seed=seed) | changes
    dy = draw_dy(case, torch.float32) if dy is None else dy
    actual = value_and_gradients(triton, arguments, dy)
    wanted = value_and_gradients(reference, exact(arguments), dy.double())
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name].double(), value, rtol=1e-4, atol=1e-4, msg=name)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    check_against_float64(any_case(data, 40), seed=data.draw(st.integers(0, 99)))


def test_every_padding_of_the_ranks_in_one_call():
    check_against_float64(
        Case("padding", (9, 8, 7, 0, 5, 33, 3, 1), (15, 16, 17, 64, 33, 65, 127, 1), 32, 48, 127)
    )


def test_groups_of_many_tokens_are_summed_in_splits():
    tokens = TOKENS_PER_SPLIT + 40
    check_against_float64(Case("splits", (tokens, 20, 2 * tokens), (3, 2, 4), 32, 32, pool=5))


def test_rows_of_wider_matrices_are_read_in_place():
    arguments = inputs(named("shared_rank_rows"), torch.float32)
    wide = {}
    for name in ("x", "lora_a", "lora_b"):
        matrix = torch.full((arguments[name].shape[0], 100), float("nan"))
        matrix[:, :64] = arguments[name]
        wide[name] = matrix[:, :64]
    assert torch.equal(triton(**{**arguments, **wide}), triton(**arguments))


@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_factors_of_any_strides(name):
    case = named("shared_rank_rows")
    factor = inputs(case, torch.float32)[name]
    check_against_float64(case, **{name: factor.t().contiguous().t()})


def test_an_expanded_gradient_of_the_output():
    check_against_float64(named("middle_without_tokens"), dy=torch.ones(()).expand(29, 48))


def test_saved_tensors_may_be_replaced_by_copies():
    arguments = inputs(named("compact_leaves"), torch.float32)
    leaves = [arguments[name].requires_grad_() for name in ("x", "lora_a", "lora_b")]
    wanted = torch.autograd.grad(triton(**arguments).sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.numpy().copy(), torch.from_numpy
    ):
        y = triton(**arguments)
    for got, want in zip(torch.autograd.grad(y.sum(), leaves), wanted, strict=True):
        assert torch.equal(got, want)


def refused(**changes):
    arguments = inputs(Case("refused", (2, 2), (8, 4), 32, 32), torch.float32) | changes
    with pytest.raises(NotImplementedError) as refusal:
        triton(**arguments)
    return str(refusal.value)


def test_bfloat16_is_refused_because_the_interpreter_multiplies_its_bits():
    low = inputs(Case("low", (2, 2), (8, 4), 32, 32), torch.bfloat16)
    assert "raw bits of bfloat16" in refused(**low)
    wanted = grouped_sketched_linear(**low, implementation="torch")
    assert torch.equal(grouped_sketched_linear(**low), wanted)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (inputs(Case("double", (2, 2), (8, 4), 32, 32), torch.float64), "float64"),
        ({"lora_a": torch.zeros(12, 32).half()}, "both in float32"),
        (inputs(Case("many", (2, 2), (8, 128), 32, 32), torch.float32), "more than 127 ranks"),
    ],
    ids=["float64", "mixed factors", "many ranks"],
)
def test_what_the_kernels_do_not_do_is_refused_with_the_reason(change, reason):
    assert reason in refused(**change)


def test_auto_takes_the_kernels_and_says_why_not():
    def chosen(ranks):
        tensors = inputs(Case("auto", (2, 2), (8, ranks), 32, 32), torch.float32)
        tensors["gain"] = torch.tensor(tensors.pop("scale"))
        tensors |= {name: tuple(tensors[name]) for name in ("token_offsets", "rank_offsets")}
        return choose(Arguments(**tensors), "auto")

    assert chosen(4).implementation == "triton"
    passed_over = chosen(128)
    assert passed_over.implementation == "torch"
    assert "not triton: a group has more than 127 ranks" in passed_over.reason


def test_the_same_offsets_are_laid_out_once():
    case = named("compact_leaves")
    check_against_float64(case)
    before = plan.cache_info()
    check_against_float64(case)
    after = plan.cache_info()
    assert after.misses == before.misses
    assert after.hits > before.hits
