"""Every key of the job's config, with its default and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A table of the config: unknown keys are refused, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunConfig(Section):
    name: str = Field("run", min_length=1)
    directory: str = "runs/{name}"
    seed: int = Field(0, ge=0)
    steps: int = Field(100, ge=1)
    deterministic: bool = False
    pipeline: str = ""


class MoeLmConfig(Section):
    """The sizes of the project's own decoder, `[model.config]` of kind moe_lm."""

    layers: int = Field(4, ge=1)
    hidden_size: int = Field(128, ge=2)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(2, ge=1)
    intermediate_size: int = Field(256, ge=1)
    vocab_size: int = Field(320, ge=2)
    max_position: int = Field(1024, ge=1)
    rope_theta: float = Field(10000.0, gt=0)
    norm_epsilon: float = Field(1e-5, gt=0)
    tie_embeddings: bool = False


class ModelConfig(Section):
    kind: Literal["moe_lm", "huggingface"] = "moe_lm"
    config: str | dict[str, Any] = Field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    activation_checkpointing: bool = False


class DataConfig(Section):
    source: str = "stdlib"
    tokenizer: str = "bytes"
    sequence_length: int = Field(256, ge=2)
    global_batch: int = Field(16, ge=1)
    microbatch: int = Field(4, ge=1)
    objective: Literal["causal"] = "causal"
    validation_fraction: float = Field(0.01, ge=0, lt=1)


class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(3e-4, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(10, ge=0)
    minimum_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    decay_fraction: float = Field(0.2, ge=0, le=1)
    non_finite: Literal["stop", "skip", "rollback"] = "stop"


class ParallelConfig(Section):
    mode: Literal["auto", "explicit"] = "auto"
    pp: int = Field(1, ge=1)
    dp: int = Field(1, ge=1)
    fsdp: int = Field(1, ge=1)
    cp: int = Field(1, ge=1)
    tp: int = Field(1, ge=1)
    ep: int = Field(1, ge=1)


class MoeConfig(Section):
    experts: int = Field(8, ge=1)
    top_k: int = Field(2, ge=1)
    every: int = Field(1, ge=1)
    capacity_factor: float = 0.0
    dropless: bool = False
    prioritised: bool = False
    routing: Literal["top_k", "expert_choice"] = "top_k"
    r: int | Literal["auto"] = "auto"
    degree: int | Literal["auto"] = "auto"
    backward_degree: int | Literal["auto"] = "auto"
    all_to_all: Literal["auto", "linear", "hierarchical"] = "auto"
    hot_experts: int | Literal["auto"] = "auto"
    placement: Literal["none", "affinity"] = "none"
    zero_experts: int = Field(0, ge=0)
    copy_experts: int = Field(0, ge=0)
    constant_experts: int = Field(0, ge=0)
    shared_experts: int = Field(0, ge=0)
    tau: float = Field(0.75, gt=0, le=1)
    balance: Literal["loss", "bias"] = "loss"
    balance_loss: float = Field(0.01, ge=0)
    bias_rate: float = Field(0.001, gt=0)
    z_loss: float = Field(0.001, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _no_loss_beside_a_bias(cls, given: Any) -> Any:
        """Where a bias keeps the balance, no loss does unless it is asked for."""
        return {"balance_loss": 0.0, **given} if isinstance(given, dict) and given.get("balance") == "bias" else given


class EngineConfig(Section):
    kind: Literal["native", "deepspeed"] = "native"
    zero_stage: Literal[1, 2, 3] = 3


class ClusterConfig(Section):
    """`node_mtbf_hours`: mean time between failures of one node; "auto": what is usual, or what is seen where that is less."""

    address: str = "local"
    nodes: int = Field(2, ge=1)
    workers_per_node: int = Field(2, ge=1)
    spare_nodes: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    driver_grace_seconds: float = Field(600, ge=0)
    node_mtbf_hours: float | Literal["auto"] = "auto"


class SnapshotConfig(Section):
    every: int | Literal["auto"] = 1
    data_shards: int | Literal["auto"] = "auto"
    parity_shards: Literal[0, 1, 2, 3, "auto"] = 1


class CheckpointConfig(Section):
    every: int = Field(100, ge=0)
    keep: int = Field(3, ge=1)
    compress: Literal["none", "zstd"] = "none"


class EvaluationConfig(Section):
    """`every` in steps; 0: at the end only. `samples` of the validation split; 0: no evaluation."""

    every: int = Field(0, ge=0)
    samples: int = Field(32, ge=0)


class DiagnosticsConfig(Section):
    """`evict`: a verdict that says so is carried out, or the command that does it is printed. `hang_seconds`: ranks that make no
    progress for so long, or for three slow steps where that is longer, are looked at and ended; 0: never (for a debugger).
    `corruption_check_every` in steps: replicas over dp are compared; 0: never. `selfcheck`: nodes are looked at before a start
    and after an incident, and those that fail get no ranks.
    """

    evict: Literal["advise", "automatic"] = "advise"
    dashboard: bool = True
    port: int = Field(8300, ge=0, le=65535)
    tracker: Literal["none", "tensorboard"] = "none"
    hang_seconds: float = Field(3.0, ge=0)
    corruption_check_every: int = Field(100, ge=0)
    selfcheck: bool = True


@dataclass(frozen=True, slots=True)
class MeshSize:
    """Lengths of the mesh axes. `ep` lies inside dp * fsdp * cp * tp; what it leaves is `efsdp`."""

    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.fsdp * self.cp * self.tp

    @property
    def data_ranks(self) -> int:
        return self.dp * self.fsdp

    @property
    def efsdp(self) -> int:
        return self.dp * self.fsdp * self.cp * self.tp // self.ep


class JobConfig(Section):
    """A whole job. `parse` and `load` make it with all checks."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    moe: MoeConfig = MoeConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()

    @property
    def moe_lm(self) -> MoeLmConfig:
        """The sizes of moe_lm; only where model.kind says so."""
        assert self.model.kind == "moe_lm" and isinstance(self.model.config, dict)
        return MoeLmConfig.model_validate(self.model.config)

    @property
    def world_size(self) -> int:
        return self.cluster.nodes * self.cluster.workers_per_node

    def mesh(self) -> MeshSize | None:
        """The explicit mesh, or None where the plan is to choose it."""
        if self.parallel.mode == "auto":
            return None
        axes = ("pp", "dp", "fsdp", "cp", "tp", "ep")
        return MeshSize(**{axis: getattr(self.parallel, axis) for axis in axes})
