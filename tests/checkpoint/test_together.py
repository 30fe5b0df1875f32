"""Loading by all ranks together: equal on any sharding, each byte read once, bounded memory, damage heard by all."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import cases
from tests.ranks import run_ranks
from trainrt.checkpoint.dealing import Run, cut_runs, deal, schedule
from trainrt.checkpoint.manifest import Chunk
from trainrt.checkpoint.reader import Piece, Universal
from trainrt.checkpoint.source import MemorySource, digest, fill
from trainrt.checkpoint.universal import WritePlan, write
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Box, Fragment, Key, Layout, LogicalTensor, contiguous_strides

MATRICES = [
    LogicalTensor("a.weight", "parameter", "float32", (4096, 4096)),
    LogicalTensor("b.weight", "parameter", "bfloat16", (2048, 4099)),
    LogicalTensor("a.weight", "exp_avg", "float32", (4096, 4096)),
]
VECTORS = [LogicalTensor(f"{n}.norm", "parameter", "float32", (4096,)) for n in range(6)]
REST = [LogicalTensor("none", "parameter", "float32", (0, 4)), LogicalTensor("count", "buffer", "int64", ())]
ROUND_BYTES = 4 << 20
RUN_BYTES = 16 << 20
SLACK_BYTES = 32 << 20
"""What the process group takes, and what malloc keeps of what was given back."""


def sharded(ranks: int, dim: int, *, only: int | None = None) -> tuple[Layout, dict[tuple[int, str], int]]:
    """Matrices cut over `dim`, everything else on every rank; and the bytes of each storage."""
    layout, sizes = Layout(), {}
    for rank in range(ranks) if only is None else [only]:
        for tensor in [*MATRICES, *VECTORS, *REST]:
            box = Box.whole(tensor.shape)
            if tensor in MATRICES:
                piece = -(-tensor.shape[dim] // ranks)
                start = min(rank * piece, tensor.shape[dim])
                offset, length = [0, 0], list(tensor.shape)
                offset[dim], length[dim] = start, min(piece, tensor.shape[dim] - start)
                box = Box(tuple(offset), tuple(length))
            storage = f"{tensor.name} {tensor.role}"
            layout.add(tensor, Fragment(rank, box, storage, contiguous_strides(box.length)))
            sizes[rank, storage] = box.elements * tensor.item_bytes
    return layout, sizes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Key, str]]:
    """A checkpoint of a state that four ranks hold in rows, and its digests."""
    rng = np.random.default_rng(0)
    layout, sizes = sharded(4, 0)
    storages = {place: rng.integers(0, 255, size, np.uint8) for place, size in sizes.items()}
    for rank, storage in storages:
        if storage.split()[0] not in ("a.weight", "b.weight"):
            storages[rank, storage] = storages[0, storage]
    source = MemorySource(layout, storages)
    metadata: dict[str, Any] = {"step": 1, "run_id": "r", "aliases": {}, "optimizer": {"steps": {}}}
    plan = WritePlan.build(layout, metadata, writers=["w"], writer_of_rank={})
    return write(plan, tmp_path_factory.mktemp("checkpoint"), source), digest(source)


def proc(name: str, key: str) -> int:
    """A number of /proc/self/`name`."""
    lines = Path(f"/proc/self/{name}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def load(rank: int, path: str, ranks: int, dim: int) -> dict[str, Any]:
    """One rank's part, with what it cost: bytes of read calls, and of memory beside what is filled."""
    import torch
    import torch.distributed as dist

    from trainrt.checkpoint.together import fill_together, open_together

    target, sizes = sharded(ranks, dim, only=rank)
    storages = {place: np.ones(size, np.uint8) for place, size in sizes.items()}
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    held, read = proc("status", "VmRSS"), proc("io", "rchar")
    source = open_together(Path(path), dist.group.WORLD, torch.device("cpu"))
    reading = fill_together(
        target, storages, source, group=dist.group.WORLD, device=torch.device("cpu"), round_bytes=ROUND_BYTES
    )
    return {
        "layout": target.to_json(), "storages": storages, "reading": reading, "own": source.bytes_read,
        "memory": 1024 * (proc("status", "VmHWM") - held), "read": proc("io", "rchar") - read,
    }  # fmt: skip


@pytest.mark.parametrize("ranks", cases([1, 4, 8], [1, 4]))
def test_another_sharding_reads_each_byte_once(
    ranks: int, checkpoint: tuple[Path, dict[Key, str]], record_property: Any
) -> None:
    path, digests = checkpoint
    results = run_ranks(ranks, load, str(path), ranks, 1, timeout=240)
    layout = Layout()
    for result in results:
        layout.merge(Layout.from_json(result["layout"]))
    loaded = MemorySource(layout, {place: data for result in results for place, data in result["storages"].items()})
    assert digest(loaded) == digests
    for rank in range(ranks):
        replicated = layout.only(lambda tensor, fragment, rank=rank: tensor in VECTORS and fragment.rank == rank)
        held = MemorySource(replicated, results[rank]["storages"])
        assert all(digests[key] == value for key, value in digest(held).items()), "every rank has its replica"
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    amplification = sum(result["read"] for result in results) / total
    record_property("read amplification", amplification)
    assert 1 <= amplification <= 1.1
    reading = results[0]["reading"]
    assert sum(result["own"] for result in results) == reading.read == reading.wanted == reading.stored
    assert max(result["own"] for result in results) <= reading.read / ranks + RUN_BYTES
    if ranks > 1:
        bound = RUN_BYTES + 2 * max(ROUND_BYTES, RUN_BYTES // ranks) + SLACK_BYTES
        record_property("memory", max(result["memory"] for result in results))
        assert max(result["memory"] for result in results) < bound
        assert bound < max(tensor.bytes for tensor in MATRICES), "no rank holds a whole tensor"


def test_negative_control_each_for_itself_reads_several_times(checkpoint: tuple[Path, dict[Key, str]]) -> None:
    read = 0
    for rank in range(4):
        target, sizes = sharded(4, 1, only=rank)
        source = Universal.open(checkpoint[0])
        fill(target, {place: np.empty(size, np.uint8) for place, size in sizes.items()}, source)
        read += source.bytes_read
    assert read > 2 * sum(piece.chunk.stored for piece in source.pieces)


def try_to_load(rank: int, path: str, ranks: int) -> str:
    try:
        load(rank, path, ranks, 1)
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("what", ["chunk", "header", "COMMIT"])
def test_damage_is_heard_by_every_rank(what: str, checkpoint: tuple[Path, dict[Key, str]]) -> None:
    path, _ = checkpoint
    piece = next(piece for piece in Universal.open(path).pieces if piece.tensor.name == "b.weight" and piece.start)
    file, at, name = {
        "chunk": (piece.file, piece.chunk.offset + 5, "b.weight"),
        "header": (piece.file, 20, piece.file),
        "COMMIT": ("COMMIT", 3, "COMMIT"),
    }[what]
    with (path / file).open("r+b") as damaged:
        damaged.seek(at)
        original = damaged.read(1)
        damaged.seek(at)
        damaged.write(bytes([original[0] ^ 4]))
        damaged.flush()
        said = run_ranks(4, try_to_load, str(path), 4)
        damaged.seek(at)
        damaged.write(original)
    assert len(set(said)) == 1 and name in said[0], said
    assert set(run_ranks(2, try_to_load, str(path), 2)) == {"loaded"}


def want_too_much(rank: int, path: str) -> str:
    import torch
    import torch.distributed as dist

    from trainrt.checkpoint.together import fill_together, open_together

    device = torch.device("cpu")
    source = open_together(Path(path), dist.group.WORLD, device)
    target = Layout()
    if rank == 1:
        target.add(LogicalTensor("x", "parameter", "float32", (1,)), Fragment(1, Box((0,), (1,)), "x", (1,)))
    with pytest.raises(CheckpointError, match=r"x \(parameter\) is not in the source"):
        fill_together(target, {}, source, group=dist.group.WORLD, device=device)
    return "raised"


def test_what_one_rank_misses_stops_all(checkpoint: tuple[Path, dict[Key, str]]) -> None:
    assert run_ranks(2, want_too_much, str(checkpoint[0])) == ["raised"] * 2


def pieces_of_sizes(sizes: list[int]) -> list[Piece]:
    tensor = LogicalTensor("t", "parameter", "uint8", (sum(sizes),))
    offsets = np.cumsum([0, *sizes]).tolist()
    return [
        Piece(tensor, f"file {at // 999}", Chunk(at, n, n, "none", ""), at)
        for at, n in zip(offsets, sizes, strict=False)
    ]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 400), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_runs_have_one_reader_each_and_rounds_are_bounded(ranks: int, sizes: list[int], random: Any) -> None:
    pieces = pieces_of_sizes(sizes)
    wanted = [random.random() < 0.8 for _ in pieces]
    runs = cut_runs(pieces, wanted, ranks=ranks)
    assert [n for run in runs for n in run.pieces] == [n for n, want in enumerate(wanted) if want]
    for run in runs:
        assert len({pieces[n].file for n in run.pieces}) == 1
        assert run.bytes == sum(pieces[n].chunk.length for n in run.pieces)
    shares = np.array([[random.choice((0, run.bytes, run.bytes // 3)) for run in runs] for _ in range(ranks)])
    shares = shares.reshape(ranks, len(runs))
    readers = deal(runs, shares)
    loads: Counter[int] = Counter()
    for run, reader in zip(runs, readers, strict=True):
        loads[reader] += run.bytes
    most = math.ceil(sum(run.bytes for run in runs) / ranks) + max((run.bytes for run in runs), default=0)
    assert all(load <= most for load in loads.values())
    rounds = schedule(readers, shares, most_bytes=500)
    sent = Counter((t.run, t.rank) for transfers in rounds for t in transfers)
    assert sent == Counter((run, rank) for rank, run in zip(*map(np.ndarray.tolist, np.nonzero(shares)), strict=True))
    order: dict[int, list[int]] = {}
    for transfers in rounds:
        for side in ("reader", "rank"):
            for rank in range(ranks):
                moved = [t.bytes for t in transfers if getattr(t, side) == rank]
                assert sum(moved) <= 500 or len(moved) == 1
        for transfer in transfers:
            assert transfer.reader == readers[transfer.run]
            order.setdefault(transfer.reader, []).append(transfer.run)
    assert all(runs_of == sorted(runs_of) for runs_of in order.values()), "a reader holds one run at a time"


def test_who_wants_a_run_reads_it() -> None:
    runs = [Run(range(n, n + 1), 10) for n in range(4)]
    own = np.diag([10, 10, 10, 10])
    assert deal(runs, own) == [0, 1, 2, 3]
    assert deal(runs, own[::-1]) == [3, 2, 1, 0]
    assert sorted(deal(runs, np.full((4, 4), 10))) == [0, 1, 2, 3], "what all want is dealt out evenly"
    partial_wish = partial(deal, runs)
    assert Counter(partial_wish(np.array([[10] * 4, [0] * 4])))[0] <= 3, "nor does one that wants all read all"
