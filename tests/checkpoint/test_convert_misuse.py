"""`trainrt convert` where it cannot be done: one clear message, exit 2 for wrong input or 1 else, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.frameworks import llama
from trainrt import cli
from trainrt.checkpoint import convert as conversion
from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.source import digest

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "hf"
    llama(num_hidden_layers=1).save_pretrained(path)
    return path


@pytest.fixture
def model(_model: Path, tmp_path: Path) -> Path:
    """A model directory that may be spoiled."""
    shutil.copytree(_model, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command's words to its exit code and what it says on stderr."""

    def command(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["trainrt", "convert", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().err

    return command


def there(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


UNIVERSAL = ("--to", "universal")
MISUSE: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "memory": ("hf", "out", (*UNIVERSAL, "--memory", "1KB"), "--memory 1000: at least"),
    "no memory": ("hf", "out", (*UNIVERSAL, "--memory", "-1GiB"), "--memory -1GiB: allowed"),
    "no jobs": ("hf", "out", (*UNIVERSAL, "--jobs", "0"), "--jobs 0: at least 1"),
    "fewer jobs than none": ("hf", "out", (*UNIVERSAL, "--jobs", "-2"), "--jobs -2: at least 1"),
    "target in the source": ("hf", "hf/out", UNIVERSAL, "one is inside of the other"),
    "target in the source, by another way": ("hf", "linked/out", UNIVERSAL, "one is inside of the other"),
    "target is the source": ("hf", "hf", UNIVERSAL, "one is inside of the other"),
    "source in the target": ("nest/hf", "nest", UNIVERSAL, "one is inside of the other"),
    "no source": ("none", "out", UNIVERSAL, "none: no such directory"),
    "a file as source": ("a file", "out", UNIVERSAL, "a file: no such directory"),
    "an empty source": ("empty", "out", UNIVERSAL, "no checkpoint of a format that is known"),
    "a file as target": ("hf", "a file", UNIVERSAL, "is there already, and is no checkpoint"),
    "an empty target": ("hf", "empty", UNIVERSAL, "is there already, and is no checkpoint"),
    "a target of others": ("hf", "home", UNIVERSAL, "is there already, and is no checkpoint"),
    "a target of others, hf": ("hf", "home", ("--to", "hf"), "is there already, and is not what this conversion makes"),
    "a target of others, dcp": ("hf", "home", ("--to", "dcp"), "is there already, and damaged: __0_0.distcp: is not the file"),
    "a file above the target": ("hf", "a file/out", UNIVERSAL, "cannot be written to: Not a directory"),
    "a file above the target, dcp": ("hf", "a file/out", ("--to", "dcp"), "cannot be written to: Not a directory"),
    "config that is no JSON": ("spoiled", "out", UNIVERSAL, "spoiled/config.json: no JSON"),
    "config that is no object": ("listed", "out", UNIVERSAL, "listed/config.json: is no JSON object"),
    "config with a key twice": ("twice", "out", UNIVERSAL, "twice/config.json: the key 'a' stands twice"),
    "config of no model": ("odd", "out", ("--to", "dcp"), "config.json: no model can be made of it"),
    "model config that is none": ("bare", "out", (*UNIVERSAL, "--model-config", "a file"), "a file: no JSON"),
    "model config that is not there": ("bare", "out", (*UNIVERSAL, "--model-config", "empty"), "config.json: No such file"),
    "mapping that is none": ("hf", "out", (*UNIVERSAL, "--mapping", "a file"), "--mapping a file: "),
    "mapping that is not there": ("hf", "out", (*UNIVERSAL, "--mapping", "none"), "--mapping none: "),
    "format": ("hf", "out", ("--to", "deepseed"), 'did you mean "deepspeed"?'),
    "mesh": ("hf", "out", (*UNIVERSAL, "--mesh", "tp=2"), "--to universal is not cut by it"),
    "no world": ("hf", "out", ("--to", "deepspeed", "--world", "0"), "--world 0: at least 1"),
}  # fmt: skip


@pytest.fixture
def places(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a file").write_text("not a checkpoint")
    (tmp_path / "empty").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "photo.jpg").write_text("mine")
    (tmp_path / "linked").symlink_to(model)
    config = json.loads((model / "config.json").read_text())
    spoiled = {
        "spoiled": "{", "listed": "[1]", "twice": '{"a": 1, "a": 2}', "odd": json.dumps({**config, "hidden_size": "wide"}),
    }  # fmt: skip
    for name, text in spoiled.items():
        shutil.copytree(model, tmp_path / name)
        (tmp_path / name / "config.json").write_text(text)
    shutil.copytree(model, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    shutil.copytree(model, tmp_path / "nest" / "hf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_wrong_input_is_named_and_nothing_is_written(places: Path, run: Run) -> None:
    before = there(places)
    for case, (source, target, words, message) in MISUSE.items():
        code, said = run(source, target, *words)
        assert (code, message in said, "Traceback" in said) == (2, True, False), (case, code, said)
        assert said.startswith("trainrt: ") and there(places) == before, (case, said)


def test_a_source_that_changes_while_it_is_read_is_noticed(
    model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_jobs(*arguments: Any, **named: Any) -> None:
        original(*arguments, **named)
        os.utime(model / "model.safetensors", (1, 1))

    original = conversion.run_jobs
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "run_jobs", run_jobs)
        code, said = run(model, tmp_path / "out", *UNIVERSAL)
    assert (code, "has changed while it was read; --restart begins anew" in said) == (2, True)
    assert not (tmp_path / "out").exists()
    assert run(model, tmp_path / "out", *UNIVERSAL)[0] == 2
    assert run(model, tmp_path / "out", *UNIVERSAL, "--restart")[0] == 0
    assert digest(open_any(tmp_path / "out").source) == digest(open_any(model).source)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}


def test_a_journal_whose_first_line_was_not_finished_counts_for_nothing(model: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / ".out.converting").mkdir()
    (tmp_path / ".out.converting" / "journal.jsonl").write_text('{"finger')
    assert run(model, tmp_path / "out", *UNIVERSAL)[0] == 0
    assert digest(open_any(tmp_path / "out").source) == digest(open_any(model).source)


def test_a_job_that_dies_ends_the_command_and_the_next_one_goes_on(
    model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "write_range", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        code, said = run(model, tmp_path / "out", *UNIVERSAL)
    assert (code, "a job ended by SIGKILL" in said) == (1, True)
    assert not (tmp_path / "out").exists()
    assert run(model, tmp_path / "out", *UNIVERSAL)[0] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system of one's own needs root")
def test_a_full_disk_is_said_before_a_byte_is_written(model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = f"{sys.executable} -m trainrt.cli convert {model} {small}/out --to"
    script = (
        f"mount -t tmpfs -o size=16k tmpfs {small}; {command} universal; echo $?; {command} dcp; echo $?; "
        f"ls -A {small}; exit 0"
    )
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["2", "2"], done.stdout + done.stderr
    assert done.stderr.count("no room for a checkpoint of") == 2 and "Traceback" not in done.stderr
