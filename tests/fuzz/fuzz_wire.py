"""Coverage-guided fuzzing of what a server does with bytes: `python -m tests.fuzz.fuzz_wire`.

Needs atheris (`pip install 'fslora[fuzz]'`). Flags are libFuzzer's, such as -max_total_time=60 or
-runs=100000; without any it runs 200,000 times. A message that is accepted and should not be, and
any exception but a refusal, stops it and is written to a file.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["fslora.wire", "fslora.frame", "fslora.validate"]):
    from fslora import frame, validate, wire

from tests.federated.hostile import honest, small_state
from tests.fuzz.oracle import acceptable

RUN = "run-1"
_STRATEGY, _STATE = small_state()
(TASK,) = _STRATEGY.assign(_STATE, ["two"])
COUNTS = {"inputs": 0, "accepted": 0, "refused": 0, "tasks read": 0}


def one_input(data):
    """Hand bytes to both sides."""
    COUNTS["inputs"] += 1
    if COUNTS["inputs"] % 50_000 == 0:
        sys.stderr.write(f"{COUNTS}\n")
    update = wire.received(data, TASK, RUN)
    if validate.rejection(TASK, update) is None:
        COUNTS["accepted"] += 1
        if not acceptable(data, TASK, RUN):
            raise AssertionError("accepted what no server may accept")
    else:
        COUNTS["refused"] += 1
    try:
        wire.decode_task(data, RUN)
        COUNTS["tasks read"] += 1
    except frame.WireError:
        pass


def reframed(data, max_size, seed):
    """Mutate, and three times of four make the declared lengths true again, to get further in."""
    mutated = bytearray(atheris.Mutate(data, max_size))
    if seed % 4 and len(mutated) > 16:
        header = min(int.from_bytes(mutated[4:8], "little"), len(mutated) - 16)
        mutated[:4] = b"FSL1"
        mutated[4:8] = header.to_bytes(4, "little")
        mutated[8:16] = (len(mutated) - 16 - header).to_bytes(8, "little")
    return bytes(mutated)


def main():
    """Fuzz from a corpus of a valid update and a valid task."""
    flags = sys.argv[1:] or ["-runs=200000"]
    with TemporaryDirectory() as corpus:
        Path(corpus, "update").write_bytes(wire.encode_update(honest(TASK), RUN))
        Path(corpus, "task").write_bytes(wire.encode_task(TASK, RUN))
        atheris.Setup(
            [sys.argv[0], "-max_len=8192", "-print_final_stats=1", *flags, corpus],
            one_input,
            custom_mutator=reframed,
        )
        atheris.Fuzz()  # does not return


if __name__ == "__main__":
    main()
