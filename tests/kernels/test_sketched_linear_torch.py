from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fslora_kernels import sketched_linear
from fslora_kernels.ops.sketched_linear import backend_torch, cost, interface
from fslora_kernels.ops.sketched_linear.cases import CASES, Case
from fslora_kernels.ops.sketched_linear.reference import reference
from fslora_kernels.testing import check_error_budget, inputs, value_and_gradients

from .contract import SketchedLinearContract


@pytest.fixture(scope="module", autouse=True, params=["own backward", "torch's differentiation"])
def path(request):
    """Everything here holds on both ways through the backend, whatever a layer's size."""
    with pytest.MonkeyPatch.context() as patch:
        small = 0 if request.param == "own backward" else 2**62
        patch.setattr(backend_torch, "SMALL_LAYER", small)
        yield


class TestTorch(SketchedLinearContract):
    implementation = "torch"


class TestProductsOfAnotherProcessor(SketchedLinearContract):
    """As one with AMX where this has none, or without it."""

    implementation = "torch"

    @pytest.fixture(autouse=True)
    def another(self, monkeypatch):
        other = () if backend_torch.TILED else (torch.bfloat16,)
        monkeypatch.setattr(backend_torch, "TILED", other)


def small(**changes):
    return inputs(Case("small", 5, 7, 6, 4, 2, bias=True, **changes), torch.float64)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("rank_weight", [False, True])
def test_gradcheck(dropout, rank_weight):
    arguments = small(rank_weight=rank_weight)
    names = ("x", "weight", "lora_a", "lora_b", "bias")

    def function(*leaves):
        return sketched_linear(
            **{**arguments, **dict(zip(names, leaves, strict=True))},
            dropout=dropout,
            seed=3,
            implementation="torch",
        )

    leaves = [arguments[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_serves_the_backward_pass(seed):
    arguments = small()
    leaves = [arguments[name].requires_grad_() for name in ("x", "lora_a", "lora_b")]

    def function(x, lora_a, lora_b):
        factors = {"lora_a": lora_a, "lora_b": lora_b}
        return sketched_linear(**{**arguments, "x": x, **factors}, dropout=0.5, seed=seed)

    assert torch.autograd.gradcheck(function, leaves)


def test_dropout_drops_the_adapters_input_and_keeps_its_mean():
    arguments = small()
    arguments["x"] = torch.ones(20000, 7, dtype=torch.float64)
    wanted = reference(**arguments)[0]
    dropped = sketched_linear(**arguments, dropout=0.3, seed=0)
    base = arguments["x"] @ arguments["weight"].T + arguments["bias"]
    assert not torch.allclose(dropped[0], dropped[1])
    deviation = (dropped - base).std(0) / len(dropped) ** 0.5
    assert ((dropped.mean(0) - wanted).abs() < 5 * deviation).all()
    again = sketched_linear(**arguments, dropout=0.3, seed=0)
    assert torch.equal(dropped, again)
    assert not torch.equal(dropped, sketched_linear(**arguments, dropout=0.3, seed=1))


def test_dropout_without_a_seed_follows_torchs_generator():
    arguments = small()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = sketched_linear(**arguments, dropout=0.3)
        second = sketched_linear(**arguments, dropout=0.3)
        torch.manual_seed(0)
        assert torch.equal(first, sketched_linear(**arguments, dropout=0.3))
    assert not torch.equal(first, second)


def test_a_graph_under_capture_refuses_to_draw_a_mask(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = SimpleNamespace(is_cuda=True)
    with pytest.raises(NotImplementedError, match="capture without dropout"):
        interface._drawn_seed(on_gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert interface._drawn_seed(on_gpu) >= 0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    size = st.integers(1, 40)
    rank = data.draw(size)
    sketch = data.draw(st.none() | st.integers(1, rank))
    case = Case(
        "any",
        data.draw(st.integers(0, 40)),
        data.draw(size),
        data.draw(size),
        rank,
        sketch,
        bias=data.draw(st.booleans()),
        base=data.draw(st.booleans()),
        strided_x=data.draw(st.booleans()),
        rank_major_b=data.draw(st.booleans()),
    )
    arguments = inputs(case, torch.float64, seed=data.draw(st.integers(0, 99)))
    dy = torch.randn(
        case.tokens, case.out_features, generator=torch.Generator().manual_seed(0)
    ).double()
    actual = value_and_gradients(sketched_linear, arguments, dy)
    exact = value_and_gradients(reference, arguments, dy)
    for name in exact:
        torch.testing.assert_close(actual[name], exact[name], rtol=1e-9, atol=1e-9)


def test_leading_dimensions_are_kept():
    arguments = small()
    flat = sketched_linear(**arguments)
    arguments["x"] = arguments["x"].reshape(5, 1, 7)
    assert torch.equal(sketched_linear(**arguments), flat.reshape(5, 1, 6))


def test_an_output_may_be_written_over(monkeypatch):
    """It is no view of what an autograd function returns, which torch and FSDP2 would not have."""
    monkeypatch.setattr(backend_torch, "SMALL_LAYER", 0)
    arguments = small()
    x = arguments.pop("x").reshape(5, 1, 7).requires_grad_()
    y = sketched_linear(x, **arguments)
    assert y._base is None
    y += y.detach()
    (found,) = torch.autograd.grad(y.sum(), x)
    (wanted,) = torch.autograd.grad(reference(x, **arguments).sum(), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_one_factor_alone_may_be_of_another_dtype(name):
    arguments = small()
    arguments[name] = arguments[name].float()
    wanted = sketched_linear(**{**arguments, name: arguments[name].double()})
    assert torch.equal(sketched_linear(**arguments), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype):
    case = next(case for case in CASES if case.name == "odd_everything")
    full = inputs(case, torch.float32)
    dy = torch.ones(case.tokens, case.out_features)

    def under_autocast(function):
        def call(**arguments):
            with torch.autocast("cpu", dtype=dtype):
                return function(**arguments)

        return call

    actual = value_and_gradients(under_autocast(sketched_linear), full, dy)
    eager = value_and_gradients(under_autocast(reference), full, dy)
    exact = value_and_gradients(
        reference,
        {k: v.double() if k != "index" and torch.is_tensor(v) else v for k, v in full.items()},
        dy,
    )
    assert actual["y"].dtype == dtype
    for name, value in actual.items():
        wanted = exact[name]
        relative = (value.double() - wanted).norm() / wanted.norm()
        allowed = (eager[name].double() - wanted).norm() / wanted.norm()
        assert relative <= 2 * allowed + torch.finfo(dtype).eps, name
        if name != "y":
            assert value.dtype == torch.float32


def saved_shapes(leaves, **changes):
    """Shapes of what is saved beside the arguments, with those of x if it is saved."""
    arguments = inputs(Case("saved", 64, 32, 48, 16, 4), torch.float32)
    for name in leaves:
        arguments[name].requires_grad_()
    known = {v.data_ptr() for n, v in arguments.items() if torch.is_tensor(v) and n != "x"}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        sketched_linear(**arguments, **changes)
    assert all(t.data_ptr() == arguments["x"].data_ptr() for t in saved if t.shape == (64, 32))
    return {tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in known}


def test_saves_no_copy_of_x_and_nothing_full_rank(monkeypatch):
    monkeypatch.setattr(backend_torch, "SMALL_LAYER", 0)
    dropping = {"dropout": 0.1, "seed": 0}
    assert saved_shapes(("x", "lora_a", "lora_b"), **dropping) == {(64, 32), (64, 4), ()}


@pytest.mark.parametrize(
    ("leaves", "shapes"),
    [
        (("x",), set()),
        (("x", "lora_b"), {(64, 4)}),
        (("x", "lora_a"), {(64, 32)}),
        (("weight",), {(64, 32)}),
    ],
    ids=["frozen adapter", "frozen A", "frozen B", "base alone"],
)
def test_saves_only_what_the_wanted_gradients_need(leaves, shapes):
    """As torch's own differentiation does, but for A and B that it selects or casts."""
    found = saved_shapes(leaves)
    assert found - {(4, 32), (4, 48), (48, 4), (32, 4)} == shapes


def test_a_checkpoint_that_draws_another_mask_uses_it_for_every_gradient():
    """The delta is bilinear in A and B, so one mask gives ⟨A, dA⟩ = ⟨B, dB⟩, and two do not."""
    arguments = inputs(Case("replayed", 64, 32, 48, 8, None), torch.float64)
    factors = [arguments[name].requires_grad_() for name in ("lora_a", "lora_b")]
    y = checkpoint(
        lambda: sketched_linear(**arguments, dropout=0.5),
        use_reentrant=False,
        preserve_rng_state=False,
    )
    da, db = torch.autograd.grad(y.square().sum(), factors)
    torch.testing.assert_close((factors[0] * da).sum(), (factors[1] * db).sum())


def test_cost_is_what_the_flop_counter_counts():
    from fslora_kernels.flops import count_flops

    case = Case("counted", 64, 32, 48, 16, 4)
    arguments = inputs(case, torch.float32)
    for name in ("x", "lora_a", "lora_b"):
        arguments[name].requires_grad_()
    with count_flops() as forward:
        y = sketched_linear(**arguments, implementation="torch")
    with count_flops() as backward:
        y.sum().backward()
    for counter, is_backward in ((forward, False), (backward, True)):
        stated = cost(64, 32, 48, 4, backward=is_backward)
        assert counter.total == stated.base_flops + stated.lora_flops
    with count_flops() as bare:
        torch.nn.functional.linear(arguments["x"], arguments["weight"])
    assert bare.total == cost(64, 32, 48, 4).base_flops
    padded = cost(64, 32, 48, 5, pad_ranks_to=16)
    assert padded.lora_flops == cost(64, 32, 48, 16).lora_flops


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.tensor([0, 9])}, "ranks 0 to 3"),
        ({"index": torch.tensor([1, 1])}, "without repeats"),
        ({"index": torch.tensor([2, 0])}, "ascending"),
        ({"index": torch.tensor([], dtype=torch.int64)}, "empty"),
        ({"index": torch.tensor([0.0])}, "int64"),
        ({"index": [0, 2]}, r"got a list; build it with torch.tensor"),
        ({"lora_b": torch.zeros(6, 3)}, "lora_a must be"),
        ({"x": torch.zeros(5, 8)}, "x must be"),
        ({"weight": torch.zeros(7, 6)}, "weight must be"),
        ({"bias": torch.zeros(7)}, "bias must be"),
        ({"rank_weight": torch.ones(4)}, "rank_weight must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"implementation": "cuda"}, "unknown implementation"),
        ({"scale": torch.ones((), requires_grad=True)}, "not differentiated"),
        ({"scale": torch.ones(1)}, "scale must be one number"),
        ({"index": torch.tensor([True, False])}, "int64"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        sketched_linear(**{**small(), **change})


def test_a_request_is_obeyed_or_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="need a GPU"):
        sketched_linear(**small(), implementation="triton")


def test_budget_catches_an_unwritten_element_and_a_wrong_value():
    exact = torch.ones(4, dtype=torch.float64)
    good = exact.float()
    check_error_budget(good, good, exact, name="good")
    for bad in (float("nan"), 1.001):
        wrong = good.clone()
        wrong[2] = bad
        with pytest.raises(AssertionError, match="budget"):
            check_error_budget(wrong, good, exact, name="bad")
    assert torch.empty(3).isnan().all(), "allocations are poisoned in these tests"


def test_second_derivatives_are_refused_rather_than_lost(monkeypatch):
    """Not by torch itself, where the gradient that comes in is a constant."""
    monkeypatch.setattr(backend_torch, "SMALL_LAYER", 0)
    x, a = torch.ones(3, 8, requires_grad=True), torch.ones(4, 8)
    y = sketched_linear(x, torch.ones(6, 8), a, torch.ones(6, 4))
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
