"""Functions that are taken whole, before they fall apart into operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainrt.parallel.sharded.operands import common, entered, is_split, part, wrapped
from trainrt.parallel.sharded.owners import Owners
from trainrt.parallel.sharded.sequence import split_by_rows, total, whole_rows
from trainrt.parallel.sharded.tensor import Axis, Sharded, as_operators


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Scaled dot-product attention, head by head: (B, H, S, C). Kernels are chosen by the local tensors' gradients."""
    axis: Axis = next(t.axis for t in (query, key, value) if isinstance(t, Sharded))
    by_head = all(not is_split(t) or t.along == t.ndim - 3 for t in (query, key, value))  # type: ignore[attr-defined]
    owners = next((t.owners for t in (query, key, value) if is_split(t) and t.shape[-3] == query.shape[-3]), None)  # type: ignore[attr-defined]
    if owners is None and is_split(key) and query.shape[-3] % key.shape[-3] == 0:
        owners = Owners(key.owners.array.repeat(query.shape[-3] // key.shape[-3]), axis.ranks)  # type: ignore[attr-defined]
    if not by_head or owners is None or query.ndim < 4:
        axis.gathered["scaled_dot_product_attention"] += 1
        q, k, v = (t.full() if isinstance(t, Sharded) else t for t in (query, key, value))
        mask = attn_mask.full() if isinstance(attn_mask, Sharded) else attn_mask
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    q = _part(axis, query, owners)
    k, v = (_heads(axis, t, owners) for t in (key, value))
    mask = attn_mask
    if mask is not None:
        mask = _part(axis, mask, owners) if mask.ndim > 2 and mask.shape[-3] > 1 else entered(axis, mask)
    with _own_random_numbers(axis, dropout_p):
        made = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale)
    return wrapped(axis, made, query.ndim - 3, owners)


def _part(axis: Axis, tensor: Tensor, owners: Owners) -> Tensor:
    return part(axis, tensor, tensor.ndim - 3, owners)


def _heads(axis: Axis, tensor: Tensor, owners: Owners) -> Tensor:
    """The key or value head of each query head of this rank."""
    times = len(owners) // tensor.shape[-3]
    if times == 1:
        return _part(axis, tensor, owners)
    wanted = owners.held(axis.rank) // times
    if is_split(tensor):
        held = list(tensor.owners.held(axis.rank))  # type: ignore[attr-defined]
        local, where = tensor.local, [held.index(head) for head in wanted]  # type: ignore[attr-defined]
    else:
        local, where = entered(axis, tensor), wanted.tolist()
    return local.index_select(-3, torch.tensor(where, device=local.device))


class _own_random_numbers:
    """Each rank drops other attention weights: another stream inside, the common one goes on after."""

    def __init__(self, axis: Axis, p: float) -> None:
        self._rank = axis.rank if p > 0 else -1
        self._state: Tensor | None = None

    def __enter__(self) -> None:
        if self._rank >= 0:
            seed = int(torch.randint(1 << 62, ()))
            self._state = torch.get_rng_state()
            torch.manual_seed(seed + self._rank)

    def __exit__(self, *_: Any) -> None:
        if self._state is not None:
            torch.set_rng_state(self._state)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Column- and row-parallel layers (Megatron-LM, arXiv 1909.08053, section 3) in one local product each.

    The input enters once for all columns that read it; taken as operators, each would get a view of its own.
    """
    axis: Axis = next(t.axis for t in (x, weight, bias) if isinstance(t, Sharded))
    if split_by_rows(x):
        assert isinstance(x, Sharded)
        if not isinstance(weight, Sharded) and not isinstance(bias, Sharded):
            own = None if bias is None else entered(axis, bias)
            return wrapped(axis, F.linear(x.local, entered(axis, weight), own), x.along, x.owners)  # type: ignore[arg-type]
        x = whole_rows(axis, x)
    if is_split(weight) and weight.along == 0 and not is_split(x):  # type: ignore[attr-defined]
        owners = common([(weight, 0), *([(bias, 0)] if bias is not None else [])])
        if owners is not None and owners is weight.owners:  # type: ignore[attr-defined]
            own = None if bias is None else part(axis, bias, 0, owners)
            return wrapped(axis, F.linear(entered(axis, x), weight.local, own), x.ndim - 1, owners)  # type: ignore[attr-defined]
    if is_split(x) and x.along == x.ndim - 1 and not isinstance(bias, Sharded):  # type: ignore[attr-defined]
        owners = common([(x, x.ndim - 1), (weight, 1)])
        if owners is not None and owners.disjoint:
            product = F.linear(part(axis, x, x.ndim - 1, owners), part(axis, weight, 1, owners))
            summed = total(axis, product)
            if isinstance(summed, Sharded) and bias is not None:
                return wrapped(axis, summed.local + entered(axis, bias), summed.along, summed.owners)  # type: ignore[arg-type]
            return summed if bias is None else summed + bias
    return as_operators(F.linear, axis, (x, weight, bias), {})


FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: attention,
    F.linear: linear,
}
