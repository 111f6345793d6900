"""Generated hostile updates against a whole round; 10,000 of them in the slow tier."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from fslora.engines import sequential
from fslora.server import run_round
from fslora.wire import encode_update, received
from tests.federated.hostile import CLIENTS, honest, small_state
from tests.federated.worlds import assert_same_bits, tensors_of

from .oracle import acceptable

RUN = "run-1"
STRATEGY, STATE = small_state()
TASKS = {task.client_id: task for task in STRATEGY.assign(STATE, CLIENTS)}
TASK = TASKS["two"]
HONEST = {client: honest(task) for client, task in TASKS.items()}
VALID = encode_update(HONEST["two"], RUN)
WITHOUT, _ = run_round(STATE, STRATEGY, sequential, honest, ["one", "three", "four"])

_HEADER_BYTES, _ = struct.unpack_from("<IQ", VALID, 4)
HEADER = json.loads(VALID[16 : 16 + _HEADER_BYTES])
PAYLOAD = VALID[16 + _HEADER_BYTES :]
TENSORS = {f"extra/{n}": t for n, t in HONEST["two"].extras.items()}
for _name, (_a, _b) in HONEST["two"].delta.items():
    TENSORS |= {f"delta/{_name}/a": _a, f"delta/{_name}/b": _b}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FLOATS = st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e19, 2e19, 0.0, 1e-45])
DTYPES = {"float32": "<f4", "float64": "<f8", "float16": "<f2", "int64": "<i8", "bool": "?"}


def framed(header, payload):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<4sIQ", b"FSL1", len(text), len(payload)) + text + payload


@st.composite
def bent_bytes(draw, whole=VALID):
    """Bytes flipped, cut out, doubled or put in, anywhere."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["flip", "cut", "double", "insert", "end"]))
        if kind == "flip" and data:
            data[start] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[start:end]
        elif kind == "double":
            data[start:start] = data[start:end]
        elif kind == "insert":
            data[start:start] = draw(st.binary(max_size=40))
        else:
            del data[start:]
    return bytes(data)


@st.composite
def bent_headers(draw):
    """A true frame around a header that is not what was asked for."""
    header = dict(HEADER)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(header)) | st.text(max_size=8))
        if draw(st.booleans()):
            header.pop(key, None)
        else:
            header[key] = draw(JSON)
        if not header:
            break
    return framed(header, PAYLOAD)


@st.composite
def bent_tensors(draw):
    """A true frame and header around tensors of other names, types, shapes or values."""
    tensors = {n: t.numpy() for n, t in TENSORS.items()}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        old = tensors.pop(name)
        kind = draw(st.sampled_from(["gone", "name", "dtype", "shape", "value"]))
        if kind == "name":
            tensors[draw(st.text(max_size=12))] = old
        elif kind == "dtype":
            with np.errstate(all="ignore"):
                tensors[name] = old.astype(DTYPES[draw(st.sampled_from(sorted(DTYPES)))])
        elif kind == "shape":
            shape = draw(st.lists(st.integers(0, 7), max_size=4))
            tensors[name] = np.ones(shape, dtype="<f4")
        elif kind == "value" and old.size and old.dtype == "<f4":
            bent = old.copy()
            bent.flat[draw(st.integers(0, bent.size - 1))] = draw(FLOATS)
            tensors[name] = bent
        if not tensors:
            break
    return framed(HEADER, save(tensors))


HOSTILE = st.one_of(
    st.binary(max_size=200),
    bent_bytes(),
    bent_bytes(PAYLOAD).map(lambda payload: framed(HEADER, payload)),
    bent_bytes(VALID[16 : 16 + _HEADER_BYTES]).map(lambda text: framed(text, PAYLOAD)),
    bent_headers(),
    bent_tensors(),
)
COUNTS = {"accepted": 0, "refused": 0}


def attack(data):
    """One round in which client two answers with these bytes."""

    def engine(_, tasks):
        for task in tasks:
            spoilt = task.client_id == "two"
            yield received(data, task, RUN) if spoilt else HONEST[task.client_id]

    got, record = run_round(STATE, STRATEGY, engine, honest, CLIENTS)
    reason = {entry.id: entry.rejected for entry in record.clients}["two"]
    if reason is None:
        COUNTS["accepted"] += 1
        assert acceptable(data, TASK, RUN), "wrongly accepted"
        assert all(bool(torch.isfinite(t).all()) for t in tensors_of(got).values())
        assert got.rejections == {}
    else:
        COUNTS["refused"] += 1
        assert_same_bits(got, WITHOUT)
        assert got.rejections == {"two": 1}
        json.dumps(record.to_json(), allow_nan=False)


def test_the_oracle_accepts_what_is_valid_and_so_does_the_server():
    assert acceptable(VALID, TASK, RUN)
    before = COUNTS["accepted"]
    attack(VALID)
    assert COUNTS["accepted"] == before + 1
    assert not acceptable(VALID[:-1], TASK, RUN)


@given(HOSTILE)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_hostile_updates_leave_no_trace(data):
    attack(data)


@pytest.mark.slow
@given(HOSTILE)
@settings(
    max_examples=10_000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_ten_thousand_hostile_updates_leave_no_trace(data):
    attack(data)


@given(bent_headers())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_when_everybody_is_hostile_the_round_is_refused(data):
    def engine(_, tasks):
        return (received(data[:-1], task, RUN) for task in tasks)

    before = {name: tensor.clone() for name, tensor in tensors_of(STATE).items()}
    with pytest.raises(RuntimeError, match="no client's update could be used"):
        run_round(STATE, STRATEGY, engine, honest, CLIENTS)
    assert all(torch.equal(t, before[name]) for name, t in tensors_of(STATE).items())
