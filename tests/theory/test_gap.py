"""The sketched squared loss against the full-rank one, and where it is least."""

import pytest
import torch

from benchmarks.theory.closed_forms import (
    minimiser,
    participation,
    relative_error,
    shrunk,
    sketched_gap,
    sketched_objective,
)
from fslora.lowrank import participation_rank
from fslora.protocol import LoRAWeights

from .enumeration import normal, omegas

RANK = 6
SINGULAR = (1.0, 0.75, 0.5, 0.25)


def target(size=9):
    left, right = (torch.linalg.qr(normal(seed, size, len(SINGULAR))).Q for seed in (1, 2))
    return left * torch.tensor(SINGULAR).double() @ right.t()


@pytest.mark.parametrize("size", range(1, RANK + 1))
def test_the_gap_of_the_squared_loss(size):
    a, b, x, y = normal(1, RANK, 4), normal(2, RANK, 3), normal(3, 7, 4), normal(4, 7, 3)

    def loss(omega):
        return 0.5 * ((x @ a.t() * omega) @ b - y).square().sum(dim=1).mean()

    found = torch.stack([loss(omega) for omega in omegas(RANK, size)]).mean()
    gap = found - loss(torch.ones(RANK))
    torch.testing.assert_close(sketched_gap(a, b, x, RANK / size - 1), gap)
    assert gap > 0 if size < RANK else abs(float(gap)) < 1e-12


def test_the_gap_is_zero_where_all_terms_are_the_same():
    a, b = normal(1, 1, 4).expand(RANK, 4), normal(2, 1, 3).expand(RANK, 3)
    assert abs(float(sketched_gap(a, b, normal(3, 7, 4), 2.0))) < 1e-10


def test_clients_of_different_ratios_minimise_the_loss_of_their_mean_inverse_ratio():
    a, b, w = normal(1, RANK, 4), normal(2, RANK, 3), normal(3, 3, 4)
    losses = [
        torch.stack([0.5 * ((b.t() * o) @ a - w).square().sum() for o in omegas(RANK, size)]).mean()
        for size in (1, 2, 3)
    ]
    excess = (RANK / 1 + RANK / 2 + RANK / 3) / 3 - 1
    torch.testing.assert_close(torch.stack(losses).mean(), sketched_objective(a, b, w, excess))


@pytest.mark.parametrize("excess", [0.0, 0.5, 1.0, 2.5, 4.0])
def test_the_least_sketched_loss_has_soft_thresholded_singular_values(excess):
    a, b = minimiser(target(), RANK, excess, 0)
    wanted = shrunk(SINGULAR, RANK, excess)
    found = torch.linalg.svdvals(b.t() @ a)[: len(wanted)]
    torch.testing.assert_close(found, torch.tensor(wanted).double(), atol=2e-3, rtol=0)
    assert participation_rank(LoRAWeights(a, b)) == pytest.approx(participation(wanted), abs=0.02)
    error = float((b.t() @ a - target()).square().sum() / target().square().sum())
    assert error == pytest.approx(relative_error(wanted, SINGULAR), abs=2e-3)


def test_ranks_dropped_independently_are_thresholded_and_not_divided():
    """Each kept with probability θ and divided by it: the least of the mean over all 2ᴿ sets."""
    theta, rank, wanted = 0.6, 4, target(5)
    kept = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * rank)
    chances = (theta**kept * (1 - theta) ** (1 - kept)).prod(dim=1)

    def loss(a, b):
        products = torch.einsum("sr,re,rd->sed", kept / theta, b, a)
        return 0.5 * chances @ (products - wanted).square().sum(dim=(1, 2))

    factors = [(0.3 * normal(seed, rank, 5)).requires_grad_() for seed in (1, 2)]
    optimizer = torch.optim.LBFGS(factors, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(*factors)
        value.backward()
        return value

    optimizer.step(closure)
    found = torch.linalg.svdvals((factors[1].t() @ factors[0]).detach())[: len(SINGULAR)]
    share = (1 - theta) / (theta * rank)
    shrinking = [max(0.0, value - share * float(found.sum())) for value in SINGULAR]
    torch.testing.assert_close(found, torch.tensor(shrinking).double(), atol=2e-3, rtol=0)
    assert shrinking[1] > 0.1


def test_sketches_of_one_rank_leave_the_largest_singular_value_alone():
    assert shrunk(SINGULAR, RANK, RANK - 1) == [1.0, 0.0, 0.0, 0.0]
    a, b = minimiser(target(), RANK, RANK - 1, 0)
    assert participation_rank(LoRAWeights(a, b)) == pytest.approx(1.0, abs=0.05)


def test_more_sketching_never_raises_the_rank_and_always_the_error():
    excesses = [0.0, 0.2, 0.5, 1.0, 2.0, 4.0]
    values = [shrunk(SINGULAR, RANK, excess) for excess in excesses]
    ranks = [participation(each) for each in values]
    errors = [relative_error(each, SINGULAR) for each in values]
    assert ranks == sorted(ranks, reverse=True)
    assert errors == sorted(errors)
    assert ranks[0] > ranks[-1] + 1
