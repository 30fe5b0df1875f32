"""Expert parallelism: which parameters are experts', and which of them each rank holds."""

from __future__ import annotations

from torch import nn

from trainrt.config import MeshSize
from trainrt.errors import PlanError
from trainrt.parallel.moe.layer import MoeLayer
from trainrt.parallel.plan import Cut

RULE = "expert-parallel: each rank holds a run of experts"


def expert_cuts(model: nn.Module, size: MeshSize) -> dict[str, tuple[tuple[Cut, ...], str]]:
    """The cuts and the rule of every expert parameter. Raises PlanError where there are none, or they do not divide."""
    cuts: dict[str, tuple[tuple[Cut, ...], str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, MoeLayer):
            continue
        if module.number_of_experts % size.ep:
            raise PlanError(f"parallel.ep = {size.ep} does not divide moe.experts = {module.number_of_experts}")
        for leaf, parameter in module.experts.named_parameters():
            if parameter.shape[1] % size.efsdp:
                raise PlanError(
                    f"parallel.ep = {size.ep} leaves efsdp = {size.efsdp}, which does not divide dimension 1 "
                    f"of {name}.experts.{leaf}, {tuple(parameter.shape)}"
                )
            cuts[f"{name}.experts.{leaf}"] = (Cut("ep", 0), Cut("efsdp", 1)), RULE
    if not cuts:
        raise PlanError(f"parallel.ep = {size.ep}: the model has no mixture-of-experts layers; allowed: 1")
    return cuts
