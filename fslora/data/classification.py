"""Naming the class of a text, or of a pair of texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fslora.data import tasks
from fslora.data.files import Rows
from fslora.data.metrics import MetricName, score
from fslora.data.rows import column
from fslora.data.tasks import Batch, Evaluation, Examples, Tokenizer


@dataclass(frozen=True, slots=True)
class Classification:
    """One class per row, read from a text or a pair of texts.

    The model is a Hugging Face model for sequence classification with one logit per class. A
    decoder finds the end of a text by `config.pad_token_id`: set it to `tasks.pad_id(tokenizer)`.

    Attributes:
        text_columns: one column, or two that are read as a pair, by name or position.
        label_column: the column that names the class.
        max_length: longer texts are cut to so many tokens.
        metric: `accuracy`, `f1` (of the last class in order, if there are two; else the mean over
            classes) or `mcc`, see `metrics.score`.
    """

    text_columns: tuple[str | int, ...] = ("sentence",)
    label_column: str | int = "label"
    max_length: int = 128
    metric: MetricName = "accuracy"

    def __post_init__(self) -> None:
        if len(self.text_columns) not in {1, 2}:
            raise ValueError(f"{len(self.text_columns)} text columns; a classifier reads 1 or 2")

    @property
    def columns(self) -> tuple[str | int, ...]:
        """The columns that it reads."""
        return (*self.text_columns, self.label_column)

    def surely_trains(self, rows: Rows) -> bool:
        """Whether there is a row."""
        return bool(rows)

    def class_names(self, rows: Rows) -> list[str]:
        """The different labels, sorted; by value if all are whole numbers.

        Raises:
            ValueError: a label is empty, or all are the same.
        """
        names = sorted(set(column(rows, self.label_column)))
        if len(names) < 2 or "" in names:
            raise ValueError(
                f"the labels in column {self.label_column!r} are {_listed(names)}; a "
                "classifier needs two or more, none of them empty: name another --label-column"
            )
        return sorted(names, key=int) if all(name.isdecimal() for name in names) else names

    def encode(self, rows: Rows, tokenizer: Tokenizer, classes: Sequence[str]) -> Examples:
        """One example per row, padded to the longest; a text of no tokens is one filler.

        Raises:
            ValueError: a row's label is none of `classes`.
        """
        ids = {name: number for number, name in enumerate(classes)}
        labels = column(rows, self.label_column)
        unknown = sorted(set(labels) - set(ids))
        if unknown:
            raise ValueError(
                f"unknown labels {_listed(unknown)} in column {self.label_column!r}; "
                f"the training rows have {_listed(classes)}"
            )
        encoded = tokenizer(
            *(column(rows, name) for name in self.text_columns),
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
        )
        fillers = {"input_ids": tasks.pad_id(tokenizer), "attention_mask": 0, "token_type_ids": 0}
        tensors = {
            name: tasks.padded(
                [own or [1 if name == "attention_mask" else filler] for own in encoded[name]],
                filler,
            )
            for name, filler in fillers.items()
            if name in encoded
        }
        return Examples(tensors | {"labels": torch.tensor([ids[label] for label in labels])})

    def supervised(self, batch: Batch) -> Tensor:
        """The number of examples."""
        return torch.tensor(len(batch["labels"]))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of an example, in nats."""
        logits = tasks.logits_of(model, batch)
        return functional.cross_entropy(logits, batch["labels"].to(logits.device))

    def evaluate(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        *,
        scored: bool = True,  # noqa: ARG002 - the score costs no pass of its own
    ) -> Evaluation:
        """The loss, and the metric of the likeliest class."""
        logits, truth = [], []
        with tasks.evaluating(model):
            for _, batch in examples.batches(batch_size):
                logits.append(tasks.logits_of(model, batch).cpu())
                truth.append(batch["labels"])
        logits_all, truth_all = torch.cat(logits), torch.cat(truth)
        loss = float(functional.cross_entropy(logits_all.double(), truth_all))
        guess = logits_all.argmax(dim=-1)
        value = score(self.metric, truth_all.numpy(), guess.numpy(), logits_all.shape[-1])
        return Evaluation(loss, value, len(truth_all))


def _listed(labels: Sequence[str]) -> str:
    """The first labels, for a message: a column that was named by mistake has thousands."""
    more = f" and {len(labels) - 10:,} more" if len(labels) > 10 else ""
    return ", ".join(map(repr, labels[:10])) + more
