"""What goes wrong with simulated clients on purpose, and how often."""

from __future__ import annotations

from dataclasses import dataclass, fields

SLOWDOWN = 10
"""How many times as long a slowed client computes."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities with which a fault strikes one client in one round.

    Each has its own key of the seed, the round and the client.

    Attributes:
        crash: it ends in the middle of a step and does not answer.
        nan: its loss is no number from some step on.
        oom: its memory does not suffice; drawn anew when it tries again with smaller pieces.
        slow: it computes ``SLOWDOWN`` times as long as its device would.
    """

    crash: float = 0.0
    nan: float = 0.0
    oom: float = 0.0
    slow: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise ValueError(f"--faults {field.name} is a probability, 0 to 1, got {value}")


def read_faults(text: str) -> Faults:
    """Read ``crash=0.05,oom=0.1``; what is not named does not happen.

    Raises:
        ValueError: an unknown fault, or one that is named twice or has no probability.
    """
    known = [field.name for field in fields(Faults)]
    values: dict[str, float] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name, _, value = part.partition("=")
        try:
            new = {name: float(value)}
        except ValueError:
            new = {}
        if name not in known or not new.keys() - values.keys():
            raise ValueError(
                f"--faults {part!r} is none of {'=P, '.join(known)}=P, each once, P from 0 to 1; "
                "such as crash=0.05,oom=0.1"
            )
        values |= new
    return Faults(**values)
