"""Timing two things in turns, and what has to stand beside a figure for it to mean something."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

SLOWER_ABOVE = 1.03
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
        """A/A: each run of ours over its own next run. A ratio inside it is noise."""
        return bootstrap([b / a for a, b in pairwise(self.ours_s)])

    @property
    def verdict(self) -> str:
        """Say which is faster, if the figures allow it."""
        ratio = self.ratio
        if ratio.low > SLOWER_ABOVE:
            return "ours is slower"
        return "ours is faster" if ratio.high < 1.0 else "no difference that the noise allows"


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


def summary_ms(seconds: list[float]) -> str:
    """Print times as a median with the fastest and slowest, in milliseconds."""
    median, low, high = (
        1e3 * value for value in (statistics.median(seconds), min(seconds), max(seconds))
    )
    return f"{median:10.1f} ms   ({low:.1f} to {high:.1f})"


def provenance() -> dict[str, object]:
    """Return when, on what and by which code a figure was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device_name(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def device_name() -> str:
    """Return the name of the GPU, or of the processor where there is none."""
    if torch.cuda.is_available():
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


def _commit() -> str:
    """The commit of this checkout, with a plus where files differ from it."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
