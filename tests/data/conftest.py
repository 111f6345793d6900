"""A tokenizer made in memory: one id per word, so that tests can say what the ids are."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast


def word_tokenizer(words, **special_tokens):
    """A tokenizer whose ids are the positions in `words`; unknown words are id 0."""
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=words[0], **special_tokens)


class Bigram(nn.Module):
    """The smallest language model: the next token's logits are a row of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.dropout = nn.Dropout(0.9)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


@pytest.fixture
def words():
    """Ids: ? 0, <s> 1, </s> 2, a 3, b 4, c 5, d 6, …."""
    names = ["?", "<s>", "</s>", *"abcdefghij"]
    return word_tokenizer(names, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def bare_words():
    """No special token at all; a 1, b 2, …."""
    tokenizer = word_tokenizer(["?", *"abcdefghij"])
    assert tokenizer.pad_token_id is None
    return tokenizer


@pytest.fixture
def bigram():
    """A language model with random, fixed logits over 13 words."""
    return Bigram(torch.randn(13, 13, generator=torch.Generator().manual_seed(0)))
