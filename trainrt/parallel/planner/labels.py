"""Labels: which channels of which parameters must lie on one rank, found by following them through a tape.

Each index of each dimension of each parameter is an *atom*. A tensor whose channels are split carries, element by
element, the atom its channel comes from (0: none). Operators that mix channels join their atoms; what is joined in the
end must stay together. Redco's two rules (arXiv 2310.16355, section 3) come out as two cases of the matrix product: what
reads a whole activation may be cut by its outputs, what reads a cut one is cut by its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from trainrt.parallel.planner.tape import Op, Ref, Tape
from trainrt.parallel.planner.weights import Dim, Indices, Weight

Mask = NDArray[np.bool_]


class Conflict(Exception):
    """A choice of columns that the data flow does not allow; the text says where."""


class Atoms:
    """Numbers for the indices of all dimensions of all parameters; 0 is none. Joined ones get one group."""

    def __init__(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        self.first: dict[Dim, int] = {}
        self.count = 1
        for name, size in sizes.items():
            for dim, n in enumerate(size):
                self.first[name, dim] = self.count
                self.count += n
        self.size = {(name, dim): n for name, size in sizes.items() for dim, n in enumerate(size)}
        self.group: Indices = np.arange(self.count)

    def of(self, key: Dim) -> slice:
        return slice(self.first[key], self.first[key] + self.size[key])

    def parameter(self, atoms: Indices) -> Indices:
        """A number for each atom that tells the dimension of the parameter it belongs to."""
        return np.searchsorted(np.fromiter(self.first.values(), np.int64), atoms, side="right")

    def join(self, pairs: Iterable[Indices]) -> bool:
        """Join what stands in a row of (n, 2) arrays. Returns whether anything changed."""
        edges = [np.unique(self.group[pair], axis=0) for pair in pairs]
        joined = np.concatenate([edge[edge[:, 0] != edge[:, 1]] for edge in edges] or [np.zeros((0, 2), np.int64)])
        if not len(joined):
            return False
        graph = coo_array((np.ones(len(joined)), (joined[:, 0], joined[:, 1])), shape=(self.count, self.count))
        _, component = connected_components(graph, directed=False)
        lowest = np.full(component.max() + 1, self.count)
        np.minimum.at(lowest, component, np.arange(self.count))
        self.group = lowest[component][self.group]
        return True


@dataclass(slots=True)
class Use:
    """A weight that met labels: for each dimension it could be cut along, (atom, label) pairs. `row`: it must be cut."""

    pairs: dict[Dim, Indices]
    row: bool
    op: Op


@dataclass(slots=True)
class Flow:
    """One walk along the tape with some columns active, and what it found.

    active: for each column (or vocabulary) candidate, which of its indices are split. reduce: sums over split channels may
    be made of partial sums (an all-reduce), where else their channels would be joined.
    """

    tape: Tape
    atoms: Atoms
    active: Mapping[Dim, Mask]
    reduce: bool = False
    labels: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Weight] = field(default_factory=dict)
    tainted: set[int] = field(default_factory=set)
    edges: list[Indices] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    plain: dict[str, Op] = field(default_factory=dict)
    columns: dict[Dim, Ref] = field(default_factory=dict)
    tables: set[Dim] = field(default_factory=set)
    direct: set[Dim] = field(default_factory=set)
    known: bool = False
    together: list[Indices] = field(default_factory=list)
    wide: list[tuple[Op, Tensor, list[int]]] = field(default_factory=list)

    def walk(self) -> None:
        """Follow the tape once. `known`: groups of an earlier walk are there to be relied on."""
        from trainrt.parallel.planner.operators import follow

        self.labels, self.weights, self.edges, self.uses = {}, {}, [], []
        self.together, self.wide = [], []
        self.plain, self.direct, self.tainted = {}, set(), set()
        for name, ref in self.tape.parameters.items():
            self.weights[ref.storage] = Weight.of_parameter(name, ref)
        for op in self.tape.ops:
            follow(self, op)

    def narrowed(self) -> bool:
        """Join groups that would split a tensor along two dimensions: only the outermost tells them apart then.

        Weights stacked along a dimension are cut alike, rather than dealt to ranks one by one. Returns whether there were any.
        Raises Conflict where no joining helps.
        """
        edges = len(self.edges)
        for _, label, varying in self.wide:
            parameter = torch.from_numpy(self.atoms.parameter(label.numpy()))
            within = (dim for dim in varying if bool((parameter == parameter.narrow(dim, 0, 1)).all()))
            kept = next(within, varying[0])
            self.join_along(label, [dim for dim in varying if dim != kept])
        if self.wide and not self.atoms.join(self.edges[edges:]):
            op = self.wide[0][0]
            raise Conflict(f"{op.func} would split its result along two dimensions ({op.module})")
        return bool(self.wide)

    # What is known of a tensor.

    def label(self, ref: Ref) -> Tensor | None:
        """The label of each element, or None where none has one."""
        flat = self.labels.get(ref.storage)
        if flat is None:
            return None
        seen = flat.as_strided(ref.size, ref.stride, ref.offset)
        if ref.width == 2:
            imaginary = flat.as_strided(ref.size, ref.stride, ref.offset + 1)
            self.join(seen, imaginary)
            seen = torch.where(seen != 0, seen, imaginary)
        return seen if bool(seen.any()) else None

    def set_label(self, ref: Ref, label: Tensor | None) -> None:
        if label is None and ref.storage not in self.labels:
            return
        flat = self.labels.setdefault(ref.storage, torch.zeros(ref.elements, dtype=torch.int64))
        for part in range(ref.width):
            view = flat.as_strided(ref.size, ref.stride, ref.offset + part)
            view.copy_(torch.zeros(()) if label is None else label)

    def weight(self, ref: Ref) -> Weight | None:
        return self.weights.get(ref.storage)

    def group(self, label: Tensor) -> Tensor:
        """Labels replaced by what their atoms are joined to."""
        return torch.as_tensor(self.atoms.group[label.numpy()])

    # What an operator does to it.

    def join(self, a: Tensor, b: Tensor) -> None:
        """Element by element, where both have labels."""
        both = (a != 0) & (b != 0) & (a != b)
        if not both.any():
            return
        one, other = a[both].numpy(), b[both].numpy()
        apart = self.atoms.group[one] != self.atoms.group[other]
        if apart.any():
            # One number for each pair: unique numbers are found many times faster than unique rows.
            pairs = np.unique(one[apart] * self.atoms.count + other[apart])
            self.edges.append(np.stack(np.divmod(pairs, self.atoms.count), 1))

    def merge(self, labels: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """One label for each element of a pointwise result."""
        merged = torch.zeros(shape, dtype=torch.int64)
        for label in labels:
            wide = label.broadcast_to(shape)
            self.join(merged, wide)
            merged = torch.where(merged != 0, merged, wide)
        return merged

    def same_along(self, label: Tensor, dims: Iterable[int]) -> bool:
        """Whether the channels along these dimensions are already one group."""
        groups = self.group(label)
        return all(bool((groups == groups.narrow(dim, 0, 1)).all()) for dim in dims)

    def join_along(self, label: Tensor, dims: Iterable[int]) -> None:
        for dim in dims:
            self.join(label, label.narrow(dim, 0, 1).expand_as(label))

    def atoms_of(self, key: Dim, grid: Indices) -> Tensor:
        # numpy makes a number of a sum that has no dimensions: a weight may have none.
        return torch.as_tensor(grid + self.atoms.first[key])

    def bind(self, ref: Ref, weight: Weight, label: Tensor, op: Op) -> None:
        """A weight met labelled elements of its own shape: it may be cut with them."""
        pairs = {}
        ahead = label.dim() - len(ref.size)
        for key, seen in weight.seen_by(ref).items():
            grid = seen.grid()
            met = self.atoms_of(key, grid.reshape((1,) * ahead + grid.shape))
            pairs[key] = _pairs(met, label)
        self.uses.append(Use(pairs, row=False, op=op))

    def bind_row(self, key_grids: dict[Dim, Tensor], label: Tensor, op: Op) -> None:
        self.uses.append(Use({key: _pairs(met, label) for key, met in key_grids.items()}, row=True, op=op))

    def demote(self, weights: Iterable[Weight | None], op: Op) -> None:
        """Weights that are used in a way that needs all of them."""
        for weight in weights:
            for name in weight.parameters if weight is not None else ():
                self.plain.setdefault(name, op)

    def taint(self, refs: Iterable[Ref]) -> None:
        self.tainted.update(ref.storage for ref in refs)


def _pairs(met: Tensor, label: Tensor) -> Indices:
    """The distinct (atom, label) pairs, label 0 left out."""
    wide = met.broadcast_to(label.shape)
    for dim in range(label.dim()):
        # What holds for one token mostly holds for all.
        if wide.stride(dim) == 0 and bool((label == label.narrow(dim, 0, 1)).all()):
            wide, label = wide.narrow(dim, 0, 1), label.narrow(dim, 0, 1)
    there = label != 0
    met_atoms, labels = wide[there].numpy(), label[there].numpy()
    # One number for each pair: unique numbers are found many times faster than unique rows.
    base = int(labels.max(initial=0)) + 1
    return np.stack(np.divmod(np.unique(met_atoms * base + labels), base), 1)
