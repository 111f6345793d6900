"""The public function: checks, flattening, dtypes, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from fslora_kernels._autograd import autocasts, rows, unrows
from fslora_kernels.ops.sketched_linear.op import Arguments, compute
from fslora_kernels.ops.sketched_linear.traced import traceable
from fslora_kernels.weights import check_devices, check_index, check_index_kind


def sketched_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    index: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    rank_weight: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Return ``x Wᵀ + bias + scale · (drop(x) A[I]ᵀ ∘ rank_weight) B[:, I]ᵀ``.

    Gradients flow to ``x``, ``lora_a``, ``lora_b`` and, where they require them, to ``weight`` and
    ``bias``. With an ``index`` the gradients of the factors have their full shapes, and are zero
    outside the selected ranks. Under autocast everything is computed in autocast's dtype; else in
    x's dtype, to which the factors are cast after they are gathered. Float32 factors on a float16 x
    are the exception: their delta is computed in float32, as in PEFT, because small gradients are
    zero in float16.

    ``torch.func``'s transforms and ``torch.jit.trace`` see torch's own products, whatever a layer's
    size, and can differentiate them twice. Forward-mode differentiation outside of
    ``torch.func.jvp`` cannot be done by fused layers: ``fslora_kernels.unfuse(model)`` first.

    Args:
        x: ``[..., in_features]``, any strides.
        weight: ``[out_features, in_features]``, any strides; None gives the delta alone.
        lora_a: ``[rank, in_features]``.
        lora_b: ``[out_features, rank]``, any strides.
        index: int64 ``[sketch_size]``, ascending; None uses every rank. Its values are checked
            on a CPU; on a GPU, where that would wait for the device, they are not.
        bias: ``[out_features]``.
        scale: factor of the delta, the correction rank / sketch_size included: for plain LoRA
            alpha / sketch_size, for rsLoRA alpha · √rank / sketch_size. Not differentiated.
        rank_weight: ``[sketch_size]``, multiplies the hidden ranks. Not differentiated.
        dropout: probability of dropping an input feature of the adapter (not of the base layer).
        seed: of the dropout mask; None draws one from torch's generator, as nn.Dropout would, but
            on the host, which a CUDA graph under capture refuses.
        implementation: "torch", "triton", or None for "auto" (inside ``torch.compile``: torch's
            products, around which the compiler fuses; "triton" is one operator of the graph). On a
            CPU "auto" merges the delta into a copy of the weight where tokens are many and nothing
            is lost by it; "torch" never does.

    Returns:
        ``[..., out_features]``.

    Raises:
        ValueError: shapes, devices or the index set do not fit together.
        NotImplementedError: the requested implementation cannot run this call, or a CUDA graph
            would keep its dropout mask for ever.

    Example:
        >>> x, weight = torch.ones(2, 8), torch.eye(8)
        >>> lora_a, lora_b = torch.ones(4, 8), torch.ones(8, 4)
        >>> index = torch.tensor([0, 2])
        >>> sketched_linear(x, weight, lora_a, lora_b, index, scale=0.5)[0, 0].item()
        9.0

    Source: arXiv 2501.19389.
    """
    check(x, weight, lora_a, lora_b, index, bias, rank_weight)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if dropout and seed is not None and torch.compiler.is_compiling():
        raise ValueError("inside torch.compile the dropout mask is torch's own; leave out the seed")
    if isinstance(scale, Tensor) and scale.ndim:
        raise ValueError(f"scale must be one number, got shape {tuple(scale.shape)}")
    gain = scale if rank_weight is None else rank_weight * scale
    if isinstance(gain, Tensor):
        if gain.requires_grad:
            raise ValueError("scale and rank_weight are not differentiated; pass them detached")
        gain = gain.to(x.device)
    b_RE = lora_b.t()
    return unchecked(x, weight, lora_a, b_RE, index, bias, gain, dropout, seed, implementation)


def unchecked(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    gain: float | Tensor,
    dropout: float,
    seed: int | None,
    implementation: str | None,
    *,
    recompute: bool = False,
) -> Tensor:
    """Compute ``sketched_linear`` for arguments that fit together, as a layer's own do.

    The arguments are those of ``op.Arguments``: B is rank-major ``[rank, out_features]``. With
    ``recompute`` x is not kept for the backward pass where that can make it again (outside of
    ``torch.compile``, which decides on that itself).
    """
    x = in_compute_dtype(x)
    if widens(x, lora_a, lora_b):
        delta = unchecked(
            x.float(),
            None,
            lora_a,
            lora_b,
            index,
            None,
            gain,
            dropout,
            seed,
            implementation,
            recompute=recompute,
        )
        return plus_base(delta, x, weight, bias)
    traced = is_traced(x)
    if not dropout:
        seed = 0
    elif _is_empty(x):
        seed = None  # no mask is drawn
    elif seed is None and not traced:
        seed = _drawn_seed(x)
    arguments = Arguments(
        rows(x), weight, lora_a, lora_b, index, bias, gain, dropout, seed, torch.is_grad_enabled()
    )
    if traced:
        return unrows(traceable(arguments, implementation), x)
    return compute(x, arguments, implementation, recompute=recompute)


def _drawn_seed(x: Tensor) -> int:
    """Draw a seed on the host, as torch's generator says."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "a CUDA graph would replay the one dropout mask that it was captured with; capture "
            "without dropout, or leave the graph to torch.compile(mode='reduce-overhead')"
        )
    return int(torch.randint(2**63 - 1, (), device="cpu").item())


def is_traced(x: Tensor) -> bool:
    """Whether somebody records or transforms what torch computes, or nothing is computed at all."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or _is_empty(x)
    )


def _is_empty(x: Tensor) -> bool:
    """Whether a tensor has a shape and no values."""
    return x.is_meta or isinstance(x, FakeTensor)


def widens(x: Tensor, *factors: Tensor) -> bool:
    """Whether a delta is computed in float32 although x is of float16.

    So it is where the factors are of float32. The gradients of hidden ranks, products of two small
    numbers, are zero in float16 long before those of x. Autocast's users scale their loss.
    """
    return (
        x.dtype == torch.float16
        and torch.float32 in [factor.dtype for factor in factors]
        and not autocasts(x)
    )


def plus_base(delta: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return a delta of a wider dtype plus the base layer's output: ``[T, E]`` in x's dtype."""
    if bias is not None:
        bias = bias.to(x.dtype)
    if weight is not None:
        delta = functional.linear(x, weight.to(x.dtype), bias) + delta
    elif bias is not None:
        delta = delta + bias
    return delta.to(x.dtype)


def in_compute_dtype(x: Tensor) -> Tensor:
    """Return x in the dtype that the products are computed in: autocast's where it is on."""
    if autocasts(x) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def check(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    rank_weight: Tensor | None,
) -> None:
    """Refuse arguments of ``sketched_linear`` that do not fit together.

    Raises:
        ValueError: naming what does not fit.
    """
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            "lora_a must be [rank, in_features] and lora_b [out_features, rank], got "
            f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
        )
    rank, in_features = lora_a.shape
    out_features = lora_b.shape[0]
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must be [..., {in_features}] as lora_a asks, got {tuple(x.shape)}")
    if weight is not None and weight.shape != (out_features, in_features):
        raise ValueError(
            f"weight must be [{out_features}, {in_features}] as lora_b and lora_a ask, got "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must be [{out_features}], got {tuple(bias.shape)}")
    if index is not None:
        check_index_kind(index)
        if index.device.type == "cpu" and not is_traced(x):
            check_index(index, rank)
    size = rank if index is None else index.shape[0]
    if rank_weight is not None and rank_weight.shape != (size,):
        raise ValueError(f"rank_weight must be [{size}], got {tuple(rank_weight.shape)}")
    check_devices(
        x.device, "x", weight=weight, lora_a=lora_a, lora_b=lora_b, index=index, bias=bias
    )
