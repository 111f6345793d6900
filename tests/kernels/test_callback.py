import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import fslora_kernels
from fslora_kernels.nn.callback import SketchCallback, linear_ratio, random_ratio
from fslora_kernels.nn.fuse import fused_layers
from fslora_kernels.nn.linear import SketchedLoRALinear

from .models import llama, tokens

RANK = 8


class Rows(torch.utils.data.Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, k):
        return {"input_ids": self.ids[k], "labels": self.ids[k]}


class Watch(TrainerCallback):
    """Note the index sets at every call of one layer: (optimizer step, in training, ranks)."""

    def __init__(self):
        self.calls = []

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        layers = [m for m in model.modules() if isinstance(m, SketchedLoRALinear)]

        def note(layer, *_):
            restriction = layer.restrictions.get("default")
            ranks = None if restriction is None else tuple(restriction.index.tolist())
            self.calls.append((state.global_step, model.training, ranks))

        self.handles = [layers[0].register_forward_hook(note)]

    def sets(self):
        """Optimizer step to the one set that all its forward passes used."""
        sets = {}
        for step, training, ranks in self.calls:
            if training:
                assert sets.setdefault(step, ranks) == ranks
        return sets


def trainer(model, folder, *callbacks, optimizer=None, **settings):
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    data = Rows(tokens(model, batch=12, length=16))
    return Trainer(
        model,
        TrainingArguments(str(folder), **defaults | settings),
        train_dataset=data,
        eval_dataset=data,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


@pytest.fixture
def model(shared_data):
    return llama(shared_data, target_modules=["q_proj", "v_proj"])


def config(*targets, **settings):
    return LoraConfig(r=RANK, target_modules=list(targets), **settings)


def run(model, folder, callback, *, resume=None, **settings):
    watch = Watch()
    trainer(model, folder, callback, watch, **settings).train(resume_from_checkpoint=resume)
    return watch


def test_sets_change_every_n_steps_and_hold_through_accumulation(model, tmp_path):
    callback = SketchCallback(0.25, every=2, seed=3)
    watch = run(model, tmp_path, callback, gradient_accumulation_steps=2)
    sets = watch.sets()
    assert sorted(sets) == list(range(6))
    assert len(watch.calls) == 12, "two passes a step"
    assert all(sets[k] == sets[k + 1] for k in (0, 2, 4))
    assert len({sets[0], sets[2], sets[4]}) == 3
    assert {len(ranks) for ranks in sets.values()} == {2}


def test_layers_draw_their_own_ranks_from_the_seed(model):
    def drawn(seed, step):
        callback, own = SketchCallback(0.5, seed=seed), copy.deepcopy(model)
        callback.on_train_begin(model=own)
        drawn = callback._draw(own, step)
        assert list(drawn) == fslora_kernels.modules(own)
        return [tuple(index.tolist()) for index in drawn.values()]

    first = drawn(0, 0)
    assert len(set(first)) > 1
    assert drawn(0, 0) == first
    assert drawn(1, 0) != first
    assert drawn(0, 1) != first


def test_a_step_trains_the_ranks_of_its_sketch_only(model, tmp_path):
    """With SketchedAdamW the others keep their bits; stock AdamW lets them decay."""

    def moved(optimizer):
        own = copy.deepcopy(model)
        fslora_kernels.fuse(own)
        before = {n: p.detach().clone() for n, p in own.named_parameters()}
        callback = SketchCallback(0.25, every=100, seed=3)
        run(own, tmp_path, callback, optimizer=optimizer(own))
        inside, outside = [], []
        for name, index in callback._draw(own, 0).items():
            for suffix in ("lora_A.default.weight", "lora_B.default.weight"):
                key = f"{name}.{suffix}"
                change = own.get_parameter(key).detach() - before[key]
                rows = change if "lora_A" in suffix else change.t()
                rest = torch.ones(RANK, dtype=torch.bool)
                rest[index] = False
                inside.append(rows[~rest].abs().amax(1))
                outside.append(rows[rest].abs().amax(1))
        return torch.cat(inside), torch.cat(outside)

    inside, outside = moved(lambda m: fslora_kernels.SketchedAdamW(m, lr=1e-2, weight_decay=0.1))
    assert inside.min() > 1e-3
    assert outside.eq(0).all()
    inside, outside = moved(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1))
    assert inside.min() > 1e-3
    assert outside.min() > 0


@pytest.mark.parametrize("sketched", [False, True])
def test_evaluation_uses_the_whole_adapter_unless_asked(model, sketched, tmp_path):
    callback = SketchCallback(0.25, evaluate_sketched=sketched)
    watch = run(model, tmp_path, callback, eval_strategy="steps", eval_steps=2)
    evaluated = {ranks is not None for _, training, ranks in watch.calls if not training}
    assert evaluated == {sketched}
    assert all(ranks for _, training, ranks in watch.calls if training)
    assert not any(
        layer.restrictions for layer in model.modules() if isinstance(layer, SketchedLoRALinear)
    ), "the sketch is gone after training"


@pytest.mark.parametrize("optimizer", ["adamw", "sketched_adamw"])
def test_a_resumed_run_goes_on_with_the_same_sets_to_the_same_factors(model, optimizer, tmp_path):
    def start():
        own = copy.deepcopy(model)
        if optimizer == "adamw":
            return own, None
        fslora_kernels.fuse(own)
        return own, fslora_kernels.SketchedAdamW(own, lr=1e-2)

    settings = {"save_strategy": "steps", "save_steps": 3}
    settings["callback"] = SketchCallback(random_ratio((0.125, 0.25, 0.5)), every=2)
    whole, own = start()
    want = run(whole, tmp_path, optimizer=own, **settings).sets()
    resumed, own = start()
    settings["resume"] = str(tmp_path / "checkpoint-3")
    got = run(resumed, tmp_path, optimizer=own, **settings).sets()
    assert got == {step: want[step] for step in (3, 4, 5)}
    for parameter, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_the_saved_adapter_is_the_whole_one_for_vanilla_peft(model, tmp_path):
    vanilla = copy.deepcopy(model).unload()
    trained = trainer(model, tmp_path, SketchCallback(0.25))
    trained.train()
    trained.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(vanilla, tmp_path / "adapter").eval()
    ids = tokens(model)
    got, want = (m(input_ids=ids).logits for m in (loaded, model.eval()))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_sketch_of_all_ranks_is_plain_training(model, tmp_path):
    vanilla = trainer(copy.deepcopy(model), tmp_path)
    sketched = trainer(model, tmp_path, SketchCallback(1.0))
    curves = []
    for each in (vanilla, sketched):
        each.train()
        curves.append([row["loss"] for row in each.state.log_history if "loss" in row])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_the_schedules():
    schedule = linear_ratio(1.0, 0.25, steps=3)
    assert [schedule(step) for step in range(5)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.25])
    ratios = (0.125, 0.25, 0.5)
    schedule = random_ratio(ratios, seed=1)
    drawn = [schedule(step) for step in range(300)]
    assert all(70 < drawn.count(ratio) < 130 for ratio in ratios)
    assert drawn == [random_ratio(ratios, seed=1)(step) for step in range(300)]
    assert drawn != [random_ratio(ratios, seed=2)(step) for step in range(300)]


def test_a_schedule_is_asked_at_the_step_of_the_draw(model, tmp_path):
    callback = SketchCallback(linear_ratio(1.0, 0.25, steps=3), every=2)
    sets = run(model, tmp_path, callback).sets()
    assert [len(sets[step] or range(RANK)) for step in range(6)] == [8, 8, 4, 4, 2, 2]


def test_only_the_named_adapter_is_sketched(model, tmp_path):
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    callback = SketchCallback(0.5, adapter_name="default")
    model.base_model.set_adapter(["default", "second"])
    sets = run(model, tmp_path, callback).sets()
    assert {len(ranks) for ranks in sets.values()} == {4}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: SketchCallback(0.0), r"in \(0, 1\]"),
        (lambda: SketchCallback(0.5, every=0), "at least one step"),
        (lambda: linear_ratio(0.5, 1.5, 3), r"in \(0, 1\]"),
        (lambda: linear_ratio(1.0, 0.5, 0), "at least 1 step"),
        (lambda: random_ratio(()), "no ratio"),
        (lambda: SketchCallback().on_train_begin(model=nn.Linear(2, 2)), "no LoRA layer"),
    ],
)
def test_bad_settings_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_a_model_of_which_nothing_can_be_sketched_is_refused():
    config = LoraConfig(target_modules=["0"], use_dora=True)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), config)
    with pytest.raises(ValueError, match="DoraLinearVariant"):
        SketchCallback().on_train_begin(model=model)


def test_layers_that_are_left_are_named(caplog):
    layers = nn.Sequential(nn.Linear(6, 4), nn.Embedding(4, 3))
    model = get_peft_model(layers, LoraConfig(target_modules=["0", "1"]))
    SketchCallback().on_train_begin(model=model)
    assert "base_model.model.1" in caplog.text


def step_of(callback, model, step):
    callback.on_step_begin(None, TrainerState(global_step=step), None, model=model)


def layers_of(model):
    return list(fused_layers(model).values())


def test_layers_that_a_later_adapter_adds_are_sketched_too():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), config("0"))
    fslora_kernels.fuse(model, "torch")
    model.add_adapter("later", config("0", "1"))
    callback = SketchCallback(0.25, adapter_name="later", implementation="triton")
    callback.on_train_begin(model=model)
    step_of(callback, model, 0)
    assert [len(layer.restrictions["later"].index) for layer in layers_of(model)] == [2, 2]
    assert {layer.implementation for layer in layers_of(model)} == {"torch"}


@pytest.mark.parametrize("evaluate_sketched", [False, True])
def test_what_an_earlier_run_left_set_is_cleared_before_training(evaluate_sketched):
    """Also for an evaluation at its start."""
    base = nn.Sequential(nn.Linear(6, 4))
    model = fslora_kernels.get_sketched_peft_model(base, config("0"), ratio=0.5)
    assert layers_of(model)[0].restrictions
    SketchCallback(evaluate_sketched=evaluate_sketched).on_train_begin(model=model)
    assert not layers_of(model)[0].restrictions


def test_a_sketch_is_kept_as_it_is_until_the_next_is_due():
    """On a GPU each new one is a copy to the device."""
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), config("0"))
    callback = SketchCallback(0.25, every=2)
    callback.on_train_begin(model=model)
    found = []
    for step in range(3):
        step_of(callback, model, step)
        found.append(layers_of(model)[0].restrictions["default"].index)
        callback.on_step_end(model=model)
        assert not layers_of(model)[0].restrictions
    assert found[0] is found[1]
    assert found[2] is not found[0]


def test_the_other_adapters_keep_what_is_set_on_them():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), config("0"))
    model.add_adapter("own", config("0"))
    callback = SketchCallback(0.25, adapter_name="default")
    callback.on_train_begin(model=model)
    (name,) = fslora_kernels.modules(model)
    fslora_kernels.sketch(model, {name: torch.tensor([1])}, adapter_name="own")
    step_of(callback, model, 0)
    assert set(layers_of(model)[0].restrictions) == {"default", "own"}
    callback.on_step_end(model=model)
    callback.on_train_end(model=model)
    assert set(layers_of(model)[0].restrictions) == {"own"}


def test_an_initialisation_that_needs_all_ranks_is_named(caplog):
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 16)), config("0", init_lora_weights="orthogonal")
    )
    SketchCallback().on_train_begin(model=model)
    assert "orthogonal" in caplog.text
