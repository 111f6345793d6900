"""The public function: checks, flattening, dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fslora_kernels.ops.shared_sketched_linear.op import SharedSketchedLinear
from fslora_kernels.ops.sketched_linear.interface import check, in_compute_dtype, plus_base, widens


@dataclass(frozen=True, slots=True)
class Projection:
    """One of the layers: the arguments of ``sketched_linear`` beside x.

    Attributes:
        weight: ``[out_features, in_features]``; None gives the delta alone.
        lora_a: ``[rank, in_features]``.
        lora_b: ``[out_features, rank]``, any strides.
        index: int64 ``[sketch_size]``, ascending; None uses every rank.
        bias: ``[out_features]``.
        scale: factor of the delta, the correction rank / sketch_size included.
    """

    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    index: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0


def shared_sketched_linear(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Return ``sketched_linear(x, ...)`` of each projection, reading x once for all their deltas.

    The selected rows of all A are multiplied with x as one matrix, and so are their gradients. The
    gradient of x is written by one product and accumulated in place by the base products, instead
    of being added up from one tensor per projection. It runs on torch's products everywhere: they
    read x once, as a kernel of our own would. Ranks and index sets may differ between projections.
    There is no dropout: independent masks would ask for an input of its own for each.

    Args:
        x: ``[..., in_features]``, any strides.
        projections: at least one.

    Returns:
        ``[..., out_features]`` for each, in their order.

    Raises:
        ValueError: no projection, shapes, devices or an index set do not fit together, or a scale
            asks for a gradient.

    Example:
        >>> x, one = torch.ones(2, 4), torch.eye(4)
        >>> key, value = Projection(one, one, one), Projection(None, one, one)
        >>> k, v = shared_sketched_linear(x, [key, value])
        >>> k[0, 0].item(), v[0, 0].item()
        (2.0, 1.0)

    Source: arXiv 2501.19389, for several layers at once.
    """
    if not projections:
        raise ValueError("shared_sketched_linear needs at least one projection")
    for p in projections:
        check(x, p.weight, p.lora_a, p.lora_b, p.index, p.bias, None)
        scale: object = p.scale  # whatever the annotation asks for
        if isinstance(scale, Tensor) and scale.requires_grad:
            raise ValueError("scale is not differentiated; pass it detached")
    x_TD = in_compute_dtype(x).reshape(-1, x.shape[-1])
    wide = widens(x_TD, *(factor for p in projections for factor in (p.lora_a, p.lora_b)))
    tensors: list[Tensor | None] = []
    for p in projections:
        base = (None, None) if wide else (p.weight, p.bias)
        tensors += (base[0], p.lora_a, p.lora_b.t(), p.index, base[1])
    scales = tuple(p.scale for p in projections)
    outputs: tuple[Tensor, ...] = SharedSketchedLinear.apply(  # type: ignore[no-untyped-call]
        x_TD.float() if wide else x_TD, scales, *tensors
    )
    if wide:
        outputs = tuple(
            plus_base(y_TE, x_TD, p.weight, p.bias)
            for y_TE, p in zip(outputs, projections, strict=True)
        )
    return tuple(y_TE.view(*x.shape[:-1], y_TE.shape[1]) for y_TE in outputs)
