"""What the operation means, in plain torch."""

import torch
from torch import Tensor


def reference(rows: Tensor, index: Tensor, size: int, *, denominator: float | Tensor) -> Tensor:
    """Return, for each rank, the sum of its rows over the denominator: ``[R, F]``.

    The arguments are those of ``scatter_mean``. The rows are added one after the other, in float32
    or in float64 where they are float64.

    Source: arXiv 2501.19389, the server update X ← X + (1/N) Σᵢ Δᵢ on compact changes.
    """
    total = torch.zeros(size, rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    total = total.to(rows.device)
    for row, rank in zip(rows, index.tolist(), strict=True):
        total[rank] += row
    divisor = torch.as_tensor(denominator, dtype=total.dtype, device=rows.device)
    divisor = divisor.expand(size)[:, None]
    return torch.where(divisor == 0, 0.0, total / divisor).to(rows.dtype)
