"""How long a step of a split Llama takes on each path; a part of `benchmarks.tensor_parallel`, which see."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from benchmarks.tensor_parallel_arms import Arm, HuggingFace, Ours, Tutorial

RANKS = 2
ARMS = {
    "ours": "trainrt", "whole": "trainrt, activations whole", "tutorial": "torch's tutorial", "hf": "Hugging Face tp_plan",
}  # fmt: skip
PLANNED = (1, 16)
"""The batch that plans are made from."""
SAME = 1e-5


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama and its batch; `steps` of it make a round."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    samples: int
    length: int
    steps: int
    vocabulary: int = 8192

    def model(self) -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2, intermediate_size=self.intermediate, vocab_size=self.vocabulary,
            max_position_embeddings=self.length,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        return transformers.LlamaForCausalLM(config).float()


SIZES = {
    "large": Size(hidden=1024, layers=8, heads=16, intermediate=2816, samples=2, length=512, steps=1),
    "small": Size(hidden=512, layers=4, heads=8, intermediate=1408, samples=2, length=256, steps=4),
}


def loss_of(shape: tuple[int, int], vocabulary: int, model: Any) -> Tensor:
    """Each token is to be told from the one before."""
    tokens = torch.randint(vocabulary, (shape[0], shape[1] + 1), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Racer:
    """An arm, and what its making left in torch: split execution replaces how a Function is applied, for all of the process."""

    def __init__(self, make: Callable[[], Arm]) -> None:
        plain = torch.autograd.Function.__dict__["apply"]
        self.arm = make()
        self._applied = torch.autograd.Function.__dict__["apply"]
        torch.autograd.Function.apply = plain
        self.milliseconds: list[float] = []

    def step(self) -> Tensor:
        self.arm.model.zero_grad(set_to_none=True)
        plain = torch.autograd.Function.__dict__["apply"]
        torch.autograd.Function.apply = self._applied
        loss = self.arm.loss()
        self.arm.backward(loss)
        torch.autograd.Function.apply = plain
        return loss.detach()

    def race(self, steps: int) -> None:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        dist.barrier()
        self.milliseconds.append((time.perf_counter() - start) / steps * 1e3)

    def collectives(self) -> Counter[str]:
        """What goes over the wire in a step, by name."""
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            self.step()
        return Counter(event.name for event in profiler.events() if event.name.startswith("gloo:"))


def racers(size: Size, names: list[str], saved: Path) -> dict[str, Racer]:
    mesh = init_device_mesh("cpu", (RANKS,))
    loss = functools.partial(loss_of, (size.samples, size.length), size.vocabulary)
    planned = functools.partial(loss_of, PLANNED, size.vocabulary)
    makes: dict[str, Callable[[], Arm]] = {
        "ours": lambda: Ours(size.model, loss, mesh, planned=planned),
        "whole": lambda: Ours(size.model, loss, mesh, planned=planned, sequence=False),
        "tutorial": lambda: Tutorial(size.model, loss, mesh),
        "hf": lambda: HuggingFace(transformers.LlamaForCausalLM, saved, loss, mesh, attention="sdpa"),
    }
    return {name: Racer(makes[name]) for name in names}


def worker(rank: int, folder: Path, sizes: list[str], names: list[str], rounds: int) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group("gloo", init_method=f"file://{folder / 'ranks'}", rank=rank, world_size=RANKS)
    for key in sizes:
        size = SIZES[key]
        if rank == 0:
            size.model().save_pretrained(folder / key)
        dist.barrier()
        field = racers(size, names, folder / key)
        losses = {name: float(racer.step()) for name, racer in field.items()}
        if max(losses.values()) / min(losses.values()) > 1 + SAME:
            raise RuntimeError(f"not the same computation: {losses}")
        for turn in range(rounds):
            for position in range(len(names)):
                field[names[(turn + position) % len(names)]].race(size.steps)
        called = {name: racer.collectives() for name, racer in field.items()}
        if rank == 0:
            report(key, size, {name: racer.milliseconds for name, racer in field.items()}, called)
    dist.destroy_process_group()


def report(key: str, size: Size, times: dict[str, list[float]], called: dict[str, Counter[str]]) -> None:
    rounds = len(next(iter(times.values())))
    print(
        f"{key}: hidden {size.hidden}, {size.layers} layers, {size.samples} x {size.length} tokens; "
        f"forward and backward, {rounds} interleaved rounds; ratios of a peer's time to ours: above 1 ours is faster"
    )
    for name, found in times.items():
        line = f"  {ARMS[name]:22s} {statistics.median(found):9.1f} ms  ({min(found):.1f} - {max(found):.1f})"
        if name != "ours" and "ours" in times:
            ratios = [theirs / mine for theirs, mine in zip(found, times["ours"], strict=True)]
            line += f"  ratio {statistics.median(ratios):.3f}  ({min(ratios):.3f} - {max(ratios):.3f})"
        calls = ", ".join(f"{n} {kind.removeprefix('gloo:')}" for kind, n in sorted(called[name].items()))
        print(f"{line}  [{calls}]", flush=True)


def speed(sizes: list[str], names: list[str], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (Path(folder), sizes, names, rounds), nprocs=RANKS)
