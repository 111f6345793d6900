"""Two stages of ``benchmarks.gpu``: every operation over its cases, by every implementation, twice.

"correctness" is ``sketched_linear`` without dropout; "operations" is the rest. Each case runs two
times on poisoned memory: the bits must be the same, and the result within its budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import Row, Setting, spread
from fslora_kernels import (
    Projection,
    grouped_sketched_linear,
    scatter_mean,
    shared_sketched_linear,
    sketched_adamw,
    sketched_linear,
)
from fslora_kernels.ops.grouped_sketched_linear import cases as grouped_cases
from fslora_kernels.ops.grouped_sketched_linear.reference import reference as grouped_reference
from fslora_kernels.ops.scatter_mean import cases as scatter_cases
from fslora_kernels.ops.scatter_mean.reference import reference as scatter_reference
from fslora_kernels.ops.shared_sketched_linear.reference import reference as shared_reference
from fslora_kernels.ops.sketched_adamw import cases as adamw_cases
from fslora_kernels.ops.sketched_adamw.reference import reference as adamw_reference
from fslora_kernels.ops.sketched_linear.cases import CASES, Case
from fslora_kernels.ops.sketched_linear.reference import reference
from fslora_kernels.testing import (
    check_error_budget,
    inputs,
    poisoned_allocations,
    value_and_gradients,
)

Results = dict[str, Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGE_CASES = (
    Case("8B_q_view", 4096, 4096, 4096, 64, 8),
    Case("8B_down_compact", 2048, 14336, 4096, 16, None, rank_major_b=True),
    Case("many_tokens", 70_001, 256, 512, 32, 32),
)


class SharedCase(NamedTuple):
    """Projections of one input."""

    name: str
    projections: tuple[Case, ...]


SHARED_CASES = (
    SharedCase(
        "qkv",
        (
            Case("q", 40, 48, 64, 16, 4, bias=True),
            Case("k", 40, 48, 32, 8, None, rank_major_b=True),
            Case("v", 40, 48, 29, 16, 1, base=False),
        ),
    ),
    SharedCase("gate_up", (Case("gate", 33, 64, 96, 8, 8), Case("up", 33, 64, 96, 8, 8))),
)
DRY_CASES = {
    "sketched_linear": ("half", "odd_everything", "compact_leaf", "tensor_scale", "dropout"),
    "scatter_mean": ("odd_features", "strided"),
    "sketched_adamw": ("half_as_columns", "odd_everything"),
    "grouped_sketched_linear": ("one_group_bias_by_index", "middle_without_tokens"),
    "shared_sketched_linear": ("qkv",),
}


@dataclass(frozen=True, slots=True)
class Task:
    """One case of one operation.

    Attributes:
        operation: its name.
        case: one of those that the operation declares.
        dtype: of everything.
        implementation: that is asked for.
        device: torch's device type.
    """

    operation: str
    case: Any
    dtype: torch.dtype
    implementation: str
    device: str

    @property
    def refused_by_design(self) -> bool:
        """Whether a kernel may refuse it; on a GPU a refusal of what models have is a defect."""
        features = (getattr(self.case, name, 0) for name in ("in_features", "out_features"))
        masked = self.dtype == torch.float32 and getattr(self.case, "dropout", 0.0) > 0.0
        return self.device != "cuda" or masked or any(size % 16 for size in features)


# -- stages ----------------------------------------------------------------------------------------


def correctness(setting: Setting) -> Iterator[Row]:
    """Check ``sketched_linear`` without dropout, also in sizes of models."""
    cases = [case for case in CASES if not case.dropout]
    chosen = [*_chosen("sketched_linear", cases, setting), *(() if setting.dry else LARGE_CASES)]
    yield from _check_all(_tasks("sketched_linear", chosen, setting), setting)


def operations(setting: Setting) -> Iterator[Row]:
    """Check dropout, and every other operation."""
    every: dict[str, Sequence[Any]] = {
        "sketched_linear": [case for case in CASES if case.dropout],
        "grouped_sketched_linear": grouped_cases.CASES,
        "shared_sketched_linear": SHARED_CASES,
        "scatter_mean": scatter_cases.CASES,
        "sketched_adamw": adamw_cases.CASES,
    }
    tasks = [
        task
        for operation, cases in every.items()
        for task in _tasks(operation, _chosen(operation, cases, setting), setting)
    ]
    yield from _check_all(tasks, setting)


def _chosen(operation: str, cases: Sequence[Any], setting: Setting) -> list[Any]:
    return [case for case in cases if not setting.dry or case.name in DRY_CASES[operation]]


def _tasks(operation: str, cases: Iterable[Any], setting: Setting) -> Iterator[Task]:
    # Torch's products are all that shared_sketched_linear has.
    shared = operation == "shared_sketched_linear"
    implementations = ["torch"] if shared else setting.implementations
    for case, dtype, implementation in product(cases, DTYPES, implementations):
        yield Task(operation, case, dtype, implementation, setting.device)


def _check_all(tasks: Iterable[Task], setting: Setting) -> Iterator[Row]:
    """Give each process whole cases: what two dtypes compile differs, two cases may share it."""
    groups = groupby(tasks, lambda task: (task.operation, task.case.name))
    yield from spread(check, [tuple(group) for _, group in groups], setting)


def check(tasks: Sequence[Task]) -> list[Row]:
    """Check tasks one after the other."""
    return [_check_one(task) for task in tasks]


def _check_one(task: Task) -> Row:
    dtype = str(task.dtype).removeprefix("torch.")
    row: Row = {"what": f"{task.implementation} {task.operation} {dtype} {task.case.name}"}
    try:
        CHECKS[task.operation](task)
    except NotImplementedError as refusal:
        row |= {"ok": task.refused_by_design, "refused": str(refusal)}
        return row if row["ok"] else row | {"error": f"refused: {refusal}"}
    except Exception as error:  # recorded, and the other cases go on
        return row | {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return row | {"ok": True}


# -- one operation ---------------------------------------------------------------------------------


def _twice(run: Callable[[], Results]) -> Results:
    """Return the results of the first of two runs that gave the same bits."""
    with poisoned_allocations():
        first, second = run(), run()
    for name, value in first.items():
        if bool(value.isnan().any()):
            raise AssertionError(f"{name} has NaN: an element was not written, or is wrong")
        if not torch.equal(value, second[name]):
            raise AssertionError(f"{name}: two runs differ in their bits")
    return first


def _check_budget(actual: Results, eager: Results, exact: Results) -> None:
    for name, value in actual.items():
        check_error_budget(value, eager[name], exact[name], name=name)


def _exact(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the same values in float64."""
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def _draw(task: Task, *shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(task.device, task.dtype)


def _check_sketched_linear(task: Task) -> None:
    case, call = task.case, partial(sketched_linear, implementation=task.implementation)
    arguments = inputs(case, task.dtype, device=task.device)
    dropping: dict[str, Any] = {}
    masked: dict[str, Any] = {}
    if case.dropout:
        dropping = {"dropout": case.dropout, "seed": 7}
        # Factors that change nothing show which features are kept.
        one = torch.eye(case.in_features, device=task.device, dtype=task.dtype)
        x = torch.ones_like(arguments["x"])
        kept = call(x=x, weight=None, lora_a=one, lora_b=one, **dropping).bool()
        masked = {"kept": kept, "dropout": case.dropout}
    dy = _draw(task, case.tokens, case.out_features)
    actual = _twice(lambda: value_and_gradients(call, arguments | dropping, dy))
    eager = value_and_gradients(reference, arguments | masked, dy)
    exact = value_and_gradients(reference, _exact(arguments) | masked, dy.double())
    _check_budget(actual, eager, exact)


def _check_grouped(task: Task) -> None:
    call = partial(grouped_sketched_linear, implementation=task.implementation)
    arguments = grouped_cases.inputs(task.case, task.dtype, device=task.device)
    dy = _draw(task, sum(task.case.tokens), task.case.out_features)
    actual = _twice(lambda: value_and_gradients(call, arguments, dy))
    eager = value_and_gradients(grouped_reference, arguments, dy)
    exact = value_and_gradients(grouped_reference, _exact(arguments), dy.double())
    _check_budget(actual, eager, exact)


def _check_shared(task: Task) -> None:
    drawn = [
        inputs(case, task.dtype, device=task.device, seed=number)
        for number, case in enumerate(task.case.projections)
    ]
    dys = [_draw(task, c.tokens, c.out_features, seed=n) for n, c in enumerate(task.case[1])]

    def run(function: Callable[..., Sequence[Tensor]], dtype: torch.dtype) -> Results:
        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

        names = ("lora_a", "lora_b", "weight", "bias")
        x = drawn[0]["x"].detach().to(dtype).requires_grad_()
        projections = [
            Projection(**{n: leaf(d[n]) for n in names}, index=d["index"], scale=1.5) for d in drawn
        ]
        outputs = function(x, projections)
        leaves = {"x": x} | {
            f"{name} {number}": getattr(p, name)
            for number, p in enumerate(projections)
            for name in names
            if getattr(p, name) is not None
        }
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), [dy.to(dtype) for dy in dys]
        )
        found = {f"y {number}": y.detach() for number, y in enumerate(outputs)}
        return found | dict(zip(leaves, gradients, strict=True))

    actual = _twice(lambda: run(shared_sketched_linear, task.dtype))
    _check_budget(actual, run(shared_reference, task.dtype), run(shared_reference, torch.float64))


def _check_scatter_mean(task: Task) -> None:
    arguments = scatter_cases.inputs(task.case, task.dtype, device=task.device)
    actual = _twice(lambda: {"mean": scatter_mean(**arguments, implementation=task.implementation)})
    # The same bits on every device.
    wanted = scatter_reference(**scatter_cases.inputs(task.case, task.dtype))
    if not torch.equal(actual["mean"].cpu(), wanted):
        raise AssertionError("the mean does not have the bits of the sequential sum")


def _check_adamw(task: Task) -> None:
    case, written = task.case, ("parameter", "exp_avg", "exp_avg_sq", "steps")
    arguments = adamw_cases.inputs(case, task.dtype, device=task.device)
    others = torch.ones(case.rank, dtype=torch.bool, device=task.device)
    others[slice(None) if arguments["index"] is None else arguments["index"]] = False
    if not case.compact:
        arguments["gradient"][others] = float("nan")

    def run() -> Results:
        own = {n: v.clone() if torch.is_tensor(v) else v for n, v in arguments.items()}
        sketched_adamw(**own, implementation=task.implementation)
        return {name: own[name] for name in written}

    actual = _twice(run)
    eager, exact = adamw_reference(**arguments), adamw_reference(**_exact(arguments))
    for name in written:
        if not torch.equal(actual[name][others], arguments[name][others]):
            raise AssertionError(f"{name}: rows outside the index have other bits")
    if not torch.equal(actual.pop("steps"), eager["steps"]):
        raise AssertionError("steps are counted wrongly")
    _check_budget(actual, eager, exact)


CHECKS: dict[str, Callable[[Task], None]] = {
    "sketched_linear": _check_sketched_linear,
    "grouped_sketched_linear": _check_grouped,
    "shared_sketched_linear": _check_shared,
    "scatter_mean": _check_scatter_mean,
    "sketched_adamw": _check_adamw,
}
