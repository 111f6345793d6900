"""Models that a run cannot be done with are refused; what is drawn at random ships."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
)

from fslora.client import heads
from fslora.config import SimulateConfig
from fslora.export import save_adapter
from fslora.models import load_model, load_tokenizer, take_state
from fslora.prepare import prepare
from fslora.protocol import ServerState

SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DISTILBERT = {"vocab_size": 30, "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
GPT2 = {"vocab_size": 30, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
CLASSES = {"task": "classification"}


@pytest.fixture
def load(tmp_path):
    """Save a model and load it for a run."""

    def saved_and_loaded(model=None, highest_id=0, **settings):
        if model is not None:
            model.save_pretrained(tmp_path)
        config = SimulateConfig(
            **{"model": str(tmp_path), "data": "d", "rank": 2, "max_length": 8} | settings
        )
        return load_model(config, ["no", "yes"], 0, highest_id)

    return saved_and_loaded


@pytest.mark.parametrize("settings", [{}, CLASSES])
def test_an_encoder_with_a_decoder_is_refused(load, settings):
    with pytest.raises(ValueError, match=r"encoder with a decoder.* use a decoder such as Llama"):
        load(T5Config(vocab_size=30, d_model=8, d_ff=8, num_layers=1, num_heads=1), **settings)


@pytest.mark.parametrize("settings", [{}, CLASSES], ids=["no output layer", "one layer more"])
def test_learnt_weights_that_are_not_there_are_refused(load, settings, tmp_path):
    model = LlamaModel(LlamaConfig(**SIZES))
    if settings:
        load(model, **settings)  # a classifier's head is drawn
        config = LlamaConfig(**{**SIZES, "num_hidden_layers": 2})
        config.save_pretrained(tmp_path)
        model = None
    with pytest.raises(
        ValueError, match=r"no weights that fit (lm_head,|model.layers.1.*modules,)"
    ):
        load(model, **settings)


@pytest.mark.parametrize(
    ("model", "beside"),
    [
        (lambda: BertForMaskedLM(BertConfig(**SIZES)), "bert.pooler.dense"),
        (lambda: DistilBertForMaskedLM(DistilBertConfig(**DISTILBERT)), "pre_classifier"),
    ],
    ids=["bert without a pooler", "distilbert"],
)
def test_all_that_a_classifier_lacks_is_trained_and_shipped(load, tmp_path, model, beside):
    model = load(model(), **CLASSES)
    trained = {name.split(".modules_to_save")[0] for name in heads(model)}
    assert trained == {f"base_model.model.{beside}", "base_model.model.classifier"}
    save_adapter(model, ServerState(0, *take_state(model), 0), tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path)  # draws others
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_head_for_other_classes_is_drawn_anew(load):
    model = load(LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)), **CLASSES)
    assert [tuple(p.shape) for p in heads(model).values()] == [(2, 16)]


def test_roberta_reads_fewer_tokens_than_it_has_positions(load):
    model = RobertaForMaskedLM(RobertaConfig(**{**SIZES, "pad_token_id": 3}))
    with pytest.raises(ValueError, match="--max-length 32 is more than the 31 tokens"):
        load(model, **CLASSES, max_length=32)
    loaded = load(**CLASSES, max_length=31)
    loaded(input_ids=torch.ones(1, 31, dtype=torch.int64))


@pytest.mark.parametrize("settings", [{}, CLASSES])
def test_tokens_that_a_model_does_not_know_are_refused(load, settings):
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match=r"gives the token 30, .* those below 30: .*resize_token"):
        load(model, highest_id=30, **settings)


def test_a_wrong_target_is_answered_by_the_layers_of_the_base(load):
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    with pytest.raises(ValueError, match="named c_attn, c_fc, c_proj, lm_head; or use all-linear"):
        load(model, target_modules="q_proj")
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match=r"score is .* trained whole as a head"):
        load(model, target_modules="q_proj,score", **CLASSES)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_torn_file_is_one_message(load, tmp_path, tiny_llama, file):
    for path in tiny_llama.iterdir():
        whole = path.read_bytes()
        (tmp_path / path.name).write_bytes(whole[: len(whole) // 2] if path.name == file else whole)
    config = SimulateConfig(model=str(tmp_path), data="d")
    what = {"model.safetensors": load, "tokenizer.json": lambda: load_tokenizer(config)}
    with pytest.raises(ValueError, match=r"cannot load the (model|tokenizer) .*\. Give a folder"):
        what[file]()


def test_a_token_that_only_a_client_has_is_refused_before_it_trains(settings, tmp_path):
    model = shutil.copytree(settings["model"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(Path(settings["data"]).read_text().replace('"text": "', '"text": "<new> ', 1))
    config = SimulateConfig(**{**settings, "model": str(model), "data": str(texts)})
    with pytest.raises(ValueError, match="gives the token 258, and the model knows those below"):
        prepare(config)


def test_token_types_that_a_model_does_not_know_are_refused_with_what_to_do(settings, tmp_path):
    sizes = {**SIZES, "pad_token_id": 1, "type_vocab_size": 1}
    RobertaForSequenceClassification(RobertaConfig(**sizes)).save_pretrained(tmp_path)
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "the", "cat", "sat"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path)
    pairs = {"text_column": "text,author", "model": str(tmp_path)}
    config = SimulateConfig(**settings | CLASSES | pairs)
    with pytest.raises(ValueError, match=r"token type 1, .* below 1: put \"model_input_names\""):
        prepare(config)
    file = tmp_path / "tokenizer_config.json"
    named = {"model_input_names": ["input_ids", "attention_mask"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    run = prepare(config)
    assert run.task.evaluate(run.model, run.data.evaluation, 2).count == 6
