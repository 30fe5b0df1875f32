"""Files of `torch.save`: what is in them without loading it, and where its bytes lie.

A pickle is a program. These are read by torch's restricted unpickler (`weights_only`): it builds tensors, plain containers and
the classes named here, and those as stand-ins that hold what was pickled and can do nothing. Tensors come without data (fake);
their bytes are read where they lie in the zip file, after its checksum (CRC-32) has been compared.
"""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trainrt.checkpoint.formats.place import no_link
from trainrt.checkpoint.mapping.rules import StoredArray
from trainrt.errors import CheckpointError


class StandIn:
    """What stands for an object of a framework: its pickled state, and nothing of its behaviour."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments
        self.__dict__.update(named)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


def load(path: Path, *, stand_ins: Sequence[str] = (), part: tuple[int, int] | None = None) -> Any:
    """The object of a file, or of a `part` (offset, length) of it, with tensors that have shape and place, but no data.

    Raises CheckpointError for what is no such file, or would build anything else than is allowed.
    """
    if not no_link(path).is_file():
        raise CheckpointError(f"{path}: is missing")
    if part is None and not is_archive(path):
        raise CheckpointError(f"{path}: no zip file as torch.save writes them (files of torch before 1.6 are not read)")
    globals_: list[Any] = [(type(name.rpartition(".")[2], (StandIn,), {}), name) for name in stand_ins]
    try:
        window = Window(path, *(part or (0, path.stat().st_size)))
        with window as file:
            _check(cast("IO[bytes]", file))
            with _only(globals_), FakeTensorMode():
                return torch.load(cast("IO[bytes]", file), weights_only=True, map_location="cpu")
    except Exception as error:
        said = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
        raise CheckpointError(f"{path}: refused: {said or type(error).__name__}: {_first_line(error)}") from error


def is_archive(path: Path) -> bool:
    """Whether it is a zip file, as torch.save writes them."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        # It ends as one does, and says something that none may.
        return False


def _check(file: IO[bytes]) -> None:
    """Compare the checksums of all that is no tensor's data, which torch does not do. Raises ValueError or what zipfile does."""
    with zipfile.ZipFile(file) as archive:
        seen = set()
        for entry in archive.infolist():
            if entry.filename in seen or entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed, or there twice; torch.save does neither")
            seen.add(entry.filename)
            if "/data/" not in entry.filename:
                held = archive.read(entry)
                if entry.filename.endswith("/byteorder") and held != b"little":
                    raise ValueError(f"byte order {held!r}; allowed: little")
    file.seek(0)


@contextlib.contextmanager
def _only(allowed: list[Any]) -> Iterator[None]:
    """Nothing else is built than torch itself allows, and these: whatever a framework in this process has allowed besides."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def load_plain(path: Path, *, part: tuple[int, int]) -> Any:
    """A small object without tensors, such as a number. Raises CheckpointError for anything else."""
    value = load(path, part=part)
    if not isinstance(value, (bool, int, float, str, list, tuple, dict, type(None))):
        raise CheckpointError(f"{path}: a plain value was expected, not a {type(value).__name__}")
    return value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def array_of(tensor: Tensor, path: Path, name: str, role: str, *, within: int = 0, **at: int) -> StoredArray:
    """A loaded (fake) tensor as an array of its file; `within`: where the part of it begins that was loaded."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    base, start = within + int(tensor.untyped_storage()._checkpoint_offset or 0), int(tensor.storage_offset())
    return StoredArray(name, role, dtype, tuple(tensor.shape), str(path), base, tuple(tensor.stride()), start, at)


def tensors_of(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries and lists, by dotted names."""
    if isinstance(state, Tensor):
        yield prefix, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_of(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(state, (list, tuple)):
        for index, value in enumerate(state):
            yield from tensors_of(value, f"{prefix}.{index}" if prefix else str(index))


class Window(io.RawIOBase):
    """A part of a file, as a file: items of a distributed checkpoint lie one behind the other."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = path.open("rb", buffering=0), offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._at))
        data = os.pread(self._file.fileno(), wanted, self._offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def records(path: Path, *, part: tuple[int, int] | None = None) -> list[tuple[int, int, int]]:
    """(offset in the file, bytes, CRC-32) of the tensors' data in a file, or in a part of it."""
    found = []
    window = Window(path, *(part or (0, path.stat().st_size)))
    offset = part[0] if part else 0
    with window as file, zipfile.ZipFile(cast("IO[bytes]", file)) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                found.append((offset + data_offset(cast("IO[bytes]", file), entry), entry.file_size, entry.CRC))
    return found


def data_offset(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where the data of an entry begins: behind its header, its name and what pads it."""
    file.seek(entry.header_offset + 26)
    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return entry.header_offset + 30 + name + extra
