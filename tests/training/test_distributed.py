"""Two processes give what one gives with both their batches, and what vanilla PEFT gives."""

import pytest
import torch
from accelerate.state import AcceleratorState

from . import world
from .steps import flat, trainable


@pytest.fixture(scope="module")
def alone():
    results = world.every_way(None)
    losses = results["vanilla.losses"]
    assert losses[-1] < losses[0] - 0.1, "it trains"
    assert (results["view.losses"] - losses).abs().min() > 1e-3, "the sketch is really applied"
    return results


def check(together, alone):
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=2e-5, msg=name)
    vanilla, fused, view, compact = (
        together[f"{way}.losses"] for way in ("vanilla", "fused", "view", "compact")
    )
    torch.testing.assert_close(fused, vanilla, rtol=1e-5, atol=0)
    torch.testing.assert_close(view, compact, rtol=1e-5, atol=0)


def test_ddp(alone, tmp_path):
    check(world.run(world.ddp, tmp_path), alone)


@pytest.mark.slow
def test_fsdp1(alone, tmp_path):
    losses = {k: t for k, t in world.run(world.fsdp1, tmp_path).items() if "losses" in k}
    for name, tensor in losses.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=2e-5, msg=name)
    torch.testing.assert_close(losses["fused.losses"], losses["vanilla.losses"], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_fsdp2(alone, tmp_path):
    check(world.run(world.fsdp2, tmp_path), alone)


@pytest.mark.slow
def test_every_process_draws_the_same_sketch(tmp_path):
    """Else their gradients would be of different ranks, and DDP would average them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    want = world.sketch_callback()["callback.factors"]
    got = world.run(world.sketch_callback, tmp_path)["callback.factors"]
    start = flat(trainable(world.model()).values())
    assert (want - start).norm() > 0.1 * start.norm()
    assert (got - want).norm() < 1e-3 * (want - start).norm()
