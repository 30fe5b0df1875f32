"""Sequence parallelism: norms on each rank's positions, the same numbers, less memory; left alone where it does not pay."""

from __future__ import annotations

import pytest

from tests.parallel.architectures import batch, loss
from tests.parallel.test_architectures import blueprint
from tests.ranks import run_ranks
from trainrt.parallel.planner.activations import Activations
from trainrt.parallel.verify import Verdict


def split(rank: int, family: str, ranks: int, spoil: bool = False) -> tuple[bool, Verdict]:
    from torch.distributed.device_mesh import init_device_mesh

    from trainrt.parallel.planner.sharding import find_sharding
    from trainrt.parallel.sharded.collectives import GatherRows, _scatter_rows
    from trainrt.parallel.verify import compare_split

    if spoil:
        GatherRows.backward = staticmethod(  # type: ignore[method-assign]
            lambda ctx, *grads: (_scatter_rows(grads[0], ctx.dim, ctx.owners, ctx.group) / 2, None, None, None)
        )
    sharding = find_sharding(blueprint(family), ranks)
    return sharding.sequence, compare_split(blueprint(family), sharding, init_device_mesh("cpu", (ranks,)))


@pytest.mark.parametrize("family", ["gpt2", *(pytest.param(f, marks=pytest.mark.campaign) for f in ("llama", "bloom"))])
def test_positions_are_scattered_and_nothing_changes(family: str) -> None:
    for sequence, verdict in run_ranks(4, split, family, 4):
        assert sequence and verdict.right and verdict.gradient_error < 1e-12 and not verdict.gathered, verdict


def test_a_mixture_whose_rows_go_to_experts_keeps_its_activations_whole() -> None:
    sequence, verdict = run_ranks(2, split, "mixtral", 2)[0]
    assert not sequence and verdict.right and not verdict.gathered


def test_gradients_of_gathered_positions_are_summed_rightly() -> None:
    """Negative control: half of what comes back to each rank's positions."""
    sequence, verdict = run_ranks(2, split, "llama", 2, True)[0]
    assert sequence and verdict.loss_error < 1e-12 and not verdict.right


def kept(rank: int, sequence: bool) -> tuple[float, Activations]:
    """Bytes that a forward pass of a split Llama really keeps, and what was counted for it without the other ranks."""
    from dataclasses import replace

    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from tests.parallel.architectures import model
    from trainrt.parallel.planner.activations import _measure
    from trainrt.parallel.planner.probe import Blueprint, hollow
    from trainrt.parallel.planner.sharding import find_sharding
    from trainrt.parallel.sharded.model import shard_model

    def make() -> torch.nn.Module:
        with hollow():
            return model("llama")

    def sized(made: torch.nn.Module, positions: int) -> torch.Tensor:
        tokens = torch.arange(positions).unsqueeze(0) % 64
        logits = made(input_ids=tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    plan = Blueprint(make, lambda made: loss("llama", made, batch("llama")), lambda: "llama", sized)
    sharding = replace(find_sharding(plan, 2), sequence=sequence)
    counted = _measure(plan, model("llama"), sharding, torch.float32, 64)
    made = model("llama").train()
    shard_model(made, sharding.splits, init_device_mesh("cpu", (2,)), sequence=sequence)
    parameters = {p.to_local().untyped_storage().data_ptr() if hasattr(p, "to_local") else p.untyped_storage().data_ptr()
                  for p in made.parameters()}  # fmt: skip
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sized(made, 64)
    total = sum(t.untyped_storage().nbytes() for address, t in found.items() if address not in parameters)
    return float(total), counted


def test_what_is_counted_before_a_run_is_what_it_keeps() -> None:
    """Counted in runs of 8, 16 and 24 positions on one process; kept by a run of 64 on two."""
    bytes_of = {}
    for sequence in (False, True):
        for found, counted in run_ranks(2, kept, sequence):
            assert counted.kept + counted.outside == pytest.approx(found, rel=0.02)
        bytes_of[sequence] = counted
    assert bytes_of[True].kept < 0.9 * bytes_of[False].kept
    assert bytes_of[True].inputs == pytest.approx(bytes_of[False].inputs / 2, rel=0.01)
