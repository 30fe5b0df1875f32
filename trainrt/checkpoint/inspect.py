"""`trainrt checkpoint inspect | verify | diff`: what a checkpoint holds, whether it is whole, how two of them differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.formats.opened import Opened, release
from trainrt.checkpoint.reader import chunk_problems, read_manifest, structure_problems
from trainrt.checkpoint.source import digest, read_whole
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Key, LogicalTensor

AT_ONCE = 1 << 22
"""Elements that are compared at once."""


def inspect(path: str | Path) -> dict[str, Any]:
    """Format, step and every tensor with its digest. Raises CheckpointError for what is no checkpoint or damaged."""
    opened = open_any(Path(path))
    digests = digest(opened.source)
    tensors = [_line(tensor, tensor.name, digests[tensor.key]) for tensor in opened.source.layout.tensors.values()]
    for alias, owner in opened.metadata.get("aliases", {}).items():
        tied = opened.source.layout.tensors.get((owner, "parameter"))
        if tied is not None:
            tensors.append(_line(tied, alias, digests[tied.key]))
    return {"format": opened.format, "step": opened.step, "tensors": tensors}


def _line(tensor: LogicalTensor, name: str, digest: str) -> dict[str, Any]:
    return {
        "name": name, "role": tensor.role, "shape": list(tensor.shape), "dtype": tensor.dtype, "digest": digest,
    }  # fmt: skip


def verify(path: str | Path) -> dict[str, Any]:
    """Read every byte and compare. Damage is reported, never raised; a path that is no checkpoint is a CheckpointError."""
    path = Path(path)
    if not (path / "manifest.json").exists() and not (path / "COMMIT").exists():
        return _verify_foreign(path)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        problem = {"file": "manifest.json", "tensor": None, "kind": "commit", "message": str(error)}
        return {"ok": False, "tensors": 0, "bytes": 0, "problems": [problem]}
    problems = list(structure_problems(path, manifest))
    broken = {problem["file"] for problem in problems}
    problems += [problem for problem in chunk_problems(path, manifest) if problem["file"] not in broken]
    return {
        "ok": not problems,
        "tensors": len(manifest["tensors"]),
        "bytes": sum(facts["bytes"] for facts in manifest["files"].values()),
        "problems": problems,
    }


def _verify_foreign(path: Path) -> dict[str, Any]:
    """A checkpoint of another framework: every tensor is read, and compared with the checksums that its files have."""
    opened = open_any(path)
    problems = []
    for tensor in opened.source.layout.tensors.values():
        try:
            read_whole(opened.source, tensor)
        except CheckpointError as error:
            problems.append({"file": str(path), "tensor": tensor.name, "kind": "checksum", "message": str(error)})
        release(opened.source)
    tensors = opened.source.layout.tensors.values()
    return {
        "ok": not problems, "tensors": len(tensors), "bytes": sum(tensor.bytes for tensor in tensors), "problems": problems,
    }  # fmt: skip


def diff(one: str | Path, other: str | Path) -> dict[str, Any]:
    """Tensor by tensor, over formats: which differ and by how much, which are missing in the second, which are extra there."""
    first, second = open_any(Path(one)), open_any(Path(other))
    ours, theirs = _with_aliases(first), _with_aliases(second)
    lines = [_compare(key, first, ours.get(key), second, theirs.get(key)) for key in sorted({*ours, *theirs})]
    return {"equal": all(line["kind"] == "equal" for line in lines), "tensors": lines}


def _with_aliases(opened: Opened) -> dict[Key, LogicalTensor]:
    """Every name that a tensor has, and the tensor that is stored for it."""
    held = dict(opened.source.layout.tensors)
    for alias, owner in opened.metadata.get("aliases", {}).items():
        if (owner, "parameter") in held:
            held[alias, "parameter"] = held[owner, "parameter"]
    return held


def _compare(
    key: Key, first: Opened, ours: LogicalTensor | None, second: Opened, theirs: LogicalTensor | None
) -> dict[str, Any]:
    line = {"name": key[0], "role": key[1], "kind": "equal", "max_abs": None, "max_rel": None}
    if ours is None or theirs is None:
        return line | {"kind": "extra" if ours is None else "missing"}
    if ours.shape != theirs.shape:
        return line | {"kind": "shape"}
    a, b = read_whole(first.source, ours), read_whole(second.source, theirs)
    release(first.source)
    release(second.source)
    if ours.dtype == theirs.dtype and np.array_equal(a, b):
        return line | {"max_abs": 0.0, "max_rel": 0.0}
    absolute, relative = 0.0, 0.0
    for x, y in zip(_values(a, ours.dtype), _values(b, theirs.dtype), strict=True):
        gap = (x - y).abs()
        gap = torch.where(torch.isnan(x) & torch.isnan(y), 0.0, gap)
        absolute = max(absolute, float(gap.max()))
        relative = max(relative, float((gap / torch.maximum(x.abs(), y.abs()).clamp_min(1e-300)).max()))
    kind = "dtype" if ours.dtype != theirs.dtype else "differs"
    return line | {"kind": kind, "max_abs": absolute, "max_rel": relative}


def _values(data: np.ndarray, dtype: str) -> Iterator[torch.Tensor]:
    """A tensor's elements in float64, some at a time."""
    held = torch.from_numpy(data).view(getattr(torch, dtype))
    return (held[at : at + AT_ONCE].double() for at in range(0, held.numel(), AT_ONCE))
