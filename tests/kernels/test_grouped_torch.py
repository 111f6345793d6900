from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora_kernels import grouped_sketched_linear
from fslora_kernels.ops.grouped_sketched_linear import cost
from fslora_kernels.ops.grouped_sketched_linear.cases import CASES, Case, inputs
from fslora_kernels.ops.grouped_sketched_linear.plan import plan
from fslora_kernels.ops.grouped_sketched_linear.reference import reference
from fslora_kernels.testing import value_and_gradients

from .test_grouped_contract import GroupedContract, draw_dy, exact, named


class TestTorch(GroupedContract):
    implementation = "torch"


def small(**changes):
    return inputs(Case("small", (3, 0, 2), (2, 1, 3), 7, 6, pool=4, bias=True), torch.float64) | (
        changes
    )


@pytest.mark.parametrize("pool", [None, 4])
def test_gradcheck(pool):
    arguments = inputs(Case("small", (3, 0, 2), (2, 1, 3), 7, 6, pool, bias=True), torch.float64)
    names = ("x", "weight", "lora_a", "lora_b", "bias")

    def function(*leaves):
        return grouped_sketched_linear(
            **{**arguments, **dict(zip(names, leaves, strict=True))}, implementation="torch"
        )

    assert torch.autograd.gradcheck(function, [arguments[name].requires_grad_() for name in names])


def any_case(data, most):
    """Draw a case with sizes up to ``most``."""
    groups = data.draw(st.integers(1, 4))
    size = st.integers(1, most)
    pool = data.draw(st.none() | size)
    return Case(
        "any",
        tuple(data.draw(st.integers(0, most)) for _ in range(groups)),
        tuple(data.draw(st.integers(1, pool or most)) for _ in range(groups)),
        data.draw(size),
        data.draw(size),
        pool,
        bias=data.draw(st.booleans()),
        base=data.draw(st.booleans()),
        strided_x=data.draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    case = any_case(data, 30)
    arguments = inputs(case, torch.float64, seed=data.draw(st.integers(0, 99)))
    dy = draw_dy(case, torch.float64)
    actual = value_and_gradients(grouped_sketched_linear, arguments, dy)
    wanted = value_and_gradients(reference, arguments, dy)
    for name in wanted:
        torch.testing.assert_close(actual[name], wanted[name], rtol=1e-9, atol=1e-9)


def test_offsets_and_scales_may_be_tensors():
    arguments = small()
    as_tensors = {
        name: torch.tensor(arguments[name]) for name in ("token_offsets", "rank_offsets", "scale")
    }
    wanted = grouped_sketched_linear(**arguments)
    assert torch.equal(grouped_sketched_linear(**{**arguments, **as_tensors}), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype):
    case = named("shared_rank_rows")
    full = inputs(case, torch.float32)
    dy = torch.ones(sum(case.tokens), case.out_features)

    def under_autocast(function):
        def call(**arguments):
            with torch.autocast("cpu", dtype=dtype):
                return function(**arguments)

        return call

    actual = value_and_gradients(under_autocast(grouped_sketched_linear), full, dy)
    eager = value_and_gradients(under_autocast(reference), full, dy)
    wanted = value_and_gradients(reference, exact(full), dy)
    assert actual["y"].dtype == dtype
    for name, value in actual.items():
        error = (value.double() - wanted[name]).norm() / wanted[name].norm()
        allowed = (eager[name].double() - wanted[name]).norm() / wanted[name].norm()
        assert error <= 2 * allowed + torch.finfo(dtype).eps, name
        if name != "y":
            assert value.dtype == torch.float32


def test_saves_no_copy_of_x_and_of_h_only_each_groups_ranks():
    arguments = inputs(Case("saved", (40, 24), (4, 2), 32, 48, pool=16), torch.float32)
    for name in ("x", "lora_a", "lora_b"):
        arguments[name].requires_grad_()
    arguments["scale"] = torch.tensor(arguments["scale"])
    pointers = {value.data_ptr() for value in arguments.values() if torch.is_tensor(value)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        grouped_sketched_linear(**arguments)
    own = [tensor for tensor in saved if tensor.data_ptr() not in pointers]
    assert [tuple(tensor.shape) for tensor in own] == [(40 * 4 + 24 * 2,)]


def test_cost_is_what_the_flop_counter_counts():
    from fslora_kernels.flops import count_flops

    case = Case("counted", (40, 0, 24), (4, 8, 2), 32, 48, pool=16)
    arguments = inputs(case, torch.float32)
    for name in ("x", "lora_a", "lora_b"):
        arguments[name].requires_grad_()
    with count_flops() as forward:
        y = grouped_sketched_linear(**arguments, implementation="torch")
    with count_flops() as backward:
        y.sum().backward()
    offsets = arguments["token_offsets"], arguments["rank_offsets"]
    for counter, is_backward in ((forward, False), (backward, True)):
        stated = cost(*offsets, 32, 48, backward=is_backward)
        assert counter.total == stated.base_flops + stated.lora_flops


def test_padded_cost_follows_each_groups_ranks_and_tiles():
    offsets = [0, 100, 130], [0, 17, 20]
    padded = cost(*offsets, 32, 48, padded=True, pad_tokens_to=64)
    assert padded.lora_flops == 2 * (128 * 32 + 64 * 16) * (32 + 48)
    useful = cost(*offsets, 32, 48)
    assert useful.lora_flops == 2 * (100 * 17 + 30 * 3) * (32 + 48)
    # x once more and the delta; h written and read; the factors.
    assert useful.lora_bytes == 4 * (130 * 80 + 2 * (100 * 17 + 30 * 3) + 20 * 80)
    assert useful.adapter_bytes == padded.adapter_bytes == 4 * 20 * 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_offsets": [0, 4, 3, 5]}, "token_offsets must be ascending"),
        ({"token_offsets": [1, 3, 3, 5]}, "token_offsets must go from 0 to 5"),
        ({"token_offsets": [0, 3, 3, 6]}, "token_offsets must go from 0 to 5"),
        ({"token_offsets": [0, 3, 5]}, r"\[groups \+ 1\]"),
        ({"token_offsets": [0], "rank_offsets": [0]}, "at least one group"),
        ({"token_offsets": [0.0, 3.0, 3.0, 5.0]}, "token_offsets must be integers"),
        ({"token_offsets": torch.tensor(5)}, "token_offsets must be integers"),
        ({"token_offsets": torch.tensor([0, 3, 3, 5], device="meta")}, "keep the offsets on"),
        ({"rank_offsets": [0, 3, 2, 6]}, "rank_offsets must be ascending"),
        ({"rank_offsets": [0, 2, 3, 5]}, "rank_offsets must go from 0 to 6, the rows of index"),
        ({"index": None}, "rank_offsets must go from 0 to 4, the rows of lora_a"),
        ({"rank_offsets": [0, 2, 2, 6]}, "group 1 has no ranks"),
        ({"index": torch.tensor([0, 1, 0, 0, 1, 4])}, "group 2: .* ranks 0 to 3"),
        ({"index": torch.tensor([-1, 1, 0, 0, 1, 3])}, "group 0: .* ranks 0 to 3"),
        ({"index": torch.tensor([0, 1, 0, 1, 1, 2])}, "group 2: .* ascending"),
        ({"index": torch.tensor([1, 0, 0, 0, 1, 2])}, "group 0: .* ascending"),
        ({"index": torch.zeros(6)}, "int64"),
        ({"index": torch.zeros(6, 1, dtype=torch.int64)}, "one-dimensional"),
        ({"lora_b": torch.zeros(6, 4)}, "rank-major"),
        ({"x": torch.zeros(5, 8)}, "x must be"),
        ({"x": torch.zeros(5, 1, 7)}, "x must be"),
        ({"weight": torch.zeros(7, 6)}, "weight must be"),
        ({"bias": torch.zeros(7)}, "bias must be"),
        ({"bias": torch.zeros(6, device="meta")}, "move both to one device"),
        ({"scale": [1.0, 1.0]}, r"scale must be \[3\]"),
        ({"scale": 1.0}, r"scale must be \[3\]"),
        ({"scale": torch.ones(3, requires_grad=True)}, "not differentiated"),
        ({"implementation": "cuda"}, "unknown implementation"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        grouped_sketched_linear(**small(**change))


def test_a_request_is_obeyed_or_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="need a GPU"):
        grouped_sketched_linear(**small(), implementation="triton")


def test_the_cases_cover_groups_without_tokens_at_every_place():
    places = {
        (number == 0, number == len(case.tokens) - 1)
        for case in CASES
        for number, tokens in enumerate(case.tokens)
        if tokens == 0 and sum(case.tokens)
    }
    assert places == {(True, False), (False, False), (False, True)}


def test_groups_may_share_one_adapter_whole():
    arguments = small(rank_offsets=[0, *accumulate([4] * 3)], index=torch.arange(4).repeat(3))
    dy = torch.ones(5, 6, dtype=torch.float64)
    actual = value_and_gradients(grouped_sketched_linear, arguments, dy)
    wanted = value_and_gradients(reference, arguments, dy)
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, msg=name)


def test_no_tile_or_split_crosses_a_group_and_every_token_is_in_one_of_each():
    tokens, ranks = (0, 0, 700, 733), (0, 3, 8, 40)  # no tokens, many, few
    laid_out = plan(tokens, ranks, (64, 32, 32, 32), torch.device("cpu"))
    assert [bucket.padded for bucket in laid_out.buckets] == [16, 32]
    many, few = laid_out.buckets
    assert few.tiles.tolist() == [[2, 700, 732, 0, 8, 32], [2, 732, 733, 32, 8, 32]]
    assert few.splits.tolist() == [[700, 733, 0, 10, 32]]
    assert many.tiles[:, 1].tolist() == list(range(0, 700, 64))
    assert many.tiles[:, 2].tolist() == [*range(64, 700, 64), 700]
    assert many.splits.tolist() == [[0, 512, 0, 0, 5], [512, 700, 512, 5, 5]]
    assert laid_out.parts[:9].tolist() == [
        *[[0, 0, 0]] * 3,
        *[[rank, 5, 2] for rank in range(5)],
        [10, 32, 1],
    ]
    assert (laid_out.partial_rows, laid_out.h_size) == (42, 700 * 16 + 33 * 32)
