"""Which families each framework's tensor parallelism gets right; a part of `benchmarks.tensor_parallel`, which see."""

from __future__ import annotations

import functools
import json
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.tensor_parallel_arms import Arm, DeepSpeed, HuggingFace, Ours, Pair, Unmatched
from tests.parallel import architectures

RANKS = 2
FRAMEWORKS = {"ours": "trainrt tp 2", "hf": "Hugging Face tp_plan", "deepspeed": "DeepSpeed AutoTP"}
LOSS_ERROR, GRADIENT_ERROR, STEPPED_ERROR = 1e-6, 5e-6, 1e-5
NOTHING = 1e-6
"""Gradients smaller than this part of all are rounding (a key's bias moves no softmax): they have to stay so small."""
REPLICATED = 0.95
PRESETS = ("llama", "bloom", "mixtral", "deepseek_v2", "qwen2", "phi3")
"""Families that DeepSpeed has a plan for besides the automatic one, under the same names."""
STEPS, RATE = 3, 0.05
GRACE = 10.0
"""Seconds that a rank may be later than the other."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a cell is about. `double`: in float64, to see whether what is off is more than rounding."""

    framework: str
    family: str
    preset: str | None = None
    double: bool = False


@dataclass(slots=True)
class Cell:
    """What one rank saw. `stage`: how far it got; `off`: parameters whose gradient is wrong, of `compared`."""

    stage: str = "splitting"
    error: str = ""
    held: float = 1.0
    loss: float = 0.0
    worst: float = 0.0
    name: str = ""
    off: int = 0
    compared: int = 0
    unmatched: str = ""
    stepped: float = 0.0

    @property
    def right(self) -> bool:
        by_gradient = not self.unmatched and self.off == 0
        by_steps = bool(self.unmatched) and self.stepped <= STEPPED_ERROR
        return self.stage == "done" and self.loss <= LOSS_ERROR and (by_gradient or by_steps)


def loss_of(family: str, model: Any) -> Tensor:
    words = {} if family in ("vit", "bert") else {"use_cache": False}
    return model(**architectures.batch(family), **words).loss


def split(task: Task, saved: Path) -> Arm:
    mesh = init_device_mesh("cpu", (RANKS,))
    make = functools.partial(architectures.model, task.family)
    loss = functools.partial(loss_of, task.family)
    if task.framework == "ours":
        return Ours(make, loss, mesh)
    if task.framework == "hf":
        return HuggingFace(type(make()), saved, loss, mesh, attention="eager")
    return DeepSpeed(make, loss, mesh, samples=architectures.SAMPLES, preset=task.preset)


def examine(task: Task, saved: Path, cell: Cell) -> None:
    """Fill the cell: split, run, compare with one process."""
    single = architectures.model(task.family)
    alone = Arm(single, functools.partial(loss_of, task.family))
    expected = alone.loss()
    alone.backward(expected)
    wanted = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in single.named_parameters()}
    arm = split(task, saved)
    cell.held = arm.held() / sum(p.numel() for p in single.parameters())
    cell.stage = "running"
    loss = arm.loss()
    cell.loss = abs(loss.item() / expected.item() - 1)
    arm.backward(loss)
    cell.stage = "comparing"
    try:
        compare(arm.pairs(wanted), wanted, cell)
    except Unmatched as reason:
        cell.unmatched = str(reason)
        cell.stepped = abs(stepped(arm) / stepped(alone) - 1)
    cell.stage = "done"


def compare(pairs: Any, wanted: Mapping[str, Tensor], cell: Cell) -> None:
    everything = float(torch.stack([g.double().norm() for g in wanted.values()]).norm())
    pair: Pair
    for pair in pairs:
        name, got, want = pair
        floor = NOTHING * everything
        whole = float(wanted[name].double().norm())
        if whole < floor:
            error = 0.0 if float(got.double().norm()) < floor else float(got.double().norm()) / floor
        else:
            error = float((got.double() - want.double()).norm()) / whole
        cell.compared += 1
        if not error <= GRADIENT_ERROR:
            cell.off += 1
        if error > cell.worst or error != error:
            cell.worst, cell.name = error, name


def stepped(arm: Arm) -> float:
    """The loss after steps of SGD; its gradients have been computed once."""
    optimizer = torch.optim.SGD(arm.model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.step()
        optimizer.zero_grad()
        loss = arm.loss()
        arm.backward(loss)
    return loss.item()


def worker(task: Task, folder: Path, rank: int) -> None:
    """One rank of one cell: what it saw goes into a file, what it prints into another."""
    log = os.open(folder / f"log-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64 if task.double else torch.float32)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'ranks'}", rank=rank, world_size=RANKS)
    cell = Cell()
    try:
        examine(task, folder / "saved", cell)
    except Exception as error:
        cell.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
        traceback.print_exc()
    (folder / f"cell-{rank}").write_text(json.dumps(asdict(cell)))
    # The other rank may wait in a collective that never comes: no farewell.
    os._exit(0)


def measure(task: Task, *, seconds: float, logs: Path | None) -> list[Cell]:
    """Both ranks of a cell in fresh processes; a rank that says nothing has no cell."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        architectures.model(task.family).save_pretrained(folder / "saved")
        context = mp.get_context("forkserver")
        ranks = [context.Process(target=worker, args=(task, folder, rank)) for rank in range(RANKS)]
        files = [folder / f"cell-{rank}" for rank in range(RANKS)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
            if any(file.exists() for file in files):
                # Its peer has the same to say soon, or waits for it in vain.
                deadline = min(deadline, time.monotonic() + GRACE)
        for process in ranks:
            process.kill()
            process.join()
        for log in folder.glob("log-*") if logs is not None else ():
            (logs / f"{task.family}-{task.framework}-{log.name}").write_text(log.read_text())
        return [Cell(**json.loads(file.read_text())) for file in files if file.exists()]


def verdict(cells: list[Cell], seconds: float) -> str:
    """The table's words for what the ranks saw: the worst of them."""
    if not cells:
        return f"wrong: no answer in {seconds:.0f} s"
    failed = next((cell for cell in cells if cell.error), None)
    if failed is not None and failed.stage == "splitting":
        return f"refused: {_short(failed.error)}"
    if failed is not None:
        return f"wrong: fails {failed.stage}: {_short(failed.error)}"
    held = f"{sum(cell.held for cell in cells) / len(cells):.2f}"
    if len(cells) < RANKS:
        return f"wrong: one rank hangs ({held})"
    off = [cell for cell in cells if not cell.right]
    if not off:
        by_steps = " by steps" if any(cell.unmatched for cell in cells) else ""
        idle = float(held) > REPLICATED
        return f"replicated {held}{by_steps}" if idle else f"right {held}{by_steps}"
    cell = max(off, key=lambda cell: (cell.loss > LOSS_ERROR, cell.off, cell.stepped))
    wrong = [f"loss off by {cell.loss:.0e}"] if cell.loss > LOSS_ERROR else []
    if cell.unmatched:
        wrong.append(f"loss off by {cell.stepped:.0e} after {STEPS} steps")
    elif cell.off:
        wrong.append(f"{cell.off} of {cell.compared} gradients, {cell.name} by {cell.worst:.0e}")
    return f"wrong: {', '.join(wrong)} ({held})"


def _short(error: str, most: int = 80) -> str:
    """The message without its class, cut after a word."""
    said = error.partition(": ")[2] or error
    return said if len(said) <= most else f"{said[:most].rpartition(' ')[0]} ..."


def attempt(task: Task, *, seconds: float, logs: Path | None) -> str:
    """A cell's text; what runs and is off is measured again in float64, where rounding is not."""
    cells = measure(task, seconds=seconds, logs=logs)
    text = verdict(cells, seconds)
    if text.startswith("wrong") and len(cells) == RANKS and not any(cell.error for cell in cells):
        again = verdict(measure(replace(task, double=True), seconds=seconds, logs=logs), seconds)
        return f"{again}, in float64" if again.startswith("right") else text
    return text


def tell(task: Task, *, seconds: float, logs: Path | None) -> str:
    """DeepSpeed's preset is asked where the automatic plan fails."""
    text = attempt(task, seconds=seconds, logs=logs)
    if task.framework == "deepspeed" and task.family in PRESETS and not text.startswith("right"):
        preset = attempt(replace(task, preset=task.family), seconds=seconds, logs=logs)
        return f"{preset}, by preset" if preset.startswith("right") else f"{text}; by preset {preset}"
    return text


def coverage(families: list[str], frameworks: list[str], *, markdown: bool, seconds: float, logs: Path | None) -> None:
    transformers.utils.logging.disable_progress_bar()
    mp.get_context("forkserver").set_forkserver_preload(["benchmarks.tensor_parallel_coverage"])
    table: dict[str, list[str]] = {}
    for family in families:
        label = architectures.FAMILIES[family].label
        table[label] = []
        for framework in frameworks:
            table[label].append(tell(Task(framework, family), seconds=seconds, logs=logs))
            line = f"{label:20s} {FRAMEWORKS[framework]:22s} {table[label][-1]}"
            print(line, file=sys.stderr if markdown else sys.stdout, flush=True)
    if markdown:
        print(as_markdown(table, frameworks))
    for column, framework in enumerate(frameworks):
        right = sum(row[column].startswith("right") for row in table.values())
        print(f"{FRAMEWORKS[framework]}: {right} of {len(table)} right")


def as_markdown(table: Mapping[str, list[str]], frameworks: list[str]) -> str:
    heads = ("family", *(FRAMEWORKS[framework] for framework in frameworks))
    rows = [[label, *(text.replace("|", "\\|") for text in row)] for label, row in table.items()]
    lines = (heads, ["---"] * len(heads), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
