from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fslora.data.classification import Classification
from fslora.data.rows import read_rows

ROWS = [
    {"one": "a b c d e", "two": "a", "label": "yes"},
    {"one": "b", "two": "c d", "label": "no"},
    {"one": "a b", "two": "d", "label": "maybe"},
]


class FirstWord(nn.Module):
    """Class logits are a row of a table, chosen by the first token."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids, attention_mask):
        assert input_ids.shape == attention_mask.shape
        return SimpleNamespace(logits=self.table[input_ids[:, 0]])


def test_examples_are_padded_to_the_longest_and_batches_trimmed(words):
    task = Classification(("one",), max_length=4)
    classes = task.class_names(ROWS)
    assert classes == ["maybe", "no", "yes"]
    examples = task.encode(ROWS, words, classes)
    assert examples.tensors["input_ids"].tolist() == [[3, 4, 5, 6], [4, 2, 2, 2], [3, 4, 2, 2]]
    assert examples.tensors["labels"].tolist() == [2, 1, 0]
    batch = examples.take(torch.tensor([2, 1]))
    assert batch["input_ids"].tolist() == [[3, 4], [4, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [0, 1]


def test_numbers_sort_by_value():
    rows = [{"label": label} for label in ("10", "9", "1")]
    assert Classification().class_names(rows) == ["1", "9", "10"]
    assert Classification().class_names([*rows, {"label": "x"}]) == ["1", "10", "9", "x"]


def test_a_text_of_no_tokens_is_one_filler(bare_words):
    rows = [{"one": text, "label": "no"} for text in ("", "a b")]
    tensors = Classification(("one",)).encode(rows, bare_words, ["no", "yes"]).tensors
    assert tensors["input_ids"].tolist() == [[0, 0], [1, 2]]
    assert tensors["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_a_tokenizer_that_speaks_of_ids_alone_gives_a_mask_too(bare_words):
    bare_words.model_input_names = ["input_ids"]
    rows = [{"one": text, "label": "no"} for text in ("a", "a b")]
    tensors = Classification(("one",)).encode(rows, bare_words, ["no", "yes"]).tensors
    assert tensors["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_a_column_named_by_mistake_is_not_listed_whole(words):
    rows = [{"one": "a", "label": f"{n:04}" if n else ""} for n in range(2000)]
    with pytest.raises(ValueError, match=r"'', '0001', .*, '0009' and 1,990 more; a classifier"):
        Classification().class_names(rows)
    with pytest.raises(ValueError, match=r"'0009' and 1,990 more in .*; the .* have 'no', 'yes'$"):
        Classification(("one",)).encode(rows, words, ["no", "yes"])


@pytest.mark.parametrize("labels", [["1", "1"], ["1", ""], []])
def test_labels_must_be_two_or_more_and_not_empty(labels):
    with pytest.raises(ValueError, match=r"name another --label-column|no column"):
        Classification().class_names([{"label": label} for label in labels])


def test_an_unknown_label_is_refused(words):
    with pytest.raises(ValueError, match=r"unknown labels 'maybe' .*have 'no', 'yes'"):
        Classification(("one",)).encode(ROWS, words, ["no", "yes"])
    with pytest.raises(ValueError, match="3 text columns"):
        Classification(("a", "b", "c"))


@pytest.mark.parametrize(("metric", "expected"), [("accuracy", 3 / 5), ("f1", 0.5)])
def test_evaluation_scores_every_example_whatever_its_length(words, metric, expected):
    task = Classification(("text",), metric=metric)
    texts = ["a", "b b b", "a a", "b", "a a a a"]
    rows = [{"text": t, "label": y} for t, y in zip(texts, "01001", strict=True)]
    examples = task.encode(rows, words, ["0", "1"])
    # "a" (id 3) speaks for class 0, "b" (id 4) for class 1.
    table = torch.zeros(13, 2)
    table[3], table[4] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    model = FirstWord(table)
    losses = [
        -table[3 if text[0] == "a" else 4].log_softmax(0)[int(label)].item()
        for text, label in zip(texts, "01001", strict=True)
    ]
    for batch_size in (1, 2, 5):
        found = task.evaluate(model, examples, batch_size)
        assert found.loss == pytest.approx(sum(losses) / 5, rel=1e-6)
        assert found.metric == pytest.approx(expected)
        assert found.count == 5
    batch = examples.take(torch.tensor([0, 3]))
    assert task.supervised(batch) == 2
    assert task.loss(model, batch).item() == pytest.approx((losses[0] + losses[3]) / 2, rel=1e-6)


def test_a_real_pair_is_read_as_the_model_was_taught(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models/all-MiniLM-L6-v2-fp16")
    rows = read_rows(str(shared_data / "glue/MRPC/dev.tsv.gz"))
    task = Classification(("#1 String", 4), "Quality", max_length=48)
    examples = task.encode(rows, tokenizer, task.class_names(rows))
    assert examples.tensors["labels"].sum() == 279  # the positive pairs of MRPC's dev set
    assert examples.tensors["input_ids"].shape == (408, 48)
    row = 0
    batch = examples.take(torch.tensor([row]))
    text = tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("[CLS] he said the foodservice pie")
    assert text.count("[SEP]") == 2
    second = batch["input_ids"][0][batch["token_type_ids"][0] == 1]
    assert tokenizer.decode(second).startswith('" the foodservice pie business does not fit')
