"""The mapping language: what an expression says is written and read back the same, whatever it is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainrt.checkpoint.mapping import language
from trainrt.checkpoint.mapping.expression import split_lengths
from trainrt.checkpoint.mapping.rules import Rule, StoredArray, compile_reading, compile_writing
from trainrt.checkpoint.source import MemorySource, read_whole
from trainrt.errors import ConfigError, LayoutError
from trainrt.parallel.layout import Key, LogicalTensor


def logical(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[Key, LogicalTensor], dict[str, np.ndarray]]:
    """Tensors in which every element has a value of its own."""
    tensors = {(name, "parameter"): LogicalTensor(name, "parameter", "int32", shape) for name, shape in shapes.items()}
    values, at = {}, 1
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        values[name] = np.arange(at, at + size, dtype=np.int32).reshape(shape)
        at += size
    return tensors, values


def written(
    rules: list[Rule], shapes: dict[str, tuple[int, ...]], axes: dict[str, int], **variables: Any
) -> tuple[list[tuple[StoredArray, np.ndarray]], dict[str, np.ndarray]]:
    """The arrays of a mesh, filled from the logical tensors."""
    local, layers = variables.pop("local", lambda _: {}), variables.pop("layers", None)
    tensors, values = logical(shapes)
    made, placed = compile_writing(
        rules, tensors, role="parameter", axes=axes, variables=variables, local=local, layers=layers
    )
    assert placed == set(tensors)
    arrays = []
    for number, (array, lies) in enumerate(made):
        data = np.zeros(array.shape, np.int32)
        for patch, tensor in lies:
            source = values[tensor.name][
                tuple(slice(o, o + n) for o, n in zip(patch.box.offset, patch.box.length, strict=True))
            ]
            flat = data.reshape(-1).view(np.uint8)
            array.fragment(patch, 0).view(flat, 4)[...] = source.view(np.uint32)
        arrays.append((StoredArray(array.name, "parameter", "int32", array.shape, f"s{number}", at=array.at), data))
    return arrays, values


def read_back(
    rules: list[Rule], arrays: list[tuple[StoredArray, np.ndarray]], **variables: Any
) -> tuple[dict[str, np.ndarray], list[StoredArray]]:
    local, shapes = variables.pop("local", lambda _: {}), variables.pop("shapes", None)
    layout, unknown, _ = compile_reading(
        rules, [array for array, _ in arrays], variables=variables, local=local, shapes=shapes
    )
    storages = {(rank, array.storage): data.reshape(-1).view(np.uint8) for array, data in arrays for rank in range(64)}
    source = MemorySource(layout, storages)
    found = {t.name: read_whole(source, t).view(np.int32).reshape(t.shape) for t in layout.tensors.values()}
    return found, unknown


def same(found: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert np.array_equal(found[name], value), name


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["chunk", "even"]), st.integers(0, 5),
    st.integers(1, 3),
)  # fmt: skip
def test_a_layer_of_everything_goes_there_and_back(
    tp: int, groups: int, heads: int, split: str, extra: int, experts: int
) -> None:
    width, cut = 4, f'axis="tp", split="{split}"'
    rules = [
        Rule("embed", f'shard(pad("e", length={7 + extra}, multiple={3 * tp}), axis="tp")'),
        Rule("l.{l}.qkv", 'shard(interleave("m.{l}.q", "m.{l}.k", "m.{l}.v", groups=groups, sizes=(heads, 1, 1)), axis="tp")'),
        Rule("l.{l}.fc1", f'concat(shard("m.{{l}}.gate", {cut}), shard("m.{{l}}.up", {cut}))'),
        Rule("l.{l}.fc2", f'transpose(shard("m.{{l}}.down", dim=1, axis="tp", split="{split}"))'),
        Rule("l.{l}.experts", f'shard(stack(transpose("m.{{l}}.x.{{e}}"), over="e"), axis="tp", split="{split}")'),
        Rule("l.{l}.inner", f'stack(shard("m.{{l}}.y.{{e}}", {cut}), over="e", dim=1)'),
        Rule("l.{l}.norm", '"m.{l}.norm"'),
    ]  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"e": (7 + extra, width)}
    for layer in range(2):
        rows = groups * tp
        shapes |= {
            f"m.{layer}.q": (rows * heads * 2, width), f"m.{layer}.k": (rows * 2, width), f"m.{layer}.v": (rows * 2, width),
            f"m.{layer}.gate": (tp * 2 + extra, width), f"m.{layer}.up": (tp * 2 + extra, width),
            f"m.{layer}.down": (width, tp * 2 + extra), f"m.{layer}.norm": (width,),
        }  # fmt: skip
        shapes |= {f"m.{layer}.x.{e}": (3, 2) for e in range(tp * experts)}
        shapes |= {f"m.{layer}.y.{e}": (tp * 2 + extra, 3) for e in range(experts)}
    arrays, values = written(rules, shapes, {"tp": tp}, groups=groups * tp, heads=heads)
    found, unknown = read_back(rules, arrays, groups=groups * tp, heads=heads)
    assert unknown == []
    same(found, values)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4))
def test_flat_ranges_cross_tensors_and_come_back(dp: int, multiple: int, sizes: list[list[int]]) -> None:
    shapes = {f"t{number}": tuple(size) for number, size in enumerate(sizes)}
    joined = ", ".join(f'"{name}"' for name in shapes)
    each = ", ".join(f'partition("{name}", axis="dp")' for name in shapes)
    for rule in (
        Rule("flat", f'partition({joined}, axis="dp", multiple={multiple})'),
        Rule("flat", f"concat({each}, sizes=({', '.join(str(-(-int(np.prod(s)) // dp)) for s in shapes.values())},))"),
    ):
        arrays, values = written([rule], shapes, {"dp": dp})
        found, _ = read_back([rule], arrays, shapes=shapes)
        same(found, values)


def test_layers_are_counted_over_pipeline_stages_and_what_is_at_the_ends_is_there_only() -> None:
    rules = [
        Rule("embed", '"e"', on={"pp": 0}),
        Rule("layers.{l}.w", 'shard("m.{l + first}.w", axis="tp")'),
        Rule("head", '"h"', on={"pp": -1}),
    ]
    stages = [range(3), range(3, 5)]
    shapes = {"e": (2,), "h": (3,)} | {f"m.{layer}.w": (6, 2) for layer in range(5)}
    local = lambda at: {"first": stages[at["pp"]].start}  # noqa: E731
    arrays, values = written(
        rules, shapes, {"pp": 2, "tp": 2}, local=local, layers=lambda at: stages[at["pp"]], 
    )  # fmt: skip
    names = [(array.name, array.at["pp"], array.at["tp"]) for array, _ in arrays]
    assert names.count(("layers.0.w", 1, 0)) == 1 and ("layers.2.w", 1, 0) not in names
    assert [place for place in names if place[0] in ("embed", "head")] == [
        ("embed", 0, 0), ("embed", 0, 1), ("head", 1, 0), ("head", 1, 1),
    ]  # fmt: skip
    found, _ = read_back(rules, arrays, local=local)
    same(found, values)


def test_fewer_kv_heads_than_ranks_are_repeated() -> None:
    rules = [Rule("k", 'shard("k", axis="tp", repeat=2)')]
    arrays, values = written(rules, {"k": (4, 2)}, {"tp": 4})
    assert [data[0, 0] for _, data in arrays] == [1, 1, 5, 5]
    found, _ = read_back(rules, arrays)
    same(found, values)


def test_pieces_are_as_torch_and_as_an_even_remainder_cut_them() -> None:
    assert split_lengths(10, 4, "chunk") == [3, 3, 3, 1]
    assert split_lengths(10, 4, "even") == [3, 3, 2, 2]
    assert split_lengths(5, 4, "chunk") == [2, 2, 1, 0]


def test_what_no_rule_knows_is_said_and_contradictions_are_named() -> None:
    rules = [Rule("w", '"w"')]
    arrays = [
        StoredArray("w", "parameter", "int32", (2, 2), "a", at={"tp": 0}),
        StoredArray("x", "parameter", "int32", (1,), "a"),
    ]
    _, unknown, _ = compile_reading(rules, arrays[:1] + arrays[1:], variables={})
    assert [array.name for array in unknown] == ["x"]
    gap = [StoredArray("w", "parameter", "int32", (2, 2), "a", at={"tp": rank}) for rank in (0, 2)]
    with pytest.raises(LayoutError, match="nothing is stored at tp 1"):
        compile_reading([Rule("w", 'shard("w", axis="tp")')], gap, variables={})
    other = StoredArray("w", "parameter", "int32", (3, 2), "b", at={"tp": 1})
    with pytest.raises(LayoutError, match=r"w: w: of shape \(2, 2\) in one place, and \(3, 2\) in another"):
        compile_reading(rules, [arrays[0], other], variables={})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('shrad("w", axis="tp")', "no form 'shrad' (did you mean \"shard\"?)"),
        ('shard("w")', "shard wants an axis"),
        ('shard("w", axs="tp")', 'shard takes no axs (did you mean "axis"?)'),
        ('shard("w", axis="tp", dim=heds)', 'heds is not known (did you mean "heads"?)'),
        ('shard("w", axis="tp", split="odd")', "split = 'odd'; allowed: chunk, even"),
        ("__import__('os').system('true')", "is neither a name in quotes nor one of"),
        ('concat("w", "v"', "was never closed"),
        ('"w.{open(1)}"', "is no number"),
        ('pad("w", length=2 ** 9)', "is no number"),
    ],
)
def test_wrong_text_is_refused_with_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        language.make(text, {"heads": 2})
    assert message in str(error.value)
