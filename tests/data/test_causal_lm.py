import math

import pytest
import torch

from fslora.data.causal_lm import CausalLM


def test_blocks_hold_the_joined_text_and_drop_the_rest(words):
    rows = [{"x": "a b", "y": "c"}, {"x": "", "y": "d e"}, {"x": "f", "y": "g"}]
    examples = CausalLM(("x", "y"), max_length=3).encode(rows, words, [])
    assert examples.tensors["input_ids"].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert examples.tensors["labels"].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert examples.tensors["attention_mask"].tolist() == [[1] * 3] * 2


def test_rows_are_joined_by_a_blank_line(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models/stories260K-hf")
    rows = [{"text": "Once upon"}, {"text": "a time"}]
    ids = CausalLM(max_length=64).tokens(rows, tokenizer)
    assert tokenizer.decode(ids).strip() == "Once upon\n\na time"


def test_rows_without_a_word_are_left_out():
    def split(texts, **_):
        return {"input_ids": [[len(part) for part in text.split("\n\n")] for text in texts]}

    rows = [{"x": x, "y": y} for x, y in [("a", "bb"), ("", ""), (" ", ""), ("", "ccc")]]
    assert CausalLM(("x", "y")).tokens(rows, split).tolist() == [1, 2, 3]
    assert CausalLM(("x", "y")).tokens(rows[1:3], split).tolist() == [0], "nothing to predict"


@pytest.mark.parametrize(("fixture", "filler"), [("words", 2), ("bare_words", 0)])
def test_an_only_block_that_is_short_is_padded(request, fixture, filler):
    tokenizer = request.getfixturevalue(fixture)
    ids = tokenizer.convert_tokens_to_ids(["a", "b"])
    examples = CausalLM(max_length=4).encode([{"text": "a b"}], tokenizer, [])
    assert examples.tensors["input_ids"].tolist() == [[*ids, filler, filler]]
    assert examples.tensors["labels"].tolist() == [[*ids, -100, -100]]
    assert examples.tensors["attention_mask"].tolist() == [[1, 1, 0, 0]]
    assert examples.take(torch.tensor([0]))["input_ids"].tolist() == [ids]


def test_one_token_predicts_nothing(words):
    assert len(CausalLM(max_length=4).encode([{"text": "a"}], words, [])) == 0
    with pytest.raises(ValueError, match="at least 2"):
        CausalLM(max_length=1)


def test_loss_and_accuracy_are_those_of_the_next_tokens(bigram):
    task = CausalLM(max_length=4)
    texts = torch.tensor([[3, 4, 5, 6], [3, 3, 2, 2]])
    labels = torch.tensor([[3, 4, 5, 6], [3, 3, -100, -100]])
    mask = (labels != -100).long()
    examples = task.blocks(torch.arange(8), None)
    examples.tensors.update(input_ids=texts, labels=labels, attention_mask=mask)
    pairs = [(3, 4), (4, 5), (5, 6), (3, 3)]
    log_p = bigram.table.log_softmax(-1)
    expected = -sum(log_p[a, b].item() for a, b in pairs) / 4
    right = sum(int(bigram.table[a].argmax()) == b for a, b in pairs)

    bigram.train()
    found = task.evaluate(bigram, examples, batch_size=1)
    assert bigram.training
    assert bigram.dropout.training
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert (found.metric, found.count) == (right / 4, 4)

    bigram.eval()
    together = task.evaluate(bigram, examples, batch_size=2)
    assert not bigram.training
    assert together.loss == pytest.approx(found.loss, rel=1e-6)


def test_the_training_loss_equals_the_models_own(shared_data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "models/stories260K-hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    text = "Once upon a time, a little girl named Lily found a needle in her room."
    examples = CausalLM(max_length=12).encode(
        [{"text": text}], AutoTokenizer.from_pretrained(folder), []
    )
    batch = examples.take(torch.arange(len(examples)))
    task = CausalLM(max_length=12)
    loss = task.loss(model, batch)
    loss.backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    theirs = model(**batch).loss
    theirs.backward()
    assert len(examples) > 1
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(gradient, model.model.embed_tokens.weight.grad)
    # It is pretrained on such stories: far below the log of its 512 words.
    assert loss.item() < math.log(512) / 2


def test_weighted_batch_losses_make_the_loss_of_all(bigram, words):
    task = CausalLM(max_length=6)
    rows = [{"text": "a b c d e f b d f a c e"}]
    short = task.encode([{"text": "g h i"}], words, []).take(torch.tensor([0]))
    long = task.encode(rows, words, []).take(torch.tensor([0, 1]))
    both = {
        name: torch.cat([long[name], torch.nn.functional.pad(short[name], (0, 3), value=fill)])
        for name, fill in {"input_ids": 2, "attention_mask": 0, "labels": -100}.items()
    }
    bigram.eval()
    weights = [task.supervised(batch).item() for batch in (short, long, both)]
    assert weights == [2, 10, 12]
    parts = task.loss(bigram, short) * 2 + task.loss(bigram, long) * 10
    assert task.loss(bigram, both).item() == pytest.approx(parts.item() / 12, rel=1e-6)
