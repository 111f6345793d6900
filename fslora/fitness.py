"""Whether a base model can do what a run asks of it, said before anything is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fslora.config import SimulateConfig
from fslora.data.tasks import Examples


def check_config(config: SimulateConfig, base_config: Any, highest_id: int) -> None:  # noqa: ANN401
    """Refuse what a model's own config rules out.

    Args:
        config: the run.
        base_config: the model's, of transformers.
        highest_id: of the tokens that it will read.

    Raises:
        ValueError: it is an encoder with a decoder, has not so many layers, or does not know the
            tokens.
    """
    if getattr(base_config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model} is an encoder with a decoder, as T5 and BART are, which is not "
            "supported; use a decoder such as Llama, or for --task classification also an encoder "
            "such as BERT"
        )
    layers = getattr(base_config, "num_hidden_layers", None)
    if config.layers and layers is None:
        raise ValueError(f"--layers: {config.model} does not say how many it has; leave it out")
    if config.layers > (layers or 0):
        raise ValueError(
            f"--layers {config.layers} is more than the {layers} that {config.model} has; 0 keeps "
            "all"
        )
    known = getattr(base_config.get_text_config(), "vocab_size", None)
    if known is not None:
        check_token(config, highest_id, known)


def check_token(config: SimulateConfig, highest_id: int, known: int) -> None:
    """Refuse tokens that a model has no embedding for.

    Args:
        config: the run.
        highest_id: of the tokens.
        known: how many it has embeddings for.

    Raises:
        ValueError: there is one.
    """
    if highest_id >= known:
        raise ValueError(
            f"the tokenizer of {config.model} gives the token {highest_id}, and the model knows "
            f"those below {known}: after tokens are added call model.resize_token_embeddings("
            "len(tokenizer)) and save both, or pad with the end of text"
        )


def check_token_types(config: SimulateConfig, examples: Examples, base_config: Any) -> None:  # noqa: ANN401
    """Refuse a tokenizer that tells the texts of a pair apart where the model does not.

    Raises:
        ValueError: it gives a type that the model has no embedding for.
    """
    known = getattr(base_config, "type_vocab_size", 0)  # with 0 a model reads none of them
    highest = int(examples.tensors.get("token_type_ids", torch.tensor(0)).max())
    if 0 < known <= highest:
        raise ValueError(
            f"the tokenizer of {config.model} gives the token type {highest}, and the model knows "
            f'those below {known}: put "model_input_names": ["input_ids", "attention_mask"] into '
            "its tokenizer_config.json, or take the model's own tokenizer"
        )


def check_positions(config: SimulateConfig, base: nn.Module, base_config: Any) -> None:  # noqa: ANN401
    """Refuse texts that are longer than a model can read.

    Raises:
        ValueError: they may be.
    """
    positions = getattr(base_config.get_text_config(), "max_position_embeddings", None)
    for name, module in base.named_modules():
        own = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and own is not None:
            positions = module.num_embeddings - own - 1  # as RoBERTa counts
    if positions is not None and config.max_length > positions:
        raise ValueError(
            f"--max-length {config.max_length} is more than the {positions} tokens that "
            f"{config.model} can read; lower it"
        )


def fresh_modules(found: dict[str, Any]) -> list[str]:
    """The modules whose weights are not among the model's files, and were drawn instead.

    Args:
        found: what ``from_pretrained`` returns as ``output_loading_info``.
    """
    mismatched = [key for key, *_ in found["mismatched_keys"]]
    return sorted({key.rpartition(".")[0] for key in [*found["missing_keys"], *mismatched]})


def check_complete(config: SimulateConfig, base: nn.Module, fresh: list[str]) -> None:
    """Refuse random weights where a pretrained model has learnt ones.

    A classifier may have them in its head.

    Raises:
        ValueError: naming them.
    """
    if config.task == "classification":
        embeddings = base.get_input_embeddings()  # type: ignore[operator]
        learnt = {name for name, module in base.named_modules() if module is embeddings}
        fresh = [n for n in fresh if n in learnt or any(map(str.isdecimal, n.split(".")))]
    if fresh:
        more = f" and {len(fresh) - 1} more modules" if len(fresh) > 1 else ""
        raise ValueError(
            f"the files of {config.model} have no weights that fit {fresh[0]}{more}, which would "
            "stay random; save the whole model for its task, or put back its own config.json"
        )
