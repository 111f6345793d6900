import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fslora import checkpoint, evaluation, server
from fslora.config import SimulateConfig
from fslora.models import take_state
from fslora.prepare import prepare
from fslora.server import DivergedError, NoUsableUpdateError
from fslora.simulate import Watcher, simulate
from tests.federated.folders import outcome, records


def test_a_run_leaves_what_the_readme_says(settings):
    config = SimulateConfig(**settings)
    seen = []
    summary = simulate(
        config,
        Watcher(
            on_start=lambda *done: seen.append(done),
            on_round=lambda record: seen.append(record.round),
            on_judging=lambda: seen.append("judging"),
        ),
    )
    folder = Path(config.out)
    assert sorted(os.listdir(folder)) == [
        ".lock",
        ".lock.owner",
        "adapter",
        "checkpoint",
        "config.json",
        "rounds.jsonl",
        "summary.json",
    ]
    assert seen == ["judging", (0, 0), 1, 2]
    rows = records(folder)
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert rows[0]["clients"] == []
    for row in rows[1:]:
        assert {"round", "train_loss", "eval_loss", "eval_metric", "eval_loss_sketched"} <= set(row)
        assert len(row["clients"]) == 3
        assert {"id", "ratio", "bytes_up", "bytes_down", "examples", "loss"} <= set(
            row["clients"][0]
        )
        assert row["bytes_up"] == row["bytes_down"] == sum(c["bytes_up"] for c in row["clients"])
    assert rows[2]["eval_loss"] < rows[0]["eval_loss"], "it learns"
    assert summary == json.loads((folder / "summary.json").read_text())
    assert sum(row["clients"] for row in summary["classes"]) == 6
    for row in summary["classes"]:
        if row["participations"]:
            assert row["share_of_full_rank"] == row["ratio"]
    assert summary["bytes_up"] == sum(row["bytes_up"] for row in summary["classes"])
    assert (summary["data"]["clients"], summary["data"]["judged_on"]) == (6, 6)
    assert summary["implementation"] == "torch", "what auto takes on a CPU"
    seconds = sum(row["wall_seconds"] for row in checkpoint.read_records(folder))
    watcher = Watcher(lambda *done: seen.append(done), on_judging=lambda: seen.append("judging"))
    again = simulate(replace(config, resume=True), watcher)
    assert seen[4:] == [(2, summary["bytes_up"] + summary["bytes_down"])]
    assert again["wall_seconds"] == summary["wall_seconds"] == seconds > 0


@pytest.mark.filterwarnings("ignore:--depth top")
def test_full_rank_is_every_layer_and_as_many_clients(settings, tmp_path):
    summaries = [
        simulate(SimulateConfig(**{**settings, **changes, "rounds": 1, "out": str(tmp_path / out)}))
        for out, changes in {
            "fedit": {"strategy": "fedit"},
            "top": {"depth": "top:1"},
            "centralised": {"strategy": "centralised"},
        }.items()
    ]
    full = [row["full_rank_bytes_up"] + row["full_rank_bytes_down"] for row in summaries]
    assert full[0] == full[1] == full[2] == summaries[0]["bytes_up"] + summaries[0]["bytes_down"]
    asked = [row for row in summaries[1]["classes"] if row["participations"]]
    assert asked
    for row in asked:
        assert row["share_of_full_rank"] == pytest.approx(row["ratio"] / 2), "one layer of two"


def test_the_adapter_is_the_global_state_in_peft_format(settings):
    config = SimulateConfig(**settings)
    simulate(config)
    state = checkpoint.load_state(Path(config.out))
    base = AutoModelForCausalLM.from_pretrained(config.model)
    loaded = PeftModel.from_pretrained(base, Path(config.out) / "adapter")
    weights = dict(loaded.named_parameters())
    for name, pair in state.adapters.items():
        assert torch.equal(weights[f"{name}.lora_A.default.weight"], pair.lora_a)
        assert torch.equal(weights[f"{name}.lora_B.default.weight"], pair.lora_b.t())
    run = prepare(config)
    ours = run.task.evaluate(loaded, run.data.evaluation, 4)
    assert ours.loss == pytest.approx(records(config.out)[-1]["eval_loss"], rel=1e-5)


def test_same_seed_same_bits_other_seed_others(settings, tmp_path):
    outcomes = []
    for number, seed in enumerate((5, 5, 6)):
        simulate(SimulateConfig(**{**settings, "seed": seed, "out": str(tmp_path / str(number))}))
        outcomes.append(outcome(tmp_path / str(number)))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] != outcomes[2][1]


def test_a_run_that_cannot_be_loaded_leaves_no_folder_of_its_own(settings):
    config = SimulateConfig(**{**settings, "text_column": "words"})
    with pytest.raises(ValueError, match="no column 'words'"):
        simulate(config)
    assert not Path(config.out).exists()
    Path(config.out).mkdir()
    with pytest.raises(ValueError, match="no column 'words'"):
        simulate(config)
    assert Path(config.out).is_dir(), "it was there before"
    simulate(SimulateConfig(**{**settings, "rounds": 1}))


def test_a_hopeless_round_stops_the_run_and_keeps_what_was_done(settings):
    config = SimulateConfig(**{**settings, "rounds": 3})
    calls = []

    def fail_later(record):
        calls.append(record)
        if len(calls) == 1:
            poison["on"] = True

    poison = {"on": False}
    right = server.rejection
    try:
        server.rejection = lambda *given: "poisoned" if poison["on"] else right(*given)
        with pytest.raises(NoUsableUpdateError, match="round 2: no client's update"):
            simulate(config, Watcher(on_round=fail_later))
    finally:
        server.rejection = right
    assert [row["round"] for row in records(config.out)] == [0, 1]
    assert (Path(config.out) / "adapter/adapter_model.safetensors").is_file()
    simulate(replace(config, resume=True))
    assert [row["round"] for row in records(config.out)] == [0, 1, 2, 3]


def test_a_run_that_diverges_says_so_and_keeps_what_was_done(settings):
    config = SimulateConfig(**{**settings, "server_lr": 1e30})
    with pytest.raises(DivergedError, match=r"round 1: the evaluation loss is .* lower --lr"):
        simulate(config)
    assert [row["round"] for row in records(config.out)] == [0]
    assert (Path(config.out) / "adapter/adapter_model.safetensors").is_file()


def test_a_model_without_a_loss_is_not_blamed_on_the_training(settings, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(settings["model"])
    broken.lm_head.weight.data[5] = torch.nan
    folder = shutil.copytree(settings["model"], tmp_path / "broken")
    broken.save_pretrained(folder)
    with pytest.raises(DivergedError, match="nothing was trained yet: use --dtype float32"):
        simulate(SimulateConfig(**{**settings, "model": str(folder)}))


def test_an_error_of_the_evaluation_is_not_taken_for_one_of_the_run_folder(settings, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(evaluation, "evaluate_mean", fail)
    with pytest.raises(OSError, match="Input/output error"):
        simulate(SimulateConfig(**settings))
    monkeypatch.undo()
    simulate(SimulateConfig(**settings, resume=True))


def test_threads_are_the_callers_again_after_a_run(settings):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        simulate(SimulateConfig(**{**settings, "threads": 1, "rounds": 1}))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("strategy", "ranks"), [("fedit", 8), ("fedit-min", 1)])
def test_classes_are_of_clients_whatever_they_train(settings, strategy, ranks):
    config = SimulateConfig(**{**settings, "strategy": strategy})
    summary = simulate(config)
    taken = [row for row in summary["classes"] if row["participations"]]
    assert taken
    assert {row["sketch_size"] for row in taken} == {ranks}
    assert sum(row["bytes_up"] for row in summary["classes"]) == summary["bytes_up"] > 0


def test_classification_trains_and_ships_the_head(settings, tiny_bert, tmp_path):
    config = SimulateConfig(
        **{
            **settings,
            "model": str(tiny_bert),
            "task": "classification",
            "partition": "dirichlet:0.5",
            "target_modules": "query,value",
            "metric": "f1",
        }
    )
    summary = simulate(config)
    state = checkpoint.load_state(Path(config.out))
    assert any("classifier" in name for name in state.extras)
    head = sum(tensor.nbytes for tensor in state.extras.values())
    last = records(config.out)[-1]
    assert last["head_bytes_up"] == last["head_bytes_down"] == 3 * head
    assert last["adapter_bytes_up"] + last["head_bytes_up"] == last["bytes_up"]
    assert 0 <= summary["eval_metric_after"] <= 1
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    loaded = PeftModel.from_pretrained(base, Path(config.out) / "adapter")
    shipped = {n: p for n, p in loaded.named_parameters() if "modules_to_save" in n}
    for name, tensor in state.extras.items():
        assert torch.equal(shipped[name], tensor)


def test_heads_are_float32_on_a_half_precision_base(settings, tiny_bert):
    config = SimulateConfig(
        **{**settings, "model": str(tiny_bert), "task": "classification", "dtype": "bfloat16"},
        target_modules="query,value",
    )
    before = take_state(prepare(config).model)[1]
    simulate(config)
    after = checkpoint.load_state(Path(config.out)).extras
    for name, tensor in after.items():
        assert before[name].dtype == tensor.dtype == torch.float32
        assert not torch.equal(tensor, before[name])
        assert not torch.equal(tensor, tensor.bfloat16().float()), "no rounded steps"


def test_what_a_model_cannot_do_is_refused_when_it_is_loaded(settings, tiny_bert):
    encoder = {"model": str(tiny_bert), "target_modules": "query,value"}
    with pytest.raises(ValueError, match=r"sees the tokens .* --task classification"):
        simulate(SimulateConfig(**{**settings, **encoder}))
    with pytest.raises(ValueError, match=r"--max-length 4096 is more than the .* lower it"):
        simulate(SimulateConfig(**{**settings, "max_length": 4096}))


def test_instruction_runs(settings, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(
            json.dumps({"instruction": f"{n} plus {n}", "response": str(2 * n)}) + "\n"
            for n in range(40)
        )
    )
    config = SimulateConfig(
        **{**settings, "data": str(path), "task": "instruction", "partition": "iid"}
    )
    simulate(config)
    assert records(config.out)[-1]["eval_loss"] < records(config.out)[0]["eval_loss"]
