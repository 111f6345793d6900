"""Steps inside CUDA graphs, timed in turns: what Python and launching do not cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.timing import Clock, Turns, take_turns

Step = Callable[[], object]
Replay = Callable[[], object]
_WARM_RUNS = 3


@dataclass(frozen=True, slots=True)
class InGraphs:
    """How steps did inside CUDA graphs.

    Attributes:
        turns: of the first against the others that could be captured; None if nothing was timed.
        errors: name to why a step could not be captured.
    """

    turns: Turns | None = None
    errors: Mapping[str, str] = field(default_factory=dict)


def captured(step: Step) -> Replay:
    """Capture a step, once it is warm, and return what replays it.

    Raises:
        RuntimeError: it does something that cannot be captured.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(_WARM_RUNS):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Replay = graph.replay
    return replay


def take_turns_in_graphs(
    ours: str,
    steps: Mapping[str, Step],
    measure: Clock,
    *,
    seconds: float,
    rounds: int = 0,
    capture: Callable[[Step], Replay] = captured,
) -> InGraphs:
    """Capture every step once, then run the others right beside ours, as ``take_turns`` does.

    Args:
        ours: name of the step that the others are run beside.
        steps: all of them, at least two.
        measure: the clock, the same as outside of graphs.
        seconds: as in ``take_turns``.
        rounds: as in ``take_turns``.
        capture: makes a graph.
    """
    replays: dict[str, Replay] = {}
    errors: dict[str, str] = {}
    for name, step in steps.items():
        try:
            replays[name] = capture(step)
        except RuntimeError as error:
            errors[name] = str(error)
    first = replays.pop(ours, None)
    if first is None or not replays:
        return InGraphs(errors=errors)
    return InGraphs(take_turns(first, replays, measure, seconds=seconds, rounds=rounds), errors)
