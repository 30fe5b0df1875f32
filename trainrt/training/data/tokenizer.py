"""Bytes, or any `tokenizer.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainrt.errors import DataError

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(Protocol):
    """Documents to token ids. `size` counts the end of text."""

    @property
    def size(self) -> int: ...
    @property
    def end_of_text(self) -> int: ...
    @property
    def digest(self) -> str: ...

    def encode(self, document: bytes) -> NDArray[np.int64]: ...


@dataclass(frozen=True, slots=True)
class Bytes:
    """A token a byte; the end of text is token 256."""

    size: int = 257
    end_of_text: int = 256
    digest: str = "bytes"

    def encode(self, document: bytes) -> NDArray[np.int64]:
        return np.frombuffer(document, np.uint8).astype(np.int64)


class File:
    """A tokenizer.json. The end of text is its own such token, else one more id at the end."""

    def __init__(self, path: str) -> None:
        import tokenizers

        try:
            content = Path(path).read_bytes()
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:
            raise DataError(
                f'data.tokenizer = "{path}": {str(error).splitlines()[0]}; allowed: "bytes", or the path of a tokenizer.json'
            ) from error
        known = [self._tokenizer.token_to_id(token) for token in END_OF_TEXT]
        size = self._tokenizer.get_vocab_size()
        self.end_of_text = next((token for token in known if token is not None), size)
        self.size = max(size, self.end_of_text + 1)
        self.digest = xxhash.xxh3_128_hexdigest(content)

    def encode(self, document: bytes) -> NDArray[np.int64]:
        text = document.decode("utf-8", errors="replace")
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)


def open_tokenizer(name: str) -> Tokenizer:
    """`bytes` or the path of a tokenizer.json. Raises DataError where it cannot be read."""
    return Bytes() if name == "bytes" else File(name)
