"""The trainers that people use: accelerate's loop, Hugging Face's Trainer, TRL's SFTTrainer."""

import gzip

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import AutoTokenizer, Trainer, TrainingArguments

from tests.kernels.models import llama, tokens

from .steps import flat, is_fused, pair, trainable

pytestmark = [
    # transformers 5.23 renames what every version before it has.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.*deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _no_accelerator_of_before():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Rows(torch.utils.data.Dataset):
    """Blocks of token ids."""

    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, k):
        return {"input_ids": self.ids[k], "labels": self.ids[k]}


@pytest.fixture
def models(shared_data):
    return pair(llama(shared_data).train())


SETTINGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def trainer_of(model, folder, **settings):
    data = Rows(tokens(model, batch=32))
    return Trainer(model, TrainingArguments(str(folder), **SETTINGS | settings), train_dataset=data)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(models, precision):
    curves = []
    for model in models:
        accelerator = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        loader = torch.utils.data.DataLoader(Rows(tokens(model, batch=16)), batch_size=4)
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=5e-3)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        curve = []
        for batch in loader:
            with accelerator.accumulate(prepared):
                loss = prepared(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    vanilla, fused = curves
    assert is_fused(models[1])
    tolerance = 1e-5 if precision == "no" else 2e-3
    assert fused == pytest.approx(vanilla, rel=tolerance)
    assert vanilla[0] - vanilla[-1] > 0.1


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trainer(models, checkpointing, tmp_path):
    settings = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2}
    trainers = [trainer_of(model, tmp_path, **settings) for model in models]
    for trainer in trainers:
        trainer.train()
    vanilla, fused = trainers
    assert is_fused(fused.model)
    assert not is_fused(vanilla.model)
    assert losses(fused) == pytest.approx(losses(vanilla), rel=1e-4)
    evaluated = [t.evaluate(t.train_dataset)["eval_loss"] for t in trainers]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-4)


def test_trainer_resumes_what_vanilla_peft_began(models, shared_data, tmp_path):
    """A checkpoint of either is one of the other: adapter, optimizer and all."""
    vanilla, fused = models
    settings = {"save_strategy": "steps", "save_steps": 3}
    began, resumed = (trainer_of(model, tmp_path, **settings) for model in models)
    began.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert is_fused(resumed.model)
    assert losses(resumed) == pytest.approx(losses(began), rel=1e-4)
    got, want = (flat(trainable(model).values()) for model in (fused, vanilla))
    assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft_trainer(models, packing, shared_data, tmp_path):
    datasets = pytest.importorskip("datasets")  # these two take seconds to import
    trl = pytest.importorskip("trl")

    with gzip.open(shared_data / "tinystories/tiny_stories.txt.gz", "rt") as file:
        stories = file.read(20_000).split("\n\n")[:24]
    data = datasets.Dataset.from_dict({"text": stories})
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models/stories260K-hf")
    tokenizer.pad_token = tokenizer.eos_token
    curves = []
    for model in models:
        settings = trl.SFTConfig(
            str(tmp_path), max_length=64, packing=packing, bf16=False, **SETTINGS
        )
        trainer = trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        curves.append(losses(trainer))
    assert is_fused(models[1])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_the_saved_adapter_is_peft_s(models, tmp_path):
    trainer = trainer_of(models[1], tmp_path)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(models[0].unload(), tmp_path / "adapter")
    assert not is_fused(loaded)
    ids = tokens(loaded)
    torch.testing.assert_close(
        loaded(input_ids=ids).logits, models[1](input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )
