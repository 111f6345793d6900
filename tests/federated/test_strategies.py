from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

import fslora.strategies
from fslora import checkpoint
from fslora.config import SimulateConfig
from fslora.engines import sequential
from fslora.protocol import LocalRule
from fslora.report import write_report
from fslora.server import run_round
from fslora.simulate import simulate
from fslora.strategies import STRATEGIES, head_only

from .worlds import CLIENTS, world


def test_every_strategy_file_is_listed_and_offered():
    folder = Path(fslora.strategies.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {name.replace("-", "_") for name in STRATEGIES} == files
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
