"""Sketched gradients: what they are, on average and in mean square."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fslora_kernels

from .enumeration import normal, omegas

RANK, SIZE = 5, 2


def factors():
    return normal(1, RANK, 4), normal(2, 3, RANK), normal(3, 3, 4)


def loss_of(product, target):
    """Neither linear nor quadratic in W."""
    return (product - target).cosh().log().sum()


def gradients(omega):
    a, b, target = factors()
    a.requires_grad_()
    b.requires_grad_()
    product = b * omega @ a
    return torch.autograd.grad(loss_of(product, target), (b, a)), (product - target).tanh()


def test_gradients_are_those_of_the_formula_and_zero_outside_the_sketch():
    a, b, _ = factors()
    for omega in omegas(RANK, SIZE):
        (to_b, to_a), g = gradients(omega)
        torch.testing.assert_close(to_b, g @ a.t() * omega)
        torch.testing.assert_close(to_a, omega[:, None] * (b.t() @ g))
        assert torch.equal((to_a != 0).any(dim=1), omega != 0)
        assert torch.equal((to_b != 0).any(dim=0), omega != 0)


def test_the_fused_layer_has_the_gradients_of_the_formula():
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 3, bias=False)).double(),
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False),
    ).double()
    layer = model.get_submodule("base_model.model.0")
    fslora_kernels.fuse(model)
    index = torch.tensor([1, 4])
    fslora_kernels.sketch(model, dict.fromkeys(fslora_kernels.modules(model), index))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, g = normal(4, 6, 4), normal(5, 6, 3)
    (model(x) * g).sum().backward()
    omega = torch.zeros(RANK).double().index_fill_(0, index, RANK / len(index))
    torch.testing.assert_close(b.grad, g.t() @ x @ a.t().detach() * omega)
    torch.testing.assert_close(a.grad, omega[:, None] * (b.t().detach() @ g.t() @ x))


def test_the_mean_sketched_gradient_is_that_of_the_sketched_objective():
    a, b, target = factors()
    a.requires_grad_()
    b.requires_grad_()
    every = omegas(RANK, SIZE)
    objective = torch.stack([loss_of(b * omega @ a, target) for omega in every]).mean()
    wanted = torch.autograd.grad(objective, (b, a))
    found = [
        torch.stack(each).mean(0) for each in zip(*(gradients(o)[0] for o in every), strict=True)
    ]
    torch.testing.assert_close(found, list(wanted))
    plain = torch.autograd.grad(loss_of(b @ a, target), (b, a))
    assert not torch.allclose(plain[0], wanted[0], rtol=0.1), "not that of the plain loss"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_mean_square_of_a_linear_losss_gradient_is_the_full_ones_times_the_inverse_ratio(size):
    a, b, g = factors()
    full = (g @ a.t()).square().sum() + (b.t() @ g).square().sum()
    squares = [
        (g @ a.t() * omega).square().sum() + (omega[:, None] * (b.t() @ g)).square().sum()
        for omega in omegas(RANK, size)
    ]
    torch.testing.assert_close(torch.stack(squares).mean(), full * RANK / size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_mean_square_of_any_gradient_is_bounded_by_the_inverse_ratio(size):
    """E‖M∇f(MX)‖² ≤ (R/S) E‖P∇f(MX)‖²: here equal, since M is √(R/S) on its ranks."""
    a, b, target = factors()
    found, bound = [], []
    for omega in omegas(RANK, size):
        root = omega.sqrt()
        x, y = (root[:, None] * a).requires_grad_(), (b * root).requires_grad_()
        inner = torch.autograd.grad(loss_of(y @ x, target), (y, x))
        bound.append((inner[0] * (omega > 0)).square().sum() + inner[1][omega > 0].square().sum())
        found.append(sum(part.square().sum() for part in gradients(omega)[0]))
    found, bound = torch.stack(found), torch.stack(bound)
    torch.testing.assert_close(found, bound * RANK / size)
