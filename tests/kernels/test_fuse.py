import copy
import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

import fslora_kernels
from fslora_kernels.nn import fuse as fuse_module
from fslora_kernels.testing import check_error_budget

from .models import bert, llama, logits_and_gradients, tokens


@pytest.fixture(params=[llama, bert], ids=["llama", "bert"])
def model(request, shared_data):
    """In float64, so that two ways to the same result differ by rounding alone."""
    return request.param(shared_data).double().eval()


def indices_of(model, sizes=(1, 3, 8)):
    """A different sorted index set per module, of different sizes."""
    report = fslora_kernels.fuse(model)
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randperm(8, generator=generator)[: sizes[k % len(sizes)]].sort().values
        for k, name in enumerate(report.fused)
    }


def masked_global_oracle(model, indices):
    """A vanilla PEFT model whose full factors are multiplied by Ω = (R/S) Σ e_j e_jᵀ."""
    oracle = copy.deepcopy(model)
    fslora_kernels.unfuse(oracle)
    for name, index in indices.items():
        layer = oracle.get_submodule(name)
        omega = torch.zeros(8, dtype=torch.float64)
        omega[index] = 8 / len(index)
        layer.lora_A["default"].weight.data.mul_(omega[:, None])
    return oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [llama, bert])
def test_full_rank_equals_vanilla_peft(build, dtype, shared_data):
    vanilla = build(shared_data, dtype=dtype).eval()
    exact = build(shared_data).double().eval()
    for parameter, source in zip(exact.parameters(), vanilla.parameters(), strict=True):
        parameter.data.copy_(source.data)
    fused = copy.deepcopy(vanilla)
    report = fslora_kernels.fuse(fused)
    assert set(report.fused.values()) == {"delta-first"}
    assert not report.left
    ids = tokens(vanilla, batch=32)  # of a few logits the error is a matter of luck
    got, got_gradients = logits_and_gradients(fused, ids)
    eager, eager_gradients = logits_and_gradients(vanilla, ids)
    want, want_gradients = logits_and_gradients(exact, ids)
    check_error_budget(got, eager, want, name="logits")
    assert got_gradients.keys() == want_gradients.keys()
    flat = [torch.cat([g[n].flatten() for n in g]) for g in (got_gradients, eager_gradients)]
    wanted = torch.cat([want_gradients[n].flatten() for n in want_gradients])
    check_error_budget(flat[0], flat[1], wanted, name="gradients")


def test_view_mode_equals_the_masked_global_adapter(model):
    indices = indices_of(model)
    oracle = masked_global_oracle(model, indices)
    fslora_kernels.sketch(model, indices)
    ids = tokens(model)
    got, got_gradients = logits_and_gradients(model, ids)
    want, want_gradients = logits_and_gradients(oracle, ids)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    fslora_kernels.sketch(model, None)
    unsketched, _ = logits_and_gradients(model, ids)
    assert (unsketched - want).abs().max() > 1e-2, "the sketch is really applied"
    for name, index in indices.items():
        outside = torch.ones(8, dtype=torch.bool)
        outside[index] = False
        omega = torch.zeros(8, dtype=torch.float64)
        omega[index] = 8 / len(index)
        a, b = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
        # The oracle's A is already multiplied by Ω; the chain rule multiplies its gradient.
        torch.testing.assert_close(
            got_gradients[a], want_gradients[a] * omega[:, None], rtol=1e-8, atol=1e-9
        )
        torch.testing.assert_close(got_gradients[b], want_gradients[b], rtol=1e-8, atol=1e-9)
        assert got_gradients[a][outside].eq(0).all()
        assert got_gradients[b][:, outside].eq(0).all()


def test_compact_mode_equals_view_mode(model):
    indices = indices_of(model)
    fslora_kernels.sketch(model, indices)
    ids = tokens(model)
    want, want_gradients = logits_and_gradients(model, ids)
    leaves = fslora_kernels.extract(model, indices)
    fslora_kernels.bind(model, leaves)
    got, _ = logits_and_gradients(model, ids)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    for name, index in indices.items():
        a, b = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
        assert leaves[name].lora_a.grad.shape[0] == leaves[name].lora_b.grad.shape[0] == len(index)
        torch.testing.assert_close(
            leaves[name].lora_a.grad, want_gradients[a][index], rtol=1e-8, atol=1e-9
        )
        torch.testing.assert_close(
            leaves[name].lora_b.grad, want_gradients[b][:, index].t(), rtol=1e-8, atol=1e-9
        )


def test_scatter_writes_the_selected_ranks_and_nothing_else(model):
    indices = indices_of(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    leaves = fslora_kernels.extract(model, indices)
    for pair in leaves.values():
        pair.lora_a.data.add_(1)
        pair.lora_b.data.add_(2)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    fslora_kernels.scatter(model, leaves, indices)
    for name, parameter in model.named_parameters():
        change = parameter.detach() - before[name]
        layer = next((n for n in indices if name.startswith(f"{n}.lora_")), None)
        if layer is None:
            assert change.eq(0).all()
            continue
        rows = change if ".lora_A." in name else change.t()
        added = 1.0 if ".lora_A." in name else 2.0
        outside = torch.ones(8, dtype=torch.bool)
        outside[indices[layer]] = False
        assert rows[outside].eq(0).all()
        torch.testing.assert_close(
            rows[indices[layer]], torch.full_like(rows[indices[layer]], added)
        )


@pytest.mark.parametrize("rslora", [False, True])
def test_scale_is_that_of_the_global_rank(shared_data, rslora):
    model = llama(shared_data, use_rslora=rslora)
    name = next(iter(fslora_kernels.fuse(model).fused))
    layer = model.get_submodule(name)
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([1, 6])
    fslora_kernels.sketch(model, {name: index})
    delta = layer(x) - layer.base_layer(x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scale = 16 * 8**0.5 / 2 if rslora else 16 / 2
    torch.testing.assert_close(delta, scale * x @ a[index].T @ b[:, index].T, rtol=1e-3, atol=1e-4)


def test_fuse_in_mid_training_under_fused_adamw_equals_vanilla(shared_data):
    def train(fuse_after, unfuse_after=None):
        model = llama(shared_data).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
        ids = tokens(model)
        for step in range(4):
            if step == fuse_after:
                fslora_kernels.fuse(model)
            if step == unfuse_after:
                fslora_kernels.unfuse(model)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in parameters]
        return torch.cat([p.detach().flatten() for p in parameters])

    vanilla = train(None)
    for fused in (train(2), train(0), train(0, 2)):
        torch.testing.assert_close(fused, vanilla, rtol=1e-3, atol=1e-5)


def test_checkpoints_are_vanilla_peft_both_ways(model, tmp_path):
    ids = tokens(model)
    vanilla = copy.deepcopy(model)
    fslora_kernels.fuse(model)
    want = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "fused")
    vanilla.save_pretrained(tmp_path / "vanilla")
    for folder in ("fused", "vanilla"):
        assert sorted(os.listdir(tmp_path / folder)) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        fresh = copy.deepcopy(vanilla).unload()
        loaded = PeftModel.from_pretrained(fresh, tmp_path / folder).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, want, rtol=1e-8, atol=1e-9)
        fslora_kernels.fuse(loaded)
        torch.testing.assert_close(loaded(input_ids=ids).logits, want, rtol=1e-8, atol=1e-9)
    ours, theirs = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text())
        for folder in ("fused", "vanilla")
    )
    for config in (ours, theirs):
        config["target_modules"].sort()
    assert ours == theirs


def test_unfuse_restores_the_exact_class_and_attributes(model):
    layers = [m for m in model.modules() if type(m) is PeftLinear]
    attributes = [set(vars(layer)) for layer in layers]
    fslora_kernels.fuse(model)
    assert not any(type(layer) is PeftLinear for layer in layers)
    fslora_kernels.unfuse(model)
    assert all(type(layer) is PeftLinear for layer in layers)
    assert [set(vars(layer)) for layer in layers] == attributes


def tiny(base, **config):
    model = nn.Sequential(base)
    return get_peft_model(
        model, LoraConfig(target_modules=["0"], init_lora_weights=False, **config)
    )


def compare_with_vanilla(model, *, mode):
    vanilla = copy.deepcopy(model)
    report = fslora_kernels.fuse(model)
    assert [text.split(":")[0] for text in report.fused.values()] == [mode]
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), vanilla(x), rtol=1e-5, atol=1e-5)
    return report


def test_gpt2s_conv1d():
    compare_with_vanilla(tiny(Conv1D(4, 6), fan_in_fan_out=True), mode="delta-first")


def test_lora_bias():
    compare_with_vanilla(tiny(nn.Linear(6, 4), lora_bias=True), mode="delta-first")


def test_a_hook_on_the_base_layer_runs():
    base = nn.Linear(6, 4)
    calls = []
    base.register_forward_hook(lambda *_: calls.append(1))
    compare_with_vanilla(tiny(base), mode="accumulate")
    calls.clear()
    model = tiny(nn.Linear(6, 4))
    fslora_kernels.fuse(model)
    model.base_model.model[0].base_layer.register_forward_hook(lambda *_: calls.append(1))
    model(torch.ones(1, 6))
    assert calls == [1], "a hook that comes after fuse runs as well"


def test_a_subclass_of_linear_is_not_bypassed():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    report = compare_with_vanilla(tiny(Doubling(6, 4)), mode="accumulate")
    assert "Doubling" in str(report)


def test_a_replaced_forward_is_not_bypassed():
    base = nn.Linear(6, 4)
    base.forward = lambda x: nn.Linear.forward(base, x) + 1
    model = tiny(base)
    fslora_kernels.fuse(model)
    plain = nn.functional.linear(torch.ones(1, 6), base.weight, base.bias)
    with model.disable_adapter():
        torch.testing.assert_close(model(torch.ones(1, 6)), plain + 1)
    delta = model(torch.ones(1, 6)) - plain - 1
    layer = model.base_model.model[0]
    torch.testing.assert_close(delta[0], layer.get_delta_weight("default").sum(1))


def test_two_active_adapters_add_up():
    model = tiny(nn.Linear(6, 4))
    model.add_adapter("second", LoraConfig(target_modules=["0"], r=3, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    compare_with_vanilla(model, mode="delta-first")


def test_calling_it_again_changes_the_implementation():
    model = tiny(nn.Linear(6, 4))
    for asked in (None, "torch"):
        assert fslora_kernels.fuse(model, asked).implementation == (asked or "auto")
        assert model.base_model.model[0].implementation == asked


def test_merge_and_disable_give_vanilla_results():
    model = tiny(nn.Linear(6, 4))
    fslora_kernels.fuse(model)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    want = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), want)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), want)
    with model.disable_adapter():
        assert not torch.allclose(model(x), want)


def test_dora_is_left_as_vanilla_peft_and_named():
    model = tiny(nn.Linear(6, 4), use_dora=True)
    vanilla = copy.deepcopy(model)
    report = fslora_kernels.fuse(model)
    assert not report.fused
    assert "DoraLinearVariant" in str(report)
    assert torch.equal(model(torch.ones(1, 6)), vanilla(torch.ones(1, 6)))


def test_dropout_drops_in_training_only():
    model = tiny(nn.Linear(6, 4), lora_dropout=0.5)
    compare_with_vanilla(model.eval(), mode="delta-first")
    x = torch.ones(1, 6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize("dropout", [nn.AlphaDropout(0.5), nn.Dropout(1.0), "hooked"])
def test_a_dropout_that_is_more_than_a_probability_is_left_to_peft(dropout):
    model = tiny(nn.Linear(6, 4), lora_dropout=0.5)
    fslora_kernels.fuse(model)
    (name,) = fslora_kernels.modules(model)
    layer = model.get_submodule(name)
    calls = []
    if dropout == "hooked":
        dropout = nn.Dropout(0.5)
        dropout.register_forward_hook(lambda *_: calls.append("called"))
    layer.lora_dropout["default"] = dropout
    found = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            found.append(model.train()(torch.ones(2, 6)))
        fslora_kernels.unfuse(model)
    assert torch.equal(*found)
    assert len(calls) in (0, 2)
    fslora_kernels.fuse(model)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m, n: fslora_kernels.sketch(m, {"nothing": None}), "no fused LoRA layer is named"),
        (lambda m, n: fslora_kernels.sketch(m, {n: torch.tensor([0, 8])}), "ranks 0 to 7"),
        (lambda m, n: fslora_kernels.extract(m, {n: torch.tensor([1, 1])}), "without repeats"),
        (lambda m, n: fslora_kernels.sketch(m, {n: None}, adapter_name="other"), "no plain LoRA"),
        (
            lambda m, n: fslora_kernels.bind(
                m, {n: fslora_kernels.LoRAWeights(torch.ones(2, 5), torch.ones(2, 4))}
            ),
            "the leaves of",
        ),
        (
            lambda m, n: fslora_kernels.scatter(
                m, fslora_kernels.extract(m, {n: torch.tensor([1])}), {n: torch.tensor([1, 2])}
            ),
            "1 ranks to write back",
        ),
        (lambda m, n: fslora_kernels.sketch(m, {n: [1, 2]}), "is a list; give a"),
        (lambda m, n: fslora_kernels.extract(m, {n: [1, 2]}), "is a list; give a"),
        (
            lambda m, n: fslora_kernels.scatter(
                m, fslora_kernels.extract(m, {n: None}), {n: range(8)}
            ),
            "is a range; give a",
        ),
        (lambda m, n: fslora_kernels.fuse(m, "cuda"), "unknown implementation"),
        (lambda m, n: fslora_kernels.fuse(nn.Linear(2, 2)), "no LoRA layer"),
    ],
)
def test_bad_calls_are_named(act, message):
    model = tiny(nn.Linear(6, 4))
    name = next(iter(fslora_kernels.fuse(model).fused))
    with pytest.raises(ValueError, match=message):
        act(model, name)


def test_an_implementation_that_cannot_run_is_refused_at_once(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="need a GPU"):
        fslora_kernels.fuse(tiny(nn.Linear(6, 4)), "triton")


def test_an_implementation_is_refused_by_where_the_adapters_are(monkeypatch):
    """Not by the first parameter, which may be an embedding that is offloaded."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    seen = []
    monkeypatch.setattr(fuse_module, "unavailable", lambda _, device: seen.append(device))
    model = nn.Sequential(nn.Linear(6, 4), nn.Embedding(5, 6, device="meta"), nn.Linear(6, 4))
    model = get_peft_model(model, LoraConfig(target_modules=["2"]))
    model.base_model.model[0].to("meta")
    fslora_kernels.fuse(model, "triton")
    assert seen == ["cpu"]
