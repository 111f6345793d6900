"""What every task shares: examples as tensors, the shape of a task, one way to call a model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fslora.data.files import Rows

IGNORED = -100
"""The label of a token that is not supervised."""

Batch = dict[str, Tensor]
Tokenizer = Any  # transformers ships no types; any of its tokenizers


@dataclass(frozen=True, slots=True)
class Examples:
    """A tokenised set of examples, padded on the right.

    Attributes:
        tensors: `input_ids` [examples, tokens], `attention_mask` [examples, tokens], `labels`
            [examples] (classes) or [examples, tokens] (not shifted; -100 is not supervised),
            and what else the model reads, such as `token_type_ids`; all int64 on the CPU.
    """

    tensors: Batch

    def __len__(self) -> int:
        return self.tensors["input_ids"].shape[0]

    def take(self, rows: Tensor) -> Batch:
        """The examples at `rows` [batch] as a batch, its common padding cut off."""
        batch = {name: tensor.index_select(0, rows) for name, tensor in self.tensors.items()}
        length = int(batch["attention_mask"].sum(dim=1).max())
        if length == batch["attention_mask"].shape[1]:
            return batch
        return {
            name: tensor[:, :length].contiguous() if tensor.dim() == 2 else tensor
            for name, tensor in batch.items()
        }

    def batches(self, size: int) -> Iterator[tuple[Tensor, Batch]]:
        """All examples once as (rows, batch), the longest first: such batches have little padding.

        The last batch may be smaller.
        """
        lengths = self.tensors["attention_mask"].sum(dim=1)
        order = lengths.argsort(descending=True, stable=True)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield rows, self.take(rows)


def pooled(parts: Sequence[Examples], filler: int) -> Examples:
    """All examples of several sets as one, padded on the right to the longest.

    Args:
        parts: the sets.
        filler: the id that they are padded with, `pad_id`: a decoder that classifies takes the last
            token that is another for the end of a text.
    """
    fillers = {"input_ids": filler, "labels": IGNORED}
    width = max(part.tensors["input_ids"].shape[1] for part in parts)

    def wide(name: str, tensor: Tensor) -> Tensor:
        if tensor.dim() == 1:
            return tensor
        missing = width - tensor.shape[1]
        return functional.pad(tensor, (0, missing), value=fillers.get(name, 0))

    names = parts[0].tensors
    return Examples({n: torch.cat([wide(n, part.tensors[n]) for part in parts]) for n in names})


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: the mean over all supervised tokens (classification: over all examples), in nats.
        metric: the task's score, or None where it has none.
        count: how many tokens (classification: examples) the loss is over.
    """

    loss: float
    metric: float | None
    count: int


class Objective(Protocol):
    """What training minimises."""

    def supervised(self, batch: Batch) -> Tensor:
        """How many tokens (or examples) the loss of this batch is a mean over: a scalar.

        The mean over several batches is their losses weighted by these.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over the supervised tokens (or examples) of a batch: a scalar, in nats."""
        ...


class Task(Objective, Protocol):
    """What a client trains on and how it is scored. Tasks are frozen and hold no data."""

    @property
    def columns(self) -> tuple[str | int, ...]:
        """The columns that it reads."""
        ...

    def surely_trains(self, rows: Rows) -> bool:
        """Whether rows give an example, said without tokenising them; False is not to know."""
        ...

    def class_names(self, rows: Rows) -> list[str]:
        """The classes that the rows name, in the order of their ids; empty without classes."""
        ...

    def encode(self, rows: Rows, tokenizer: Tokenizer, classes: Sequence[str]) -> Examples:
        """Tokenise rows; `classes` says which class has which id."""
        ...

    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, *, scored: bool = True
    ) -> Evaluation:
        """Score a model without gradients and in eval mode, restoring the mode it was in.

        Not ``scored``, a metric that costs passes of its own is left out.
        """
        ...


def pad_id(tokenizer: Tokenizer) -> int:
    """The id to pad with: the tokenizer's, else its end of text, else 0. It is always masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def padded(sequences: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Sequences as one tensor [sequences, longest], filled up on the right."""
    tensors = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits in float32 for a batch, computed where the model lives."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits.float()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn gradients and training mode off for a while; each module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def next_token_targets(batch: Batch) -> Tensor:
    """What the logits at each position are to predict: the next label, -100 at the last position.

    Returns:
        [batch, tokens].
    """
    return functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of every next token.

    Args:
        logits: [batch, tokens, vocabulary].
        targets: [batch, tokens], -100 where not supervised.

    Returns:
        [batch, tokens] in nats, 0 where not supervised.
    """
    loss = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return loss.view_as(targets)


def supervised_tokens(batch: Batch) -> Tensor:
    """How many tokens of a batch are to be predicted: a scalar."""
    return (next_token_targets(batch) != IGNORED).sum()


def mean_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a supervised token: a scalar, in nats."""
    logits = logits_of(model, batch)
    targets = next_token_targets(batch).to(logits.device)
    return next_token_loss(logits, targets).sum() / (targets != IGNORED).sum()
