"""Next-token prediction on running text, cut into blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fslora.data import tasks
from fslora.data.files import Rows
from fslora.data.rows import columns
from fslora.data.tasks import Batch, Evaluation, Examples, Tokenizer


@dataclass(frozen=True, slots=True)
class CausalLM:
    """Blocks of exactly `max_length` tokens; the score is the accuracy of the next token.

    A client's rows are joined by a blank line in their order, those without a word left out,
    tokenised as one text without special tokens, and cut. A short rest is dropped, unless it is
    the only block: then it is padded.

    Attributes:
        text_columns: the columns that make the text, by name or position.
        max_length: tokens in a block.
    """

    text_columns: tuple[str | int, ...] = ("text",)
    max_length: int = 128

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; a next token needs at least 2")

    @property
    def columns(self) -> tuple[str | int, ...]:
        """The columns that it reads."""
        return self.text_columns

    def surely_trains(self, rows: Rows) -> bool:
        """Whether there are two words: tokenizers do not make them one token."""
        if not rows:
            return False
        words = (
            word
            for row in columns(rows, self.text_columns)
            for text in row
            for word in text.split()
        )
        return next(words, None) is not None and next(words, None) is not None

    def class_names(self, rows: Rows) -> list[str]:  # noqa: ARG002 - the same call for all tasks
        """No classes."""
        return []

    def tokens(self, rows: Rows, tokenizer: Tokenizer) -> Tensor:
        """The token ids of the rows' joined text: [tokens]."""
        return self.tokens_each([rows], tokenizer)[0]

    def tokens_each(self, groups: Sequence[Rows], tokenizer: Tokenizer) -> list[Tensor]:
        """As `tokens`, of several groups of rows in one call of the tokenizer."""
        texts = [
            "\n\n".join(
                text
                for row in columns(rows, self.text_columns)
                if (text := "\n\n".join(filter(None, row))).strip()
            )
            for rows in groups
        ]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
        return [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]

    def blocks(self, tokens: Tensor, tokenizer: Tokenizer) -> Examples:
        """Cut [tokens] into examples; fewer than two tokens, with nothing to predict, are none."""
        length = self.max_length
        count = len(tokens) // length
        if count:
            ids = tokens[: count * length].view(count, length)
            return Examples(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
            )
        ids = torch.full((int(len(tokens) > 1), length), tasks.pad_id(tokenizer))
        labels, mask = torch.full_like(ids, tasks.IGNORED), torch.zeros_like(ids)
        ids[:, : len(tokens)] = labels[:, : len(tokens)] = tokens
        mask[:, : len(tokens)] = 1
        return Examples({"input_ids": ids, "attention_mask": mask, "labels": labels})

    def encode(self, rows: Rows, tokenizer: Tokenizer, classes: Sequence[str]) -> Examples:  # noqa: ARG002
        """The blocks of one client's rows."""
        return self.blocks(self.tokens(rows, tokenizer), tokenizer)

    def supervised(self, batch: Batch) -> Tensor:
        """The number of predicted tokens."""
        return tasks.supervised_tokens(batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a next token, in nats."""
        return tasks.mean_token_loss(model, batch)

    def evaluate(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        *,
        scored: bool = True,  # noqa: ARG002 - the score costs no pass of its own
    ) -> Evaluation:
        """The loss, and as the metric the accuracy, of every next token."""
        loss = correct = 0.0
        count = 0
        with tasks.evaluating(model):
            for _, batch in examples.batches(batch_size):
                logits = tasks.logits_of(model, batch)
                targets = tasks.next_token_targets(batch).to(logits.device)
                loss += float(tasks.next_token_loss(logits, targets).double().sum())
                correct += int((logits.argmax(dim=-1) == targets).sum())
                count += int((targets != tasks.IGNORED).sum())
        return Evaluation(loss / count, correct / count, count)
