"""The log of collective calls: what real ranks write into it, read by somebody else, whatever became of the writer."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed._functional_collectives import all_reduce as functional_all_reduce
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from tests.ranks import run_ranks
from trainrt.parallel.calls import ROWS, SLOTS, Calls, Log, make_memory, members, read, spans
from trainrt.parallel.recording import record_calls


@given(st.lists(st.integers(0, 200), unique=True))
def test_ranks_as_text_are_the_ranks_again(ranks: list[int]) -> None:
    assert members(spans(ranks)) == tuple(ranks)


def test_ranges_are_short_text() -> None:
    assert spans(range(4096)) == "0-4095:1" and spans((0, 2, 4, 9)) == "0-4:2,9" and spans(()) == ""


def test_a_ring_keeps_the_last_calls_and_counts_all() -> None:
    fd = make_memory()
    assert read(fd) is None, "nobody began a log"
    log = Log(fd)
    log.begin(5)
    row = log.add_group("0", "world|x", (0, 1, 2))
    assert row is not None
    for number in range(1, SLOTS + 8):
        log.enter(row, number, f"all_reduce||4|float32|/x.py:{number} f".encode(), collective=True)
    found = read(fd)
    assert found is not None and found.incarnation == 5
    assert found.groups["0"].entered == SLOTS + 7 and found.groups["0"].name == "world/x"
    assert [call.number for call in found.calls] == list(range(8, SLOTS + 8))
    assert Calls.from_json(found.to_json()) == found
    log.begin(6)
    again = read(fd)
    assert again is not None and (again.incarnation, again.groups, list(again.calls)) == (6, {}, [])
    os.close(fd)


def test_more_groups_than_there_is_room_for_are_not_recorded_and_long_text_is_cut() -> None:
    fd = make_memory()
    log = Log(fd)
    rows = [log.add_group(str(number), "g", (0, 1)) for number in range(ROWS + 1)]
    assert rows[-1] is None and rows[-2] == ROWS - 1
    log.enter(0, 1, b"all_gather||" + b"4," * 400, collective=True)
    found = read(fd)
    assert found is not None and found.calls[0].kind == "all_gather" and found.calls[0].site == ""
    os.close(fd)


def everything(rank: int) -> tuple[list[tuple[Any, ...]], dict[str, tuple[int, ...]]]:
    fd = make_memory()
    record_calls(Log(fd))
    pair = dist.new_group([0, 1], group_desc="pair")
    x = torch.ones(4, 3)
    dist.all_reduce(x)
    work = dist.all_reduce(x, async_op=True)
    before = read(fd)
    assert before is not None and before.calls[-1].state == "issued"
    work.wait()
    dist.all_gather([torch.empty(5) for _ in range(2)], torch.ones(5), group=pair)
    dist.all_gather_single(torch.empty(8), torch.ones(4))
    dist.reduce_scatter_single(torch.empty(4, dtype=torch.float64), torch.ones(8, dtype=torch.float64))
    dist.all_to_all_single(
        torch.empty(3), torch.ones(3), [1, 2] if rank == 0 else [2, 1], [1, 2] if rank == 0 else [2, 1]
    )
    dist.broadcast(x, 0)
    dist.reduce(x, 1)
    dist.gather(torch.ones(2), [torch.empty(2) for _ in range(2)] if rank == 0 else None)
    dist.scatter(torch.ones(2), [torch.empty(2) for _ in range(2)] if rank == 0 else None)
    dist.barrier()
    dist.broadcast_object_list(["text"], 0)
    dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
    DTensor.from_local(x, init_device_mesh("cpu", (2,), mesh_dim_names=("rows",)), [Shard(0)]).full_tensor()
    functional_all_reduce(x, "sum", pair).sum()
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(2, dtype=torch.int64), op=dist.ReduceOp.AVG)
    found = read(fd)
    assert found is not None
    for call in found.calls:
        assert call.site.partition(":")[0].endswith("/tests/parallel/test_calls.py") and call.site.endswith(
            " everything"
        ), call
    names = {one.key: one.name for one in found.groups.values()}
    calls = [(names[c.group], c.number, c.kind, c.detail, c.dtypes, c.shapes, c.state) for c in found.calls]
    return calls, {one.name: one.members for one in found.groups.values()}


def test_all_collectives_of_a_rank_are_recorded_whoever_makes_them() -> None:
    results = run_ranks(2, everything)
    (calls, groups), (others, _) = results
    assert groups["default_pg"] == (0, 1) and groups["pair"] == (0, 1)
    assert calls == [
        ("default_pg", 1, "all_reduce", "", "float32", "4x3", "left"),
        ("default_pg", 2, "all_reduce", "", "float32", "4x3", "left"),
        ("pair", 1, "all_gather", "", "float32", "5", "left"),
        ("default_pg", 3, "all_gather", "", "float32", "4", "left"),
        ("default_pg", 4, "reduce_scatter", "", "float64", "8", "left"),
        ("default_pg", 5, "all_to_all", "from 1 2 to 1 2", "float32", "3", "left"),
        ("default_pg", 6, "broadcast", "root 0", "float32", "4x3", "left"),
        ("default_pg", 7, "reduce", "root 1", "float32", "4x3", "left"),
        ("default_pg", 8, "gather", "root 0", "float32", "2", "left"),
        ("default_pg", 9, "scatter", "root 0", "float32", "2", "left"),
        ("default_pg", 10, "barrier", "", "", "", "left"),
        ("default_pg", 11, "broadcast", "root 0", "int64", "1", "left"),
        ("default_pg", 12, "broadcast", "root 0", "uint8", calls[12][5], "left"),
        ("default_pg", 1, "send", "to 1", "float32", "4x3", "left"),
        # A mesh of all ranks has the default group.
        ("default_pg", 13, "all_gather", "", "float32", "4x3", "left"),
        ("pair", 2, "all_reduce", "", "float32", "4x3", "left"),
        ("default_pg", 14, "all_reduce", "", "int64", "2", "failed"),
    ]
    different = [(mine, other) for mine, other in zip(calls, others, strict=True) if mine != other]
    assert [(mine[2], other[2]) for mine, other in different] == [("all_to_all", "all_to_all"), ("send", "recv")]


def test_the_log_of_a_killed_process_can_be_read() -> None:
    fd = make_memory()
    pid = os.fork()
    if pid == 0:
        log = Log(fd)
        row = log.add_group("0", "world", (0, 1))
        assert row is not None
        log.enter(row, 1, b"all_reduce||4|float32|/x.py:3 loss", collective=True)
        time.sleep(60)
        os._exit(0)
    deadline = time.monotonic() + 20
    while ((found := read(fd)) is None or not found.calls) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found = read(fd)
    assert (
        found is not None and str(found.calls[0]) == "all_reduce(float32 4)" and found.calls[0].place == "loss (x.py:3)"
    )
    assert found.calls[0].state == "entered"
    os.close(fd)
