"""What a launch is asked to do: config, run directory, user's module; checked before anything starts."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import shlex
import site
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainrt.config import JobConfig, learned_differences, load, parse, to_toml
from trainrt.errors import ConfigError, RunDirError
from trainrt.launch.record import Folder, Record
from trainrt.run_dir import RunDir

WORKER_ENTRY = "trainrt.training.worker:serve"
LAZY_IMPORTS = ("torch._dynamo", "numpy.random")
"""What torch imports when a model is first built: half a second in every worker, once in a zygote."""
CARRIED_MODULE = "trainrt_launched_pipeline"
CARRIED_SOURCE = '''"""Made by trainrt.launch: loads the pipeline that was given to it."""

import pathlib

import ray.cloudpickle

pipeline = ray.cloudpickle.loads(pathlib.Path(__file__).with_suffix(".pkl").read_bytes())
'''
NOT_CODE = ["**/.git", "**/__pycache__", "**/.venv", "**/venv", "**/node_modules", "**/runs"]


@dataclass(frozen=True, slots=True)
class Request:
    """A launch. `module_directory` holds the user's module (None: installed, or none); `command` repeats it.

    own_process: it is all that this process is for. handed_over: an earlier driver gave it up with an open incident.
    """

    config: JobConfig
    run_dir: RunDir
    module_directory: str | None
    force: bool
    command: str
    entry: str = WORKER_ENTRY
    preload: tuple[str, ...] = ()
    own_process: bool = False
    handed_over: bool = False

    def runtime_env(self) -> dict[str, Any] | None:
        """How the user's module travels to the nodes."""
        if self.module_directory is None:
            return None
        excludes = list(NOT_CODE)
        if self.run_dir.path.is_relative_to(self.module_directory):
            excludes.append(f"/{self.run_dir.path.relative_to(self.module_directory)}")
        return {"working_dir": self.module_directory, "excludes": excludes}


@dataclass(frozen=True, slots=True)
class Previous:
    """What an earlier launch left in the run directory."""

    run_id: str
    state: str
    step: int
    incarnation: int
    time: float
    record: Record | None

    @property
    def cut_off(self) -> bool:
        """Whether its driver ended without a word."""
        return self.state in ("starting", "running", "diagnosing", "recovering")


def prepare(
    config: JobConfig | str | Path, *, pipeline: Any = None, address: str | None = None, nodes: int | None = None,
    run_dir: str | Path | None = None, force: bool = False,
) -> Request:  # fmt: skip
    """Put a launch together. Raises ConfigError for wrong input."""
    if not isinstance(config, JobConfig):
        sys.path.insert(0, str(Path(config).absolute().parent))
        config = load(config)
    carried = None if pipeline is None or isinstance(pipeline, str) else pipeline
    name = f"{CARRIED_MODULE}:pipeline" if carried is not None else pipeline
    config = _with(config, run={"pipeline": name}, cluster={"address": address, "nodes": nodes})
    directory = RunDir(run_dir if run_dir is not None else config.run.directory.format(name=config.run.name))
    config = _with(config, run={"directory": str(directory)})
    module_directory = None
    if carried is not None:
        module_directory = str(_carry(directory, carried))
        sys.path.insert(0, module_directory)
    elif config.run.pipeline:
        module_directory = find_module(config.run.pipeline)
    preload = (*LAZY_IMPORTS, "transformers") if config.model.kind == "huggingface" else LAZY_IMPORTS
    typed = sys.argv[1:2] == ["launch"]
    command = shlex.join(["trainrt", *sys.argv[1:]]) if typed else "the same launch"
    return Request(config, directory, module_directory, force, command, preload=preload, own_process=typed)


def _with(config: JobConfig, **sections: dict[str, Any]) -> JobConfig:
    """The config with some keys replaced (None: left as they are), checked again."""
    document = config.model_dump(mode="json", exclude_unset=True)
    for section, values in sections.items():
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            document.setdefault(section, {}).update(given)
    return parse(document)


def find_module(pipeline: str) -> str | None:
    """The directory from which the pipeline's module is imported; None where it is an installed one.

    Raises ConfigError where there is no such module.
    """
    module, colon, attribute = pipeline.partition(":")
    if not colon or not module or not attribute:
        raise ConfigError(f'run.pipeline = "{pipeline}"; allowed: "module:attribute"')
    top = module.partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(top, [entry or "." for entry in sys.path])
    if spec is None:
        raise ConfigError(f'run.pipeline = "{pipeline}": no module {top!r} beside the config or on the Python path')
    if spec.origin is None:
        origin = Path(next(iter(spec.submodule_search_locations or [])))
    else:
        origin = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
    directory = origin.resolve().parent
    installed = [*site.getsitepackages(), sysconfig.get_path("stdlib"), site.getusersitepackages()]
    return None if any(directory.is_relative_to(Path(place).resolve()) for place in installed) else str(directory)


def _carry(run_dir: RunDir, pipeline: Any) -> Path:
    """Write a pipeline object as a module into the run directory, for all nodes and later launches to import."""
    import ray.cloudpickle

    run_dir.create()
    folder = run_dir.path / ".pipeline"
    folder.mkdir(exist_ok=True)
    (folder / f"{CARRIED_MODULE}.py").write_text(CARRIED_SOURCE)
    (folder / f"{CARRIED_MODULE}.pkl").write_bytes(ray.cloudpickle.dumps(pipeline))
    return folder


def look_back(request: Request) -> Previous | None:
    """What the run directory holds of an earlier launch.

    Raises RunDirError where that was another job (and it is not forced).
    """
    run_dir = request.run_dir
    status = run_dir.read_status()
    if status is None:
        return None
    measured = max((line["step"] for line in run_dir.read_metrics()), default=0)
    # A job that was refused before its first step may be put right: nothing was learned.
    refused = status["state"] == "failed" and status["step"] == measured == 0
    if run_dir.config.exists() and not request.force and not refused:
        differences = learned_differences(load(run_dir.config), request.config)
        if differences:
            raise RunDirError(
                "\n".join(
                    [
                        f"run.directory = {run_dir} holds a run of another job:",
                        *(f"  {difference}" for difference in differences),
                        "choose another --run-dir, or --force to go on with the new values",
                    ]
                )
            )
    return Previous(
        run_id=status["run_id"], state=status["state"], step=max(status["step"], measured),
        incarnation=status["incarnation"], time=status["time"], record=Record.load(Folder(run_dir)),
    )  # fmt: skip


def write_config(request: Request) -> None:
    """The resolved config, for workers and later launches."""
    try:
        request.run_dir.config.write_text(to_toml(request.config))
    except OSError as error:
        raise RunDirError(f"run.directory = {request.run_dir}: {error.strerror}") from error


def to_document(request: Request) -> str:
    """A request as text, for a process of its own to run."""
    document = {
        "config": to_toml(request.config), "run_dir": str(request.run_dir), "path": sys.path,
        "module_directory": request.module_directory, "force": request.force, "command": request.command,
        "entry": request.entry, "preload": request.preload, "own_process": True, "handed_over": request.handed_over,
    }  # fmt: skip
    return json.dumps(document)


def from_document(text: str) -> Request:
    import tomllib

    document = json.loads(text)
    sys.path[:0] = [entry for entry in document.pop("path") if entry not in sys.path]
    document["config"] = parse(tomllib.loads(document["config"]))
    document["run_dir"] = RunDir(document["run_dir"])
    document["preload"] = tuple(document["preload"])
    return Request(**document)
