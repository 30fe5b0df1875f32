"""Which columns to cut: the largest first, each kept if nothing conflicts and ranks hold less.

Candidates are taken by structure (a name with its numbers blanked, a shape), so repeated layers are decided once and what
a small run did not reach (an expert that no token chose) follows its like.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from trainrt.parallel.plan import kind_of
from trainrt.parallel.planner.deal import deal
from trainrt.parallel.planner.labels import Atoms, Conflict, Flow, Mask, Use
from trainrt.parallel.planner.tape import Ref, Tape
from trainrt.parallel.planner.weights import Dim, Indices
from trainrt.parallel.sharded.owners import ALL, Owners, Split

WALKS = 8
"""More than any model has needed for its groups to settle."""


COLUMN = "column-parallel: reads whole activations"
ROW = "row-parallel: reads split channels, its output is summed"
TABLE = "vocabulary-parallel: rows are looked up"
BOUND = "bound: meets split channels one by one"


@dataclass(slots=True)
class Choice:
    """The split of each parameter that is cut, and the rule of every one: why it is cut, or whole."""

    splits: dict[str, Split] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)


class Chooser:
    """The greedy choice over one tape, for `ranks` ranks."""

    def __init__(self, tape: Tape, ranks: int) -> None:
        self.tape, self.ranks = tape, ranks
        self.sizes = {name: ref.size for name, ref in tape.parameters.items()}
        self.active: dict[Dim, Mask] = {}
        self.reduce = False
        self.reasons: dict[str, str] = {}

    def choose(self) -> Choice:
        """Two stages: first without sums over split channels, then what was refused with them."""
        best, flow = self._try(self.active)
        candidates = self._candidates(flow)
        for reduce in (False, True):
            self.reduce = reduce
            for keys in candidates.values():
                if not any(key[0] in best.splits for key in keys):
                    best = self._extend(keys, flow, best)
        best.rules |= {name: self._why(name, flow) for name in self.sizes if name not in best.splits}
        return best

    def _candidates(self, flow: Flow) -> dict[str, list[Dim]]:
        """Dimensions that may become columns or table rows, by structure, the largest first."""
        found: dict[str, list[Dim]] = defaultdict(list)
        for key in (*flow.columns, *sorted(flow.tables)):
            name, dim = key
            kind = f"{kind_of(name)} {self.sizes[name]} {dim}"
            if self.sizes[name][dim] >= self.ranks and key not in found[kind]:
                found[kind].append(key)
        size = {kind: sum(int(np.prod(self.sizes[name])) for name, _ in keys) for kind, keys in found.items()}
        return {kind: found[kind] for kind in sorted(found, key=lambda kind: -size[kind])}

    def _extend(self, keys: list[Dim], flow: Flow, best: Choice) -> Choice:
        whole = {key: np.ones(self.sizes[key[0]][key[1]], bool) for key in keys}
        for masks in (whole, *self._segments(keys, flow)):
            active = {
                **self.active,
                **{key: masks[key] if key not in self.active else self.active[key] | masks[key] for key in keys},
            }
            try:
                tried, _ = self._try(active)
            except Conflict as conflict:
                self.reasons.setdefault(keys[0][0], str(conflict))
                continue
            if self.held(tried) < self.held(best):
                self.active, best = active, tried
                if masks is whole:
                    break
        return best

    def _segments(self, keys: list[Dim], flow: Flow) -> list[dict[Dim, Mask]]:
        """The parts into which the model itself slices the columns (q, k and v of a fused weight), the largest first."""
        cut: dict[Dim, list[Mask]] = {}
        for key in keys:
            out = flow.columns.get(key)
            if out is None or out.size[-1] != self.sizes[key[0]][key[1]]:
                return []
            cut[key] = _parts(self.tape, out)
        count = min(len(parts) for parts in cut.values())
        return [{key: parts[i] for key, parts in cut.items()} for i in range(count if count > 1 else 0)]

    def _try(self, active: Mapping[Dim, Mask]) -> tuple[Choice, Flow]:
        """The groups that follow from cutting these columns. Raises Conflict."""
        atoms = Atoms(self.sizes)
        flow = Flow(self.tape, atoms, active, reduce=self.reduce)
        bound: dict[str, Dim] = {}
        for _ in range(WALKS):
            flow.walk()
            changed = atoms.join(flow.edges)
            found = self._bound(flow)
            changed |= atoms.join(pairs for _, pairs in found)
            bound = {key[0]: key for key, _ in found}
            if flow.known and not changed and not flow.narrowed():
                break
            flow.known = True
        return self._grouped(flow, active, bound), flow

    def _bound(self, flow: Flow) -> list[tuple[Dim, Indices]]:
        """Weights that met labels, each of its indices those of one group only: cut with them."""
        uses: dict[str, list[Use]] = defaultdict(list)
        for use in flow.uses:
            for name in {key[0] for key in use.pairs}:
                uses[name].append(use)
        found = []
        for name, met in uses.items():
            if name in flow.plain:
                continue
            dims = set.intersection(*({key for key in use.pairs if key[0] == name} for use in met))
            for key in sorted(dims):
                pairs = np.concatenate([use.pairs[key] for use in met])
                if len(pairs) and _one_group_each(flow.atoms, pairs):
                    found.append((key, pairs))
                    break
        return found

    def _grouped(self, flow: Flow, active: Mapping[Dim, Mask], bound: Mapping[str, Dim]) -> Choice:
        dims: dict[str, tuple[int, str]] = {}
        given = [(key, TABLE if key in flow.tables and key not in flow.columns else COLUMN) for key in active]
        given += [(key, BOUND) for key in (*bound.values(), *flow.direct)]
        rowed = {use_key for use in flow.uses if use.row for use_key in use.pairs}
        for key, rule in given:
            name, dim = key
            rule = ROW if key in rowed else rule
            if dims.setdefault(name, (dim, rule))[0] != dim:
                raise Conflict(f"{name} would be cut along dimensions {dims[name][0]} and {dim}")
        for use in flow.uses:
            if use.row and not any(key[0] in dims and dims[key[0]][0] == key[1] for key in use.pairs):
                raise Conflict(
                    f"{use.op.func}: its input's channels do not go with the rows of any weight ({use.op.module})"
                )
        for name in dims:
            if name in flow.plain:
                raise Conflict(f"{name} is also used whole ({flow.plain[name].module})")
        return self._settled(flow, active, dims)

    def _settled(self, flow: Flow, active: Mapping[Dim, Mask], dims: Mapping[str, tuple[int, str]]) -> Choice:
        split = np.zeros(flow.atoms.count, bool)
        for key, mask in active.items():
            split[flow.atoms.group[flow.atoms.of(key)][mask]] = True
        groups = {}
        for name, (dim, _) in dims.items():
            group = flow.atoms.group[flow.atoms.of((name, dim))]
            groups[name] = np.where(split[group], group, 0)
        side_by_side = [found[split[found]] for found in flow.together]
        rank = deal(groups, side_by_side, self.ranks, count=flow.atoms.count)
        splits = {name: Split(dim, Owners(rank[groups[name]], self.ranks)) for name, (dim, _) in dims.items()}
        return Choice(splits, {name: rule for name, (_, rule) in dims.items()})

    def held(self, choice: Choice) -> float:
        """Elements a rank holds, on average."""
        total = 0.0
        for name, size in self.sizes.items():
            share = 1.0
            if name in choice.splits:
                share = float(np.where(choice.splits[name].owners.array == ALL, 1.0, 1.0 / self.ranks).mean())
            total += share * float(np.prod(size))
        return total

    def _why(self, name: str, flow: Flow) -> str:
        if name in self.reasons:
            return f"replicated: {self.reasons[name]}"
        if name in flow.plain:
            return "replicated: sees whole activations"
        return "replicated: meets split channels as a whole" if name in _used(self.tape) else "replicated: not reached"


def _one_group_each(atoms: Atoms, pairs: Indices) -> bool:
    """Whether each atom meets labels of one group only."""
    groups = np.unique(np.stack((pairs[:, 0], atoms.group[pairs[:, 1]]), 1), axis=0)
    return len(np.unique(groups[:, 0])) == len(groups)


def _used(tape: Tape) -> set[str]:
    storages = {ref.storage for op in tape.ops for ref in op.inputs}
    return {name for name, ref in tape.parameters.items() if ref.storage in storages}


def _parts(tape: Tape, out: Ref) -> list[Mask]:
    """Parts of the columns of a product's output that the model takes views of, and what these cut it into; the largest first."""
    columns = out.size[-1]
    signature = np.zeros(columns, np.int64)
    seen: set[bytes] = set()
    for ref in (ref for op in tape.ops for ref in (*op.inputs, *op.outputs) if ref.storage == out.storage):
        places = np.full(1, ref.offset)
        for n, stride in zip(ref.size, ref.stride, strict=True):
            places = (places[:, None] + np.arange(n) * stride).reshape(-1)
        mask = np.zeros(columns, bool)
        mask[places % columns] = True
        if not mask.all() and mask.tobytes() not in seen:
            seen.add(mask.tobytes())
            signature = signature * 2 + mask
    kinds = [signature == kind for kind in np.unique(signature)]
    views = [np.frombuffer(mask, bool) for mask in seen]
    parts = {mask.tobytes(): mask for mask in (*views, *kinds)}
    return sorted(parts.values(), key=lambda mask: (-int(mask.sum()), int(mask.argmax())))
