"""Checkpoints of torch.distributed.checkpoint, written by FSDP2 x TP models with their optimizer."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cases import cases
from tests.checkpoint.conftest import Covers, Made
from trainrt.checkpoint.convert import convert
from trainrt.checkpoint.formats import dcp, open_any
from trainrt.checkpoint.source import digest, read_whole
from trainrt.errors import CheckpointError

TWO_BY_TWO = {"world": 4, "tp": 2}


@pytest.mark.parametrize("options", cases([TWO_BY_TWO, {"world": 3}], [TWO_BY_TWO]), ids=["fsdp 2 x tp 2", "fsdp 3"])
def test_weights_and_moments_are_those_of_the_model(
    options: dict[str, Any], made: Made, tmp_path: Path, covers: Covers
) -> None:
    covers("dcp", "read, bit for bit", f"FSDP {options['world'] // options.get('tp', 1)} x TP {options.get('tp', 1)}")
    path, expected = made("dcp", **options)
    opened = dcp.open_checkpoint(path)
    for key, value in expected.items():
        role, _, name = key.partition("/")
        tensor = opened.source.layout.tensors[name, role]
        found = read_whole(opened.source, tensor).view(np.float32).reshape(tensor.shape)
        assert np.array_equal(found, value), key
    assert len(opened.source.layout.tensors) == len(expected) and opened.unknown == []
    assert set(opened.metadata["optimizer"]["steps"].values()) == {3}
    (group,) = opened.metadata["optimizer"]["groups"]
    assert group["hyperparameters"]["weight_decay"] == 0.1
    convert(path, tmp_path / "universal", to="universal")
    assert digest(open_any(tmp_path / "universal").source) == digest(opened.source)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/trainrt-was-here"),))


def test_metadata_that_would_do_something_is_refused_and_does_nothing(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Evil()}))
    with pytest.raises(CheckpointError, match="refused: it would build"):
        open_any(tmp_path)
    assert not Path("/tmp/trainrt-was-here").exists()


def test_a_flipped_bit_is_found(made: Made, tmp_path: Path) -> None:
    checkpoint, _ = made("dcp", **TWO_BY_TWO)
    opened = dcp.open_checkpoint(checkpoint)
    tensor = opened.source.layout.tensors["model.norm.weight", "parameter"]
    fragment = opened.source.layout.fragments[tensor.key][0]
    path = Path(fragment.storage)
    data = bytearray(path.read_bytes())
    data[fragment.base + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        convert(checkpoint, tmp_path / "universal", to="universal")
