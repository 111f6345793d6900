"""The command ``python -m benchmarks``."""

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from fslora.errors import is_for_the_user

# Name to (module, one line). Modules are imported when they are asked for.
BENCHMARKS = {
    "layer": ("benchmarks.layer", "one adapted layer beside PEFT and other peers, by sketch ratio"),
    "kernels": ("benchmarks.kernels", "the bare operation in every implementation"),
    "model": ("benchmarks.model", "a training step of a whole small model: PEFT and ours"),
    "memory": ("benchmarks.memory", "saved and peak bytes of a decoder layer, also with dropout"),
    "round": ("benchmarks.round", "a simulated round against a plain PEFT loop, in CPU time"),
    "scale": (
        "benchmarks.scale",
        "ten thousand clients: what a round costs beside its local steps",
    ),
    "cost": ("benchmarks.cost", "what a sketch ratio saves a client, and what not: counted"),
    "protocol": ("benchmarks.protocol", "all strategies on real data, as docs/results.md has it"),
    "depth": ("benchmarks.depth", "what training the upper layers alone spares a client"),
    "plan": ("benchmarks.plan", "the planner's costs: predicted against counted and measured"),
    "allocator": ("benchmarks.allocator", "memory given back to the system: peak and CPU time"),
    "plan-fleets": ("benchmarks.plan_fleets", "plans against the best single ratio, six fleets"),
    "attacks": ("benchmarks.attacks", "hostile clients against robust rules, on SST-2"),
    "prototypes": ("benchmarks.prototypes", "two kernels that wait for a GPU, compiled only"),
    "theory": ("benchmarks.theory.command", "predictions of docs/math.md, and what refutes them"),
    "compiled": ("benchmarks.compiled", "registers and shared memory of every kernel, no GPU"),
    "gpu": ("benchmarks.gpu", "every GPU check in one script; a dry run without a GPU"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that is named; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in BENCHMARKS:
        # peft 0.21 reads a property that transformers 5.23 renamed.
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
        return _run(given[0], given[1:])
    wrong = bool(given) and given[0] not in ("-h", "--help")
    stream = sys.stderr if wrong else sys.stdout
    print("usage: python -m benchmarks NAME [flags]   (NAME --help explains them)\n", file=stream)
    for name, (_, line) in BENCHMARKS.items():
        print(f"  {name:<12} {line}", file=stream)
    if wrong:
        print(f"\nthere is no benchmark {given[0]!r}", file=stream)
    return 2 if wrong else 0


def _run(name: str, arguments: Sequence[str]) -> int:
    """Run a benchmark; what its user can mend is told in a line."""
    try:
        code: int = import_module(BENCHMARKS[name][0]).main(arguments)
    except KeyboardInterrupt:
        print(f"\nbenchmarks {name}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as of `… | head`: whoever reads has read enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - written to at exit
        return 141
    except Exception as error:
        if not is_for_the_user(error, "benchmarks"):
            raise
        print(f"benchmarks {name}: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
