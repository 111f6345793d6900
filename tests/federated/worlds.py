"""A small federated world on a real architecture: model, clients' examples, strategy."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import fslora_kernels
from fslora.client import LocalTrainer
from fslora.data.causal_lm import CausalLM
from fslora.data.tasks import Examples
from fslora.models import take_state
from fslora.protocol import LocalRule
from fslora.strategies.fslora import fslora

CLIENTS = ["one", "two", "three", "four"]
RANK = 8


def peft_model(folder, rank=RANK, dtype=torch.float64):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(
            base,
            LoraConfig(
                r=rank,
                lora_alpha=16,
                target_modules=["q_proj", "v_proj", "down_proj"],
                init_lora_weights=False,
            ),
        )
    return model.to(dtype)


def examples(client, count=6, length=12):
    generator = torch.Generator().manual_seed(CLIENTS.index(client))
    ids = torch.randint(2, 200, (count, length), generator=generator)
    return Examples({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})


def world(folder, ratios, local=None, **options):
    """(fused model, strategy, first state, client function)."""
    model = peft_model(folder)
    fslora_kernels.fuse(model)
    local = local or LocalRule(optimizer="sgd", lr=0.05, steps=2, batch_size=3)
    strategy = fslora(dict(zip(CLIENTS, ratios, strict=True)), local, **options)
    state = strategy.init(*take_state(model), 11)
    client = LocalTrainer(model, CausalLM(max_length=12), {c: examples(c) for c in CLIENTS})
    return model, strategy, state, client
