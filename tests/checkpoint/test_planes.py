"""Compressed chunks: what comes out is what went in, what is hostile is refused, and it pays where it should."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from trainrt.checkpoint import planes, writer
from trainrt.checkpoint.inspect import verify
from trainrt.checkpoint.reader import Universal
from trainrt.checkpoint.source import MemorySource, digest
from trainrt.checkpoint.writer import WritePlan, finish, prepare, write_part
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Box, Fragment, Layout, LogicalTensor


@given(st.binary(max_size=400), st.sampled_from([1, 2, 4, 8]))
def test_any_bytes_come_back(data: bytes, item: int) -> None:
    array = np.frombuffer(data[: len(data) // item * item], np.uint8)
    stored = planes.encode(array, item)
    assert stored.nbytes <= planes.most_bytes(array.nbytes, item)
    assert np.array_equal(planes.decode(stored, array.nbytes, item), array)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.86), (torch.bfloat16, 0.72)])
def test_numbers_of_training_shrink(dtype: torch.dtype, most: float) -> None:
    values = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)).to(dtype).view(torch.uint8).numpy()
    stored = planes.encode(values, dtype.itemsize)
    assert stored.nbytes < most * values.nbytes
    noise = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8)
    assert planes.encode(noise, 4).nbytes == noise.nbytes + 32


def frame(body: bytes, *, item: int = 1) -> np.ndarray:
    head = struct.pack("<Q", len(body) | planes.COMPRESSED) + struct.pack("<Q", 0) * (item - 1)
    return np.frombuffer(head + body, np.uint8)


def test_a_chunk_that_is_not_exactly_what_it_stands_for_is_refused() -> None:
    compressor = zstandard.ZstdCompressor()
    with pytest.raises(CheckpointError, match="claims 1048576 bytes for 8 numbers"):
        planes.decode(frame(compressor.compress(bytes(1 << 20))), 8, 1)
    with pytest.raises(CheckpointError, match="cannot be read"):
        planes.decode(frame(compressor.compress(b"12345678")[:-3]), 8, 1)
    with pytest.raises(CheckpointError, match="ends within its head"):
        planes.decode(np.zeros(3, np.uint8), 8, 1)
    with pytest.raises(CheckpointError, match="its planes go on"):
        planes.decode(planes.encode(np.arange(200, dtype=np.uint8), 1)[:-1], 200, 1)
    with pytest.raises(CheckpointError, match="its planes 208"):
        planes.decode(np.append(planes.encode(np.arange(200, dtype=np.uint8), 1), np.uint8(0)), 200, 1)


def test_a_slice_reads_only_its_chunks_and_a_codec_that_is_not_known_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "CHUNK_BYTES", 4096)
    tensor = LogicalTensor("w", "exp_avg", "float32", (64, 64))
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    layout = Layout()
    layout.add(tensor, Fragment(0, Box.whole((64, 64)), "state", (64, 1)))
    source = MemorySource(layout, {(0, "state"): values.view(torch.uint8).numpy().reshape(-1)})
    plan = WritePlan.build(layout, {"step": 1}, writers=["x"], writer_of_rank={}, compress=True)
    prepare(plan, tmp_path)
    path = finish(plan, tmp_path, write_part(plan, tmp_path, "x", source))
    file = path / "optimizer" / "exp_avg-00001-of-00001.zst"
    assert file.stat().st_size < 0.9 * tensor.bytes and verify(path)["ok"]
    held = Universal.open(path)
    assert digest(held) == digest(source)
    held = Universal.open(path)
    part = held.read(tensor, held.layout.fragments[tensor.key][0].narrow(Box((16, 0), (16, 64))))
    assert np.array_equal(part.view(np.float32), values[16:32].numpy())
    assert held.bytes_read < 0.3 * file.stat().st_size
    manifest = json.loads((path / "manifest.json").read_text())
    for chunk in manifest["tensors"][0]["chunks"]:
        chunk["codec"] = "rot13"
    with pytest.raises(CheckpointError, match="codec 'rot13'; allowed: 'none', 'zstd'"):
        digest(Universal(path, manifest))
