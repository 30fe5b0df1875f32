"""What no single key can say: keys that do not fit each other, what is not built, files that are not there.

Each check yields one line per problem: key, value, what is allowed.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainrt.config.sections import JobConfig, MeshSize, MoeConfig

MOE_LM_KEYS = ("prioritised", "routing", "shared_experts", "balance", "bias_rate")


def problems(config: JobConfig, document: dict[str, Any]) -> Iterator[str]:
    """All of them. document: what was given, without defaults. The sizes of a moe_lm are valid each for itself."""
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
        sizes = config.moe_lm
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
