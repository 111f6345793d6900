"""Figures and names as people read them: bytes, seconds, ratios, models and data."""

import math
from fractions import Fraction
from pathlib import PurePath

BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def byte_unit(n: float) -> tuple[int, str]:
    """The SI unit to print `n` bytes in, as (bytes per unit, name)."""
    power = 0
    # 999.95 and not 1000: 999 960 bytes would round to "1000.0 kB".
    while n >= 999.95 * 1000**power and power < len(BYTE_UNITS) - 1:
        power += 1
    return 1000**power, BYTE_UNITS[power]


def format_bytes(n: float) -> str:
    """Bytes in SI units with one decimal: 512 → "512 B", 1 234 567 → "1.2 MB"."""
    size, name = byte_unit(n)
    return f"{n:.0f} B" if size == 1 else f"{n / size:.1f} {name}"


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit to plot times up to `seconds` in, as (seconds per unit, name)."""
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return size, name
    return 1.0, "seconds"


def format_seconds(seconds: float) -> str:
    """Seconds as "31.5 ms", "4.2 s", "3 min 20 s" or "2 h 5 min"."""
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_enough(value: float) -> str:
    """A limit of three digits that is at least the value: 4.2913 → "4.3"."""
    nearest = float(f"{value:.3g}")
    last_digit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{nearest if nearest >= value else nearest + last_digit:g}"


def format_ratio(ratio: float) -> str:
    """A sketch ratio as a fraction where it is a simple one: 0.125 → "1/8", 0.3141 → "0.314"."""
    fraction = Fraction(ratio).limit_denominator(64)
    return str(fraction) if abs(fraction - ratio) < 1e-9 else f"{ratio:.3g}"


def counted(count: int, what: str) -> str:
    """A number of things: "1 seed", "3 seeds"."""
    return f"{count} {what}{'s' * (count != 1)}"


def short_name(name: str) -> str:
    """A model's or data set's name in a sentence: of an absolute path the last two parts."""
    path = PurePath(name)
    return "/".join(path.parts[-2:]) if path.is_absolute() else name


def score_name(task: str, metric: str) -> str:
    """What a task is scored by; only a classification is by the metric that was asked for.

    Args:
        task: as `--task`.
        metric: as `--metric`.
    """
    own = {"causal-lm": "next-token accuracy", "instruction": "accuracy of the likeliest answer"}
    return own.get(task, metric)
