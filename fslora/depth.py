"""How deep a client trains: the layers from the top down to the lowest that it changes.

What lies below the lowest trained layer asks for no gradients, so that the backward pass stops
there: neither the base model's products of it nor its saved activations are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Depth:
    """How many layers, from the top, clients train.

    Attributes:
        kind: "all"; "uniform" and "by-ratio": drawn for each client and round; "top": always so
            many, so that the layers below are never trained: biased.
        layers: of "top".
    """

    kind: str
    layers: int = 0

    @property
    def drawn(self) -> bool:
        """Whether it differs between rounds."""
        return self.kind in ("uniform", "by-ratio")

    def ever_trained(self, modules: Iterable[str]) -> list[str]:
        """Return the modules that any client trains in any round, in the order given."""
        modules = list(modules)
        if self.kind != "top":
            return modules
        top = {name for layer in layers_of(modules)[-self.layers :] for name in layer}
        return [name for name in modules if name in top]

    def probabilities(self, layers: int, ratio: float, least: float) -> list[float]:
        """Say how probable it is that a client trains each layer, the lowest first.

        The l-th layer from the top is trained with π = max(least, 1 - (l - 1)/m), m being all
        layers for "uniform" and, for "by-ratio", the client's ratio of them, one at least.

        Args:
            layers: L.
            ratio: the client's S/R.
            least: the smallest probability that a layer may have.

        Returns:
            L probabilities, each at least as large as the one before; the last one is 1.
        """
        if not self.drawn:
            return [1.0] * layers
        reach = max(1, round(ratio * layers)) if self.kind == "by-ratio" else layers
        return [max(least, 1 - above / reach) for above in reversed(range(layers))]


def read_depth(text: str) -> Depth:
    """Read ``all``, ``uniform``, ``by-ratio`` or ``top:K``.

    Raises:
        ValueError: it is none of them.
    """
    kind, _, number = text.partition(":")
    if kind == "top" and number.isdecimal() and int(number) > 0:
        return Depth(kind, int(number))
    if text not in ("all", "uniform", "by-ratio"):
        raise ValueError(f"--depth {text!r} is none of all, uniform, by-ratio and top:K, K from 1")
    return Depth(text)


def layers_of(modules: Iterable[str]) -> list[list[str]]:
    """Group modules by the layer they are in, the lowest first, by their names alone.

    A layer is what shares its name up to the first number, as in ``model.layers.3``. Layers follow
    their numbers, decoders come after encoders, and modules without a number last, each by itself.
    An order that the model does not have would spare less, and nothing would be wrong.
    """
    layers: dict[tuple[bool, float, str], list[str]] = {}
    for module in sorted(modules):
        parts = module.split(".")
        place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
        if place is None:
            key = True, math.inf, module
        else:
            above = ".".join(parts[:place])
            key = "decoder" in above, float(parts[place]), above
        layers.setdefault(key, []).append(module)
    return [layers[key] for key in sorted(layers)]
