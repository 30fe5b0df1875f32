"""The rows of the conformance matrix: every parallel form that is built, on two or four ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass(frozen=True)
class Row:
    """A form, and the mesh its checkpoint is resumed on. long: left to the campaign, since other rows hold its parts.

    hosts: over so many the form's own mesh is said to lie.
    """

    name: str
    mesh: dict[str, int]
    other: dict[str, int]
    kind: str = "moe_lm"
    sections: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-11
    long: bool = False
    hosts: int = 1

    def sections_on(self, mesh: dict[str, int]) -> dict[str, Any]:
        """The job's sections on its own mesh or on another one."""
        if self.hosts == 1 or mesh != self.mesh:
            return self.sections
        return {**self.sections, "cluster": {"nodes": self.hosts, "workers_per_node": self.ranks // self.hosts}}

    @property
    def ranks(self) -> int:
        return self.mesh.get("dp", 1) * self.mesh.get("fsdp", 1) * self.mesh.get("tp", 1)


RECOMPUTE = {"model": {"dtype": "float64", "activation_checkpointing": True}}
FP64 = {"model": {"dtype": "float64"}}
DETERMINISTIC = {"run": {"deterministic": True}, **FP64}
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
FUSED = {
    "model": {
        "dtype": "float64",
        "config": {**SMALL, "model_type": "falcon", "num_attention_heads": 6, "num_kv_heads": 1, "multi_query": True,
                   "new_decoder_architecture": False, "bos_token_id": 1, "eos_token_id": 2},
    }
}  # fmt: skip
MIXTURE = {
    "model": {
        "dtype": "float64",
        "config": {**SMALL, "model_type": "mixtral", "intermediate_size": 32, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    }
}  # fmt: skip
FEW = {"model": {"dtype": "float64", "config": {**MIXTURE["model"]["config"], "num_local_experts": 2}}}
BIASES = {
    "model": {
        "dtype": "float64",
        "config": {**SMALL, "model_type": "gpt_oss", "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 8,
                   "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 2},
    }
}  # fmt: skip
PLUS = {"experts": 4, "zero_experts": 1, "copy_experts": 1, "constant_experts": 2, "capacity_factor": 1.1}
BIASED = {"experts": 4, "balance": "bias", "capacity_factor": 1.1, "prioritised": True, "shared_experts": 1}
LISTED = {"run": {"pipeline": "tests.models.listed:pipeline"}, **FP64}
ROWS = [
    Row("fsdp 4", {"fsdp": 4}, {"tp": 2, "fsdp": 2}, sections=FP64, long=True),
    Row("fsdp 3 (uneven)", {"fsdp": 3}, {"fsdp": 4}, sections=FP64),
    Row("dp 2 x fsdp 2", {"dp": 2, "fsdp": 2}, {"fsdp": 3}, sections=FP64, long=True),
    Row("tp 2", {"tp": 2}, {}, sections=FP64, long=True),
    Row("tp 2 x fsdp 2", {"tp": 2, "fsdp": 2}, {"fsdp": 3}, sections=FP64),
    Row("ep 2", {"fsdp": 2, "ep": 2}, {"tp": 2}, sections=FP64, long=True),
    Row("ep 4", {"fsdp": 4, "ep": 4}, {"fsdp": 2}, sections=FP64, long=True),
    Row("fsdp x ep 2", {"fsdp": 4, "ep": 2}, {"dp": 2}, sections=FP64, long=True),
    Row("dp 2 x ep 2", {"dp": 2, "fsdp": 2, "ep": 2}, {"fsdp": 4, "ep": 4}, sections=FP64),
    Row("bf16 fsdp 2", {"fsdp": 2}, {"tp": 2}, sections={"model": {"dtype": "bfloat16"}}, tolerance=2e-2, long=True),
    Row("bf16 fsdp x ep 2", {"fsdp": 4, "ep": 2}, {"fsdp": 2}, sections={"model": {"dtype": "bfloat16"}}, tolerance=2e-2),
    Row("activation checkpointing, fsdp x ep 2", {"fsdp": 4, "ep": 2}, {"fsdp": 2}, sections=RECOMPUTE),
    Row("deterministic, dp 2 x fsdp 2", {"dp": 2, "fsdp": 2}, {"fsdp": 3}, sections=DETERMINISTIC, long=True),
    Row("deterministic, fsdp x ep 2", {"fsdp": 4, "ep": 2}, {"fsdp": 2, "ep": 2}, sections=DETERMINISTIC),
    Row("tp 2 x ep 2", {"tp": 2, "fsdp": 2, "ep": 2}, {"fsdp": 3}, sections=FP64),
    Row("ep 4, 2 experts, r 1", {"fsdp": 4, "ep": 4}, {"fsdp": 2, "ep": 2}, long=True,
        sections=FP64 | {"moe": {"experts": 2, "r": 1}}),
    Row("tp x fsdp x ep 4, 2 experts, r 2, 2 chunks", {"tp": 2, "fsdp": 2, "ep": 4}, {"fsdp": 3},
        sections=FP64 | {"moe": {"experts": 2, "r": 2, "degree": 2}}),
    Row("ep 4, 6 experts, r 0", {"fsdp": 4, "ep": 4}, {"tp": 2}, sections=FP64 | {"moe": {"experts": 6, "r": 0}}, long=True),
    Row("ep 2, 2 and 4 chunks, activation checkpointing", {"fsdp": 4, "ep": 2}, {"fsdp": 2},
        sections=RECOMPUTE | {"moe": {"degree": 2, "backward_degree": 4}}),
    Row("ep 4 over two hosts, hierarchical, 2 chunks", {"fsdp": 4, "ep": 4}, {"fsdp": 2},
        sections=FP64 | {"moe": {"r": 1, "degree": 2, "all_to_all": "hierarchical"}}, hosts=2),
    Row("fsdp x ep 2, a hot expert, 2 and 1 chunks", {"fsdp": 4, "ep": 2}, {"tp": 2}, long=True,
        sections=FP64 | {"moe": {"r": 1, "degree": 2, "backward_degree": 1, "hot_experts": 1}}),
    Row("tp 2 x ep 4, shared expert, dropless, 4 chunks", {"tp": 2, "fsdp": 2, "ep": 4}, {"fsdp": 3}, long=True,
        sections=FP64 | {"moe": {"r": 1, "degree": 4, "shared_experts": 1, "dropless": True}}),
    Row("fsdp x ep 2, shared expert, 2 chunks, activation checkpointing", {"fsdp": 4, "ep": 2}, {"tp": 2},
        sections=RECOMPUTE | {"moe": {"r": 1, "degree": 2, "shared_experts": 1}}),
    Row("MoE++, fsdp x ep 2", {"fsdp": 4, "ep": 2}, {"tp": 2}, sections=FP64 | {"moe": PLUS}),
    Row("MoE++, fsdp x ep 2, bf16", {"fsdp": 4, "ep": 2}, {"fsdp": 2}, long=True,
        sections={"model": {"dtype": "bfloat16"}, "moe": {**PLUS, "r": 1, "degree": 1}}, tolerance=2e-2),
    Row("MoE++, tp 2 x ep 2, 2 chunks", {"tp": 2, "ep": 2}, {"fsdp": 3}, long=True,
        sections=FP64 | {"moe": {**PLUS, "degree": 2}}),
    Row("balance by bias, prioritised, shared experts: tp 2 x ep 2", {"tp": 2, "fsdp": 2, "ep": 2}, {"fsdp": 3},
        sections=FP64 | {"moe": BIASED}),
    Row("expert choice, fsdp x ep 2", {"fsdp": 4, "ep": 2}, {"tp": 2}, long=True,
        sections=FP64 | {"moe": {"experts": 4, "routing": "expert_choice"}}),
    Row("tp 4, fewer key heads", {"tp": 4}, {"fsdp": 2}, sections=FP64),
    Row("llama fsdp 4", {"fsdp": 4}, {"tp": 2}, kind="huggingface", sections=FP64, long=True),
    Row("llama tp 2 x fsdp 2", {"tp": 2, "fsdp": 2}, {"fsdp": 3}, kind="huggingface", sections=FP64, long=True),
    Row("llama tp 2 x fsdp 2, activation checkpointing", {"tp": 2, "fsdp": 2}, {"tp": 2}, kind="huggingface", sections=RECOMPUTE),
    Row("llama tp 2 x fsdp 2, bf16", {"tp": 2, "fsdp": 2}, {"fsdp": 2}, kind="huggingface",
        sections={"model": {"dtype": "bfloat16"}}, tolerance=2e-2, long=True),
    Row("fused q, k and v: tp 2 x fsdp 2", {"tp": 2, "fsdp": 2}, {"tp": 3}, kind="huggingface", sections=FUSED),
    Row("mixtral ep 2", {"fsdp": 2, "ep": 2}, {"tp": 2}, kind="huggingface", sections=MIXTURE, long=True),
    Row("mixtral tp 2 x ep 4", {"tp": 2, "fsdp": 2, "ep": 4}, {"fsdp": 2}, kind="huggingface", sections=MIXTURE),
    Row("mixtral ep 2, r 0", {"fsdp": 2, "ep": 2}, {"tp": 2}, kind="huggingface", long=True,
        sections=MIXTURE | {"moe": {"r": 0}}),
    Row("mixtral fsdp x ep 4, hierarchical, 2 and 4 chunks", {"fsdp": 4, "ep": 4}, {"fsdp": 3}, kind="huggingface",
        sections=MIXTURE | {"moe": {"degree": 2, "backward_degree": 4, "all_to_all": "hierarchical"}}, hosts=2),
    Row("mixtral ep 3 (uneven)", {"fsdp": 3, "ep": 3}, {"fsdp": 2}, kind="huggingface", sections=MIXTURE, long=True),
    Row("mixtral ep 4, 2 experts, r 2", {"fsdp": 4, "ep": 4}, {"tp": 2}, kind="huggingface",
        sections=FEW | {"moe": {"r": 2}}),
    Row("gpt-oss with biases, ep 4, 2 experts, r 2", {"fsdp": 4, "ep": 4}, {"fsdp": 2}, kind="huggingface",
        sections=BIASES | {"moe": {"r": 2}}, long=True),
    Row("mixtral tp 2 x fsdp x ep 4, 2 experts, r 1", {"tp": 2, "fsdp": 2, "ep": 4}, {"fsdp": 3}, kind="huggingface", long=True,
        sections=FEW | {"moe": {"r": 1, "degree": 2}}),
    Row("a list of experts, ep 2", {"fsdp": 2, "ep": 2}, {"fsdp": 3}, sections=LISTED, long=True),
    Row("a list of experts, tp 2 x fsdp x ep 2", {"tp": 2, "fsdp": 2, "ep": 2}, {"dp": 2}, sections=LISTED),
]  # fmt: skip

CASES = [pytest.param(row, id=row.name, marks=[pytest.mark.campaign] if row.long else []) for row in ROWS]

COLUMNS = ("parity", "layout digest", "resume on another mesh", "kill and restore")
