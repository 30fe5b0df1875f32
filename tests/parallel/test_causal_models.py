"""A few types of the sweep (benchmarks/causal_models.py), each with a trap: loss and gradients are those of one process."""

from __future__ import annotations

import pytest

from tests.parallel.causal_models import TOKENS, configuration
from tests.parallel.sharding_check import EXACT, IMPORTED, Outcome, check, judged
from tests.ranks import preload, run_ranks

preload(*IMPORTED)

TRAPS = {
    "bloom": "position biases by head",
    "codegen": "queries, keys and values interleaved in blocks of heads",
    "gpt_oss": "attention sinks, fused experts",
    "jetmoe": "a mixture of attention heads, rows added to rows",
    "bamba": "a scan of a state-space model with padded chunks",
    "reformer": "hashed attention, autograd functions with whole and split tensors",
}


@pytest.mark.parametrize("kind", TRAPS)
def test_sharded_gives_the_loss_and_gradients_of_one_process(kind: str) -> None:
    for outcome in run_ranks(2, check, kind, True):
        assert outcome.result == "right", outcome
        assert outcome.precision == "fp64"
        assert outcome.held < 0.65


def test_sizes_follow_the_names_of_fields() -> None:
    config = configuration("mixtral")
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (64, 8, 4)
    assert (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok) == (2, 4, 2)
    assert {name: getattr(config, name) for name in TOKENS} == TOKENS


def test_one_layer_of_each_kind_is_kept() -> None:
    assert configuration("qwen3_next").layer_types == ["linear_attention", "full_attention"]


def test_what_is_not_a_number_is_wrong() -> None:
    assert judged(Outcome("", precision="fp64", loss=float("nan"))).result == "wrong"
    assert judged(Outcome("", precision="fp64", gradient=float("nan"))).result == "wrong"
    assert judged(Outcome("", precision="fp64", loss=EXACT[0] / 2)).result == "right"
