"""Universal checkpoints and Hugging Face model directories, as a conversion's target."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from trainrt.checkpoint.inspect import verify
from trainrt.checkpoint.targets.array import UNIT
from trainrt.checkpoint.targets.target import Unit, Written
from trainrt.checkpoint.writer import ChunkPlan, WritePlan, chunk_layout, final_name, finish, partial, prepare
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Layout


class UniversalTarget:
    """See targets.target.Target."""

    def __init__(self, layout: Layout, metadata: Mapping[str, Any]) -> None:
        for name, role in layout.tensors:
            if not re.fullmatch(r"\w+", role):
                raise CheckpointError(f"{name}: role {role!r}; allowed: letters, digits and _, as it names a file")
        self._plan = WritePlan.build(layout, dict(metadata), writers=[UNIT], writer_of_rank={})
        self.units = self._plan.chunks

    def layout(self, unit: Unit) -> Layout:
        assert isinstance(unit, ChunkPlan)
        return chunk_layout(self._plan.tensors[unit.name, unit.role], unit.start, unit.stop, UNIT)

    def checksum(self, data: np.ndarray) -> str:
        return xxhash.xxh3_64_hexdigest(data)

    def folder(self, work: Path) -> Path:
        made = self._made(work)
        return made if (made / "COMMIT").exists() else partial(work, self._plan.step)

    def _made(self, work: Path) -> Path:
        return work / final_name(self._plan.step)

    def place(self, unit: Unit) -> str:
        return unit.file

    def prepare(self, work: Path) -> None:
        prepare(self._plan, work)

    def finish(self, work: Path, written: Written) -> Path:
        if (self._made(work) / "COMMIT").exists():
            return self._made(work)
        results = [{"file": file, "offset": offset, "xxh3": digest} for (file, offset), digest in written.items()]
        return finish(self._plan, work, results)

    def problem(self, path: Path) -> str | None:
        problems = verify(path)["problems"]
        return f"{problems[0]['file']}: {problems[0]['message']}" if problems else None


class HuggingFaceTarget(UniversalTarget):
    """The model's directory of a universal checkpoint, by itself. Where no config is known it has none."""

    def __init__(self, layout: Layout, metadata: Mapping[str, Any]) -> None:
        super().__init__(layout, metadata)
        self._bare = not metadata["model_config"]

    def place(self, unit: Unit) -> str:
        return unit.file.removeprefix("model/")

    def finish(self, work: Path, written: Written) -> Path:
        model = super().finish(work, written) / "model"
        if self._bare:
            (model / "config.json").unlink(missing_ok=True)
        return model

    def problem(self, path: Path) -> str | None:
        return None
