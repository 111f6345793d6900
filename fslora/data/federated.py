"""From rows to clients: who trains on what, and what is held out to judge by."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fslora.data.causal_lm import CausalLM
from fslora.data.classification import Classification
from fslora.data.files import Rows
from fslora.data.lazy import LazyExamples
from fslora.data.partition import Indices, client_names, natural_column, partition
from fslora.data.rows import column, column_name
from fslora.data.tasks import Examples, Task, Tokenizer, pooled


@dataclass(frozen=True, slots=True)
class FederatedData:
    """Tokenised text of every client, and of the evaluation.

    Attributes:
        names: the clients' names.
        clients: the training examples of each client, never empty; tokenised when asked for.
        evaluation: the examples to judge by; no client trains on them.
        evaluation_groups: for each of them the position of the client whose distribution it is
            from, or -1 where there is none.
        labels: the class names in the order of their ids; empty for tasks without classes.
        held_out: how many examples there are to judge by, also where fewer are kept.
        left_out: of a natural partition the rows, and the values of its column, of no client.
        texts: how many rows each client has; blocks, where one text was cut.
        source: digests of the rows that clients have ("clients") and are judged by ("evaluation"),
            before any is tokenised.
    """

    names: list[str]
    clients: Sequence[Examples]
    evaluation: Examples
    evaluation_groups: list[int]
    labels: list[str]
    held_out: int = 0
    left_out: tuple[int, int] = (0, 0)
    texts: tuple[int, ...] = ()
    source: dict[str, str] = field(default_factory=dict)


def load_federated(
    rows: Rows,
    task: Task,
    tokenizer: Tokenizer,
    *,
    scheme: str,
    clients: int,
    key: int,
    evaluation_rows: Rows | None = None,
    label_column: str | int | None = None,
) -> FederatedData:
    """Deal rows to clients and tokenise them.

    Without `evaluation_rows` a tenth is held out after the rows are dealt. Running text is held
    out at its end: the last tenth of each client's rows, at least one. Of other tasks a tenth of
    all dealt rows is drawn, leaving every client one. A single text (one row, `CausalLM`) is cut
    by tokens: the last tenth is held out, and the clients get contiguous chunks of the rest.

    Args:
        rows: what `read_rows` gave.
        task: how rows become examples.
        tokenizer: any Hugging Face tokenizer.
        scheme: the partition, see `partition.partition`; a single text knows `iid` only.
        clients: how many.
        key: the seed of the partition and of the held-out draw.
        evaluation_rows: rows to judge by instead of a held-out tenth.
        label_column: the labels of a `dirichlet` partition; a classification's own by default.

    Raises:
        ValueError: the data does not allow the partition, or a client or the evaluation is empty.
    """
    if isinstance(task, CausalLM) and len(rows) == 1:
        return _cut_text(rows, task, tokenizer, scheme, clients, evaluation_rows)
    if label_column is None and isinstance(task, Classification):
        label_column = task.label_column
    by_label = label_column is not None and scheme.startswith("dirichlet")
    group = natural_column(scheme)
    group_column = None if group is None else column_name(rows, group)
    owners = None if group_column is None else _without_blanks(rows, group_column)
    parts = partition(
        scheme,
        clients,
        count=len(rows),
        labels=column(rows, str(label_column)) if by_label else None,
        groups=owners,
        key=key,
    )
    names = [part.name for part in parts]
    kept = [part.indices for part in parts]
    values = 0 if owners is None else len(set(owners)) - len(parts)
    left_out = len(rows) - sum(map(len, kept)), values
    if evaluation_rows is not None:
        shares = _by_client(evaluation_rows, names, group_column)
    else:
        cut = _last_tenths(kept) if isinstance(task, CausalLM) else _drawn_tenth(kept, key)
        kept, held_out = [keep for keep, _ in cut], [out for _, out in cut]
        shares = [(n, [rows[row] for row in out]) for n, out in enumerate(held_out) if len(out)]
    classes = task.class_names(rows)
    for name in task.columns:
        column(rows, name)  # missing, it is missed now and not in mid-run

    def encode(client: int) -> Examples:
        own = [rows[row] for row in kept[client]]
        return _not_empty(names[client], task.encode(own, tokenizer, classes) if own else None)

    lazy = LazyExamples(len(names), encode)
    for client, indices in enumerate(kept):
        if not task.surely_trains([rows[row] for row in indices]):
            _ = lazy[client]  # if it has nothing, that is said now
    evaluation, groups = _encode_evaluation(task, tokenizer, shares, classes)
    texts = tuple(map(len, kept))
    source = {
        "clients": _rows_digest(
            (name, [rows[row] for row in own]) for name, own in zip(names, kept, strict=True)
        ),
        "evaluation": _rows_digest((str(client), share) for client, share in shares),
    }
    return FederatedData(
        names, lazy, evaluation, groups, classes, len(evaluation), left_out, texts, source
    )


def validation_split(data: FederatedData, task: Task, filler: int, key: int) -> FederatedData:
    """Hold out a tenth of the clients' own examples, and put it in place of the evaluation.

    As in `load_federated`: running text is held out at each client's end, of other tasks a tenth
    of all examples is drawn; every client keeps at least one.

    Args:
        data: whose evaluation is dropped unseen.
        task: how its rows became examples.
        filler: the id that they are padded with.
        key: the seed of the draw.

    Raises:
        ValueError: no client has two examples.
    """
    clients = list(data.clients)  # tokenised once
    parts = [np.arange(len(examples)) for examples in clients]
    if isinstance(task, CausalLM):
        cut = [
            both if len(both[0]) else (part, part[:0])
            for part, both in zip(parts, _last_tenths(parts), strict=True)
        ]
    else:
        cut = _drawn_tenth(parts, key)
    _refuse_empty_evaluation(sum(len(out) for _, out in cut))
    groups = [client for client, (_, rows) in enumerate(cut) for _ in rows]
    kept = [_rows(own, keep) for own, (keep, _) in zip(clients, cut, strict=True)]
    out = [_rows(own, rows) for own, (_, rows) in zip(clients, cut, strict=True)]
    held_out = pooled(out, filler)
    return replace(
        data,
        clients=kept,
        evaluation=held_out,
        evaluation_groups=groups,
        held_out=len(held_out),
    )


def fingerprints(data: FederatedData) -> dict[str, str]:
    """Say in a few letters who trains on what ("clients") and what judges them ("evaluation").

    It takes a pass over all clients, tokenising them; ``FederatedData.source`` takes none.
    """
    clients = _digest(name.encode() for name in data.names)
    for examples in data.clients:
        clients += _examples_digest(examples)
    return {
        "clients": _digest([clients.encode()])[:16],
        "evaluation": _examples_digest(data.evaluation)[:16],
    }


def sizes(data: FederatedData) -> dict[str, int]:
    """Say who has how much, what is held out, and what is left out."""
    left_out_rows, left_out_values = data.left_out
    return {
        "clients": len(data.names),
        "fewest_texts": min(data.texts),
        "most_texts": max(data.texts),
        "held_out": data.held_out,
        "judged_on": len(data.evaluation),
        "left_out_rows": left_out_rows,
        "left_out_values": left_out_values,
    }


def _rows_digest(parts: Iterable[tuple[str, Rows]]) -> str:
    named = ((name, *(tuple(row.items()) for row in rows)) for name, rows in parts)
    return _digest(repr(part).encode() for part in named)[:16]


def _examples_digest(examples: Examples) -> str:
    return _digest(
        part
        for name, tensor in sorted(examples.tensors.items())
        for part in (f"{name} {list(tensor.shape)}".encode(), tensor.contiguous().numpy().tobytes())
    )


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def _rows(examples: Examples, indices: Indices) -> Examples:
    rows = torch.from_numpy(indices)
    return Examples({name: tensor[rows] for name, tensor in examples.tensors.items()})


def _cut_text(
    rows: Rows,
    task: CausalLM,
    tokenizer: Tokenizer,
    scheme: str,
    clients: int,
    evaluation_rows: Rows | None,
) -> FederatedData:
    """Contiguous chunks of one text as clients."""
    if scheme != "iid":
        raise ValueError(f"{scheme} needs several rows, and the data is one text: use iid")
    names = client_names(clients)
    tokens = task.tokens(rows, tokenizer)
    if evaluation_rows is None:
        tokens, held_out = tokens.tensor_split([len(tokens) * 9 // 10])
        evaluation = task.blocks(held_out, tokenizer)
    else:
        evaluation = task.encode(evaluation_rows, tokenizer, ())
    encoded = [
        _not_empty(name, task.blocks(chunk, tokenizer))
        for name, chunk in zip(names, tokens.tensor_split(clients), strict=True)
    ]
    _refuse_empty_evaluation(len(evaluation))
    count = len(evaluation)
    source = {
        "clients": _rows_digest([(str(names), rows)]),
        "evaluation": _rows_digest([("", evaluation_rows or rows)]),
    }
    return FederatedData(
        names,
        encoded,
        evaluation,
        [-1] * count,
        [],
        held_out=count,
        texts=tuple(map(len, encoded)),
        source=source,
    )


def _last_tenths(parts: Sequence[Indices]) -> list[tuple[Indices, Indices]]:
    """Each client's rows as (kept, held out): the last tenth is held out, at least one."""
    cuts = [len(indices) - max(1, len(indices) // 10) for indices in parts]
    return [(indices[:cut], indices[cut:]) for indices, cut in zip(parts, cuts, strict=True)]


def _drawn_tenth(parts: Sequence[Indices], key: int) -> list[tuple[Indices, Indices]]:
    """Each client's rows as (kept, held out): a tenth of all is drawn, leaving each client one."""
    owner = np.repeat(np.arange(len(parts)), [len(indices) for indices in parts])
    wanted = max(1, len(owner) // 10)
    left = [len(indices) for indices in parts]
    out = np.zeros(len(owner), dtype=np.bool_)
    for row in np.random.default_rng([key, 1]).permutation(len(owner)):
        if wanted and left[owner[row]] > 1:
            out[row] = True
            left[owner[row]] -= 1
            wanted -= 1
    flags = np.split(out, np.cumsum([len(indices) for indices in parts])[:-1])
    return [(indices[~flag], indices[flag]) for indices, flag in zip(parts, flags, strict=True)]


def _without_blanks(rows: Rows, group_column: str) -> list[str]:
    """The values of a natural partition's column, none of them empty."""
    values = column(rows, group_column)
    blank = sum(not value.strip() for value in values)
    if blank:
        raise ValueError(
            f"{blank:,} of {len(rows):,} rows have nothing in column {group_column!r}, and would "
            "be one client: fill them in or take them out, or choose another --partition"
        )
    return values


def _by_client(rows: Rows, names: list[str], group_column: str | None) -> list[tuple[int, Rows]]:
    """Evaluation rows as (client position or -1, its rows), in the order of the positions."""
    if group_column is None or any(group_column not in row for row in rows):
        return [(-1, rows)]
    positions = {name: n for n, name in enumerate(names)}
    shares: dict[int, Rows] = {}
    for row in rows:
        shares.setdefault(positions.get(row[group_column], -1), []).append(row)
    return sorted(shares.items(), key=lambda share: share[0])


def _encode_evaluation(
    task: Task, tokenizer: Tokenizer, shares: list[tuple[int, Rows]], classes: list[str]
) -> tuple[Examples, list[int]]:
    """The evaluation's examples, and the client position of each."""
    _refuse_empty_evaluation(sum(len(rows) for _, rows in shares))
    if isinstance(task, CausalLM):  # blocks do not run from one client into the next
        tokens = task.tokens_each([rows for _, rows in shares], tokenizer)
        encoded = [task.blocks(own, tokenizer) for own in tokens]
        tensors = {
            name: torch.cat([examples.tensors[name] for examples in encoded])
            for name in encoded[0].tensors
        }
        sizes = [len(examples) for examples in encoded]
        _refuse_empty_evaluation(sum(sizes))
    else:
        tensors = task.encode(
            [row for _, rows in shares for row in rows], tokenizer, classes
        ).tensors
        sizes = [len(rows) for _, rows in shares]
    groups = [
        position for (position, _), size in zip(shares, sizes, strict=True) for _ in range(size)
    ]
    return Examples(tensors), groups


def _not_empty(name: str, examples: Examples | None) -> Examples:
    if not examples:
        raise ValueError(
            f"client {name!r} has nothing left to train on; ask for fewer clients or give more "
            "data (with --eval-data nothing is held out)"
        )
    return examples


def _refuse_empty_evaluation(count: int) -> None:
    if not count:
        raise ValueError("nothing is left to evaluate on; give more data, or give --eval-data")
