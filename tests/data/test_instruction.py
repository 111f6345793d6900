import pytest
import torch

from fslora.data.instruction import MAX_CANDIDATES, Instruction
from fslora.data.rows import read_rows
from tests.data.conftest import Bigram, word_tokenizer

A, B, C, D = 3, 4, 5, 6


def task(**settings):
    return Instruction(("ask", "more"), "answer", **settings)


@pytest.fixture
def template_words():
    """`words` with the template's own two words at the end: ### 13, Response: 14."""
    names = ["?", "<s>", "</s>", *"abcdefghij", "###", "Response:"]
    return word_tokenizer(names, bos_token="<s>", eos_token="</s>")


def test_only_the_response_is_supervised(template_words):
    rows = [{"ask": "a", "more": "b", "answer": "c d"}, {"ask": "a", "more": "", "answer": "d"}]
    examples = task().encode(rows, template_words, [])
    assert examples.tensors["input_ids"].tolist() == [
        [1, A, B, 13, 14, C, D, 2],
        [1, A, 13, 14, D, 2, 2, 2],
    ]
    assert examples.tensors["labels"].tolist() == [
        [-100, -100, -100, -100, -100, C, D, 2],
        [-100, -100, -100, -100, D, 2, -100, -100],
    ]
    assert examples.tensors["attention_mask"].sum(1).tolist() == [8, 6]
    assert task().supervised(examples.take(torch.tensor([0, 1]))) == 5


def test_truncation_keeps_the_response(template_words):
    rows = [{"ask": "a a b", "more": "c", "answer": "d d"}]

    def cut(length):
        tensors = task(max_length=length).encode(rows, template_words, []).tensors
        return tensors["input_ids"][0].tolist(), tensors["labels"][0].tolist()

    assert cut(6) == ([1, 13, 14, D, D, 2], [-100] * 3 + [D, D, 2])
    assert cut(8)[0] == [1, B, C, 13, 14, D, D, 2]
    # A response that alone is too long loses its end, and is still asked for by a prompt.
    assert cut(4) == ([1, 14, D, D], [-100, -100, D, D])
    with pytest.raises(ValueError, match="at least 4"):
        task(max_length=3)


def test_without_special_tokens_there_are_none(bare_words):
    rows = [{"ask": "a", "more": "b", "answer": "c"}]
    assert task().encode(rows, bare_words, []).tensors["input_ids"].tolist() == [[1, 2, 0, 0, 3]]


def test_a_missing_response_is_refused_where_nothing_can_stand_for_it(words, bare_words):
    rows = [{"ask": "a", "more": "b", "answer": answer} for answer in ("c", " ", "")]
    assert task().surely_trains(rows[:1])
    assert not task().surely_trains(rows), "it is looked at before training"
    with pytest.raises(ValueError, match=r"2 of 3 rows have nothing in column 'answer'.*fill them"):
        task().encode(rows, bare_words, [])
    assert task().encode(rows, words, []).tensors["labels"].max(1).values.tolist() == [5, 2, 2]


def test_the_likeliest_candidate_is_normalised_by_its_length(template_words):
    # After "Response:" (14): c with p=.5, d with p=.3. After c: the end (2) surely; after d: d or
    # the end. The candidates are "c" (p = .5) and "d d" (p = .3 * .6 * .4, but three tokens).
    table = torch.full((15, 15), -30.0)
    table[14, C], table[14, D] = torch.tensor([0.5, 0.3]).log()
    table[C, 2] = 0.0
    table[D, D], table[D, 2] = torch.tensor([0.6, 0.4]).log()
    means = [0.5 ** (1 / 2), (0.3 * 0.6 * 0.4) ** (1 / 3)]
    assert means[0] > means[1]
    rows = [{"ask": "a", "more": "", "answer": answer} for answer in ("c", "d d", "c")]
    examples = task().encode(rows, template_words, [])
    found = task().evaluate(Bigram(table), examples, batch_size=2)
    assert found.metric == pytest.approx(2 / 3)
    # Now "d d" has the lower likelihood (.0864 against .1), but the higher one per token.
    table[14, C], table[14, D] = torch.tensor([0.1, 0.36]).log()
    assert 0.1 > 0.36 * 0.6 * 0.4
    found = task().evaluate(Bigram(table), examples, batch_size=2)
    assert found.metric == pytest.approx(1 / 3)
    unscored = task().evaluate(Bigram(table), examples, batch_size=2, scored=False)
    assert (unscored.loss, unscored.metric) == (found.loss, None)


def test_loss_is_over_response_tokens_whatever_the_batch(template_words):
    table = torch.randn(15, 15, generator=torch.Generator().manual_seed(1))
    log_p = table.log_softmax(-1)
    rows = [{"ask": "a b", "more": "", "answer": "c d"}, {"ask": "a", "more": "", "answer": "d"}]
    pairs = [(14, C), (C, D), (D, 2), (14, D), (D, 2)]
    expected = -sum(log_p[a, b].item() for a, b in pairs) / 5
    examples = task().encode(rows, template_words, [])
    model = Bigram(table).train()
    for batch_size in (1, 2):
        found = task().evaluate(model, examples, batch_size)
        assert (found.loss, found.count) == (pytest.approx(expected, rel=1e-6), 5)
    assert model.dropout.training
    batch = examples.take(torch.tensor([0, 1]))
    assert task().loss(model.eval(), batch).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("different", [1, MAX_CANDIDATES + 1])
def test_nothing_to_choose_from_has_no_metric(different):
    names = ["?", "<s>", "</s>", *(f"w{n}" for n in range(MAX_CANDIDATES + 1))]
    tokenizer = word_tokenizer(names, eos_token="</s>")
    rows = [{"ask": "w0", "more": "", "answer": f"w{n % different}"} for n in range(40)]
    model = Bigram(torch.zeros(len(names), len(names)))
    assert task().evaluate(model, task().encode(rows, tokenizer, []), 8).metric is None


def test_a_real_question_on_a_real_model(shared_data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "models/stories260K-hf"
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    rows = read_rows(str(shared_data / "commonsense/boolq/test.json.gz"))[:24]
    boolq = Instruction(("instruction", "input"), "output", max_length=160)
    examples = boolq.encode(rows, tokenizer, [])
    found = boolq.evaluate(model, examples, batch_size=8)
    # Oracle: every row's two answers scored one by one, unpadded.
    right = 0
    for row in rows:
        scores = {}
        for answer in ("true", "false"):
            asked = boolq.encode(
                [row | {"output": f"the correct answer is {answer}"}], tokenizer, []
            )
            batch = asked.take(torch.tensor([0]))
            scores[answer] = model(**batch).loss.item()
        right += min(scores, key=scores.get) == row["answer"]
    assert found.metric == pytest.approx(right / 24)
    assert 0 < right < 24
