"""Mixed precision, loss scaling and gradient accumulation give what vanilla PEFT gives."""

import copy

import pytest
import torch

import fslora_kernels
from fslora_kernels.testing import check_error_budget
from tests.kernels.models import bert, llama, logits_and_gradients, tokens

from .steps import every_second, flat, is_fused, pair, train, trainable

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("build", [llama, bert])
def test_autocast(build, dtype, shared_data):
    vanilla, fused = pair(build(shared_data).eval())
    exact = copy.deepcopy(vanilla).double()
    ids = tokens(vanilla)
    want, want_gradients = logits_and_gradients(exact, ids)
    with torch.autocast("cpu", dtype):
        eager, eager_gradients = logits_and_gradients(vanilla, ids)
        got, gradients = logits_and_gradients(fused, ids)
    check_error_budget(got, eager, want, name="logits")
    assert gradients.keys() == eager_gradients.keys() == want_gradients.keys()
    vectors = [flat(g.values()) for g in (gradients, eager_gradients, want_gradients)]
    check_error_budget(*vectors, name="gradients")


@DTYPES
def test_a_sketch_under_autocast(dtype, shared_data):
    """View and compact mode round the same way; both differ from the whole adapter."""
    _, model = pair(llama(shared_data).eval())
    ids, indices = tokens(model), every_second(model)
    with torch.autocast("cpu", dtype), torch.no_grad():
        whole = model(input_ids=ids).logits
        fslora_kernels.sketch(model, indices)
        view = model(input_ids=ids).logits
        fslora_kernels.bind(model, fslora_kernels.extract(model, indices))
        compact = model(input_ids=ids).logits
    assert torch.equal(view, compact)
    assert (view - whole).abs().max() > 0.1


def train_scaled(model, ids, scale):
    """Return the scaler's history and the trained parameters."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=5e-3)
    history = []
    for _ in range(4):
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable(model).values(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        history.append(scaler.get_scale())
    return history, flat(trainable(model).values())


@pytest.mark.parametrize("scale", [2.0**10, 2.0**28], ids=["fits", "overflows"])
def test_grad_scaler(scale, shared_data):
    vanilla, fused = pair(llama(shared_data).train())
    ids, start = tokens(vanilla), flat(trainable(vanilla).values())
    want_history, want = train_scaled(vanilla, ids, scale)
    history, got = train_scaled(fused, ids, scale)
    assert is_fused(fused)
    assert history == want_history
    assert (min(history) < scale) == (scale > 2**20), "steps are skipped only on overflow"
    if history[-1] == history[0]:
        assert (want - start).abs().max() > 1e-2
    assert (got - want).norm() <= 0.05 * (want - start).norm()


@pytest.mark.parametrize("sketched", [False, True], ids=["whole", "sketched"])
def test_gradient_accumulation(sketched, shared_data):
    vanilla, fused = pair(llama(shared_data).train())
    ids = tokens(vanilla, batch=4)

    def accumulated(model):
        for part in ids.split(1):
            (model(input_ids=part, labels=part).loss / 4).backward()
        return flat(p.grad for p in trainable(model).values())

    if sketched:
        fslora_kernels.sketch(fused, every_second(fused))
        want_model = copy.deepcopy(fused)
        want_model(input_ids=ids, labels=ids).loss.backward()
        want = flat(p.grad for p in trainable(want_model).values())
    else:
        want = accumulated(vanilla)
    torch.testing.assert_close(accumulated(fused), want, rtol=1e-4, atol=1e-5)


def test_training_in_bfloat16(shared_data):
    """A model held in bfloat16 with float32 factors, as ``autocast_adapter_dtype`` leaves them."""
    model = llama(shared_data, dtype=torch.bfloat16).train()
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    vanilla, fused = pair(model)
    ids, exact = tokens(model), copy.deepcopy(vanilla).double()
    (eager_losses, eager), (losses, got) = train(vanilla, ids), train(fused, ids)
    want_losses, want = train(exact, ids)
    assert want_losses[-1] < want_losses[0] - 0.1
    check_error_budget(losses, eager_losses, want_losses, name="losses")
    check_error_budget(got, eager, want, name="trained factors")
