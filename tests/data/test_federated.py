from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.data.causal_lm import CausalLM
from fslora.data.classification import Classification
from fslora.data.federated import _drawn_tenth, load_federated, sizes
from fslora.data.instruction import Instruction
from fslora.data.partition import partition
from fslora.data.rows import read_rows
from tests.data.conftest import word_tokenizer

WORDS = [f"w{n}" for n in range(1000)]


@pytest.fixture(scope="module")
def numbers():
    """A tokenizer of the words w0, w1, … whose id is their number plus one."""
    return word_tokenizer(["?", *WORDS])


def read(examples):
    """The numbers of the words in the examples, in order."""
    ids = examples.tensors["input_ids"][examples.tensors["attention_mask"].bool()]
    return [token - 1 for token in ids.tolist()]


def test_one_text_is_cut_into_contiguous_chunks(numbers):
    rows = [{"text": " ".join(WORDS)}]
    data = load_federated(rows, CausalLM(max_length=10), numbers, scheme="iid", clients=9, key=5)
    assert data.names == [f"client-{n}" for n in range(9)]
    assert [read(c) for c in data.clients] == [list(range(n, n + 100)) for n in range(0, 900, 100)]
    assert read(data.evaluation) == list(range(900, 1000))
    assert data.evaluation_groups == [-1] * 10
    assert data.labels == []
    given = load_federated(
        rows, CausalLM(max_length=10), numbers, scheme="iid", clients=4, key=5,
        evaluation_rows=[{"text": "w7 w8"}],
    )  # fmt: skip
    assert [len(read(client)) for client in given.clients] == [250] * 4
    assert read(given.evaluation) == [7, 8]


def test_natural_text_holds_out_the_end_of_every_client(numbers):
    # Turns of six words, spoken in turn: 20 by x, 10 by y, 5 by z, 3 by w.
    turns = [("xyzw"[s], t) for t in range(20) for s in range(4) if t < (20, 10, 5, 3)[s]]
    rows = [
        {"speaker": speaker, "text": " ".join(WORDS[6 * n : 6 * n + 6])}
        for n, (speaker, _) in enumerate(turns)
    ]
    data = load_federated(
        rows, CausalLM(max_length=4), numbers, scheme="natural:speaker", clients=3, key=0
    )
    assert data.names == ["x", "y", "z"]
    own = {
        name: [6 * n + k for n, (s, _) in enumerate(turns) if s == name for k in range(6)]
        for name in "xyz"
    }
    held_out = {"x": 2 * 6, "y": 6, "z": 6}
    for position, name in enumerate(data.names):
        cut = len(own[name]) - held_out[name]
        trained = read(data.clients[position])
        assert trained == own[name][: cut // 4 * 4]
        judged = [n for n, group in enumerate(data.evaluation_groups) if group == position]
        assert judged
        blocks = data.evaluation.tensors["input_ids"][judged].flatten() - 1
        assert blocks.tolist() == own[name][cut:][: held_out[name] // 4 * 4]


def rows_of(count, groups="abc"):
    return [
        {"text": f"w{n}", "label": str(n % 2), "group": groups[n % len(groups)]}
        for n in range(count)
    ]


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.1", "natural:group", "natural:2"])
def test_rows_are_held_out_once_and_by_key(numbers, scheme):
    task, rows = Classification(("text",)), rows_of(200)
    one, again, other = (
        load_federated(rows, task, numbers, scheme=scheme, clients=3, key=key) for key in (1, 1, 2)
    )
    trained = [read(client) for client in one.clients]
    judged = read(one.evaluation)
    assert len(judged) == 20
    assert sorted([*chain(*trained), *judged]) == list(range(200))
    assert all(trained)
    assert one.labels == ["0", "1"]
    assert one.evaluation.tensors["labels"].tolist() == [n % 2 for n in judged]
    assert (trained, judged) == ([read(client) for client in again.clients], read(again.evaluation))
    assert judged != read(other.evaluation)
    if scheme.startswith("natural"):
        assert [one.names[group] for group in one.evaluation_groups] == [
            "abc"[n % 3] for n in judged
        ]
    else:
        parts = partition(scheme, 3, count=200, labels=[row["label"] for row in rows], key=1)
        owner = {row: n for n, part in enumerate(parts) for row in part.indices.tolist()}
        assert one.evaluation_groups == [owner[n] for n in judged]


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12), key=st.integers(0, 2**64 - 1))
def test_the_drawn_tenth_leaves_every_client_one(sizes, key):
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    parts = [
        torch.arange(start, start + size).numpy() for start, size in zip(starts, sizes, strict=True)
    ]
    cut = _drawn_tenth(parts, key)
    for part, (kept, held_out) in zip(parts, cut, strict=True):
        assert len(kept) > 0
        assert sorted([*kept, *held_out]) == part.tolist()
    wanted = min(max(1, sum(sizes) // 10), sum(sizes) - len(sizes))
    assert sum(len(held_out) for _, held_out in cut) == wanted


@pytest.mark.parametrize("task", [Classification(("text",)), CausalLM(max_length=2)])
def test_given_evaluation_rows_keep_their_client(numbers, task):
    judge = [
        {"group": group, "text": f"w{n} w{n + 1}", "label": "1"}
        for n, group in [(900, "b"), (910, "?"), (920, "a"), (930, "b")]
    ]
    rows = [row | {"text": row["text"] + " w0"} for row in rows_of(40)]
    data = load_federated(
        rows, task, numbers, scheme="natural:group", clients=3, key=0, evaluation_rows=judge
    )
    assert data.names == ["a", "b", "c"]
    assert data.evaluation_groups == [-1, 0, 1, 1]
    assert read(data.evaluation) == [910, 911, 920, 921, 900, 901, 930, 931]
    assert sum(len(client) for client in data.clients) >= 40
    even = load_federated(
        rows, task, numbers, scheme="iid", clients=3, key=0, evaluation_rows=judge
    )
    assert even.evaluation_groups == [-1] * 4
    assert read(even.evaluation)[:2] == [900, 901]


def test_any_task_can_be_dealt_by_a_label(numbers):
    task = Instruction(("text",), "text", max_length=8)
    data = load_federated(
        rows_of(100), task, numbers, scheme="dirichlet:0.01", clients=2, key=1, label_column="group"
    )
    # So skewed a draw gives each group to one client; the words are numbered like the rows.
    groups = [{n % 3 for n in read(client) if n >= 0} for client in data.clients]
    assert sorted(map(len, groups)) == [1, 2]
    assert not groups[0] & groups[1]


@pytest.mark.parametrize(
    ("texts", "scheme", "clients", "message"),
    [
        (["w1 w2 w3"], "iid", 4, "client 'client-0' has nothing left to train on.*fewer clients"),
        (["w1 w2 w3"], "natural:text", 1, "the data is one text: use iid"),
        (["w1 w2 w3"], "iid", 0, "at least one"),
        (["w1 w2", "w3 w4"], "iid", 2, "client 'client-0' has nothing left to train on"),
        (["w1 w2", "w3"], "iid", 1, "nothing is left to evaluate on"),
        (["w1 w2", "w3 w4"], "dirichlet:1", 2, "needs labels"),
        (["w1 w2", "w3 w4"], "natural:nobody", 2, "no column 'nobody'; the columns are 'text'"),
    ],
)
def test_what_leaves_someone_empty_is_refused(numbers, texts, scheme, clients, message):
    rows = [{"text": text} for text in texts]
    with pytest.raises(ValueError, match=message):
        load_federated(rows, CausalLM(max_length=4), numbers, scheme=scheme, clients=clients, key=0)


def test_an_evaluation_class_that_nobody_trains_is_refused(numbers):
    judge = [{"text": "w1", "label": "2"}]
    with pytest.raises(ValueError, match="unknown labels '2'"):
        load_federated(
            rows_of(20), Classification(("text",)), numbers, scheme="iid", clients=2, key=0,
            evaluation_rows=judge,
        )  # fmt: skip


def test_speakers_of_shakespeare_are_clients(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models/stories260K-hf")
    rows = read_rows(str(shared_data / "tinyshakespeare/input.txt.gz"), reader="play")
    data = load_federated(
        rows, CausalLM(max_length=128), tokenizer, scheme="natural:speaker", clients=30, key=0
    )
    assert data.names[0] == "GLOUCESTER"
    assert set(data.evaluation_groups) == set(range(30))
    words = [row["text"] for row in rows if row["speaker"] == "GLOUCESTER"]
    first = tokenizer.decode(data.clients[0].tensors["input_ids"][0])
    assert words[0][:60] in first
    last = data.evaluation.tensors["input_ids"][data.evaluation_groups.index(0)]
    held_out = words[len(words) - len(words) // 10]
    assert held_out[:60] in tokenizer.decode(last)


def test_what_a_natural_partition_leaves_out_is_counted_and_blanks_are_refused(numbers):
    rows = rows_of(60, groups="aaaabbbcdd")
    given = {"scheme": "natural:group", "key": 0}
    data = load_federated(rows, Classification(("text",), "label"), numbers, clients=2, **given)
    assert data.left_out == (18, 2)
    found = sizes(data)
    wanted = {"clients": 2, "held_out": 4, "judged_on": 4}
    assert wanted.items() <= found.items()
    assert found["fewest_texts"] < found["most_texts"] <= 24
    assert (found["left_out_rows"], found["left_out_values"]) == (18, 2)
    for row in rows[4:8]:
        row["group"] = " "
    with pytest.raises(ValueError, match=r"4 of 60 rows have nothing in column 'group'.*fill them"):
        load_federated(rows, Classification(("text",), "label"), numbers, clients=2, **given)
