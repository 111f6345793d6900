"""Stand-ins for the hub's tiny random models: the same architectures, built from their configs.

``from_pretrained("org/name")`` takes a folder ``org/name`` under the working directory before it
asks the hub, so tests that run where these are saved find them.
"""

from __future__ import annotations

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)

TOKENS = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Wide enough that an adapter visibly changes the outputs of so small a model.
SPREAD = {"initializer_range": 0.2}
DEEP = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
WIDE = {"intermediate_size": 64, "max_position_embeddings": 128}
GROUPED = {"num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}


def opt():
    size = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
    return OPTConfig(**DEEP, **size, **TOKENS, init_std=0.2)


def gpt2():
    return GPT2Config(**GPT, **TOKENS, **SPREAD)


def gptj():
    return GPTJConfig(**GPT, **TOKENS, **SPREAD, rotary_dim=4)


def llama():
    return LlamaConfig(**DEEP, **WIDE, **TOKENS, **SPREAD)


def mistral():
    return MistralConfig(**DEEP, **WIDE, **TOKENS, **SPREAD, **GROUPED)


def qwen2():
    return Qwen2Config(**DEEP, **WIDE, **TOKENS, **SPREAD, **GROUPED)


def gemma3():
    return Gemma3TextConfig(**DEEP, **WIDE, **TOKENS, **SPREAD, **GROUPED, head_dim=8)


def t5():
    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    start = {"decoder_start_token_id": 0}
    return T5Config(**size, vocab_size=512, pad_token_id=0, eos_token_id=1, **start)


def bart():
    size = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 128}
    width = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    start = {"decoder_start_token_id": 2, "forced_eos_token_id": 2}
    return BartConfig(**size, **width, **heads, **TOKENS, **start, init_std=0.2)


def bert():
    return BertConfig(**DEEP, **WIDE, **TOKENS, **SPREAD)


def roberta():
    return RobertaConfig(**DEEP, **WIDE, **TOKENS, **SPREAD)


def deberta():
    return DebertaConfig(
        **DEEP,
        **WIDE,
        **TOKENS,
        **SPREAD,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["c2p", "p2c"],
    )


def deberta_v2():
    return DebertaV2Config(
        **DEEP,
        **WIDE,
        **TOKENS,
        **SPREAD,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["c2p", "p2c"],
    )


CAUSAL = {
    "gpt2": gpt2,
    "peft-internal-testing/opt-125m": opt,
    "peft-internal-testing/tiny-random-OPTForCausalLM": opt,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": gpt2,
    "hf-internal-testing/tiny-random-gpt2": gpt2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": gptj,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": llama,
    "hf-internal-testing/tiny-random-MistralForCausalLM": mistral,
    "peft-internal-testing/tiny-dummy-qwen2": qwen2,
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": gemma3,
}
SEQ2SEQ = {
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": bart,
}
ENCODERS = {
    "bert-base-uncased": bert,
    "peft-internal-testing/tiny-random-BertModel": bert,
    "peft-internal-testing/tiny-random-RobertaModel": roberta,
    "peft-internal-testing/tiny-random-DebertaModel": deberta,
    "peft-internal-testing/tiny-random-DebertaV2Model": deberta_v2,
}
FAMILIES = ((AutoModelForCausalLM, CAUSAL), (AutoModelForSeq2SeqLM, SEQ2SEQ), (AutoModel, ENCODERS))


def save_models(folder):
    """Save every stand-in under ``folder/org/name``; those that are there stay."""
    for auto, configs in FAMILIES:
        for name, config in configs.items():
            if not (folder / name / "config.json").exists():
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    model = auto.from_config(config())
                model.save_pretrained(folder / name)
