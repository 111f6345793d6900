"""Timing two things in turns, and what has to stand beside a figure for it to mean something."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch

SLOWER_ABOVE = 1.03
LEAST_ROUNDS = 5
_FLUSH_BYTES = 256 << 20  # more than any GPU's last-level cache
_PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")


@dataclass(frozen=True, slots=True)
class Interval:
    """A median with its interval.

    Attributes:
        median: of the samples.
        low: 2.5th percentile of the bootstrapped median.
        high: 97.5th percentile of the bootstrapped median.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Print as ``0.93 [0.91, 0.95]``."""
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Times of two things that were run in turns.

    Attributes:
        ours_s: seconds of each run.
        peer_s: seconds of each run, the n-th right beside ours.
    """

    ours_s: list[float]
    peer_s: list[float]

    @property
    def ratio(self) -> Interval:
        """Ours over the peer's, pair by pair."""
        return bootstrap([a / b for a, b in zip(self.ours_s, self.peer_s, strict=True)])

    @property
    def spread(self) -> Interval:
        """A/A, of two runs at least: each of ours over the one before. A ratio inside is noise."""
        return bootstrap([b / a for a, b in pairwise(self.ours_s)])

    @property
    def verdict(self) -> str:
        """Say which is faster, if the figures allow it."""
        if len(self.ours_s) < LEAST_ROUNDS:
            return f"fewer than {LEAST_ROUNDS} pairs have no interval, and say nothing"
        ratio = self.ratio
        if ratio.low > SLOWER_ABOVE:
            return "ours is slower"
        return "ours is faster" if ratio.high < 1.0 else "no difference that the noise allows"


@dataclass(frozen=True, slots=True)
class Turns:
    """Times of one thing and of several others that were run between its runs.

    Attributes:
        ours_s: seconds of every run of ours, in order.
        peer_s: name to seconds, one run a round.
        beside_s: name to seconds of the run of ours right before or after that peer's.
    """

    ours_s: list[float]
    peer_s: dict[str, list[float]]
    beside_s: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        """How often every peer was run."""
        return min(len(times) for times in self.peer_s.values())

    def pairs(self, name: str) -> Pairs:
        """Ours and a peer, neighbour by neighbour."""
        return Pairs(self.beside_s[name], self.peer_s[name])

    @property
    def spread(self) -> Interval:
        """A/A: each run of ours over the one before."""
        return Pairs(self.ours_s, self.ours_s).spread


Clock = Callable[[Callable[[], object]], float]
"""Runs a function once and returns the seconds it took."""


def clock(device: str) -> Clock:
    """Return the clock of a device: CPU seconds of this process, or a GPU's own events.

    On a GPU its caches are flushed before each run.
    """
    if device != "cuda":
        return _process_seconds
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def seconds(function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return seconds


def _process_seconds(function: Callable[[], object]) -> float:
    start = process_time()
    function()
    return process_time() - start


def take_turns(
    ours: Callable[[], object],
    peers: Mapping[str, Callable[[], object]],
    measure: Clock,
    *,
    seconds: float,
    rounds: int = 0,
) -> Turns:
    """Run every peer right beside a run of ours, round by round.

    Two peers share the run of ours between them; their order is turned around every other round.

    Args:
        ours: what everything is compared with.
        peers: name to function, at least one.
        measure: the clock.
        seconds: wall time after which no round begins, once there are ``LEAST_ROUNDS``.
        rounds: exactly so many, whatever they take; 0 goes by ``seconds``.

    Returns:
        All times; one untimed round before them is left out.
    """
    turns = Turns([], {name: [] for name in peers}, {name: [] for name in peers})
    names = list(peers)
    groups = [names[i : i + 2] for i in range(0, len(names), 2)]
    for function in (ours, *peers.values()):
        function()
    gc.collect()
    gc.disable()
    try:
        end = perf_counter() + seconds
        number = 0
        while number < (rounds or LEAST_ROUNDS) or (not rounds and perf_counter() < end):
            for group in groups:
                first, *rest = group if number % 2 == 0 else group[::-1]
                turns.peer_s[first].append(measure(peers[first]))
                turns.ours_s.append(measure(ours))
                for name in rest:
                    turns.peer_s[name].append(measure(peers[name]))
                for name in group:
                    turns.beside_s[name].append(turns.ours_s[-1])
            number += 1
    finally:
        gc.enable()
    return turns


def bootstrap(samples: list[float], *, draws: int = 2000, seed: int = 0) -> Interval:
    """Estimate the median of samples and how sure it is.

    Args:
        samples: at least one.
        draws: how often the samples are drawn again, with replacement.
        seed: of the draws.

    Returns:
        The median with its 95% percentile interval; as wide as the samples where there are few.
    """
    values = np.asarray(samples)
    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(np.median(values[chosen], axis=1), [2.5, 97.5])
    return Interval(float(np.median(values)), float(low), float(high))


def ratio_of_medians(
    numerator: list[float], denominator: list[float], *, draws: int = 2000, seed: int = 0
) -> Interval:
    """Estimate the ratio of two medians of paired samples that are noisy beside their size.

    Args:
        numerator: differences, say, of which single ones may be around zero.
        denominator: as many, measured in the same rounds.
        draws: how often the rounds are drawn again, with replacement.
        seed: of the draws.

    Returns:
        The ratio with its 95% percentile interval.
    """
    above, below = np.asarray(numerator), np.asarray(denominator)
    chosen = np.random.default_rng(seed).integers(len(above), size=(draws, len(above)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.median(above[chosen], axis=1) / np.median(below[chosen], axis=1)
    low, high = np.percentile(ratios[np.isfinite(ratios)], [2.5, 97.5])
    return Interval(float(np.median(above) / np.median(below)), float(low), float(high))


def summary_ms(seconds: list[float]) -> str:
    """Print times as a median with the fastest and slowest, in milliseconds."""
    median, low, high = (
        1e3 * value for value in (statistics.median(seconds), min(seconds), max(seconds))
    )
    return f"{median:10.1f} ms   ({low:.1f} to {high:.1f})"


def provenance(device: str = "auto") -> dict[str, object]:
    """Return when, on what and by which code a figure was measured.

    Args:
        device: as for ``device_name``.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def check_device(device: str) -> None:
    """Check that a device is there.

    Raises:
        ValueError: a GPU is asked for, and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; leave out --device cuda")


def device_name(device: str = "auto") -> str:
    """Return the name of a GPU or of the processor.

    Args:
        device: what a figure is measured on, as torch's device type; "auto" is the GPU where there
            is one.
    """
    if device != "cpu" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def append_record(path: Path, record: dict[str, object]) -> None:
    """Append one JSON object as a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def git_commit() -> str:
    """The commit of this checkout, with a plus where files in it differ; new files do not count.

    A copy without its history is told by the environment variable FSLORA_COMMIT.
    """
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FSLORA_COMMIT", "unknown")
