"""Sketching on one machine: another set of ranks every few steps of a Hugging Face ``Trainer``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from fslora_kernels.nn.fuse import fuse, fused_layers
from fslora_kernels.nn.linear import Restriction
from fslora_kernels.nn.peft import ranks, sketch
from fslora_kernels.nn.wrap import needs_all_ranks
from fslora_kernels.sampling import draw_indices, sketch_size
from fslora_kernels.seeds import fold_in

log = logging.getLogger(__name__)

Schedule = Callable[[int], float]
"""Optimizer steps done so far to the sketch ratio S/R in (0, 1]; a fixed ratio is just a number."""


def linear_ratio(start: float, end: float, steps: int) -> Schedule:
    """Let the ratio go from ``start`` to ``end`` in a straight line, and stay there.

    Args:
        start: ratio at step 0.
        end: ratio from step ``steps`` on.
        steps: optimizer steps on the way, at least 1.

    Raises:
        ValueError: a ratio is not in (0, 1], or ``steps`` is below 1.

    Example:
        >>> [linear_ratio(1.0, 0.5, steps=10)(step) for step in (0, 5, 10, 11)]
        [1.0, 0.75, 0.5, 0.5]
    """
    if steps < 1:
        raise ValueError(f"a ratio needs at least 1 step from {start} to {end}, got {steps}")
    _check(start, end)
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def random_ratio(ratios: Sequence[float], seed: int = 0) -> Schedule:
    """Draw each ratio out of a few, with equal chances, as a federated cohort of devices has them.

    Args:
        ratios: at least one, each in (0, 1].
        seed: the draw depends on it and on the step only.

    Raises:
        ValueError: there is no ratio, or one is not in (0, 1].
    """
    if not ratios:
        raise ValueError("there is no ratio to draw; give some, such as (0.125, 0.25, 0.5)")
    _check(*ratios)
    return lambda step: ratios[fold_in(seed, "ratio", step) % len(ratios)]


def _check(*ratios: float) -> None:
    for ratio in ratios:
        sketch_size(1, ratio)


class SketchCallback(TrainerCallback):  # type: ignore[misc]
    """Train some ranks of the adapter at a time: every few steps another set in every layer.

    A step computes with S of the R ranks, and gives gradients to these only; S/R is the sketch
    ratio. Whatever of the model is not fused yet is fused when training begins.

    Every layer draws its ranks uniformly, from the seed and the step alone: a run that resumes from
    a checkpoint goes on with the sets that it would have had, and all processes of a distributed
    run use the same. With gradient accumulation a set holds for the whole optimizer step.

    A sketch is set from the beginning of a step to its end. Evaluation, and whatever comes after
    training, uses the whole adapter. A step that an exception or an interrupt ends leaves its
    sketch set: call ``sketch(model, None)`` then; the next training does so too. The factors keep
    their full shapes, so a saved adapter is a plain PEFT adapter.

    Stock AdamW also moves ranks outside the sketch: their gradients are zero, but they follow old
    momentum and decay. ``fslora_kernels.SketchedAdamW`` does not; the example passes it.

    Args:
        ratio: sketch ratio in (0, 1]; or a function of the optimizer steps done so far, asked
            whenever a set is drawn: ``linear_ratio``, ``random_ratio``, or your own.
        every: optimizer steps for which a set is kept.
        seed: of the index sets.
        adapter_name: the adapter that is sketched; default the active one.
        evaluate_sketched: let evaluations during training use the sketch of the step before.
        implementation: what ``fuse`` is called with, unless some layers are fused already: the
            others then get what these have.

    Raises:
        ValueError: ``every`` is below 1, or a fixed ratio is not in (0, 1].

    Example::

        fslora_kernels.fuse(model)
        optimizer = fslora_kernels.SketchedAdamW(model, lr=1e-3)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data,
            callbacks=[SketchCallback(ratio=0.25, every=10)],
            optimizers=(optimizer, None),  # None: the schedule that the arguments ask for
        )

    Source: arXiv 2501.19389, the sketched update of one client.
    """

    def __init__(
        self,
        ratio: float | Schedule = 0.5,
        *,
        every: int = 1,
        seed: int = 0,
        adapter_name: str | None = None,
        evaluate_sketched: bool = False,
        implementation: str | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"a sketch is kept for at least one step, got every={every}")
        if not callable(ratio):
            _check(ratio)
        self.ratio = ratio
        self.every = every
        self.seed = seed
        self.adapter_name = adapter_name
        self.evaluate_sketched = evaluate_sketched
        self.implementation = implementation
        self._drawn: int | None = None
        self._restrictions: dict[str, dict[str, Restriction]] = {}

    def on_train_begin(self, *_: object, model: nn.Module, **_rest: object) -> None:
        """Fuse what is not fused, and clear what an earlier run has left set.

        Raises:
            ValueError: no layer of the model can be sketched.
        """
        self._drawn = None
        layers = fused_layers(model).values()
        implementation = next((each.implementation for each in layers), self.implementation)
        report = fuse(model, implementation, recompute=any(each.recompute for each in layers))
        if not report.fused:
            raise ValueError(f"no LoRA layer of this model can be sketched: {report}")
        if report.left:
            log.warning("layers that are left use all their ranks: %s", report)
        sketch(model, None, adapter_name=self.adapter_name)
        for name, config in getattr(model, "peft_config", {}).items():
            if self.adapter_name in (None, name) and (reason := needs_all_ranks(config)):
                log.warning("adapter %s: %s; every step changes that model", name, reason)

    def on_step_begin(
        self, _args: object, state: TrainerState, *_: object, model: nn.Module, **_rest: object
    ) -> None:
        """Set the sketch of this step, a new one where it is due."""
        step = state.global_step - state.global_step % self.every
        if self._drawn != step:
            sketch(model, self._draw(model, step), adapter_name=self.adapter_name)
            self._restrictions = {
                name: {a: r for a, r in each.restrictions.items() if self.adapter_name in (None, a)}
                for name, each in fused_layers(model).items()
            }
            self._drawn = step
        else:  # checked, and on the adapter's device, since it was drawn
            sketch(model, None, adapter_name=self.adapter_name)
            for name, layer in fused_layers(model).items():
                layer.restrictions.update(self._restrictions.get(name, {}))

    def on_step_end(self, *_: object, model: nn.Module, **_rest: object) -> None:
        """Clear the sketch, for evaluation and whatever else comes between two steps."""
        if not self.evaluate_sketched:
            sketch(model, None, adapter_name=self.adapter_name)

    def on_train_end(self, *_: object, model: nn.Module, **_rest: object) -> None:
        """Clear the sketch."""
        sketch(model, None, adapter_name=self.adapter_name)

    def _draw(self, model: nn.Module, step: int) -> dict[str, Tensor | None]:
        ratio = self.ratio(step) if callable(self.ratio) else self.ratio
        own = ranks(model, adapter_name=self.adapter_name)
        return draw_indices(fold_in(self.seed, "step", step), own, ratio)
