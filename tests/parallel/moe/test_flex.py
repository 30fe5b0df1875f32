"""The Flex layer over its lattice: output and every gradient of a dense mixture in one process, whatever travels and how."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from tests.parallel.moe.spreading import spread
from tests.ranks import run_ranks
from trainrt.config import MoeConfig
from trainrt.errors import PlanError
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.strategy import Lattice, Strategy
from trainrt.parallel.schedule import Schedule

WIDTH, INNER = 6, 8
DEGREES = (1, 2, 4)
EXPERTS, FEW = (1, 2, 3, 4, 6, 8), (1, 6)
ROWS = {
    "uneven": lambda rank, E: torch.randint(0, E, (11 + 3 * rank,), generator=torch.Generator().manual_seed(rank)),
    "empty experts": lambda rank, E: torch.full((7,), E - 1),
    "a rank without rows": lambda rank, E: torch.arange(9 if rank != 1 else 0) % E,
    "no rows at all": lambda rank, E: torch.zeros(0, dtype=torch.int64),
}


def cases(ranks: int, numbers: tuple[int, ...] = EXPERTS) -> list[tuple[int, Strategy, bool, str]]:
    """(experts, strategy, computed again for backward, rows), all that are possible on so many ranks."""
    found = []
    for experts in numbers:
        try:
            choices = ExpertLayout(experts, ranks).choices
        except PlanError:
            continue
        ways = (False, True) if ranks == 4 else (False,)
        for r, degree, backward, way, rows in product(choices, DEGREES, DEGREES, ways, ROWS):
            if r or (degree == backward == 1 and not way):
                # Computed again or not, in turn.
                again = len(found) % 2 == 1
                hot = len(found) % 3 if experts >= max(ranks, 2) and r else 0
                found.append((experts, Strategy(r, degree, backward, way, min(hot, experts - 1)), again, rows))
    return found


def gradients(experts: Any, x: torch.Tensor, count: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the rows, gradients of the weights as they are held; `weight` makes the loss."""
    x = x.clone().requires_grad_()
    y = experts(x, count)
    (y * weight).sum().backward()
    held = [p.grad if p.grad is not None else torch.zeros_like(p) for p in experts.parameters()]
    return [y.detach(), x.grad, *(g.to_local() if hasattr(g, "to_local") else g for g in held)]


def problem(experts: int, rows: str, ranks: int, dtype: torch.dtype) -> tuple[Any, list[Any], list[Any], list[Any]]:
    """A dense mixture, and for every rank its rows sorted by expert, their counts, and the weights of its loss."""
    from trainrt.parallel.moe.experts import Experts

    torch.manual_seed(experts)
    dense = Experts(experts=experts, hidden_size=WIDTH, intermediate_size=INNER).to(dtype)
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    chosen = [ROWS[rows](rank, experts).sort().values for rank in range(ranks)]
    inputs = [torch.randn(len(c), WIDTH, dtype=dtype) for c in chosen]
    weights = [torch.randn(len(c), WIDTH, dtype=dtype) for c in chosen]
    return dense, inputs, [torch.bincount(c, minlength=experts) for c in chosen], weights


def of_one_process(dense: Any, inputs: list[Any], counts: list[Any], weights: list[Any], rank: int) -> list[Any]:
    """Output and gradient of this rank's rows, and the gradients of the weights, summed over all ranks' rows."""
    own: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    for other in range(len(inputs)):
        dense.zero_grad()
        found = gradients(dense, inputs[other], counts[other], weights[other])
        own = found[:2] if other == rank else own
        sums = [a + b for a, b in zip(sums, found[2:], strict=True)] if sums else found[2:]
    return [*own, *sums]


def lattice(
    rank: int, ranks: int, dtype: torch.dtype, numbers: tuple[int, ...] = EXPERTS, spoil: str = ""
) -> tuple[int, float]:
    """How many cases there were, and the largest relative error among them."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from trainrt.config import MeshSize
    from trainrt.parallel.mesh import make_expert_groups
    from trainrt.parallel.moe import exchange
    from trainrt.parallel.moe.experts import Experts, slices_of
    from trainrt.parallel.moe.parallel import share_of, spread_experts
    from trainrt.parallel.moe.strategy import Fixed

    if spoil == "order":
        exchange.Chunk.unsorted = lambda self, y: y  # type: ignore[method-assign]
    if spoil == "copies":
        plan = exchange.Exchange.plan.__func__
        exchange.Exchange.plan = classmethod(  # type: ignore[method-assign]
            lambda cls, count, layout, groups, r, **rest: plan(cls, count, layout, groups, r=1, **rest)
        )
    mesh = init_device_mesh("cpu", (ranks,))
    if spoil == "host":
        exchange._transposed = lambda lengths, device: torch.arange(int(lengths.sum()))  # type: ignore[assignment]
    widths = [w for w in (1, 2, 4) if ranks % w == 0]
    groups = make_expert_groups(MeshSize(fsdp=ranks, ep=ranks), mesh, widths=widths, places=2)
    worst, number = 0.0, 0
    known: dict[tuple[int, str], list[torch.Tensor]] = {}
    for experts, strategy, again, rows in cases(ranks, numbers):
        dense, inputs, counts, weights = problem(experts, rows, ranks, dtype)
        if (experts, rows) not in known:
            known[experts, rows] = of_one_process(dense, inputs, counts, weights, rank)
        expected = list(known[experts, rows])
        layout = ExpertLayout(experts, ranks)
        expected[2:] = [
            share_of(g, layout, rank, slices_of(dense, None, layout).get(leaf))
            for leaf, g in zip(Experts.INNER, expected[2:], strict=True)
        ]
        holder = torch.nn.ModuleDict({"experts": dense})
        dense.zero_grad()
        how = {"chooser": lambda module, layout, strategy=strategy: Fixed(strategy), "recomputed": again}
        spread_experts(holder, {"experts": None}, mesh, groups, **how)
        found = gradients(dense, inputs[rank], counts[rank], weights[rank])
        for got, wanted in zip(found, expected, strict=True):
            if wanted.numel():
                scale = max(float(wanted.norm()), 1e-3)
                worst = max(worst, float((got - wanted).norm()) / scale)
        number += 1
    dist.barrier()
    return number, worst


@pytest.mark.campaign
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_strategy_is_the_dense_mixture(ranks: int) -> None:
    for number, worst in run_ranks(ranks, lattice, ranks, torch.float64):
        assert number == len(cases(ranks)) > 100 and worst <= 1e-12, worst


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), pytest.param(torch.float32, 1e-6, marks=pytest.mark.campaign)]
)
def test_slices_and_uneven_runs_are_the_dense_mixture(dtype: torch.dtype, limit: float) -> None:
    """The short form: one expert in four slices, and six experts on four ranks."""
    for number, worst in run_ranks(4, lattice, 4, dtype, FEW):
        assert number > 100 and worst <= limit, worst


@pytest.mark.parametrize(("spoil", "ranks"), [("order", 2), ("copies", 2), ("host", 4)])
def test_what_is_spoilt_is_noticed(spoil: str, ranks: int) -> None:
    """Negative controls: rows that come back in the order of experts; that one group alone computes; that a host mixes up."""
    assert any(
        worst > 1e-3
        for _, worst in run_ranks(ranks, lattice, ranks, torch.float64, FEW if spoil == "order" else (1,), spoil)
    )


def test_layouts_hold_every_expert_once() -> None:
    for experts, ranks in [(8, 4), (6, 4), (4, 4), (2, 4), (1, 4), (2, 8)]:
        layout = ExpertLayout(experts, ranks)
        held = [
            (layout.first(p) + i, layout.inner_run(p, layout.slices)[0])
            for p in range(ranks)
            for i in range(layout.here(p))
        ]
        assert sorted(held) == sorted(product(range(experts), range(layout.slices)))
    assert ExpertLayout(2, 8).choices == [0, 1, 2, 4]
    with pytest.raises(PlanError, match="allowed: 1, 2, 3, 6"):
        ExpertLayout(3, 8).choices  # noqa: B018
    with pytest.raises(PlanError, match=r"moe\.r = 3 .*allowed: \"auto\", 0, 1, 2"):
        Lattice(ExpertLayout(2, 4), 1, MoeConfig(r=3)).check()


class Late:
    """Work that says when it is waited for, and has come or has not."""

    def __init__(self, log: list[str], name: str, *, come: bool = True) -> None:
        self.log, self.name, self.come = log, name, come

    def wait(self) -> str:
        self.log.append(f"wait {self.name}")
        return self.name

    def is_completed(self) -> bool:
        return self.come


def schedule(log: list[str], there: list[str], back: list[str], *, come: bool = True) -> Schedule:
    def hop(what: str) -> Any:
        def start(chunk: int, _: Any) -> Late:
            log.append(f"{what} {chunk}")
            return Late(log, f"{what} {chunk}", come=come)

        return start

    return Schedule([hop(w) for w in there], lambda k, _: log.append(f"compute {k}"), [hop(w) for w in back])


def test_all_is_sent_before_anything_is_waited_for_and_all_that_comes_back_in_the_end() -> None:
    log: list[str] = []
    ended = schedule(log, ["there"], ["back"]).run(reversed(range(2)))
    assert ended == [(1, "back 1"), (0, "back 0")]
    assert log == ["there 1", "there 0", "wait there 1", "compute 1", "back 1", "wait there 0", "compute 0", "back 0",
                   "wait back 1", "wait back 0"]  # fmt: skip


def test_a_chunk_with_two_hops_is_sent_on_when_the_next_one_has_been_computed() -> None:
    log: list[str] = []
    schedule(log, ["in", "over"], ["over again", "out"]).run(range(2))
    assert [line for line in log if not line.startswith("wait")] == [
        "in 0", "in 1", "over 0", "over 1", "compute 0", "over again 0", "compute 1", "over again 1", "out 0", "out 1",
    ]  # fmt: skip


@pytest.mark.parametrize("come", [True, False])
def test_what_nobody_waits_for_fills_gaps_and_is_done_in_any_case(come: bool) -> None:
    log: list[str] = []
    made = schedule(log, ["there"], ["back"], come=come)
    made.fillers.extend(lambda n=n: log.append(f"filler {n}") for n in range(2))
    made.run(range(2))
    fillers = [log.index(f"filler {n}") for n in range(2)]
    assert fillers == sorted(fillers)
    # In the first gap there is, or after everything.
    assert fillers[0] == (log.index("wait there 0") - 2 if not come else len(log) - 2)


def few_rows(rank: int, rows: int) -> float:
    """The relative error of output and gradients where the ranks of tp have so many rows together."""
    from trainrt.parallel.moe.experts import Experts, slices_of
    from trainrt.parallel.moe.parallel import share_of

    torch.manual_seed(0)
    dense = Experts(experts=2, hidden_size=WIDTH, intermediate_size=INNER).double()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    count = torch.bincount(torch.arange(rows) % 2, minlength=2)
    x, weight = (torch.randn(rows, WIDTH, dtype=torch.float64) for _ in range(2))
    y, of_rows, *of_weights = gradients(dense, x, count, weight)
    model = torch.nn.ModuleDict({"experts": dense})
    layout = ExpertLayout(2, 4)
    slices = slices_of(dense, None, layout)
    wanted = [
        share_of(gradient, layout, rank, slices[leaf])
        for (leaf, _), gradient in zip(dense.named_parameters(), of_weights, strict=True)
    ]
    spread(model, "experts", 4, Strategy(2, 2, 1), same_rows=True)
    found = gradients(model["experts"], x, count, weight)
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in zip(found, [y, of_rows, *wanted], strict=True)
    )


@pytest.mark.parametrize("rows", [0, 1, 3, 5])
def test_ranks_of_tensor_parallelism_may_have_fewer_rows_than_they_are(rows: int) -> None:
    assert max(run_ranks(4, few_rows, rows)) < 1e-12
