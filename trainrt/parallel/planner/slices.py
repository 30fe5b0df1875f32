"""How experts of a model that is not ours are cut into slices: as tensor parallelism over so many ranks would cut them.

What it says of the module's weights is a dimension and who has which index along it, the same for every expert. A weight that it
leaves whole enters after the last product, where the results of slices are added up; whether that is so is seen when the plan is
verified (verify.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from trainrt.errors import PlanError
from trainrt.parallel.moe.form import ExpertsForm, Form
from trainrt.parallel.moe.layout import ExpertLayout, Sliced, Slices
from trainrt.parallel.planner.probe import Blueprint
from trainrt.parallel.planner.sharding import Sharding, sharding_of
from trainrt.parallel.sharded.owners import Owners, Split


def with_slices(
    model: nn.Module, modules: Mapping[str, Form | None], blueprint: Blueprint, ranks: int
) -> dict[str, Form | None]:
    """The forms of modules of experts over so many ranks of ep. Raises PlanError where experts cannot be cut."""
    found = dict(modules)
    for name, form in modules.items():
        if isinstance(form, ExpertsForm) and ranks > form.experts:
            layout = ExpertLayout(form.experts, ranks)
            found[name] = replace(form, slices=_slices(model, name, layout, blueprint))
    return found


def _slices(model: nn.Module, name: str, layout: ExpertLayout, blueprint: Blueprint) -> Slices:
    try:
        sharding = sharding_of(blueprint, layout.slices).spread(model)
    except PlanError as error:
        raise _refused(name, layout, str(error)) from error
    found: dict[str, Sliced] = {}
    for leaf, parameter in model.get_submodule(name).named_parameters():
        split = sharding.splits.get(f"{name}.{leaf}")
        if split is None:
            continue
        sliced = _of_an_expert(split, tuple(parameter.shape), layout)
        if sliced is None:
            raise _refused(name, layout, f"{leaf} has no equal slices that are the same for every expert")
        found[leaf] = sliced
    if not found:
        raise _refused(name, layout, _why_whole(sharding, name))
    return found


def _of_an_expert(split: Split, shape: tuple[int, ...], layout: ExpertLayout) -> Sliced | None:
    """The cut of one expert's part of a weight; None where experts differ, or slices are not of the same size."""
    owners = split.owners
    if split.dim == 0:
        by_expert = owners.array.reshape(layout.experts, -1)
        if (by_expert != by_expert[0]).any():
            return None
        owners = Owners(by_expert[0], layout.slices)
    if not owners.disjoint or len({owners.count(number) for number in range(layout.slices)}) > 1:
        return None
    return Sliced(split.dim, tuple(owners.runs(number) for number in range(layout.slices)))


def _why_whole(sharding: Sharding, name: str) -> str:
    rules = sorted({rule for leaf, rule in sharding.rules.items() if leaf.startswith(f"{name}.")})
    return f"none of its weights is cut ({'; '.join(rules)})"


def _refused(name: str, layout: ExpertLayout, why: str) -> PlanError:
    return PlanError(
        f"parallel.ep = {layout.ranks} cuts each of the {layout.experts} experts of {name} into {layout.slices} slices, as "
        f"tensor parallelism over {layout.slices} ranks would: {why}; allowed: 1 to {layout.experts}"
    )
