"""The whole layer over ranks, router and all: top-k, capacity and strategies crossed, against the layer in one process."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product

import pytest
import torch

from tests.parallel.moe.spreading import spread
from tests.ranks import run_ranks
from trainrt.config import MoeConfig
from trainrt.parallel.moe.layer import MoeLayer
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.strategy import Strategy

RANKS, WIDTH, INNER = 4, 8, 16
EXPERTS = (1, 2, 4, 6)
TOKENS = (13, 6, 1, 9)


def cases(numbers: tuple[int, ...] = EXPERTS) -> Iterator[tuple[MoeConfig, Strategy]]:
    """Each number of experts with each top-k and capacity; the strategies of its layout in turn."""
    for experts in numbers:
        layout = ExpertLayout(experts, RANKS)
        ways = [Strategy(0)]
        for r, degree, backward, hierarchical in product(layout.choices, (1, 2, 3), (1, 3), (False, True)):
            hot = 1 if experts > RANKS and degree == 2 else 0
            ways += [Strategy(r, degree, backward, hierarchical, hot)] if r else []
        turn = cycle(ways)
        for top_k, factor, prioritised in product((1, 2, 4), (0.0, 0.75, -0.75, 3.0), (False, True)):
            if top_k <= experts and (factor or not prioritised):
                given = MoeConfig(experts=experts, top_k=top_k, capacity_factor=factor, prioritised=prioritised)
                yield given, next(turn)


def made(config: MoeConfig, skew: bool) -> MoeLayer:
    torch.manual_seed(config.experts)
    layer = MoeLayer(config, hidden_size=WIDTH, intermediate_size=INNER).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if skew:
        # Nearly all tokens to the last expert: some ranks get no row.
        with torch.no_grad():
            layer.router.weight[-1] = 3.0
    return layer


def tokens(rank: int) -> torch.Tensor:
    return torch.randn(1, TOKENS[rank], WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).abs()


def found(layer: MoeLayer, rank: int) -> list[torch.Tensor]:
    """Output, gradient of the tokens, gradients of the weights."""
    x = tokens(rank).requires_grad_()
    layer.zero_grad()
    y, numbers, _ = layer(x)
    (y.square().sum() + numbers.balance + numbers.z).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters()]
    return [y.detach(), x.grad, *(g.to_local() if hasattr(g, "to_local") else g for g in gradients)]


def worst_error(rank: int, numbers: tuple[int, ...] = EXPERTS, scale: float = 1.0) -> tuple[int, float]:
    from trainrt.parallel.moe.experts import Experts, slices_of
    from trainrt.parallel.moe.parallel import share_of

    number, worst = 0, 0.0
    for config, strategy in cases(numbers):
        skew = number % 3 == 0
        layer = made(config, skew)
        expected = found(layer, rank)
        sums = [found(layer, other)[2:] for other in range(RANKS)]
        layout = ExpertLayout(config.experts, RANKS)
        slices = slices_of(layer.get_submodule("experts"), None, layout)
        for index, (name, _) in enumerate(layer.named_parameters()):
            # Routers are of a rank's own tokens, experts of all that come to them.
            if name.startswith("experts."):
                leaf = name.removeprefix("experts.")
                whole = torch.stack([gradients[index] for gradients in sums]).sum(0) * scale
                expected[2 + index] = share_of(whole, layout, rank, slices.get(leaf))
        assert isinstance(layer.experts, Experts)
        spread(layer, "experts", RANKS, strategy, places=2)
        for got, wanted in zip(found(layer, rank), expected, strict=True):
            worst = max(worst, float((got - wanted).norm()) / max(float(wanted.norm()), 1e-6))
        number += 1
    return number, worst


def test_the_layer_over_ranks_is_the_layer_of_one_process() -> None:
    for number, worst in run_ranks(RANKS, worst_error):
        assert number == len(list(cases())) > 40 and worst <= 1e-12, worst


def test_a_gradient_that_is_scaled_is_noticed() -> None:
    """Negative control: experts' gradients off by the number of ranks, as they would be if they were averaged."""
    assert any(worst > 0.1 for _, worst in run_ranks(RANKS, worst_error, (6,), 1.0 / RANKS))


def alive(rank: int, shared: int, hot: int, recomputed: bool) -> tuple[bool, int]:
    """Whether the tokens of a finished step are still there though nobody has them; and bytes kept between the passes."""
    import gc
    import weakref

    from torch.autograd.graph import saved_tensors_hooks

    config = MoeConfig(experts=4, top_k=2, shared_experts=shared)
    layer = made(config, False)
    spread(layer, "experts", 2, Strategy(1, 2, 2, hot=hot), recomputed=recomputed)
    gc.collect()
    gc.disable()
    x = tokens(rank).requires_grad_()
    watched = weakref.ref(x)
    # What checkpointing of activations drops.
    with saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
        y = layer(x)[0]
    graph, kept = [y.grad_fn], 0
    seen = set()
    while graph:
        node = graph.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        graph += [parent for parent, _ in node.next_functions]
        for held in (getattr(node, "leaves", ()), getattr(node, "results", {}).values()):
            kept += sum(tensor.nbytes for tensor in held)
    del x, y, node, graph, seen
    return watched() is not None, kept


@pytest.mark.parametrize(("shared", "hot"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_a_step_leaves_nothing_behind_and_checkpointing_keeps_nothing(shared: int, hot: int) -> None:
    """Without the collector of circles; a GPU's memory does not wake it."""
    assert run_ranks(2, alive, shared, hot, True) == [(False, 0)] * 2
    (circle, kept), _ = run_ranks(2, alive, shared, hot, False)
    assert not circle and kept > 0, "negative control: else what experts computed is kept"
