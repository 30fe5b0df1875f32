"""The mapping language: what an expression says is written and read back the same, whatever it is made of."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
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
    experts = variables.pop("experts", None)
    tensors, values = logical(shapes)
    made, placed = compile_writing(
        rules, tensors, role="parameter", axes=axes, variables=variables, local=local, layers=layers, experts=experts
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


@pytest.mark.parametrize(("split", "rows"), [("chunk", [3, 3, 3, 1]), ("even", [3, 3, 2, 2])])
def test_what_does_not_divide_is_cut_as_the_framework_cuts_it_and_comes_back(split: str, rows: list[int]) -> None:
    rules = [
        Rule("w", f'shard("w", axis="tp", split="{split}")'),
        Rule("turned", f'transpose(shard("v", axis="tp", dim=1, split="{split}"))'),
        Rule("both", f'concat(shard("g", axis="tp", split="{split}"), shard("u", axis="tp", split="{split}"))'),
    ]
    shapes = {"w": (10, 3), "v": (2, 10), "g": (10, 2), "u": (10, 2)}
    arrays, values = written(rules, shapes, {"tp": 4})
    assert [array.shape[0] for array, _ in arrays if array.name == "w"] == rows
    if split == "chunk":
        theirs = torch.from_numpy(values["w"]).chunk(4)
        assert all(np.array_equal(d, t) for (a, d), t in zip(arrays[::3], theirs, strict=True) if a.name == "w")
    found, _ = read_back(rules, arrays)
    same(found, values)


EXPERTS = {
    "stacked, spread": [Rule("l.{l}.w", 'shard(stack("m.{l}.x.{e}.w", over="e"), axis="ep", split="SPLIT")')],
    "separate, numbered anew": [Rule("l.{l}.{e}.w", '"m.{l}.x.{e + first_expert}.w"')],
    "separate, global numbers": [Rule("l.{l}.{e}.w", '"m.{l}.x.{e}.w"')],
    "separate, cut by tp": [Rule("l.{l}.{e}.w", 'shard("m.{l}.x.{e + first_expert}.w", axis="tp", dim=1)')],
}


@pytest.mark.parametrize(("split", "counts"), [("chunk", [3, 3, 1]), ("even", [3, 2, 2])])
@pytest.mark.parametrize("form", EXPERTS)
def test_experts_that_do_not_divide_over_ranks(form: str, split: str, counts: list[int]) -> None:
    rules = [Rule(rule.stored, rule.holds.replace("SPLIT", split)) for rule in EXPERTS[form]]
    shapes = {f"m.{layer}.x.{e}.w": (2, 5) for layer in range(2) for e in range(7)}
    first = [0, *itertools.accumulate(counts)]
    local = lambda at: {"first_expert": first[at["ep"]]}  # noqa: E731
    arrays, values = written(
        rules, shapes, {"ep": 3, "tp": 2}, local=local,
        experts=lambda at: range(first[at["ep"]], first[at["ep"] + 1]),
    )  # fmt: skip
    held = [sum(d.size for a, d in arrays if (a.at["ep"], a.at["tp"]) == (ep, 0)) for ep in range(3)]
    assert held == [n * 2 * (2 * 3 if "tp" in form else 10) for n in counts]
    found, unknown = read_back(rules, arrays, local=local)
    assert unknown == []
    same(found, values)


def test_virtual_stages_with_global_names_hold_what_is_not_next_to_each_other() -> None:
    """Interleaved and uneven: rank 0 has layers 0, 1, 4, 5, rank 1 has 2, 3, 6."""
    rules = [Rule("e", '"e"', on={"pp": 0}), Rule("layers.{l}.w", 'shard("m.{l}.w", axis="tp", split="even")')]
    shapes = {"e": (2,)} | {f"m.{layer}.w": (5, 2) for layer in range(7)}
    stages = [{0, 1, 4, 5}, {2, 3, 6}]
    arrays, values = written(rules, shapes, {"pp": 2, "tp": 2}, layers=lambda at: stages[at["pp"]])
    names = {array.name for array, _ in arrays if array.at == {"pp": 0, "tp": 1}}
    assert names == {"e", *(f"layers.{layer}.w" for layer in stages[0])}
    found, _ = read_back(rules, arrays)
    same(found, values)


def test_a_rule_for_a_role_goes_before_those_for_any() -> None:
    """Factored moments are shaped, and cut, otherwise than their parameter; a frozen one has none."""
    rules = [
        Rule("{l}.w", 'shard("m.{l}.w", axis="tp")'),
        Rule("{l}.w", '"m.{l}.w"', role="col_var"),
        Rule("0.b", '"b"'),
    ]
    shapes = {("0.w", "parameter"): (3, 4), ("0.w", "row_var"): (3, 1), ("0.w", "col_var"): (1, 4)}
    arrays = [
        StoredArray(name, role, "float32", shape, f"{role}{rank}", at={"tp": rank})
        for (name, role), shape in shapes.items() for rank in range(2)
    ]  # fmt: skip
    arrays.append(StoredArray("0.b", "parameter", "float32", (2,), "b", at={"tp": 0}))
    layout, unknown, _ = compile_reading(rules, arrays, variables={})
    assert unknown == []
    assert {key: tensor.shape for key, tensor in layout.tensors.items()} == {
        ("m.0.w", "parameter"): (6, 4), ("m.0.w", "row_var"): (6, 1), ("m.0.w", "col_var"): (1, 4), ("b", "parameter"): (2,),
    }  # fmt: skip
    assert len(layout.fragments["m.0.w", "col_var"]) == 2
    flat = StoredArray("0.w", "parameter", "float32", (4,), "w", at={"tp": 0})
    with pytest.raises(LayoutError, match=r"0\.w: of shape \(4,\), too few dimensions for shard"):
        compile_reading([Rule("{l}.w", 'shard("m.{l}.w", dim=1, axis="tp")')], [flat], variables={})


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
        ('pad("w", length=heads // 0)', "divides by zero"),
        ('interleave("w", "v", groups=0)', "interleave: groups = 0: at least 1"),
        ('concat("w", "v", sizes=(1, -1))', "numbers of at least 0"),
    ],
)
def test_wrong_text_is_refused_with_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        language.make(text, {"heads": 2})
    assert message in str(error.value)
