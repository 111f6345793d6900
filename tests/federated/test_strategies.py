from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fslora.strategies
from fslora import checkpoint
from fslora.config import SimulateConfig
from fslora.data.tasks import Examples, pooled
from fslora.engines import sequential
from fslora.evaluation import evaluate
from fslora.models import take_state
from fslora.prepare import make_strategy, prepare
from fslora.protocol import POOLED, LocalRule
from fslora.report import write_report
from fslora.server import run_round
from fslora.simulate import Watcher, simulate
from fslora.strategies import STRATEGIES, head_only

from .worlds import CLIENTS, assert_same_bits, world


def test_every_strategy_file_is_listed_and_offered():
    folder = Path(fslora.strategies.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {factory.__module__.rsplit(".", 1)[-1] for factory in STRATEGIES.values()} == files
    assert all(factory.__name__ == name.replace("-", "_") for name, factory in STRATEGIES.items())
    assert set(get_args(get_type_hints(SimulateConfig)["strategy"])) == set(STRATEGIES)


def test_the_aggregate_of_a_permuted_cohort_is_the_same_mean(tiny_llama):
    _, strategy, state, client = world(tiny_llama, (0.5, 0.25, 0.5, 1.0))
    one, _ = run_round(state, strategy, sequential, client, CLIENTS)
    other, _ = run_round(state, strategy, sequential, client, CLIENTS[::-1])
    for name, pair in one.adapters.items():
        torch.testing.assert_close(pair.lora_a, other.adapters[name].lora_a)


def test_a_single_client_moves_the_server_to_itself(tiny_llama):
    _, strategy, state, client = world(tiny_llama, (1.0,) * 4)
    (task,) = strategy.assign(state, ["two"])
    update = client(task)
    new = strategy.aggregate(state, [task], [update])
    for name, pair in new.adapters.items():
        expected = state.adapters[name].lora_b + update.delta[name].lora_b
        torch.testing.assert_close(pair.lora_b, expected)


def test_head_only_trains_and_ships_the_head_alone(settings, tiny_bert):
    config = SimulateConfig(
        **{
            **settings,
            "model": str(tiny_bert),
            "task": "classification",
            "partition": "iid",
            "strategy": "head-only",
        }
    )
    summary = simulate(config)
    state = checkpoint.load_state(Path(config.out))
    rows = checkpoint.read_records(Path(config.out))
    assert all(pair.lora_b.eq(0).all() for pair in state.adapters.values())
    assert rows[-1]["adapter_bytes_up"] == 0 < rows[-1]["head_bytes_up"]
    assert rows[-1]["eval_loss"] != rows[0]["eval_loss"]
    assert summary["bytes_up"] < summary["full_rank_bytes_up"]
    assert "head-only" in write_report(Path(config.out)).read_text()


def test_head_only_without_a_head_is_refused():
    with pytest.raises(ValueError, match="needs a head"):
        head_only({}, LocalRule()).init({}, {}, 0)


def run(settings, name, tmp_path, **changes):
    config = SimulateConfig(
        **{**settings, "strategy": name, "out": str(tmp_path / name), "rslora": True, **changes}
    )
    return config, simulate(config)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "head-only"])
def test_every_strategy_runs_and_is_reported(settings, tmp_path, name):
    config, summary = run(settings, name, tmp_path, rounds=3, lr=5e-2, eval_every=2)
    rows = checkpoint.read_records(Path(config.out))
    sent, learns = summary["bytes_up"] > 0, rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert sent == (name not in ("zero-shot", "centralised", "local-only"))
    assert learns == (name != "zero-shot")
    assert (rows[-1]["eval_loss_sketched"] is not None) == (name == "fslora")
    assert rows[-1]["eval_loss_by_ratio"]
    assert name in write_report(Path(config.out)).read_text()


@pytest.mark.parametrize("name", ["flora", "local-only", "rolora"])
def test_a_resumed_run_remembers_residuals_and_clients(settings, tmp_path, name):
    class StopError(Exception):
        pass

    def stop(_):
        raise StopError

    whole, _ = run(settings, name, tmp_path, rounds=3)
    part = replace(whole, out=str(tmp_path / "part"))
    with pytest.raises(StopError):
        simulate(part, Watcher(on_round=stop))
    assert checkpoint.load_state(tmp_path / "part").round == 1
    simulate(replace(part, resume=True))
    one, other = (checkpoint.load_state(tmp_path / folder) for folder in ("part", name))
    assert (one.round, one.key) == (other.round, other.key)
    assert one.base_residual or one.client_state
    assert_same_bits(one, other)
    records = [
        [{**row, "wall_seconds": 0} for row in checkpoint.read_records(tmp_path / folder)]
        for folder in ("part", name)
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_the_adapter_folder_holds_what_the_base_gained(settings, tmp_path, name, rslora):
    """Plain PEFT on the untouched base gives the loss of the run."""
    config, summary = run(settings, name, tmp_path, lr=5e-2, rslora=rslora)
    folder = Path(config.out) / "adapter"
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(config.model), str(folder)
    )
    prepared = prepare(config)
    found = prepared.task.evaluate(model, prepared.data.evaluation, 4)
    assert found.loss == pytest.approx(summary["eval_loss_after"], rel=1e-5)
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 1e-3


def test_centralised_takes_the_steps_of_a_cohort_on_everybodys_data(settings, tmp_path):
    config, _ = run(settings, "centralised", tmp_path)
    prepared = prepare(config)
    total = sum(len(examples) for examples in prepared.data.clients)
    (entry,) = checkpoint.read_records(Path(config.out))[-1]["clients"]
    assert (entry["id"], entry["examples"]) == (POOLED, total)
    state = prepared.strategy.init(*take_state(prepared.model), 0)
    (task,) = prepared.strategy.assign(state, prepared.data.names[:2])
    assert task.local.steps == 2 * config.local_steps
    chosen = replace(config, devices="gpu:5g", over_select=2.0)  # 6, and the first 3 answers count
    (task,) = make_strategy(chosen, {}).assign(state, prepared.data.names)
    assert task.local.steps == 3 * config.local_steps


def test_pooled_examples_are_padded_to_the_longest():
    def examples(*lengths):
        width = max(lengths)
        mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
        ids = 7 * mask
        labels = torch.where(mask == 1, ids, -100)
        return Examples({"input_ids": ids, "attention_mask": mask, "labels": labels})

    both = pooled([examples(2, 3), examples(5)], 9)
    assert both.tensors["input_ids"][0].tolist() == [7, 7, 0, 9, 9]
    assert both.tensors["attention_mask"].sum(dim=1).tolist() == [2, 3, 5]
    assert both.tensors["labels"].eq(-100).sum(dim=1).tolist() == [3, 2, 0]
    classes = [Examples({**examples(n).tensors, "labels": torch.tensor([n])}) for n in (2, 4)]
    assert pooled(classes, 9).tensors["labels"].tolist() == [2, 4]


def test_local_only_is_judged_by_the_mean_of_its_clients(settings, tmp_path):
    config, summary = run(settings, "local-only", tmp_path, per_round=6, rounds=1, lr=5e-2)
    prepared = prepare(config)
    state = checkpoint.load_state(Path(config.out))
    models = prepared.strategy.evaluated(state)
    losses = [
        evaluate(prepared.model, model, prepared.task, prepared.data.evaluation, 8).loss
        for model in models
    ]
    assert len(set(losses)) == len(losses) == 6, "each has a model of its own"
    assert summary["eval_loss_after"] == pytest.approx(sum(losses) / 6, rel=1e-6)
    assert all(pair.lora_b.eq(0).all() for pair in state.adapters.values()), "nothing is averaged"


def test_local_only_is_judged_at_the_end_alone(settings, tmp_path):
    config, _ = run(settings, "local-only", tmp_path, per_round=1, rounds=3)
    rows = checkpoint.read_records(Path(config.out))
    assert [row["round"] for row in rows if row["eval_loss"] is not None] == [0, 3]


def test_local_only_leaves_no_adapter_wherever_it_stops(settings, tmp_path):
    config = SimulateConfig(**settings, strategy="local-only")

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # in round 1, when all have the initial model
        simulate(config, Watcher(on_client=stop))
    assert checkpoint.load_state(tmp_path / "run").round == 0
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("name", ["flora", "hetlora", "local-only", "centralised", "ffa-lora"])
def test_heads_are_trained_with_every_kind_of_strategy(settings, tiny_bert, tmp_path, name):
    changes = {"model": str(tiny_bert), "task": "classification", "partition": "iid"}
    config, _ = run(settings, name, tmp_path, rounds=1, **changes)
    run_state = checkpoint.load_state(Path(config.out))
    prepared = prepare(config)
    _, fresh = take_state(prepared.model)
    (state, *_) = prepared.strategy.evaluated(run_state)
    assert all(not torch.equal(tensor, fresh[n]) for n, tensor in state.extras.items())
