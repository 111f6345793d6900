"""DP-FedAvg: one client, with all its data, is hidden in what the server releases.

    Δ̃ = ( Σᵢ Δᵢ · min(1, C / ‖Δᵢ‖) + 𝒩(0, (zC)² I) ) / n

‖Δᵢ‖ is over all modules and heads of a client's scattered change together; the noise is on every
coordinate that anybody could have moved, whoever did, since noise on the trained ranks alone would
tell who took part; n is the size of the drawn cohort, however many answer. A client's index sets
come from keys, not from data nor from who else takes part. A rejected or missing update counts as
zero.

Accounting. A cohort is n of N clients, uniformly and without replacement, so neighbours are two
populations of the same N of whom one is another client (replace-one). Replacing one client moves
the sum by up to 2C, which is why the noise multiplier of the accountant is z / 2. ε is of all
rounds together, by Rényi accounting of the Gaussian mechanism on samples without replacement.

The draws come from the run's seed: whoever knows it can take the noise off. A deployment must draw
noise, cohorts and nonces from a cryptographic source, and floating-point Gaussians are attackable
(Mironov 2012) where an adversary sees exact values. docs/security.md says what else is not
protected.

Source: arXiv 1710.06963 (DP-FedAvg), arXiv 1808.00087, Theorem 27, by dp-accounting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fslora.aggregation import ServerOptimizer, mean_update, stepped
from fslora.protocol import (
    Adapters,
    ClientTask,
    ClientUpdate,
    Extras,
    LoRAWeights,
    ServerState,
    Strategy,
)
from fslora.robust import clipped, update_norm
from fslora.trust import Privacy
from fslora_kernels.seeds import fold_in

if TYPE_CHECKING:
    from dp_accounting.rdp import RdpAccountant


def private(
    strategy: Strategy, privacy: Privacy, server_optimizer: ServerOptimizer, server_lr: float
) -> Strategy:
    """Return the strategy with its aggregation replaced by the private mean.

    Args:
        strategy: one that averages changes over participants.
        privacy: the parameters.
        server_optimizer: as ``aggregation.server_step``; it sees the private mean only.
        server_lr: the server's learning rate.
    """

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        bounded = (clipped(update, update_norm(update), privacy.clip) for update in updates)
        mean = mean_update(state.adapters, state.extras, tasks, bounded, cohort=privacy.cohort)
        if privacy.noise and tasks:
            deviation = privacy.noise * privacy.clip / privacy.cohort
            mean = _noisy(mean, tasks[0], deviation, fold_in(state.key, "privacy", state.round + 1))
        return stepped(state, mean, server_optimizer, server_lr)

    return strategy._replace(aggregate=aggregate)


def epsilon(privacy: Privacy, rounds: int) -> float:
    """Return ε after so many rounds, infinite without noise.

    Raises:
        ValueError: dp-accounting is not installed.
    """
    if not rounds:
        return 0.0
    if not privacy.noise:
        return math.inf
    try:
        from dp_accounting.rdp import compute_epsilon
    except ImportError:
        raise ValueError("--dp-noise needs an accountant: pip install 'fslora[privacy]'") from None
    one_round = _one_round(privacy)
    # Rényi divergences of rounds add up.
    found, _ = compute_epsilon(one_round.orders, rounds * one_round.rdp, privacy.delta)
    return float(found)


@cache
def _one_round(privacy: Privacy) -> RdpAccountant:
    """Account for one round, which takes a second."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    return accountant.compose(
        dp_accounting.SampledWithoutReplacementDpEvent(
            privacy.clients, privacy.cohort, dp_accounting.GaussianDpEvent(privacy.noise / 2)
        )
    )


def _noisy(
    mean: tuple[Adapters, Extras], task: ClientTask, deviation: float, key: int
) -> tuple[Adapters, Extras]:
    """Add noise to every coordinate that a client could have moved.

    Args:
        mean: of the changes.
        task: any of the round: modules and factors that are trained are the same for all.
        deviation: of the noise.
        key: of the round; every tensor has its own.
    """

    def noisy(tensor: Tensor, *path: str) -> Tensor:
        generator = torch.Generator().manual_seed(fold_in(key, *path))
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return tensor + (deviation * drawn).to(tensor.dtype)

    adapters, extras = dict(mean[0]), mean[1]
    for name in task.adapters:
        adapters[name] = LoRAWeights(
            *(
                noisy(factor, name, letter) if trained else factor
                for factor, letter, trained in zip(
                    adapters[name], "ab", task.local.trained, strict=True
                )
            )
        )
    return adapters, {name: noisy(tensor, name) for name, tensor in extras.items()}
