"""Conversion beside DeepSpeed's own, and saving and loading beside torch.distributed.checkpoint.

    python -m benchmarks.convert [--rounds 5] [--ranks 4,8] [--layers 12]

A Llama of 134M parameters (12 layers) is made by a real `deepspeed.initialize` under ZeRO 3 with Adam, once for each number of
ranks: 1.6 GB of float32 masters and moments. Each round converts it to a universal checkpoint, by `trainrt convert` and by
`ds_to_universal` in turn, each a fresh process with a cold page cache. Then four ranks save and load the same state with
torch.distributed.checkpoint and with ours: rows to rows, and rows to columns. Ours checks every byte, and syncs its files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.recovery import forget
from trainrt.checkpoint.source import MemorySource
from trainrt.checkpoint.together import fill_together, open_together
from trainrt.checkpoint.writer import WritePlan, finish, prepare, write_part
from trainrt.parallel.layout import Box, Fragment, Layout, LogicalTensor, contiguous_strides

ROOT = Path(__file__).parents[1]
MODEL = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12,
    "tie_word_embeddings": False,
}  # fmt: skip
ROLES = ("parameter", "exp_avg", "exp_avg_sq")
SAVERS = 4
Found = dict[str, list[dict[str, float]]]


# Conversion.


def model(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **MODEL))


def deepspeed_rank(rank: int, world: int, port: int, folder: Path, layers: int) -> None:
    """One step of the model, saved."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    import deepspeed

    torch.set_num_threads(1)
    # Nothing is to be compiled (see tests/checkpoint/frameworks.py).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    made = model(layers)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    engine, _, _, _ = deepspeed.initialize(model=made, optimizer=optimizer, config=config)
    tokens = torch.randint(0, MODEL["vocab_size"], (1, 16))
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    engine.save_checkpoint(str(folder))


MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[2:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE).returncode
seconds = time.perf_counter() - start
counts = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
json.dump({"code": code, "seconds": seconds, "peak": peak, "written": int(counts["write_bytes"]),
           "read": int(counts["read_bytes"])}, open(sys.argv[1], "w"))
"""


def measured(words: list[str], *, cold: Path, target: Path) -> dict[str, float]:
    """Run a command on files that are not in the page cache. Seconds, bytes from and to the disk, largest process, files made."""
    forget(cold)
    shutil.rmtree(target, ignore_errors=True)
    # What the command before left to be written would be written beside this one.
    os.sync()
    with tempfile.NamedTemporaryFile() as file:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", MEASURE, file.name, *words], check=True, env=environment, cwd=ROOT)
        found = json.loads(Path(file.name).read_text())
    if found.pop("code"):
        raise SystemExit(f"{' '.join(words)} failed")
    return {**found, "files": sum(path.is_file() for path in target.rglob("*"))}


def conversions(folder: Path, ranks: int, found: Found) -> None:
    source, tag = folder / f"zero-{ranks}", folder / f"zero-{ranks}" / "global_step1"
    ours, theirs = folder / "ours", folder / "theirs"
    words = [sys.executable, "-m", "trainrt.cli", "convert", str(source), str(ours), "--to", "universal"]
    found[f"{ranks} ranks, trainrt convert"].append(measured(words, cold=source, target=ours))
    words[5:] = [str(folder / "deepspeed"), "--to", "deepspeed-universal"]
    found[f"{ranks} ranks, trainrt convert to DeepSpeed universal"].append(
        measured(words, cold=source, target=folder / "deepspeed")
    )
    words = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "2"]
    words += ["--num_merge_workers", "2", "--input_folder", str(tag), "--output_folder", str(theirs)]
    found[f"{ranks} ranks, ds_to_universal"].append(measured(words, cold=source, target=theirs))


# Saving and loading.


class State:
    """The model's parameters and moments on one of several ranks: rows, or columns, of every tensor."""

    def __init__(self, rank: int, layers: int) -> None:
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in model(layers).named_parameters()}
        self.tensors = {(n, role): LogicalTensor(n, role, "float32", s) for n, s in shapes.items() for role in ROLES}
        self.rank = rank

    def box(self, tensor: LogicalTensor, rank: int, dim: int) -> Box:
        dim = min(dim, len(tensor.shape) - 1)
        piece = -(-tensor.shape[dim] // SAVERS)
        start = min(rank * piece, tensor.shape[dim])
        offset, length = [0] * len(tensor.shape), list(tensor.shape)
        offset[dim], length[dim] = start, min(piece, tensor.shape[dim] - start)
        return Box(tuple(offset), tuple(length))

    def layout(self, dim: int, ranks: range) -> Layout:
        layout = Layout()
        for tensor in self.tensors.values():
            for rank in ranks:
                box = self.box(tensor, rank, dim)
                layout.add(tensor, Fragment(rank, box, f"{tensor.role}/{tensor.name}", contiguous_strides(box.length)))
        return layout

    def values(self, dim: int, *, fill: float | None = None) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.rank)
        made = {}
        for tensor in self.tensors.values():
            shape = self.box(tensor, self.rank, dim).length
            key = f"{tensor.role}/{tensor.name}"
            made[key] = torch.full(shape, fill) if fill is not None else torch.rand(shape, generator=generator)
        return made

    def shared(self, values: dict[str, torch.Tensor], folder: Path) -> MemorySource:
        """All ranks' rows, in memory that all of them see, as stores have them."""
        import torch.distributed as dist

        place = Path("/dev/shm") / folder.name
        place.mkdir(exist_ok=True)
        torch.cat([value.flatten() for value in values.values()]).numpy().tofile(place / str(self.rank))
        dist.barrier()
        layout, arrays = self.layout(0, range(SAVERS)), {}
        for rank in range(SAVERS):
            flat, at = np.memmap(place / str(rank), np.uint8, "r"), 0
            for tensor in self.tensors.values():
                size = self.box(tensor, rank, 0).elements * tensor.item_bytes
                arrays[rank, f"{tensor.role}/{tensor.name}"] = flat[at : at + size]
                at += size
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(place)
        return MemorySource(layout, arrays)


def io_rank(rank: int, port: int, folder: Path, layers: int, rounds: int) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=SAVERS)
    state, mesh = State(rank, layers), init_device_mesh("cpu", (SAVERS,))
    values = state.values(0)
    source = state.shared(values, folder)
    found: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, work: Callable[[], Any]) -> None:
        if rank == 0:
            forget(folder)
        dist.barrier()
        start = time.perf_counter()
        work()
        dist.barrier()
        found[name].append(time.perf_counter() - start)

    def distributed(held: dict[str, torch.Tensor], dim: int) -> dict[str, DTensor]:
        made = {}
        for tensor in state.tensors.values():
            key = f"{tensor.role}/{tensor.name}"
            along = min(dim, len(tensor.shape) - 1)
            strides = contiguous_strides(tensor.shape)
            made[key] = DTensor.from_local(
                held[key], mesh, [Shard(along)], shape=torch.Size(tensor.shape), stride=strides, run_check=False
            )
        return made

    whole, seats = state.layout(0, range(SAVERS)), {number: f"r{number}" for number in range(SAVERS)}

    def save_ours() -> None:
        plan = WritePlan.build(whole, {"step": 1, "model_config": {}}, writers=[*seats.values()], writer_of_rank=seats)
        if rank == 0:
            prepare(plan, folder / "ours")
        dist.barrier()
        results: list[Any] = [None] * SAVERS
        dist.all_gather_object(results, write_part(plan, folder / "ours", seats[rank], source))
        if rank == 0:
            finish(plan, folder / "ours", [entry for result in results for entry in result])

    def load_ours(dim: int) -> None:
        held = state.values(dim, fill=0.0)
        arrays = {(rank, key): value.view(-1).view(torch.uint8).numpy() for key, value in held.items()}
        universal = open_together(folder / "ours" / "step-00000001", dist.group.WORLD, torch.device("cpu"))
        fill_together(
            state.layout(dim, range(rank, rank + 1)), arrays, universal, group=dist.group.WORLD, device=torch.device("cpu")
        )  # fmt: skip
        if dim == 0:
            assert all(torch.equal(held[key], values[key]) for key in values)

    def load_dcp(dim: int) -> None:
        held = distributed(state.values(dim, fill=0.0), dim)
        dcp.load(held, checkpoint_id=folder / "dcp")
        if dim == 0:
            assert all(torch.equal(held[key].to_local(), values[key]) for key in values)

    for _ in range(rounds):
        if rank == 0:
            shutil.rmtree(folder / "dcp", ignore_errors=True)
            shutil.rmtree(folder / "ours", ignore_errors=True)
            (folder / "ours").mkdir()
        timed("save, ours", save_ours)
        timed("save, DCP", lambda: dcp.save(distributed(values, 0), checkpoint_id=folder / "dcp"))
        timed("load rows, ours", lambda: load_ours(0))
        timed("load rows, DCP", lambda: load_dcp(0))
        timed("load columns, ours", lambda: load_ours(1))
        timed("load columns, DCP", lambda: load_dcp(1))
    if rank == 0:
        (folder / "times.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


# The report.


def ratios(ours: list[float], theirs: list[float]) -> str:
    pairs = [b / a for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(pairs):.2f}x ({min(pairs):.2f}-{max(pairs):.2f})"


def report(found: Found, times: dict[str, list[float]], ranks: list[int]) -> None:
    for name, rows in found.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        read, written, peak = (middle[key] / 1e9 for key in ("read", "written", "peak"))
        print(
            f"  {name:52s} {middle['seconds']:6.2f} s   read {read:5.2f} GB  written {written:5.2f} GB"
            f"  largest process {peak:5.2f} GB  files {middle['files']:.0f}"
        )
    for count in ranks:
        names = (f"{count} ranks, trainrt convert", f"{count} ranks, ds_to_universal")
        ours, theirs = ([row["seconds"] for row in found[name]] for name in names)
        print(f"  {count} ranks: trainrt convert is faster by {ratios(ours, theirs)}")
    for what in ("save", "load rows", "load columns"):
        ours, theirs = times[f"{what}, ours"], times[f"{what}, DCP"]
        print(
            f"  {what:14s} ours {statistics.median(ours):6.2f} s   DCP {statistics.median(theirs):6.2f} s   "
            f"faster by {ratios(ours, theirs)}"
        )


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[4, 8])
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "OMP_NUM_THREADS": "1"}
    found: Found = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        folder = Path(name)
        for ranks in options.ranks:
            words = (ranks, free_port(), folder / f"zero-{ranks}", options.layers)
            torch.multiprocessing.spawn(deepspeed_rank, words, nprocs=ranks)
            for _ in range(options.rounds):
                conversions(folder, ranks, found)
            shutil.rmtree(folder / f"zero-{ranks}")
        for leftover in ("ours", "theirs", "deepspeed"):
            shutil.rmtree(folder / leftover, ignore_errors=True)
        torch.multiprocessing.spawn(io_rank, (free_port(), folder, options.layers, options.rounds), nprocs=SAVERS)
        times = json.loads((folder / "times.json").read_text())
    print(f"{options.layers} layers, {options.rounds} rounds, medians")
    report(found, times, options.ranks)


if __name__ == "__main__":
    main()
