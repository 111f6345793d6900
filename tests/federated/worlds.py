"""A small federated world on a real architecture: model, clients' examples, strategy."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import fslora_kernels
from fslora.client import LocalTrainer
from fslora.data.causal_lm import CausalLM
from fslora.data.tasks import Examples
from fslora.models import take_state
from fslora.protocol import ClientUpdate, LocalRule, LoRAWeights
from fslora.ranks import step_rows
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


def world(folder, ratios, local=None, factory=fslora, *, head=False, **options):
    """(fused model, strategy, first state, client function); the head is the last norm's weight."""
    model = peft_model(folder)
    model.base_model.model.model.norm.weight.requires_grad_(head)
    fslora_kernels.fuse(model)
    local = local or LocalRule(optimizer="sgd", lr=0.05, steps=2, batch_size=3)
    strategy = factory(dict(zip(CLIENTS, ratios, strict=True)), local, **options)
    state = strategy.init(*take_state(model), 11)
    client = LocalTrainer(model, CausalLM(max_length=12), {c: examples(c) for c in CLIENTS})
    return model, strategy, state, client


def linear_update(task, lr):
    """The answer of a client whose loss is the sum of its BA, where B is all ones and A moves.

    A rank's gradient is its scale, in each step that trains it; SGD goes a step of lr / H.
    """
    delta = {}
    steps = step_rows(task) if task.local.redrawn_ranks else []
    for name, (a, b) in task.adapters.items():
        moves = torch.as_tensor(task.rank_scales.get(name, task.scale)).expand(len(a)).clone()
        if steps:
            rows = torch.cat([drawn[name] for drawn in steps])
            moves *= rows.bincount(minlength=len(a)) / task.local.steps
        delta[name] = LoRAWeights((-lr * moves[:, None]).to(a.dtype).expand_as(a), b * 0)
    return ClientUpdate(task.round, task.client_id, task.nonce, delta, {}, 1, {"loss": 0.0})


def tensors_of(state):
    """Every tensor of a state, by a name of its own."""
    found = {f"extra {n}": t for n, t in state.extras.items()}
    found |= {f"optimizer {n}": t for n, t in state.optimizer.items()}
    for kind, adapters in (("adapter", state.adapters), ("residual", state.base_residual)):
        found |= {f"{kind} {n} {f}": t for n, p in adapters.items() for f, t in p._asdict().items()}
    for client_id, memory in state.client_state.items():
        found |= {f"client {client_id} {n}": t for n, t in memory.items()}
    return found


def assert_same_bits(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def pair(rank, inputs, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LoRAWeights(
        *(torch.randn(rank, n, generator=generator, dtype=torch.float64) for n in (inputs, outputs))
    )


def dense(lora):
    return lora.lora_b.t() @ lora.lora_a
