"""What cannot work on the shards of ``fully_shard`` says so."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import fslora_kernels

from . import world


@pytest.fixture
def sharded(tmp_path):
    """A model sharded over the only process of its group."""
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = world.model()
        fully_shard(model)
        yield model
    finally:
        dist.destroy_process_group()


def test_leaves_are_taken_out_before(sharded):
    indices = dict.fromkeys(fslora_kernels.modules(sharded), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"is a DTensor, .* before fully_shard"):
        fslora_kernels.extract(sharded, indices)


def test_the_sketched_optimizer_names_another(sharded):
    optimizer = fslora_kernels.SketchedAdamW(sharded)
    sharded(input_ids=world.batch(), labels=world.batch()).loss.backward()
    with pytest.raises(ValueError, match=r"is a DTensor, .* use torch.optim.AdamW"):
        optimizer.step()
