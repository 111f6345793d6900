import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import save

from fslora.engines import over_wire, sequential
from fslora.frame import WireError
from fslora.protocol import ClientTask, LocalRule, LoRAWeights
from fslora.server import run_round
from fslora.strategies import STRATEGIES
from fslora.validate import rejection
from fslora.wire import decode_task, decode_update, encode_task, encode_update, received

from .hostile import CLIENTS, honest, normal, small_state
from .worlds import CLIENTS as REAL_CLIENTS
from .worlds import assert_same_bits, world

RUN = "run-1"


def task_of(dtype=torch.float32, name="fslora", client="two"):
    strategy, state = small_state(name, dtype=dtype)
    return strategy.assign(state, [client])[0]


def same(one, other):
    if isinstance(one, torch.Tensor):
        raw = [t.contiguous().view(torch.uint8) if t.ndim else t for t in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, LoRAWeights):
        return all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_a_task_travels_bit_for_bit_but_for_its_sketches(dtype):
    task = task_of(dtype, "fed-plora")
    task = replace(
        task,
        local=replace(task.local, lr=0.1 + 0.2, penalty=1e-300),
        scale=1 / 3,
        rank_scales={"first.query": normal(2, seed=4, dtype=torch.float64)},
        residual={"second.value": LoRAWeights(normal(0, 3, seed=1), normal(0, 7, seed=2))},
    )
    assert task.frozen
    got = decode_task(encode_task(task, RUN), RUN)
    stays = {"sketches": {}, "held_bytes": 0}
    for item in fields(ClientTask):
        wanted = stays.get(item.name, getattr(task, item.name))
        assert same(getattr(got, item.name), wanted), item.name
    assert list(got.adapters) == list(task.adapters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fslora", "ffa-lora", "head-only"])
def test_an_update_travels_bit_for_bit(name, dtype):
    task = task_of(dtype, name)
    update = honest(task)
    # Signed zeros and subnormals too.
    update.extras["head.weight"].view(-1)[:2] = torch.tensor([-0.0, 1e-40], dtype=dtype)
    data = encode_update(update, RUN)
    got = decode_update(data, task, RUN)
    for item in fields(update):
        assert same(getattr(got, item.name), getattr(update, item.name)), item.name
    assert rejection(task, got) is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fslora", {}),
        ("fslora", {"redraw": "step"}),
        ("fslora", {"sampler": "importance"}),
        ("fslora", {"forward": "full", "averaging": "inverse", "depth": "uniform"}),
        ("ffa-lora", {}),
        ("hetlora", {}),
        ("local-only", {}),
    ],
    ids=str,
)
def test_rounds_over_the_wire_have_the_bits_of_rounds_in_memory(tiny_llama, name, options):
    local = LocalRule(steps=2, batch_size=3, clip_norm=0.5)
    ends = []
    for engine in (sequential, over_wire(RUN)):
        factory = STRATEGIES[name]
        _, strategy, state, client = world(
            tiny_llama, (1 / 8, 1 / 4, 1 / 2, 1.0), local, factory, head=True, **options
        )
        for _ in range(2):
            state, record = run_round(state, strategy, engine, client, REAL_CLIENTS)
            assert not any(entry.rejected for entry in record.clients)
        ends.append(state)
    assert_same_bits(*ends)


def test_modules_keep_their_order_whatever_their_names():
    task = task_of()
    backwards = dict(reversed(dict(task.adapters).items()))
    got = decode_task(encode_task(replace(task, adapters=backwards), RUN), RUN)
    assert list(got.adapters) == list(backwards)


def test_a_private_task_does_not_travel():
    with pytest.raises(ValueError, match="run it where the server is"):
        encode_task(task_of(name="local-only"), RUN)


def test_a_diverged_client_says_so_without_infinities_in_json():
    task = task_of()
    for loss in (math.nan, math.inf):
        data = encode_update(replace(honest(task), metrics={"loss": loss}), RUN)
        assert "not finite" in rejection(task, received(data, task, RUN))


def parts(data):
    magic, header, _ = struct.unpack_from("<4sIQ", data)
    return magic, json.loads(data[16 : 16 + header]), data[16 + header :]


def joined(magic, header, payload, *, declared=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    sizes = declared or (len(text), len(payload))
    return struct.pack("<4sIQ", magic, *sizes) + text + payload


def tensors_of(update):
    found = {f"extra/{n}": t for n, t in update.extras.items()}
    for name, pair in update.delta.items():
        found[f"delta/{name}/a"], found[f"delta/{name}/b"] = pair
    return found


def spoilt_headers():
    yield "another run", {"run": "run-2"}, "run is another one"
    yield "another round", {"round": 2}, "round is another one"
    yield "true is not one", {"round": True}, "round is another one"
    yield "a float is not one", {"round": 1.0}, "round is another one"
    yield "another client", {"client": "one"}, "client is another one"
    yield "another nonce", {"nonce": 1}, "nonce is another one"
    yield "a task's schema", {"schema": "fslora-task-1"}, "schema is another one"
    yield "one key more", {"weight": 9}, "header has not the keys"
    yield "examples as text", {"examples": "5"}, "examples is not a whole number"
    yield "examples as truth", {"examples": True}, "examples is not a whole number"
    yield "metrics as list", {"metrics": [1.0]}, "metrics are not a short table"
    yield "many metrics", {"metrics": {str(n): 1.0 for n in range(17)}}, "not a short table"
    yield "metrics of text", {"metrics": {"loss": "1"}}, "metrics are not numbers"
    yield "metrics of whole numbers", {"metrics": {"loss": 10**400}}, "metrics are not numbers"


@pytest.mark.parametrize(
    ("change", "reason"), [pytest.param(c, r, id=i) for i, c, r in spoilt_headers()]
)
def test_a_header_is_exactly_what_was_asked_for(change, reason):
    task = task_of()
    magic, header, payload = parts(encode_update(honest(task), RUN))
    with pytest.raises(WireError, match=reason):
        decode_update(joined(magic, {**header, **change}, payload), task, RUN)


def spoilt_tensors():
    yield "one more", lambda t: {**t, "delta/other/a": torch.ones(1)}, "not those that were asked"
    yield "one less", lambda t: dict(list(t.items())[1:]), "not those that were asked"
    yield (
        "whole numbers",
        lambda t: {**t, "extra/head.weight": torch.ones(2, 3, dtype=torch.int64)},
        "of the type I64",
    )
    yield (
        "another type",
        lambda t: {**t, "extra/head.weight": torch.ones(2, 3, dtype=torch.float64)},
        "was torch.float32",
    )
    yield (
        "another shape",
        lambda t: {**t, "extra/head.weight": torch.ones(3, 2)},
        r"\(3, 2\) but was",
    )
    yield "not finite", lambda t: {**t, "extra/head.weight": torch.ones(2, 3) / 0}, "not finite"
    yield (
        "huge",
        lambda t: {**t, "extra/head.weight": torch.full((2, 3), 3e38)},
        "its norm is 7.35e[+]38, above 1.84e[+]19",
    )


@pytest.mark.parametrize(
    ("change", "reason"), [pytest.param(c, r, id=i) for i, c, r in spoilt_tensors()]
)
def test_tensors_are_exactly_those_that_were_asked_for(change, reason):
    task = task_of()
    update = honest(task)
    magic, header, _ = parts(encode_update(update, RUN))
    data = joined(magic, header, save(change(tensors_of(update))))
    assert re.search(reason, rejection(task, received(data, task, RUN)))


def spoilt_frames():
    task = task_of()
    magic, header, payload = parts(encode_update(honest(task), RUN))
    text = json.dumps(header).encode()
    yield "empty", b"", "too short"
    yield "another magic", joined(b"PK\3\4", header, payload), "no message of this program"
    yield "cut off", joined(magic, header, payload)[:-1], "length is not the one"
    yield "a byte more", joined(magic, header, payload) + b"\0", "length is not the one"
    for sizes in ((1 << 31, 8), (len(text), 1 << 62)):
        yield f"declares {sizes}", joined(magic, header, payload, declared=sizes), "more than it"
    yield "too much data", joined(magic, header, payload + bytes(1 << 16)), "more than it may"
    yield "deep JSON", joined(magic, b"[" * (1 << 19), payload), "no JSON"
    yield "UTF-16", joined(magic, json.dumps(header).encode("utf-16"), payload), "no JSON"
    yield "NaN", joined(magic, text.replace(b'"loss": 1.0', b'"loss": NaN'), payload), "no JSON"
    yield "twice", joined(magic, text[:-1] + b', "run": "run-1"}', payload), "no JSON"
    yield "a list", joined(magic, b"[]", payload), "has not the keys"
    yield "no tensors", joined(magic, header, b""), "no safetensors"
    yield "a gap", joined(magic, header, payload + b"\0"), "no safetensors"


@pytest.mark.parametrize(
    ("data", "reason"), [pytest.param(d, r, id=i) for i, d, r in spoilt_frames()]
)
def test_a_malformed_message_is_refused_before_it_costs_anything(data, reason):
    with pytest.raises(WireError, match=reason):
        decode_update(data, task_of(), RUN)


def test_sizes_are_checked_before_parsing(monkeypatch):
    """A message that declares too much is refused by its first sixteen bytes."""
    monkeypatch.setattr("fslora.frame.json", None)
    monkeypatch.setattr("fslora.frame.safetensors", None)
    data = struct.pack("<4sIQ", b"FSL1", 100, 1 << 40)
    with pytest.raises(WireError, match="more than it may have"):
        decode_update(data, task_of(), RUN)


def spoilt_tasks():
    yield "an optimizer", {"local": {"optimizer": "exec"}}, "optimizer cannot be exec"
    yield "steps", {"local": {"steps": 0}}, "steps must be at least 1"
    yield "lr", {"local": {"lr": True}}, "lr cannot be True"
    yield "a rule's field", {"local": {"shell": 1}}, "not the fields"
    yield "scale", {"scale": "1"}, "wrong type"
    yield "key", {"key": -1}, "key is not a whole number"
    yield "modules", {"modules": ["first.query"]}, "modules are not those"
    yield "a module's name", {"modules": [1, 2]}, "modules are not those"


@pytest.mark.parametrize(
    ("change", "reason"), [pytest.param(c, r, id=i) for i, c, r in spoilt_tasks()]
)
def test_a_client_checks_its_task_too(change, reason):
    magic, header, payload = parts(encode_task(task_of(), RUN))
    if "local" in change:
        change = {"local": header["local"] | change["local"]}
    with pytest.raises(WireError, match=reason):
        decode_task(joined(magic, {**header, **change}, payload), RUN)


def test_a_client_bounds_its_task():
    with pytest.raises(WireError, match="more than it may have"):
        decode_task(encode_task(task_of(), RUN), RUN, most_bytes=100)


def test_a_refused_message_is_recorded_and_the_others_count():
    strategy, state = small_state()

    def engine(client, tasks):
        for task in tasks:
            data = encode_update(client(task), RUN)
            yield received(data[:-1] if task.client_id == "two" else data, task, RUN)

    got, record = run_round(state, strategy, engine, honest, CLIENTS)
    wanted, _ = run_round(state, strategy, sequential, honest, ["one", "three", "four"])
    assert {e.id: e.rejected for e in record.clients}["two"] == (
        "its length is not the one that it declares"
    )
    assert_same_bits(got, wanted)
    assert got.rejections == {"two": 1}
