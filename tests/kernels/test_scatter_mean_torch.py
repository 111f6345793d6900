from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.aggregation import mean_update
from fslora.protocol import LoRAWeights, Sketch
from fslora_kernels import scatter_mean
from fslora_kernels.ops.scatter_mean import cost
from fslora_kernels.ops.scatter_mean.backend_torch import sum_in_place, sum_sorted
from fslora_kernels.ops.scatter_mean.cases import CASES, Case, inputs
from fslora_kernels.ops.scatter_mean.op import Arguments
from fslora_kernels.ops.scatter_mean.reference import reference


class ScatterMeanContract:
    """What every backend must do: subclassed once per backend."""

    implementation: str
    dtypes: tuple[torch.dtype, ...]

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_the_bits_of_the_sequential_sum(self, case):
        for dtype in self.dtypes:
            arguments = inputs(case, dtype)
            actual = scatter_mean(**arguments, implementation=self.implementation)
            wanted = reference(**arguments)
            assert actual.dtype == dtype
            assert torch.equal(actual, wanted), dtype

    def test_rows_are_added_in_the_order_in_which_they_come(self):
        # In float32 (2^24 + 1) + 1 stays 2^24, while 1 + 1 + 2^24 does not; rank 1 stays empty.
        rows = torch.tensor([[2.0**24], [1.0], [1.0], [1.0], [1.0], [2.0**24]])
        index = torch.tensor([2, 2, 0, 2, 0, 0])
        mean = scatter_mean(rows, index, 3, denominator=1, implementation=self.implementation)
        assert mean.flatten().tolist() == [2.0**24 + 2, 0.0, 2.0**24]

    def test_low_precision_is_rounded_once(self):
        rows = torch.full((300, 3), 1.0 + 2.0**-9, dtype=torch.float16)
        index = torch.zeros(300, dtype=torch.int64)
        mean = scatter_mean(rows, index, 1, denominator=300, implementation=self.implementation)
        assert torch.equal(mean, rows[:1])

    def test_a_rank_of_weight_zero_is_zero_whatever_its_rows(self):
        rows = torch.tensor([[float("nan")], [float("inf")], [3.0]])
        weights = torch.tensor([0.0, 2.0])
        index = torch.tensor([0, 0, 1])
        mean = scatter_mean(rows, index, 2, denominator=weights, implementation=self.implementation)
        assert mean.flatten().tolist() == [0.0, 1.5]


class TestTorch(ScatterMeanContract):
    implementation = "torch"
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_is_the_mean_of_each_ranks_rows(case):
    arguments = inputs(case, torch.float64)
    rows, index, denominator = (arguments[name] for name in ("rows", "index", "denominator"))
    mean = reference(**arguments)
    for rank in range(case.size):
        divisor = denominator[rank].item() if torch.is_tensor(denominator) else denominator
        wanted = rows[index == rank].sum(0) / divisor if divisor else torch.zeros(case.features)
        torch.testing.assert_close(mean[rank], wanted.double(), rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_sorting_for_a_gpu_gives_the_bits_of_adding_in_place(data):
    ranks = data.draw(st.integers(1, 9))
    index = torch.tensor(data.draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=30)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rows = torch.randn(len(index), data.draw(st.integers(1, 20)), generator=generator)
    arguments = Arguments(rows, index, torch.ones(ranks))
    assert torch.equal(sum_sorted(arguments), sum_in_place(arguments))


def test_one_call_gives_the_bits_of_folding_updates_one_at_a_time():
    case = Case("updates", (2, 5, 3), 17, 6)
    factors = [inputs(case, torch.float32, seed=seed) for seed in (0, 1)]
    index = factors[0]["index"].split(case.sketch_sizes)
    pairs = zip(*(factor["rows"].split(case.sketch_sizes) for factor in factors), strict=True)
    tasks = [
        SimpleNamespace(client_id=client, adapters={}, sketches={"layer": Sketch(ranks, 6)})
        for client, ranks in enumerate(index)
    ]
    updates = [
        SimpleNamespace(client_id=client, delta={"layer": LoRAWeights(*pair)}, extras={})
        for client, pair in enumerate(pairs)
    ]
    shapes = {"layer": LoRAWeights(torch.empty(6, 17), torch.empty(6, 17))}
    folded, _ = mean_update(shapes, {}, tasks, updates)
    for factor, wanted in zip(factors, folded["layer"], strict=True):
        mean = scatter_mean(factor["rows"], torch.cat(index), 6, denominator=3)
        assert torch.equal(mean, wanted)


def test_cost_counts_every_element_once():
    stated = cost(5, 100, 8, itemsize_bytes=2)
    assert stated.flops == 5 * 100 + 8 * 100
    rows, index, weights, mean = (
        torch.zeros(5, 100, dtype=torch.float16),
        torch.zeros(5, dtype=torch.int64),
        torch.ones(8),
        torch.zeros(8, 100, dtype=torch.float16),
    )
    assert stated.bytes == sum(tensor.nbytes for tensor in (rows, index, weights, mean))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(3)}, r"rows must be \[N, F\]"),
        ({"rows": torch.zeros(2, 4, dtype=torch.int64)}, "floating-point"),
        ({"index": torch.tensor([0])}, r"index must be int64 \[2\]"),
        ({"index": torch.tensor([0, 1], dtype=torch.int32)}, "index must be int64"),
        ({"index": torch.tensor([0, 3])}, "ranks 0 to 2"),
        ({"index": torch.tensor([-1, 0])}, "from -1 to 0"),
        ({"index": torch.tensor([0, 1], device="meta")}, "index is on meta"),
        ({"size": 0}, "size must be at least 1"),
        ({"denominator": 0}, "positive"),
        ({"denominator": float("nan")}, "positive"),
        ({"denominator": float("inf")}, "positive"),
        ({"denominator": torch.ones(2)}, r"a number or a tensor \[3\]"),
        ({"rows": torch.zeros(2, 4, requires_grad=True)}, r"rows.detach\(\)"),
        ({"denominator": torch.ones(3, requires_grad=True)}, r"denominator.detach\(\)"),
        ({"implementation": "cuda"}, "unknown implementation"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {"rows": torch.zeros(2, 4), "index": torch.tensor([0, 2]), "size": 3, "denominator": 2}
    scatter_mean(**good)
    with pytest.raises(ValueError, match=message):
        scatter_mean(**{**good, **change})
