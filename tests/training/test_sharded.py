"""On the shards of ``fully_shard``: what cannot work says so, and what can does."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import fslora_kernels

from . import world


@pytest.fixture
def group(tmp_path):
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def sharded(group):
    """A model sharded over the only process of its group."""
    model = world.model()
    fully_shard(model)
    return model


def test_leaves_are_taken_out_before(sharded):
    indices = dict.fromkeys(fslora_kernels.modules(sharded), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"is a DTensor, .* before fully_shard"):
        fslora_kernels.extract(sharded, indices)


def test_a_layer_that_is_sharded_itself_is_not_unfused(group):
    """It has a class of its own then, of which ours is only a base."""
    model = world.model()
    name = fslora_kernels.modules(model)[0]
    layer = model.get_submodule(name)
    x = torch.ones(3, layer.in_features)
    want = layer(x)
    fully_shard(layer)
    with pytest.raises(ValueError, match=f"{name} is a FSDPSketchedLoRALinear: .* unfuse before"):
        fslora_kernels.unfuse(model)
    assert name in fslora_kernels.modules(model)
    torch.testing.assert_close(layer(x), want)


def test_the_sketched_optimizer_names_another(sharded):
    optimizer = fslora_kernels.SketchedAdamW(sharded)
    sharded(input_ids=world.batch(), labels=world.batch()).loss.backward()
    with pytest.raises(ValueError, match=r"is a DTensor, .* use torch.optim.AdamW"):
        optimizer.step()


@pytest.mark.parametrize("norms", [True, False], ids=["norms apart", "layers whole"])
def test_inputs_are_made_again_from_weights_that_come_and_go(group, norms):
    """A norm that is sharded by itself has given its weight free when the layer behind it runs."""
    gradients = []
    for recompute in (True, False):
        model = world.model()
        fslora_kernels.fuse(model, recompute=recompute)
        for layer in model.base_model.model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                if norms:
                    fully_shard(norm)
            fully_shard(layer)
        fully_shard(model)
        model(input_ids=world.batch(), labels=world.batch()).loss.backward()
        found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(found)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])
