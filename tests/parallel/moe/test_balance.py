"""Balance by bias: the rule of the paper, a load that gets even, and biases that are state like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.jobs import engine, job, train
from tests.ranks import run_ranks
from tests.state import Trained
from trainrt.config import MoeConfig
from trainrt.parallel.moe.balance import BiasBalance
from trainrt.parallel.moe.layer import MoeLayer

RATE = 0.004
MOE = {"experts": 4, "top_k": 2, "balance": "bias", "bias_rate": RATE}


def layer(balance: str = "bias") -> MoeLayer:
    torch.manual_seed(0)
    made = MoeLayer(MoeConfig(experts=4, top_k=2, balance=balance), hidden_size=8, intermediate_size=12).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def tokens() -> torch.Tensor:
    """Whose mean is not zero, so that some experts are liked by most."""
    return torch.randn(1, 64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5


def test_the_bias_changes_the_choice_and_not_the_weights() -> None:
    made, x = layer(), tokens()
    assert made.router.bias is not None
    made.router.bias += torch.tensor([0.0, 0.5, 0.0, -0.5], dtype=torch.float64)
    rows = made.router(x[0]).rows
    probability_TE = F.linear(x[0], made.router.weight).softmax(-1)
    chosen_TK = (probability_TE + made.router.bias).topk(2).indices
    assert not torch.equal(chosen_TK, probability_TE.topk(2).indices)
    weight_TK = probability_TE.gather(1, chosen_TK)
    weight_TE = torch.zeros_like(probability_TE).scatter(1, chosen_TK, weight_TK / weight_TK.sum(1, keepdim=True))
    found_TE = torch.zeros_like(weight_TE).index_put((rows.token_N, rows.expert_N), rows.weight_N)
    torch.testing.assert_close(found_TE, weight_TE, rtol=1e-12, atol=1e-12)


def test_a_bias_of_zero_changes_nothing() -> None:
    assert torch.equal(layer()(tokens())[0], layer("loss")(tokens())[0])


def moved(rank: int) -> tuple[list[float], list[float], list[int], bool]:
    """Loads over the moves, the bias after the first one, the counts that made it, and whether forgetting left it alone."""
    import torch.distributed as dist

    made, x = layer(), tokens()
    balance, loads, first = BiasBalance(made, rate=RATE), [], []
    made(x)
    counts = made.router.chosen_E
    assert counts is not None and made.router.bias is not None and dist.group.WORLD is not None
    for _ in range(80):
        loads.append(float(made(x)[1].load))
        balance.count()
        balance.move(dist.group.WORLD)
        balance.forget()
        first = first or made.router.bias.tolist()
    before = made.router.bias.clone()
    balance.count()
    balance.forget()
    balance.move(dist.group.WORLD)
    return loads, first, counts.tolist(), torch.equal(before, made.router.bias)


def test_each_bias_moves_by_the_rate_against_its_load_and_the_load_gets_even() -> None:
    loads, first, counts, left_alone = run_ranks(1, moved)[0]
    assert first == [RATE * (count < 32) - RATE * (count > 32) for count in counts]
    assert loads[0] > 1.4 and max(loads[-5:]) < 1.2
    assert left_alone


def trained(folder: Path, mesh: dict[str, int], **more: Any) -> Trained:
    config = job(mesh=mesh, model={"dtype": "float64"}, data={"global_batch": 10}, moe=MOE)
    return Trained(config, folder, **more)


def biases(run: Trained) -> dict[Any, str]:
    return run.digests(roles={"buffer"})


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("single"), {}, steps=5)


@pytest.mark.parametrize("mesh", [{"fsdp": 2}, {"tp": 2, "fsdp": 2}, {"dp": 2, "fsdp": 2, "ep": 2}], ids=str)
def test_any_mesh_has_the_biases_of_one_process(mesh: dict[str, int], single: Trained, tmp_path: Path) -> None:
    """Five shards: on two data ranks and on four there are dummies, which must not count."""
    other = trained(tmp_path, mesh, steps=5)
    assert len(biases(single)) == 2 and biases(other) == biases(single)
    assert all(digest != other.initial_digests()[key] for key, digest in biases(other).items()), "and they moved"


def test_a_resumed_run_ends_in_the_state_of_one_that_was_not_interrupted(single: Trained, tmp_path: Path) -> None:
    first = trained(tmp_path / "first", {}, steps=2)
    second = trained(tmp_path / "second", {}, start=first.checkpoint(), steps=3, first=3)
    assert second.digests() == single.digests()
    assert first.losses + second.losses == single.losses
    assert biases(first) != biases(second), "negative control: the steps after it move them"


def counted(rank: int, mesh: dict[str, int]) -> Any:
    """What the first step summed, as rank 0 has it."""
    config = job(mesh=mesh, model={"dtype": "float64"}, data={"global_batch": 10}, moe=MOE)
    made, seen = engine(config, rank), []
    made._balance.forget = lambda: seen.append(made._balance._load_RE)
    train(made, config, steps=1)
    return None if rank else seen[0].tolist()


def test_every_row_of_the_global_batch_counts_once() -> None:
    """Ten samples of 16 tokens that make two choices each, in two layers."""
    one = run_ranks(1, counted, {})[0]
    assert [sum(load) for load in one] == [320, 320]
    for mesh in ({"fsdp": 2}, {"tp": 2, "fsdp": 2}):
        assert run_ranks(mesh["fsdp"] * mesh.get("tp", 1), counted, mesh)[0] == one
