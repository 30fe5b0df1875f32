"""Traces of a training job's operations, read from CSV or Parquet: the form that the straggler study published its samples in
(OSDI'25, "Understanding Stragglers in Large Model Training Using What-if Analysis", section 2).

A row is one operation of one worker in one step. This file reads and checks rows; what depends on what is in `dependencies.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainrt.errors import DiagnosticsError, nearest

Whole = NDArray[np.int32]
Seconds = NDArray[np.float64]

FORWARD, BACKWARD, GC, OPTIMIZER = "forward-compute", "backward-compute", "gc", "optimizer"
FORWARD_SEND, FORWARD_RECV, BACKWARD_SEND, BACKWARD_RECV = (
    "forward-send", "forward-recv", "backward-send", "backward-recv",
)  # fmt: skip
GATHER, SCATTER, SEPARATE = "params-all-gather", "grads-reduce-scatter", "separate-grads-all-reduce"
LAYERNORM, EMBEDDING, CLIP = "layernorm-grads-all-reduce", "embedding-grads-all-reduce", "optimizer-clip-main-grad"
COMPUTE = (FORWARD, BACKWARD, GC, OPTIMIZER)
PIPELINE = (FORWARD_SEND, FORWARD_RECV, BACKWARD_SEND, BACKWARD_RECV)
OPTYPES = (*COMPUTE, *PIPELINE, GATHER, SCATTER, SEPARATE, LAYERNORM, EMBEDDING, CLIP)
"""Operations by type. The code of a type is its place here; all but COMPUTE are communication."""

NEEDED = ("dp_rank", "stage", "rank", "step", "seq_id")
OPTIONAL = ("mc", "mb_id", "gmc")
"""Whole numbers; those of OPTIONAL are -1 or empty where an operation has none."""
TIMES = ("start_ts", "duration")
COLUMNS = (*NEEDED, *OPTIONAL, *TIMES, "optype")
SIZES = ("dp_size", "pp_size", "tp_size", "vpp_size", "world_size")


@dataclass(frozen=True, slots=True)
class Trace:
    """Operations by column, one entry each, in no particular order.

    dp_rank, stage, rank: the worker (one tensor-parallel rank of each group is recorded). step: the training step.
    optype: code into OPTYPES. start_ts, duration: seconds. seq_id: number among the operations of its type on its worker in
    its step. mc, gmc: model chunk within the stage, within the model; mb_id: microbatch; -1 where there is none.
    sizes: dp, pp, tp, vpp and world size. source: the file, for messages.
    """

    dp_rank: Whole
    stage: Whole
    rank: Whole
    step: Whole
    optype: Whole
    start_ts: Seconds
    duration: Seconds
    seq_id: Whole
    mc: Whole
    mb_id: Whole
    gmc: Whole
    sizes: Mapping[str, int]
    source: str = "trace"

    def __len__(self) -> int:
        return len(self.step)

    @classmethod
    def of(cls, columns: Mapping[str, Any], *, sizes: Mapping[str, int] | None = None, source: str = "trace") -> Trace:
        """From arrays by the names of COLUMNS, optype as codes.

        Sizes that are not given are derived: dp and pp from the highest number, tp from how far apart the ranks are.
        """
        whole: dict[str, Any] = {
            name: np.asarray(columns[name], dtype=np.int32) for name in (*NEEDED, *OPTIONAL, "optype")
        }
        times: dict[str, Any] = {name: np.asarray(columns[name], dtype=np.float64) for name in TIMES}
        if not len(whole["step"]):
            raise DiagnosticsError(f"{source}: no rows; allowed: at least one operation of each worker and step")
        found = _derived(whole)
        given = dict(sizes or {})
        for name in ("dp_size", "pp_size"):
            if given.get(name, found[name]) != found[name]:
                raise DiagnosticsError(
                    f"{source}: {name} is said to be {given[name]}, but the trace has {found[name]}; "
                    "allowed: the metadata of this trace, or none"
                )
        if "tp_size" in given:
            found["world_size"] = found["dp_size"] * found["pp_size"] * given["tp_size"]
        return cls(**whole, **times, sizes=found | given, source=source)


def _derived(whole: Mapping[str, Whole]) -> dict[str, int]:
    dp, pp = int(whole["dp_rank"].max()) + 1, int(whole["stage"].max()) + 1
    tp = -(-(int(whole["rank"].max()) + 1) // (dp * pp))
    vpp = max(int(whole["mc"].max()) + 1, 1)
    return {"dp_size": dp, "pp_size": pp, "tp_size": tp, "vpp_size": vpp, "world_size": dp * pp * tp}


def read_trace(path: str | Path) -> Trace:
    """Read a trace: Parquet if the file begins as one, else CSV; sizes from `meta-NAME.yaml` beside `trace-NAME.*`, if there.

    Raises DiagnosticsError naming the file, the column and what is allowed.
    """
    path = Path(path)
    columns = _columns(path)
    rows = len(next(iter(columns.values())))
    if not rows:
        raise DiagnosticsError(f"{path}: no rows; allowed: at least one operation of each worker and step")
    made: dict[str, Any] = {"optype": _optypes(path, columns["optype"])}
    made |= {name: _whole(path, name, columns[name], optional=name in OPTIONAL) for name in (*NEEDED, *OPTIONAL)}
    made |= {name: _times(path, name, columns[name]) for name in TIMES}
    return Trace.of(made, sizes=_metadata(path), source=str(path))


def _columns(path: Path) -> dict[str, Any]:
    """The Arrow columns by name. Others that the file may have are not read."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    try:
        with path.open("rb") as file:
            begin = file.read(4)
        if not begin:
            raise DiagnosticsError(f"{path}: the file is empty; allowed: CSV or Parquet with {', '.join(COLUMNS)}")
        if begin == b"PAR1":
            _present(path, parquet.read_schema(path).names)
            table = parquet.read_table(path, columns=list(COLUMNS))
        else:
            with csv.open_csv(path) as stream:
                _present(path, stream.schema.names)
            table = csv.read_csv(path, convert_options=csv.ConvertOptions(include_columns=list(COLUMNS)))
        return {name: table.column(name).combine_chunks() for name in COLUMNS}
    except (pa.ArrowException, UnicodeError, OSError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DiagnosticsError(f"{path}: not to be read ({said}); allowed: a trace as CSV or Parquet") from error


def _present(path: Path, names: list[str]) -> None:
    for name in COLUMNS:
        if (count := names.count(name)) != 1:
            what = f"stands there {count} times" if count else f"is missing{nearest(name, set(names) - set(COLUMNS))}"
            raise DiagnosticsError(f"{path}: column {name} {what}; allowed: each once of {', '.join(COLUMNS)}")


def _whole(path: Path, name: str, column: Any, *, optional: bool) -> Whole:
    import pyarrow as pa
    from pyarrow import compute

    allowed = "whole numbers" + (", -1 or empty where there is none" if optional else " from 0 up, below 2^31")
    try:
        if pa.types.is_floating(column.type):
            column = compute.if_else(compute.is_nan(column), None, column)
        if column.null_count and not optional:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise DiagnosticsError(f"{path}: column {name}, row {row + 1}: empty; allowed: {allowed}")
        if pa.types.is_null(column.type):
            return np.full(len(column), -1, dtype=np.int32)
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            raise DiagnosticsError(f"{path}: column {name} is of type {column.type}; allowed: {allowed}")
        found = compute.fill_null(compute.cast(column, pa.int32()), -1).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise DiagnosticsError(f"{path}: column {name}: {str(error).splitlines()[0]}; allowed: {allowed}") from error
    low = np.flatnonzero(found < (-1 if optional else 0))
    if len(low):
        raise DiagnosticsError(f"{path}: column {name}, row {low[0] + 1}: {found[low[0]]}; allowed: {allowed}")
    return found


def _times(path: Path, name: str, column: Any) -> Seconds:
    import pyarrow as pa
    from pyarrow import compute

    allowed = "finite seconds" + (", not negative" if name == "duration" else "")
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        raise DiagnosticsError(f"{path}: column {name} is of type {column.type}; allowed: {allowed}")
    found = compute.fill_null(compute.cast(column, pa.float64()), float("nan")).to_numpy(zero_copy_only=False)
    bad = ~np.isfinite(found) | ((found < 0) if name == "duration" else False)
    if bad.any():
        row = int(np.argmax(bad))
        raise DiagnosticsError(f"{path}: column {name}, row {row + 1}: {found[row]}; allowed: {allowed}")
    return found


def _optypes(path: Path, column: Any) -> Whole:
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    values = column.dictionary.to_pylist()
    codes = np.full(len(values) + 1, -1, dtype=np.int32)
    for place, name in enumerate(values):
        if name in OPTYPES:
            codes[place] = OPTYPES.index(name)
    found = codes[column.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)]
    if (found < 0).any():
        row = int(np.argmax(found < 0))
        said = column[row].as_py()
        raise DiagnosticsError(
            f"{path}: column optype, row {row + 1}: {said!r}{nearest(str(said), OPTYPES)}; allowed: {', '.join(OPTYPES)}"
        )
    return found


def _metadata(path: Path) -> dict[str, int]:
    """The sizes of `meta-NAME.yaml`: lines of `key: value`. Keys of no concern are passed over."""
    meta = path.with_name(f"meta-{path.stem.removeprefix('trace-')}.yaml")
    if not meta.is_file():
        return {}
    sizes = {}
    try:
        lines = meta.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise DiagnosticsError(f"{meta}: not to be read ({error}); allowed: lines of 'key: value'") from error
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key not in SIZES:
            continue
        if not value.isdecimal() or int(value) < 1:
            raise DiagnosticsError(f"{meta}: {key} is {value or 'empty'}; allowed: a whole number from 1 up")
        sizes[key] = int(value)
    return sizes
