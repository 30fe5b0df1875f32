"""The job's config: every key with its default and what is allowed, and the checks across keys.

Nothing here imports torch, Ray or transformers: a wrong config is refused before any of them starts.
"""

from __future__ import annotations

import glob
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainrt.errors import ConfigError, nearest


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


def load(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a TOML file and `key=value` overrides. Relative paths in it start at its directory. Raises ConfigError."""
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    for override in overrides:
        _override(document, override)
    _resolve_paths(document, path.absolute().parent)
    return parse(document)


def parse(document: dict[str, Any]) -> JobConfig:
    """Validate a document. Raises ConfigError with one line for each thing that is wrong."""
    try:
        config = JobConfig.model_validate(document)
        if config.model.kind == "moe_lm":
            _ = _moe_lm(config)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error))) from error
    problems = list(_problems(config, document))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _moe_lm(config: JobConfig) -> MoeLmConfig:
    if not isinstance(config.model.config, dict):
        raise ConfigError(f'model.config = "{config.model.config}": a moe_lm takes a table of sizes')
    try:
        return config.moe_lm
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, MoeLmConfig, "model.config."))) from error


def to_toml(config: JobConfig) -> str:
    """The resolved config as TOML; `parse` of it gives the same config."""
    return tomli_w.dumps(config.model_dump(mode="json"))


LEARNED = ("model", "data", "optimizer", "moe")
STRATEGY_KEYS = {
    "moe.r", "moe.degree", "moe.backward_degree", "moe.all_to_all", "moe.hot_experts", "moe.placement",
    "model.activation_checkpointing",
}  # fmt: skip
MOE_LM_KEYS = ("prioritised", "routing", "shared_experts", "balance", "bias_rate")


def learned_differences(old: JobConfig, new: JobConfig) -> list[str]:
    """The dotted keys that change what is learned, with both values. `run.steps` may grow."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = sorted(
        key for key in before.keys() | after.keys()
        if (key.partition(".")[0] in LEARNED and key not in STRATEGY_KEYS)
        or key in ("run.seed", "run.deterministic", "run.pipeline")
    )  # fmt: skip
    found = [
        f"{key}: {before.get(key)!r} became {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)
    ]
    if new.run.steps < old.run.steps:
        found.append(f"run.steps: {old.run.steps} became {new.run.steps} (it may grow)")
    return found


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: allowed: key=value, such as run.steps=200")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, leaf = key.strip().split(".")
    table = document
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {name} is a value, not a table")
    table[leaf] = value


def _resolve_paths(document: dict[str, Any], base: Path) -> None:
    """Paths in a config start at the config's directory, wherever the command is run."""
    data, model = document.get("data", {}), document.get("model", {})
    if not isinstance(data, dict) or not isinstance(model, dict):
        return
    for table, key, words in ((data, "source", ("stdlib",)), (data, "tokenizer", ("bytes",)), (model, "config", ())):
        value = table.get(key)
        if isinstance(value, str) and value not in words and not Path(value).is_absolute():
            table[key] = str(base / value)


def _explain(error: ValidationError, root: type[BaseModel] = JobConfig, prefix: str = "") -> Iterator[str]:
    """pydantic's errors as one line each: key, value, what is allowed, the nearest spelling."""
    for entry in error.errors():
        parts = [
            str(part)
            for part in entry["loc"]
            if part not in ("int", "float", "str", "tuple") and "literal" not in str(part)
        ]
        key = prefix + ".".join(parts)
        if entry["type"] == "extra_forbidden":
            allowed = _allowed_keys(root, parts[:-1])
            where = f"[{prefix}{'.'.join(parts[:-1])}]" if parts[:-1] else "the config"
            yield f"{key}: unknown key{nearest(parts[-1], allowed)}; {where} takes {', '.join(allowed)}"
        elif entry["type"] == "literal_error":
            expected = entry["ctx"]["expected"]
            words = [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]
            yield f"{key} = {entry['input']!r}{nearest(str(entry['input']), words)}; allowed: {expected}"
        else:
            yield f"{key} = {entry['input']!r}: {entry['msg'][0].lower()}{entry['msg'][1:]}"


def _allowed_keys(root: type[BaseModel], path: Sequence[str]) -> list[str]:
    model: Any = root
    for name in path:
        field = model.model_fields.get(name)
        if field is None:
            break
        model = field.annotation
    return list(getattr(model, "model_fields", {}))


def _problems(config: JobConfig, document: dict[str, Any]) -> Iterator[str]:
    yield from _not_built(config)
    yield from _data_problems(config)
    yield from _recovery_problems(config)
    yield from _strategy_problems(config.moe)
    yield from _routing_problems(config.moe)
    yield from _mesh_problems(config)
    yield from _model_problems(config, document)


def _not_built(config: JobConfig) -> Iterator[str]:
    """Forms that later versions bring, refused by name."""
    parallel = config.parallel
    if parallel.mode == "explicit":
        if parallel.pp > 1:
            yield f"parallel.pp = {parallel.pp}: pipeline parallelism is not built yet; allowed: 1"
        if parallel.cp > 1:
            yield f"parallel.cp = {parallel.cp}: context parallelism is not built yet; allowed: 1"
    if config.engine.kind == "deepspeed":
        yield 'engine.kind = "deepspeed" is not built yet; allowed: "native"'
    if config.diagnostics.tracker == "tensorboard":
        yield 'diagnostics.tracker = "tensorboard" is not built yet; allowed: "none"'


def _data_problems(config: JobConfig) -> Iterator[str]:
    data, optimizer = config.data, config.optimizer
    if data.global_batch % data.microbatch:
        yield (
            f"data.microbatch = {data.microbatch} does not divide data.global_batch = {data.global_batch}; "
            f"allowed: {_divisors(data.global_batch)}"
        )
    if data.source != "stdlib" and not glob.glob(data.source, recursive=True):
        yield f'data.source = "{data.source}": no such file; allowed: "stdlib", a file, a directory or a glob'
    if optimizer.warmup_steps > config.run.steps:
        yield f"optimizer.warmup_steps = {optimizer.warmup_steps} is more than run.steps = {config.run.steps}"
    for beta in optimizer.betas:
        if not 0 <= beta < 1:
            yield f"optimizer.betas = {list(optimizer.betas)}: allowed: two numbers in [0, 1)"


def _recovery_problems(config: JobConfig) -> Iterator[str]:
    """Numbers beside "auto"."""
    every, data_shards, hours = config.snapshot.every, config.snapshot.data_shards, config.cluster.node_mtbf_hours
    if every != "auto" and every < 0:
        yield f'snapshot.every = {every}; allowed: "auto" or a whole number from 0'
    if data_shards != "auto" and data_shards < 1:
        yield f'snapshot.data_shards = {data_shards}; allowed: "auto" or a whole number from 1'
    if hours != "auto" and hours <= 0:
        yield f'cluster.node_mtbf_hours = {hours:g}; allowed: "auto" or a number above 0'


def _strategy_problems(moe: MoeConfig) -> Iterator[str]:
    for key in ("degree", "backward_degree"):
        value = getattr(moe, key)
        if value != "auto" and value < 1:
            yield f'moe.{key} = {value}; allowed: "auto" or a whole number from 1'
    if moe.hot_experts != "auto" and moe.hot_experts < 0:
        yield f'moe.hot_experts = {moe.hot_experts}; allowed: "auto" or a whole number from 0'
    if moe.r == 0:
        for key, nothing in (("degree", 1), ("backward_degree", 1), ("all_to_all", "linear"), ("hot_experts", 0)):
            value = getattr(moe, key)
            if value not in ("auto", nothing):
                given, allowed = json.dumps(value), json.dumps(nothing)
                yield f'moe.{key} = {given} with moe.r = 0, where no row travels; allowed: "auto", {allowed}'
    if moe.r != "auto" and moe.r < 0:
        yield f'moe.r = {moe.r}; allowed: "auto", 0, or a divisor of parallel.ep / moe.experts'


def _routing_problems(moe: MoeConfig) -> Iterator[str]:
    if moe.prioritised and moe.capacity_factor == 0:
        yield "moe.prioritised = true says which rows a capacity drops: it needs moe.capacity_factor other than 0"
    if moe.balance == "bias" and moe.zero_experts + moe.copy_experts + moe.constant_experts:
        yield (
            'moe.balance = "bias" evens out the load of all experts, and that of zero-computation experts is another '
            '(moe.tau); allowed with them: "loss"'
        )
    if moe.routing == "expert_choice":
        others = {
            "moe.zero_experts, copy_experts or constant_experts": moe.zero_experts
            + moe.copy_experts
            + moe.constant_experts,
            "moe.prioritised = true": moe.prioritised,
            'moe.balance = "bias"': moe.balance == "bias",
            "moe.dropless = true": moe.dropless,
        }
        for other, given in others.items():
            if given:
                yield f'moe.routing = "expert_choice" does not go with {other}; allowed with it: "top_k"'


def _mesh_problems(config: JobConfig) -> Iterator[str]:
    mesh = config.mesh()
    if mesh is None:
        return
    if mesh.world_size != config.world_size:
        yield (
            f"parallel: pp*dp*fsdp*cp*tp = {mesh.pp}*{mesh.dp}*{mesh.fsdp}*{mesh.cp}*{mesh.tp} = {mesh.world_size}, but "
            f"cluster.nodes * cluster.workers_per_node = {config.cluster.nodes} * {config.cluster.workers_per_node} = "
            f"{config.world_size}; they must be equal"
        )
    ranks = mesh.dp * mesh.fsdp * mesh.cp * mesh.tp
    if ranks % mesh.ep:
        yield f"parallel.ep = {mesh.ep} does not divide dp*fsdp*cp*tp = {ranks}; allowed: {_divisors(ranks)}"


def _model_problems(config: JobConfig, document: dict[str, Any]) -> Iterator[str]:
    mesh = config.mesh() or MeshSize()
    if config.model.kind == "moe_lm":
        sizes = _moe_lm(config)
        yield from _head_problems("model.config.", sizes.hidden_size, sizes.heads, sizes.kv_heads, mesh.tp)
        if sizes.intermediate_size % mesh.tp:
            yield _not_divided("model.config.intermediate_size", sizes.intermediate_size, "parallel.tp", mesh.tp)
        yield from _expert_problems("moe.experts", config.moe.experts, mesh.ep)
        moe = config.moe
        every = moe.experts + moe.zero_experts + moe.copy_experts + moe.constant_experts
        if moe.top_k > every:
            yield f"moe.top_k = {moe.top_k} is more than the {every} experts (moe.experts = {moe.experts})"
        if config.data.sequence_length > sizes.max_position:
            yield (
                f"data.sequence_length = {config.data.sequence_length} is more than "
                f"model.config.max_position = {sizes.max_position}"
            )
        if config.moe.dropless and config.moe.capacity_factor != 0:
            yield f"moe.dropless = true needs moe.capacity_factor = 0, not {config.moe.capacity_factor}"
        return
    given = document.get("moe", {})
    for key in ("experts", "top_k", "every"):
        if key in given and given[key] != getattr(MoeConfig(), key):
            yield f"moe.{key} = {given[key]}: a Hugging Face model says this itself; leave the key out"
    if config.moe.placement != "none":
        yield f'moe.placement = "{config.moe.placement}" is for model.kind = "moe_lm"; allowed: "none"'
    for key in MOE_LM_KEYS:
        if key in given and given[key] != getattr(MoeConfig(), key):
            yield f"moe.{key} = {json.dumps(given[key])}: only moe_lm has this; leave the key out"
    yield from _huggingface_problems(config, mesh)


def _huggingface_problems(config: JobConfig, mesh: MeshSize) -> Iterator[str]:
    source = config.model.config
    if isinstance(source, str):
        file = Path(source) / "config.json"
        try:
            sizes = json.loads(file.read_text())
        except OSError as error:
            yield f'model.config = "{source}": {file.name}: {error.strerror}; allowed: a directory with config.json'
            return
        except ValueError as error:
            yield f'model.config = "{source}": config.json is no JSON: {error}'
            return
    else:
        sizes = source
        if not sizes.get("model_type") and not sizes.get("architectures"):
            yield "model.config: an inline table needs model_type or architectures"
            return
    heads, hidden = sizes.get("num_attention_heads"), sizes.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int):
        yield from _head_problems(
            "", hidden, heads, sizes.get("num_key_value_heads") or heads, mesh.tp, sizes.get("head_dim")
        )
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        experts = sizes.get(key)
        if isinstance(experts, int):
            yield from _expert_problems(key, experts, mesh.ep)
    longest = sizes.get("max_position_embeddings")
    if isinstance(longest, int) and config.data.sequence_length > longest:
        yield (
            f"data.sequence_length = {config.data.sequence_length} is more than the model's "
            f"max_position_embeddings = {longest}"
        )


def _expert_problems(key: str, experts: int, ep: int) -> Iterator[str]:
    if ep > experts and ep % experts:
        yield (
            f"parallel.ep = {ep} is more than {key} = {experts} and no multiple of it; "
            f"allowed: at most {experts}, or a multiple of it"
        )


def _head_problems(
    prefix: str, hidden: int, heads: int, kv_heads: int, tp: int, head_width: int | None = None
) -> Iterator[str]:
    names = ("heads", "kv_heads") if prefix else ("num_attention_heads", "num_key_value_heads")
    if hidden % heads and head_width is None:
        yield f"{prefix}{names[0]} = {heads} does not divide {prefix}hidden_size = {hidden}; allowed: {_divisors(hidden)}"
    if heads % kv_heads:
        yield f"{prefix}{names[1]} = {kv_heads} does not divide {prefix}{names[0]} = {heads}; allowed: {_divisors(heads)}"
    # Fewer key-value heads than ranks are held by all of them.
    if heads % tp:
        yield _not_divided(f"{prefix}{names[0]}", heads, "parallel.tp", tp)


def _not_divided(key: str, value: int, by_key: str, by: int) -> str:
    return f"{by_key} = {by} does not divide {key} = {value}; allowed for {by_key}: {_divisors(value)}"


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
