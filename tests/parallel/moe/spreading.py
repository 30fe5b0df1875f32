"""Experts of a model spread over all ranks of the test's group, as an engine does it."""

from __future__ import annotations

from torch import nn

from trainrt.parallel.moe.strategy import PLAIN, Strategy


def spread(
    model: nn.Module, name: str, ranks: int, strategy: Strategy = PLAIN, order: tuple[int, ...] | None = None, places: int = 1,
    recomputed: bool = False, same_rows: bool = False,
) -> None:  # fmt: skip
    """Leave this rank its part of the experts `name`, which are computed by one strategy. places: ranks that a host has.

    same_rows: all ranks come with the same rows, as those of tp do.
    """
    from torch.distributed.device_mesh import init_device_mesh

    from trainrt.config import MeshSize
    from trainrt.parallel.mesh import make_expert_groups
    from trainrt.parallel.moe.parallel import spread_experts
    from trainrt.parallel.moe.strategy import Fixed

    mesh = init_device_mesh("cpu", (ranks,))
    widths = [width for width in range(1, ranks + 1) if ranks % width == 0]
    groups = make_expert_groups(MeshSize(fsdp=ranks, ep=ranks), mesh, widths=widths, places=places)
    orders = {} if order is None else {name: order}
    spread_experts(
        model,
        {name: None},
        mesh,
        groups,
        chooser=lambda module, layout: Fixed(strategy),
        orders=orders,
        recomputed=recomputed,
        tp=mesh.get_group() if same_rows else None,
    )
