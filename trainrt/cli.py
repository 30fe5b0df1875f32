"""The `trainrt` command: parse, call, print. No logic."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from trainrt.errors import ConfigError, TrainrtError, nearest

app = typer.Typer(
    name="trainrt",
    help="Train large language models on many machines, and keep training when machines fail.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
checkpoint_app = typer.Typer(help="Look into checkpoints and prove that they are whole.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")

SET = "Override a key, such as run.steps=200. May be given often."
VERIFY = "Compare a small model, split over real ranks, with one process; a plan that is launched always is."
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
RunDirectory = Annotated[Path, typer.Argument(help="The run directory.", metavar="RUN_DIR")]


@app.command()
def launch(
    config: Annotated[Path, typer.Argument(help="The job: a TOML file.", metavar="CONFIG.toml")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET)] = None,
    address: Annotated[str | None, typer.Option(help="Ray: local (start an embedded cluster), auto, or HOST:PORT.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes to train on (cluster.nodes).")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run directory, on storage that all nodes share.")] = None,
    detach: Annotated[bool, typer.Option(help="Return once the run is under way.")] = False,
    force: Annotated[bool, typer.Option(help="Go on in a directory whose job differs in what is learned.")] = False,
) -> None:  # fmt: skip
    """Train. In a directory that holds a run, go on with it."""
    from trainrt.config import load

    given = list(overrides or [])
    if nodes is not None:
        given.append(f"cluster.nodes={nodes}")
    if address is not None:
        given.append(f'cluster.address="{address}"')
    job = load(config, given)
    sys.path.insert(0, str(config.absolute().parent))
    from trainrt.launch import launch as start

    _leave(start(job, address=address, nodes=nodes, run_dir=run_dir, detach=detach, force=force))


@app.command()
def status(run_dir: RunDirectory, as_json: Json = False) -> None:
    """Say how a run is doing."""
    from trainrt.launch.control import status as read

    document = read(run_dir)
    if as_json:
        _print_json(document)
        return
    _print_rows("run", [(key, _text(value)) for key, value in document.items()])


@app.command()
def stop(run_dir: RunDirectory) -> None:
    """Ask a run to write a checkpoint and end; the same launch command goes on later."""
    from trainrt.launch.control import stop as ask

    print(ask(run_dir))


@app.command()
def evict(
    run_dir: RunDirectory, host: Annotated[str, typer.Argument(help="A host of the run, as verdicts name it.")]
) -> None:
    """Ask a run to go on without a host: a spare one takes its ranks, or the mesh shrinks."""
    from trainrt.launch.control import evict as ask

    print(ask(run_dir, host))


@app.command()
def plan(
    source: Annotated[Path, typer.Argument(help="A job, or a model directory.", metavar="CONFIG.toml|HF_CONFIG_DIR")],
    nodes: Annotated[int | None, typer.Option(help="Nodes (cluster.nodes).")] = None,
    devices_per_node: Annotated[int | None, typer.Option(help="Devices of a node (cluster.workers_per_node).")] = None,
    device: Annotated[str | None, typer.Option(help="Device to plan for: h100, say, a profile.json, or measured.")] = None,
    mesh: Annotated[str | None, typer.Option(help='The mesh, such as "tp=2,fsdp=4"; else the best one is looked for.')] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help=VERIFY)] = True,
    explain: Annotated[str | None, typer.Option(metavar="TENSOR", help="Where one tensor lies, and why.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show the parallel plan of a job without running it."""
    from trainrt.training.planning import load_for_plan, plan_command

    job = load_for_plan(source, nodes=nodes, devices_per_node=devices_per_node)
    made = plan_command(job, mesh=mesh, device=device, verify=verify and explain is None)
    document = made.to_json()
    if explain is not None:
        found = [entry for entry in document["parameters"] if entry["name"] == explain]
        if not found:
            raise ConfigError(
                f"--explain {explain}: no such tensor{nearest(explain, [e['name'] for e in document['parameters']])}"
            )
        document = found[0]
    if as_json:
        _print_json(document)
    else:
        _print_rows(
            "plan", made.table() if explain is None else [(key, _text(value)) for key, value in document.items()]
        )


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint of any format.", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="The directory to make.", metavar="DST")],
    to: Annotated[str, typer.Option(help="The target's format: see docs/checkpoint.md.")],
    mesh: Annotated[str | None, typer.Option(help="The mesh that the target is cut for, such as tp=2,pp=2.")] = None,
    world: Annotated[int | None, typer.Option(help="How many ranks the target is cut for (ZeRO).")] = None,
    zero_stage: Annotated[int | None, typer.Option(help="The stage of ZeRO: 1, 2 or 3; 1 by default.")] = None,
    adam: Annotated[str | None, typer.Option(help="Which Adam Megatron will load it with: fused or torch.")] = None,
    mapping: Annotated[Path | None, typer.Option(help="A file that describes the source's format.", metavar="FILE")] = None,
    model_config: Annotated[Path | None, typer.Option(help="A directory with config.json, where the source has none.")] = None,
    average: Annotated[bool, typer.Option(help="Take the mean of replicas that differ, instead of stopping.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Processes; by default one a core.")] = None,
    memory: Annotated[str, typer.Option(help="How much memory may be used, such as 2GiB.")] = "2GiB",
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and what would be lost.")] = False,
    restart: Annotated[bool, typer.Option(help="Begin anew where a conversion was interrupted.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Convert a checkpoint. After an interruption the same command goes on where it was."""
    from trainrt.checkpoint.convert import convert as run
    from trainrt.checkpoint.progress import Bar, memory_bytes
    from trainrt.checkpoint.targets import Shape

    with Bar("converting", quiet=as_json) as bar:
        document = run(
            source, target, to=to, shape=Shape.parse(mesh, world=world, zero_stage=zero_stage, adam=adam),
            mapping=mapping, model_config=model_config, average=average, jobs=jobs, memory_bytes=memory_bytes(memory),
            dry_run=dry_run, restart=restart, progress=bar.update,
        )  # fmt: skip
    if as_json:
        _print_json(document)
    else:
        _print_rows(
            "would be converted" if dry_run else "converted", [(key, _text(value)) for key, value in document.items()]
        )


@checkpoint_app.command("inspect")
def inspect_checkpoint(path: Annotated[Path, typer.Argument(help="A checkpoint.")], as_json: Json = False) -> None:
    """List the tensors of a checkpoint with their digests."""
    from trainrt.checkpoint.inspect import inspect

    document = inspect(path)
    if as_json:
        _print_json(document)
        return
    table = Table(
        "name", "role", "dtype", "shape", "digest", title=f"{document['format']} checkpoint of step {document['step']}"
    )
    for tensor in document["tensors"]:
        table.add_row(
            tensor["name"], tensor["role"], tensor["dtype"], "x".join(map(str, tensor["shape"])), tensor["digest"]
        )
    Console().print(table)


@checkpoint_app.command("verify")
def verify_checkpoint(path: Annotated[Path, typer.Argument(help="A checkpoint.")], as_json: Json = False) -> None:
    """Read every byte of a checkpoint and compare it with its checksums. Exit 1 if anything is wrong."""
    from trainrt.checkpoint.inspect import verify

    document = verify(path)
    if as_json:
        _print_json(document)
    elif document["ok"]:
        print(f"{path}: whole: {document['tensors']} tensors, {document['bytes']} bytes, every checksum right")
    else:
        for problem in document["problems"]:
            print(f"{path}: {problem['file']}: {problem['tensor'] or problem['kind']}: {problem['message']}")
    raise typer.Exit(0 if document["ok"] else 1)


@checkpoint_app.command("diff")
def diff_checkpoints(
    one: Annotated[Path, typer.Argument(help="A checkpoint.", metavar="PATH")],
    other: Annotated[Path, typer.Argument(help="Another one, of any format.", metavar="PATH")],
    as_json: Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor. Exit 1 if they differ."""
    from trainrt.checkpoint.inspect import diff

    document = diff(one, other)
    if as_json:
        _print_json(document)
    else:
        table = Table("name", "role", "kind", "max abs", "max rel", title=f"{one} and {other}")
        for line in document["tensors"]:
            if line["kind"] != "equal":
                table.add_row(line["name"], line["role"], line["kind"], _text(line["max_abs"]), _text(line["max_rel"]))
        Console().print(table if not document["equal"] else f"equal: {len(document['tensors'])} tensors")
    raise typer.Exit(0 if document["equal"] else 1)


@app.command()
def dashboard(
    run_dir: RunDirectory,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback needs --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8300,
    token: Annotated[str | None, typer.Option(help="Ask visitors for this token.")] = None,
) -> None:
    """Show a run, live or finished, on a web page."""
    from trainrt.diagnostics.page.server import serve

    serve(run_dir, host=host, port=port, token=token)


@app.command()
def diagnose(
    source: Annotated[
        Path, typer.Argument(help="A run directory, or a trace (.csv, .parquet).", metavar="RUN_DIR|TRACE")
    ],
    as_json: Json = False,
) -> None:
    """Say what is slow, why, what it costs, and what to do."""
    from trainrt.diagnostics.diagnose import diagnose as run
    from trainrt.diagnostics.words import lines

    document = run(source)
    if as_json:
        _print_json(document)
    else:
        print("\n".join(lines(document)))


@app.command()
def doctor(
    address: Annotated[
        str, typer.Option(help="Ray: local (simulated nodes of this machine), auto, or HOST:PORT.")
    ] = "local",
    nodes: Annotated[int | None, typer.Option(help="How many nodes; by default 2 locally, else all.")] = None,
    as_json: Json = False,
) -> None:
    """Check the nodes, links and collectives of a cluster. Exit 1 if one is not like its peers."""
    from trainrt.launch.doctor import doctor as examine
    from trainrt.launch.doctor import table as shown

    document = examine(address=address, nodes=nodes)
    if as_json:
        _print_json(document)
    else:
        head, rows, lines = shown(document)
        table = Table(*head, title="ok" if document["ok"] else "not ok")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        print("\n".join(lines))
    _leave(0 if document["ok"] else 1)


def _leave(code: int) -> NoReturn:
    """End at once. All is closed, and taking down an interpreter with torch and Ray in it takes more than a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1))


def _print_rows(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False)
    for key, value in rows:
        table.add_row(key, value)
    Console().print(table)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def main() -> None:
    """The console script. Exit codes: 0 done, 1 failed, 2 wrong input, 75 interrupted, 130 Ctrl-C."""
    debug = os.environ.get("TRAINRT_DEBUG") == "1"
    try:
        app()
    except TrainrtError as error:
        if debug:
            traceback.print_exc()
        else:
            print("\n".join(f"trainrt: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        print(f"trainrt: {type(error).__name__}: {error} (TRAINRT_DEBUG=1 shows where)", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
