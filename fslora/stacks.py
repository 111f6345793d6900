"""The low-rank pairs of many modules in few tensors.

What happens for each client and each module costs by the number of tensors, not by their size, as
the local steps in between empty the caches. So factors of one width lie below each other in one
tensor, whether A or B, like the rows of one tall factor, and the pairs of modules are views of it.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from fslora_kernels import Adapters, LoRAWeights

Kind = tuple[int, torch.dtype]
"""What factors have in common that share a tensor: their width, D or E, and their type."""


class Group(NamedTuple):
    """The factors that share a tensor, from the top down.

    Attributes:
        factors: module name, and 0 for its A or 1 for its B.
        rows: of each; a factor that does not travel has none.
    """

    factors: tuple[tuple[str, int], ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)  # no slots: what follows from it is kept
class Layout:
    """Which factor's rows are where in the stacks.

    Attributes:
        names: of the modules, in their own order.
        kinds: of factors.
        groups: the factors of each kind.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    groups: tuple[Group, ...]

    @cached_property
    def _hash(self) -> int:
        return hash((self.names, self.kinds, self.groups))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def numbers(self) -> list[tuple[str, int, int]]:
        """Of each module the numbers of A and B among all factors, stack after stack."""
        number = {f: n for n, f in enumerate(chain(*(group.factors for group in self.groups)))}
        return [(name, number[name, 0], number[name, 1]) for name in self.names]


class Stacks(Mapping[str, LoRAWeights]):
    """Adapters in stacks; as a mapping, module name to views of them.

    To autograd the views are none (``torch.unsafe_split``), and so an optimizer may step the stacks
    below what the layers hold.

    Attributes:
        layout: what is where.
        tensors: for each kind ``[Σ rows, width]``.
        places: for each kind where its rows are in the stack of whole adapters, int64 ``[Σ
            rows]``; None where that is not known.
    """

    __slots__ = ("_views", "layout", "places", "tensors")

    def __init__(
        self, layout: Layout, tensors: list[Tensor], places: list[Tensor] | None = None
    ) -> None:
        self.layout = layout
        self.tensors = tensors
        self.places = places
        self._views: dict[str, LoRAWeights] | None = None

    def __getitem__(self, name: str) -> LoRAWeights:
        """Return a module's pair."""
        return self._pairs()[name]

    def items(self) -> ItemsView[str, LoRAWeights]:
        """Return the modules' names with their pairs."""
        return self._pairs().items()

    def __contains__(self, name: object) -> bool:
        """Whether there is such a module."""
        return name in self.layout.names

    def __iter__(self) -> Iterator[str]:
        """Iterate over the modules' names, in their own order."""
        return iter(self.layout.names)

    def __len__(self) -> int:
        """How many modules there are."""
        return len(self.layout.names)

    def require_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Let the views be leaves, whose gradients are parts of the stacks' own.

        What a backward pass finds is added there at once: kept until the end of the pass it would
        be a small tensor for each factor, between the large ones that are freed. A module that took
        no part in a loss has a gradient all the same.

        Args:
            gradients: the stacks' gradients, of their shapes.
        """
        for tensor, gradient in zip(self.tensors, gradients, strict=True):
            tensor.grad = gradient
        self._views = None

    def _pairs(self) -> dict[str, LoRAWeights]:
        if self._views is None:
            self._views = self._split()
        return self._views

    def _split(self) -> dict[str, LoRAWeights]:
        parts: list[Tensor] = []
        for group, tensor in zip(self.layout.groups, self.tensors, strict=True):
            own = torch.unsafe_split_with_sizes(tensor, group.rows)
            if tensor.grad is not None:
                gradients = torch.unsafe_split_with_sizes(tensor.grad, group.rows)
                for part, gradient in zip(own, gradients, strict=True):
                    part.requires_grad_().grad = gradient
            parts += own
        return {name: LoRAWeights(parts[a], parts[b]) for name, a, b in self.layout.numbers}


def stacked(adapters: Adapters, order: Adapters | None = None) -> Stacks:
    """Return adapters in stacks: copied, or as they are where they are in such stacks already.

    Args:
        adapters: module name to pair.
        order: its names in the order that they are to have, and possibly others; default as is.
    """
    names = tuple(adapters)
    if order is not None and (asked := tuple(order)) != names:
        names = tuple(name for name in asked if name in adapters)
    if isinstance(adapters, Stacks) and names == adapters.layout.names:
        return adapters
    found: dict[Kind, dict[tuple[str, int], Tensor]] = {}
    for name in names:
        for number, factor in enumerate(adapters[name]):
            found.setdefault((factor.shape[1], factor.dtype), {})[name, number] = factor
    groups = (Group(tuple(own), tuple(map(len, own.values()))) for own in found.values())
    layout = Layout(names, tuple(found), tuple(groups))
    return Stacks(layout, [torch.cat(list(own.values())) for own in found.values()])


def few_tensors(adapters: Adapters) -> list[Tensor]:
    """Return all that factors are in: the stacks, or each module's A and B where there are none."""
    if isinstance(adapters, Stacks):
        return adapters.tensors
    return [factor for pair in adapters.values() for factor in pair]


@lru_cache(maxsize=256)
def part_of(whole: Layout, sizes: tuple[tuple[str, int], ...]) -> Layout:
    """Return the layout of some modules of another layout, each with S ranks."""
    size_of = dict(sizes)
    kinds, groups = [], []
    for kind, group in zip(whole.kinds, whole.groups, strict=True):
        factors = tuple(factor for factor in group.factors if factor[0] in size_of)
        if factors:
            kinds.append(kind)
            groups.append(Group(factors, tuple(size_of[name] for name, _ in factors)))
    names = tuple(name for name in whole.names if name in size_of)
    return Layout(names, tuple(kinds), tuple(groups))


@lru_cache(maxsize=256)
def _columns(own: Layout) -> list[Tensor]:
    """For each kind, which of a client's ranks, one module after the other, is in each row."""
    sizes = dict.fromkeys(own.names, 0)
    for group in own.groups:
        for (name, _), rows in zip(*group, strict=True):
            sizes[name] = max(rows, sizes[name])
    first = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    return [
        torch.cat(
            [first[name] + torch.arange(rows) for (name, _), rows in zip(*group, strict=True)]
        )
        for group in own.groups
    ]


@lru_cache(maxsize=256)
def _begins(own: Layout, whole: Layout) -> list[Tensor]:
    """For each kind, where the factor of each row begins in the stack of whole adapters."""
    found = []
    for kind, group in zip(own.kinds, own.groups, strict=True):
        factors, rows = whole.groups[whole.kinds.index(kind)]
        starts = dict(zip(factors, accumulate(rows, initial=0), strict=False))
        begins = torch.tensor([starts[factor] for factor in group.factors])
        found.append(begins.repeat_interleave(torch.tensor(group.rows)))
    return found


def rows_of(values: Tensor, own: Layout) -> list[Tensor]:
    """Bring what belongs to ranks into the order of the stacks.

    Args:
        values: of each client what belongs to its ranks, one module after the other, ``[n, ΣS]``.
        own: how each client's adapters lie.

    Returns:
        For each kind ``[n, Σ rows]``.
    """
    return [values[:, columns] for columns in _columns(own)]


def places_of(ranks: Tensor, own: Layout, whole: Layout) -> list[Tensor]:
    """Return where the rows of clients' stacks are in the stacks of whole adapters.

    Args:
        ranks: of each client its ranks, one module after the other, int64 ``[n, ΣS]``.
        own: how each client's adapters lie.
        whole: how the whole ones do.

    Returns:
        For each kind int64 ``[n, Σ rows]``.
    """
    each = zip(rows_of(ranks, own), _begins(own, whole), strict=True)
    return [rows + begins for rows, begins in each]
