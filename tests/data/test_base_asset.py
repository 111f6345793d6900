import math
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fslora
from benchmarks.pretrain_base import (
    BOS,
    EOS,
    PAD,
    Pretraining,
    held_out_loss,
    language_reference,
    new_model,
    pretrain,
    split,
    token_stream,
    train_tokenizer,
)
from fslora.data.python_docs import python_docs

BASE = Path(next(iter(fslora.__path__))) / "assets" / "base"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, local_files_only=True)


@pytest.fixture(scope="module")
def held_out():
    return split(language_reference())[1]


def test_the_asset_is_small_enough_to_ship_and_holds_no_pickle():
    files = [file for file in BASE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 4 * 2**20
    assert {file.suffix for file in files} == {".json", ".md", ".safetensors"}


def test_it_loads_without_a_word(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoTokenizer.from_pretrained(BASE, local_files_only=True)
        base = AutoModelForCausalLM.from_pretrained(
            BASE, dtype=torch.float32, local_files_only=True
        )
    out, err = capfd.readouterr()
    assert "warn" not in (out + err).lower()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in base.parameters())
    assert base.lm_head.weight is base.model.embed_tokens.weight


@pytest.mark.parametrize(
    "text",
    ["def f(x):\n\treturn x  # two  spaces\n\n", " Ωéß 漢字 🐍 \u200b\r\n", "\x00\x7f\xa0", ""],
    ids=["code", "unicode", "control", "empty"],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < len(tokenizer) for token in ids)
    assert not {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)


def test_tokenizer_and_model_agree(tokenizer, model):
    assert len(tokenizer) == model.config.vocab_size
    for name, token in (("pad", PAD), ("bos", BOS), ("eos", EOS)):
        number = tokenizer.convert_tokens_to_ids(token)
        assert number == getattr(tokenizer, f"{name}_token_id")
        assert number == getattr(model.config, f"{name}_token_id")
        assert number == getattr(model.generation_config, f"{name}_token_id")


def test_it_predicts_held_out_text(tokenizer, model, held_out):
    stream = token_stream(tokenizer, held_out)[: 24 * 256]
    # The best predictor that ignores context, fitted on this very text: no such model beats it.
    share = torch.bincount(stream).double() / len(stream)
    entropy = -float(torch.special.xlogy(share, share).sum())
    assert held_out_loss(model, stream, 256) < min(entropy - 1, math.log(len(tokenizer)) - 3)


def test_held_out_text_is_apart_and_stays_so_when_text_moves(held_out):
    train, _ = split(language_reference())
    assert not set(train) & set(held_out)
    characters = sum(map(len, held_out))
    assert 0.05 < characters / (characters + sum(map(len, train))) < 0.15
    again = split("\n\n".join(["A new first paragraph.", *reversed(train + held_out)]))
    assert set(held_out[1:]) <= set(again[1])


def test_the_base_never_reads_a_clients_text():
    read = language_reference()
    assert len(read) > 300_000
    assert not [row for row in python_docs() if len(row["text"]) > 80 and row["text"] in read]


def test_pretraining_repeats_bit_by_bit_and_keeps_the_best(held_out):
    config = Pretraining(
        vocabulary=300, context=16, steps=6, batch_size=2, warmup_steps=1, evaluate_every=2, lr=0.1
    )
    runs = []
    for _ in range(2):
        tokenizer = train_tokenizer(held_out[:20], config)
        stream = token_stream(tokenizer, held_out[:20])
        model = new_model(tokenizer, config)
        history = pretrain(model, stream, stream[:320], config)
        runs.append((tokenizer.backend_tokenizer.to_str(), history, model.state_dict()))
        best = min(evaluation.val_loss for evaluation in history)
        assert held_out_loss(model, stream[:320], config.context) == best
    (text, history, weights), (text_again, history_again, weights_again) = runs
    assert text == text_again
    assert history == history_again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"vocabulary": 100}, "at least 259"),
        ({"steps": 50}, "--warmup-steps"),
        ({"context": 0}, "--context"),
    ],
)
def test_a_wrong_schedule_is_refused(wrong, remedy):
    with pytest.raises(ValueError, match=remedy):
        Pretraining(**wrong)


def test_too_short_a_text_is_refused(model):
    with pytest.raises(ValueError, match="smaller --context"):
        held_out_loss(model, torch.zeros(10, dtype=torch.int64), 16)
