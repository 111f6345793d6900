from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fslora.data.partition import partition

KEYS = st.integers(0, 2**64 - 1)
LABELS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=80)
ALPHAS = st.sampled_from(["1e-300", "1e-3", "0.1", "1", "100", "1e300"])


def check(parts, clients, count):
    """Disjoint, ascending, none empty; returns how many rows were dealt."""
    assert len(parts) == clients
    assert len({part.name for part in parts}) == clients
    assert all(len(part.indices) and part.indices.dtype == np.int64 for part in parts)
    assert all((np.diff(part.indices) > 0).all() for part in parts)
    dealt = np.concatenate([part.indices for part in parts])
    assert len(np.unique(dealt)) == len(dealt)
    assert ((dealt >= 0) & (dealt < count)).all()
    return len(dealt)


def same(one, other):
    pairs = zip(one, other, strict=True)
    return all(a.name == b.name and np.array_equal(a.indices, b.indices) for a, b in pairs)


@given(data=st.data(), labels=LABELS, alpha=ALPHAS, key=KEYS)
def test_iid_and_dirichlet_deal_every_row_once(data, labels, alpha, key):
    clients = data.draw(st.integers(1, len(labels)))
    for scheme in ("iid", f"dirichlet:{alpha}"):
        parts = partition(scheme, clients, count=len(labels), labels=labels, key=key)
        assert check(parts, clients, len(labels)) == len(labels)
        assert same(parts, partition(scheme, clients, count=len(labels), labels=labels, key=key))
        if scheme == "iid":
            sizes = [len(part.indices) for part in parts]
            assert max(sizes) - min(sizes) <= 1


@given(data=st.data(), groups=LABELS)
def test_natural_takes_whole_groups_largest_first(data, groups):
    clients = data.draw(st.integers(1, len(set(groups))))
    parts = partition("natural:g", clients, count=len(groups), groups=groups, key=0)
    check(parts, clients, len(groups))
    sizes = Counter(groups)
    assert [p.name for p in parts] == sorted(sizes, key=lambda g: (-sizes[g], g))[:clients]
    for part in parts:
        assert [groups[row] for row in part.indices] == [part.name] * sizes[part.name]


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5"])
def test_another_key_deals_otherwise(scheme):
    labels = ["a", "b"] * 100
    parts = [partition(scheme, 5, count=200, labels=labels, key=key) for key in (1, 2)]
    assert not same(*parts)


def test_alpha_is_the_skew():
    labels = ["a", "b", "c", "d"] * 500

    def purity(alpha):
        """The share of a client's most frequent label, averaged over clients."""
        parts = partition(f"dirichlet:{alpha}", 20, count=2000, labels=labels, key=3)
        counts = [Counter(labels[row] for row in part.indices) for part in parts]
        return np.mean([max(count.values()) / count.total() for count in counts])

    purities = [purity(alpha) for alpha in (0.05, 0.5, 1000)]
    assert purities[0] > 0.8 > purities[1] > 0.45 > 0.3 > purities[2]


@given(labels=LABELS, alpha=ALPHAS, key=KEYS)
def test_an_empty_client_takes_a_row_from_the_first_of_the_largest(labels, alpha, key):
    """As written down: the largest of all is looked for again for every empty client."""
    rng, clients = np.random.default_rng(key), len(labels)
    label_of = np.asarray(labels, dtype=object)
    wanted = [[] for _ in range(clients)]
    for label in np.unique(label_of):
        rows = rng.permutation(np.flatnonzero(label_of == label))
        shares = rng.dirichlet(np.full(clients, float(alpha)))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        for own, piece in zip(wanted, np.split(rows, cuts), strict=True):
            own.extend(piece.tolist())
    for own in wanted:
        if not own:
            own.append(max(wanted, key=len).pop())
    parts = partition(f"dirichlet:{alpha}", clients, count=clients, labels=labels, key=key)
    assert [part.indices.tolist() for part in parts] == [sorted(own) for own in wanted]


def test_names_sort_as_they_are_numbered():
    names = [part.name for part in partition("iid", 11, count=11, key=0)]
    assert names[:2] == ["client-00", "client-01"]
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("scheme", "clients", "message"),
    [
        ("random", 2, "unknown partition 'random'; the schemes are iid, dirichlet:ALPHA, natural:"),
        ("natural:", 2, "unknown partition"),
        ("dirichlet", 2, "unknown partition"),
        ("dirichlet:0", 2, "number above 0"),
        ("dirichlet:-1", 2, "number above 0"),
        ("dirichlet:x", 2, "number above 0"),
        ("dirichlet:nan", 2, "number above 0"),
        ("dirichlet:inf", 2, "number above 0"),
        ("iid", 5, "5 clients share 4 rows.*at most 4"),
        ("iid", 0, "at least one"),
        ("natural:g", 3, "column 'g' has 2 different values: ask for at most 2"),
    ],
)
def test_what_the_data_does_not_allow_is_refused(scheme, clients, message):
    with pytest.raises(ValueError, match=message):
        partition(scheme, clients, count=4, labels=list("abab"), groups=list("abab"), key=0)


def test_missing_labels_or_groups_are_refused():
    with pytest.raises(ValueError, match="needs labels; give --label-column"):
        partition("dirichlet:1", 2, count=4, key=0)
    with pytest.raises(ValueError, match="needs a table"):
        partition("natural:g", 2, count=4, key=0)


def test_a_nul_at_the_end_is_part_of_a_value():
    values = ["a\0", "a", "a\0", "b"]
    parts = partition("natural:g", 3, count=4, groups=values, key=0)
    assert {p.name: p.indices.tolist() for p in parts} == {"a\0": [0, 2], "a": [1], "b": [3]}
