"""Experts that are a list of modules: found by data flow, since each model's code calls them in its own way.

A list holds experts if its modules are alike, none computes with what another one made, and a choice is made beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from trainrt.parallel.moe.form import ListedExperts
from trainrt.parallel.plan import kind_of
from trainrt.parallel.planner.tape import Op, Tape

CHOICES = {"topk", "argmax", "max", "sort", "argsort", "_softmax", "sigmoid", "multinomial"}
"""Operators by which a router weighs or picks experts."""


def find_listed(model: nn.Module, tape: Tape) -> dict[str, ListedExperts]:
    """The lists of experts of the model whose run `tape` is, by name with its numbers blanked."""
    found: dict[str, ListedExperts] = {}
    for name, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList) and len(modules) > 1 and _alike(modules) and kind_of(name) not in found:
            around = name.rpartition(".")[0]
            beside = (op for op in tape.ops if _inside(op.module, around) and not _inside(op.module, name))
            if any(op.name in CHOICES for op in beside) and not _chained(name, tape):
                found[kind_of(name)] = ListedExperts(len(modules))
    return found


def _alike(modules: nn.ModuleList) -> bool:
    kinds = {tuple((name, tuple(p.shape)) for name, p in module.named_parameters()) for module in modules}
    return len(kinds) == 1 and any(len(shape) >= 2 for _, shape in kinds.pop())


def _inside(module: str, name: str) -> bool:
    return not name or module == name or module.startswith(f"{name}.")


def _chained(name: str, tape: Tape) -> bool:
    """Whether a module of the list reads what another one made, by whatever way; or whether none of them runs."""
    makers: dict[int, frozenset[str]] = {}
    ran = False
    for op in tape.ops:
        read = frozenset[str]().union(*(makers.get(ref.storage, frozenset()) for ref in op.inputs))
        own = op.module[len(name) + 1 :].partition(".")[0] if _inside(op.module, name) and op.module != name else ""
        if own:
            ran = True
            if read - {own}:
                return True
            read |= {own}
        for storage in _written(op):
            makers[storage] = makers.get(storage, frozenset()) | read
    return not ran


def _written(op: Op) -> Iterator[int]:
    yield from (ref.storage for ref in op.outputs)
    if op.in_place and op.inputs:
        yield op.inputs[0].storage
