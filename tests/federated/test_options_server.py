"""Server optimizers against torch's own or the paper's arithmetic; the effective rank; a run."""

import math
from pathlib import Path

import pytest
import torch

from fslora import checkpoint
from fslora.aggregation import stepped
from fslora.config import SimulateConfig
from fslora.evaluation import effective_rank
from fslora.lowrank import participation_rank, total
from fslora.protocol import LoRAWeights, ServerState
from fslora.simulate import simulate

from .worlds import assert_same_bits, dense, pair, tensors_of

LR = 0.1


def first_state(**changes):
    head = {"head": torch.ones(2, 2, dtype=torch.float64)}
    return ServerState(round=0, adapters={"layer": pair(4, 3, 5)}, extras=head, key=0, **changes)


def changes(count=4):
    """A change of factors and heads for each round; rank 1 is untouched in the second."""
    found = []
    for number in range(count):
        change = pair(4, 3, 5, seed=number + 1)
        if number == 1:
            for factor in change:
                factor[1] = 0
        found.append(({"layer": change}, {"head": torch.full((2, 2), 0.5 - number).double()}))
    return found


def momentum(x, deltas):
    v = 0.0
    for delta in deltas:
        v = 0.9 * v + delta
        x += LR * v
    return x


def yogi(x, deltas):
    m, v = 0.0, 1e-6
    for delta in deltas:
        m = 0.9 * m + 0.1 * delta
        sign = (v > delta**2) - (v < delta**2)
        v = v - 0.01 * delta**2 * sign
        x += LR * m / (math.sqrt(v) + 1e-3)
    return x


def adamw(x, deltas):
    m = v = 0.0
    for step, delta in enumerate(deltas, start=1):
        m, v = 0.9 * m + 0.1 * delta, 0.999 * v + 0.001 * delta**2
        x *= 1 - LR * 0.01
        x += LR * m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return x


@pytest.mark.parametrize(
    ("name", "by_hand"), [("fedavgm", momentum), ("fedyogi", yogi), ("fedadamw", adamw)]
)
def test_a_server_optimizer_is_its_arithmetic_number_by_number(tmp_path, name, by_hand):
    """Four rounds, each through the checkpoint: its memory is all there."""
    state = start = first_state()
    for change in changes():
        state = stepped(state, change, name, LR)
        checkpoint.save_state(tmp_path, state)
        loaded = checkpoint.load_state(tmp_path)
        assert_same_bits(state, loaded)
        state = loaded
    for factor in ("lora_a", "lora_b"):
        before, after = (getattr(s.adapters["layer"], factor) for s in (start, state))
        for place in [(0, 0), (1, 2), (3, 1)]:
            deltas = [float(getattr(c["layer"], factor)[place]) for c, _ in changes()]
            wanted = by_hand(float(before[place]), deltas)
            assert float(after[place]) == pytest.approx(wanted, rel=1e-12)
    wanted = by_hand(1.0, [float(heads["head"][0, 0]) for _, heads in changes()])
    assert state.extras["head"].flatten().tolist() == pytest.approx([wanted] * 4, rel=1e-12)


def test_the_optimizers_differ_and_fedavg_keeps_nothing():
    found = {}
    for name in ("fedavg", "fedavgm", "fedadam", "fedadamw", "fedyogi"):
        state = first_state()
        for change in changes():
            state = stepped(state, change, name, LR)
        found[name] = float(state.adapters["layer"].lora_a.sum())
        assert bool(state.optimizer) == (name != "fedavg")
        assert all(tensor.grad is None for tensor in tensors_of(state).values()), "as much again"
    assert len(set(found.values())) == 5


def test_participation_rank_is_that_of_the_dense_products_singular_values():
    lora = pair(6, 9, 5)
    sizes = torch.linalg.svdvals(dense(lora)) ** 2
    wanted = float(sizes.sum() ** 2 / (sizes**2).sum())
    assert participation_rank(lora) == pytest.approx(wanted, rel=1e-12)
    assert participation_rank(total([lora])) == pytest.approx(wanted, rel=1e-6), "as a matrix"
    both = LoRAWeights(torch.eye(3), torch.eye(3))
    assert participation_rank(both) == pytest.approx(3), "an identity, either way round"
    eye = LoRAWeights(torch.eye(4, 9), torch.eye(4, 5) * 3)
    assert participation_rank(eye) == pytest.approx(4)
    assert participation_rank(LoRAWeights(eye.lora_a, eye.lora_b * 0)) == 0
    twice = LoRAWeights(eye.lora_a[[0, 0, 1, 1]], eye.lora_b[[0, 0, 1, 1]])
    assert participation_rank(twice) == pytest.approx(2), "redundant ranks do not count"


def test_the_effective_rank_counts_what_the_base_has_gained_and_averages():
    bare = first_state()
    (lora,) = bare.adapters.values()
    opposite = {"layer": LoRAWeights(lora.lora_a, -lora.lora_b)}
    gone = first_state(base_residual=opposite)
    assert effective_rank([gone]) == pytest.approx(0, abs=1e-6)
    alone = participation_rank(lora)
    assert effective_rank([bare, gone]) == pytest.approx(alone / 2)


def test_a_run_with_every_option_records_the_effective_rank_and_resumes(settings, tmp_path):
    options = {
        **settings,
        "forward": "full",
        "averaging": "inverse",
        "sampler": "importance",
        "server_opt": "fedyogi",
        "server_lr": 0.01,
    }
    whole = SimulateConfig(**options)
    simulate(whole)
    parts = {**options, "out": str(tmp_path / "parts")}
    simulate(SimulateConfig(**{**parts, "rounds": 1}))
    simulate(SimulateConfig(**parts, resume=True))
    states = [checkpoint.load_state(Path(out)) for out in (options["out"], parts["out"])]
    assert_same_bits(*states)
    rows = checkpoint.read_records(Path(whole.out))
    ranks = [row["effective_rank"] for row in rows]
    assert ranks[0] == 0, "B begins as zero"
    assert ranks[-1] == pytest.approx(effective_rank(states[:1]), abs=1e-6)
    assert 1 <= ranks[-1] <= whole.rank
    assert rows[-1]["eval_loss_sketched"] is None, "its clients do not minimise that"
    full = sum(p.size_bytes for p in states[0].adapters.values())
    assert rows[-1]["adapter_bytes_down"] == full * whole.per_round
    with pytest.raises(ValueError, match="--sampler nested"):
        simulate(SimulateConfig(**{**parts, "sampler": "nested"}, resume=True))


@pytest.mark.parametrize(
    "options",
    [
        {"redraw": "step", "depth": "uniform", "forward": "full", "averaging": "inverse"},
        {"sampler": "importance"},
        {"redraw": "step", "averaging": "count", "depth": "top:1"},
    ],
    ids=["redraw_depth", "importance", "redraw_count_top"],
)
@pytest.mark.filterwarnings("ignore:--depth top", "ignore:--forward sketched with")
def test_a_run_goes_on_with_the_same_bits_and_is_timed(settings, tmp_path, options):
    options = {**settings, **options, "devices": "phone:poor=1"}
    simulate(SimulateConfig(**options))
    parts = {**options, "out": str(tmp_path / "parts")}
    simulate(SimulateConfig(**{**parts, "rounds": 1}))
    simulate(SimulateConfig(**parts, resume=True))
    assert_same_bits(*(checkpoint.load_state(Path(out)) for out in (options["out"], parts["out"])))
    before, _, after = checkpoint.read_records(Path(options["out"]))
    assert after["eval_loss"] < before["eval_loss"], "it learns"
    assert (after["eval_loss_sketched"] is None) == (
        "redraw" not in options or "forward" in options
    )
    assert all(client["sim_compute_seconds"] > 0 for client in after["clients"])
