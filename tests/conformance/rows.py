"""The rows of the conformance matrix: every parallel form that is built, on two or four ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A form, and the mesh its checkpoint is resumed on."""

    name: str
    mesh: dict[str, int]
    other: dict[str, int]
    kind: str = "moe_lm"
    sections: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-11

    @property
    def ranks(self) -> int:
        return self.mesh.get("dp", 1) * self.mesh.get("fsdp", 1) * self.mesh.get("tp", 1)


RECOMPUTE = {"model": {"dtype": "float64", "activation_checkpointing": True}}
FP64 = {"model": {"dtype": "float64"}}
DETERMINISTIC = {"run": {"deterministic": True}, **FP64}
ROWS = [
    Row("fsdp 4", {"fsdp": 4}, {"tp": 2, "fsdp": 2}, sections=FP64),
    Row("fsdp 3 (uneven)", {"fsdp": 3}, {"fsdp": 4}, sections=FP64),
    Row("dp 2 x fsdp 2", {"dp": 2, "fsdp": 2}, {"fsdp": 3}, sections=FP64),
    Row("tp 2", {"tp": 2}, {}, sections=FP64),
    Row("tp 2 x fsdp 2", {"tp": 2, "fsdp": 2}, {"fsdp": 3}, sections=FP64),
    Row("ep 2", {"fsdp": 2, "ep": 2}, {"tp": 2}, sections=FP64),
    Row("ep 4", {"fsdp": 4, "ep": 4}, {"fsdp": 2}, sections=FP64),
    Row("fsdp x ep 2", {"fsdp": 4, "ep": 2}, {"dp": 2}, sections=FP64),
    Row("dp 2 x ep 2", {"dp": 2, "fsdp": 2, "ep": 2}, {"fsdp": 4, "ep": 4}, sections=FP64),
    Row("bf16 fsdp 2", {"fsdp": 2}, {"tp": 2}, sections={"model": {"dtype": "bfloat16"}}, tolerance=2e-2),
    Row("bf16 fsdp x ep 2", {"fsdp": 4, "ep": 2}, {"fsdp": 2}, sections={"model": {"dtype": "bfloat16"}}, tolerance=2e-2),
    Row("activation checkpointing, fsdp x ep 2", {"fsdp": 4, "ep": 2}, {"fsdp": 2}, sections=RECOMPUTE),
    Row("deterministic, dp 2 x fsdp 2", {"dp": 2, "fsdp": 2}, {"fsdp": 3}, sections=DETERMINISTIC),
    Row("deterministic, fsdp x ep 2", {"fsdp": 4, "ep": 2}, {"fsdp": 2, "ep": 2}, sections=DETERMINISTIC),
    Row("llama fsdp 4", {"fsdp": 4}, {"tp": 2}, kind="huggingface", sections=FP64),
    Row("llama tp 2 x fsdp 2", {"tp": 2, "fsdp": 2}, {"fsdp": 3}, kind="huggingface", sections=FP64),
]  # fmt: skip

COLUMNS = ("parity", "layout digest", "resume on another mesh", "kill and restore")
