"""The corpus: documents tokenized once into a memory-mapped cache, packed into samples.

A cache lies in a folder named by the digest of all that goes into it (the files' contents, the
tokenizer, the split), so changed content makes another cache. It is written aside and renamed, under
a lock: ranks that start together tokenize once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainrt.config import DataConfig
from trainrt.errors import DataError
from trainrt.training.data.sources import documents_of, files_of
from trainrt.training.data.tokenizer import Tokenizer, open_tokenizer

FORMAT = "1"
IGNORED = -100


class Samples:
    """A split, packed: sample i is the tokens [i * S, (i + 1) * S] of the documents one after the other.

    An end of text closes each document; what follows it belongs to another one, so its label is -100.
    """

    def __init__(self, tokens: NDArray[Any], *, sequence_length: int, end_of_text: int) -> None:
        self._tokens, self._length, self._end = tokens, sequence_length, end_of_text

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self._length

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = self._tokens[index * self._length : (index + 1) * self._length + 1].astype(np.int64)
        inputs, labels = window[:-1], window[1:].copy()
        labels[inputs == self._end] = IGNORED
        return {"input_ids": inputs, "labels": labels}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Two splits of packed samples and what is known of them. `unigram_entropy`: nats a token of the training split."""

    train: Samples
    validation: Samples
    vocabulary_size: int
    end_of_text: int
    digest: str
    unigram_entropy: float


def open_corpus(config: DataConfig, cache_directory: Path | None = None) -> Corpus:
    """Open, tokenizing first where no cache holds it. Raises DataError for what cannot be read or is too short."""
    files = files_of(config.source)
    tokenizer = open_tokenizer(config.tokenizer)
    base = cache_directory or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainrt"
    digest = _known_digest(base / "known", files, tokenizer, config.validation_fraction)
    folder = base / "corpora" / digest
    if not (folder / "facts.json").exists():
        with _locked(base / "corpora"):
            if not (folder / "facts.json").exists():
                _write(folder, files, tokenizer, config)
    facts = json.loads((folder / "facts.json").read_text())
    splits = {}
    for name in ("train", "validation"):
        path = folder / f"{name}.bin"
        tokens = np.memmap(path, facts["dtype"], "r") if path.stat().st_size else np.empty(0, facts["dtype"])
        splits[name] = Samples(tokens, sequence_length=config.sequence_length, end_of_text=tokenizer.end_of_text)
    if not len(splits["train"]):
        raise DataError(
            f'data.source = "{config.source}" has {facts["train_tokens"]} training tokens, fewer than one sample of '
            f"data.sequence_length = {config.sequence_length} and its next token; "
            f"allowed: up to {max(facts['train_tokens'] - 1, 0)}"
        )
    return Corpus(
        train=splits["train"], validation=splits["validation"], vocabulary_size=tokenizer.size,
        end_of_text=tokenizer.end_of_text, digest=digest, unigram_entropy=facts["unigram_entropy"],
    )  # fmt: skip


def _known_digest(known: Path, files: list[Path], tokenizer: Tokenizer, validation_fraction: float) -> str:
    """The digest of the contents, remembered by names, sizes and times of change: unchanged files are not read again."""
    state = xxhash.xxh3_128(f"{FORMAT} {tokenizer.digest} {validation_fraction!r}".encode())
    for path in files:
        facts = path.stat()
        state.update(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    note = known / state.hexdigest()
    if note.exists():
        return note.read_text()
    digest = _digest(files, tokenizer, validation_fraction)
    known.mkdir(parents=True, exist_ok=True)
    scratch = known / f".{note.name}.{os.getpid()}"
    scratch.write_text(digest)
    os.replace(scratch, note)
    return digest


def _digest(files: list[Path], tokenizer: Tokenizer, validation_fraction: float) -> str:
    state = xxhash.xxh3_128(f"{FORMAT} {tokenizer.digest} {validation_fraction!r}".encode())
    for path in files:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"data.source: {path}: {error.strerror}") from error
        state.update(len(content).to_bytes(8, "little"))
        state.update(content)
    return state.hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(folder: Path, files: list[Path], tokenizer: Tokenizer, config: DataConfig) -> None:
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    counts = np.zeros(tokenizer.size, np.int64)
    documents = [document for path in files for document in documents_of(path)]
    if not documents:
        raise DataError(f'data.source = "{config.source}" is empty: {len(files)} files hold no text')
    held_out = _validation(documents, config.validation_fraction)
    with (scratch / "train.bin").open("wb") as train, (scratch / "validation.bin").open("wb") as validation:
        for index, document in enumerate(documents):
            tokens = np.append(tokenizer.encode(document), tokenizer.end_of_text)
            if index in held_out:
                validation.write(tokens.astype(dtype).tobytes())
            else:
                counts += np.bincount(tokens, minlength=tokenizer.size)
                train.write(tokens.astype(dtype).tobytes())
    share = counts[counts > 0] / max(counts.sum(), 1)
    facts = {
        "dtype": np.dtype(dtype).name,
        "documents": len(documents),
        "train_tokens": int(counts.sum()),
        "unigram_entropy": float(-(share * np.log(share)).sum()),
    }
    (scratch / "facts.json").write_text(json.dumps(facts))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)


def _validation(documents: list[bytes], fraction: float) -> set[int]:
    """Documents held out: by their own content, so that adding others moves none. At least one of two or more."""
    if fraction == 0 or len(documents) < 2:
        return set()
    hashes = [xxhash.xxh3_64_intdigest(document) for document in documents]
    held_out = {index for index, value in enumerate(hashes) if value < fraction * 2**64}
    if not held_out:
        held_out = {min(range(len(documents)), key=lambda index: hashes[index])}
    return held_out if len(held_out) < len(documents) else set(sorted(held_out)[1:])
