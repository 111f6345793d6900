"""Three stages of ``benchmarks.gpu``: every operation over its cases, by every implementation.

"correctness" is ``sketched_linear`` without dropout; "operations" is the rest; "tuned" repeats what
a table of measured tiles has changed. Each case runs twice or more on poisoned memory: the bits
must be the same, and the result within its budget. What breaks a process's context of the GPU is
the last thing that is judged there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby, product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import Row, Setting, lost_device, spread
from benchmarks.gpu_cases import (
    DRY_CASES,
    LARGE_CASES,
    SHARED_CASES,
    Task,
    long_tasks,
    tuned_tasks,
)
from benchmarks.timing import device_name
from fslora_kernels import (
    Projection,
    grouped_sketched_linear,
    scatter_mean,
    shared_sketched_linear,
    sketched_adamw,
    sketched_linear,
)
from fslora_kernels._dispatch import load
from fslora_kernels.ops.grouped_sketched_linear import cases as grouped_cases
from fslora_kernels.ops.grouped_sketched_linear.reference import reference as grouped_reference
from fslora_kernels.ops.scatter_mean import cases as scatter_cases
from fslora_kernels.ops.scatter_mean.reference import reference as scatter_reference
from fslora_kernels.ops.shared_sketched_linear.reference import reference as shared_reference
from fslora_kernels.ops.sketched_adamw import cases as adamw_cases
from fslora_kernels.ops.sketched_adamw.reference import reference as adamw_reference
from fslora_kernels.ops.sketched_linear.cases import CASES
from fslora_kernels.ops.sketched_linear.op import BACKENDS, Arguments
from fslora_kernels.ops.sketched_linear.reference import reference
from fslora_kernels.testing import (
    check_error_budget,
    inputs,
    poisoned_allocations,
    value_and_gradients,
)

Results = dict[str, Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LOST: list[str] = []  # what broke this process's context of the GPU
# -- stages ----------------------------------------------------------------------------------------


def correctness(setting: Setting) -> Iterator[Row]:
    """Check ``sketched_linear`` without dropout, also in sizes of models."""
    cases = [case for case in CASES if not case.dropout]
    tasks = list(_tasks("sketched_linear", _chosen("sketched_linear", cases, setting), setting))
    if not setting.dry:
        long = long_tasks(setting.device, setting.implementations, dropout=False)
        tasks = [*_tasks("sketched_linear", LARGE_CASES, setting), *long, *tasks]
    yield from _check_all(tasks, setting)


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
    if not setting.dry:
        tasks = [*long_tasks(setting.device, setting.implementations, dropout=True), *tasks]
    yield from _check_all(tasks, setting)


def tuned(setting: Setting) -> Iterator[Row]:
    """Repeat the long cases that run in tiles which the device's table has changed."""
    row: Row = {"what": "tiles", "ok": True}
    if setting.dry or "triton" not in setting.implementations:
        yield row | {"refused": "no table is used here"}
        return
    from fslora_kernels import tuning
    from fslora_kernels._launch import target_of
    from fslora_kernels.ops.sketched_linear.configurations import TILES

    table, target = tuning.measured_tiles(device_name()), target_of(torch.device("cuda"))[0]
    changed = [
        (kernel, arithmetic, ranks)
        for (kernel, arithmetic, ranks), tiles in table.items()
        if tiles != TILES[kernel, target, arithmetic][ranks]
    ]
    yield row | {"line": f"{len(changed)} of {len(table)} entries of the table are no default"}
    yield from _check_all(tuned_tasks(setting.device, changed), setting)


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
    row: Row = {"what": task.what}
    if _LOST:
        return row | {"ok": True, "refused": f"not judged, in the same process as {_LOST[0]}"}
    try:
        with _in_tf32() if task.tf32 else nullcontext():
            CHECKS[task.operation](task)
    except NotImplementedError as refusal:
        row |= {"ok": task.refused_by_design, "refused": str(refusal)}
        return row if row["ok"] else row | {"error": f"refused: {refusal}"}
    except Exception as error:  # recorded, and the other cases go on
        lost = lost_device()
        if lost is not None:
            _LOST.append(f"{task.what}: {lost}")
        return row | {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return row | {"ok": True}


@contextmanager
def _in_tf32() -> Iterator[None]:
    """Multiply float32 on a GPU in TF32 for a while."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# -- one operation ---------------------------------------------------------------------------------


def _twice(run: Callable[[], Results], runs: int = 2) -> Results:
    """Return the results of the first of several runs that gave the same bits."""
    with poisoned_allocations():
        first = run()
        for name, value in first.items():
            if bool(value.isnan().any()):
                raise AssertionError(f"{name} has NaN: an element was not written, or is wrong")
        for _ in range(runs - 1):
            for name, value in run().items():
                if not torch.equal(first[name], value):
                    raise AssertionError(f"{name}: two runs differ in their bits")
    return first


def _check_budget(actual: Results, eager: Results, exact: Results, *, factor: float = 2.0) -> None:
    for name, value in actual.items():
        check_error_budget(value, eager[name], exact[name], name=name, factor=factor)


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
    arguments |= {n: arguments[n].to(task.factors) for n in ("lora_a", "lora_b") if task.factors}
    dropping: dict[str, Any] = {}
    masked: dict[str, Any] = {}
    if case.dropout:
        dropping = {"dropout": case.dropout, "seed": 7}
        masked = {"kept": _kept(task, arguments), "dropout": case.dropout}
    dy = _draw(task, case.tokens, case.out_features)
    actual = _twice(lambda: value_and_gradients(call, arguments | dropping, dy), task.runs)
    eager = value_and_gradients(reference, arguments | masked, dy)
    exact = value_and_gradients(reference, _exact(arguments) | masked, dy.double())
    _check_budget(actual, eager, exact, factor=task.factor)


def _kept(task: Task, arguments: dict[str, Any]) -> Tensor:
    """Return the mask that an implementation draws: bool, of x's shape."""
    x, a, b = (arguments[name] for name in ("x", "lora_a", "lora_b"))
    call = Arguments(x, None, a, b.t(), None, None, 1.0, task.case.dropout, 7)
    backend = load(BACKENDS[task.implementation])
    if task.implementation == "torch":
        kept: Tensor = backend._mask(call)
        return kept.bool()
    mask: Tensor = backend.draw_mask(call)
    features = torch.arange(x.shape[1], device=x.device)
    return (mask[:, features // 8] >> (features % 8)) & 1 != 0


def _check_grouped(task: Task) -> None:
    call = partial(grouped_sketched_linear, implementation=task.implementation)
    arguments = grouped_cases.inputs(task.case, task.dtype, device=task.device)
    dy = _draw(task, sum(task.case.tokens), task.case.out_features)
    actual = _twice(lambda: value_and_gradients(call, arguments, dy))
    eager = value_and_gradients(grouped_reference, arguments, dy)
    exact = value_and_gradients(grouped_reference, _exact(arguments), dy.double())
    _check_budget(actual, eager, exact, factor=task.factor)


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
