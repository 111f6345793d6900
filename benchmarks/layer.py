"""One adapted linear layer, forward and backward, beside everything that a user could run instead.

Ours is a PEFT layer after ``fslora_kernels.fuse``, with a client's own compact factors. Each row's
results are checked against float64 before it is timed; all rows take turns with ours in one process
and one thread. On a CPU the bfloat16 cells run only where the processor multiplies bfloat16.
"""

from collections.abc import Sequence

from benchmarks.grid import run
from benchmarks.peers import layer_rows


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    return run("layer", __doc__, layer_rows, arguments)
