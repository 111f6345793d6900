"""Inputs that are made again in the backward pass: same results, less kept, else as before."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import fslora_kernels
from fslora_kernels._dispatch import interpreting
from fslora_kernels._recompute import made, recipe
from fslora_kernels.memory import AliveBytes, addresses, kept_storages

from .models import llama, logits_and_gradients, tokens

WIDTH, TOKENS = 160, 24  # above the size up to which torch differentiates a layer by itself


class Norm(nn.Module):
    """RMSNorm as the models write it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH), requires_grad=False)

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Norm()
        for name in ("gate", "up", "down"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        normed = self.norm(x)
        return self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


def block(dtype=torch.float32, dropout=0.0, *, recompute=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(
            r=8,
            target_modules=["gate", "up", "down"],
            init_lora_weights=False,
            lora_dropout=dropout,
        )
        model = get_peft_model(Block().to(dtype), config, autocast_adapter_dtype=False)
    fslora_kernels.fuse(model, recompute=recompute)
    return model


def x_of(dtype=torch.float32, *shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape or (2, TOKENS, WIDTH), generator=generator).to(dtype).requires_grad_()


def results(model, run=lambda model, x: model(x), dtype=torch.float32):
    """Output and gradients, by name; the dropout masks are the same in every call."""
    x = x_of(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        y = run(model, x)
        y.float().square().sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_the_same_to_the_bit_and_no_input_is_kept(dtype, dropout):
    model, before = (block(dtype, dropout, recompute=on) for on in (True, False))
    assert_same(results(model, dtype=dtype), results(before, dtype=dtype))
    known = addresses([*model.parameters(), *before.parameters()])
    x = x_of(dtype)
    kept, more = (sum(kept_storages(m(x), known).values()) for m in (model, before))
    inputs = 2 * (2 * TOKENS) * WIDTH * dtype.itemsize  # of gate and up, and of down
    assert more - kept == inputs - 2 * WIDTH * dtype.itemsize  # of which each has a norm's weight


def test_less_is_alive_after_the_forward_pass():
    found = []
    for on in (True, False):
        model, x = block(recompute=on), x_of()
        with AliveBytes(addresses([*model.parameters(), x])) as alive:
            y = model(x)
            found.append(alive.now)
        assert y.requires_grad
    assert found[1] - found[0] == (2 * (2 * TOKENS) - 2) * WIDTH * 4


def test_a_pretrained_model_trains_as_before(shared_data):
    model = llama(shared_data).double().eval()
    again = copy.deepcopy(model)
    fslora_kernels.fuse(model)
    fslora_kernels.fuse(again, recompute=True)
    ids = tokens(model)
    logits, gradients = logits_and_gradients(model, ids)
    found, theirs = logits_and_gradients(again, ids)
    torch.testing.assert_close(found, logits)
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_everything_once_more_and_no_oftener(reentrant):
    model, calls = block(dropout=0.2), []
    model.base_model.model.norm.register_forward_hook(lambda *_: calls.append(1))

    def run(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    found = results(model, run)
    assert len(calls) == 2
    assert_same(found, results(block(dropout=0.2, recompute=False), run))


def test_hooks_on_what_is_saved_get_the_inputs_as_before():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(tuple(t.shape)) or t, lambda t: t
    ):
        block()(x_of())
    assert (2 * TOKENS, WIDTH) in saved


def test_under_autocast_a_cast_input_is_cast_again():
    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert_same(results(block(), run), results(block(recompute=False), run))


def test_a_graph_can_be_gone_through_twice():
    model, x = block(), x_of()
    y = model(x).sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * once)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x * 2.0,
        lambda x: x * x.new_tensor(2.0),
        lambda x: x + x,
        lambda x: (x + 1) * torch.ones(WIDTH),
        lambda x: (x * x).detach(),
        lambda x: (x * x).view(-1, WIDTH),
    ],
    ids=["leaf", "number", "scalar", "sum", "sum times a constant", "detached", "view"],
)
def test_what_is_no_product_of_what_is_kept_has_no_recipe(make):
    assert recipe(make(x_of())) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x * x,
        lambda x: x * torch.ones(WIDTH) * x,
        lambda x: torch.ones(WIDTH) * (x * x.sigmoid()).bfloat16(),
        lambda x: (x * x.exp()).half().float(),
    ],
)
def test_a_product_is_made_again_to_the_bit(make):
    product = make(x_of())
    found = recipe(product)
    again = made(*found)
    assert again.dtype == product.dtype
    assert torch.equal(again, product)
    assert not again.requires_grad


def test_no_recipe_needs_what_was_written_over():
    x = x_of()
    factor = x * 1.0
    product = factor * x.exp()
    with torch.no_grad():
        factor.zero_()
    assert recipe(product) is None


def test_an_input_that_was_edited_unseen_is_kept():
    """As a hook that masks what a norm gives."""
    found = []
    for on in (True, False):
        model, x = block(recompute=on), x_of()
        product = x.sigmoid() * x
        with torch.no_grad():
            product[..., : WIDTH // 2] = 0
        model.base_model.model.down(product).square().sum().backward()
        layer = model.base_model.model.down
        found.append({"a": layer.lora_A["default"].weight.grad, "x": x.grad})
    assert_same(*found)
    assert not found[0]["a"][:, : WIDTH // 2].any()


def test_a_norms_weight_may_be_given_free_until_its_own_backward_pass():
    """As FSDP does where a norm is a group of its own."""
    model, x = block(), x_of()
    wanted = results(block())
    y = model(x)
    weight = model.base_model.model.norm.weight
    with torch.no_grad():
        weight.zero_()
    factors = {n: p for n, p in model.named_parameters() if "down.lora_" in n}
    gradients = torch.autograd.grad(y.square().sum(), list(factors.values()))
    for name, gradient in zip(factors, gradients, strict=True):
        assert torch.equal(gradient, wanted[name])


@pytest.mark.parametrize("free", ["storage", "data"])
def test_a_weight_that_was_given_free_is_no_factor(free):
    """As FSDP2 does after the forward pass of a norm that is a group of its own, and ZeRO."""
    norm = Norm()
    product = norm(x_of())
    assert recipe(product) is not None
    if free == "storage":
        norm.weight.untyped_storage().resize_(0)
    else:
        norm.weight.data = torch.empty(0)
    assert recipe(product) is None


def test_a_checkpoint_around_the_product_alone_computes_it_twice():
    calls = []

    def product(gate, up):
        calls.append(1)
        return nn.functional.silu(gate) * up

    model, x = block(), x_of()
    normed = model.base_model.model.norm(x)
    y = model.base_model.model.down(checkpoint(product, normed, x, use_reentrant=False))
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2


def test_a_callback_leaves_the_choice():
    model = block()
    fslora_kernels.SketchCallback(ratio=0.5).on_train_begin(model=model)
    layers = fslora_kernels.nn.fuse.fused_layers(model).values()
    assert all(layer.recompute for layer in layers)
    for layer in layers:  # as one that was pickled before there was the choice
        del layer.recompute
    assert results(model)
    fslora_kernels.unfuse(model)


def test_what_is_written_over_later_is_noticed():
    model, x = block(), x_of()
    gate = torch.sigmoid(x)
    y = model.base_model.model.down(gate * x)
    with torch.no_grad():
        gate.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_where_a_is_not_trained_nothing_is_made_again(monkeypatch):
    models = [block(recompute=on) for on in (True, False)]
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name)
    wanted = results(models[1])
    monkeypatch.setattr("fslora_kernels.ops.sketched_linear.op.made", None)
    assert_same(results(models[0]), wanted)


def test_the_choice_can_be_changed_copied_and_taken_back():
    model = block()
    assert all(layer.recompute for layer in fslora_kernels.nn.fuse.fused_layers(model).values())
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    fslora_kernels.fuse(model)
    assert not any(layer.recompute for layer in fslora_kernels.nn.fuse.fused_layers(model).values())
    fslora_kernels.unfuse(model)
    assert not any(hasattr(module, "recompute") for module in model.modules())
    for each in copies:
        assert all(layer.recompute for layer in fslora_kernels.nn.fuse.fused_layers(each).values())


def test_a_compiler_decides_by_itself():
    torch._dynamo.reset()
    model = block()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, wanted = results(model, lambda _, x: compiled(x)), results(model)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_wrapping_passes_the_choice_on():
    config = LoraConfig(r=8, target_modules=["gate", "up", "down"])
    model = fslora_kernels.get_sketched_peft_model(Block(), config, recompute=True)
    assert all(layer.recompute for layer in fslora_kernels.nn.fuse.fused_layers(model).values())


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_kernels_get_the_same_input_again(dropout):
    models = [block(dropout=dropout, recompute=on) for on in (True, False)]
    for model, on in zip(models, (True, False), strict=True):
        fslora_kernels.fuse(model, "triton", recompute=on)
    assert_same(*map(results, models))
