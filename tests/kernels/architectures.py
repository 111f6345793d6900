"""The architectures that users fine-tune, tiny and built from their configs: nothing is fetched."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .models import randomised

VOCABULARY = 101
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
GATED = {"gate_proj", "up_proj", "down_proj"}
ENCODER = {"query", "key", "value", "dense"}
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# As many heads of keys and values as of queries.
SQUARE = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def _ids(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def text() -> dict[str, Tensor]:
    """Three sentences, one of them padded; every token is a label."""
    ids = _ids(3, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def text_pairs() -> dict[str, Tensor]:
    """Sentences and what a decoder is to write about them."""
    return {**text(), "labels": _ids(3, 7)}


def images() -> dict[str, Tensor]:
    """Three images of two classes."""
    return {"pixel_values": _draw(3, 3, 16, 16), "labels": torch.tensor([0, 1, 1])}


def sounds() -> dict[str, Tensor]:
    """Spectra of three recordings and what was said."""
    return {"input_features": _draw(3, 8, 24), "labels": _ids(3, 7)}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table.

    Attributes:
        config: the name of its config class in transformers.
        model: the name of its model class in transformers.
        options: of the config.
        fused: the last part of the name of every module that must be fused.
        targets: what a user passes as ``target_modules``.
        lora: further arguments of ``LoraConfig``.
        inputs: makes the arguments of a call with labels.
        left: the ends of the names of the LoRA modules that must stay vanilla PEFT.
    """

    config: str
    model: str
    options: dict[str, Any]
    fused: set[str]
    targets: str | list[str] = "all-linear"
    lora: dict[str, Any] | None = None
    inputs: Callable[[], dict[str, Tensor]] = text
    left: tuple[str, ...] = ()


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", "LlamaForCausalLM", DECODER, ATTENTION | GATED),
    "mistral": Architecture(
        "MistralConfig",
        "MistralForCausalLM",
        {**DECODER, "head_dim": 8, "sliding_window": 5},
        ATTENTION | GATED,
    ),
    "qwen2": Architecture("Qwen2Config", "Qwen2ForCausalLM", DECODER, ATTENTION | GATED),
    "qwen3": Architecture(
        "Qwen3Config", "Qwen3ForCausalLM", {**DECODER, "head_dim": 16}, ATTENTION | GATED
    ),
    "gemma": Architecture(
        "GemmaConfig", "GemmaForCausalLM", {**DECODER, "head_dim": 8}, ATTENTION | GATED
    ),
    "gemma2": Architecture(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**DECODER, "head_dim": 8, "sliding_window": 5},
        ATTENTION | GATED,
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**DECODER, "head_dim": 8, "sliding_window": 5},
        ATTENTION | GATED,
    ),
    "phi": Architecture(
        "PhiConfig",
        "PhiForCausalLM",
        DECODER,
        {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    ),
    "phi3": Architecture(
        "Phi3Config",
        "Phi3ForCausalLM",
        DECODER,
        {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    ),
    "gpt2": Architecture(
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {"c_attn", "c_proj", "c_fc"},
        lora={"fan_in_fan_out": True},
    ),
    "gpt_neox": Architecture(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        SQUARE,
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "opt": Architecture(
        "OPTConfig",
        "OPTForCausalLM",
        {**SQUARE, "ffn_dim": 48, "word_embed_proj_dim": 24},
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"},
    ),
    "bert": Architecture(
        "BertConfig", "BertForMaskedLM", SQUARE, ENCODER, ["query", "key", "value", "dense"]
    ),
    "roberta": Architecture("RobertaConfig", "RobertaForMaskedLM", SQUARE, ENCODER),
    "deberta_v2": Architecture(
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        {
            **SQUARE,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "share_att_key": True,
            "type_vocab_size": 0,
        },
        {"query_proj", "key_proj", "value_proj", "dense"},
    ),
    "t5": Architecture(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
        {"q", "k", "v", "o", "wi_0", "wi_1", "wo"},
        inputs=text_pairs,
    ),
    "vit": Architecture(
        "ViTConfig",
        "ViTForImageClassification",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "num_labels": 2,
        },
        {"q_proj", "v_proj"},
        ["q_proj", "v_proj"],
        {"modules_to_save": ["classifier"]},
        images,
    ),
    "whisper": Architecture(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 8,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": 12,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
        inputs=sounds,
    ),
    "mixtral": Architecture(
        "MixtralConfig",
        "MixtralForCausalLM",
        {**DECODER, "num_local_experts": 4},
        ATTENTION,
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        left=("mlp.experts", "mlp.experts.base_layer"),
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **DECODER,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
        ATTENTION,
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        left=("mlp.experts", "mlp.experts.base_layer"),
    ),
}


def base_model(architecture):
    """Build the base model, every dropout of its own off."""
    config = getattr(transformers, architecture.config)(**architecture.options)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = getattr(transformers, architecture.model)(config)
    # GPT-2's class name names no loss; it would warn, and a warning cannot be compiled.
    model.loss_type = model.loss_type or "ForCausalLM"
    return model


def peft_model(architecture, *, dtype=torch.float32, **lora):
    """Build the model with a LoRA adapter of rank 8 whose matrices are all filled.

    The dtype is the base model's; PEFT keeps the adapter in float32.
    """
    lora = {"r": 8, "lora_alpha": 16, "target_modules": architecture.targets, **lora}
    config = LoraConfig(**{**(architecture.lora or {}), **lora})
    return randomised(get_peft_model(base_model(architecture).to(dtype), config))


def logits_and_gradients(model, inputs):
    """Logits and the gradient of every trainable parameter, by name."""
    model.zero_grad()
    logits = model(**inputs).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    (logits * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def doubled(model, inputs):
    """Turn a model and its inputs into float64, to be called under ``InFloat64()``."""
    # The grouped product of mixtures of experts has no float64.
    model.get_base_model().set_experts_implementation("eager")
    return model.double(), {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }


class InFloat64(TorchFunctionMode):
    """Keeps a float64 model in float64 where its code says float32 (norms, softmax, rotations)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.float:
            function = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)
