"""Whether a message is an acceptable answer, by the letter of the format and nothing of ours."""

import json
import math
import struct

import numpy as np


def acceptable(data, task, run):
    """Whether bytes are a well-formed answer to a float32 task that a server may average."""
    try:
        return _acceptable(data, task, run)
    except (ValueError, KeyError, TypeError, RecursionError, struct.error, OverflowError):
        return False


def _acceptable(data, task, run):
    magic, header_bytes, tensor_bytes = struct.unpack_from("<4sIQ", data)
    text, payload = data[16 : 16 + header_bytes], data[16 + header_bytes :]
    header = _object(text)
    asked = ("fslora-update-1", run, task.round, task.client_id, task.nonce)
    given = [header.pop(key) for key in ("schema", "run", "round", "client", "nonce")]
    examples, metrics = header.pop("examples"), header.pop("metrics")
    return (
        magic == b"FSL1"
        and len(payload) == tensor_bytes
        and not header
        and [(type(v), v) for v in given] == [(type(v), v) for v in asked]
        and type(examples) is int
        and 1 <= examples <= 10**9
        and len(metrics) <= 16
        and all(v is None or (type(v) is float and math.isfinite(v)) for v in metrics.values())
        and metrics["loss"] is not None
        and _tensors_fit(payload, task)
    )


def _tensors_fit(payload, task):
    (length,) = struct.unpack_from("<Q", payload)
    entries, body = _object(payload[8 : 8 + length]), payload[8 + length :]
    entries.pop("__metadata__", None)
    wanted = {f"extra/{name}": tensor for name, tensor in task.extras.items()}
    for name, pair in task.adapters.items():
        wanted[f"delta/{name}/a"], wanted[f"delta/{name}/b"] = pair
    squares, covered = 0.0, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        values = np.frombuffer(body[start:end], dtype="<f4").astype(np.float64)
        if start != covered or entry["dtype"] != "F32" or not np.isfinite(values).all():
            return False
        if (
            tuple(entry["shape"]) != tuple(wanted[name].shape)
            or values.size != wanted[name].numel()
        ):
            return False
        squares, covered = squares + float(np.square(values).sum()), end
    return entries.keys() == wanted.keys() and covered == len(body) and squares < 3.41e38


def _object(text):
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key comes twice")
        return dict(pairs)

    found = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=int)
    if type(found) is not dict:
        raise TypeError
    return found
