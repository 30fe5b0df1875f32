"""Reading traces: both formats give the same, and what is no trace is refused by name."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from tests.diagnostics.traces import Job
from trainrt.diagnostics.replay.trace import COLUMNS, OPTYPES, Trace, read_trace
from trainrt.errors import DiagnosticsError


def table(columns: dict[str, Any]) -> pa.Table:
    named = {**columns, "optype": [OPTYPES[code] for code in columns["optype"]]}
    return pa.table({name: named[name] for name in COLUMNS})


def written(path: Path, columns: dict[str, Any]) -> Path:
    made = table(columns)
    if path.suffix == ".csv":
        csv.write_csv(made, path)
    else:
        parquet.write_table(made, path)
    return path


def small() -> dict[str, Any]:
    return Job(dp=2, pp=2, microbatches=3, steps=3).columns()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_gives_the_columns_that_were_written(tmp_path: Path, suffix: str) -> None:
    columns = small()
    read = read_trace(written(tmp_path / f"trace-a.{suffix}", columns))
    assert len(read) == len(columns["step"])
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(read, name), columns[name])
    assert read.sizes == {"dp_size": 2, "pp_size": 2, "tp_size": 1, "vpp_size": 1, "world_size": 4}


def test_a_format_is_known_by_its_content_and_other_columns_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    parquet.write_table(table(small()).append_column("note", pa.array(["x"] * len(small()["step"]))), path)
    assert len(read_trace(path)) == len(small()["step"])


def test_numbers_that_pandas_made_floating_or_left_empty_are_whole_numbers(tmp_path: Path) -> None:
    columns = small()
    columns["mc"] = np.where(columns["mc"] < 0, np.nan, columns["mc"])
    columns["gmc"] = [None if gmc < 0 else int(gmc) for gmc in columns["gmc"]]
    for suffix in ("csv", "parquet"):
        read = read_trace(written(tmp_path / f"t.{suffix}", columns))
        np.testing.assert_array_equal(read.mc, small()["mc"])
        np.testing.assert_array_equal(read.gmc, small()["gmc"])


def test_sizes_come_from_the_metadata_beside_the_trace(tmp_path: Path) -> None:
    path = written(tmp_path / "trace-job.parquet", small())
    (tmp_path / "meta-job.yaml").write_text("trial_name: job\ndp_size: 2\npp_size: 2\ntp_size: 4\nworld_size: 16\n")
    assert read_trace(path).sizes["world_size"] == 16


def test_one_rank_of_each_tensor_parallel_group_tells_their_size() -> None:
    columns = small()
    columns["rank"] = columns["rank"] * 4
    assert Trace.of(columns).sizes["tp_size"] == 4


def replaced(name: str, value: Any, row: int = 4) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        columns[name] = list(columns[name])
        columns[name][row] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced("start_ts", float("nan")), ["start_ts", "row 5", "nan", "finite seconds"]),
        (replaced("duration", float("inf")), ["duration", "row 5", "inf"]),
        (replaced("duration", -0.5), ["duration", "row 5", "-0.5", "not negative"]),
        (replaced("start_ts", None), ["start_ts", "row 5", "finite seconds"]),
        (replaced("step", None), ["step", "row 5", "empty", "whole numbers"]),
        (replaced("stage", -1), ["stage", "row 5", "-1", "from 0 up"]),
        (replaced("dp_rank", 0.5), ["dp_rank", "whole numbers"]),
        (replaced("rank", 2**40), ["rank", "below 2^31"]),
        (replaced("mb_id", -2), ["mb_id", "row 5", "-2"]),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_wrong_value_is_named_with_its_column_and_row(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: list[str], suffix: str
) -> None:
    columns = small()
    change(columns)
    path = written(tmp_path / f"bad.{suffix}", columns)
    with pytest.raises(DiagnosticsError) as refused:
        read_trace(path)
    for word in [str(path), *words]:
        assert word in str(refused.value)


def test_an_unknown_operation_is_named_with_the_nearest(tmp_path: Path) -> None:
    made = table(small()).to_pydict()
    made["optype"][0] = "forward-compte"
    parquet.write_table(pa.table(made), tmp_path / "t.parquet")
    with pytest.raises(DiagnosticsError, match=r'row 1: \'forward-compte\' \(did you mean "forward-compute"\?\)'):
        read_trace(tmp_path / "t.parquet")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path, suffix: str) -> None:
    made = table(small()).rename_columns(["start_time" if name == "start_ts" else name for name in COLUMNS])
    path = tmp_path / f"t.{suffix}"
    csv.write_csv(made, path) if suffix == "csv" else parquet.write_table(made, path)
    with pytest.raises(DiagnosticsError, match=r'column start_ts is missing \(did you mean "start_time"\?\)'):
        read_trace(path)


def test_text_where_numbers_belong_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", small())
    lines = path.read_text().splitlines()
    cells = lines[3].split(",")
    cells[COLUMNS.index("duration")] = "fast"
    path.write_text("\n".join([*lines[:3], ",".join(cells), *lines[4:]]))
    with pytest.raises(DiagnosticsError, match="column duration is of type string"):
        read_trace(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.csv", b""),
        ("empty.parquet", b""),
        ("noise.csv", bytes(range(256)) * 20),
        ("noise.parquet", b"PAR1" + bytes(range(256)) * 20),
        ("header.csv", ",".join(COLUMNS).encode() + b"\n"),
        ("zeros.csv", bytes(1000)),
        ("torn.csv", ",".join(COLUMNS).encode() + b"\n1,2,3\n"),
    ],
)
def test_what_is_no_trace_is_refused_by_its_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DiagnosticsError, match=name):
        read_trace(tmp_path / name)


def test_a_torn_parquet_file_a_directory_and_nothing_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "t.parquet", small())
    path.write_bytes(path.read_bytes()[:-200])
    for wrong in (path, tmp_path, tmp_path / "none.parquet"):
        with pytest.raises(DiagnosticsError, match=wrong.name):
            read_trace(wrong)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    (tmp_path / "t.parquet").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DiagnosticsError):
        read_trace(tmp_path / "t.parquet")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [("dp_size: two", "dp_size is two"), ("pp_size: 0", "pp_size is 0"), ("dp_size: 5", "dp_size is said to be 5")],
)
def test_metadata_that_is_wrong_or_of_another_trace_is_refused(tmp_path: Path, line: str, words: str) -> None:
    path = written(tmp_path / "trace-a.parquet", small())
    (tmp_path / "meta-a.yaml").write_text(line + "\n")
    with pytest.raises(DiagnosticsError, match=words):
        read_trace(path)
