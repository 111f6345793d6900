"""Gradient checkpointing runs a layer twice: the second time must be the first."""

import pytest
import torch

import fslora_kernels
from tests.kernels.models import bert, llama, tokens

from .steps import every_second, flat, is_fused, pair, trainable

# transformers 5.23 renames what every version before it has.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])


def loss_and_gradients(model, ids):
    labels = ids if model.config.model_type == "llama" else ids[:, 0] % 2
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
    gradients = [p.grad for p in trainable(model).values()]
    assert all(gradient is not None for gradient in gradients)
    model.zero_grad()
    return loss.detach(), flat(gradients)


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@REENTRANT
@pytest.mark.parametrize("sketched", [False, True], ids=["whole", "sketched"])
@pytest.mark.parametrize("build", [llama, bert])
def test_it_gives_the_same_loss_and_gradients_with_dropout(build, sketched, reentrant, shared_data):
    _, model = pair(build(shared_data, lora_dropout=0.3).train())
    ids = tokens(model)
    if sketched:
        fslora_kernels.sketch(model, every_second(model))
    want_loss, want = loss_and_gradients(model, ids)
    calls = []
    layer = model.get_submodule(fslora_kernels.modules(model)[0])
    layer.register_forward_hook(lambda *_: calls.append(1))
    loss, gradients = loss_and_gradients(checkpointed(model, reentrant), ids)
    assert len(calls) == 2, "the layer ran again in the backward pass"
    assert torch.equal(loss, want_loss)
    assert torch.equal(gradients, want)


@REENTRANT
@pytest.mark.parametrize("build", [llama, bert])
def test_it_equals_vanilla_peft_under_checkpointing(build, reentrant, shared_data):
    model = build(shared_data).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    vanilla, fused = pair(model)
    ids = tokens(model)
    want_loss, want = loss_and_gradients(checkpointed(vanilla, reentrant), ids)
    loss, gradients = loss_and_gradients(checkpointed(fused, reentrant), ids)
    assert is_fused(fused)
    assert not is_fused(vanilla)
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients, want, rtol=1e-4, atol=1e-5)
