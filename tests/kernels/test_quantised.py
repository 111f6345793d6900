"""Quantised base layers keep their own product; the adapter's delta is added to it."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fslora_kernels
from fslora_kernels.nn import fuse as fuse_module

# What the quantisation libraries say about themselves when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def bitsandbytes_4bit():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32))
    model.is_loaded_in_4bit = True
    return model.to("cpu")


def bitsandbytes_8bit():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False))
    model.is_loaded_in_8bit = True
    return model.to("cpu")


def torchao(config):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(model, getattr(quantization, config)())
    return model


def int8_weights():
    return torchao("Int8WeightOnlyConfig")


def int8_products():
    return torchao("Int8DynamicActivationInt8WeightConfig")


def float8_weights():
    return torchao("Float8WeightOnlyConfig")


@pytest.fixture(
    params=[bitsandbytes_4bit, bitsandbytes_8bit, int8_weights, int8_products, float8_weights],
    ids=lambda build: build.__name__,
)
def model(request):
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(request.param(), config)


def outputs_and_gradients(model):
    x = torch.linspace(-1, 1, 4 * 64).reshape(4, 64).requires_grad_()
    y = model(x)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    return y.detach(), torch.autograd.grad(y.square().sum(), leaves)


def test_a_quantised_base_gives_vanilla_results(model):
    layer = model.base_model.model[0]
    peft_class = type(layer)
    want = outputs_and_gradients(model)
    report = fslora_kernels.fuse(model)
    assert [mode.split(":")[0] for mode in report.fused.values()] == ["accumulate"]
    assert type(layer) is not peft_class
    assert isinstance(layer, peft_class)
    torch.testing.assert_close(outputs_and_gradients(model), want, rtol=1e-4, atol=1e-4)
    fslora_kernels.unfuse(model)
    assert type(layer) is peft_class


def test_a_quantised_base_can_be_sketched(model):
    name = next(iter(fslora_kernels.fuse(model).fused))
    index = torch.tensor([1, 6])
    fslora_kernels.sketch(model, {name: index})
    layer = model.get_submodule(name)
    x = torch.linspace(-1, 1, 2 * 64).reshape(2, 64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    delta = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(delta, 4 * x @ a[index].T @ b[:, index].T, rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_fused_quantised_model_works(model):
    fslora_kernels.fuse(model)
    want = outputs_and_gradients(model)
    torch.testing.assert_close(outputs_and_gradients(copy.deepcopy(model)), want)


@pytest.mark.parametrize("path", fuse_module.QUANTISED)
def test_a_fused_quantised_layer_s_class_is_found_by_its_name(path):
    """As pickle looks for it, in a process that has fused nothing yet."""
    module, _, name = path.rpartition(".")
    pytest.importorskip(module, reason="its library is not installed", exc_type=ImportError)
    pickled = f"cfslora_kernels.nn.fuse\nSketched{name}\n.".encode()
    code = f"""if True:
        import pickle
        found = pickle.loads({pickled!r})
        assert pickle.loads(pickle.dumps(found)) is found
        print(found.__bases__[1].__name__)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == name, run.stderr


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="SketchedNothing"):
        _ = fuse_module.SketchedNothing
