"""A small set of cells under pytest-benchmark: ``pytest benchmarks``.

For watching one row over time, with pytest-benchmark's own tools (``--benchmark-save``,
``--benchmark-compare``). Rows run one after the other here; to compare them with each other, run
``python -m benchmarks layer``, which takes turns. A row that is wrong fails before it is timed.
"""

from functools import partial
from time import process_time

import pytest
import torch

from benchmarks.checks import Referee
from benchmarks.peers import base, delta_first, ours, peft
from benchmarks.problem import make_problem
from benchmarks.shapes import cells

ROWS = {
    "base": base,
    "peft at R": partial(peft, full=True),
    "peft at S": partial(peft, full=False),
    "delta first": delta_first,
    "ours": ours,
}
NAMES = ("square-768-t512-r64-float32-s8", "minilm-up-t512-r64-float32-s8")
CELLS = cells("cpu", names=NAMES)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
@pytest.mark.benchmark(timer=process_time, min_rounds=5, max_time=1.0, warmup=True)
def test_forward_and_backward(benchmark, cell, row):  # noqa: ANN001, ANN201, D103
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        problem = make_problem(cell)
        built = ROWS[row](problem)
        wrong = Referee(problem).error(built)
        if wrong:
            pytest.fail(wrong)
        benchmark.group = cell.id
        benchmark(built.step, problem.dy)
    finally:
        torch.set_num_threads(threads)
