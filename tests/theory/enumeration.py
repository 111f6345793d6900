"""All sketches of a size, as diagonals of Ω: expectations without a random number."""

from itertools import combinations

import torch


def omegas(rank, size):
    """[sets, R]: every index set of the size, R/S in it and 0 elsewhere."""
    chosen = list(combinations(range(rank), size))
    diagonal = torch.zeros(len(chosen), rank, dtype=torch.float64)
    return diagonal.scatter_(1, torch.tensor(chosen), rank / size)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
