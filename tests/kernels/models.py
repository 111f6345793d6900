"""Real pretrained models with a trained-looking adapter, for the tests of the fused layer."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT_TARGETS = ["query", "key", "value", "dense"]


def randomised(model):
    """Give every LoRA matrix (B included, which starts at zero) values of a trained adapter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def llama(shared, *, rank=8, dtype=torch.float32, **config):
    base = AutoModelForCausalLM.from_pretrained(shared / "models/stories260K-hf", dtype=dtype)
    config = {"r": rank, "lora_alpha": 16, "target_modules": LLAMA_TARGETS, **config}
    return randomised(get_peft_model(base, LoraConfig(**config)))


def bert(shared, *, rank=8, dtype=torch.float32, **config):
    base = AutoModelForSequenceClassification.from_pretrained(
        shared / "models/all-MiniLM-L6-v2-fp16", num_hidden_layers=2, dtype=dtype
    )
    with torch.no_grad():  # what the head is drawn from depends on what ran before
        weight = base.classifier.weight
        generator = torch.Generator().manual_seed(6)
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    config = {"r": rank, "lora_alpha": 16, "target_modules": BERT_TARGETS, **config}
    return randomised(get_peft_model(base, LoraConfig(**config)))


def tokens(model, batch=3, length=24):
    generator = torch.Generator().manual_seed(9)
    vocabulary = model.get_base_model().config.vocab_size
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def logits_and_gradients(model, ids):
    """Logits and the gradient of every trainable parameter, by name."""
    model.zero_grad()
    logits = model(input_ids=ids).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    (logits * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients
