"""SketchedAdamW on real models, against stock AdamW."""

import copy

import pytest
import torch
from peft import LoraConfig

import fslora_kernels
from fslora_kernels import SketchedAdamW

from .models import bert, llama, tokens

RULE = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.3}
RANKS = 8


def fused(build, shared_data, *, dtype=torch.float64, **config):
    model = build(shared_data, dtype=dtype, **config).eval()
    fslora_kernels.fuse(model)
    return model


def drawn(model, seed):
    """Another index set for every module, of one to eight ranks."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randperm(RANKS, generator=generator)[: 1 + (number + seed) % RANKS]
        .sort()
        .values
        for number, name in enumerate(fslora_kernels.modules(model))
    }


def train(model, optimizer, ids, *, sketches=(None,), before_step=lambda: None):
    for indices in sketches:
        if indices is not None:
            fslora_kernels.sketch(model, indices)
        optimizer.zero_grad()
        logits = model(input_ids=ids).logits
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype)
        (logits.flatten() * weights).sum().backward()
        before_step()
        optimizer.step()


def factors(model):
    """Every factor, one rank per row, with the name of its module."""
    for name in fslora_kernels.modules(model):
        layer = model.get_submodule(name)
        yield name, layer.lora_A["default"].weight.detach()
        yield name, layer.lora_B["default"].weight.detach().t()


def rows_that_moved(model, optimizer, ids, *, steps=4):
    """How many unselected rows changed in a step, and how many selected ones did not."""
    moved = stuck = 0
    for step in range(steps):
        indices = drawn(model, seed=step)
        before = [tensor.clone() for _, tensor in factors(model)]
        train(model, optimizer, ids, sketches=[indices])
        for (name, after), rows in zip(factors(model), before, strict=True):
            changed = (after != rows).any(dim=1)
            selected = torch.zeros(RANKS, dtype=torch.bool)
            selected[indices[name]] = True
            moved += int((changed & ~selected).sum())
            stuck += int((~changed & selected).sum())
    return moved, stuck


def test_only_the_sketched_ranks_move_and_stock_adamw_moves_the_others(shared_data):
    ours = fused(llama, shared_data, dtype=torch.float32)
    stock = copy.deepcopy(ours)
    ids = tokens(ours)
    assert rows_that_moved(ours, SketchedAdamW(ours, **RULE), ids) == (0, 0)
    trainable = [parameter for parameter in stock.parameters() if parameter.requires_grad]
    moved, stuck = rows_that_moved(stock, torch.optim.AdamW(trainable, **RULE), ids)
    assert moved > 100
    assert stuck == 0


def test_one_fixed_sketch_equals_compact_mode_under_torchs_adamw(shared_data):
    view = fused(llama, shared_data)
    compact = copy.deepcopy(view)
    ids, indices = tokens(view), drawn(view, seed=3)
    train(view, SketchedAdamW(view, **RULE), ids, sketches=[indices] * 4)
    leaves = fslora_kernels.extract(compact, indices)
    fslora_kernels.bind(compact, leaves)
    train(
        compact,
        torch.optim.AdamW([leaf for pair in leaves.values() for leaf in pair], **RULE),
        ids,
        sketches=[None] * 4,
    )
    fslora_kernels.scatter(compact, leaves, indices)
    for (name, got), (_, want) in zip(factors(view), factors(compact), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8, msg=name)


def test_without_a_sketch_it_is_adamw_with_heads_groups_and_a_schedule(shared_data):
    ours = fused(bert, shared_data, modules_to_save=["classifier"])
    stock = copy.deepcopy(ours)
    ids = tokens(ours)

    def trained(model, optimizer, **rule):
        head = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" in n]
        rest = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n]
        assert head
        assert rest
        groups = [{"params": rest}, {"params": head, "weight_decay": 0.0, "lr": 0.5}]
        optimizer = optimizer(groups, **rule)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            train(model, optimizer, ids)
            schedule.step()

    trained(ours, lambda groups, **rule: SketchedAdamW(ours, groups, **rule), **RULE)
    trained(stock, torch.optim.AdamW, **RULE)
    for (name, got), want in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8, msg=name)


def test_a_saved_state_continues_to_the_bit_in_low_precision(shared_data, tmp_path):
    model = fused(llama, shared_data, dtype=torch.bfloat16)
    ids = tokens(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    optimizer = SketchedAdamW(model, **RULE)
    train(model, optimizer, ids, sketches=[drawn(model, seed) for seed in range(3)])
    resumed = copy.deepcopy(model)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    continued = SketchedAdamW(resumed, lr=1.0)
    continued.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    first = next(iter(continued.state.values()))
    assert first["exp_avg"].dtype == torch.float32
    assert first["exp_avg"].ne(first["exp_avg"].bfloat16()).any(), "the state was rounded"
    for same, opt in ((model, optimizer), (resumed, continued)):
        train(same, opt, ids, sketches=[drawn(same, seed) for seed in range(3, 6)])
    for got, want in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want)


def test_a_state_of_stock_adamw_is_refused(shared_data):
    model = fused(llama, shared_data)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stock = torch.optim.AdamW(trainable, **RULE)
    train(model, stock, tokens(model))
    optimizer = SketchedAdamW(model, **RULE)
    with pytest.raises(ValueError, match="what a SketchedAdamW of this model saved"):
        optimizer.load_state_dict(stock.state_dict())
    assert not optimizer.state


def test_a_state_of_another_optimizer_is_refused(shared_data):
    model = fused(bert, shared_data, modules_to_save=["classifier"])
    head = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" in n]
    for params in (None, head):
        optimizer = SketchedAdamW(model, params, **RULE)
        saved = optimizer.param_groups[0]["params"]
        sgd = torch.optim.SGD(saved, lr=0.1, momentum=0.9)
        train(model, sgd, tokens(model))
        with pytest.raises(ValueError, match=r"no exp_avg, exp_avg_sq, step, .* another optimizer"):
            optimizer.load_state_dict(sgd.state_dict())
        assert not optimizer.state


@pytest.mark.parametrize("both", [True, False])
def test_a_factor_that_layers_share_is_stepped_in_all_of_their_sketches(shared_data, both):
    model = fused(llama, shared_data)
    names = [name for name in fslora_kernels.modules(model) if name.endswith("q_proj")][:2]
    first, second = (model.get_submodule(name) for name in names)
    second.lora_A["default"].weight = shared = first.lora_A["default"].weight
    optimizer = SketchedAdamW(model, **RULE)
    sets = {names[0]: torch.tensor([0, 5])} | ({names[1]: torch.tensor([2, 5])} if both else {})
    before = shared.detach().clone()
    fslora_kernels.sketch(model, sets)
    train(model, optimizer, tokens(model))
    moved = (shared != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == ([0, 2, 5] if both else list(range(RANKS)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_steps_are_counted_in_float32_whatever_torchs_default_is(shared_data, dtype):
    """In bfloat16 a count would stop at 256."""
    model = fused(bert, shared_data, dtype=torch.float32, modules_to_save=["classifier"])
    optimizer = SketchedAdamW(model, **RULE)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert {state["step"].dtype for state in optimizer.state.values()} == {torch.float32}


def test_a_closure_is_called_with_gradients_and_its_loss_returned(shared_data):
    model = fused(llama, shared_data)
    optimizer = SketchedAdamW(model, **RULE)
    before = [tensor.clone() for _, tensor in factors(model)]

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=tokens(model)).logits.square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    after = [tensor for _, tensor in factors(model)]
    assert all((new != old).any() for new, old in zip(after, before, strict=True))


def test_an_adapter_that_is_added_later_is_stepped_by_its_sketch(shared_data):
    model = fused(llama, shared_data)
    optimizer = SketchedAdamW(model, **RULE)
    model.add_adapter("two", LoraConfig(r=RANKS, target_modules=["q_proj"]))
    model.set_adapter("two")
    fslora_kernels.fuse(model)
    own = [p for n, p in model.named_parameters() if ".two." in n]
    optimizer.add_param_group({"params": own})
    before = [p.clone() for p in own]
    names = [name for name in fslora_kernels.modules(model) if name.endswith("q_proj")]
    indices = dict.fromkeys(names, torch.tensor([0, 1]))
    fslora_kernels.sketch(model, indices, adapter_name="two")
    train(model, optimizer, tokens(model))
    for new, old in zip(own, before, strict=True):
        moved = (new != old).any(dim=1 if len(new) == RANKS else 0)
        assert not moved[2:].any()
    assert any((new != old).any() for new, old in zip(own, before, strict=True))


def test_a_copy_of_model_and_optimizer_goes_on_with_the_same_bits(shared_data):
    model = fused(llama, shared_data)
    optimizer = SketchedAdamW(model, **RULE)
    ids, sketches = tokens(model), [drawn(model, seed=5)]
    train(model, optimizer, ids, sketches=sketches)
    copied, its = copy.deepcopy((model, optimizer))
    train(model, optimizer, ids, sketches=sketches)
    train(copied, its, ids, sketches=sketches)
    for (_, one), (_, other) in zip(factors(model), factors(copied), strict=True):
        assert torch.equal(one, other)


def test_an_unfused_model_is_stepped_on_after_its_state_is_loaded_again(shared_data):
    model = fused(llama, shared_data)
    optimizer, ids = SketchedAdamW(model, **RULE), tokens(model)
    train(model, optimizer, ids, sketches=[drawn(model, seed=5)])
    fslora_kernels.unfuse(model)
    other = copy.deepcopy(model)
    parameters = [p for p in other.parameters() if p.requires_grad]
    start = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, ids)
    want = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    for parameter, old in zip(optimizer.param_groups[0]["params"], parameters, strict=True):
        parameter.data.copy_(old)
    optimizer.load_state_dict(start)
    train(model, optimizer, ids)
    for parameter, after in zip(optimizer.param_groups[0]["params"], want, strict=True):
        assert torch.equal(parameter, after)


def test_what_cannot_be_is_refused(shared_data, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = llama(shared_data)
    with pytest.raises(ValueError, match=r"fslora_kernels.fuse\(model\) first"):
        SketchedAdamW(model)
    fslora_kernels.fuse(model)
    for change, message in (
        ({"lr": -1.0}, "lr must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"implementation": "cuda"}, "unknown implementation"),
    ):
        with pytest.raises(ValueError, match=message):
            SketchedAdamW(model, **change)
    with pytest.raises(NotImplementedError, match="need a GPU"):
        train(model, SketchedAdamW(model, implementation="triton"), tokens(model))
