"""A run that was stopped goes on in the same bits, and only with what it began with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from fslora import checkpoint
from fslora.config import SimulateConfig
from fslora.simulate import Watcher, simulate
from tests.federated.folders import outcome


@pytest.mark.parametrize("server", ["fedavg", "fedadam"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(settings, tmp_path, server):
    whole = SimulateConfig(**{**settings, "rounds": 3, "server_opt": server, "server_lr": 0.1})
    whole = replace(whole, clip_norm=0.05)  # the norm's bits depend on the order of the modules
    simulate(replace(whole, out=str(tmp_path / "whole")))

    class StopError(Exception):
        pass

    def stop(_):
        raise StopError

    part = replace(whole, out=str(tmp_path / "part"))
    with pytest.raises(StopError):
        simulate(part, Watcher(on_round=stop))
    checkpoint.append_record(tmp_path / "part", {"round": 2, "half": "written before a crash"})
    simulate(replace(part, resume=True))
    assert outcome(tmp_path / "part") == outcome(tmp_path / "whole")


def test_kill_9_and_resume_give_the_same_bits(settings, tmp_path):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if k != "out"]
    flags += ["--rounds=12"]
    command = [sys.executable, "-m", "fslora", "simulate", *flags]
    part, whole = tmp_path / "part", tmp_path / "whole"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, f"--out={part}"], env=environment, stdout=subprocess.DEVNULL
    ) as process:
        for _ in range(1200):
            if len(checkpoint.read_records(part)) > 3:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert 3 < len(checkpoint.read_records(part)) < 13, "killed in the middle"
    config = SimulateConfig(**{**settings, "rounds": 12})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        simulate(replace(config, out=str(part), resume=True))
        simulate(replace(config, out=str(whole)))
    finally:
        torch.set_num_threads(threads)
    assert outcome(part) == outcome(whole)


def test_more_rounds_can_be_added(settings, tmp_path):
    config = SimulateConfig(**settings)
    simulate(config)
    simulate(replace(config, rounds=3, resume=True))
    simulate(replace(config, rounds=3, out=str(tmp_path / "whole")))
    assert outcome(config.out)[1] == outcome(tmp_path / "whole")[1]


def test_an_extended_run_that_is_stopped_has_no_summary_of_its_earlier_end(settings):
    config = SimulateConfig(**settings)
    simulate(config)
    folder = Path(config.out)
    (folder / "report.html").write_text("of two rounds")
    simulate(replace(config, resume=True))
    assert (folder / "report.html").read_text() == "of two rounds", "nothing was added"

    class StopError(Exception):
        pass

    def stop(_):
        raise StopError

    with pytest.raises(StopError):
        simulate(replace(config, resume=True, rounds=9), Watcher(on_round=stop))
    assert checkpoint.rounds_done(folder) == 3
    assert not (folder / "summary.json").exists()
    assert not (folder / "report.html").exists()


def test_a_run_whose_checkpoint_is_damaged_keeps_what_it_has(settings):
    config = SimulateConfig(**settings)
    simulate(config)
    folder = Path(config.out)
    for name in (checkpoint.STATE_FILE, checkpoint.PREVIOUS_FILE):
        (folder / name).write_bytes(b"torn")
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    with pytest.raises(ValueError, match="cannot be read"):
        simulate(replace(config, resume=True, rounds=3))
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before


def test_a_folder_is_never_overwritten_nor_continued_otherwise(settings):
    config = SimulateConfig(**settings)
    with pytest.raises(ValueError, match="no run to resume"):
        simulate(replace(config, resume=True))
    simulate(config)
    before = outcome(config.out)
    with pytest.raises(ValueError, match="already holds a run; go on with it by --resume"):
        simulate(config)
    with pytest.raises(ValueError, match=r"settings, --lr 0.5 \(was 0.01\); choose a new --out"):
        simulate(replace(config, lr=0.5))
    with pytest.raises(ValueError, match=r"--lr 0.5 \(was 0.01\)"):
        simulate(replace(config, resume=True, lr=0.5))
    with pytest.raises(ValueError, match="has 2 rounds, and 1 are asked for"):
        simulate(replace(config, resume=True, rounds=1))
    assert outcome(config.out) == before


def test_what_a_run_would_replace_is_kept_where_nothing_says_whose_it_is(settings):
    config = SimulateConfig(**settings)
    adapter = Path(config.out) / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "of_another_program").write_text("")
    with pytest.raises(ValueError, match=r"has adapter and no config.json .* another --out"):
        simulate(config)
    assert [path.name for path in adapter.iterdir()] == ["of_another_program"]
    shutil.rmtree(config.out)
    simulate(config)
    before = outcome(config.out)
    (Path(config.out) / "config.json").unlink()
    for again in (config, replace(config, resume=True), replace(config, seed=1)):
        with pytest.raises(ValueError, match=r"has rounds.jsonl and checkpoint and adapter"):
            simulate(again)
    assert outcome(config.out) == before


def test_a_run_does_not_go_on_with_other_data(settings, tmp_path):
    texts = tmp_path / "texts.jsonl"
    lines = Path(settings["data"]).read_text().splitlines(keepends=True)
    texts.write_text("".join(lines))
    config = SimulateConfig(**{**settings, "data": str(texts)})
    simulate(config)
    before = outcome(config.out)
    texts.write_text("".join(lines[:40] + lines[50:] + lines[40:50]).replace("author 2", "Ann"))
    with pytest.raises(ValueError, match=r"files \(clients and evaluation\): put those"):
        simulate(replace(config, resume=True, rounds=3))
    assert outcome(config.out) == before
    assert json.loads((Path(config.out) / "config.json").read_text())["rounds"] == 2
    records_file = Path(config.out) / checkpoint.RECORDS_FILE
    old = records_file.read_text().replace('"source"', '"of an older version"')
    records_file.write_text(old)
    simulate(replace(config, resume=True, rounds=3))


def test_a_run_goes_on_with_files_that_were_moved_and_with_no_others(settings, tmp_path):
    config = SimulateConfig(**settings)
    simulate(replace(config, out=str(tmp_path / "whole"), rounds=3))
    simulate(config)
    data = shutil.copy(settings["data"], tmp_path / "moved.jsonl")
    model = shutil.copytree(settings["model"], tmp_path / "moved")
    (model / ".of_a_file_manager").touch()
    (model / "README.md").touch()
    moved = replace(config, resume=True, rounds=3, data=str(data), model=str(model))
    weights = model / "model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    for here in (moved, replace(moved, data=config.data)):
        with pytest.raises(ValueError, match=r"other files \(model\): put those"):
            simulate(here)
    weights.write_bytes(right)
    simulate(moved)
    assert outcome(config.out)[1] == outcome(tmp_path / "whole")[1]
    saved = json.loads((Path(config.out) / "config.json").read_text())
    assert (saved["data"], saved["model"]) == (str(data), str(model))


@pytest.mark.parametrize("name", ["data", "model"])
def test_moved_files_whose_content_is_not_on_record_are_refused(settings, name):
    config = SimulateConfig(**settings)
    simulate(config)
    file = Path(config.out) / checkpoint.RECORDS_FILE
    part = {"data": '"clients": "', "model": '"model": "'}[name]
    file.write_text(file.read_text().replace(part, '"of an older version": "'))
    moved = replace(config, resume=True, rounds=3, **{name: "elsewhere"})
    with pytest.raises(ValueError, match=f"was started otherwise: --{name} elsewhere"):
        simulate(moved)
    shutil.rmtree(Path(config.out) / "checkpoint")
    file.unlink()
    with pytest.raises(ValueError, match=f"was started otherwise: --{name} elsewhere"):
        simulate(moved)


def test_a_resumed_run_reads_its_checkpoint_once(settings):
    simulate(SimulateConfig(**settings))
    with patch.object(checkpoint, "_read", wraps=checkpoint._read) as read:
        simulate(SimulateConfig(**{**settings, "rounds": 3}, resume=True))
    assert read.call_count == 1
