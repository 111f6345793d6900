"""A message's outer form: declared lengths, a JSON object, a safetensors file.

    4 bytes   "FSL1"
    4 bytes   length of the header, little-endian
    8 bytes   length of the tensors, little-endian
    header    one JSON object
    tensors   a safetensors file

The declared lengths are held against what may come before anything is parsed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

HEADER_BYTES = 1 << 20
TENSORS_BYTES = 1 << 31
"""A client's default bound on what a task brings."""

_MAGIC = b"FSL1"
_PREFIX = struct.Struct("<4sIQ")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class WireError(ValueError):
    """A message that cannot be what it should be; says why."""


def pack(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Return a message.

    Raises:
        ValueError: the header would be longer than ``HEADER_BYTES``.
    """
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > HEADER_BYTES:
        raise ValueError(f"the header would have {len(text)} bytes; use shorter names of clients")
    payload = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    return _PREFIX.pack(_MAGIC, len(text), len(payload)) + text + payload


def unpack(
    data: bytes, keys: tuple[str, ...], most_bytes: int
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Take a message apart, its declared lengths first.

    Args:
        data: the message.
        keys: of the header, exactly.
        most_bytes: of the tensors.

    Returns:
        The header, and the tensors by name, built as they are asked for.

    Raises:
        WireError: it is no such message; so may asking for a tensor.
    """
    if len(data) < _PREFIX.size:
        raise WireError("it is too short for a message")
    magic, header_bytes, tensor_bytes = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise WireError("it is no message of this program")
    if header_bytes > HEADER_BYTES or tensor_bytes > most_bytes:
        raise WireError(f"it declares {header_bytes} + {tensor_bytes} bytes, more than it may have")
    if len(data) != _PREFIX.size + header_bytes + tensor_bytes:
        raise WireError("its length is not the one that it declares")
    end = _PREFIX.size + header_bytes
    # The parsers' own messages may quote what was sent, and are not passed on.
    try:
        text = bytes(data[_PREFIX.size : end]).decode()
        header = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise WireError("its header is no JSON in UTF-8") from None
    try:
        found = safetensors.deserialize(bytes(data[end:]))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        raise WireError("its tensors are no safetensors file") from None
    if type(header) is not dict or header.keys() != set(keys):
        raise WireError("its header has not the keys that it must have")
    return header, map(_tensor, found)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _tensor(entry: tuple[str, Mapping[str, Any]]) -> tuple[str, Tensor]:
    name, found = entry
    if found["dtype"] not in _DTYPES:
        raise WireError(f"{name[:200]!r} is of the type {found['dtype']}, which nothing here is")
    dtype, raw = _DTYPES[found["dtype"]], bytearray(found["data"])
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    try:
        return name, flat.reshape(found["shape"])
    except (RuntimeError, TypeError):  # no elements, and a shape beyond what torch can count
        raise WireError(f"{name[:200]!r} has a shape that no tensor has") from None
