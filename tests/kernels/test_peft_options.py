"""Options of ``LoraConfig`` that users set: the fused model does what vanilla PEFT does."""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

import fslora_kernels
from fslora_kernels.ops.sketched_linear import backend_torch

from .architectures import (
    ARCHITECTURES,
    ATTENTION,
    GATED,
    InFloat64,
    base_model,
    doubled,
    logits_and_gradients,
    peft_model,
    text,
)
from .models import randomised

LLAMA, BERT, GPT2 = (ARCHITECTURES[name] for name in ("llama", "bert", "gpt2"))
TIED = dataclasses.replace(LLAMA, options={**LLAMA.options, "tie_word_embeddings": True})
CLASSIFIER = dataclasses.replace(
    LLAMA,
    model="LlamaForSequenceClassification",
    options={**LLAMA.options, "num_labels": 3},
    inputs=lambda: {**text(), "labels": torch.tensor([0, 2, 1])},
)

# Architecture, arguments of LoraConfig, what is fused, what else trains than LoRA's factors.
OPTIONS = {
    "rslora": (LLAMA, {"use_rslora": True}, ATTENTION | GATED, None),
    "ranks and scales of single modules": (
        LLAMA,
        {"rank_pattern": {"q_proj": 3, "down_proj": 16}, "alpha_pattern": {"v_proj": 1}},
        ATTENTION | GATED,
        None,
    ),
    "some layers": (
        LLAMA,
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"q_proj", "v_proj"},
        None,
    ),
    "layers used twice": (
        LLAMA,
        {"layer_replication": [(0, 2), (0, 2)]},
        ATTENTION | GATED,
        None,
    ),
    "a head that is saved whole": (
        CLASSIFIER,
        {"task_type": "SEQ_CLS", "modules_to_save": ["score"]},
        ATTENTION | GATED,
        "modules_to_save",
    ),
    "embeddings that are saved whole": (
        LLAMA,
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        ATTENTION | GATED,
        "modules_to_save",
    ),
    "new tokens": (
        LLAMA,
        {"trainable_token_indices": [3, 5, 7]},
        ATTENTION | GATED,
        "token_adapter",
    ),
    "biases of the adapted layers": (BERT, {"bias": "lora_only"}, BERT.fused, "base_layer.bias"),
    "all biases": (BERT, {"bias": "all"}, BERT.fused, ".bias"),
    "biases of Conv1D": (GPT2, {"bias": "lora_only"}, GPT2.fused, "base_layer.bias"),
    "the output head": (
        LLAMA,
        {"target_modules": ["q_proj", "lm_head"]},
        {"q_proj", "lm_head"},
        None,
    ),
}
EACH = pytest.mark.parametrize("option", OPTIONS)


@pytest.fixture(autouse=True)
def as_in_a_large_layer(monkeypatch):
    """Tiny layers would leave their gradients to torch; real ones use our own."""
    monkeypatch.setattr(backend_torch, "SMALL_LAYER", 0)


def train(model, inputs, steps=3):
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def fused_like_vanilla(vanilla, inputs):
    """Fuse a float64 copy, check it against the vanilla model, return the copy and the report."""
    vanilla, inputs = doubled(vanilla.eval(), inputs)
    fused = copy.deepcopy(vanilla)
    report = fslora_kernels.fuse(fused)
    with InFloat64():
        want, want_gradients = logits_and_gradients(vanilla, inputs)
        got, got_gradients = logits_and_gradients(fused, inputs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert got_gradients.keys() == {n for n, p in vanilla.named_parameters() if p.requires_grad}
    for name, gradient in want_gradients.items():
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)
        assert gradient.any(), f"{name} takes part"
    return fused, report


@EACH
def test_the_fused_model_equals_vanilla(option):
    architecture, lora, fused, also_trains = OPTIONS[option]
    model, report = fused_like_vanilla(peft_model(architecture, **lora), architecture.inputs())
    assert {name.rsplit(".", 1)[1] for name in report.fused} == fused
    assert set(report.fused.values()) == {"delta-first"}
    assert not report.left
    others = [n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
    assert bool(others) == (also_trains is not None)
    assert all(also_trains in name for name in others)


@EACH
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_what_a_fused_model_learns_loads_into_vanilla(option, tmp_path):
    architecture, lora, _, _ = OPTIONS[option]
    inputs = architecture.inputs()
    fused = peft_model(architecture, **lora).eval()
    fslora_kernels.fuse(fused)
    before = fused(**inputs).logits
    want = train(fused, inputs)(**inputs).logits
    assert (want - before).abs().max() > 1e-3
    fused.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(architecture), tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, want, rtol=1e-5, atol=1e-6)


def test_layers_to_transform_limits_what_is_fused():
    model = peft_model(LLAMA, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    report = fslora_kernels.fuse(model)
    assert len(report.fused) == 2
    assert all(".layers.1." in name for name in report.fused)


def test_an_output_head_tied_to_the_embeddings():
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = peft_model(TIED, target_modules=["q_proj", "lm_head"])
    base = model.get_base_model()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    fused, report = fused_like_vanilla(model, TIED.inputs())
    assert "delta-first" in report.fused["base_model.model.lm_head"]
    base = fused.get_base_model()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight


def test_tied_adapters_train_as_in_vanilla():
    """The head's factors are transposed views of the embeddings': fuse keeps them so."""

    def trained(*, fuse):
        model = peft_model(TIED, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
        if fuse:
            report = fslora_kernels.fuse(model)
            assert report.fused["base_model.model.lm_head"] == "delta-first"
            assert "Embedding" in report.left["base_model.model.model.embed_tokens"]
        train(model, TIED.inputs())
        base = model.get_base_model()
        head, embeddings = base.lm_head, base.model.embed_tokens
        views = embeddings.lora_embedding_B["default"], embeddings.lora_embedding_A["default"]
        for factor, view in zip((head.lora_A, head.lora_B), views, strict=True):
            assert factor["default"].weight.data_ptr() == view.data_ptr()
        return model(**TIED.inputs()).logits

    torch.testing.assert_close(trained(fuse=True), trained(fuse=False), rtol=1e-4, atol=1e-5)


def test_tied_embeddings_saved_whole():
    model = peft_model(TIED, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    _, report = fused_like_vanilla(model, TIED.inputs())
    assert len(report.fused) == 14


@pytest.mark.parametrize("targets", [[], ["k_proj"]], ids=["alone", "beside others"])
def test_a_targeted_parameter_is_left_and_named(targets):
    """``target_parameters`` adapts the weight itself: PEFT swaps it during the base's forward."""
    model = peft_model(LLAMA, target_modules=targets, target_parameters=["q_proj.weight"])
    fused, report = fused_like_vanilla(model, LLAMA.inputs())
    assert len(report.left) == 2
    assert all("ParamWrapper" in reason for reason in report.left.values())
    assert {type(fused.get_submodule(name)).__name__ for name in report.left} == {"ParamWrapper"}
    assert len(report.fused) == 2 * len(targets)


@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module")
@pytest.mark.parametrize(
    ("name", "targets", "left", "fused"),
    [
        ("mixtral", "all-linear", {"experts", "base_layer", "gate"}, ATTENTION),
        ("qwen3_moe", "all-linear", {"experts", "base_layer", "gate"}, ATTENTION),
        ("mixtral", ["q_proj", "w1", "w2", "w3"], {"experts", "base_layer"}, {"q_proj"}),
        ("qwen3_moe", ["q_proj", "gate"], {"gate"}, {"q_proj"}),
    ],
)
def test_experts_targeted_as_modules_are_left_and_named(name, targets, left, fused):
    """PEFT turns these names into parameters: transformers 5 has no module per expert."""
    architecture = ARCHITECTURES[name]
    model = peft_model(architecture, target_modules=targets, target_parameters=None)
    _, report = fused_like_vanilla(model, architecture.inputs())
    assert {module.rsplit(".", 1)[1] for module in report.left} == left
    assert all("ParamWrapper" in reason for reason in report.left.values())
    assert {module.rsplit(".", 1)[1] for module in report.fused} == fused


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_gets_no_gradient(frozen):
    """``fused_like_vanilla`` checks that gradients are those of the other factor alone."""
    model = peft_model(LLAMA)
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(requires_grad=False)
    fused, _ = fused_like_vanilla(model, LLAMA.inputs())
    assert all(p.grad is None for n, p in fused.named_parameters() if frozen in n)


def test_a_copy_of_a_fused_model_is_fused_and_sketched():
    model, inputs = peft_model(LLAMA).eval(), LLAMA.inputs()
    names = list(fslora_kernels.fuse(model).fused)
    fslora_kernels.sketch(model, dict.fromkeys(names, torch.tensor([1, 4])))
    copied = copy.deepcopy(model)
    want = model(**inputs).logits
    fslora_kernels.sketch(model, None)
    assert torch.equal(copied(**inputs).logits, want), "with a sketch of its own"
    assert not torch.allclose(model(**inputs).logits, want)
    assert fslora_kernels.modules(copied) == names


def test_a_deleted_adapter_takes_its_sketch_along():
    model, inputs = peft_model(LLAMA).eval(), LLAMA.inputs()
    names = fslora_kernels.fuse(model).fused
    fslora_kernels.sketch(model, dict.fromkeys(names, torch.tensor([1, 4])))
    model.add_adapter("other", LoraConfig(r=8, target_modules=["q_proj"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=8, target_modules=["q_proj"]))
    model.set_adapter("default")
    got = randomised(model)(**inputs).logits
    fslora_kernels.unfuse(model)
    torch.testing.assert_close(got, model(**inputs).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "kind"), [("embed_tokens", "Embedding"), ("projection", "Conv2d")]
)
def test_layers_that_are_not_linear_are_left_and_named(target, kind):
    architecture = LLAMA if kind == "Embedding" else ARCHITECTURES["vit"]
    model = peft_model(architecture, target_modules=["q_proj", target])
    _, report = fused_like_vanilla(model, architecture.inputs())
    assert len(report.fused) == 2
    ((name, reason),) = report.left.items()
    assert name.endswith(target)
    assert kind in reason


def test_dropout_in_eval_changes_nothing():
    model = peft_model(LLAMA, lora_dropout=0.5)
    _, report = fused_like_vanilla(model, LLAMA.inputs())
    assert set(report.fused.values()) == {"delta-first"}


@pytest.mark.parametrize("architecture", [LLAMA, GPT2, BERT], ids=["llama", "gpt2", "bert"])
def test_dropout_trains(architecture):
    model, inputs = peft_model(architecture, lora_dropout=0.5), architecture.inputs()
    fslora_kernels.fuse(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = model.train()(**inputs).loss
        loss = model(**inputs).loss
        assert loss != first, "every pass draws its own mask"
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.isfinite().all(), name
                assert parameter.grad.any(), name
        train(model, inputs, steps=20)
    assert model(**inputs).loss < first - 0.1, "it learns"


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_has_the_mean_and_the_spread_of_vanillas(rate):
    """4,000 masks over one input, ours beside PEFT's: the draws differ, their moments do not."""
    model = peft_model(LLAMA, lora_dropout=rate).train()
    name = next(n for n, m in model.named_modules() if type(m) is PeftLinear)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(1)).expand(4000, 32)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        vanilla = model.get_submodule(name)(x)
        fslora_kernels.fuse(model)
        fused = model.get_submodule(name)(x)
    spread = vanilla.std(0)
    assert ((fused.mean(0) - vanilla.mean(0)).abs() < 0.1 * spread).all()
    torch.testing.assert_close(fused.std(0), spread, rtol=0.1, atol=0)


def test_dropout_modules_switched_off_alone_stay_off():
    """A user's way to train without dropout: ``eval`` on the dropout modules, not on the model."""
    vanilla = peft_model(LLAMA, lora_dropout=0.5).train()
    for module in vanilla.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    fused = copy.deepcopy(vanilla)
    fslora_kernels.fuse(fused)
    inputs = LLAMA.inputs()
    torch.testing.assert_close(
        fused(**inputs).logits, vanilla(**inputs).logits, rtol=1e-5, atol=1e-6
    )
