"""How tensor parallelism cuts a model: derived once for a structure, kept in a cache, carried by the plan."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from trainrt.errors import PlanError
from trainrt.parallel.moe.form import Form, form_from_json
from trainrt.parallel.plan import kind_of
from trainrt.parallel.planner.experts import find_experts
from trainrt.parallel.planner.probe import Blueprint, trace
from trainrt.parallel.sharded.owners import Runs, Split, owners_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sharding:
    """The split of each parameter that `ranks` ranks share, and the rule of every parameter: why it is cut, or whole.

    sequence: whether activations are scattered by positions between split regions.
    """

    ranks: int
    splits: Mapping[str, Split] = field(default_factory=dict)
    rules: Mapping[str, str] = field(default_factory=dict)
    sequence: bool = False

    def runs(self, name: str) -> Runs:
        """For each rank the runs of indices it holds."""
        return tuple(self.splits[name].owners.runs(rank) for rank in range(self.ranks))

    def to_json(self) -> dict[str, Any]:
        cuts = {name: {"dim": split.dim, "runs": self.runs(name)} for name, split in self.splits.items()}
        return {"ranks": self.ranks, "cuts": cuts, "rules": dict(self.rules), "sequence": self.sequence}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Sharding:
        ranks = document["ranks"]
        splits = {name: Split(cut["dim"], owners_of(cut["runs"])) for name, cut in document["cuts"].items()}
        return cls(ranks, splits, document["rules"], document["sequence"])

    def spread(self, model: nn.Module) -> Sharding:
        """The same for every parameter of the whole model: those that a small run left out follow their like."""
        like: dict[tuple[str, tuple[int, ...]], str] = {}
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name in self.rules:
            if name in shapes:
                like.setdefault((kind_of(name), shapes[name]), name)
        splits, rules = {}, {}
        for name, shape in shapes.items():
            known = name if name in self.rules and name in self.splits else like.get((kind_of(name), shape), name)
            if known in self.splits:
                splits[name] = self.splits[known]
            rules[name] = self.rules.get(known, "replicated: not reached by a run of the model")
        return Sharding(self.ranks, splits, rules, self.sequence)


def find_sharding(blueprint: Blueprint, ranks: int) -> Sharding:
    """The cuts of the small model. Raises PlanError where it cannot be run, or its heads do not divide."""
    # Not every plan cuts, and scipy takes a fifth of a second to import.
    from trainrt.parallel.planner.choose import Chooser
    from trainrt.parallel.planner.deal import Indivisible
    from trainrt.parallel.planner.imagined import scatters

    try:
        choice = Chooser(trace(blueprint), ranks).choose()
    except Indivisible as error:
        raise PlanError(f"parallel.tp = {ranks} does not divide {error}") from error
    return Sharding(ranks, choice.splits, choice.rules, scatters(blueprint, choice.splits, ranks))


class Cache:
    """What is known of structures, on disk: a file for each, written whole. Without a place to write, it forgets."""

    def __init__(self) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        self._directory = Path(home) / "trainrt" / "plans"

    def read(self, key: str) -> dict[str, Any] | None:
        try:
            document: dict[str, Any] = json.loads(self._file(key).read_text())
            return document
        except (OSError, ValueError):
            return None

    def write(self, key: str, document: Mapping[str, Any]) -> None:
        file = self._file(key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(document))
            partial.replace(file)
        except OSError:
            return

    def _file(self, key: str) -> Path:
        return self._directory / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


@lru_cache(maxsize=1)
def _own_source() -> str:
    """A digest of the planner and of sharded execution: what they decide is theirs only."""
    room = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted((*room.glob("planner/*.py"), *room.glob("sharded/*.py"), *room.glob("moe/*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def key_of(what: str, blueprint: Blueprint) -> str:
    """The cache's key of something that this planner says of a structure."""
    return f"{_own_source()} {what} {blueprint.key()}"


def sharding_of(blueprint: Blueprint, ranks: int) -> Sharding:
    """The cuts of the small model, from the cache where its structure is known. Raises PlanError."""
    return _given(_sharding(blueprint, ranks))


def experts_in(blueprint: Blueprint) -> dict[str, Form]:
    """How the modules of experts are called, by name with its numbers blanked; from the cache where it is known.

    Raises PlanError.
    """
    return _given(_experts(blueprint))


def _given(found: T | PlanError) -> T:
    if isinstance(found, PlanError):
        raise found
    return found


# A search asks for the plans of many meshes: what was found for one, or was not, holds for all with as many ranks.


@lru_cache(maxsize=16)
def _sharding(blueprint: Blueprint, ranks: int) -> Sharding | PlanError:
    key = key_of(f"tp {ranks}", blueprint)
    known = Cache().read(key)
    if known is not None:
        return Sharding.from_json(known)
    try:
        found = find_sharding(blueprint, ranks)
    except PlanError as error:
        return error
    Cache().write(key, found.to_json())
    return found


@lru_cache(maxsize=1)
def _experts(blueprint: Blueprint) -> dict[str, Form] | PlanError:
    key = key_of("experts", blueprint)
    known = Cache().read(key)
    if known is not None:
        return {name: form_from_json(form) for name, form in known.items()}
    try:
        found = find_experts(blueprint)
    except PlanError as error:
        return error
    Cache().write(key, {name: asdict(form) for name, form in found.items()})
    return found
