"""How rows are dealt to clients: evenly, skewed by label, or as they come by nature."""

import math
from collections import Counter
from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

SCHEMES = ("iid", "dirichlet:ALPHA", "natural:COLUMN")


class Part(NamedTuple):
    """What one client holds: its name and its rows, ascending."""

    name: str
    indices: Indices


def natural_column(scheme: str) -> str | None:
    """The column that a `natural:COLUMN` scheme groups by; None for the other schemes."""
    kind, _, argument = scheme.partition(":")
    return argument if kind == "natural" and argument else None


def client_names(clients: int) -> list[str]:
    """Names for clients that have none by nature; they sort as they are numbered.

    Raises:
        ValueError: less than one client.
    """
    if clients < 1:
        raise ValueError(f"{clients} clients; at least one is needed")
    width = len(str(clients - 1))
    return [f"client-{number:0{width}}" for number in range(clients)]


def partition(
    scheme: str,
    clients: int,
    *,
    count: int,
    labels: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    key: int,
) -> list[Part]:
    """Deal `count` rows to `clients` clients, none of them empty and no row to two of them.

    Args:
        scheme: `iid`: shuffled, sizes that differ by one at most. `dirichlet:ALPHA`: for each
            label, the clients' shares are drawn from a symmetric Dirichlet distribution; the
            smaller ALPHA, the fewer labels a client sees. `natural:COLUMN`: one client per value
            of the column, for the values with most rows (ties by name); the other rows are left
            out.
        clients: how many.
        count: how many rows there are.
        labels: the label of each row, for `dirichlet`.
        groups: the value of COLUMN of each row, for `natural`.
        key: the seed of the draw; not negative.

    Raises:
        ValueError: an unknown scheme, or one that the data does not allow.

    Source: the Dirichlet split is Hsu et al., arXiv 1909.06335, drawn per label.
    """
    names = client_names(clients)
    if clients > count:
        raise ValueError(
            f"{clients} clients share {count} rows, and each needs one: ask for at most {count} "
            "clients, or give more data"
        )
    rng = np.random.default_rng(key)
    kind, _, argument = scheme.partition(":")
    if scheme == "iid":
        parts = np.array_split(rng.permutation(count), clients)
    elif kind == "dirichlet" and argument:
        parts = _dirichlet(_alpha(argument), clients, labels, rng)
    elif natural_column(scheme):
        return _natural(clients, argument, groups)
    else:
        raise ValueError(f"unknown partition {scheme!r}; the schemes are {', '.join(SCHEMES)}")
    return [Part(*pair) for pair in zip(names, map(np.sort, parts), strict=True)]


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise ValueError(f"dirichlet:{text} needs a number above 0, such as dirichlet:0.5")
    return alpha


def _dirichlet(
    alpha: float, clients: int, labels: Sequence[str] | None, rng: np.random.Generator
) -> list[Indices]:
    if labels is None:
        raise ValueError("a dirichlet partition needs labels; give --label-column, or use iid")
    label_of = _texts(labels)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(label_of):
        rows = rng.permutation(np.flatnonzero(label_of == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.extend(piece.tolist())
    # A skewed draw leaves clients empty, and drawing again hardly helps at small alpha: each
    # empty client takes one row from the client that has most (the first of them).
    fullest = [(-len(part), client) for client, part in enumerate(parts)]
    heapify(fullest)
    for part in parts:
        if not part:
            size, client = fullest[0]
            part.append(parts[client].pop())
            heapreplace(fullest, (size + 1, client))
    return [np.array(part, dtype=np.int64) for part in parts]


def _texts(values: Sequence[str]) -> npt.NDArray[np.object_]:
    """As numpy's own strings all would be as long as the longest, and lose NULs at their end."""
    return np.asarray(values, dtype=np.object_)


def _natural(clients: int, column: str, groups: Sequence[str] | None) -> list[Part]:
    if groups is None:
        raise ValueError(f"natural:{column} needs a table with that column; plain text has none")
    sizes = Counter(groups)
    if clients > len(sizes):
        raise ValueError(
            f"{clients} clients, but column {column!r} has {len(sizes)} different values: ask "
            f"for at most {len(sizes)} clients"
        )
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:clients]
    names, group_of = np.unique(_texts(groups), return_inverse=True)
    order, ends = np.argsort(group_of, kind="stable"), np.cumsum(np.bincount(group_of))
    rows_of = dict(zip(names.tolist(), np.split(order, ends[:-1]), strict=True))
    return [Part(name, rows_of[name]) for name in largest]
