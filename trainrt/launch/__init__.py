"""The launcher: who runs where, and what happens when it dies (docs/launch.md).

`trainrt.launch` is this package and, called, the command: `trainrt.launch("job.toml")`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainrt.config import JobConfig


def launch(
    config: JobConfig | str | Path, *, pipeline: Any = None, address: str | None = None, nodes: int | None = None,
    run_dir: str | Path | None = None, detach: bool = False, force: bool = False,
) -> int:  # fmt: skip
    """Run a job to its end, as `trainrt launch` does, and return the exit code.

    config: a JobConfig or the path of a TOML file. pipeline: "module:attribute" or a Pipeline, which
    travels to the nodes; over `run.pipeline`. address, nodes, run_dir: over the config's keys. detach:
    return once the run is under way. force: go on in a directory whose job learned something else.
    Raises UserErrors for wrong input.
    """
    from trainrt.launch.request import prepare

    request = prepare(config, pipeline=pipeline, address=address, nodes=nodes, run_dir=run_dir, force=force)
    if detach:
        from trainrt.launch.detached import run_detached

        return run_detached(request)
    from trainrt.launch.driver import run

    return run(request)


class _Callable(ModuleType):
    """A package that is also the function of its name: importing it makes it an attribute of `trainrt`."""

    def __call__(self, *arguments: Any, **options: Any) -> int:
        return launch(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
