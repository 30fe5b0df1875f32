"""Split tensors outside of what a verification runs: random numbers, and what a user's loss makes of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.parallel.architectures import batch, loss, model
from tests.ranks import run_ranks


def dropped(rank: int, drawn_alike: bool) -> tuple[float, float]:
    """The loss of GPT-2 in training, with dropout everywhere, in one process and split."""
    from torch.distributed.device_mesh import init_device_mesh

    from tests.parallel.test_architectures import blueprint
    from trainrt.parallel.planner.sharding import find_sharding
    from trainrt.parallel.sharded.model import full, shard_model
    from trainrt.parallel.sharded.tensor import RULES

    if not drawn_alike:
        RULES["native_dropout"] = lambda axis, func, args, kwargs: NotImplemented
        RULES["bernoulli"] = RULES["pointwise"]
    made = model("gpt2").double()
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    made.train()
    torch.manual_seed(1)
    expected = float(loss("gpt2", made, batch("gpt2")))
    shard_model(made, find_sharding(blueprint("gpt2"), 2).splits, init_device_mesh("cpu", (2,)))
    torch.manual_seed(1 if drawn_alike else 1 + rank)
    return expected, float(full(loss("gpt2", made, batch("gpt2"))).detach())


def test_dropout_drops_what_a_single_process_drops() -> None:
    for expected, found in run_ranks(2, dropped, True):
        assert found == pytest.approx(expected, rel=1e-12)


def test_other_random_numbers_are_noticed() -> None:
    """Negative control: each rank draws from a stream of its own."""
    assert any(abs(found - expected) > 1e-3 for expected, found in run_ranks(2, dropped, False))


def split_loss(rank: int) -> tuple[bool, list[float], list[float]]:
    """A user's loss that ends in a tensor whose gradient is spread over the ranks: logits of a vocabulary that is cut."""
    import torch.distributed as dist

    from trainrt.parallel.sharded import rules  # noqa: F401  what operators become
    from trainrt.parallel.sharded.owners import Owners
    from trainrt.parallel.sharded.tensor import Axis, Sharded
    from trainrt.training.objectives import evaluate_loss

    assert dist.group.WORLD is not None
    whole = torch.arange(6.0, requires_grad=True)
    axis, owners = Axis(dist.group.WORLD), Owners([0, 0, -1, 1, 1, -1], 2)
    logits = Sharded(axis.take(axis.enter(whole), 0, owners), axis, dim=0, owners=owners)
    made = evaluate_loss(lambda model, batch: (F.silu(logits[[2, 5]]).sum(), 2), torch.nn.Identity(), {})
    made.total().backward()
    other = torch.arange(6.0, requires_grad=True)
    F.silu(other[[2, 5]]).sum().backward()
    assert whole.grad is not None and other.grad is not None
    return type(made.sum) is torch.Tensor, whole.grad.tolist(), other.grad.tolist()


def test_a_loss_of_split_outputs_is_a_plain_tensor_with_the_whole_gradient() -> None:
    for plain, found, expected in run_ranks(2, split_loss):
        assert plain and found == pytest.approx(expected)
