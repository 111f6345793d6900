"""``kill -9`` at 50 random moments of one run, resumed each time: the bits of the whole run."""

import multiprocessing
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fslora import checkpoint
from fslora.config import SimulateConfig
from fslora.simulate import simulate

from .test_simulate import outcome

KILLS, ROUNDS = 50, 300


def run(config):
    torch.set_num_threads(1)
    simulate(replace(config, resume=(Path(config.out) / "config.json").is_file()))


def started(context, config):
    process = context.Process(target=run, args=(config,))
    process.start()
    return process


def adapter(folder):
    return (Path(folder) / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_fifty_kills_end_in_the_bits_of_the_uninterrupted_run(settings, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fslora.simulate"])
    config = SimulateConfig(
        **{
            **settings,
            "rounds": ROUNDS,
            "strategy": "hetlora",
            "server_opt": "fedadam",
            "server_lr": 0.01,
            "devices": "phone:poor=0.5,laptop:median=0.5",
            "over_select": 2.0,
        }
    )
    whole = replace(config, out=str(tmp_path / "whole"))
    process = started(context, whole)
    process.join()
    assert process.exitcode == 0
    begin = time.perf_counter()
    started(context, replace(config, rounds=1, out=str(tmp_path / "short"))).join()
    start_s = time.perf_counter() - begin
    wall = [row["wall_seconds"] for row in checkpoint.read_records(Path(whole.out))]
    round_s = 2 * sum(wall) / ROUNDS  # the rest of a round is its evaluation and its checkpoint
    moments, interrupted = random.Random(0), set()
    for _ in range(KILLS):
        process = started(context, config)
        wanted = moments.randrange(6)  # rounds from here; the moment itself is by the clock
        until = checkpoint.rounds_done(Path(config.out)) + wanted
        while process.is_alive() and checkpoint.rounds_done(Path(config.out)) < until:
            process.join(0.01)
        process.join(moments.uniform(0, round_s if wanted else start_s))
        process.kill()
        process.join()
        assert process.exitcode == -9, "the run came to its end before the last kill"
        interrupted.add(len(checkpoint.read_records(Path(config.out))))
    assert max(interrupted) > ROUNDS / 5, f"too early to matter: {sorted(interrupted)}"
    process = started(context, config)
    process.join()
    assert process.exitcode == 0
    assert outcome(config.out) == outcome(whole.out)
    assert adapter(config.out) == adapter(whole.out)
