"""Where tokens are many the delta is merged into the base weight, in each pass anew."""

import math
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

from fslora_kernels import _dispatch, sketched_linear
from fslora_kernels.flops import count_flops
from fslora_kernels.ops.sketched_linear import backend_merged, backend_torch, cost, op
from fslora_kernels.ops.sketched_linear.cases import Case
from fslora_kernels.ops.sketched_linear.reference import reference
from fslora_kernels.testing import check_error_budget, inputs, value_and_gradients

from .contract import WITHOUT_DROPOUT, SketchedLinearContract

TOKENS, IN, OUT, RANK, SIZE = 192, 32, 48, 16, 4
MANY = Case("many tokens", TOKENS, IN, OUT, RANK, SIZE, bias=True)
NAMES = ("x", "weight", "lora_a", "lora_b", "bias")


@pytest.fixture(autouse=True)
def no_layer_is_small(monkeypatch):
    monkeypatch.setattr(backend_torch, "SMALL_LAYER", 0)


class TestMerged(SketchedLinearContract):
    """All cases that can be merged are, however few their tokens."""

    implementation = None

    @pytest.fixture(autouse=True)
    def always(self, monkeypatch):
        monkeypatch.setattr(backend_merged, "pays", lambda *_: True)

    def test_all_that_can_be_merged_are(self):
        able = [case for case in WITHOUT_DROPOUT if case.base]
        assert len(able) > 12
        for case in able:
            own = inputs(case, torch.float32)
            call = call_of(**{name: own[name] for name in ("x", "weight", "lora_a", "index")})
            assert chosen(call, None).implementation == "merged", case.name


def chosen(call, requested):
    choice = op.choose(call, requested)
    named = _dispatch.first(op.BACKENDS, call, "cpu", requested)
    assert named == choice.implementation, "what a call takes is what is explained"
    return choice


def call_of(**changes):
    arguments = inputs(MANY, changes.pop("dtype", torch.float32))
    b_RE = arguments["lora_b"].t()
    call = op.Arguments(
        arguments["x"],
        arguments["weight"],
        arguments["lora_a"],
        b_RE,
        arguments["index"],
        None,
        1.0,
        0.0,
        0,
    )
    return replace(call, **changes)


def test_it_is_chosen_where_tokens_are_many_and_never_against_a_request():
    assert chosen(call_of(), None).implementation == "merged"
    assert chosen(call_of(), "torch").implementation == "torch"
    with pytest.raises(ValueError, match="unknown implementation 'merged'"):
        chosen(call_of(), "merged")


@pytest.mark.parametrize(
    ("keeps", "needs_dx", "tokens"),
    [
        (True, True, 4 * IN * OUT / (IN + OUT)),
        (True, False, 2 * IN),
        (False, False, 2 * IN * OUT / (IN + OUT)),
        (False, True, 2 * IN * OUT / (IN + OUT)),
    ],
    ids=["step", "step without dx", "evaluation", "evaluation of a leaf"],
)
def test_it_is_chosen_where_it_leaves_out_twice_what_it_adds(keeps, needs_dx, tokens):
    choices = [
        chosen(call_of(x=torch.ones(t, IN, requires_grad=needs_dx), keeps=keeps), None)
        for t in (math.ceil(tokens), math.ceil(tokens) - 1)
    ]
    assert [choice.implementation for choice in choices] == ["merged", "torch"]


def test_a_small_layer_is_merged_in_evaluations_only(monkeypatch):
    monkeypatch.setattr(backend_torch, "SMALL_LAYER", IN * OUT)
    choice = chosen(call_of(), None)
    assert choice.implementation == "torch"
    assert "so small a layer" in choice.reason
    assert chosen(call_of(keeps=False), None).implementation == "merged"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"x": torch.ones(2 * IN - 1, IN)}, "so few tokens"),
        ({"weight": None}, "no base weight"),
        ({"dropout": 0.1}, "another input"),
        ({"dtype": torch.bfloat16}, "in float32 or wider"),
        ({"weight": torch.ones(OUT, IN, dtype=torch.float64)}, "in float32 or wider"),
        ({"weight": torch.eye(OUT, IN).to_sparse()}, "is sparse"),
        ({"weight": torch.ones(1, TOKENS + 1), "x": torch.ones(TOKENS, TOKENS + 1)}, "so few"),
    ],
    ids=["few tokens", "delta alone", "dropout", "bfloat16", "another dtype", "sparse", "wide"],
)
def test_what_cannot_be_merged_is_delta_first_and_says_why(changes, why):
    choice = chosen(call_of(**changes), None)
    assert choice.implementation == "torch"
    assert "not merged: " in choice.reason
    assert why in choice.reason


def test_it_does_fewer_operations_than_delta_first_and_the_same_thing():
    arguments = inputs(MANY, torch.float32)
    exact_arguments = inputs(MANY, torch.float64)
    dy = torch.ones(TOKENS, OUT)
    operations, found = {}, {}
    for name in (None, "torch"):
        with count_flops() as count:
            found[name] = value_and_gradients(
                lambda name=name, **own: sketched_linear(**own, implementation=name), arguments, dy
            )
        operations[name] = count.total
    passes = [cost(TOKENS, IN, OUT, SIZE, backward=backward) for backward in (False, True)]
    base, weight_gradient = sum(p.base_flops for p in passes), 2 * TOKENS * IN * OUT
    of_ranks = 2 * TOKENS * SIZE * (IN + OUT)
    assert operations["torch"] == base + weight_gradient + 3 * of_ranks
    assert operations[None] == base + weight_gradient + 2 * of_ranks + 2 * 2 * IN * OUT * SIZE
    exact = value_and_gradients(reference, exact_arguments, dy.double())
    for name, value in found[None].items():
        check_error_budget(value, found["torch"][name], exact[name], name=name)


@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("special", [{}, {"rank_weight": True}, {"tensor_scale": True}], ids=str)
def test_gradcheck(conv1d, special):
    arguments = inputs(Case("small", 40, 5, 6, 4, 2, bias=True, **special), torch.float64)
    leaves = [arguments[name].requires_grad_() for name in NAMES]

    def function(*tensors):
        own = dict(zip(NAMES, tensors, strict=True))
        if conv1d:
            own["weight"] = own["weight"].t().contiguous().t()
        return sketched_linear(**{**arguments, **own})

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("frozen", ["lora_a", "lora_b"])
def test_a_frozen_factor_costs_no_gradient_and_changes_no_other(frozen):
    arguments = inputs(MANY, torch.float32)
    wanted = [name for name in ("x", "lora_a", "lora_b") if name != frozen]
    found = {}
    for implementation in (None, "torch"):
        leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
        with count_flops() as count:
            y = sketched_linear(**(arguments | leaves), implementation=implementation)
            found[implementation] = torch.autograd.grad(y.square().sum(), list(leaves.values()))
        if implementation is None:
            products = 2 * TOKENS * IN * OUT + 2 * IN * OUT * SIZE
            of_one_factor = 2 * TOKENS * SIZE * (IN + OUT)  # h and dB, or dh and dA
            assert count.total == 2 * products + of_one_factor
    for merged, delta_first in zip(found[None], found["torch"], strict=True):
        torch.testing.assert_close(merged, delta_first, rtol=1e-4, atol=1e-4)


def test_an_evaluation_that_merges_as_training_does_computes_its_bits():
    arguments = inputs(MANY, torch.float32)
    for name in ("x", "lora_a", "lora_b"):
        arguments[name].requires_grad_()
    trained = sketched_linear(**arguments)
    with torch.no_grad(), count_flops() as count:
        evaluated = sketched_linear(**arguments)
    assert torch.equal(trained, evaluated)
    assert count.total == 2 * TOKENS * IN * OUT + 2 * IN * OUT * SIZE  # not even h


@pytest.mark.parametrize("implementation", [None, "torch"])
def test_an_evaluation_passes_no_autograd_function(implementation, monkeypatch):
    arguments = inputs(MANY, torch.float32) | {"implementation": implementation}
    arguments["x"] = arguments["x"].view(4, -1, IN).requires_grad_()
    trained = sketched_linear(**arguments)
    monkeypatch.setattr(op, "SketchedLinear", None)
    with torch.no_grad():
        evaluated = sketched_linear(**arguments)
    assert torch.equal(trained, evaluated)
    assert not evaluated._is_view()  # which nobody could write over and then differentiate
    evaluated.add_(torch.zeros(OUT, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("implementation", [None, "torch"])
def test_forward_mode_is_refused_in_evaluations_too(implementation):
    arguments = inputs(MANY, torch.float32) | {"implementation": implementation}
    x = arguments["x"]
    with torch.no_grad(), forward_ad.dual_level():
        arguments["x"] = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="jvp"):
            sketched_linear(**arguments)


def test_the_base_weight_stays_and_nothing_of_its_size_is_kept():
    arguments = inputs(MANY, torch.float32)
    before = arguments["weight"].clone()
    for name in ("x", "lora_a", "lora_b"):
        arguments[name].requires_grad_()
    known = {v.data_ptr() for v in arguments.values() if torch.is_tensor(v)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        sketched_linear(**arguments).sum().backward()
    new = {tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in known}
    assert new == {(TOKENS, SIZE)}
    assert torch.equal(arguments["weight"], before)
