"""How much work the experiments are given."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Effort:
    """Sizes of the experiments.

    Attributes:
        seeds: worlds of one setting.
        draws: index sets for the moments.
        gradients: sketches at one X of the toy.
        updates: sketches of whole rounds at one X of a model.
        halvings: of the bracket of step sizes.
        toy_rounds: unit in which the toy's runs are measured.
        toy_steps: step sizes tried on the toy.
        model_rounds: most rounds of a model.
    """

    seeds: int
    draws: int
    gradients: int
    updates: int
    halvings: int
    toy_rounds: int
    toy_steps: int
    model_rounds: int

    def to_json(self) -> dict[str, object]:
        """Return it as plain values."""
        return {"effort": asdict(self)}


FULL = Effort(3, 20_000, 100, 16, 6, 300, 6, 40)
QUICK = Effort(2, 5_000, 40, 8, 5, 90, 5, 10)
