"""A few plain training steps, so that two ways of running a model can be compared."""

import copy

import torch

import fslora_kernels
from fslora_kernels.nn.linear import SketchedLoRALinear


def pair(model):
    """Return the model as vanilla PEFT and a fused copy of it, every layer of it fused."""
    fused = copy.deepcopy(model)
    report = fslora_kernels.fuse(fused)
    assert report.fused
    assert not report.left
    return model, fused


def is_fused(model):
    """Whether the LoRA layers are ours: a comparison of vanilla with vanilla proves nothing."""
    return any(type(module) is SketchedLoRALinear for module in model.modules())


def every_second(model):
    """Return index sets that leave half of the ranks out, another half in every other layer."""
    names = fslora_kernels.modules(model)
    rank = {name: next(iter(model.get_submodule(name).r.values())) for name in names}
    return {name: torch.arange(k % 2, rank[name], 2) for k, name in enumerate(names)}


def trainable(model):
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flat(tensors):
    """Return one vector of them all, to compare at once."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def train(model, ids, *, optimizer=None, steps=3):
    """Return the losses ``[steps]`` and the trained parameters ``[n]``."""
    optimizer = optimizer or torch.optim.AdamW(trainable(model).values(), lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), flat(trainable(model).values())
