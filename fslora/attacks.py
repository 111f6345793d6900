"""Clients that lie, for the simulator: what a share of hostile clients does to a run.

    sign-flip     −strength · Δ, away from what it learnt
    scale         strength · Δ
    noise         Gaussian with strength · ‖Δ‖ as its expected norm
    wrong-ranks   Δ with its rows one place on: what it learnt for a rank comes under another; a
                  client with one rank has nothing to confuse
    label-flip    an honest client with the classes of its examples reversed

All but the last train honestly first, and all send what fits the task, so that no check of form
finds them out. Who is hostile is drawn once from the seed, the noise from the client's task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fslora.data.lazy import LazyExamples, NamedExamples
from fslora.data.tasks import Examples
from fslora.protocol import ClientFn, ClientTask, ClientUpdate
from fslora.robust import mapped, scaled, update_norm
from fslora.trust import Threat
from fslora_kernels.seeds import fold_in


def draw_attackers(threat: Threat, clients: Sequence[str], seed: int) -> frozenset[str]:
    """Draw who is hostile: nobody where there is no attack.

    Raises:
        ValueError: a share was asked for that is nobody among so few.
    """
    if threat.attack == "none":
        return frozenset()
    attackers = round(threat.share * len(clients))
    if threat.share and not attackers:
        raise ValueError(
            f"--attackers {threat.share:g} of {len(clients)} clients is nobody; "
            f"{1 / len(clients):.2g} is one of them"
        )
    order = np.random.default_rng(fold_in(seed, "attackers")).permutation(len(clients))
    return frozenset(clients[place] for place in order[:attackers])


def poisoned(
    threat: Threat, examples: Mapping[str, Examples], attackers: frozenset[str], classes: int
) -> Mapping[str, Examples]:
    """Return everybody's examples, with the classes of hostile clients reversed by "label-flip".

    A client's are asked for when it is, and not before.

    Args:
        threat: the attack.
        examples: client id to its examples.
        attackers: who is hostile.
        classes: how many there are; class c becomes ``classes`` - 1 - c.
    """
    if threat.attack != "label-flip":
        return examples
    names = list(examples)

    def own(place: int) -> Examples:
        found = examples[names[place]]
        if names[place] not in attackers:
            return found
        return Examples({**found.tensors, "labels": classes - 1 - found.tensors["labels"]})

    return NamedExamples(names, LazyExamples(len(names), own))


def hostile(threat: Threat, client: ClientFn, attackers: frozenset[str]) -> ClientFn:
    """Return a client function in which the hostile clients lie about what they learnt."""
    if threat.attack in ("none", "label-flip"):
        return client

    def lying(task: ClientTask) -> ClientUpdate:
        update = client(task)
        honest = task.client_id not in attackers or update.failure is not None
        return update if honest else _lie(threat, task, update)

    return lying


def _lie(threat: Threat, task: ClientTask, update: ClientUpdate) -> ClientUpdate:
    if threat.attack == "scale":
        return scaled(update, threat.strength)
    if threat.attack == "sign-flip":
        return scaled(update, -threat.strength)
    if threat.attack == "wrong-ranks":
        return mapped(update, lambda change: change.roll(1, dims=0), extras=False)
    generator = torch.Generator().manual_seed(fold_in(task.key, "attack"))
    count = sum(tensor.numel() for tensor in update.tensors())
    deviation = threat.strength * update_norm(update) / math.sqrt(count)

    def noise(change: Tensor) -> Tensor:
        drawn = torch.randn(change.shape, generator=generator, dtype=torch.float64)
        return (deviation * drawn).to(change.dtype)

    return mapped(update, noise)
