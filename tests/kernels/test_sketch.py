"""What a sketch and bound leaves do to a fused layer, and what they leave alone."""

import copy
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fslora_kernels
from fslora_kernels.nn.linear import Restriction
from fslora_kernels.sampling import draw_indices, draw_uniform


def tiny(base, **config):
    model = nn.Sequential(base)
    return get_peft_model(
        model, LoraConfig(target_modules=["0"], init_lora_weights=False, **config)
    )


@pytest.mark.parametrize("b", [torch.ones(1, 1), torch.ones(1, 3)], ids=lambda b: str(b.shape))
def test_leaves_that_do_not_fit_are_not_written_anywhere(b):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    model = get_peft_model(model, LoraConfig(target_modules=["0", "1"]))
    names = list(fslora_kernels.fuse(model).fused)
    indices = dict.fromkeys(names, torch.tensor([1]))
    leaves = fslora_kernels.extract(model, indices)
    leaves = {name: fslora_kernels.LoRAWeights(a + 1, b) for name, (a, b) in leaves.items()}
    leaves[names[1]] = fslora_kernels.LoRAWeights(leaves[names[1]].lora_a, b)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="but the layer takes"):
        fslora_kernels.scatter(model, leaves, indices)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_sketch_that_is_set_in_inference_mode_serves_training():
    model = tiny(nn.Linear(6, 4))
    name = next(iter(fslora_kernels.fuse(model).fused))
    with torch.inference_mode():
        fslora_kernels.sketch(model, {name: torch.tensor([1])})
    model(torch.ones(1, 6)).sum().backward()
    gradient = model.get_submodule(name).lora_A["default"].weight.grad
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [1]


def test_leaves_that_are_extracted_in_inference_mode_serve_training():
    model = tiny(nn.Linear(6, 4))
    name = next(iter(fslora_kernels.fuse(model).fused))
    with torch.inference_mode():
        leaves = fslora_kernels.extract(model, {name: torch.tensor([1])})
    fslora_kernels.bind(model, leaves)
    model(torch.ones(1, 6)).sum().backward()
    assert all(leaf.grad.any() for leaf in leaves[name])


def test_modules_of_different_ranks_have_index_sets_of_their_own():
    ranks = {"a": 8, "b": 4, "c": 8, "d": 1}
    drawn = draw_indices(5, ranks, 0.5)
    assert list(drawn) == list(ranks)
    assert drawn.pop("d") is None
    for name, index in drawn.items():
        assert torch.equal(index, draw_uniform(5, [name], ranks[name], ranks[name] // 2)[0])


def test_a_sketch_keeps_its_own_index_set():
    model = tiny(nn.Linear(6, 4))
    index = torch.tensor([1, 2])
    name = next(iter(fslora_kernels.fuse(model).fused))
    fslora_kernels.sketch(model, {name: index})
    want = model(torch.ones(1, 6))
    index.copy_(torch.tensor([5, 99]))
    assert torch.equal(model(torch.ones(1, 6)), want)


@pytest.mark.parametrize("bound", [False, True])
def test_what_the_layer_does_not_compute_is_not_merged(bound):
    model = tiny(nn.Linear(6, 4))
    name = next(iter(fslora_kernels.fuse(model).fused))
    index = {name: torch.tensor([1])}
    if bound:
        fslora_kernels.bind(model, fslora_kernels.extract(model, index))
    else:
        fslora_kernels.sketch(model, index)
    before = model(torch.ones(1, 6))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="is sketched, or leaves are bound"):
            merge()
    assert torch.equal(model(torch.ones(1, 6)), before)
    fslora_kernels.sketch(model, None)
    want = model(torch.ones(1, 6))
    torch.testing.assert_close(model.merge_and_unload()(torch.ones(1, 6)), want)


def test_leaves_are_not_written_under_a_merged_adapter():
    """Unmerging would take another delta out of the base weight than merging put in."""
    model = tiny(nn.Linear(6, 4))
    name = next(iter(fslora_kernels.fuse(model).fused))
    index = {name: torch.tensor([1])}
    leaves = fslora_kernels.extract(model, index)
    leaves[name].lora_a.data += 1
    layer = model.get_submodule(name)
    weight = layer.base_layer.weight.clone()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"call model.unmerge_adapter\(\) first"):
        fslora_kernels.scatter(model, leaves, index)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight)
    fslora_kernels.scatter(model, leaves, index)
    assert torch.equal(layer.lora_A["default"].weight[1], leaves[name].lora_a[0])


def test_a_fixed_sketch_is_saved_as_it_was_trained_once_its_columns_are_scaled(tmp_path):
    """As the documentation of ``sketch`` says."""
    plain = nn.Sequential(nn.Linear(6, 4))
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=True)
    model = fslora_kernels.get_sketched_peft_model(copy.deepcopy(plain), config, ratio=0.25)
    x = torch.ones(1, 6)
    optimizer = fslora_kernels.SketchedAdamW(model, lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    want = model(x)
    layer = model.base_model.model[0]
    index = layer.restrictions["default"].index
    fslora_kernels.sketch(model, None)
    assert not torch.allclose(model(x), want, rtol=1e-3)
    with torch.no_grad():
        layer.lora_B["default"].weight[:, index] *= 8 / 2
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(plain, tmp_path)(x), want)
    torch.testing.assert_close(model.merge_and_unload()(x), want)


def test_a_sketch_is_never_ignored():
    model = tiny(nn.Linear(6, 4))
    name = next(iter(fslora_kernels.fuse(model).fused))
    model.merge_adapter()
    fslora_kernels.sketch(model, {name: torch.tensor([1])})
    with pytest.raises(ValueError, match="a sketch is set"):
        model(torch.ones(1, 6))


def test_a_sketched_model_without_its_adapter_is_its_base():
    """As a trainer with a reference model runs it."""
    base = nn.Linear(6, 4)
    model = tiny(base)
    name = next(iter(fslora_kernels.fuse(model).fused))
    fslora_kernels.sketch(model, {name: torch.tensor([1])})
    with model.disable_adapter():
        assert torch.equal(model(torch.ones(1, 6)), base(torch.ones(1, 6)))


def test_leaves_may_have_a_scale_of_their_own():
    model = tiny(nn.Linear(6, 4))
    name = next(iter(fslora_kernels.fuse(model).fused))
    layer, x = model.get_submodule(name), torch.ones(1, 6)
    leaves = fslora_kernels.extract(model, {name: torch.tensor([1, 6])})
    a, b = leaves[name]
    for relative, factor in ((None, 8 / 2), (0.5, 0.5)):
        fslora_kernels.bind(model, leaves, scale=relative)
        want = layer.base_layer(x) + factor * layer.scaling["default"] * (x @ a.T) @ b
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_each_rank_of_the_leaves_may_have_a_scale_of_its_own():
    model = tiny(nn.Linear(6, 4)).double()
    name = next(iter(fslora_kernels.fuse(model).fused))
    layer, x = model.get_submodule(name), torch.randn(5, 6).double()
    a, b = leaves = fslora_kernels.extract(model, {name: torch.tensor([1, 6])})[name]
    scales = torch.tensor([0.5, 3.0]).double()
    fslora_kernels.bind(model, {name: leaves}, scale={name: scales})
    want = layer.base_layer(x) + layer.scaling["default"] * (x @ a.T * scales) @ b
    got = model(x)
    torch.testing.assert_close(got, want)
    gradients = (torch.autograd.grad(y.square().sum(), (a, b)) for y in (got, want))
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("scales", [None, torch.ones(3), torch.ones(2, requires_grad=True)])
def test_scales_that_do_not_fit_the_ranks_are_refused(scales):
    model = tiny(nn.Linear(6, 4))
    name = next(iter(fslora_kernels.fuse(model).fused))
    leaves = fslora_kernels.extract(model, {name: torch.tensor([1, 6])})
    with pytest.raises(ValueError, match="has 2 ranks and the scales"):
        fslora_kernels.bind(model, leaves, scale={} if scales is None else {name: scales})


def test_a_sketch_follows_the_model_to_another_device():
    """Which is shown without one: the index set is asked to move, to where the factors are."""
    model = tiny(nn.Linear(6, 4))
    (name,) = fslora_kernels.fuse(model).fused
    restrictions, index = model.get_submodule(name).restrictions, Mock()
    restrictions["default"] = Restriction(index)
    model.double()
    index.to.assert_called_once_with(torch.device("cpu"))
    assert restrictions["default"].index is index.to.return_value
    model.to("meta")
    assert restrictions["default"].index is index.to.return_value, "where nothing has a value"


def test_a_replica_moves_the_sketch_that_it_shares():
    model = tiny(nn.Linear(6, 4))
    (name,) = fslora_kernels.fuse(model).fused
    index, x = torch.tensor([1, 2]), torch.ones(1, 6)
    fslora_kernels.sketch(model, {name: index})
    want = model(x)
    restrictions, elsewhere = model.get_submodule(name).restrictions, Mock(shape=index.shape)
    elsewhere.to.return_value = index
    restrictions["default"] = replace(restrictions["default"], index=elsewhere)
    assert torch.equal(model(x), want)
    elsewhere.to.assert_called_once_with(x.device)
