"""Which dimension of which parameter is split by tensor and expert parallelism, and why.

Two rules (Redco, arXiv 2310.16355): what reads the block's input is column-parallel, what writes
into the residual stream is row-parallel. In this form they are applied to the Llama family's
modules; a block with a parameter that no rule covers is refused by name, never guessed at.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trainrt.config import MeshSize
from trainrt.errors import PlanError
from trainrt.parallel.moe.experts import Experts
from trainrt.parallel.moe.layer import MoeLayer

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Split:
    """Dimension `dim` of a parameter is cut evenly over mesh axis `axis`, because of `rule`."""

    axis: str
    dim: int
    rule: str


def find_blocks(model: nn.Module) -> nn.ModuleList | None:
    """The repeated layers: the module list that holds the most parameters, or None."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=None)


def find_splits(model: nn.Module, size: MeshSize) -> dict[str, Split]:
    """The split of every parameter that tensor or expert parallelism cuts; the rest is replicated."""
    splits: dict[str, Split] = {}
    if size.tp > 1:
        splits.update(_tensor_parallel(model, size.tp))
    if size.ep > 1:
        splits.update(_expert_parallel(model, size))
    return splits


def _tensor_parallel(model: nn.Module, tp: int) -> dict[str, Split]:
    blocks = find_blocks(model)
    if blocks is None:
        raise PlanError(f"parallel.tp = {tp}: the model has no repeated layers to split; allowed: 1")
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    splits: dict[str, Split] = {}
    for name, parameter in blocks.named_parameters(prefix=prefix):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        split = _split_of(module, owner.rpartition(".")[2], leaf)
        if split is not None:
            if parameter.shape[split.dim] % tp:
                raise PlanError(
                    f"parallel.tp = {tp} does not divide dimension {split.dim} of {name}, {tuple(parameter.shape)}"
                )
            splits[name] = split
        elif not _replicated(module, name):
            raise PlanError(f"parallel.tp = {tp}: no rule covers {name} {tuple(parameter.shape)} yet; allowed: 1")
    return splits


def _split_of(module: nn.Module, name: str, leaf: str) -> Split | None:
    if isinstance(module, Experts):
        if leaf in ROW:
            return Split("tp", 2, "row-parallel: experts' inner width")
        return Split("tp", 1, "column-parallel: experts' inner width")
    if not isinstance(module, nn.Linear):
        return None
    if name in COLUMN:
        return Split("tp", 0, "column-parallel: reads the block's input")
    if name in ROW and leaf == "weight":
        return Split("tp", 1, "row-parallel: writes into the residual stream")
    return None


def _replicated(module: nn.Module, name: str) -> bool:
    """Norms of the residual stream, routers and biases of row-parallel layers see whole activations.

    A norm inside attention does not: it acts on heads, which are split.
    """
    if name.endswith(".bias") and isinstance(module, nn.Linear):
        return name.split(".")[-2] in ROW
    if ".router." in name:
        return True
    return "norm" in name.split(".")[-2] and "attn." not in name


def _expert_parallel(model: nn.Module, size: MeshSize) -> dict[str, Split]:
    splits: dict[str, Split] = {}
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
            splits[f"{name}.experts.{leaf}"] = Split("ep", 0, "expert-parallel: each rank holds a run of experts")
    if not splits:
        raise PlanError(f"parallel.ep = {size.ep}: the model has no mixture-of-experts layers; allowed: 1")
    return splits
