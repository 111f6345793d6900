"""Which rows of the data a run takes, and that they stay what they are when clients are joined."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fslora.config import SimulateConfig
from fslora.data.classification import Classification
from fslora.data.tasks import evaluating, logits_of
from fslora.models import take_state
from fslora.prepare import examples_of, prepare
from fslora.protocol import POOLED


def test_train_rows_deals_so_many_of_the_rows(settings):
    few = {**settings, "partition": "iid", "clients": 2, "per_round": 2}
    for rows, dealt in ((20, 18), (0, 54), (61, 54)):  # of 60; a tenth is held out
        data = prepare(SimulateConfig(**few | {"train_rows": rows})).data
        assert sum(data.texts) == dealt


def test_train_rows_of_a_single_text_is_refused(settings, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(settings["data"]).read_text())
    config = SimulateConfig(**{**settings, "data": str(text), "train_rows": 9})
    with pytest.raises(ValueError, match="--train-rows 9 would deal the whole of a single text"):
        prepare(config)


def test_what_a_run_cannot_have_is_refused_before_the_model_is_loaded(settings, monkeypatch):
    monkeypatch.setattr("fslora.prepare.load_model", None)
    with pytest.raises(ValueError, match=r"--attackers .* of 6 clients is nobody"):
        prepare(SimulateConfig(**settings, attack="scale", attackers=0.05))
    with pytest.raises(ValueError, match="server-lr 1"):
        prepare(SimulateConfig(**settings, strategy="flora", server_lr=2))


def test_a_client_of_the_name_of_all_clients_is_refused(settings, tmp_path):
    rows = tmp_path / "rows.jsonl"
    names = [POOLED, "somebody"]
    rows.write_text("".join(json.dumps({"author": n, "text": "abc" * 9}) + "\n" for n in names * 9))
    config = SimulateConfig(**{**settings, "data": str(rows), "clients": 2, "per_round": 2})
    with pytest.raises(ValueError, match="is called 'all clients', which is kept for"):
        prepare(config)


@pytest.mark.parametrize("joined", ["centralised", "validation"])
def test_a_decoder_classifies_a_text_alike_alone_and_among_all_clients(
    settings, tiny_llama, tmp_path, joined
):
    """It looks for the last token that is no padding, whose id is not 0 here."""
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(tiny_llama, model)
    known = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**known, "pad_token": "<eos>"}))
    texts = [
        {"author": f"{n // 20}", "text": "x" * (n + 1), "label": "ab"[n % 2]} for n in range(60)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    given = {"model": str(model), "data": str(rows), "clients": 3, "task": "classification"}
    more = {"strategy": joined} if joined == "centralised" else {"validation": True}
    longer = {"max_length": 64, "eval_examples": 0}
    run = prepare(SimulateConfig(**{**settings, **given, **more, **longer}))
    examples = examples_of(run)[POOLED] if joined == "centralised" else run.data.evaluation
    rows = torch.arange(len(examples))
    with evaluating(run.model):
        together = logits_of(run.model, examples.take(rows))
        alone = torch.cat([logits_of(run.model, examples.take(row[None])) for row in rows])
    torch.testing.assert_close(together, alone)


def test_clients_are_tokenised_once_to_hold_out_of_their_own(settings, monkeypatch):
    texts = []

    def counted(self, rows, tokenizer, classes):
        texts.extend(row["id"] for row in rows)
        return encode(self, rows, tokenizer, classes)

    encode = Classification.encode
    monkeypatch.setattr(Classification, "encode", counted)
    given = {**settings, "task": "classification", "partition": "iid", "validation": True}
    prepare(SimulateConfig(**given))
    assert sorted(texts, key=int) == [str(n) for n in range(60)]


def test_what_loading_draws_changes_no_adapter(settings, monkeypatch):
    """Weights on the meta device draw numbers where, and only where, something was compiled."""

    def first_factors():
        adapters, _ = take_state(prepare(SimulateConfig(**settings)).model)
        return [pair.lora_a for pair in adapters.values()]

    wanted, load = first_factors(), AutoModelForCausalLM.from_pretrained

    def drawing(*arguments, **named):
        torch.rand(1)
        return load(*arguments, **named)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", drawing)
    assert all(map(torch.equal, first_factors(), wanted))
