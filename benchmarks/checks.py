"""Is a row right? Values and gradients against float64, before any figure is printed."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.problem import Problem, Row
from fslora_kernels.ops.sketched_linear.reference import reference
from fslora_kernels.testing import check_error_budget

Results = dict[str, Tensor]


class Referee:
    """Judges the rows of one problem; what they are compared with is computed once.

    The oracle is the reference's forward pass in float64 with autograd's gradients; the allowed
    error follows from the same in the row's own dtype.
    """

    def __init__(self, problem: Problem) -> None:
        """Compute nothing yet."""
        self._problem = problem
        self._known: dict[str, tuple[Results, Results]] = {}

    def error(self, row: Row) -> str | None:
        """Return what is wrong with a row, or None."""
        try:
            exact, eager = self._oracles(row.computes)
            for name, value in self._results(row).items():
                # Factors may be kept in a finer dtype than the products are computed in.
                finer = name in ("dA", "dB")
                near = eager[name].to(value.dtype) if finer else eager[name]
                check_error_budget(value, near, exact[name], name=name)
        except Exception as error:  # a row that fails is shown as red, and the others go on
            return f"{type(error).__name__}: {error}"
        return None

    def _oracles(self, computes: str) -> tuple[Results, Results]:
        if computes not in self._known:
            dtype = self._problem.x.dtype
            self._known[computes] = (
                self._plain(computes, torch.float64),
                self._plain(computes, dtype),
            )
        return self._known[computes]

    def _plain(self, computes: str, dtype: torch.dtype) -> Results:
        problem = self._problem
        x = problem.x.detach().to(dtype).requires_grad_()
        weight, dy = problem.weight.to(dtype), problem.dy.to(dtype)
        if computes == "base":
            y = x @ weight.T
            (dx,) = torch.autograd.grad(y, (x,), dy)
            return {"y": y.detach(), "dx": dx}
        full = computes == "full"
        a, b = (problem.lora_a, problem.lora_b) if full else problem.selected()
        a, b = (factor.detach().to(dtype).requires_grad_() for factor in (a, b))
        y = reference(x, weight, a, b, scale=problem.full_scale if full else problem.scale)
        dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
        return {"y": y.detach(), "dx": dx, "dA": da, "dB": db}

    def _results(self, row: Row) -> Results:
        """Run a row; return its gradients of the selected ranks, once the others are zero."""
        y = row.call()
        dx, *factors = torch.autograd.grad(y, row.leaves, self._problem.dy)
        results = {"y": y.detach(), "dx": dx}
        if not factors:
            return results
        da, db = factors
        if row.rank_major_b:
            db = db.t()
        cell = self._problem.cell
        if row.computes == "sketch" and da.shape[0] == cell.rank:
            others = torch.ones(cell.rank, dtype=torch.bool, device=da.device)
            others[self._problem.index] = False
            if bool(da[others].any()) or bool(db[:, others].any()):
                raise AssertionError("ranks outside the sketch have gradients")
            da, db = da[self._problem.index], db[:, self._problem.index]
        return results | {"dA": da, "dB": db}
