"""Files that grow: the complete lines that are new since the last look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Tail:
    """The complete lines of one JSONL file that are new since the last call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._inode: int | None = None

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """(new lines, whether the file was replaced, so that they are all there is)."""
        try:
            with self.path.open("rb") as file:
                facts = self.path.stat()
                restarted = self._inode is not None and (facts.st_ino != self._inode or facts.st_size < self._offset)
                if restarted:
                    self._offset = 0
                self._inode = facts.st_ino
                if facts.st_size == self._offset:
                    return [], restarted
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return [], False
        end = data.rfind(b"\n") + 1
        self._offset += end
        return [line for text in data[:end].splitlines() if (line := parse_line(text)) is not None], restarted


def parse_line(text: bytes) -> dict[str, Any] | None:
    """A line, or None for one that a killed writer left torn."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
