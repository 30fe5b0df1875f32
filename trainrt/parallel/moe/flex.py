"""Exchange - experts - exchange as one differentiable function, in chunks that overlap.

Backward takes the chunks in reverse order, in a number of its own. Where both numbers are the same, what autograd kept of each
chunk serves; else, and where layers are computed again anyhow, experts are computed again for the chunks of backward (Tutel,
MLSys'23, section 3.3; one schedule for gloo and NCCL).

Legend: N rows sent, M rows received, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trainrt.parallel.collectives import all_gather, reduce_scatter, start_exchange
from trainrt.parallel.moe.exchange import Chunk, Exchange
from trainrt.parallel.moe.strategy import Strategy
from trainrt.parallel.schedule import run_chunks

Compute = Callable[[Tensor, list[int], Sequence[Tensor]], Tensor]
"""Rows sorted by expert, rows of each expert, and weights, to rows of the same shape."""


class Travel(torch.autograd.Function):
    """Rows to their experts and back. Gradients of weights are those of all rows that came here."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, compute: Compute, strategy: Strategy, x_ND: Tensor, *weights: Tensor
    ) -> Tensor:
        chunks = exchange.chunks(strategy.degree)
        keeps = strategy.keeps and any(ctx.needs_input_grad)
        leaves = [weight.detach().requires_grad_(weight.requires_grad) for weight in weights]
        rows: dict[int, Tensor] = {}
        results: dict[int, Tensor] = {}

        def dispatch(k: int, _: None) -> Any:
            return start_exchange(x_ND[chunks[k].rows], chunks[k].send, chunks[k].receive, exchange.group)

        def experts(k: int, arrived: Tensor) -> Tensor:
            rows[k] = arrived[chunks[k].order].requires_grad_(keeps)
            # The chunk's graph is kept as it is, whatever hooks there are on what the graph around it saves.
            with torch.set_grad_enabled(keeps), saved_tensors_hooks(_as_it_is, _as_it_is):
                results[k] = compute(rows[k], chunks[k].counts, leaves)
            return results[k].detach()

        def combine(k: int, y: Tensor) -> Any:
            return start_exchange(chunks[k].unsorted(y), chunks[k].receive, chunks[k].send, exchange.group)

        y_ND = torch.empty_like(x_ND)
        for k, back in run_chunks(range(len(chunks)), dispatch, experts, combine):
            y_ND[chunks[k].rows] = back
        ctx.exchange, ctx.compute, ctx.strategy, ctx.leaves = exchange, compute, strategy, leaves
        if keeps:
            ctx.chunks, ctx.rows, ctx.results = chunks, rows, results
        elif any(ctx.needs_input_grad):
            ctx.save_for_backward(_joined(chunks, rows, x_ND))
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        exchange, (grad_ND,) = ctx.exchange, grads
        wanted = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        sums: dict[int, Tensor] = {}
        if ctx.strategy.keeps:
            chunks = ctx.chunks
            kept = {k: (ctx.rows[k], ctx.results[k]) for k in range(len(chunks))}
        else:
            chunks, kept = exchange.chunks(ctx.strategy.backward_degree), {}
            (rows_MD,) = ctx.saved_tensors

        def dispatch(k: int, _: None) -> Any:
            return start_exchange(grad_ND[chunks[k].rows], chunks[k].send, chunks[k].receive, exchange.group)

        def experts(k: int, arrived: Tensor) -> Tensor:
            if k not in kept:
                rows = rows_MD[chunks[k].arrived][chunks[k].order].requires_grad_()
                with torch.enable_grad():
                    kept[k] = rows, ctx.compute(rows, chunks[k].counts, ctx.leaves)
            rows, result = kept.pop(k)
            found = torch.autograd.grad(result, [rows, *wanted], arrived[chunks[k].order], materialize_grads=True)
            for position, gradient in enumerate(found[1:]):
                sums[position] = sums[position] + gradient if position in sums else gradient
            return found[0]

        def combine(k: int, gradient: Tensor) -> Any:
            return start_exchange(chunks[k].unsorted(gradient), chunks[k].receive, chunks[k].send, exchange.group)

        grad_x_ND = torch.empty_like(grad_ND)
        for k, back in run_chunks(reversed(range(len(chunks))), dispatch, experts, combine):
            grad_x_ND[chunks[k].rows] = back
        found = iter(sums[position] for position in range(len(wanted)))
        return None, None, None, grad_x_ND, *(next(found) if leaf.requires_grad else None for leaf in ctx.leaves)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _joined(chunks: list[Chunk], rows: dict[int, Tensor], like: Tensor) -> Tensor:
    """The rows received, in the order of senders, of all chunks."""
    joined = like.new_empty((sum(sum(chunk.receive) for chunk in chunks), *like.shape[1:]))
    for k, chunk in enumerate(chunks):
        joined[chunk.arrived] = chunk.unsorted(rows[k])
    return joined


class GatherSlices(torch.autograd.Function):
    """The equal parts of a weight that the ranks of a group hold, put together along `dim`; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, held: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return torch.cat(all_gather(held.contiguous(), group).unbind(0), dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        parts = torch.stack(grads[0].chunk(ctx.group.size(), ctx.dim))
        return reduce_scatter(parts, ctx.group)[0], None, None
