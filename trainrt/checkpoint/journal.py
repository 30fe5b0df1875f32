"""The journal of a conversion: a line a unit, appended by whoever wrote it, so that a kill costs what was not noted."""

from __future__ import annotations

import json
import os
from pathlib import Path

from trainrt.errors import ConfigError

Noted = dict[tuple[str, int], dict[str, str]]
"""(file, offset) of a unit to the digests of what was read and of what was written."""


class Journal:
    """Keyed by the fingerprint of plan and source: another conversion does not go on behind this one."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path, self._fingerprint = path, fingerprint

    def begin(self) -> Noted:
        """What is noted already. Raises ConfigError where it is the journal of another conversion."""
        if not self._path.exists():
            return {}
        head, *_ = [*self._path.read_text().splitlines(), ""]
        try:
            known = json.loads(head)["fingerprint"]
        except (ValueError, KeyError, TypeError):
            # Its writer was killed within the first line: nothing is noted yet.
            return {}
        if known != self._fingerprint:
            raise ConfigError(
                f"{self._path.parent}: a conversion was begun there from another source or to other files "
                "(the source has changed since?); --restart starts anew"
            )
        return self.read()

    def restart(self) -> Noted:
        """An empty journal."""
        self._path.write_text(json.dumps({"fingerprint": self._fingerprint}) + "\n")
        return {}

    def read(self) -> Noted:
        """All units that are noted; half a line at the end, of a writer that was killed, counts for nothing."""
        noted: Noted = {}
        for line in self._path.read_text().splitlines(keepends=True)[1:]:
            if line.endswith("\n"):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                noted[entry["file"], entry["offset"]] = {"source": entry["source"], "output": entry["output"]}
        return noted

    def note(self, file: str, offset: int, *, source: str, output: str) -> None:
        """Append a unit, in one write: several processes may do so."""
        line = json.dumps({"file": file, "offset": offset, "source": source, "output": output}) + "\n"
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)
