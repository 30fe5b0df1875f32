"""In what two jobs differ, as far as it changes what is learned."""

from __future__ import annotations

from typing import Any

from trainrt.config.sections import JobConfig

LEARNED = ("model", "data", "optimizer", "moe")
STRATEGY_KEYS = {
    "moe.r", "moe.degree", "moe.backward_degree", "moe.all_to_all", "moe.hot_experts", "moe.placement",
    "model.activation_checkpointing",
}  # fmt: skip


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
