"""The one hierarchy of errors.

A user's mistake is a `UserError`: its message names the key or file, the value and what is
allowed, and the command exits 2 without a traceback. A fault at run time is a `TrainrtError`
(exit 1). A bug is an ordinary exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrainrtError(Exception):
    """Something failed at run time. The message is complete: it is shown without a traceback."""

    exit_code = 1


class UserError(TrainrtError):
    """The user's input is wrong. The message says which, and what is allowed."""

    exit_code = 2


class ConfigError(UserError):
    """A key of the job's config, or two keys that do not fit each other."""


class DataError(UserError):
    """The corpus, the tokenizer or a sample source cannot be used."""


class ModelError(UserError):
    """A model cannot be built from its config or its weights cannot be loaded."""


class PlanError(UserError):
    """No parallel plan fits, or a form was asked for that is not built."""


class RunDirError(UserError):
    """The run directory is in use, holds another job, or cannot be written."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of an unknown form."""


class DiagnosticsError(UserError):
    """A page or a diagnosis cannot be made of what was named: no run, a port in use, no token."""


class NotEnoughData(DiagnosticsError):
    """Operations, workers or steps are missing, so that nothing can be said. A diagnosis turns it into "unknown"."""


class LayoutError(TrainrtError):
    """Two layouts do not describe the same tensors, or one leaves a part of a tensor nowhere."""


class StoreError(TrainrtError):
    """A snapshot store is gone, refused a message, or has no room."""


class StaleIncarnation(StoreError):
    """A message of an incarnation that the store does not serve any more."""


class PeerLost(TrainrtError):
    """A collective failed because another rank is gone. The worker parks and waits for orders."""


class NonFinite(TrainrtError):
    """The loss or the gradient norm is not a number."""


class Anomaly(NonFinite):
    """A step's numbers are not to be believed, and it is to be done again from the last generation."""


class ReplicasDiffer(TrainrtError):
    """Replicas of a parameter are not equal any more. `ranks` are those to blame, as far as that can be told."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


class Interrupted(TrainrtError):
    """Stopped by SIGTERM after a checkpoint; the same command goes on."""

    exit_code = 75


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ' (did you mean "x"?)' for the closest allowed spelling, or an empty string."""
    found = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f' (did you mean "{found[0]}"?)' if found else ""
