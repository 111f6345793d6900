"""AdamW for view mode: ranks that a sketch leaves out keep their bits and their moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from fslora_kernels._dispatch import check_implementation
from fslora_kernels.ops.sketched_adamw import Rule, sketched_adamw

if TYPE_CHECKING:
    from fslora_kernels.nn.linear import SketchedLoRALinear


class SketchedAdamW(Optimizer):
    """``torch.optim.AdamW`` that steps the ranks of the current sketch only.

    Stock AdamW also moves ranks outside the sketch: their gradients are zero, but they decay and
    follow old momentum. Here each step reads the index set that ``fslora_kernels.sketch`` gave to a
    layer and leaves every other rank of its factors alone. Ranks count their steps one by one, so
    the bias correction stays right while sketches change. Layers without a sketch are stepped
    whole, and of a factor that layers share, the ranks in any of their sketches; parameters that
    are no factor of a fused layer are stepped by torch's own AdamW.

    Sketch, forward, backward, step, in this order: the sketch that is set when ``step`` is called
    must be the one that the gradients came from, for all batches that were accumulated into it.

    The state of a factor is rank-major: "step" ``[R]``, "exp_avg" and "exp_avg_sq" ``[R, F]``, the
    moments in float32 also where the factor is of lower precision.

    Args:
        model: a fused model: ``fslora_kernels.fuse(model)`` comes first.
        params: parameters or parameter groups, as torch's optimizers take them; None takes all of
            the model's that require gradients.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; with a sketch, of its ranks only.
        implementation: of the step on factors: "torch", "triton", or None for "auto".

    Raises:
        ValueError: the model has no fused layer, a setting is out of range, or there is no such
            implementation.

    Example::

        fslora_kernels.fuse(model)
        optimizer = fslora_kernels.SketchedAdamW(model, lr=1e-3)
        for batch, indices in zip(batches, sketches):
            fslora_kernels.sketch(model, indices)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Source: arXiv 1711.05101 (AdamW), algorithm 2, per rank.
    """

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        implementation: str | None = None,
    ) -> None:
        Rule(lr, betas, eps, weight_decay)
        check_implementation(implementation)
        self.implementation = implementation
        self._model = model
        self._factors = _factors(model)
        if not self._factors:
            raise ValueError(
                "the model has no fused LoRA layer; call fslora_kernels.fuse(model) first"
            )
        if params is None:
            params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, such as those of an adapter that the model has got since."""
        super().add_param_group(param_group)
        self._find_factors()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles: the model too, to find its factors by."""
        state: dict[str, Any] = super().__getstate__()
        return {**state, "implementation": self.implementation, "_model": self._model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, whole or only that of the parameters."""
        super().__setstate__(state)
        self._find_factors()

    def _find_factors(self) -> None:
        """Add the factors that are fused now; those that were once keep a state by ranks."""
        self._factors = vars(self).get("_factors", {}) | _factors(self._model)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Take one step on every parameter that has a gradient.

        Args:
            closure: computes the loss again, and the gradients.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            found = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in found:
                if parameter in self._factors:
                    self._step_factor(parameter, parameter.grad, group)
            self._step_plain([p for p in found if p not in self._factors], group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, to the bit.

        Raises:
            ValueError: the state is of another optimizer, or of other parameters.
        """
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        states = {
            parameter: state_dict["state"][number]
            for number, parameter in zip(saved, own, strict=False)
            if number in state_dict["state"]
        }
        for state in states.values():
            if missing := {"step", "exp_avg", "exp_avg_sq"} - state.keys():
                raise ValueError(
                    f"the saved state has no {', '.join(sorted(missing))}, so it is of another "
                    "optimizer; load what a SketchedAdamW of this model saved"
                )
        factors = {p: state for p, state in states.items() if p in self._factors}
        for parameter, state in factors.items():
            wanted = self._ranks_first(parameter, parameter).shape
            if state["step"].shape != wanted[:1] or state["exp_avg"].shape != wanted:
                raise ValueError(
                    f"the saved state has step counts {tuple(state['step'].shape)} and moments "
                    f"{tuple(state['exp_avg'].shape)} where a factor has {wanted[0]} ranks of "
                    f"{wanted[1]} features; load what a SketchedAdamW of this model saved"
                )
        super().load_state_dict(state_dict)
        # Torch has cast the moments to their parameter's dtype: take them as they were saved.
        for parameter, state in factors.items():
            for name, value in state.items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _ranks_first(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return a factor, or a tensor of its shape, with one rank per row."""
        columns, _ = self._factors[parameter]
        return tensor.t() if columns else tensor

    def _index(self, parameter: Tensor) -> Tensor | None:
        """Return the ranks of a factor that are in a sketch, or None for all of them."""
        _, users = self._factors[parameter]
        found: list[Tensor] = []
        for layer, adapter in users:
            # A layer that was unfused has no sketch.
            restriction = getattr(layer, "restrictions", {}).get(adapter)
            if restriction is None or restriction.index is None:
                return None
            found.append(restriction.index)
        return found[0] if len(found) == 1 else torch.unique(torch.cat(found))

    def _step_factor(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        rows = self._ranks_first(parameter, parameter)
        state = self.state[parameter]
        if not state:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            state["step"] = torch.zeros(len(rows), dtype=torch.float32, device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(rows.shape, dtype=dtype, device=parameter.device)
        sketched_adamw(
            rows,
            self._ranks_first(parameter, gradient),
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            self._index(parameter),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            implementation=self.implementation,
        )

    def _step_plain(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[parameter][name] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


Users = list[tuple["SketchedLoRALinear", str]]


def _factors(model: nn.Module) -> dict[Tensor, tuple[bool, Users]]:
    """Return, for each factor, whether its ranks are columns, and its layers and adapters."""
    from fslora_kernels.nn.fuse import fused_layers

    found: dict[Tensor, tuple[bool, Users]] = {}
    for layer in fused_layers(model).values():
        for factors, columns in ((layer.lora_A, False), (layer.lora_B, True)):
            for adapter, factor in factors.items():
                found.setdefault(factor.weight, (columns, []))[1].append((layer, adapter))
    return found
