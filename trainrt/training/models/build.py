"""Models by config: `moe_lm`, or any causal language model of Hugging Face transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainrt.config import JobConfig
from trainrt.errors import ModelError
from trainrt.training.models.moe_lm import MoeLm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def stored_dtype(config: JobConfig) -> torch.dtype:
    """The dtype parameters are kept and updated in: fp32 masters under bfloat16."""
    return torch.float64 if config.model.dtype == "float64" else torch.float32


def compute_dtype(config: JobConfig) -> torch.dtype:
    return DTYPES[config.model.dtype]


def build_meta(config: JobConfig) -> nn.Module:
    """The model without storage: names, shapes and structure."""
    with torch.device("meta"):
        return construct(config).to(stored_dtype(config))


def build(config: JobConfig, *, fresh: bool) -> nn.Module:
    """The whole model on the CPU. `fresh`: with initial values (by run.seed), or weights where there are any;
    otherwise its parameters hold anything, because a restore is about to fill them.
    """
    torch.manual_seed(config.run.seed)
    if config.model.kind == "moe_lm":
        model = construct(config)
        if fresh:
            assert isinstance(model, MoeLm)
            model.initialize()
    elif fresh and weight_files(config):
        model = _pretrained(config)
    else:
        model = construct(config, initialize=fresh)
    return model.to(stored_dtype(config))


def whole_model(config: JobConfig, own: Callable[[], nn.Module] | None, *, fresh: bool) -> nn.Module:
    """The user's model, made under the job's seed so that every rank makes the same one, or the config's."""
    if own is None:
        return build(config, fresh=fresh)
    torch.manual_seed(config.run.seed)
    return own().to(stored_dtype(config))


def model_document(config: JobConfig) -> dict[str, Any]:
    """What stands in a checkpoint's model/config.json: for Hugging Face models, what transformers reads."""
    if config.model.kind == "moe_lm":
        kept = (
            "experts",
            "top_k",
            "every",
            "zero_experts",
            "copy_experts",
            "constant_experts",
            "tau",
            "shared_experts",
            "balance",
            "routing",
        )
        moe = {key: getattr(config.moe, key) for key in kept}
        return {"model_type": "trainrt_moe_lm", "architectures": ["MoeLm"], **config.moe_lm.model_dump(), "moe": moe}
    document = huggingface_config(config).to_dict()
    document["dtype"] = config.model.dtype
    document["architectures"] = [type(build_meta(config)).__name__]
    return document


def weight_files(config: JobConfig) -> list[Path]:
    """The safetensors files of a Hugging Face model directory; none for an inline config."""
    if config.model.kind != "huggingface" or not isinstance(config.model.config, str):
        return []
    return sorted(Path(config.model.config).glob("*.safetensors"))


def huggingface_config(config: JobConfig) -> Any:
    """The transformers config object. Raises ModelError where the architecture is not known."""
    import transformers

    source = config.model.config
    try:
        if isinstance(source, str):
            return transformers.AutoConfig.from_pretrained(source, local_files_only=True)
        document = dict(source)
        return transformers.AutoConfig.for_model(_model_type(document), **document)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.config = {source}: {_first_line(error)}") from error


def _model_type(document: dict[str, Any]) -> str:
    """An inline table names its model_type, or an architecture that has one."""
    import transformers

    if "model_type" in document:
        return str(document.pop("model_type"))
    for name in document.get("architectures", ()):
        known = getattr(transformers, name, None)
        if known is not None:
            return str(known.config_class.model_type)
        raise ModelError(f'model.config.architectures = ["{name}"]: transformers has no such class')
    raise ModelError("model.config: an inline table needs model_type or architectures")


def construct(config: JobConfig, *, initialize: bool = True) -> nn.Module:
    """The model that the config says, on the current device."""
    if config.model.kind == "moe_lm":
        return MoeLm(config.moe_lm, config.moe)
    import transformers
    from transformers.initialization import no_init_weights

    with contextlib.nullcontext() if initialize else no_init_weights():
        try:
            document = huggingface_config(config)
            if config.model.dtype == "float64":
                # Grouped matrix products have no kernel for doubles.
                document._experts_implementation = "eager"
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(document, dtype=stored_dtype(config))
            # Without initial values transformers leaves out the ties as well; they are structure.
            model.tie_weights()  # type: ignore[operator]
            return model
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(
                f"model.config: no causal language model can be made of it: {_first_line(error)}"
            ) from error


def _pretrained(config: JobConfig) -> nn.Module:
    import transformers

    factory: Any = transformers.AutoModelForCausalLM
    try:
        model, report = factory.from_pretrained(
            config.model.config,
            dtype=stored_dtype(config),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"model.config = {config.model.config}: {_first_line(error)}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        wrong = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
        raise ModelError(f"model.config = {config.model.config}: weights missing or of another shape: {wrong[:5]}")
    return model


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def hidden_size_of(config: JobConfig, model: nn.Module) -> int:
    """The width of the model's residual stream, 0 where it does not say."""
    if config.model.kind == "moe_lm":
        return config.moe_lm.hidden_size
    return int(getattr(getattr(model, "config", None), "hidden_size", 0) or 0)
