"""Loading a base model with its tokenizer, and putting the global adapter on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import file_digest, sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

import fslora_kernels
from fslora.client import heads
from fslora.config import SimulateConfig
from fslora.data import tasks
from fslora.fitness import check_complete, check_config, check_positions, fresh_modules
from fslora.protocol import Adapters, Extras, LoRAWeights
from fslora_kernels.seeds import fold_in

# A model that lies in this package, by the name it is asked for.
BUILT_IN = {"docs-base": "assets/base"}
_HEADS = ("classifier", "score")  # of sequence classification, as PEFT names them


def model_path(model: str) -> str:
    """Return the folder of a built-in model or a local path as it is; anything else is a hub id.

    Raises:
        FileNotFoundError: it is written like a path and there is nothing.
    """
    if model in BUILT_IN:
        return str(files("fslora") / BUILT_IN[model])
    if not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise FileNotFoundError(
            f"there is no model folder {model}; give a folder with config.json, or a hub id "
            "such as org/name"
        )
    return model


def model_source(config: SimulateConfig) -> dict[str, str]:
    """Say in a few letters which files a model's folder holds; nothing of a model of the hub.

    Raises:
        ValueError: one cannot be read.
    """
    folder, total = Path(model_path(config.model)), sha256()
    if not folder.is_dir():
        return {}
    with _explained("model", config):
        for path in sorted(folder.glob("[!.]*")):
            if path.is_file() and path.suffix != ".md":  # a card may be written anew
                with path.open("rb") as file:
                    total.update(path.name.encode() + file_digest(file, "sha256").digest())
    return {"model": total.hexdigest()[:16]}


def resolve_device(device: str) -> torch.device:
    """Return the device that is asked for; "auto" takes a GPU where there is one.

    Raises:
        ValueError: unknown name, or a GPU where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; use cpu, cuda, cuda:0 … or auto")
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here; use --device cpu")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: torch sees {torch.cuda.device_count()} GPUs here")
    return wanted


def load_tokenizer(config: SimulateConfig) -> Any:  # noqa: ANN401
    """Load the model's tokenizer.

    Raises:
        ValueError: it cannot be loaded.
    """
    path = model_path(config.model)
    with _explained("tokenizer", config):
        return AutoTokenizer.from_pretrained(path)


def load_model(
    config: SimulateConfig, labels: list[str], pad_token_id: int, highest_id: int = 0
) -> PeftModel:
    """Load the base model, freeze it, put a fresh rank-R adapter on it, and fuse it.

    Args:
        config: which model, dtype, device, adapter.
        labels: class names (classification).
        pad_token_id: told to classifiers, which look for the last token that is none.
        highest_id: of the tokens that it will read.

    Returns:
        The fused PEFT model in its device; heads are trained whole.

    Raises:
        ValueError: it cannot be loaded, lacks weights, the target modules are not in it, texts may
            be longer than its context or have tokens that it does not know, or it cannot be trained
            for the task.
        NotImplementedError: the implementation cannot run on the device.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    classifying = config.task == "classification"
    auto = AutoModelForSequenceClassification if classifying else AutoModelForCausalLM
    path = model_path(config.model)
    settings: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if classifying:
        settings |= {"num_labels": len(labels), "pad_token_id": pad_token_id}
        settings |= {"id2label": dict(enumerate(labels))}
    key = fold_in(config.seed, "initial weights")
    with torch.random.fork_rng():
        torch.manual_seed(key)
        with _explained("model", config):
            base_config = AutoConfig.from_pretrained(path)
        check_config(config, base_config, max(pad_token_id, highest_id))
        if config.layers:
            settings["num_hidden_layers"] = config.layers
        with _explained("model", config):
            base, found = auto.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **settings
            )
        fresh = fresh_modules(found)
        if not fresh:  # weights without values draw too, in a process that has compiled something
            torch.manual_seed(key)
        check_positions(config, base, base_config)
        if classifying:
            check_complete(config, base, fresh)
        model = _with_adapter(base, config, fresh if classifying else None)
    # Clients train leaves of their own, never the factors of the resident model.
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(requires_grad=False)
    _put_heads_in_float32(model)
    model.to(resolve_device(config.device))
    if not classifying:
        _check_causal(model, config.model)  # says more of an encoder than that it lacks weights
        check_complete(config, base, fresh)
    fslora_kernels.fuse(model, config.implementation, recompute=config.recompute)
    _check_fused(model, config)
    return model


@torch.no_grad()
def _check_causal(model: nn.Module, name: str) -> None:
    """Refuse a model that sees the tokens it is to predict, as an encoder such as BERT does."""
    with tasks.evaluating(model):
        device = next(model.parameters()).device
        one, other = (
            model(input_ids=torch.tensor([[0, 1, 0, last]], device=device)).logits[0, :3].float()
            for last in (0, 1)
        )
    if (one - other).abs().max() > 1e-4 * one.abs().max():
        raise ValueError(
            f"{name} sees the tokens that it is to predict, as encoders such as BERT do; use "
            "--task classification, or a model that generates text"
        )


def _put_heads_in_float32(model: PeftModel) -> None:
    """Let heads be trained, averaged and sent in float32, as the adapters are.

    In half precision a client's steps would be rounded away.
    """
    for name, parameter in heads(model).items():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
            module = model.get_submodule(name.rpartition(".")[0])
            if not module._forward_pre_hooks:
                module.register_forward_pre_hook(_inputs_in_float32)


def _inputs_in_float32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )


def _with_adapter(base: nn.Module, config: SimulateConfig, fresh: list[str] | None) -> PeftModel:
    """Put the adapter on; of a classifier (``fresh`` is not None) also say what is its head."""
    targets = config.column_names("target_modules")
    if "all-linear" in targets and len(targets) > 1:
        raise ValueError(
            f"--target-modules {config.target_modules}: all-linear has all layers in it; name it "
            "alone, or layers alone"
        )
    adapter = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.rslora,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        task_type=None if fresh is None else TaskType.SEQ_CLS,
        modules_to_save=None if fresh is None else _beside_the_head(base, fresh) or None,
    )
    linear = _linear_names(base)
    paths = [name for name, _ in base.named_modules()]
    for target in targets:
        if target != "all-linear" and not any(f".{path}".endswith(f".{target}") for path in paths):
            raise _untargetable(linear, config, f"no layer is named {target}.")
    try:
        return get_peft_model(base, adapter)
    except ValueError as error:
        raise _untargetable(linear, config, str(error).splitlines()[0]) from None


def _beside_the_head(base: nn.Module, fresh: Sequence[str]) -> list[str]:
    """What is trained whole beside PEFT's own heads: weights that were just drawn.

    And modules that PEFT takes for heads by the end of their names, as DistilBERT's pre_classifier.
    """
    alike = [name for name, _ in base.named_modules() if name.endswith(_HEADS)]
    return [n for n in dict.fromkeys([*fresh, *alike]) if not set(n.split(".")) & set(_HEADS)]


def _check_fused(model: PeftModel, config: SimulateConfig) -> None:
    """Refuse a target that has an adapter which would never be trained, as embeddings would."""
    fused = fslora_kernels.modules(model)
    for target in config.column_names("target_modules"):
        if target != "all-linear" and not any(f".{n}".endswith(f".{target}") for n in fused):
            why = f"{target} is no linear layer, or is trained whole as a head."
            raise _untargetable({n.rsplit(".", 1)[-1] for n in fused}, config, why)


def _linear_names(base: nn.Module) -> set[str]:
    kinds = (nn.Linear, Conv1D)
    names = {n.rsplit(".", 1)[-1] for n, m in base.named_modules() if type(m) in kinds}
    return {name for name in names if not name.endswith(_HEADS)}


def _untargetable(linear: Iterable[str], config: SimulateConfig, why: str) -> ValueError:
    return ValueError(
        f"--target-modules {config.target_modules}: {why} Its linear layers are named "
        f"{', '.join(sorted(linear))}; or use all-linear"
    )


@contextmanager
def _explained(what: str, config: SimulateConfig) -> Iterator[None]:
    """Turn whatever goes wrong while a user's files are loaded into one message."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        said = said.rstrip(".") if len(said) < 300 else f"{said[:300]} …"
        if said.startswith("Unrecognized configuration class"):
            raise ValueError(
                f"{config.model} is of a kind that transformers has no model for --task "
                f"{config.task} of; use another --task, or another model"
            ) from error
        raise ValueError(
            f"cannot load the {what} {config.model!r}: {said}. "
            "Give a folder that save_pretrained wrote, or a hub id that this machine can reach"
        ) from error


def take_state(model: PeftModel) -> tuple[Adapters, Extras]:
    """Copy the model's own adapter and heads out, on the CPU."""
    every_rank = dict.fromkeys(fslora_kernels.modules(model))
    adapters = {
        name: LoRAWeights(*(tensor.detach().cpu() for tensor in pair))
        for name, pair in fslora_kernels.extract(model, every_rank).items()
    }
    return adapters, {n: p.detach().cpu().clone() for n, p in heads(model).items()}


def put_state(model: PeftModel, adapters: Adapters, extras: Extras) -> None:
    """Write an adapter and heads into the model, in place."""
    fslora_kernels.scatter(model, adapters, dict.fromkeys(adapters))
    own = heads(model)
    with torch.no_grad():
        for name, tensor in extras.items():
            own[name].copy_(tensor)
