"""Answering: a prompt is read, the loss is on the response only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fslora.data import tasks
from fslora.data.files import Rows
from fslora.data.rows import column, columns
from fslora.data.tasks import IGNORED, Batch, Evaluation, Examples, Tokenizer

MAX_CANDIDATES = 32
TEMPLATE = "{prompt}\n\n### Response:\n"


@dataclass(frozen=True, slots=True)
class Instruction:
    """Prompt and response in one sequence, supervised on the response.

    The prompt columns that are not empty are joined by a blank line and put into `TEMPLATE`. A
    sequence is beginning of text, prompt, response, end of text (the special tokens that the
    tokenizer has). What is longer than `max_length` loses the beginning of its prompt (but the
    first token); only a response that alone is too long is cut itself.

    Attributes:
        prompt_columns: the columns that make the prompt, by name or position.
        response_column: the column to answer with.
        max_length: tokens in a sequence at most.
    """

    prompt_columns: tuple[str | int, ...] = ("instruction",)
    response_column: str | int = "response"
    max_length: int = 512

    def __post_init__(self) -> None:
        if self.max_length < 4:
            raise ValueError(f"max_length is {self.max_length}; an answer needs at least 4")

    @property
    def columns(self) -> tuple[str | int, ...]:
        """The columns that it reads."""
        return (*self.prompt_columns, self.response_column)

    def surely_trains(self, rows: Rows) -> bool:
        """Whether there are rows, and each has a response."""
        return bool(rows) and all(map(str.strip, column(rows, self.response_column)))

    def class_names(self, rows: Rows) -> list[str]:  # noqa: ARG002 - the same call for all tasks
        """No classes."""
        return []

    def encode(self, rows: Rows, tokenizer: Tokenizer, classes: Sequence[str]) -> Examples:  # noqa: ARG002
        """One example per row, padded to the longest.

        Raises:
            ValueError: a response has no tokens.
        """
        texts = ["\n\n".join(filter(None, fields)) for fields in columns(rows, self.prompt_columns)]
        prompts = _ids(tokenizer, [TEMPLATE.format(prompt=text) for text in texts])
        responses = _ids(tokenizer, column(rows, self.response_column))
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if start is not None:
            prompts = [[start, *prompt] for prompt in prompts]
        if end is not None:
            responses = [[*response, end] for response in responses]
        if missing := responses.count([]):
            raise ValueError(
                f"{missing:,} of {len(rows):,} rows have nothing in column "
                f"{self.response_column!r}, and the tokenizer has no end of text to answer with: "
                "fill them in or take them out"
            )
        return self._examples(prompts, responses, tasks.pad_id(tokenizer))

    def _examples(
        self, prompts: list[list[int]], responses: list[list[int]], filler: int
    ) -> Examples:
        """Prompts and their responses as examples."""
        sequences, labels = [], []
        for whole_prompt, whole_response in zip(prompts, responses, strict=True):
            response = whole_response[: self.max_length - 2]
            room = self.max_length - len(response)
            prompt = whole_prompt
            if len(prompt) > room:  # the first token is the beginning of text: models lean on it
                prompt = [prompt[0], *prompt[len(prompt) - room + 1 :]]
            sequences.append(prompt + response)
            labels.append([IGNORED] * len(prompt) + response)
        masks = [[1] * len(sequence) for sequence in sequences]
        return Examples(
            {
                "input_ids": tasks.padded(sequences, filler),
                "attention_mask": tasks.padded(masks, 0),
                "labels": tasks.padded(labels, IGNORED),
            }
        )

    def supervised(self, batch: Batch) -> Tensor:
        """The number of response tokens."""
        return tasks.supervised_tokens(batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a response token, in nats."""
        return tasks.mean_token_loss(model, batch)

    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, *, scored: bool = True
    ) -> Evaluation:
        """The loss of the response tokens, and how often the right response is the likeliest.

        The candidates are the different responses among `examples`. The likeliest has the highest
        mean log-likelihood per token. With one candidate, or more than `MAX_CANDIDATES`, there is
        nothing to choose from, and the metric is None.
        """
        with tasks.evaluating(model):
            losses, counts = _losses(model, examples, batch_size)
            metric = self._accuracy(model, examples, batch_size) if scored else None
        return Evaluation(float(losses.sum() / counts.sum()), metric, int(counts.sum()))

    def _accuracy(self, model: nn.Module, examples: Examples, batch_size: int) -> float | None:
        prompts, responses = _split(examples)
        candidates = sorted(set(map(tuple, responses)))
        if not 1 < len(candidates) <= MAX_CANDIDATES:
            return None
        scores = []
        for candidate in candidates:
            asked = self._examples(prompts, [list(candidate)] * len(prompts), filler=0)
            losses, counts = _losses(model, asked, batch_size)
            scores.append(losses / counts)
        guesses = torch.stack(scores).argmin(dim=0).tolist()
        right = [candidates[g] == tuple(r) for g, r in zip(guesses, responses, strict=True)]
        return float(sum(right) / len(right))


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _losses(model: nn.Module, examples: Examples, batch_size: int) -> tuple[Tensor, Tensor]:
    """For each example the summed loss in nats, and the number, of its response tokens."""
    losses = torch.zeros(len(examples), dtype=torch.float64)
    counts = torch.zeros(len(examples), dtype=torch.int64)
    for rows, batch in examples.batches(batch_size):
        logits = tasks.logits_of(model, batch)
        targets = tasks.next_token_targets(batch).to(logits.device)
        losses[rows] = tasks.next_token_loss(logits, targets).double().sum(dim=1).cpu()
        counts[rows] = (targets != IGNORED).sum(dim=1).cpu()
    return losses, counts


def _split(examples: Examples) -> tuple[list[list[int]], list[list[int]]]:
    """The token ids of each example's prompt, and of its response."""
    prompts, responses = [], []
    tensors = examples.tensors
    for ids, mask, labels in zip(
        tensors["input_ids"], tensors["attention_mask"], tensors["labels"], strict=True
    ):
        answered = labels != IGNORED
        prompts.append(ids[mask.bool() & ~answered].tolist())
        responses.append(ids[answered].tolist())
    return prompts, responses
