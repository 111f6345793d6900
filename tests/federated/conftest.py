import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fslora.compare.settings import CompareConfig
from fslora.config import SimulateConfig

SENTENCE = (
    "the cat sat on the mat and the dog ran after a red ball while rain fell on the roof "
    "of an old house near the quiet river where boats wait for morning"
)
WORDS = SENTENCE.split()


def _save_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folder of a two-layer random Llama with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    vocabulary = _save_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=1,
            )
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """Folder of a one-layer random BERT with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_bert")
    vocabulary = _save_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=64,
            )
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A jsonl file: ten rows for each of six authors, with a label."""
    generator = torch.Generator().manual_seed(3)
    lines = []
    for author in range(6):
        for _ in range(10):
            order = torch.randint(len(WORDS), (24,), generator=generator).tolist()
            words = " ".join(WORDS[(k + author) % len(WORDS)] for k in order)
            lines.append(
                {
                    "id": str(len(lines)),
                    "author": f"author {author}",
                    "text": words,
                    "label": "ab"[len(lines) % 2],
                }
            )
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def settings(tiny_llama, texts, tmp_path):
    """Keyword arguments of a config that runs in about a second."""
    return {
        "model": str(tiny_llama),
        "data": str(texts),
        "partition": "natural:author",
        "clients": 6,
        "per_round": 3,
        "rank": 8,
        "alpha": 8.0,
        "ratios": "1/8,1/4,1/2",
        "rounds": 2,
        "local_steps": 2,
        "batch_size": 2,
        "max_length": 16,
        "lr": 1e-2,
        "eval_examples": 6,
        "out": str(tmp_path / "run"),
    }


@pytest.fixture
def track(settings, tmp_path):
    """A comparison of a few seconds; threads=1 as compare has it."""
    threads = torch.get_num_threads()
    settings = {**settings, "out": str(tmp_path / "compare"), "targets": "loss:5.5,loss:0.1"}
    settings |= {"partition": "iid", "per_round": 2, "clients": 3, "eval_examples": 4}
    yield CompareConfig(SimulateConfig(**settings), strategies="fslora,fedit", seeds="0,1")
    torch.set_num_threads(threads)
