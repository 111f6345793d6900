import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fslora.protocol import LoRAWeights, Sketch
from fslora.sketch import cohort_sketches, draw_sketches
from fslora_kernels.sampling import sketch_size
from fslora_kernels.seeds import fold_in, fold_in_each, splitmix64

RANK, SIZE = 16, 4
MODULES = [f"layer.{n}" for n in range(4000)]


def indicator(rank=RANK, size=SIZE, key=7):
    """[modules, rank]: which ranks each module's index set holds."""
    chosen = torch.zeros(len(MODULES), rank, dtype=torch.float64)
    for row, sketch in zip(chosen, draw_sketches(key, MODULES, rank, size).values(), strict=True):
        row[sketch.index] = 1
    return chosen


def test_expectation_of_omega_is_the_identity():
    omega = indicator() * RANK / SIZE
    deviation = (RANK / SIZE - 1) ** 0.5 / len(MODULES) ** 0.5
    assert ((omega.mean(0) - 1).abs() < 5 * deviation).all()


def test_second_moments_of_omega():
    """E[Ω_jj²] = R/S and E[Ω_jj Ω_ll] = R(S−1) / (S(R−1))."""
    omega = indicator() * RANK / SIZE
    moments = omega.T @ omega / len(MODULES)
    torch.testing.assert_close(
        moments.diagonal(), torch.full((RANK,), RANK / SIZE).double(), rtol=0.1, atol=0
    )
    off = moments[~torch.eye(RANK, dtype=torch.bool)]
    expected = RANK * (SIZE - 1) / (SIZE * (RANK - 1))
    assert abs(off.mean() - expected) < 1e-9, "exact: every set has the same size"
    assert ((off - expected).abs() < 0.25).all()


def test_every_set_of_two_of_four_is_equally_likely():
    weights = torch.tensor([1, 2, 4, 8], dtype=torch.float64)
    counts = (indicator(4, 2) @ weights).long().bincount(minlength=16)
    counts = counts[counts > 0]
    assert len(counts) == 6
    chi_square = ((counts - len(MODULES) / 6) ** 2 / (len(MODULES) / 6)).sum()
    assert chi_square < 20.5, "99.9% quantile at 5 degrees of freedom"


def test_modules_rounds_and_clients_draw_independently():
    def indices(seed, round_number, client, module="a"):
        key = fold_in(seed, round_number, client)
        return draw_sketches(key, [module], 64, 32)[module].index.tolist()

    draws = [indices(0, 1, "x"), indices(1, 1, "x"), indices(0, 2, "x"), indices(0, 1, "y")]
    draws.append(indices(0, 1, "x", "b"))
    assert len({tuple(draw) for draw in draws}) == len(draws)
    assert indices(0, 1, "x") == draws[0]


def test_the_draw_is_the_documented_one():
    """By whole-number arithmetic, from the words of the docstrings."""
    mask = 2**64 - 1

    def documented(key, module, rank, size):
        digest = hashlib.blake2b(f"{key}\0{module}".encode(), digest_size=8).digest()
        state = int.from_bytes(digest, "little") >> 1
        outputs = []
        for _ in range(rank):
            state = (state + 0x9E3779B97F4A7C15) & mask
            z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            outputs.append(z ^ (z >> 31))
        return sorted(sorted(range(rank), key=lambda j: outputs[j])[:size])

    for key in (0, 5, 2**62):
        for module in ("q_proj", "ü"):
            drawn = draw_sketches(key, [module], 13, 5)[module].index
            assert drawn.tolist() == documented(key, module, 13, 5)


def test_a_cohort_draws_what_each_of_its_clients_draws():
    sizes = {"c": 4, "a": 2, "whole": 16, "b": 4}
    adapters = {name: LoRAWeights(torch.ones(16, 3), torch.ones(16, 5)) for name in ("x", "y")}
    together = cohort_sketches(3, 7, sizes, adapters, "uniform")
    assert list(together) == list(sizes)
    for client, size in sizes.items():
        alone = draw_sketches(fold_in(3, 7, client), list(adapters), 16, size)
        assert list(together[client]) == list(alone)
        for name, sketch in alone.items():
            assert torch.equal(together[client][name].rows, sketch.rows)


def test_splitmix64_gives_its_published_first_outputs():
    """The first outputs from state 1234567, as the generator's reference code prints them."""
    outputs = splitmix64(np.array([1234567], dtype=np.uint64), 3)[0].tolist()
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(rank=st.integers(1, 70), data=st.data())
def test_sets_are_valid_at_every_size(rank, data):
    size = data.draw(st.integers(1, rank))
    for sketch in draw_sketches(1, ["a", "b"], rank, size).values():
        assert sketch.size == size
        assert sketch.correction == rank / size
        assert (sketch.index is None) == (size == rank)


@pytest.mark.parametrize(
    ("rank", "ratio", "size"), [(16, 1 / 8, 2), (16, 1.0, 16), (16, 0.01, 1), (6, 0.4, 2)]
)
def test_sketch_size(rank, ratio, size):
    assert sketch_size(rank, ratio) == size


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match="sketch ratio"):
        sketch_size(16, ratio)


def test_a_bad_index_set_is_refused():
    for index in ([0, 16], [3, 3], [2, 1], []):
        with pytest.raises(ValueError, match="index set"):
            Sketch(torch.tensor(index, dtype=torch.int64), 16)
    with pytest.raises(ValueError, match="1 to 16"):
        draw_sketches(0, ["a"], 16, 17)


def test_keys_tell_numbers_from_text_and_paths_apart():
    keys = {fold_in(0, 1), fold_in(0, "1"), fold_in(1, 0), fold_in(0, 1, 1), fold_in(0, "1", "1")}
    assert len(keys) == 5
    assert all(0 <= key < 2**63 for key in keys)


@given(keys=st.lists(st.integers(0, 2**63 - 1), max_size=3), names=st.lists(st.text(), max_size=3))
def test_folding_many_at_once_is_folding_each(keys, names):
    found = fold_in_each(keys, names)
    assert found.tolist() == [fold_in(key, name) for key in keys for name in names]
