"""Base layers that must run their own forward pass: none is bypassed, none goes wrong."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoHaConfig, LoraConfig, PeftMixedModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations

import fslora_kernels

X = torch.linspace(-1, 1, 18).reshape(3, 6)


def adapted(base, **config):
    torch.manual_seed(0)
    config = {"target_modules": ["0"], "init_lora_weights": False, **config}
    return get_peft_model(nn.Sequential(base), LoraConfig(**config))


def check_equals_vanilla(model, *, mode):
    """Compare outputs and gradients before and after fusing; return the report's line."""

    def results():
        y = model(X)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return y.detach(), torch.autograd.grad(y.square().sum(), list(trained.values()))

    want = results()
    report = fslora_kernels.fuse(model)
    assert [text.split(":")[0] for text in report.fused.values()] == [mode], report
    torch.testing.assert_close(results(), want, rtol=1e-5, atol=1e-6)
    return str(report)


def test_a_plain_layer_is_delta_first():
    check_equals_vanilla(adapted(nn.Linear(6, 4)), mode="delta-first")


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_base(wrap):
    model = adapted(nn.Linear(6, 4)).eval()
    wrap(model.base_model.model[0].base_layer)
    assert "Parametrized" in check_equals_vanilla(model, mode="accumulate")


@pytest.mark.parametrize("offload", ["memory", "disk", "dispatched"])
def test_an_offloaded_model(offload, tmp_path):
    """Weights, the adapter's too, are on the meta device until a module's own hook fetches them."""
    resident = adapted(nn.Linear(6, 4))
    model = copy.deepcopy(resident)
    if offload == "memory":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif offload == "disk":
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    layer = model.base_model.model[0]
    assert layer.base_layer.weight.device.type == ("cpu" if offload == "dispatched" else "meta")
    report = fslora_kernels.fuse(model)
    with torch.no_grad():
        torch.testing.assert_close(model(X), resident(X))
    assert "vanilla: a factor of the adapter has" in str(report)
    (name,) = report.fused
    fslora_kernels.sketch(model, {name: torch.tensor([1])})
    with pytest.raises(ValueError, match="a sketch is set"), torch.no_grad():
        model(X)


def hooked(model):
    add_hook_to_module(model.base_model.model[0], ModelHook())


def unhooked(model):
    """Accelerate leaves the bound forward of the class behind."""
    hooked(model)
    remove_hook_from_module(model.base_model.model[0])


@pytest.mark.parametrize("hook", [hooked, unhooked])
@pytest.mark.parametrize("fuse_first", [False, True])
def test_hooks_of_accelerate_around_a_layer(hook, fuse_first):
    """They keep a bound forward on the layer, which has to be the one of its class."""
    model = adapted(nn.Linear(6, 4))
    plain = copy.deepcopy(model)
    if fuse_first:
        fslora_kernels.fuse(model)
    hook(model)
    (name,) = fslora_kernels.fuse(model).fused
    for each in (model, plain):
        fslora_kernels.fuse(each)
        fslora_kernels.sketch(each, {name: torch.tensor([1])})
    sketched = plain(X)
    torch.testing.assert_close(model(X), sketched)
    for each in (model, plain):
        fslora_kernels.unfuse(each)
    assert not torch.allclose(plain(X), sketched)
    torch.testing.assert_close(model(X), plain(X))


def test_a_layer_with_a_forward_of_its_own_is_left_and_named():
    model = adapted(nn.Linear(6, 4))
    layer, want = model.base_model.model[0], model(X)
    layer.forward = torch.compile(layer.forward, backend="eager")
    report = fslora_kernels.fuse(model)
    assert not report.fused
    assert "a forward of its own" in str(report)
    hooked(model)
    assert not fslora_kernels.fuse(model).fused, "nor with accelerate's hooks around it"
    remove_hook_from_module(layer)
    del layer.forward
    fslora_kernels.fuse(model)
    layer.forward = torch.compile(layer.forward, backend="eager")
    with pytest.raises(ValueError, match=r"del layer\.forward"):
        fslora_kernels.unfuse(model)
    torch.testing.assert_close(model(X), want)


def test_an_offloaded_base_under_a_resident_adapter():
    model = adapted(nn.Linear(6, 4))
    want = model(X)
    cpu_offload(model.base_model.model[0].base_layer, execution_device=torch.device("cpu"))
    ((name, mode),) = fslora_kernels.fuse(model).fused.items()
    assert mode == "accumulate: its base layer has a forward that is not its own"
    torch.testing.assert_close(model(X), want)
    leaves = fslora_kernels.extract(model, {name: None})
    fslora_kernels.bind(model, leaves)
    torch.testing.assert_close(model(X), want)


def test_lora_on_top_of_another_tuner():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 4))
    loha = LoHaConfig(target_modules=["0"], r=2, init_weights=False)
    model = PeftMixedModel(base, loha, "loha")
    model.add_adapter("lora", LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.set_adapter(["loha", "lora"])
    want = model(X)
    report = fslora_kernels.fuse(model)
    torch.testing.assert_close(model(X), want)
    with torch.no_grad():
        model.set_adapter(["loha"])
        assert not torch.allclose(model(X), want), "the LoRA adapter contributes"
    assert not any(mode == "delta-first" for mode in report.fused.values())


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_every_kind_of_hook_on_the_base_runs(kind):
    model = adapted(nn.Linear(6, 4))
    fslora_kernels.fuse(model)
    calls = []
    register = getattr(model.base_model.model[0].base_layer, f"register_{kind}_hook")
    register(lambda *_: calls.append(kind))
    model(X.clone().requires_grad_()).sum().backward()
    assert calls == [kind]


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_hook_on_a_factor_runs(factor):
    model = adapted(nn.Linear(6, 4))
    want = model(X)
    name = next(iter(fslora_kernels.fuse(model).fused))
    calls = []
    module = getattr(model.get_submodule(name), factor)["default"]
    module.register_forward_hook(lambda *_: calls.append(factor))
    torch.testing.assert_close(model(X), want)
    assert calls == [factor]
    assert fslora_kernels.fuse(model).fused == {name: "vanilla: a factor of the adapter has hooks"}
    fslora_kernels.sketch(model, {name: torch.tensor([1])})
    with pytest.raises(ValueError, match="has hooks"):
        model(X)


def test_a_global_hook_sees_the_base():
    model = adapted(nn.Linear(6, 4))
    want = model(X)
    fslora_kernels.fuse(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        torch.testing.assert_close(model(X), want)
    finally:
        handle.remove()
    assert nn.Linear in seen


def test_an_adapter_on_another_device_is_named():
    model = adapted(nn.Linear(6, 4))
    layer = model.get_submodule(next(iter(fslora_kernels.fuse(model).fused)))
    layer.lora_A.to("meta")
    with pytest.raises(ValueError, match=r"adapter is on meta but .* on cpu; move both"):
        model(X)


def test_a_nested_input_is_left_to_peft():
    model = adapted(nn.Linear(6, 4))
    x = torch.nested.nested_tensor([X[:2], X[2:]], layout=torch.jagged)
    want = model(x)
    (name,) = fslora_kernels.fuse(model).fused
    torch.testing.assert_close(model(x).values(), want.values())
    fslora_kernels.sketch(model, {name: torch.tensor([1])})
    with pytest.raises(ValueError, match=r"a sketch is set .* nested tensor"):
        model(x)


def test_shapes_of_mixed_dtypes_on_the_meta_device():
    """No autocast is known there, and the base layer has no opinion on dtypes."""
    model = adapted(nn.Linear(6, 4)).to("meta")
    x = X.to("meta", torch.bfloat16)
    want = model(x)
    fslora_kernels.fuse(model)
    assert (model(x).shape, model(x).dtype) == (want.shape, want.dtype)


def test_layers_that_are_no_linear_stay_vanilla_and_are_named():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Embedding(5, 6))
    model = get_peft_model(model, LoraConfig(target_modules=["0", "1"]))
    classes = [type(module) for module in model.modules()]
    report = fslora_kernels.fuse(model)
    assert [type(module) for module in model.modules()] == classes
    assert not report.fused
    assert all(name in str(report) for name in ("Conv2d is not", "Embedding is not"))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def test_the_projection_that_multihead_attention_never_calls_is_left():
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["attention", "out"], init_lora_weights=False)
    model, x = get_peft_model(Attention(), config), torch.randn(2, 3, 8)
    want = model(x)
    report = fslora_kernels.fuse(model)
    torch.testing.assert_close(model(x), want)
    assert [name.rsplit(".", 1)[1] for name in report.fused] == ["out"]
    assert {name.rsplit(".", 1)[1] for name in report.left} == {"attention", "out_proj"}
    assert "never calls it" in str(report)
