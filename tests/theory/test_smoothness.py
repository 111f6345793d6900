"""Is the sketched objective as smooth as the loss? Where f is smooth in X; not for f(W₀ + BA)."""

import pytest
import torch
from torch.func import hessian

from benchmarks.theory.closed_forms import sketched_objective

from .enumeration import normal, omegas

RANK, WIDTH = 4, 3


def top(matrix):
    return float(torch.linalg.eigvalsh(matrix).abs().max())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_loss_smooth_in_x_has_a_sketched_objective_as_smooth(size):
    """f(X) = Σ log cosh(cₘᵀX), whose L is ‖CᵀC‖; X has R rows."""
    rows = normal(1, 6, RANK * WIDTH)
    limit = top(rows.t() @ rows)
    roots = omegas(RANK, size).sqrt().repeat_interleave(WIDTH, dim=1)

    def loss(x):
        return (rows @ x).cosh().log().sum()

    def sketched(x):
        return torch.stack([loss(root * x) for root in roots]).mean()

    points = [torch.zeros(RANK * WIDTH).double(), *(normal(n, RANK * WIDTH) for n in range(8))]
    for x in points:
        assert top(hessian(sketched)(x)) <= limit * (1 + 1e-9)
    single = max(top(hessian(lambda x, r=r: loss(r * x))(points[0])) for r in roots)
    assert limit < single <= limit * RANK / size * (1 + 1e-9), (
        "one sketch's function is less smooth"
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_sketchs_function_reaches_the_inverse_ratio(size):
    rows = torch.zeros(1, RANK).double()
    rows[0, 0] = 1
    root = omegas(RANK, size)[0].sqrt()
    curvature = hessian(lambda x: 0.5 * (rows @ (root * x)).square().sum())(rows[0])
    assert top(curvature) == pytest.approx(RANK / size)


def joint(excess, target):
    """f^S as a function of the flat (A, B)."""
    half = RANK * WIDTH

    def function(x):
        a, b = x[:half].view(RANK, WIDTH), x[half:].view(RANK, WIDTH)
        return sketched_objective(a, b, target, excess)

    return function


ZERO = torch.zeros(WIDTH, WIDTH).double()


@pytest.mark.parametrize("size", [1, 2])
def test_the_counter_example_a_product_is_less_smooth_by_the_inverse_ratio(size):
    """½‖BA‖² where A = 0 and B has orthonormal columns, on R = 3 ranks of it."""
    b = torch.zeros(RANK, WIDTH).double()
    b[:WIDTH] = torch.eye(WIDTH)
    x = torch.cat([torch.zeros(RANK * WIDTH).double(), b.flatten()])
    full, sketched = (top(hessian(joint(e, ZERO))(x)) for e in (0.0, RANK / size - 1))
    assert full == pytest.approx(1)
    assert sketched == pytest.approx(RANK / size)


@pytest.mark.parametrize("excess", [0.0, 1.0, 3.0])
def test_the_constant_on_a_ball_is_the_losss_times_the_mean_inverse_ratio(excess):
    """½‖BA‖² on ‖X‖ ≤ r: 3r²/2 (1 + e), attained where one rank holds all."""
    radius = 1.7
    limit = 1.5 * radius**2 * (1 + excess)
    x = torch.zeros(2 * RANK * WIDTH).double()
    x[0] = x[RANK * WIDTH] = radius / 2**0.5
    assert top(hessian(joint(excess, ZERO))(x)) == pytest.approx(limit)
    for seed in range(12):
        other = normal(seed, len(x))
        other *= radius / other.norm()
        assert top(hessian(joint(excess, ZERO))(other)) <= limit


@pytest.mark.parametrize("excess", [0.0, 1.0, 3.0])
def test_another_target_adds_as_much_to_both_constants_on_a_ball(excess):
    """½‖BA − W*‖²: 3r²/2 (1 + e) + ‖W*‖, attained along the first singular vectors of W*."""
    radius, target = 1.7, normal(3, WIDTH, WIDTH)
    left, singular, right = torch.linalg.svd(target)
    limit = 1.5 * radius**2 * (1 + excess) + float(singular[0])
    a, b = torch.zeros(2, RANK, WIDTH).double()
    a[0], b[0] = right[0] * radius / 2**0.5, left[:, 0] * -radius / 2**0.5
    curvature = hessian(joint(excess, target))
    assert top(curvature(torch.cat([a.flatten(), b.flatten()]))) == pytest.approx(limit)
    for seed in range(12):
        other = normal(seed, 2 * RANK * WIDTH)
        assert top(curvature(other * radius / other.norm())) <= limit


def test_at_one_point_a_sketched_product_can_be_smoother():
    """½‖BA‖² of two equal terms and another one, R = 3, by all sets of S = 2."""
    a = torch.tensor([[1.0, 0], [1, 0], [0, 3]]).double()
    b = torch.tensor([[3.0, 0], [3, 0], [0, 2]]).double()

    def loss(x, omega):
        return 0.5 * ((x[6:].view(3, 2).t() * omega) @ x[:6].view(3, 2)).square().sum()

    x, every = torch.cat([a.flatten(), b.flatten()]), omegas(3, 2)
    full = top(hessian(lambda x: loss(x, torch.ones(3)))(x))
    sketched = top(torch.stack([hessian(lambda x, o=o: loss(x, o))(x) for o in every]).mean(0))
    assert sketched / full == pytest.approx(0.985, abs=5e-4)


def test_no_constant_holds_everywhere_for_a_loss_with_curvature():
    """B → tB, A → A/t is the same W, and the curvature in A grows as t²."""
    a, b = normal(1, RANK, WIDTH), normal(2, RANK, WIDTH)
    curvatures = [
        top(hessian(joint(0.0, ZERO))(torch.cat([(a / t).flatten(), (b * t).flatten()])))
        for t in (4.0, 8.0, 16.0)
    ]
    assert curvatures[1] / curvatures[0] == pytest.approx(4, rel=0.05)
    assert curvatures[2] / curvatures[1] == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_clients_curvature_lies_between_the_inverse_ratio_and_its_square(size):
    """In A, of ½‖BΩA − W‖²: the largest of all sketches; both ends are attained."""

    def largest(b):
        return max(top((b * o[:, None]) @ (b * o[:, None]).t()) for o in omegas(RANK, size))

    ratio = RANK / size
    for seed in range(6):
        b = normal(seed, RANK, WIDTH)
        assert ratio * (1 - 1e-9) <= largest(b) / top(b @ b.t()) <= ratio**2 * (1 + 1e-9)
    alone = torch.zeros(RANK, WIDTH).double()
    alone[0, 0] = 1
    assert largest(alone) == pytest.approx(ratio**2)
    same = torch.ones(RANK, 1).double()
    assert largest(same) / top(same @ same.t()) == pytest.approx(ratio)


@pytest.mark.parametrize("clients", [1, 4])
def test_the_bound_on_the_mean_gradient_holds_where_f_is_smooth(clients):
    """f = ½xᵀQx, one rank a coordinate, N clients of one step each with sketches of their own."""
    root = normal(5, RANK, RANK)
    q, every = root.t() @ root / RANK, omegas(RANK, 2).sqrt()
    sketched_q = torch.stack([m[:, None] * q * m for m in every]).mean(0)
    limit, rounds, repeats = top(q), 60, 200
    generator = torch.Generator().manual_seed(0)
    start = normal(6, RANK)
    least = 0.5 * start @ sketched_q @ start
    lr = 0.3 / limit
    x = start.expand(repeats, -1).clone()
    squares, variances = [], []
    for _ in range(rounds):
        gradient = x @ sketched_q
        each = torch.stack([m * ((m * x) @ q) for m in every], dim=1)
        squares.append(gradient.square().sum(1).mean())
        variances.append((each - gradient[:, None]).square().sum(2).mean())
        picks = torch.randint(len(every), (repeats, clients), generator=generator)
        x = x - lr * each[torch.arange(repeats)[:, None], picks].mean(1)
    found, noise = torch.stack(squares).mean(), torch.stack(variances).mean()
    bound = 2 * least / (lr * rounds) + lr * limit * noise / clients
    assert bound / 20 < found <= bound
