"""A mapping: rules from stored names to expressions, and their compilation to a `Layout`, in both directions.

Reading, arrays of files become fragments of logical tensors. Writing, logical tensors become arrays of files, and fragments in
them. Both go through the same expressions, so what was written is read back the same.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from trainrt.checkpoint.mapping import language
from trainrt.checkpoint.mapping.expression import Coordinate, Patch, Pieces, Shape, Shapes, frozen
from trainrt.errors import LayoutError
from trainrt.parallel.layout import Box, Fragment, Key, Layout, LogicalTensor, contiguous_strides


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array of a file (`storage`) at byte `base`; `strides` and `start` in elements; `at`: its file's coordinate.

    One that does not lie in one place has `parts`, which say where, instead of a storage.
    """

    name: str
    role: str
    dtype: str
    shape: Shape
    storage: str
    base: int = 0
    strides: Shape | None = None
    start: int = 0
    at: Coordinate = field(default_factory=dict)
    parts: Parts | None = None

    def fragments(self, patch: Patch, rank: int) -> list[Fragment]:
        """Where a patch of this array lies, in one file or in those of its parts."""
        if self.parts is None:
            return [self.fragment(patch, rank)]
        return [part.array.fragment(piece, rank) for part in self.parts.near(patch) for piece in patch.inside(part.box)]

    def fragment(self, patch: Patch, rank: int) -> Fragment:
        """Where a patch of this array lies in the file."""
        strides = contiguous_strides(self.shape) if self.strides is None else self.strides
        start = self.start + sum(at * step for at, step in zip(patch.offset, strides, strict=True))
        steps = patch.steps if patch.steps is not None else (1,) * len(patch.axes)
        along = tuple(strides[axis] * step for axis, step in zip(patch.axes, steps, strict=True))
        return Fragment(rank, patch.box, self.storage, along, start, self.base)


@dataclass(frozen=True, slots=True)
class Part:
    """A box of an array that is an array of some file in itself."""

    box: Box
    array: StoredArray


class Parts:
    """The parts of one array, found by where they are along its first dimension."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = sorted(parts, key=lambda part: part.box.offset)
        self._firsts = [part.box.offset[:1] for part in self._parts]
        self._longest = max((part.box.length[0] for part in self._parts if part.box.length), default=0)

    def near(self, patch: Patch) -> Sequence[Part]:
        """Those that a patch may touch."""
        if not patch.offset:
            return self._parts
        low = patch.offset[0]
        high = low + (patch.box.length[patch.axes.index(0)] if 0 in patch.axes else 1)
        first = bisect.bisect_right(self._firsts, (low - self._longest,))
        return self._parts[first : bisect.bisect_left(self._firsts, (high,))]


@dataclass(frozen=True, slots=True)
class Rule:
    """Arrays of these names hold this. `on`: the indices of mesh axes where they are, where not everywhere (-1: the last).

    With a `role` it is for arrays of that role, and goes before those for any: moments that are shaped otherwise than their
    parameter are cut otherwise.
    """

    stored: str
    holds: str
    on: Mapping[str, int] = field(default_factory=dict)
    role: str | None = None

    def matches(self, name: str) -> dict[str, int] | None:
        """The values of the placeholders in a stored name."""
        return match(self.stored, name)

    def there(self, at: Coordinate, axes: Mapping[str, int]) -> bool:
        return all(at[axis] == index % axes[axis] for axis, index in self.on.items())


def match(template: str, name: str) -> dict[str, int] | None:
    """The values of a template's placeholders in a name; None where it is another name."""
    found = re.fullmatch(_pattern(template), name)
    return None if found is None else {key: int(value) for key, value in found.groupdict().items()}


@functools.cache
def _pattern(template: str) -> str:
    """A regular expression of a template; of `{l + first}` the whole is captured, as `l`."""
    parts, seen, end = [], set(), 0
    for brace in language.BRACES.finditer(template):
        parts.append(re.escape(template[end : brace.start()]))
        name = re.findall(r"[A-Za-z_]\w*", brace[1])[0]
        parts.append(f"(?P={name})" if name in seen else rf"(?P<{name}>\d+)")
        seen.add(name)
        end = brace.end()
    return "".join([*parts, re.escape(template[end:])])


Local = Callable[[Coordinate], Mapping[str, int]]
"""Variables of a coordinate: what is counted from a pipeline stage's beginning. Reading, placeholders' values are in it too."""
Held = Callable[[Coordinate], Collection[int]]
"""Which values of a placeholder, in global numbers, are at a coordinate."""


def compile_reading(
    rules: Sequence[Rule], arrays: Iterable[StoredArray], *, variables: Mapping[str, int], local: Local = lambda _: {},
    shapes: Mapping[str, Shape] | None = None,
) -> tuple[Layout, list[StoredArray], dict[int, Coordinate]]:  # fmt: skip
    """The layout of all logical tensors in these arrays. `shapes`: those that are known, and do not show in what is stored.

    Returns it, the arrays that no rule knows, and the coordinate that each `rank` of the layout stands for.
    Raises LayoutError where shapes contradict each other.
    """
    ranks: dict[tuple[tuple[str, int], ...], int] = {}
    groups: dict[tuple[int, str, tuple[str, ...]], list[tuple[StoredArray, dict[str, int]]]] = defaultdict(list)
    unknown = []
    known = _Known(rules)
    for array in arrays:
        ranks.setdefault(frozen(array.at), len(ranks))
        found = known.rule_of(array)
        if found is None:
            unknown.append(array)
            continue
        number, matched = found
        values = {**variables, **local({**matched, **array.at}), **matched}
        groups[number, array.role, tuple(_identity(rules[number], values))].append((array, values))
    layout = Layout()
    for (number, _, _), held in groups.items():
        _read_group(rules[number], held, layout, ranks, Shapes(shapes))
    return layout, unknown, {rank: dict(place) for place, rank in ranks.items()}


class _Known:
    """Rules, found by what they are for: a name as it is goes before a pattern, and a role before any role."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._exact: dict[str, list[int]] = defaultdict(list)
        self._patterns: list[int] = []
        for number in sorted(range(len(rules)), key=lambda number: rules[number].role is None):
            stored = rules[number].stored
            (self._patterns if "{" in stored else self._exact[stored]).append(number)

    def rule_of(self, array: StoredArray) -> tuple[int, dict[str, int]] | None:
        """The number of the rule for an array, and the values of its placeholders."""
        for number in [*self._exact.get(array.name, ()), *self._patterns]:
            rule = self._rules[number]
            matched = rule.matches(array.name) if rule.role in (None, array.role) else None
            if matched is not None:
                return number, matched
        return None


def _identity(rule: Rule, values: Mapping[str, int]) -> list[str]:
    """Names of what a rule's arrays hold; those inside of a stack as they stand in its text."""
    found = []
    for template in language.names(rule.holds):
        known = {name for brace in language.BRACES.findall(template) for name in re.findall(r"[A-Za-z_]\w*", brace)}
        found.append(language.fill_in(template, values) if known <= set(values) else _partly(template, values))
    return found


def _partly(template: str, values: Mapping[str, int]) -> str:
    def fill(brace: re.Match[str]) -> str:
        known = set(re.findall(r"[A-Za-z_]\w*", brace[1])) <= set(values)
        return str(language.number(brace[1], values)) if known else brace[0]

    return language.BRACES.sub(fill, template)


def _read_group(
    rule: Rule, held: list[tuple[StoredArray, dict[str, int]]], layout: Layout,
    ranks: dict[tuple[tuple[str, int], ...], int], found: Shapes,
) -> None:  # fmt: skip
    """Arrays of one rule that hold the same tensors, at several coordinates."""
    expression = language.make(rule.holds, held[0][1])
    pieces: Pieces = {frozen(array.at): array.shape for array, _ in held}
    try:
        expression.resolve(pieces, found)
        for array, _ in held:
            for patch in expression.patches(found, array.at):
                tensor = LogicalTensor(patch.name, array.role, array.dtype, found.tensors[patch.name])
                layout.add(tensor, *array.fragments(patch, ranks[frozen(array.at)]))
    except KeyError as error:
        raise LayoutError(f"{held[0][0].name}: the shape of {error.args[0]} is not known") from error
    except IndexError as error:
        raise LayoutError(
            f"{held[0][0].name}: of shape {held[0][0].shape}, too few dimensions for {rule.holds}"
        ) from error
    except LayoutError as error:
        raise LayoutError(f"{held[0][0].name}: {error}") from error


def compile_writing(
    rules: Sequence[Rule], tensors: Mapping[Key, LogicalTensor], *, role: str, axes: Mapping[str, int],
    variables: Mapping[str, int], local: Local = lambda _: {}, layers: Held | None = None, experts: Held | None = None,
) -> tuple[list[tuple[StoredArray, list[tuple[Patch, LogicalTensor]]]], set[Key]]:  # fmt: skip
    """The arrays that hold the logical tensors of a role, over a mesh, each with what lies where in it.

    `layers`, `experts`: which values of the placeholders `l` and `e` are at a coordinate; by default all.
    Returns them without storages (the container gives those), and the keys that were placed.
    """
    shapes = {name: tensor.shape for (name, held), tensor in tensors.items() if held == role}
    known = Shapes(shapes, axes)
    made: list[tuple[StoredArray, list[tuple[Patch, LogicalTensor]]]] = []
    placed: set[Key] = set()
    for at in coordinates(axes):
        base = {**variables, **axes, **local(at)}
        here = {key: held(at) for key, held in (("l", layers), ("e", experts)) if held is not None}
        for rule in rules:
            if rule.role not in (None, role) or not rule.there(at, axes):
                continue
            for values in _instances(rule, shapes, base, here):
                expression = language.make(rule.holds, {**base, **values})
                try:
                    patches = list(expression.patches(known, at))
                    shape = expression.shape(known, at)
                except KeyError as error:
                    raise LayoutError(
                        f"{rule.stored}: wants {error.args[0]}, which the source does not have"
                    ) from error
                lies = [(patch, tensors[patch.name, role]) for patch in patches]
                name = language.fill_in(rule.stored, {**base, **values})
                dtype = _dtype(name, _identity(rule, {**base, **values}), tensors, role)
                made.append((StoredArray(name, role, dtype, shape, "", at=at), lies))
                placed.update(tensor.key for _, tensor in lies)
    return made, placed


def _dtype(name: str, held: list[str], tensors: Mapping[Key, LogicalTensor], role: str) -> str:
    """The one dtype of what an array is made of, also where a piece of it is empty or nothing but padding."""
    dtypes = {tensors[one, role].dtype for one in held if (one, role) in tensors}
    if not dtypes:
        matching = (
            t for t in tensors.values() if t.role == role and any(match(one, t.name) is not None for one in held)
        )
        dtypes = {tensor.dtype for tensor in matching}
    if len(dtypes) != 1:
        raise LayoutError(f"{name}: made of tensors of several dtypes: {', '.join(sorted(dtypes))}")
    return dtypes.pop()


def coordinates(axes: Mapping[str, int]) -> list[dict[str, int]]:
    """All coordinates of a mesh; the last axis varies fastest."""
    return [
        dict(zip(axes, indices, strict=True)) for indices in itertools.product(*(range(size) for size in axes.values()))
    ]


def _instances(
    rule: Rule, names: Iterable[str], base: Mapping[str, int], here: Mapping[str, Collection[int]]
) -> list[dict[str, int]]:
    """The values that the placeholders of a rule's stored name take, from the logical names that are there."""
    wanted = {name for brace in language.BRACES.findall(rule.stored) for name in re.findall(r"[A-Za-z_]\w*", brace)}
    template = language.names(rule.holds)[0]
    found: dict[tuple[tuple[str, int], ...], None] = {}
    for name in names:
        values = match(template, name)
        if values is None:
            continue
        if any(key in wanted and key in values and values[key] not in held for key, held in here.items()):
            continue
        shifted = {key: _before(template, key, value, base) for key, value in values.items() if key in wanted}
        found[tuple(sorted(shifted.items()))] = None
    return [dict(place) for place in found]


def _before(template: str, key: str, value: int, base: Mapping[str, int]) -> int:
    """The placeholder's own value: of `{l + first}` what was captured is the sum."""
    for brace in language.BRACES.findall(template):
        if re.match(rf"{key}\b", brace.strip()) and brace.strip() != key:
            return value - language.number(brace, {**base, key: 0})
    return value
