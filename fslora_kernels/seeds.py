"""Every random draw comes from an explicit key: same seed, same bits, whatever order things run in.

The generators are our own and documented, so that another implementation can draw the same
index sets from the same keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def fold_in(key: int, *path: int | str) -> int:
    """Derive a key from another one and what it is for.

    It is BLAKE2b with a digest of 8 bytes (its own function, not the first 8 of a longer digest),
    without key, salt or personalisation, of the UTF-8 bytes of the decimal key and the path; read
    as a little-endian number and shifted right by one bit.

    Args:
        key: a seed or another key.
        path: what the key is for, such as ``(round, client, module)``; joined by NUL characters,
            whole numbers in decimal with a leading ``#`` so that 1 and "1" differ.

    Returns:
        A key in [0, 2⁶³), as torch's and NumPy's generators take it.
    """
    parts = [str(key), *(f"#{item}" if isinstance(item, int) else item for item in path)]
    digest = blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def fold_in_each(keys: Iterable[int], names: Sequence[str]) -> NDArray[np.uint64]:
    """Return ``fold_in(key, name)`` for every key and, of each, every name.

    Returns:
        ``[keys · names]``, the names of a key one after the other.
    """
    ends = [f"\0{name}".encode() for name in names]
    whole = (str(key).encode() + end for key in keys for end in ends)
    digests = b"".join(blake2b(each, digest_size=8).digest() for each in whole)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64) >> np.uint64(1)


def uniform(key: int, *path: int | str) -> float:
    """Draw from (0, 1): the folded key's upper 52 bits and a half, over 2⁵²."""
    return ((fold_in(key, *path) >> 11) + 0.5) * 2.0**-52


def splitmix64(keys: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """Return the first ``count`` outputs of SplitMix64 for each key.

    Args:
        keys: ``[n]`` initial states.
        count: outputs per key.

    Returns:
        ``[n, count]``.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * _INCREMENT
    state = keys[:, None] + steps
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    mixed: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed
