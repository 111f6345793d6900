"""The Triton kernels in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fslora_kernels import sketched_linear
from fslora_kernels._dispatch import interpreting
from fslora_kernels.ops.sketched_linear.cases import CASES, Case
from fslora_kernels.ops.sketched_linear.op import Arguments, choose
from fslora_kernels.ops.sketched_linear.reference import reference
from fslora_kernels.testing import inputs, value_and_gradients

from .contract import SketchedLinearContract

if not interpreting():
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

MATRICES = ("x", "lora_a", "lora_b")


class TestTriton(SketchedLinearContract):
    implementation = "triton"
    dtypes = (torch.float32, torch.float16)  # bfloat16 is refused, see below


def case(name):
    return next(case for case in CASES if case.name == name)


def triton(**arguments):
    return sketched_linear(**arguments, implementation="triton")


def check_against_float64(case, *, seed=0, dy=None):
    """Compare in float32 with float64, for shapes whose eager error is not worth computing."""
    arguments = inputs(case, torch.float32, seed=seed)
    exact_arguments = inputs(case, torch.float64, seed=seed)
    if dy is None:
        generator = torch.Generator().manual_seed(seed)
        dy = torch.randn(case.tokens, case.out_features, generator=generator)
    actual = value_and_gradients(triton, arguments, dy)
    exact = value_and_gradients(reference, exact_arguments, dy.double())
    for name, wanted in exact.items():
        torch.testing.assert_close(actual[name].double(), wanted, rtol=1e-4, atol=1e-4, msg=name)
    return arguments, actual


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    size = st.integers(1, 70)
    rank = data.draw(st.integers(1, 70))
    check_against_float64(
        Case(
            "any",
            data.draw(st.integers(0, 70)),
            data.draw(size),
            data.draw(size),
            rank,
            data.draw(st.none() | st.integers(1, rank)),
            bias=data.draw(st.booleans()),
            base=data.draw(st.booleans()),
            strided_x=data.draw(st.booleans()),
            rank_major_b=data.draw(st.booleans()),
            rank_weight=data.draw(st.booleans()),
        ),
        seed=data.draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("sketch_size", [15, 16, 17, 32, 33, 64, 65, 127])
def test_every_padding_of_the_ranks(sketch_size):
    check_against_float64(Case("padding", 33, 32, 48, 127, sketch_size, rank_weight=True))


@pytest.mark.parametrize("rank_major_b", [False, True])
@pytest.mark.parametrize("sketch_size", [None, 4])
def test_gradients_have_the_strides_of_the_factors(rank_major_b, sketch_size):
    shape = Case("strides", 20, 32, 48, 8, sketch_size, rank_major_b=rank_major_b)
    arguments, actual = check_against_float64(shape)
    for name in ("lora_a", "lora_b"):
        assert actual[name].stride() == arguments[name].stride()


@pytest.mark.parametrize(
    "wanted", [("x",), ("lora_a",), ("lora_b",), ("x", "lora_b")], ids="+".join
)
def test_gradients_do_not_depend_on_which_others_are_wanted(wanted):
    arguments = inputs(case("half"), torch.float32)
    dy = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    every = value_and_gradients(triton, arguments, dy)
    leaves = {name: arguments[name].clone().requires_grad_() for name in wanted}
    gradients = torch.autograd.grad(triton(**{**arguments, **leaves}), list(leaves.values()), dy)
    for name, gradient in zip(wanted, gradients, strict=True):
        assert torch.equal(gradient, every[name]), name


def test_rows_of_a_wider_matrix_are_read_in_place():
    arguments = inputs(case("view_rank_major"), torch.float32)
    wide = torch.full((64, 100), float("nan"))
    wide[:, :64] = arguments["x"]
    strided = {**arguments, "x": wide[:, :64]}
    assert torch.equal(triton(**strided), triton(**arguments))


@pytest.mark.parametrize("name", ["x", "lora_a", "lora_b"])
def test_rows_that_lie_more_than_two_to_the_31_elements_apart(name):
    arguments = inputs(Case("far", 3, 16, 16, 3, 2), torch.float16)
    # The last row begins beyond 2³¹ elements; pages that nobody touches take no memory.
    row = 2**30 + 64
    storage = torch.from_numpy(np.zeros(2 * row + 16, dtype=np.float16))
    far = storage.as_strided((3, 16), (row, 1))
    far = far if name != "lora_b" else far.t()
    far.copy_(arguments[name])
    leaves = {**arguments, name: far}
    near = value_and_gradients(triton, arguments, torch.ones(3, 16, dtype=torch.float16))
    assert torch.equal(triton(**leaves), near["y"])
    if name == "x":  # a factor's gradient would be as far apart as the factor
        gradients = value_and_gradients(triton, leaves, torch.ones(3, 16, dtype=torch.float16))
        assert torch.equal(gradients["lora_a"], near["lora_a"])


def test_checkpointing_replays_the_same_bits_and_the_same_mask():
    arguments = inputs(case("half"), torch.float32)
    leaves = {name: arguments[name].requires_grad_() for name in MATRICES}
    for dropping in ({}, {"dropout": 0.5, "seed": 3}, {"dropout": 0.5}):

        def call(*tensors, dropping=dropping):
            given = dict(zip(MATRICES, tensors, strict=True))
            return triton(**{**arguments, **given}, **dropping)

        gradients = []
        for run in (call, partial(checkpoint, call, use_reentrant=False)):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                y = run(*leaves.values())
            gradients.append(torch.autograd.grad(y.sum(), list(leaves.values())))
        for plain, replayed in zip(*gradients, strict=True):
            assert torch.equal(plain, replayed)


def test_an_expanded_gradient_of_the_output():
    check_against_float64(case("full_rank_bias"), dy=torch.ones(()).expand(33, 80))


def test_saved_tensors_may_be_replaced_by_copies():
    arguments = inputs(case("half"), torch.float32)
    leaves = {name: arguments[name].requires_grad_() for name in MATRICES}
    wanted = torch.autograd.grad(triton(**arguments).sum(), list(leaves.values()))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.numpy().copy(), torch.from_numpy
    ):
        y = triton(**arguments)
    for got, want in zip(torch.autograd.grad(y.sum(), list(leaves.values())), wanted, strict=True):
        assert torch.equal(got, want)


def refused(change):
    arguments = {**inputs(Case("refused", 4, 32, 32, 8, 4), torch.float32), **change}
    with pytest.raises(NotImplementedError) as refusal:
        triton(**arguments)
    return str(refusal.value)


def test_bfloat16_is_refused_because_the_interpreter_multiplies_its_bits():
    low = inputs(Case("low", 4, 32, 32, 8, 4), torch.bfloat16)
    assert "raw bits of bfloat16" in refused(low)
    assert torch.equal(sketched_linear(**low), sketched_linear(**low, implementation="torch"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (inputs(Case("double", 4, 32, 32, 8, 4), torch.float64), "float64"),
        ({"lora_a": torch.zeros(8, 32).half()}, "both in float32"),
        (inputs(Case("many", 4, 32, 32, 130, 128), torch.float32), "more than 127 ranks"),
    ],
    ids=["float64", "mixed factors", "many ranks"],
)
def test_what_the_kernels_do_not_do_is_refused_with_the_reason(change, reason):
    assert reason in refused(change)


def test_auto_takes_the_kernels_and_says_why_not():
    def chosen(dtype):
        tensors = inputs(Case("auto", 4, 32, 32, 8, 4), dtype)
        tensors["lora_b"] = tensors["lora_b"].t()
        names = ("x", "weight", "lora_a", "lora_b", "index", "bias", "scale")
        return choose(Arguments(*(tensors[name] for name in names), 0.0, 0), "auto")

    assert chosen(torch.float32).implementation == "triton"
    passed_over = chosen(torch.float64)
    assert passed_over.implementation == "torch"
    assert "not triton: x is torch.float64" in passed_over.reason
