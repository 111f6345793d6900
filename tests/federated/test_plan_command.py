"""The costs that a plan goes by, the two commands, and a run of what was planned."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fslora import checkpoint
from fslora.__main__ import main
from fslora.client import LocalTrainer, download_bytes, upload_bytes
from fslora.clock import step_counter
from fslora.config import SimulateConfig
from fslora.devices import read_fleet
from fslora.models import take_state
from fslora.plan import command
from fslora.plan.bound import Effort, Fit
from fslora.plan.costs import count_costs, round_bytes
from fslora.plan.pilots import pilots_of
from fslora.plan.settings import PlanConfig, ProbeConfig
from fslora.prepare import make_strategy, prepare

from .test_cli import flags

FLEET = """
[[device]]
name = "far phone"
share = 0.5
flops_per_second = 1e6
memory_bytes = 1e9
down_bits_per_second = 1e4
up_bits_per_second = 1e3
rtt_seconds = 0.1
watts = 3.0

[[device]]
name = "server"
share = 0.5
flops_per_second = 1e9
memory_bytes = 1e9
down_bits_per_second = 1e9
up_bits_per_second = 1e9
rtt_seconds = 0.0
watts = 300.0
"""


@pytest.fixture
def asked(settings, tmp_path):
    """Settings of a plan that takes a few seconds."""
    fleet = tmp_path / "devices.toml"
    fleet.write_text(FLEET)
    more = {"devices": str(fleet), "targets": "loss:5.46", "rounds": 12, "lr": 3e-2}
    return {**settings, **more, "batch_size": 4, "out": str(tmp_path / "plan")}


@pytest.mark.parametrize("forward", ["sketched", "full"])
def test_two_counted_rounds_give_every_size(settings, forward):
    config = SimulateConfig(**settings, forward=forward)
    run = prepare(config)
    costs = count_costs(run)
    strategy = make_strategy(config, {"c": 1.0})
    state = strategy.init(*take_state(run.model), 0)
    trainer = LocalTrainer(run.model, run.task, {"c": run.data.clients[0]})
    flops = step_counter(trainer, run.data.evaluation)
    for size in (1, 2, 5, 8):
        (task,) = make_strategy(config, {"c": size / 8}).assign(state, ["c"])
        assert costs.flops(size) == pytest.approx(config.local_steps * flops(task))
        assert costs.down_bytes(size) == pytest.approx(sum(download_bytes(task)))
        assert costs.up_bytes(size) == pytest.approx(sum(upload_bytes(task)))
        assert costs.memory_bytes(size) == pytest.approx(round_bytes(trainer, task), rel=0.05)
    weights = sum(p.nbytes for n, p in run.model.named_parameters() if ".lora_" not in n)
    assert costs.weight_bytes == weights < costs.memory_bytes_of_one(1) < costs.memory_bytes(1)
    assert costs.layers == 2
    if forward == "sketched":  # the task's copy, the leaf, two moments, and their gradient in part
        assert costs.memory_bytes.each > 4.1 * costs.up_bytes.each


@pytest.mark.parametrize(("batch_size", "eval_examples"), [(4, 1), (64, 0)])
def test_memory_is_that_of_the_clients_batch_however_many_are_judged(
    settings, batch_size, eval_examples
):
    changes = {"batch_size": batch_size, "eval_examples": eval_examples}
    config = SimulateConfig(**{**settings, **changes})
    run = prepare(config)
    strategy = make_strategy(config, {"c": 1.0})
    (task,) = strategy.assign(strategy.init(*take_state(run.model), 0), ["c"])
    trainer = LocalTrainer(run.model, run.task, {"c": run.data.clients[0]})
    assert count_costs(run).memory_bytes(8) == pytest.approx(round_bytes(trainer, task), rel=0.02)


def test_memory_is_that_of_the_longest_text_that_any_client_has(settings, tmp_path):
    """It pads its batch, although none as long is among those that the model is judged by."""
    rows = tmp_path / "rows.jsonl"
    lengths = [4] * 59 + [40]
    texts = [
        {"instruction": "x", "response": "y" * n, "author": f"{i % 6}"}
        for i, n in enumerate(lengths)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    changes = {"data": str(rows), "task": "instruction", "max_length": 64, "batch_size": 8}
    run = prepare(SimulateConfig(**{**settings, **changes}))
    (own,) = (c for c in run.data.clients if c.tensors["attention_mask"].sum(dim=1).max() > 40)
    strategy = make_strategy(run.config, {"c": 1.0})
    (task,) = strategy.assign(strategy.init(*take_state(run.model), 0), ["c"])
    needed = round_bytes(LocalTrainer(run.model, run.task, {"c": own}), task)
    assert count_costs(run).memory_bytes(8) == pytest.approx(needed, rel=0.02)


def test_a_plan_is_made_kept_and_simulated(asked, tmp_path, capsys):
    given = flags(asked, pilot_ratios="1/8,1")
    assert main(["plan", *given]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "far phone" in shown
    assert "what keeps it from a larger sketch is the goal: a rank more costs +" in shown
    out = Path(asked["out"])
    plan = tomllib.loads((out / "plan.toml").read_text())
    ratio = {table["name"]: table["ratio"] for table in plan["devices"]}
    assert ratio["far phone"] < ratio["server"], "the slow line gets the smaller sketch"
    found = json.loads((out / "plan.json").read_text())
    assert found["planned"]["seconds"] <= found["best_uniform"]["seconds"]
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")
    first = (out / "plan.toml").read_text()
    pilots = {path: path.stat().st_mtime for path in out.glob("pilots/*/rounds.jsonl")}
    assert len(pilots) == 3
    assert main(["plan", *given]) == 0
    assert (out / "plan.toml").read_text() == first
    assert {path: path.stat().st_mtime for path in pilots} == pilots, "no pilot was repeated"
    assert main(["plan", *given, "--lr=1e-3"]) == 2, "the pilots are of another learning rate"
    assert "was started otherwise: --lr 0.001 (was 0.03)" in capsys.readouterr().err
    planned = tmp_path / "planned"
    assert main(["simulate", "--config", str(out / "plan.toml"), f"--out={planned}"]) == 0
    clients = [c for row in checkpoint.read_records(planned) for c in row["clients"]]
    assert {c["device"]: c["ratio"] for c in clients} == ratio
    for device in found["classes"]:
        own = [c for c in clients if c["device"] == device["device"]]
        for name in ("compute_seconds", "seconds"):
            wanted = [device[name]] * len(own)
            assert [client[f"sim_{name}"] for client in own] == pytest.approx(wanted)
        assert {client["bytes_up"] for client in own} == {device["bytes_up"]}
    resumed = ["simulate", "--config", str(out / "plan.toml"), f"--out={planned}", "--resume"]
    assert main(resumed) == 0


def test_a_plan_is_for_the_devices_that_it_began_with(asked, monkeypatch):
    def while_pilots_run(config, _):
        Path(asked["devices"]).write_text("")
        target = config.target.value
        levels = np.linspace(target + 0.1, target, 4)
        full = np.arange(1.0, 5)
        return Fit(Effort(0.5), (Effort(0.5),), levels, full, full[None], target + 0.2, 0.0)

    monkeypatch.setattr(command, "run_pilots", while_pilots_run)
    config = PlanConfig(run=SimulateConfig(**asked))
    plan = command.make_plan(config, Console(quiet=True))
    assert [device.name for device in plan.fleet.devices] == ["far phone", "server"]


def test_pilots_share_nothing_with_the_run(asked):
    config = PlanConfig(run=SimulateConfig(**asked), pilot_seeds=2)
    pilots = pilots_of(config)
    assert len(pilots) == 8
    assert len({pilot.seed for pilot in pilots}) == 2
    assert config.run.seed not in {pilot.seed for pilot in pilots}
    assert {pilot.devices for pilot in pilots} == {""}
    assert [pilot.ratios for pilot in pilots[:4]] == ["0.125", "0.25", "1.0", "0.125,1.0"]


def test_a_fleet_that_cannot_hold_the_base_is_refused_before_any_pilot(asked, capsys):
    path = Path(asked["devices"])
    path.write_text(FLEET.replace("memory_bytes = 1e9", "memory_bytes = 1e4", 1))
    assert main(["plan", *flags(asked)]) == 2
    error = capsys.readouterr().err
    assert "far phone: it has 10.0 kB of memory and its frozen base alone takes" in error
    assert "nearest change" in error
    assert "server" not in error
    assert not (Path(asked["out"]) / "pilots").exists()


BAD = {
    "devices": ({"devices": ""}, "name the devices to plan for"),
    "target": ({"targets": ""}, "name one target"),
    "targets": ({"targets": "0.5,0.6"}, "name one target"),
    "strategy": ({"strategy": "fedit"}, "the bound that plans are made by is FSLoRA's"),
    "redraw": ({"redraw": "step", "forward": "full"}, "counts rounds with --redraw round only"),
    "faults": ({"faults": "slow=0.5"}, "--faults slow=0.5: a plan counts rounds with --faults ''"),
    "ratios": ({"ratios": "1/2"}, "a plan chooses the ratios"),
    "above 1": ({"pilot_ratios": "2,1"}, "--pilot-ratios '2,1' are not numbers in (0, 1]"),
    "pilots": ({"pilot_ratios": "1/8,1/9"}, "1 different size of sketch"),
    "watts": ({"goal": "energy", "devices": "gpu:5g"}, "give gpu:5g its watts"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_plans_are_refused_by_their_flag(asked, what):
    changes, message = BAD[what]
    own = {name: value for name, value in changes.items() if name in ("pilot_ratios", "goal")}
    run = SimulateConfig(**{**asked, **{n: v for n, v in changes.items() if n not in own}})
    with pytest.raises(ValueError, match=re.escape(message)):
        PlanConfig(run=run, **own)


def test_a_target_that_is_reached_already_is_refused_after_one_pilot(asked, capsys):
    plan = {**asked, "targets": "loss:99"}
    assert main(["plan", *flags(plan)]) == 2
    assert "is reached before any training" in capsys.readouterr().err
    assert len(list((Path(asked["out"]) / "pilots").iterdir())) == 1


def test_a_score_that_the_task_has_not_is_refused_after_one_round(asked, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"instruction": f"{n}", "response": f"r{n}"}) + "\n" for n in range(60)]
    rows.write_text("".join(lines))
    free = {"task": "instruction", "data": rows, "partition": "iid", "eval_data": rows}
    plan = {**asked, **free, "eval_examples": 0, "targets": "0.5"}
    assert main(["plan", *flags(plan)]) == 2
    assert "name a loss, such as loss:2.5" in capsys.readouterr().err
    (pilot,) = (Path(asked["out"]) / "pilots").iterdir()
    assert [row["round"] for row in checkpoint.read_records(pilot)] == [0, 1]


def test_a_plan_takes_a_file_of_settings_and_flags_over_it(asked, tmp_path, capsys):
    path = tmp_path / "run.toml"
    lines = [
        f"{name} = {value!r}" for name, value in asked.items() if name not in ("devices", "out")
    ]
    path.write_text("\n".join([*lines, "rslora = true", "header = false"]))
    out = f"--out={tmp_path / 'plan'}"
    given = ["plan", f"--config={path}", f"--devices={asked['devices']}", "--deadline=1e-3", out]
    assert main(given) == 2
    assert "far phone: a round at S = 1 takes" in capsys.readouterr().err


def test_a_plan_takes_what_a_run_has_saved(asked, tmp_path, capsys):
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(SimulateConfig(**asked).to_json()))
    flags = [f"--config={saved}", f"--out={tmp_path / 'plan'}", "--deadline=1e-3"]
    assert main(["plan", *flags]) == 2
    assert "far phone: a round at S = 1 takes" in capsys.readouterr().err


def test_a_plan_that_could_not_be_written_is_refused_before_any_pilot(asked, tmp_path, capsys):
    pilots, file = tmp_path / "pilots", tmp_path / "file"
    file.write_text("")
    assert main(["plan", *flags({**asked, "out": file / "plan"}, pilots=pilots)]) == 2
    assert "cannot write to" in capsys.readouterr().err
    assert not pilots.exists()


@pytest.mark.parametrize(
    "bad",
    [{"share": 2.0}, {"rtt_ms": -1.0}, {"watts": -1.0}, {"up_mbit": float("inf")}, {"name": ""}],
)
def test_a_probe_checks_its_figures_before_it_measures(settings, bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}"):
        ProbeConfig(run=SimulateConfig(**settings), **bad)


@pytest.mark.parametrize("strategy", ["zero-shot", "centralised"])
def test_a_probe_needs_a_client_that_trains(settings, strategy):
    with pytest.raises(ValueError, match=f"--strategy {strategy}: no client trains"):
        ProbeConfig(run=SimulateConfig(**settings, strategy=strategy), name="laptop", share=0.5)


def test_a_probe_writes_a_device_that_a_fleet_takes(settings, tmp_path, capsys):
    table = tmp_path / "devices.toml"
    table.write_text("# by hand, without an end of line")
    probing = flags(settings, name="mine", table=table, seconds=0.01, up_mbit=5, share=0.5)
    assert main(["probe", *probing]) == 0
    assert "Gflop/s" in capsys.readouterr().out
    assert (
        main(["probe", *flags(settings, name="other", table=table, seconds=0.01, share=0.5)]) == 0
    )
    mine, other = read_fleet(str(table)).devices
    assert (mine.name, mine.share, mine.up_bits_per_second) == ("mine", 0.5, 5e6)
    assert 1e5 < mine.flops_per_second < 1e13
    assert 1e7 < mine.memory_bytes < 1e13
    assert main(["probe", *probing]) == 2
    assert "has a device mine already" in capsys.readouterr().err
    assert replace(other, name="mine").share == 0.5
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    for bad, message in (
        (folder, "Is a directory; name a file"),
        (tmp_path / "damaged.toml", "not valid TOML"),
        (tmp_path / "one.toml", "write one [[device]] table for each class"),
        (tmp_path / "devices.txt", "--devices reads files whose names end in .toml"),
        (table / "below.toml", "name a file that can be written"),
    ):
        if bad.name == "damaged.toml":
            bad.write_text("[[device]\n")
        if bad.name == "one.toml":
            bad.write_text("[device]\nname = 'x'\n")
        again = flags(settings, name="third", table=bad, seconds=0.01, share=0.5)
        assert main(["probe", *again]) == 2
        assert message in capsys.readouterr().err
