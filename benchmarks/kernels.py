"""The bare operation, forward and backward, in every implementation that runs here.

Ours is ``fslora_kernels.sketched_linear`` without a layer around it, as dispatch chooses and, where
there is more than one implementation, each by name. Each row's results are checked against float64
before it is timed; all rows take turns with ours in one process and one thread.
"""

from collections.abc import Sequence

from benchmarks.grid import run
from benchmarks.peers import kernel_rows


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    return run("kernels", __doc__, kernel_rows, arguments)
