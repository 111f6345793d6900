"""Pretrains the small Llama-architecture base that `make demo` ships in `fslora/assets/base`.

Run as `python -m benchmarks.pretrain_base --out fslora/assets/base`; five minutes on one core.
The text is the language reference that `help()` prints: no client of the demo owns any of it, and
it says little of what their docstrings say, which leaves them something to learn. (A base that
also read the docstrings of other modules left LoRA 7% of the loss to close, not 22%.) The same
versions of Python and the libraries (named in the model card), on the same kind of processor, make
the same files bit by bit.
"""

import math
import platform
import zlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tokenizers
import torch
import transformers
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


@dataclass(frozen=True, slots=True)
class Pretraining:
    """What determines the base, besides the text and the versions of the libraries."""

    vocabulary: int = 1024
    context: int = 256
    steps: int = 1000
    batch_size: int = 8
    lr: float = 4e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    evaluate_every: int = 100
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.vocabulary < 259:
            raise ValueError("--vocabulary must be at least 259: 256 bytes and 3 special tokens")
        if not 0 < self.warmup_steps < self.steps:
            raise ValueError("--warmup-steps must lie between 1 and --steps - 1")
        if min(self.context, self.batch_size, self.evaluate_every, self.threads) < 1:
            raise ValueError("--context, --batch-size, --evaluate-every, --threads must be >= 1")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean loss per token, in nats: of training since the last evaluation, and held out."""

    step: int
    train_loss: float
    val_loss: float


def language_reference() -> str:
    """The topics of `help()`, sorted by name."""
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def split(text: str) -> tuple[list[str], list[str]]:
    """The sections of a text as (training, held out); about a tenth of them is held out.

    The content alone says where a section begins (one paragraph in about 8) and on which side it
    falls, so a passage that the manual repeats, or that another version of Python moves, stays
    on its side. Repeated sections are kept once.
    """
    sections: list[list[str]] = []
    for paragraph in text.split("\n\n"):
        if not sections or zlib.crc32(paragraph.encode()) % 8 == 0:
            sections.append([])
        sections[-1].append(paragraph)
    train: dict[str, None] = {}
    held_out: dict[str, None] = {}
    for section in sections:
        side = held_out if zlib.crc32(section[0].encode()) // 8 % 10 == 0 else train
        side["\n\n".join(section)] = None
    return list(train), list(held_out)


def train_tokenizer(texts: list[str], config: Pretraining) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text encodes, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=config.context,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, sections: list[str]) -> torch.Tensor:
    """All sections, each between BOS and EOS, as one tensor [tokens] of int64."""
    # The backend's own encode: the wrapper's warns of sections longer than the context.
    encode = tokenizer.backend_tokenizer.encode
    return torch.tensor([i for section in sections for i in encode(f"{BOS}{section}{EOS}").ids])


def new_model(tokenizer: PreTrainedTokenizerFast, config: Pretraining) -> LlamaForCausalLM:
    """The untrained base, its weights drawn from the seed."""
    architecture = LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=config.context,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(architecture)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, context: int) -> float:
    """Mean loss per token, in nats, over the whole windows of a stream [tokens].

    Raises:
        ValueError: the stream is shorter than one window.
    """
    if len(stream) < context:
        raise ValueError(
            f"the held-out text has {len(stream)} tokens, fewer than one window of {context}: "
            "take a smaller --context or a longer text"
        )
    windows = stream[: len(stream) // context * context].view(-1, context)
    total = sum(
        float(model(input_ids=batch, labels=batch).loss) * len(batch)
        for batch in torch.split(windows, 16)
    )
    return total / len(windows)


def pretrain(
    model: LlamaForCausalLM, train: torch.Tensor, held_out: torch.Tensor, config: Pretraining
) -> list[Evaluation]:
    """Trains the model in place, on random windows, and leaves it at its best held-out loss.

    Args:
        model: in float32.
        train: token stream [tokens].
        held_out: token stream [tokens].
        config: schedule and seed.
    """
    draws = torch.Generator().manual_seed(config.seed)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, config))
    within = torch.arange(config.context)
    history: list[Evaluation] = []
    best = {name: value.clone() for name, value in model.state_dict().items()}
    running = 0.0
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("pretraining", total=config.steps)
        for step in range(1, config.steps + 1):
            starts = torch.randint(
                len(train) - config.context, (config.batch_size, 1), generator=draws
            )
            batch = train[starts + within]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            running += float(loss.detach())
            progress.advance(bar)
            if step % config.evaluate_every and step < config.steps:
                continue
            since = step - (history[-1].step if history else 0)
            val_loss = held_out_loss(model, held_out, config.context)
            if all(val_loss < earlier.val_loss for earlier in history):
                best = {name: value.clone() for name, value in model.state_dict().items()}
            history.append(Evaluation(step, running / since, val_loss))
            running = 0.0
            line = f"step {step}  train {history[-1].train_loss:.3f}  held out {val_loss:.3f}"
            progress.update(bar, description=line)
            progress.console.print(line)
    model.load_state_dict(best)
    return history


def _cosine(step: int, config: Pretraining) -> float:
    """Share of the peak step size: linear warm-up, then a cosine down to a tenth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def model_card(
    config: Pretraining, history: list[Evaluation], counts: dict[str, int], parameters: int
) -> str:
    """The README.md beside the weights: what they are and how to make them again."""
    best = min(history, key=lambda evaluation: evaluation.val_loss)
    losses = "\n".join(f"| {e.step} | {e.train_loss:.3f} | {e.val_loss:.3f} |" for e in history)
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The base of `make demo`

A Llama-architecture language model of {parameters:,} parameters with a byte-level BPE tokenizer of
{config.vocabulary} tokens and a context of {config.context}. It is made to be adapted in seconds on
a processor, not to write good text. Weights are stored in float16; train it in float32:
`AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)`.

**Text.** The language reference as Python's `help()` prints it (`pydoc_data.topics`), which holds
no docstring of the demo's clients.
{counts["train"]:,} training tokens, {counts["held_out"]:,} held out (a tenth of the sections,
chosen by a hash of their content). The text is Python's documentation, (c) Python Software
Foundation, under the PSF License Version 2.

**Made by** `python -m benchmarks.pretrain_base --out fslora/assets/base` with Python
{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__},
tokenizers {tokenizers.__version__} on {config.threads} thread(s); seed {config.seed}, AdamW,
{config.steps} steps of {config.batch_size} x {config.context} tokens, peak learning rate
{config.lr:g}, weight decay {config.weight_decay:g}, cosine schedule. The weights are those of the
best held-out loss: **{best.val_loss:.3f}** nats a token, at step {best.step} (an untrained model:
{math.log(config.vocabulary):.2f}).

| step | training loss | held-out loss |
|---|---|---|
{losses}
"""


def main(out: Path, config: Pretraining) -> None:
    """Writes tokenizer, weights (float16 safetensors) and model card.

    Args:
        out: the folder to write, made if missing; earlier files of the same names are replaced.
        config: what determines the base.
    """
    torch.set_num_threads(config.threads)
    train_sections, held_out_sections = split(language_reference())
    tokenizer = train_tokenizer(train_sections, config)
    train = token_stream(tokenizer, train_sections)
    held_out = token_stream(tokenizer, held_out_sections)
    model = new_model(tokenizer, config)
    print(f"{model.num_parameters():,} parameters, {len(train):,} training tokens")
    history = pretrain(model, train, held_out, config)
    tokenizer.save_pretrained(out)
    model.half().save_pretrained(out)
    counts = {"train": len(train), "held_out": len(held_out)}
    card = model_card(config, history, counts, model.num_parameters())
    (out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
