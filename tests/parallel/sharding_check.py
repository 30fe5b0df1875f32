"""A causal language model sharded over the ranks of a group, compared with itself in one process.

Models compute parts in fp32 whatever their parameters are. In exact mode what they ask as fp32 is fp64, so that a
difference of rounding is told from a wrong result.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from tests.parallel import causal_models
from trainrt.errors import PlanError
from trainrt.parallel.planner.probe import Blueprint, hollow
from trainrt.parallel.planner.sharding import Sharding, find_sharding
from trainrt.parallel.sharded.model import shard_model

IMPORTED = ("transformers.modeling_utils", "transformers.models.auto.modeling_auto", "tests.parallel.sharding_check")
"""What processes should come with: importing it takes most of a check's time."""

EXACT = (1e-12, 1e-12)
SINGLE = (1e-6, 5e-6)
"""Largest relative errors of the loss and of gradients, in fp64 and fp32."""

FLOOR = 1e-4
"""Of the norm of all gradients: a smaller one is compared as if it had this. Those of keys' biases are rounding only."""


@dataclass
class Outcome:
    """result: right, refused, not buildable, wrong.

    held: of the parameters that a run reaches, the fraction that rank 0 holds. gathered: operators of one forward pass that
    had to gather. sequence: whether activations are scattered by positions.
    """

    result: str
    reason: str = ""
    precision: str = ""
    held: float = 1.0
    loss: float = 0.0
    gradient: float = 0.0
    worst: str = ""
    gathered: dict[str, int] = field(default_factory=dict)
    sequence: bool = False


def single_means_double() -> None:
    """From here on what this process asks as fp32 is fp64."""
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign, assignment]
    torch.set_default_dtype(torch.float64)


def inputs(model: nn.Module, *, samples: int) -> dict[str, Any]:
    """Tokens, and where the model takes a mask the end of the last sample masked."""
    names = inspect.signature(model.forward).parameters
    vocabulary = min(getattr(model.config, "vocab_size", None) or causal_models.VOCABULARY, causal_models.VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    rows = samples * getattr(model, "num_codebooks", 1)
    ids = torch.randint(3, vocabulary - 3, (rows, causal_models.LENGTH), generator=generator)
    given: dict[str, Any] = {"input_ids": ids}
    if "shared_kv_states" in names:
        return _drafted(model, samples)
    if "use_cache" in names or "kwargs" in names:
        given["use_cache"] = False
    if "attention_mask" in names and samples > 1:
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][-1, -3:] = 0
    return given


def _drafted(model: nn.Module, samples: int) -> dict[str, Any]:
    """A draft model reads the last hidden states, and the keys and values, of the model that it drafts for."""
    text, kind = model.config.get_text_config(), next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(kind)

    states = {}
    for layer, name in enumerate(text.layer_types):
        layered = text.per_layer_config[layer] if text.per_layer_config else text
        shape = (samples, layered.num_key_value_heads, causal_models.LENGTH, layered.head_dim)
        states[name] = (random(*shape), random(*shape))
    hidden = random(samples, causal_models.LENGTH, 2 * model.config.backbone_hidden_size)
    # Asked for hidden states, it computes all positions.
    return {"inputs_embeds": hidden, "shared_kv_states": states, "output_hidden_states": True}


def loss_of(model: nn.Module, *, samples: int) -> Tensor:
    """The mean loss of predicting next tokens."""
    given = inputs(model, samples=samples)
    logits = model(**given).logits
    labels = given.get("input_ids", torch.arange(logits.shape[1]).expand(logits.shape[:2])).roll(-1, 1)
    labels = labels.masked_fill(given.get("attention_mask", torch.ones(())) == 0, -100)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def spread(model: nn.Module) -> None:
    """Make every parameter matter: noise on what was initialized, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and isinstance(tensor, nn.Parameter):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.1
            tensor.data = (torch.nan_to_num(tensor.data).clamp(-20, 20) + noise.to(tensor.dtype)).contiguous()
        dist.broadcast(tensor.data, 0)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of each parameter, this rank's part of it where it is split; zeros where it has none."""
    found = {}
    for name, parameter in model.named_parameters():
        given = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        found[name] = given.to_local() if isinstance(given, DTensor) else given
    return found


def planned(kind: str) -> Sharding:
    """The sharding that the planner finds on rank 0. Raises PlanError."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:

        def make() -> nn.Module:
            with hollow():
                return causal_models.build(causal_models.configuration(kind))

        try:
            blueprint = Blueprint(make, lambda model: loss_of(model, samples=1), lambda: kind)
            answer = [find_sharding(blueprint, dist.get_world_size())]
        except Exception as error:
            answer = [f"the planner: {type(error).__name__}: {error}"]
    dist.broadcast_object_list(answer, 0)
    if isinstance(answer[0], str):
        raise PlanError(answer[0])
    sharding: Sharding = answer[0]
    return sharding


def check(rank: int, kind: str, exact: bool) -> Outcome:
    """What comes of one type on the ranks of the default group."""
    try:
        model = causal_models.build(causal_models.configuration(kind))
    except Exception as error:
        return Outcome("not buildable", _said(error))
    try:
        loss_of(model, samples=2).backward()
    except Exception as error:
        return Outcome("not buildable", f"a single process: {_said(error)}")
    model.zero_grad()
    try:
        sharding = planned(kind).spread(model)
    except PlanError as error:
        return Outcome("refused", str(error))
    if exact:
        single_means_double()
        model = model.double()
    model.config._experts_implementation = "eager"
    spread(model)
    try:
        loss = loss_of(model, samples=2)
        loss.backward()
    except Exception as error:
        return Outcome("not buildable", f"a single process in fp64: {_said(error)}")
    if not sharding.splits:
        reasons = Counter(sharding.rules.values()).most_common(3)
        return Outcome("refused", "nothing can be cut: " + "; ".join(reason for reason, _ in reasons))
    expected = gradients(model)
    used = {name: p.numel() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    axis = shard_model(
        model, sharding.splits, init_device_mesh("cpu", (dist.get_world_size(),)), sequence=sharding.sequence
    )
    parts = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    held = sum(parts[name].numel() for name in used) / sum(used.values())
    try:
        made = loss_of(model, samples=2)
        gathered = dict(axis.gathered)
        made.backward()
    except NotImplementedError as error:
        return Outcome("refused", f"sharded: {_said(error)}", held=held)
    except Exception as error:
        return Outcome("wrong", f"sharded: {_said(error)}", held=held)
    outcome = Outcome("", "", "fp64" if exact else "fp32", held, gathered=gathered, sequence=axis.scattered > 0)
    outcome.loss = abs(made.item() - loss.item()) / abs(loss.item())
    everything = sum(float(value.double().square().sum()) for value in expected.values()) ** 0.5
    errors: dict[str, float] = {}
    for name, value in gradients(model).items():
        wanted = expected[name]
        if name in sharding.splits:
            wanted = axis.take(wanted, sharding.splits[name].dim, sharding.splits[name].owners)
        errors[name] = float((value - wanted).norm()) / max(float(expected[name].norm()), FLOOR * everything)
    outcome.worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    outcome.gradient = errors[outcome.worst]
    return judged(outcome)


def judged(outcome: Outcome) -> Outcome:
    """Right or wrong, by the limits of its precision."""
    most_loss, most_gradient = EXACT if outcome.precision == "fp64" else SINGLE
    right = outcome.loss <= most_loss and outcome.gradient <= most_gradient
    outcome.result = "right" if right else "wrong"
    if not right:
        outcome.reason = f"loss {outcome.loss:.1e}, gradient of {outcome.worst} {outcome.gradient:.1e}"
    return outcome


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
