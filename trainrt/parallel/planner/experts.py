"""Expert parallelism: which modules are experts, found by how they are called, and which of them each rank holds.

Experts are a module that is called with rows (N, D), for each row the numbers of its K experts, and their weights, both
(N, K), and whose parameters all have the experts along their first dimension: stacked, or flattened with their rows. Or
they are a list of modules (listed.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainrt.config import MeshSize
from trainrt.errors import PlanError
from trainrt.parallel.moe.experts import Experts, layout_of, slices_of
from trainrt.parallel.moe.form import ExpertsForm, Form, ListedExperts
from trainrt.parallel.moe.layout import NO_ORDERS, ExpertLayout, Orders, Sliced
from trainrt.parallel.plan import Cut, kind_of
from trainrt.parallel.planner.listed import find_listed
from trainrt.parallel.planner.probe import Blueprint, small_model, trace

RULE = "expert-parallel: each rank holds a run of experts"
PLACED_RULE = "expert-parallel: each rank holds the experts it was given by their counts"
SLICED_RULE = "expert-parallel: each rank holds a slice of an expert"
LISTED_RULE = "expert-parallel: each rank holds some experts of the list, all gather them to compute"


def find_experts(blueprint: Blueprint) -> dict[str, Form]:
    """The modules of experts of a model, by name with its numbers blanked. Runs the small model.

    Raises PlanError where it cannot be run.
    """
    model = small_model(blueprint)
    found: dict[str, Form] = {}
    hooks = []
    for name, module in model.named_modules():
        if any(parameter.dim() >= 2 for parameter in module.parameters()):

            def seen(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                form = _form(module, args, kwargs)
                if form is not None:
                    found.setdefault(kind_of(name), form)

            hooks.append(module.register_forward_pre_hook(seen, with_kwargs=True))
    try:
        with torch.no_grad():
            blueprint.loss(model)
    except Exception as error:
        raise PlanError(f"the model cannot be run on a small batch: {type(error).__name__}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return found or dict(find_listed(model, trace(blueprint)))


def _form(module: nn.Module, args: Any, kwargs: Any) -> ExpertsForm | None:
    try:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError:
        return None
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    if len(tensors) != 3 or len(tensors) != len(given):
        return None
    (rows, x), (index, chosen), (weight, share) = tensors.items()
    whole = x.is_floating_point() and share.is_floating_point() and not chosen.is_floating_point()
    if not whole or chosen.dim() != 2 or chosen.shape != share.shape:
        return None
    number = _number_of_experts(module, int(chosen.max()) + 1)
    return ExpertsForm(number, rows, index, weight) if number else None


def _number_of_experts(module: nn.Module, least: int) -> int:
    """Stacked parameters say it; flattened ones are divided by what the module calls a number of experts."""
    stacked = {parameter.shape[0] for parameter in module.parameters() if parameter.dim() == 3}
    named = {value for key, value in vars(module).items() if "expert" in key and isinstance(value, int)}
    for number in sorted(stacked or named):
        if number >= max(least, 2) and all(parameter.shape[0] % number == 0 for parameter in module.parameters()):
            return number
    return 0


def experts_of(model: nn.Module, forms: Mapping[str, Form]) -> dict[str, Form | None]:
    """The expert modules of the whole model by name; None for those of `moe_lm`, which know how to be spread."""
    found: dict[str, Form | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            found[name] = None
        elif kind_of(name) in forms:
            found[name] = forms[kind_of(name)]
    return found


def expert_cuts(
    model: nn.Module, size: MeshSize, modules: Mapping[str, Form | None], orders: Orders = NO_ORDERS
) -> dict[str, tuple[tuple[Cut, ...], str]]:
    """The cuts and the rule of every expert parameter. Raises PlanError where there are none, or they do not divide."""
    cuts: dict[str, tuple[tuple[Cut, ...], str]] = {}
    for name, form in modules.items():
        module = model.get_submodule(name)
        if isinstance(form, ListedExperts):
            _check_number(name, form, size)
        layout = layout_of(module, form, size.ep, orders.get(name))
        slices = slices_of(module, form, layout)
        for leaf, parameter in module.named_parameters():
            shape = tuple(parameter.shape)
            if isinstance(form, ListedExperts) and shape:
                cuts[f"{name}.{leaf}"] = _of_the_list(leaf, shape, layout), LISTED_RULE
                continue
            sliced = slices.get(leaf)
            inner = 0 if len(shape) < 2 else shape[1] if sliced is None or sliced.dim != 1 else sliced.width
            if not inner or inner % size.efsdp:
                raise PlanError(
                    f"parallel.ep = {size.ep} leaves efsdp = {size.efsdp}, which does not divide dimension 1 "
                    f"of {name}.{leaf}, {shape}"
                )
            cuts[f"{name}.{leaf}"] = (*_over_ranks(shape, layout, sliced), Cut("efsdp", 1)), _rule(layout)
    if not cuts:
        raise PlanError(f"parallel.ep = {size.ep}: the model has no mixture-of-experts layers; allowed: 1")
    return cuts


def _check_number(name: str, form: ListedExperts, size: MeshSize) -> None:
    """Lists of experts are spread evenly. Raises PlanError."""
    allowed = [n for n in range(1, form.experts + 1) if form.experts % n == 0]
    if size.ep not in allowed:
        raise PlanError(
            f"parallel.ep = {size.ep} does not fit the {form.experts} experts of {name}; "
            f"allowed: {', '.join(map(str, allowed))}"
        )


def _rule(layout: ExpertLayout) -> str:
    if layout.order is not None:
        return PLACED_RULE
    return SLICED_RULE if layout.slices > 1 else RULE


def _over_ranks(shape: tuple[int, ...], layout: ExpertLayout, sliced: Sliced | None) -> tuple[Cut, ...]:
    """Some experts, stacked or flattened with their rows: a run of them where they have no other order; or the slice of one."""
    rows, ranks = shape[0] // layout.experts, range(layout.ranks)
    whose = tuple(layout.runs(rank, rows) for rank in ranks)
    if sliced is None:
        even = layout.order is None and layout.experts % layout.ranks == 0
        return (Cut("ep", 0, None if even else whose),)
    of_expert = [sliced.runs[rank % layout.slices] for rank in ranks]
    if sliced.dim:
        return Cut("ep", 0, whose), Cut("ep", sliced.dim, tuple(of_expert))
    starts = [first for ((first, _),) in whose]
    return (
        Cut("ep", 0, tuple(tuple((start + a, n) for a, n in of_expert[rank]) for rank, start in enumerate(starts))),
    )


def _of_the_list(leaf: str, shape: tuple[int, ...], layout: ExpertLayout) -> tuple[Cut, ...]:
    """An expert's parameter is whole on one place of ep and nothing on the others."""
    owner = layout.owner(int(leaf.partition(".")[0]))
    runs = tuple(((0, shape[0]),) if place == owner else () for place in range(layout.ranks))
    return Cut("ep", 0, runs), Cut("efsdp", 0)
