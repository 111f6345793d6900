"""What stands around a call: transforms, traces, devices without data, autocast in one pass."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fslora_kernels import (
    Projection,
    grouped_sketched_linear,
    shared_sketched_linear,
    sketched_linear,
)
from fslora_kernels.ops.sketched_linear import backend_torch
from fslora_kernels.ops.sketched_linear.cases import Case
from fslora_kernels.ops.sketched_linear.reference import reference
from fslora_kernels.testing import inputs

CASE = Case("one", 6, 10, 8, 4, 2, bias=True)


@pytest.fixture(params=["own backward", "torch's differentiation"], autouse=True)
def path(request, monkeypatch):
    small = 0 if request.param == "own backward" else 2**62
    monkeypatch.setattr(backend_torch, "SMALL_LAYER", small)


def losses(function, **fixed):
    arguments = inputs(CASE, torch.float64) | fixed

    def loss(factors, x):
        return function(**(arguments | factors | {"x": x})).square().sum()

    return loss, {name: arguments[name] for name in ("lora_a", "lora_b")}, arguments["x"]


@pytest.mark.parametrize("of", ["gradient", "per sample", "of adapters", "jvp", "hessian"])
def test_torch_func_transforms(of):
    transform = {
        "gradient": torch.func.grad,
        "per sample": lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(None, 0)),
        "of adapters": lambda f: (
            lambda factors, x: torch.func.vmap(f, in_dims=(0, None))(
                {name: torch.stack([factor, 2 * factor]) for name, factor in factors.items()}, x
            )
        ),
        "jvp": lambda f: lambda factors, x: torch.func.jvp(lambda x: f(factors, x), (x,), (x,))[1],
        "hessian": lambda f: torch.func.hessian(f, argnums=1),
    }[of]
    loss, factors, x = losses(sketched_linear)
    wanted, _, _ = losses(reference)
    torch.testing.assert_close(transform(loss)(factors, x), transform(wanted)(factors, x))


@pytest.mark.parametrize("lead", [(6,), (2, 3), (1, 2, 3)])
def test_several_gradients_at_once(lead):
    """The backward pass alone runs under ``torch.vmap``."""
    arguments = inputs(CASE, torch.float64)
    arguments["x"] = arguments["x"].view(*lead, 10)
    leaves = [arguments[name].requires_grad_() for name in ("x", "lora_a", "lora_b")]
    dy = torch.randn(3, *lead, 8, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad(function(**arguments), leaves, dy, is_grads_batched=True)
        for function in (sketched_linear, reference)
    )
    torch.testing.assert_close(found, wanted)


def test_dropout_inside_a_transform_is_torchs_own():
    loss, factors, x = losses(sketched_linear, dropout=0.5)
    gradient = torch.func.grad(loss)
    assert not torch.equal(gradient(factors, x)["lora_a"], gradient(factors, x)["lora_a"])


def test_a_trace_gives_the_same_for_other_inputs():
    arguments = inputs(CASE, torch.float32)
    x = arguments.pop("x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes are checked in Python, and traces are deprecated
        traced = torch.jit.trace(lambda x: sketched_linear(x, **arguments), x)
    torch.testing.assert_close(traced(2 * x), sketched_linear(2 * x, **arguments))


DROPPING = pytest.mark.parametrize(
    "dropping", [{}, {"dropout": 0.5}, {"dropout": 0.5, "seed": 3}], ids=str
)


@DROPPING
def test_on_the_meta_device_shapes_are_computed(dropping):
    arguments = {
        name: value.to("meta") if torch.is_tensor(value) else value
        for name, value in inputs(CASE, torch.float32).items()
    }
    arguments["x"].requires_grad_()
    y = sketched_linear(**arguments, **dropping)
    assert (y.device.type, y.shape) == ("meta", (6, 8))
    y.sum().backward()
    assert arguments["x"].grad.shape == (6, 10)


@DROPPING
def test_fake_tensors_have_no_values_to_look_at(dropping):
    """As memory estimators run a training step."""
    with FakeTensorMode() as mode:
        arguments = {
            name: mode.from_tensor(value) if torch.is_tensor(value) else value
            for name, value in inputs(CASE, torch.float32).items()
        }
        x = arguments["x"].requires_grad_()
        y = sketched_linear(**arguments, **dropping)
        y.sum().backward()
    assert (y.shape, x.grad.shape) == ((6, 8), (6, 10))


def test_a_default_device_changes_nothing():
    arguments = inputs(CASE, torch.float32)
    arguments["x"].requires_grad_()
    torch.manual_seed(0)
    wanted = sketched_linear(**arguments, dropout=0.5)
    torch.manual_seed(0)
    with torch.device("meta"):
        y = sketched_linear(**arguments, dropout=0.5)
        y.backward(torch.ones_like(y))
    assert torch.equal(y, wanted)


def one(x, weight, lora_a, lora_b, **_):
    return sketched_linear(x, weight, lora_a, lora_b)


def shared(x, weight, lora_a, lora_b, **_):
    return shared_sketched_linear(x, [Projection(weight, lora_a, lora_b)])[0]


def grouped(x, weight, lora_a, lora_b, **_):
    return grouped_sketched_linear(x, weight, lora_a, lora_b.t(), [0, 6], [0, 4], scale=[1.0])


@pytest.mark.parametrize("function", [one, shared, grouped])
def test_an_autocast_around_the_backward_pass_alone(function):
    arguments = inputs(CASE, torch.float32)
    leaves = [arguments[name].requires_grad_() for name in ("x", "weight", "lora_a", "lora_b")]
    dy = torch.ones(6, 8)
    wanted = torch.autograd.grad(function(**arguments), leaves, dy)
    y = function(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(y, leaves, dy)
    for gradient, want in zip(found, wanted, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, want, rtol=0.02, atol=0.02)  # torch's own are rounded
