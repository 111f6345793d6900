"""Processes that train together on a CPU, and what each of them does."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fslora_kernels
from fslora_kernels import LoRAWeights
from fslora_kernels.nn.callback import SketchCallback
from tests.kernels.models import randomised

from .steps import every_second, flat, is_fused, trainable

PROCESSES, STEPS, VOCABULARY = 2, 3, 96


def run(function, folder):
    """Run ``function()`` in every process of a new group; return the first one's tensors."""
    torch.multiprocessing.spawn(_enter, (function, str(folder)), nprocs=PROCESSES)
    return load_file(Path(folder) / "0.safetensors")


def _enter(rank, function, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    try:
        save_file(function(), Path(folder) / f"{rank}.safetensors")
    finally:
        dist.destroy_process_group()


def mean(tensor):
    """Return the mean over the processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor = tensor / PROCESSES
    return tensor


def batch():
    """Return the rows that this process trains on: all of them where it is alone."""
    ids = torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(9))
    return ids.chunk(PROCESSES)[dist.get_rank()] if dist.is_initialized() else ids


def model(*, fused=True):
    """Return a Llama of two layers, wide enough for the operation's own backward pass."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM(config)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    peft_model = randomised(get_peft_model(base, adapter)).train()
    if fused:
        fslora_kernels.fuse(peft_model)
    return peft_model


def wrap(peft_model, wrapper):
    """Return what is called in training."""
    if wrapper == "ddp":
        return DistributedDataParallel(peft_model)
    if wrapper == "fsdp1":
        policy = fsdp_auto_wrap_policy(peft_model)
        wrapped = FullyShardedDataParallel(
            peft_model,
            auto_wrap_policy=policy,
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        assert any(
            "lora_A" in name for name, m in wrapped.named_modules() if type(m) is type(wrapped)
        )
        return wrapped
    if wrapper == "fsdp2":
        for layer in peft_model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(peft_model)
        assert all(type(p) is DTensor for p in peft_model.parameters())
    return peft_model


def train(runner, parameters, *, after_backward=None, optimizer=None):
    """Return the losses ``[steps]``, averaged over the processes, and the parameters ``[n]``."""
    optimizer = optimizer or torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    ids, losses = batch(), []
    for _ in range(STEPS):
        loss = runner(input_ids=ids, labels=ids).loss
        loss.backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss.detach()))
    whole = [p.full_tensor() if type(p) is DTensor else p for p in parameters]
    return {"losses": torch.stack(losses), "factors": flat(whole)}


def whole_adapter(wrapper, *, fused):
    peft_model = model(fused=fused)
    runner = wrap(peft_model, wrapper)
    assert is_fused(peft_model) == fused
    return train(runner, list(trainable(peft_model).values()))


def view(wrapper):
    """Half of the ranks, out of full matrices."""
    peft_model = model()
    runner = wrap(peft_model, wrapper)
    fslora_kernels.sketch(peft_model, every_second(peft_model))
    return train(runner, list(trainable(peft_model).values()))


def compact(wrapper):
    """Half of the ranks, as leaves of their own.

    DDP averages the leaves' gradients because they are the module's parameters. FSDP2 shards the
    frozen base only: the leaves, which are small, are whole everywhere and averaged by hand.
    """
    peft_model = model()
    leaves = fslora_kernels.extract(peft_model, every_second(peft_model))
    leaves = {n: LoRAWeights(*(nn.Parameter(f) for f in pair)) for n, pair in leaves.items()}
    parameters = [factor for pair in leaves.values() for factor in pair]
    peft_model.requires_grad_(requires_grad=False)
    fslora_kernels.bind(peft_model, leaves)
    if wrapper == "ddp":
        peft_model.leaves = nn.ParameterList(parameters)
    runner = wrap(peft_model, wrapper)

    def average():
        for factor in parameters:
            factor.grad = mean(factor.grad)

    return train(runner, parameters, after_backward=average if wrapper == "fsdp2" else None)


def sketched_adamw(wrapper):
    """Half of the ranks, and an optimizer that moves no other."""
    peft_model = model()
    fslora_kernels.sketch(peft_model, every_second(peft_model))
    runner = wrap(peft_model, wrapper)
    optimizer = fslora_kernels.SketchedAdamW(peft_model, lr=1e-3)
    return train(runner, list(trainable(peft_model).values()), optimizer=optimizer)


WAYS = {
    "vanilla": lambda wrapper: whole_adapter(wrapper, fused=False),
    "fused": lambda wrapper: whole_adapter(wrapper, fused=True),
    "view": view,
    "compact": compact,
    "sketched_adamw": sketched_adamw,
}


def every_way(wrapper, ways=tuple(WAYS)):
    """Train in every way under one wrapper; name the results by their way."""
    return {f"{way}.{name}": t for way in ways for name, t in WAYS[way](wrapper).items()}


def sketch_callback():
    """The Trainer by itself, which finds the group in the environment."""
    alone = not dist.is_initialized()
    if not alone:
        rank = str(dist.get_rank())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(PROCESSES)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for, not used
    ids = torch.randint(VOCABULARY, (24, 24), generator=torch.Generator().manual_seed(9))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=5,
            per_device_train_batch_size=4 if alone else 4 // PROCESSES,
            learning_rate=1e-2,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model(fused=False),
            arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=[SketchCallback(0.25, every=2)],
        )
        trainer.train()
    assert alone or type(trainer.model_wrapped) is DistributedDataParallel
    assert is_fused(trainer.model)
    return {"callback.factors": flat(trainable(trainer.model).values())}


def ddp():
    return every_way("ddp")


def fsdp1():
    """The policy that the Trainer takes from PEFT: it wraps every factor on its own."""
    return every_way("fsdp1", ("vanilla", "fused"))


def fsdp2():
    return every_way("fsdp2", ("vanilla", "fused", "view", "compact"))
