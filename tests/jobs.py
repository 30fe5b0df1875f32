"""Small jobs for tests: configs, engines on a mesh, and one step's worth of leaves, without launcher or files."""

from __future__ import annotations

from typing import Any

import torch

from trainrt.config import JobConfig, parse

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
MOE_LM = {
    "layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "intermediate_size": 32, "vocab_size": 64, "max_position": 32,
}  # fmt: skip


def job(kind: str = "moe_lm", *, mesh: dict[str, int] | None = None, **sections: dict[str, Any]) -> JobConfig:
    """A tiny job; `sections` add to or replace keys of its tables."""
    mesh = mesh or {}
    ranks = mesh.get("dp", 1) * mesh.get("fsdp", 1) * mesh.get("tp", 1)
    document: dict[str, Any] = {
        "model": {"kind": kind, "config": dict(MOE_LM if kind == "moe_lm" else LLAMA)},
        "data": {"sequence_length": 16, "global_batch": 8, "microbatch": 2},
        "optimizer": {"warmup_steps": 2, "learning_rate": 1e-2},
        "run": {"steps": 20},
        "parallel": {"mode": "explicit", **mesh},
        "cluster": {"nodes": 1, "workers_per_node": ranks, "device": "cpu"},
    }
    if kind == "moe_lm":
        document["moe"] = {"experts": 4, "top_k": 2}
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    return parse(document)


def engine(config: JobConfig, rank: int, orders: Any = None) -> Any:
    """The native engine of a job on this rank of the running group, freshly initialised; experts in these orders."""
    from trainrt.parallel.mesh import make_groups
    from trainrt.training.engines.native import NativeEngine
    from trainrt.training.models.build import whole_model
    from trainrt.training.pipeline import load_pipeline, loss_function
    from trainrt.training.planning import place

    mesh = config.mesh()
    assert mesh is not None
    plan = place(config, mesh, orders=orders or {})
    groups = make_groups(plan.mesh, torch.device("cpu"))
    pipeline = load_pipeline(config)
    model = whole_model(config, pipeline.model, fresh=True)
    return NativeEngine(model, plan, groups, config=config, loss=loss_function(config, pipeline), rank=rank)


def leaves(config: JobConfig, step: int) -> list[dict[str, torch.Tensor]]:
    """The logical shards of a step, of random tokens; some labels are ignored, unevenly over the shards."""
    generator = torch.Generator().manual_seed(step)
    data = config.data
    made = []
    for leaf in range(data.global_batch // data.microbatch):
        tokens = torch.randint(64, (data.microbatch, data.sequence_length + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[:, : leaf % 3] = -100
        made.append({"input_ids": tokens[:, :-1].contiguous(), "labels": labels})
    return made


def train(made: Any, config: JobConfig, *, steps: int, first: int = 1) -> list[Any]:
    """Run optimizer steps on the engine; returns the step results."""
    results = []
    for step in range(first, first + steps):
        batches = leaves(config, step)
        mine = [made.leaf_of(turn, len(batches)) for turn in range(made.rounds(len(batches)))]
        chosen = [(batches[leaf if leaf is not None else 0], 1000 + (leaf or 0)) for leaf in mine]
        results.append(made.step(step, chosen, leaves=len(batches), steps=config.run.steps))
    return results
