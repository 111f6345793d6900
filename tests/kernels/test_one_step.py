"""``get_sketched_peft_model``: wrap, fuse and sketch in one call."""

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

import fslora_kernels


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))


def config(**settings):
    return LoraConfig(
        **{"r": 8, "lora_alpha": 8, "target_modules": ["0", "1"], "init_lora_weights": False}
        | settings
    )


def test_it_is_the_three_steps():
    torch.manual_seed(1)
    model = fslora_kernels.get_sketched_peft_model(base(), config(), ratio=0.25, seed=3)
    torch.manual_seed(1)
    by_hand = get_peft_model(base(), config())
    fslora_kernels.fuse(by_hand)
    indices = fslora_kernels.draw_indices(3, fslora_kernels.ranks(by_hand), 0.25)
    fslora_kernels.sketch(by_hand, indices)
    x = torch.randn(3, 6)
    assert torch.equal(model(x), by_hand(x))
    fslora_kernels.sketch(by_hand, None)
    assert not torch.allclose(model(x), by_hand(x)), "the sketch is set"
    model(x).sum().backward()
    for name, index in indices.items():
        rows = model.get_submodule(name).lora_B["default"].weight.grad.abs().sum(0)
        assert rows.nonzero().flatten().tolist() == index.tolist()


def test_a_ratio_of_one_trains_every_rank():
    model = fslora_kernels.get_sketched_peft_model(base(), config(), "mine")
    assert fslora_kernels.ranks(model, adapter_name="mine") == dict.fromkeys(
        fslora_kernels.modules(model), 8
    )
    model(torch.ones(1, 6)).sum().backward()
    for name in fslora_kernels.modules(model):
        assert model.get_submodule(name).lora_B["mine"].weight.grad.abs().sum(0).gt(0).all()


def test_layers_that_stay_vanilla_are_named():
    model = nn.Sequential(nn.Embedding(5, 6), *base())
    chosen = LoraConfig(r=8, target_modules=["0", "1"])
    with pytest.warns(UserWarning, match="Embedding is not among the fused types"):
        fslora_kernels.get_sketched_peft_model(model, chosen)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"ratio": 0.0}, "a sketch ratio is in"),
        ({"use_dora": True}, {}, "DoraLinearVariant"),
        *(
            ({"init_lora_weights": method}, {"ratio": 0.5}, "of which all ranks together")
            for method in ("pissa", "pissa_niter_4", "olora", "orthogonal")
        ),
        ({}, {"implementation": "cuda"}, "unknown implementation"),
    ],
)
def test_bad_calls_are_named(settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        fslora_kernels.get_sketched_peft_model(base(), config(**settings), **arguments)


@pytest.mark.parametrize(
    ("settings", "arguments", "error"),
    [
        ({"use_dora": True, "modules_to_save": ["1"], "bias": "all"}, {}, ValueError),
        ({}, {"implementation": "triton"}, NotImplementedError),
    ],
    ids=["nothing to fuse", "implementation"],
)
def test_a_refused_model_is_left_as_it_was(settings, arguments, error, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = base()
    model[0].bias.requires_grad_(False)
    modules, want = dict(model.named_modules()), model(torch.ones(1, 6))
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(error):
        fslora_kernels.get_sketched_peft_model(
            model, config(target_modules=["0"], **settings), **arguments
        )
    assert dict(model.named_modules()) == modules
    assert trains == {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(model(torch.ones(1, 6)), want)
    fslora_kernels.get_sketched_peft_model(model, config())  # PEFT does not warn of a second time


def test_another_method_than_lora_is_named():
    with pytest.raises(ValueError, match="a LoHaConfig has no ranks"):
        fslora_kernels.get_sketched_peft_model(base(), LoHaConfig(target_modules=["0"]))


def test_an_initialisation_that_needs_all_ranks_may_train_them_all():
    plain, x = base(), torch.ones(1, 6)
    want = plain(x)
    chosen = config(init_lora_weights="olora", r=4)
    torch.testing.assert_close(fslora_kernels.get_sketched_peft_model(plain, chosen)(x), want)


def test_a_quantised_layer_whose_library_is_missing_is_named():
    """PEFT knows such a class only where its library is installed, and so do we."""

    class Linear4bit(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(ValueError, match=r"Linear4bit\(\) is not supported"):
        fslora_kernels.get_sketched_peft_model(nn.Sequential(Linear4bit(), Linear4bit()), config())
