"""Several layers on one input equal each layer on its own."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora_kernels import Projection, shared_sketched_linear
from fslora_kernels.flops import count_flops
from fslora_kernels.ops.shared_sketched_linear import cost
from fslora_kernels.ops.shared_sketched_linear.reference import reference
from fslora_kernels.ops.sketched_linear.cases import Case
from fslora_kernels.testing import check_error_budget, inputs

LEAVES = ("weight", "lora_a", "lora_b", "bias")
QKV = (
    Case("q", 40, 48, 64, 16, 4, bias=True),
    Case("k", 40, 48, 32, 8, None, rank_major_b=True),
    Case("v", 40, 48, 29, 16, 1, base=False),
)


def problem(cases, dtype, *, scales=(1.5, 1.5, 0.5), seed=0):
    """One x, and a projection for each case with leaves that require gradients."""
    projections = []
    for number, (case, scale) in enumerate(zip(cases, scales, strict=False)):
        drawn = inputs(case, dtype, seed=seed + number)
        drawn = {name: drawn[name] for name in (*LEAVES, "index")}
        for name in LEAVES:
            if drawn[name] is not None:
                drawn[name] = drawn[name].detach().requires_grad_()
        projections.append(Projection(**drawn, scale=scale))
    x = inputs(cases[0], dtype, seed=seed + 99)["x"].requires_grad_()
    return x, projections


def in_dtype(x, projections, dtype):
    def cast(tensor):
        return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

    changed = [replace(p, **{n: cast(getattr(p, n)) for n in LEAVES}) for p in projections]
    return cast(x), changed


def values(function, x, projections):
    """The outputs, and the gradients of one random pull-back, by name."""
    outputs = function(x, projections)
    generator = torch.Generator().manual_seed(1)
    dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    leaves = {"x": x} | {
        f"{number} {name}": getattr(p, name)
        for number, p in enumerate(projections)
        for name in LEAVES
        if getattr(p, name) is not None
    }
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), [dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)]
    )
    found = {f"y {number}": y.detach() for number, y in enumerate(outputs)}
    return found | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_value_and_gradients_within_the_budget(dtype):
    x, projections = problem(QKV, dtype)
    actual = values(shared_sketched_linear, x, projections)
    eager = values(reference, x, projections)
    exact = values(reference, *in_dtype(x, projections, torch.float64))
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        check_error_budget(value, eager[name], exact[name], name=f"{dtype} {name}")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shapes(data):
    size = st.integers(1, 24)
    tokens, features = data.draw(st.integers(0, 24)), data.draw(size)
    cases = []
    for number in range(data.draw(st.integers(1, 4))):
        rank = data.draw(size)
        sketch = data.draw(st.none() | st.integers(1, rank))
        bias, base = data.draw(st.booleans()), data.draw(st.booleans())
        out = data.draw(size)
        cases.append(Case(str(number), tokens, features, out, rank, sketch, bias=bias, base=base))
    scales = [data.draw(st.sampled_from([0.5, 2.0])) for _ in cases]
    x, projections = problem(cases, torch.float64, scales=scales)
    actual = values(shared_sketched_linear, x, projections)
    for name, wanted in values(reference, x, projections).items():
        torch.testing.assert_close(actual[name], wanted, rtol=1e-9, atol=1e-9, msg=name)


def test_gradcheck():
    cases = [Case("a", 3, 5, 4, 3, 2, bias=True), Case("b", 3, 5, 2, 2, None)]
    x, projections = problem(cases, torch.float64)
    leaves = [getattr(p, name) for p in projections for name in ("lora_a", "lora_b", "weight")]

    def function(x, *leaves):
        changed = [
            replace(p, lora_a=a, lora_b=b, weight=w)
            for p, a, b, w in zip(
                projections, leaves[0::3], leaves[1::3], leaves[2::3], strict=True
            )
        ]
        return shared_sketched_linear(x, changed)

    assert torch.autograd.gradcheck(function, (x, *leaves))


def test_small_gradients_of_float32_factors_on_a_float16_input_survive():
    x, projections = problem(QKV, torch.float32)
    half = {
        number: {
            name: getattr(p, name).detach().half().requires_grad_()
            for name in ("weight", "bias")
            if getattr(p, name) is not None
        }
        for number, p in enumerate(projections)
    }
    low = [replace(p, **half[number]) for number, p in enumerate(projections)]
    low_x = x.detach().half().requires_grad_()
    dys = [torch.full(y.shape, 1e-6) for y in shared_sketched_linear(x, projections)]
    with torch.no_grad():
        for p in projections:
            p.lora_b.mul_(1e-4)
    factors = [factor for p in projections for factor in (p.lora_a, p.lora_b)]
    found = shared_sketched_linear(low_x, low)
    assert {y.dtype for y in found} == {torch.float16}
    actual = torch.autograd.grad(found, factors, [dy.half() for dy in dys])
    wanted = torch.autograd.grad(
        shared_sketched_linear(x, projections), factors, [dy.half().float() for dy in dys]
    )
    for gradient, want in zip(actual, wanted, strict=True):
        assert (gradient - want).norm() < 1e-3 * want.norm()


def test_leading_dimensions_and_autocast():
    x, projections = problem(QKV, torch.float32)
    flat = shared_sketched_linear(x, projections)
    for y, wanted in zip(shared_sketched_linear(x.view(5, 8, 48), projections), flat, strict=True):
        assert torch.equal(y, wanted.view(5, 8, -1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = shared_sketched_linear(x, projections)
    for y, wanted in zip(low, flat, strict=True):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.1)


def test_an_output_that_nobody_used_has_no_gradient():
    x, projections = problem(QKV, torch.float64)
    shared_sketched_linear(x, projections)[0].sum().backward()
    wanted = reference(x, projections)[0].sum()
    (dx,) = torch.autograd.grad(wanted, x)
    torch.testing.assert_close(x.grad, dx)
    assert projections[1].lora_a.grad.eq(0).all()


def test_x_is_saved_once_and_nothing_of_full_rank():
    x, projections = problem(QKV, torch.float32)
    own = {x.data_ptr()} | {
        getattr(p, name).data_ptr()
        for p in projections
        for name in (*LEAVES, "index")
        if getattr(p, name) is not None
    }
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        shared_sketched_linear(x, projections)
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in own] == [(4 + 8 + 1, 40)]
    assert sum(t.data_ptr() == x.data_ptr() for t in saved) == 1
    for p in projections:
        p.lora_a.requires_grad_(False)
        if p.weight is not None:
            p.weight.requires_grad_(False)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        outputs = shared_sketched_linear(x, projections)
    assert x.data_ptr() not in {tensor.data_ptr() for tensor in saved}
    assert torch.autograd.grad(outputs[0].sum(), x)[0].shape == x.shape


def test_cost_is_what_the_flop_counter_counts():
    x, projections = problem(QKV, torch.float32)
    projections = [replace(p, weight=None) for p in projections]
    with count_flops() as forward:
        outputs = shared_sketched_linear(x, projections)
    with count_flops() as backward:
        sum(y.sum() for y in outputs).backward()
    for counter, is_backward in ((forward, False), (backward, True)):
        stated = cost(40, 48, (64, 32, 29), (4, 8, 1), backward=is_backward)
        assert counter.total == stated.lora_flops


def test_bad_arguments_are_named():
    x, projections = problem(QKV, torch.float32)
    with pytest.raises(ValueError, match="at least one projection"):
        shared_sketched_linear(x, [])
    with pytest.raises(ValueError, match="ranks 0 to 15"):
        shared_sketched_linear(x, [replace(projections[0], index=torch.tensor([1, 16]))])
    with pytest.raises(ValueError, match="x must be"):
        shared_sketched_linear(x[:, :5], projections)
    learnt = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match="scale is not differentiated"):
        shared_sketched_linear(x, [replace(projections[0], scale=learnt)])
