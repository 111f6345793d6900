"""The checks of every operation: what is right passes, and each kind of fault is seen."""

import dataclasses

import pytest
import torch

from benchmarks import gpu, gpu_cases, gpu_operations
from benchmarks.gpu import Setting
from benchmarks.gpu_operations import DRY_CASES, Task
from fslora_kernels.ops.grouped_sketched_linear import cases as grouped_cases
from fslora_kernels.ops.scatter_mean import cases as scatter_cases
from fslora_kernels.ops.sketched_adamw import cases as adamw_cases
from fslora_kernels.ops.sketched_linear.cases import CASES
from fslora_kernels.ops.sketched_linear.op import PADDED_RANKS, padded_ranks


def task(operation, dtype=torch.float32, device="cpu", **kind):
    cases = {
        "sketched_linear": CASES,
        "grouped_sketched_linear": grouped_cases.CASES,
        "shared_sketched_linear": gpu_operations.SHARED_CASES,
        "scatter_mean": scatter_cases.CASES,
        "sketched_adamw": adamw_cases.CASES,
    }[operation]
    name = kind.get("name", DRY_CASES[operation][-1])
    case = next(case for case in cases if case.name == name)
    return Task(operation, case, dtype, "torch", device)


def test_checks_are_spread_over_processes_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_WORKERS", 1)
    setting = Setting(dry=False, out=tmp_path)
    tasks = [(task("scatter_mean"), task("sketched_adamw")), (task("shared_sketched_linear"),)]
    rows = list(gpu.spread(gpu_operations.check, tasks, setting))
    assert sorted(row["what"].split()[1] for row in rows if row["ok"]) == [
        "scatter_mean",
        "shared_sketched_linear",
        "sketched_adamw",
    ]


def wrong_scale(right):
    def call(*args, scale=1.0, **arguments):
        scale = [1.01 * one for one in scale] if isinstance(scale, list) else 1.01 * scale
        return right(*args, scale=scale, **arguments)

    return call


def wrong_projections(right):
    def call(x, projections):
        return right(x, [dataclasses.replace(p, scale=1.01 * p.scale) for p in projections])

    return call


def hole(right):
    def call(*args, **arguments):
        mean = right(*args, **arguments)
        return torch.cat([mean[:-1], torch.empty(1, mean.shape[1])])

    return call


def other_bits(right):
    def call(*args, **arguments):
        mean = right(*args, **arguments)
        return torch.nextafter(mean, torch.full_like(mean, 9.0))

    return call


def decays_every_row(right):
    def call(parameter, *args, **arguments):
        right(parameter=parameter, **arguments)
        parameter.mul_(1.0 - 1e-6)

    return call


def counts_every_row(right):
    def call(steps, index, **arguments):
        right(steps=steps, index=index, **arguments)
        steps[index] += 1

    return call


def mask_of_the_moment(right):
    seeds = iter(range(100))

    def call(*args, seed, **arguments):
        return right(*args, seed=next(seeds), **arguments)

    return call


def another_mask(right):
    def call(x, *args, seed, **arguments):
        return right(x, *args, seed=seed + int(not x.eq(1).all()), **arguments)

    return call


@pytest.mark.parametrize(
    ("operation", "change", "message"),
    [
        ("sketched_linear", wrong_scale, "exceeds its budget"),
        ("sketched_linear", mask_of_the_moment, "two runs differ in their bits"),
        ("sketched_linear", another_mask, "exceeds its budget"),
        ("grouped_sketched_linear", wrong_scale, "exceeds its budget"),
        ("shared_sketched_linear", wrong_projections, "exceeds its budget"),
        ("scatter_mean", hole, "was not written"),
        ("scatter_mean", other_bits, "bits of the sequential sum"),
        ("sketched_adamw", decays_every_row, "rows outside the index have other bits"),
        ("sketched_adamw", counts_every_row, "steps are counted wrongly"),
    ],
)
def test_a_wrong_operation_is_red(monkeypatch, operation, change, message):
    one = task(operation)
    if operation == "sketched_linear" and change is not wrong_scale:
        one = task(operation, name="dropout")
    (right,) = gpu_operations.check([one])
    assert right["ok"], right
    monkeypatch.setattr(gpu_operations, operation, change(getattr(gpu_operations, operation)))
    (row,) = gpu_operations.check([one])
    assert not row["ok"]
    assert message in row["error"]


def test_long_cases_reach_every_number_of_padded_ranks_and_are_right():
    tasks = [
        *gpu_cases.long_tasks("cpu", ["torch"], dropout=False),
        *gpu_cases.long_tasks("cpu", ["torch"], dropout=True),
    ]
    sizes = {one.case.sketch_size for one in tasks if one.operation == "sketched_linear"}
    assert {padded_ranks(size) for size in sizes} == set(PADDED_RANKS)
    assert {one.factor for one in tasks if one.dtype == torch.float32} == {6.0}
    kinds = {(one.dtype, one.factors, one.tf32) for one in tasks}
    assert (torch.bfloat16, torch.float32, False) in kinds
    assert (torch.float32, None, True) in kinds
    masked = next(one for one in tasks if one.runs > 2)
    grouped = next(one for one in tasks if one.operation == "grouped_sketched_linear")
    wide = next(one for one in tasks if one.factors)
    chosen = [dataclasses.replace(one, runs=2) for one in (masked, grouped, wide)]
    assert [row for row in gpu_operations.check(chosen) if not row["ok"]] == []


def test_only_what_a_table_changed_is_repeated():
    changed = [("wgrad", "half", 32), ("apply", "half", 128), ("apply", "tf32", 16)]
    names = {one.case.name for one in gpu_cases.tuned_tasks("cuda", changed)}
    assert names == {"long_24", "long_24_dropout", "long_100"}


def test_after_a_lost_device_a_process_judges_nothing(monkeypatch):
    def fault(**_):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu_operations, "_LOST", [])
    monkeypatch.setattr(gpu_operations, "lost_device", lambda: "an illegal memory access")
    monkeypatch.setattr(gpu_operations, "scatter_mean", fault)
    first, second = gpu_operations.check([task("scatter_mean"), task("sketched_adamw")])
    assert not first["ok"]
    assert second["ok"]
    assert "not judged, in the same process as torch scatter_mean" in second["refused"]


def test_a_refusal_of_what_models_have_is_a_defect_on_a_gpu(monkeypatch):
    def refuse(**_):
        raise NotImplementedError("no tiles")

    monkeypatch.setattr(gpu_operations, "sketched_linear", refuse)
    (row,) = gpu_operations.check([task("sketched_linear", name="half")])
    assert (row["ok"], row["refused"]) == (True, "no tiles")
    usual = task("sketched_linear", name="half", device="cuda")
    by_design = [
        task("sketched_linear", name="odd_everything", device="cuda"),
        task("sketched_linear", name="dropout", device="cuda"),
    ]
    assert not usual.refused_by_design
    assert not dataclasses.replace(by_design[1], dtype=torch.bfloat16).refused_by_design
    assert not task("scatter_mean", device="cuda").refused_by_design
    assert all(one.refused_by_design for one in by_design)
