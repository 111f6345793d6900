"""The moments of Ω, as the project's own samplers draw it."""

import pytest
import torch

from benchmarks.theory.closed_forms import inverse_ratio
from fslora.protocol import LoRAWeights
from fslora.sketch import cohort_sketches, draw_sketches
from fslora_kernels.sampling import draw_systematic, inclusion_probabilities

from .enumeration import omegas

RANK = 8
MODULES = [f"layer {n}" for n in range(1500)]


def diagonals(sketches, rank=RANK):
    """[modules, R]: Ω's diagonal, 1/π of what was drawn."""
    found = torch.zeros(len(sketches), rank, dtype=torch.float64)
    for row, sketch in zip(found, sketches.values(), strict=True):
        row[sketch.index] = sketch.inverse_probability
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_first_and_second_moments_of_uniform_sketches(size):
    omega = diagonals(draw_sketches(3, MODULES, RANK, size))
    every = omegas(RANK, size)
    pairs = RANK * (size - 1) / (size * (RANK - 1))
    exact = every.t() @ every / len(every)
    wanted = torch.full((RANK, RANK), pairs).double().fill_diagonal_(RANK / size)
    torch.testing.assert_close(every.mean(0), torch.ones(RANK).double())
    torch.testing.assert_close(exact, wanted)
    found = omega.t() @ omega / len(omega)
    products = omega[:, :, None] * omega[:, None]
    error = products.std(dim=0, correction=0) / len(omega) ** 0.5
    assert ((found - exact).abs() <= 4.5 * error + 1e-12).all()
    assert ((omega.mean(0) - 1).abs() <= 4.5 * omega.std(dim=0) / len(omega) ** 0.5).all()


@pytest.mark.parametrize("sampler", ["balanced", "nested", "class-shared"])
def test_structured_sketches_have_the_same_moments_for_each_client(sampler):
    adapters = dict.fromkeys(MODULES, LoRAWeights(torch.ones(RANK, 1), torch.ones(RANK, 1)))
    sizes = {"a": 2, "b": 4, "c": 2}
    for client, drawn in cohort_sketches(4, 1, sizes, adapters, sampler).items():
        omega, every = diagonals(drawn), omegas(RANK, sizes[client])
        products = every[:, :, None] * every[:, None]
        error = products.std(dim=0, correction=0) / len(omega) ** 0.5
        found = omega.t() @ omega / len(omega)
        assert ((found - products.mean(0)).abs() <= 4.5 * error + 1e-12).all()
        mean_error = (RANK / sizes[client] - 1) ** 0.5 / len(omega) ** 0.5
        assert ((omega.mean(0) - 1).abs() <= 4.5 * mean_error).all()


def test_importance_sketches_have_mean_one_and_mean_square_one_over_their_probability():
    sizes = torch.tensor([1.0, 1, 2, 3, 5, 8, 13, 21]).double()
    inclusion = inclusion_probabilities(sizes.expand(len(MODULES), -1), 3)
    held = torch.zeros_like(inclusion).scatter_(1, draw_systematic(9, MODULES, inclusion), 1.0)
    omega, chance = held / inclusion, inclusion[0]
    error = ((1 / chance - 1) / len(MODULES)).sqrt()
    assert ((omega.mean(0) - 1).abs() <= 4.5 * error).all()
    square_error = ((1 / chance**3 - 1 / chance**2) / len(MODULES)).sqrt()
    assert ((omega.square().mean(0) - 1 / chance).abs() <= 4.5 * square_error).all()
    assert chance.max() / chance.min() > 3, "not nearly uniform"


@pytest.mark.parametrize(
    ("sizes", "product"), [((2, 4, 8), 1.361), ((4, 4, 4), 1.0), ((2, 8, 8), 1.5)]
)
def test_uplink_to_a_target_is_never_below_full_ranks(sizes, product):
    """Cauchy-Schwarz: mean(R/S) mean(S/R) ≥ 1, equal only where all ratios are."""
    shares = sum(size / 16 for size in sizes) / len(sizes)
    assert inverse_ratio(16, sizes) * shares == pytest.approx(product, abs=1e-3)


@pytest.mark.parametrize("sizes", [(2, 4, 8), (3, 5, 5)])
def test_one_more_rank_for_a_client_lowers_the_mean_inverse_ratio_by_this_much(sizes):
    for place, size in enumerate(sizes):
        larger = [*sizes[:place], size + 1, *sizes[place + 1 :]]
        gain = inverse_ratio(16, sizes) - inverse_ratio(16, larger)
        assert gain == pytest.approx(16 / (len(sizes) * size * (size + 1)))
