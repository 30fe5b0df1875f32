"""The job's config: `sections` (keys), `document` (TOML in and out), `checks` (across keys), `differences` (of two jobs).

Nothing here imports torch, Ray or transformers: a wrong config is refused before any of them starts.
"""

from trainrt.config.differences import learned_differences
from trainrt.config.document import load, parse, to_toml
from trainrt.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    DiagnosticsConfig,
    EngineConfig,
    EvaluationConfig,
    JobConfig,
    MeshSize,
    ModelConfig,
    MoeConfig,
    MoeLmConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    Section,
    SnapshotConfig,
)

__all__ = [
    "CheckpointConfig", "ClusterConfig", "DataConfig", "DiagnosticsConfig", "EngineConfig", "EvaluationConfig", "JobConfig",
    "MeshSize", "ModelConfig", "MoeConfig", "MoeLmConfig", "OptimizerConfig", "ParallelConfig", "RunConfig", "Section",
    "SnapshotConfig", "learned_differences", "load", "parse", "to_toml",
]  # fmt: skip
