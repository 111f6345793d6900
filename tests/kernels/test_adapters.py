"""Several adapters on a fused model, and everything PEFT does with them."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import fslora_kernels

X = torch.linspace(-1, 1, 24).reshape(4, 6)


def config(rank=4, **settings):
    targets = ["0", "1"]
    return LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, **settings)


@pytest.fixture
def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))


@pytest.fixture
def two(base):
    """A fused model with two adapters, and the same in vanilla PEFT."""
    model = get_peft_model(base, config())
    model.add_adapter("second", config(rank=2, use_rslora=True))
    vanilla = copy.deepcopy(model)
    fslora_kernels.fuse(model)
    return model, vanilla


def test_switching_disabling_and_combining(two):
    model, vanilla = two
    outputs = []
    for active in ("default", "second", ["default", "second"]):
        for each in two:
            each.base_model.set_adapter(active)
        torch.testing.assert_close(model(X), vanilla(X))
        outputs.append(model(X))
    with model.disable_adapter(), vanilla.disable_adapter():
        torch.testing.assert_close(model(X), vanilla(X))
        outputs.append(model(X))
    different = [a for a in outputs if all(a is b or not torch.allclose(a, b) for b in outputs)]
    assert len(different) == 4


def test_a_batch_of_mixed_adapters(two):
    model, vanilla = (each.eval() for each in two)
    names = ["default", "__base__", "second", "default"]
    got = model(X, adapter_names=names)
    torch.testing.assert_close(got, vanilla(X, adapter_names=names))
    torch.testing.assert_close(model(X)[0], got[0])
    name = fslora_kernels.modules(model)[0]
    fslora_kernels.sketch(model, {name: torch.tensor([0])})
    with pytest.raises(ValueError, match="a sketch is set"):
        model(X, adapter_names=names)


def test_merging_and_unloading(two):
    model, vanilla = two
    for each in two:
        each.base_model.set_adapter("second")
    want = vanilla(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(X), want, rtol=1e-4, atol=1e-5)


def test_adapters_that_come_and_go_after_fusing(two):
    model, vanilla = two
    for each in two:
        torch.manual_seed(4)
        each.add_adapter("third", config(rank=3))
        each.set_adapter("third")
    torch.testing.assert_close(model(X), vanilla(X))
    for each in two:
        each.set_adapter("default")
        each.delete_adapter("third")
    torch.testing.assert_close(model(X), vanilla(X))
    model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum", combination_type="cat")
    vanilla.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum", combination_type="cat")
    for each in two:
        each.set_adapter("sum")
    torch.testing.assert_close(model(X), vanilla(X))


def test_a_sketch_of_one_adapter_leaves_the_other_alone(two):
    model, _ = two
    model.base_model.set_adapter(["default", "second"])
    names = fslora_kernels.modules(model)
    for name in names:
        fslora_kernels.sketch(model, {name: torch.tensor([1, 2])}, adapter_name="default")
        layer = model.get_submodule(name)
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        a, b = (factor["default"].weight for factor in (layer.lora_A, layer.lora_B))
        second = layer.get_delta_weight("second")
        want = layer.base_layer(x) + x @ second.T
        want = want + layer.scaling["default"] * 4 / 2 * x @ a[[1, 2]].T @ b[:, [1, 2]].T
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


def test_ranks_are_those_of_the_layers_that_have_the_adapter(base):
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["1"]))
    fslora_kernels.fuse(model)
    one, other = fslora_kernels.modules(model)
    assert fslora_kernels.ranks(model, adapter_name="second") == {other: 2}
    model.base_model.set_adapter(["default", "second"])
    assert fslora_kernels.ranks(model) == {one: 4, other: 2}


@pytest.mark.parametrize("act", ["sketch", "bind", "clear"])
def test_what_is_set_on_one_adapter_leaves_what_is_set_on_another(two, act):
    model, _ = two
    name = fslora_kernels.modules(model)[0]
    layer, index = model.get_submodule(name), {name: torch.tensor([1])}
    fslora_kernels.sketch(model, index, adapter_name="default")
    kept = layer.restrictions["default"]
    leaves = fslora_kernels.extract(model, index, adapter_name="second")
    fslora_kernels.bind(model, leaves, adapter_name="second")
    if act == "bind":
        assert layer.restrictions["second"].leaves is leaves[name]
    else:
        fslora_kernels.sketch(model, index if act == "sketch" else None, adapter_name="second")
        assert ("second" in layer.restrictions) == (act == "sketch")
    assert layer.restrictions["default"] is kept
    with pytest.raises(ValueError, match="no fused layer has the adapter 'secnod'"):
        fslora_kernels.sketch(model, None, adapter_name="secnod")
    fslora_kernels.sketch(model, None)
    assert not layer.restrictions


def test_a_sketch_of_an_inactive_adapter_is_no_hindrance(two):
    model, vanilla = two
    name = fslora_kernels.modules(model)[0]
    fslora_kernels.sketch(model, {name: torch.tensor([1])})
    for each in two:
        torch.manual_seed(4)
        each.add_adapter("dora", config(use_dora=True))
        each.set_adapter("dora")
    torch.testing.assert_close(model(X), vanilla(X))
    model.merge_adapter(["second"])
    vanilla.merge_adapter(["second"])
    torch.testing.assert_close(model(X), vanilla(X))
    with pytest.raises(ValueError, match="'default' is sketched"):
        model.merge_adapter(["default"])


def test_an_adapter_added_as_dora_is_peft_s_own(two):
    model, vanilla = two
    for each in two:
        torch.manual_seed(4)
        each.add_adapter("dora", config(use_dora=True))
        each.set_adapter("dora")
    torch.testing.assert_close(model(X), vanilla(X))
    modes = fslora_kernels.fuse(model).fused.values()
    assert set(modes) == {"vanilla: an active adapter is a LoRA variant"}
    with pytest.raises(ValueError, match="no plain LoRA adapter 'dora'"):
        fslora_kernels.extract(model, dict.fromkeys(fslora_kernels.modules(model)))
    for each in two:
        each.set_adapter("default")
    torch.testing.assert_close(model(X), vanilla(X))
    assert set(fslora_kernels.fuse(model).fused.values()) == {"delta-first"}


@pytest.mark.parametrize("fuse_first", [False, True])
def test_low_memory_loading(base, tmp_path, fuse_first):
    """Adapters are born on the meta device and filled from the file."""
    saved = get_peft_model(copy.deepcopy(base), config())
    saved.save_pretrained(tmp_path)
    want = saved(X)
    if fuse_first:
        model = get_peft_model(base, config())
        fslora_kernels.fuse(model)
        model.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=True)
        model.set_adapter("loaded")
    else:
        model = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
        fslora_kernels.fuse(model)
    torch.testing.assert_close(model(X), want)


def test_hot_swapping_an_adapter(base, tmp_path):
    """The new adapter has another rank and scaling, which PEFT then keeps as a tensor."""
    other = get_peft_model(copy.deepcopy(base), config(rank=2, lora_alpha=32))
    other.save_pretrained(tmp_path)
    want = other(X)
    model = get_peft_model(base, config(rank=4, lora_alpha=4))
    model.save_pretrained(tmp_path / "first")
    fslora_kernels.fuse(model)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert not torch.allclose(model(X), want)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    scaling = model.get_submodule(fslora_kernels.modules(model)[0]).scaling["default"]
    assert isinstance(scaling, torch.Tensor)
    torch.testing.assert_close(model(X), want)


def test_hot_swapping_to_a_larger_rank(base, tmp_path):
    """The factors are the rank's only witness: PEFT's ``layer.r`` stays as it was."""
    other = get_peft_model(copy.deepcopy(base), config(rank=8))
    other.save_pretrained(tmp_path)
    model = get_peft_model(base, config(rank=2))
    fslora_kernels.fuse(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    names = fslora_kernels.modules(model)
    assert fslora_kernels.ranks(model) == dict.fromkeys(names, 8)
    index = dict.fromkeys(names, torch.tensor([1, 7]))
    fslora_kernels.fuse(other)
    for each in (model, other):
        fslora_kernels.sketch(each, index)
    want = other(X)
    torch.testing.assert_close(model(X), want)
    leaves = fslora_kernels.extract(model, index)
    fslora_kernels.bind(model, leaves)
    torch.testing.assert_close(model(X), want)
    fslora_kernels.scatter(model, leaves, index)
    fslora_kernels.bind(model, fslora_kernels.extract(model, dict.fromkeys(names)))
    fslora_kernels.sketch(other, None)
    torch.testing.assert_close(model(X), other(X))


@pytest.mark.parametrize("name", [None, "default", "second"])
def test_what_is_bound_to_slots_is_what_is_bound_to_the_model(two, name):
    model, _ = two
    model.base_model.set_adapter(name or "default")
    rank = 2 if name == "second" else 4
    slots = fslora_kernels.slots(model, adapter_name=name)
    assert {each.rank for each in slots.values()} == {rank}
    indices = {module: torch.tensor([1]) for module in fslora_kernels.modules(model)}
    leaves = fslora_kernels.extract(model, indices, adapter_name=name)
    whole = model(X)
    fslora_kernels.bind(model, leaves, adapter_name=name)
    wanted = model(X)
    fslora_kernels.unbind(model)
    assert torch.equal(model(X), whole)
    fslora_kernels.bind(slots, leaves)
    assert torch.equal(model(X), wanted)
    assert not torch.equal(whole, wanted)
    fslora_kernels.unbind(slots)
    assert torch.equal(model(X), whole)


def test_slots_are_asked_for_what_they_are(two):
    model, _ = two
    slots = fslora_kernels.slots(model)
    leaves = fslora_kernels.extract(model, dict.fromkeys(slots))
    with pytest.raises(ValueError, match=r"give its name to slots\(\)"):
        fslora_kernels.bind(slots, leaves, adapter_name="second")
    with pytest.raises(ValueError, match="no fused LoRA layer is named 'other'"):
        fslora_kernels.bind(slots, {**leaves, "other": next(iter(leaves.values()))})
    assert all(not slot.restrictions for slot in slots.values())
    assert fslora_kernels.slots(model, adapter_name="third") == {}
