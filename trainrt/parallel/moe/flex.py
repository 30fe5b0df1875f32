"""Exchange - experts - exchange as one differentiable function, in chunks that overlap.

Backward takes the chunks in reverse order, in a number of its own. Where both numbers are the same, what autograd kept of each
chunk serves; else, and where layers are computed again anyhow, experts are computed again for the chunks of backward (Tutel,
MLSys'23, section 3.3; one schedule for gloo and NCCL). The gaps are filled with what nobody waits for: gradients of weights (zero
bubble, arXiv 2401.10241, section 2, splits a backward pass the same way), and what is computed beside, such as shared experts.

Legend: N rows sent, M rows received, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trainrt.events import ring
from trainrt.parallel.collectives import all_gather, reduce_scatter
from trainrt.parallel.moe.exchange import Chunk, Exchange
from trainrt.parallel.schedule import Schedule

Compute = Callable[[Tensor, list[int], Sequence[Tensor]], Tensor]
"""Rows sorted by expert, rows of each expert, and weights, to rows."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of what experts compute, and which of their weights it takes.

    Experts in several pieces have gradients of rows without those of weights at no cost, which then fill gaps.
    """

    compute: Compute
    weights: tuple[int, ...]


@dataclass(slots=True)
class _Kept:
    """One chunk in the experts: for each piece its rows, and their results, with the graph between them."""

    rows: list[Tensor]
    results: list[Tensor]

    @classmethod
    def of(
        cls, pieces: Sequence[Piece], rows: Tensor, counts: list[int], weights: Sequence[Tensor], *, graph: bool
    ) -> _Kept:
        kept = cls([], [])
        # The graph is kept as it is, whatever hooks there are on what the graph around it saves.
        with torch.set_grad_enabled(graph), saved_tensors_hooks(_as_it_is, _as_it_is):
            for piece in pieces:
                kept.rows.append(rows.requires_grad_(graph))
                kept.results.append(piece.compute(rows, counts, [weights[i] for i in piece.weights]))
                rows = kept.results[-1].detach()
        return kept

    @property
    def result(self) -> Tensor:
        return self.results[-1].detach()


class _Sums:
    """Gradients of the weights, added up over chunks."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights
        self.found: list[Tensor | None] = [None] * len(weights)

    def wanted(self, piece: Piece) -> list[int]:
        return [i for i in piece.weights if self.weights[i].requires_grad]

    def add(self, indices: list[int], gradients: Sequence[Tensor]) -> None:
        for i, gradient in zip(indices, gradients, strict=True):
            known = self.found[i]
            self.found[i] = gradient if known is None else known + gradient


class Beside:
    """What is computed while rows are on their way: a differentiable function of some tensors, and its result.

    No dataclass: FSDP2 would make a copy of it on its way into a module.
    """

    def __init__(self, compute: Callable[..., Tensor], *tensors: Tensor) -> None:
        self.compute, self.tensors = compute, tensors
        self.result: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """How rows travel, and through which pieces. degrees: chunks forward and backward.

    recomputed: nothing is kept for backward in any case.
    """

    exchange: Exchange
    pieces: Sequence[Piece]
    degrees: tuple[int, int]
    recomputed: bool

    def __call__(self, x_ND: Tensor, weights: Sequence[Tensor], besides: Sequence[Beside] = ()) -> Tensor:
        """The rows that come back. Fills in the results of what is beside."""
        # The graph may know functions, not results, which know the graph.
        tasks = [(beside.compute, len(beside.tensors)) for beside in besides]
        tensors = [tensor for beside in besides for tensor in beside.tensors]
        graph = torch.is_grad_enabled()
        y_ND, *results = Travel.apply(self, tasks, graph, len(weights), x_ND, *weights, *tensors)
        for beside, result in zip(besides, results, strict=True):
            beside.result = result
        return y_ND


class Travel(torch.autograd.Function):
    """Rows to their experts and back. Gradients of weights are those of all rows that came here."""

    @staticmethod
    def forward(
        ctx: Any, way: Way, tasks: Sequence[tuple[Callable[..., Tensor], int]], graph: bool, weights: int,
        x_ND: Tensor, *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        graph = graph and any(ctx.needs_input_grad)
        forward_degree, backward_degree = way.degrees
        ctx.keeps = forward_degree == backward_degree and not way.recomputed
        ctx.way, ctx.tasks, ctx.weights = way, tasks, weights
        chunks, leaves = way.exchange.chunks(forward_degree), _leaves(tensors)
        kept: dict[int, _Kept] = {}
        results: dict[int, Tensor] = {}

        def experts(k: int, arrived: Tensor) -> Tensor:
            rows, counts = arrived[chunks[k].order], chunks[k].counts
            ring.computed(len(rows))
            kept[k] = _Kept.of(way.pieces, rows, counts, leaves[:weights], graph=graph and ctx.keeps)
            return chunks[k].unsorted(kept[k].result)

        def beside(number: int) -> None:
            own = _of_task(tasks, number, leaves[weights:])
            results[number] = _computed(tasks[number][0], own, graph=graph and ctx.keeps)

        fillers: deque[Callable[[], None]] = deque(partial(beside, number) for number in range(len(tasks)))
        y_ND = _travelled(x_ND, chunks, way.exchange, experts, range(len(chunks)), fillers)
        if graph and ctx.keeps:
            ctx.chunks, ctx.leaves, ctx.kept, ctx.results = chunks, leaves, kept, results
        elif graph:
            ctx.save_for_backward(_joined(chunks, {k: kept[k].rows[0] for k in kept}, x_ND), *tensors)
        return y_ND, *(results[number].detach() for number in range(len(tasks)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        way, tasks = ctx.way, ctx.tasks
        saved: tuple[Tensor, ...] = ()
        if ctx.keeps:
            chunks, leaves, kept, results = ctx.chunks, ctx.leaves, ctx.kept, ctx.results
        else:
            # Read once: checkpointing of activations allows no more.
            saved = ctx.saved_tensors
            chunks, leaves, kept, results = way.exchange.chunks(way.degrees[1]), _leaves(saved[1:]), {}, {}
        sums = _Sums(leaves[: ctx.weights])
        found: dict[int, list[Tensor | None]] = {}

        def experts(k: int, arrived: Tensor) -> Tensor:
            chunk = chunks[k]
            if k not in kept:
                rows_MD = saved[0][chunk.arrived]
                kept[k] = _Kept.of(way.pieces, rows_MD[chunk.order], chunk.counts, sums.weights, graph=True)
            gradient, later = _of_rows(way.pieces, kept.pop(k), arrived[chunk.order], sums)
            fillers.extend(later)
            return chunk.unsorted(gradient)

        def beside(number: int) -> None:
            own = _of_task(tasks, number, leaves[ctx.weights :])
            wanted = [leaf for leaf in own if leaf.requires_grad]
            of_wanted: Iterator[Tensor] = iter(())
            if wanted:
                result = results.pop(number) if ctx.keeps else _computed(tasks[number][0], own, graph=True)
                of_wanted = iter(torch.autograd.grad(result, wanted, grads[1 + number], materialize_grads=True))
            found[number] = [next(of_wanted) if leaf.requires_grad else None for leaf in own]

        fillers: deque[Callable[[], None]] = deque(partial(beside, number) for number in range(len(tasks)))
        order = reversed(range(len(chunks)))
        grad_x_ND = _travelled(grads[0], chunks, way.exchange, experts, order, fillers)
        of_tasks = [gradient for number in range(len(tasks)) for gradient in found[number]]
        return None, None, None, None, grad_x_ND, *sums.found, *of_tasks


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]


def _of_task(tasks: Sequence[tuple[Callable[..., Tensor], int]], number: int, leaves: list[Tensor]) -> list[Tensor]:
    """The tensors of one thing that is computed beside."""
    first = sum(length for _, length in tasks[:number])
    return leaves[first : first + tasks[number][1]]


def _computed(compute: Callable[..., Tensor], leaves: list[Tensor], *, graph: bool) -> Tensor:
    with torch.set_grad_enabled(graph), saved_tensors_hooks(_as_it_is, _as_it_is):
        return compute(*leaves)


def _travelled(
    x_ND: Tensor, chunks: list[Chunk], exchange: Exchange, experts: Callable[[int, Tensor], Tensor],
    order: Iterable[int], fillers: deque[Callable[[], None]],
) -> Tensor:  # fmt: skip
    """Rows over the hops of the way there, through the experts, and back over the same hops."""

    def there(hop: int, k: int, arrived: Tensor | None) -> Any:
        return chunks[k].hops[hop].there(x_ND[chunks[k].rows] if arrived is None else arrived)

    def back(hop: int, k: int, y_MD: Tensor) -> Any:
        return chunks[k].hops[hop].back(y_MD)

    hops = range(exchange.hops)
    schedule = Schedule(
        [partial(there, hop) for hop in hops], experts, [partial(back, hop) for hop in reversed(hops)], fillers
    )
    y_ND = torch.empty_like(x_ND)
    for k, rows in schedule.run(order):
        y_ND[chunks[k].rows] = rows
    return y_ND


def _of_rows(
    pieces: Sequence[Piece], kept: _Kept, gradient: Tensor, sums: _Sums
) -> tuple[Tensor, list[Callable[[], None]]]:
    """The gradient of a chunk's rows, and what is left to do for those of the weights, if they can be had apart."""
    later: list[Callable[[], None]] = []
    for number, piece in reversed(list(enumerate(pieces))):
        rows, result, wanted = kept.rows[number], kept.results[number], sums.wanted(piece)
        apart = len(pieces) > 1 and bool(wanted)
        inputs = [rows] if apart else [rows, *(sums.weights[i] for i in wanted)]
        found = torch.autograd.grad(result, inputs, gradient, retain_graph=apart, materialize_grads=True)
        if apart:
            later.append(partial(_of_weights, result, wanted, gradient, sums))
        else:
            sums.add(wanted, found[1:])
        gradient = found[0]
    return gradient, later


def _of_weights(result: Tensor, wanted: list[int], gradient: Tensor, sums: _Sums) -> None:
    weights = [sums.weights[i] for i in wanted]
    sums.add(wanted, torch.autograd.grad(result, weights, gradient, materialize_grads=True))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _joined(chunks: list[Chunk], rows: dict[int, Tensor], like: Tensor) -> Tensor:
    """The rows received, in the order of senders, of all chunks."""
    joined = like.new_empty((sum(len(part) for part in rows.values()), *like.shape[1:]))
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
