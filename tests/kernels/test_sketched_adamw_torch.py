import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora_kernels import sketched_adamw
from fslora_kernels.ops.sketched_adamw import cost
from fslora_kernels.ops.sketched_adamw.cases import CASES, Case, inputs
from fslora_kernels.ops.sketched_adamw.reference import reference
from fslora_kernels.testing import check_error_budget

WRITTEN = ("parameter", "exp_avg", "exp_avg_sq", "steps")
BY_NAME = {case.name: case for case in CASES}


def copied(arguments):
    """The same arguments in storages of their own, strides kept."""
    return {k: v.clone() if torch.is_tensor(v) else v for k, v in arguments.items()}


def outside(case, index):
    others = torch.ones(case.rank, dtype=torch.bool)
    others[index] = False
    return others


class SketchedAdamWContract:
    """What every backend must do: subclassed once per backend."""

    implementation: str
    dtypes: tuple[torch.dtype, ...]

    def step(self, arguments):
        arguments = copied(arguments)
        sketched_adamw(**arguments, implementation=self.implementation)
        return {name: arguments[name] for name in WRITTEN}

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_one_step_within_the_budget(self, case):
        for dtype in self.dtypes:
            arguments = inputs(case, dtype)
            exact = reference(
                **{
                    name: value.double() if torch.is_tensor(value) and name != "index" else value
                    for name, value in arguments.items()
                }
            )
            eager = reference(**arguments)
            actual = self.step(arguments)
            assert torch.equal(actual["steps"], eager["steps"])
            for name in WRITTEN[:3]:
                check_error_budget(
                    actual[name], eager[name], exact[name], name=f"{case.name} {dtype} {name}"
                )
                assert actual[name].stride() == arguments[name].stride()

    @pytest.mark.parametrize("name", ["half", "half_as_columns", "odd_everything", "one_row"])
    def test_other_rows_keep_their_bits_whatever_their_gradient(self, name):
        case = BY_NAME[name]
        for dtype in self.dtypes:
            arguments = inputs(case, dtype)
            others = outside(case, arguments["index"])
            if not case.compact:
                arguments["gradient"][others] = float("nan")
            actual = self.step(arguments)
            for written in WRITTEN:
                assert torch.equal(actual[written][others], arguments[written][others]), written
                changed = actual[written][~others] != arguments[written][~others]
                assert changed.float().mean() > 0.9, written

    def test_a_compact_gradient_gives_the_same_bits(self):
        for name in ("half", "half_as_columns"):
            arguments = inputs(BY_NAME[name], torch.float32)
            full = self.step(arguments)
            compact = self.step(
                {**arguments, "gradient": arguments["gradient"][arguments["index"]]}
            )
            for written in WRITTEN:
                assert torch.equal(compact[written], full[written]), written

    def test_settings_at_their_limits(self):
        case = BY_NAME["half"]
        for change in (
            {"betas": (0.0, 0.0)},
            {"betas": (0, 0.999), "weight_decay": 0},
            {"lr": 0},
            {"betas": (0.99999, 0.9999999)},
        ):
            arguments = {**inputs(case, torch.float32), **change}
            exact = reference(
                **{
                    name: value.double() if torch.is_tensor(value) and name != "index" else value
                    for name, value in arguments.items()
                }
            )
            actual = self.step(arguments)
            for name in WRITTEN[:3]:
                torch.testing.assert_close(
                    actual[name].double(), exact[name], rtol=2e-6, atol=1e-7, msg=str(change)
                )

    def test_autograd_sees_that_the_parameter_changed(self):
        arguments = copied(inputs(BY_NAME["half"], torch.float32))
        leaf = arguments["parameter"].requires_grad_()
        y = leaf.square().sum()
        sketched_adamw(**{**arguments, "parameter": leaf}, implementation=self.implementation)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


class TestTorch(SketchedAdamWContract):
    implementation = "torch"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_row_is_stepped_as_by_an_adamw_of_its_own(data):
    """Index sets that change from step to step, against one torch optimizer per row."""
    ranks, features = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    start = torch.randn(ranks, features, generator=generator, dtype=torch.float64)
    settings_ = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    rows = [torch.nn.Parameter(row.clone()) for row in start]
    alone = [torch.optim.AdamW([row], foreach=False, **settings_) for row in rows]
    parameter, (m, v) = start.clone(), torch.zeros(2, ranks, features, dtype=torch.float64)
    steps = torch.zeros(ranks, dtype=torch.int64)
    for _ in range(data.draw(st.integers(1, 6))):
        chosen = sorted(data.draw(st.sets(st.integers(0, ranks - 1), min_size=1)))
        gradient = torch.randn(ranks, features, generator=generator, dtype=torch.float64)
        for rank in chosen:
            rows[rank].grad = gradient[rank].clone()
            alone[rank].step()
        index = None if len(chosen) == ranks else torch.tensor(chosen)
        sketched_adamw(parameter, gradient, m, v, steps, index, **settings_)
    torch.testing.assert_close(parameter, torch.stack(list(rows)).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_row_at_once_is_torchs_adamw(dtype):
    arguments = inputs(BY_NAME["every_row"], dtype)
    leaf = torch.nn.Parameter(arguments["parameter"].clone())
    rule = {name: arguments[name] for name in ("lr", "betas", "eps", "weight_decay")}
    theirs = torch.optim.AdamW([leaf], foreach=False, **rule)
    ours, moments = arguments["parameter"].clone(), torch.zeros(2, 16, 64, dtype=dtype)
    steps = torch.zeros(16)
    for scale in (1.0, -0.5, 3.0, 0.1):
        leaf.grad = arguments["gradient"] * scale
        theirs.step()
        sketched_adamw(ours, leaf.grad, *moments, steps, **rule)
    # Torch's 1 − betaᵗ loses digits, in float64 too: the step differs by as many, the moments not.
    unit = torch.finfo(dtype).eps
    rounding = 2 * unit if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, leaf.detach(), rtol=0.0, atol=rounding)
    for moment, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
        torch.testing.assert_close(moment, theirs.state[leaf][name], rtol=4 * unit, atol=unit**2)


def test_cost_is_of_the_selected_rows():
    case = Case("cost", 16, 100, 4, compact=True, counts=torch.float32)
    arguments = inputs(case, torch.bfloat16)
    index = arguments["index"]
    read_and_written = sum(2 * arguments[name][index].nbytes for name in WRITTEN)
    stated = cost(4, 100, itemsize_bytes=2)
    assert stated.bytes == read_and_written + arguments["gradient"].nbytes + index.nbytes
    assert stated.flops == 14 * 4 * 100
    assert cost(8, 100, itemsize_bytes=2).bytes == 2 * stated.bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameter": torch.zeros(3)}, r"parameter must be \[R, F\]"),
        ({"parameter": torch.zeros(4, 6, dtype=torch.int64)}, "floating-point"),
        ({"gradient": torch.zeros(3, 6)}, r"\[4, 6\] or, for the selected rows alone, \[2, 6\]"),
        ({"gradient": torch.zeros(6, 4)}, "gradient must be"),
        ({"exp_avg": torch.zeros(2, 6)}, r"exp_avg must be torch.float32 \[4, 6\]"),
        ({"exp_avg_sq": torch.zeros(4, 6).double()}, "exp_avg_sq must be torch.float32"),
        ({"steps": torch.zeros(())}, "one count per row"),
        ({"steps": torch.zeros(4, dtype=torch.int32)}, "int64 or float32"),
        ({"index": torch.tensor([0, 4])}, "ranks 0 to 3"),
        ({"index": torch.tensor([2, 1])}, "ascending"),
        ({"index": torch.tensor([1.0])}, "int64"),
        ({"steps": torch.zeros(4, device="meta")}, "steps is on meta"),
        ({"lr": -1e-3}, "lr must be"),
        ({"lr": torch.tensor(0.1)}, "lr must be a number"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"eps": float("nan")}, "eps must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"implementation": "cuda"}, "unknown implementation"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(change, message):
    good = {
        "parameter": torch.ones(4, 6),
        "gradient": torch.ones(2, 6),
        "exp_avg": torch.zeros(4, 6),
        "exp_avg_sq": torch.zeros(4, 6),
        "steps": torch.zeros(4),
        "index": torch.tensor([1, 3]),
        "lr": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        sketched_adamw(**{**good, **change})
    assert good["parameter"].eq(1).all()
    assert good["steps"].eq(0).all()
    sketched_adamw(**good)
    assert good["steps"].tolist() == [0, 1, 0, 1]
