"""`trainrt checkpoint inspect | verify`: what a checkpoint holds, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainrt.checkpoint.reader import Universal, chunk_problems, read_manifest, structure_problems
from trainrt.checkpoint.source import digest
from trainrt.errors import CheckpointError


def inspect(path: str | Path) -> dict[str, Any]:
    """Format, step and every tensor with its digest. Raises CheckpointError for what is no checkpoint or damaged."""
    checkpoint = Universal.open(Path(path))
    digests = digest(checkpoint)
    aliases = {e["name"]: e["alias_of"] for e in checkpoint.manifest["tensors"] if e["alias_of"] is not None}
    tensors = [
        {
            "name": entry["name"],
            "role": entry["role"],
            "shape": entry["shape"],
            "dtype": entry["dtype"],
            "digest": digests[aliases.get(entry["name"], entry["name"]), entry["role"]],
        }
        for entry in checkpoint.manifest["tensors"]
    ]
    return {"format": "universal", "step": checkpoint.manifest["step"], "tensors": tensors}


def verify(path: str | Path) -> dict[str, Any]:
    """Read every byte and compare. Damage is reported, never raised; a path that is no checkpoint is a CheckpointError."""
    path = Path(path)
    if not (path / "manifest.json").exists() and not (path / "COMMIT").exists():
        raise CheckpointError(f"{path}: not a trainrt universal checkpoint (no manifest.json)")
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
