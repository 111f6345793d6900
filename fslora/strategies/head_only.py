"""Federated training of the head alone: the reference that an adapter has to beat.

The adapter keeps its first values (B = 0, so the base model as it is); clients receive, train and
return the heads only, and the server averages them.

Bytes of one client and round, each way: the heads, whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fslora.aggregation import ServerOptimizer, averaged
from fslora.protocol import (
    Adapters,
    ClientTask,
    ClientUpdate,
    Extras,
    LocalRule,
    ServerState,
    Strategy,
)
from fslora_kernels.seeds import fold_in


def head_only(
    _ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
) -> Strategy:
    """Build the strategy; the arguments are those of ``fslora``, and no ratio matters.

    Raises:
        ValueError: in ``init``: the model has no head to train.
    """

    def init(adapters: Adapters, extras: Extras, seed: int) -> ServerState:
        if not extras:
            raise ValueError("head-only needs a head to train: use it with --task classification")
        return ServerState(round=0, adapters=adapters, extras=extras, key=seed)

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        number = state.round + 1
        keys = {client_id: fold_in(state.key, number, client_id) for client_id in cohort}
        return [
            ClientTask(
                round=number,
                client_id=client_id,
                adapters={},
                extras={name: tensor.clone() for name, tensor in state.extras.items()},
                sketches={},
                local=local,
                key=fold_in(key, "local"),
                nonce=fold_in(key, "nonce"),
            )
            for client_id, key in keys.items()
        ]

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        return averaged(state, tasks, updates, server_optimizer, server_lr)

    return Strategy(init, assign, aggregate)
