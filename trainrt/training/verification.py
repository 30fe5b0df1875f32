"""The verification of a job's plan, before it is launched: real ranks on this machine, once for a structure.

The ranks are processes of this module (`python -m trainrt.training.verification`), so that the driver stays free of
process groups.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainrt.config import JobConfig
from trainrt.errors import PlanError
from trainrt.parallel.moe.form import ExpertsForm
from trainrt.parallel.moe.strategy import PLAIN, Strategy
from trainrt.parallel.plan import Plan
from trainrt.parallel.planner.sharding import Cache, experts_in, key_of, sharding_of
from trainrt.parallel.processes import last_word, run_ranks
from trainrt.parallel.verdict import Verdict
from trainrt.training.blueprint import blueprint_of, scaled
from trainrt.training.pipeline import load_pipeline

RANKS = 4
"""Processes at most; a plan for more ranks is verified for two, and its slices of experts by each of them alone."""

SECONDS = 300
VERIFIED = (PLAIN, Strategy(0), Strategy(1, 2, 1, hot=1))
"""Strategies under which experts of other models are compared: with some of them, with all, and with one, where whole ones are
lent. Ours know how many they are, and are compared under one."""


def verified(config: JobConfig, plan: Plan) -> Plan:
    """The plan with the verdicts on its forms that need one (tp, ep). Raises PlanError where one is not right."""
    if plan.mesh.tp == plan.mesh.ep == 1:
        return plan
    cache = Cache()
    blueprint = blueprint_of(config, load_pipeline(config))
    verdicts: dict[str, dict[str, Any]] = {}
    for axis in ("tp", "ep"):
        size = getattr(plan.mesh, axis)
        if size == 1:
            continue
        ranks = size if size <= RANKS else 2
        placed = axis == "ep" and bool(plan.orders)
        sliced = size if axis == "ep" and _cuts_experts(plan) else 0
        key = key_of(f"verified {axis} {ranks}{' placed' if placed else ''}, slices over {sliced}", blueprint)
        known = cache.read(key)
        if known is None:
            known = _run(config, axis, ranks, placed=placed, sliced=sliced)
        Verdict(**known).require(f"parallel.{axis} = {size}")
        cache.write(key, known)
        verdicts[axis] = known
    return replace(plan, verification=verdicts)


def _cuts_experts(plan: Plan) -> bool:
    """Whether experts of a model that is not ours are cut into slices."""
    return any(isinstance(form, ExpertsForm) and form.slices for form in plan.experts.values())


def _run(config: JobConfig, axis: str, ranks: int, *, placed: bool, sliced: int) -> dict[str, Any]:
    """Start the ranks and return what the first one says. Raises PlanError where they do not end well."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(config.model_dump_json())
        try:
            run_ranks(__name__, folder, ranks, axis, str(ranks), str(placed), str(sliced), seconds=SECONDS)
        except TimeoutError as error:
            raise PlanError(f"parallel.{axis}: the plan could not be verified: {error}") from error
        verdict = folder / "verdict.json"
        if not verdict.exists():
            raise PlanError(f"parallel.{axis}: the plan could not be verified: {last_word(folder, ranks)}")
        found: dict[str, Any] = json.loads(verdict.read_text())
        return found


def main(folder: str, axis: str, ranks: int, placed: bool, sliced: int, rank: int) -> None:
    """One rank of a verification. sliced: over how many ranks experts of others are cut into slices; 0: they are not."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from trainrt.parallel.verify import compare_experts, compare_slices, compare_split

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=SECONDS)
    )
    mesh = init_device_mesh("cpu", (ranks,))
    config = JobConfig.model_validate_json((Path(folder) / "job.json").read_text())
    blueprint = scaled(config, load_pipeline(config))
    if axis == "tp":
        verdict = compare_split(blueprint, sharding_of(blueprint, ranks), mesh)
    else:
        forms = experts_in(blueprint)
        stacked = [form.experts for form in forms.values() if isinstance(form, ExpertsForm)]
        ways = VERIFIED[: 1 if not stacked else 3 if min(stacked) >= ranks else 2]
        verdicts = [compare_experts(blueprint, forms, mesh, way, placed=placed) for way in ways]
        if sliced:
            verdicts.append(compare_slices(blueprint, forms, mesh, sliced))
        verdict = next((verdict for verdict in verdicts if not verdict.right), verdicts[0])
    if rank == 0:
        partial = Path(folder) / "verdict.partial"
        partial.write_text(json.dumps(asdict(verdict)))
        partial.rename(Path(folder) / "verdict.json")
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True", int(sys.argv[5]), int(sys.argv[6]))
