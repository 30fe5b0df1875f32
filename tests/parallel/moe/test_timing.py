"""What a mixture is said to take backward includes the gradients of weights that were gathered."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from tests.parallel.moe.spreading import spread
from tests.ranks import run_ranks

SLOW_SECONDS = 0.1


def backward_seconds(rank: int, r: int) -> float:
    """Of one call, where each gathered weight's gradient takes its time."""
    import torch.distributed as dist

    from trainrt.parallel.moe import flex
    from trainrt.parallel.moe.experts import Experts
    from trainrt.parallel.moe.strategy import Choice, Strategy
    from trainrt.parallel.moe.timing import Times

    backward = flex.GatherSlices.backward

    def slow(ctx: object, *grads: torch.Tensor) -> object:
        time.sleep(SLOW_SECONDS)
        return backward(ctx, *grads)

    flex.GatherSlices.backward = staticmethod(slow)  # type: ignore[method-assign, assignment]
    experts = Experts(experts=2, hidden_size=8, intermediate_size=8)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    model = torch.nn.ModuleDict({"experts": experts})
    spread(model, "experts", 2)
    times = Times(dist.group.WORLD)

    class Always:
        agreed = ()

        def choose(self, count_WE: object) -> Choice:
            return Choice(Strategy(r), times)

    experts.spread = replace(experts.spread, chooser=Always())
    x = torch.randn(4, 8, requires_grad=True)
    experts(x, torch.tensor([2, 2])).square().sum().backward()
    (watch,) = times.backward
    return watch.seconds()


def test_gradients_of_gathered_weights_are_part_of_backward() -> None:
    gathered, sent = run_ranks(2, backward_seconds, 0), run_ranks(2, backward_seconds, 1)
    assert min(gathered) > 3 * SLOW_SECONDS > max(sent)
