"""Every collective call of this process goes into a log of calls, whoever makes it.

The calls are seen where all of torch.distributed's Python functions meet: at the methods of `ProcessGroup` (one level below
`dist.all_reduce` and the like, however they were imported; object collectives and FSDP included), at the functional
collectives that DTensor calls, and at `Work.wait`, which says that somebody is waiting. The group's backend makes no
difference. What C++ calls by itself (a compiled graph, DDP's reducer) is not seen; all ranks then miss the same.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from types import CodeType, FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from trainrt.parallel.calls import FAILED, ISSUED, LEFT, POINT_TO_POINT, WAITING, Log

HELPERS = ("/torch/", "/trainrt/parallel/recording.py", "/trainrt/parallel/collectives.py", "/trainrt/parallel/fsdp.py")
"""A call's site is outside of these, where possible."""
MOST_SPLITS = 16
"""The uneven splits of larger groups are not kept."""
CACHED = 4096
UNUSUAL = (AttributeError, IndexError, TypeError, ValueError)
"""A call in a form that torch.distributed itself does not use must not fail here; it is not recorded."""
SITE_BYTES, SHAPES_BYTES = 140, 40
FUNCTIONAL = {
    "all_reduce": "all_reduce", "all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all", "broadcast": "broadcast",
}  # fmt: skip


@dataclass(slots=True)
class _Group:
    """row: in the log, None where it has none. count, pairs: of collectives, and of calls with one peer in one direction."""

    row: int | None
    count: itertools.count[int]
    pairs: dict[tuple[str, str], itertools.count[int]]


class Recorder:
    """Writes the calls of this process. `begin` before the first group of an incarnation."""

    def __init__(self, log: Log) -> None:
        self._log, self._mark = log, log.mark
        self._groups: dict[str, _Group] = {}
        self._pending: dict[int, int] = {}
        self._texts: dict[Any, bytes] = {}
        self._helpers: dict[CodeType, bool] = {}

    def begin(self, incarnation: int) -> None:
        """All groups are gone, new ones will have their names."""
        self._groups.clear()
        self._pending.clear()
        self._log.begin(incarnation)

    def enter(self, group: dist.ProcessGroup, kind: str, detail: str, tensors: Sequence[Tensor]) -> int | None:
        """A call begins; where its state is kept, or None where it is not recorded."""
        name = group.group_name
        known = self._groups.get(name) or self._meet(group, name)
        if known.row is None:
            return None
        frame = self._caller()
        if len(tensors) == 1:
            # What makes a text costs more than to find it again.
            tensor = tensors[0]
            key = (kind, detail, tensor.shape, tensor.dtype, frame.f_code, frame.f_lasti)
            text = self._texts.get(key)
            if text is None:
                if len(self._texts) > CACHED:
                    self._texts.clear()
                text = self._texts[key] = text_of(kind, detail, tensors, frame)
        else:
            text = text_of(kind, detail, tensors, frame)
        if kind in POINT_TO_POINT:
            count = known.pairs.setdefault((kind, detail), itertools.count(1))
            return self._log.enter(known.row, next(count), text, collective=False)
        return self._log.enter(known.row, next(known.count), text, collective=True)

    def returned(self, place: int, work: Any) -> None:
        """The backend has taken a call, and `work` (a Work, or a functional collective's tensor) will be waited for."""
        self._mark(place, ISSUED)
        if work is not None:
            if len(self._pending) > CACHED:
                self._pending.clear()
            self._pending[id(work)] = place

    def failed(self, place: int) -> None:
        self._mark(place, FAILED)

    def waiting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """`method` of a Work, or of a functional collective's tensor, that waits for its call."""
        pending, mark = self._pending, self._mark

        def wait(work: Any, *arguments: Any, **named: Any) -> Any:
            place = pending.pop(id(work), None)
            if place is None:
                return method(work, *arguments, **named)
            mark(place, WAITING)
            try:
                result = method(work, *arguments, **named)
            except BaseException:
                mark(place, FAILED)
                raise
            mark(place, LEFT)
            return result

        return wait

    def _meet(self, group: dist.ProcessGroup, name: str) -> _Group:
        """The first call of a group."""
        ranks = dist.get_process_group_ranks(group)
        row = self._log.add_group(name, group.group_desc or name, ranks)
        made = self._groups[name] = _Group(row, itertools.count(1), {})
        return made

    def _caller(self) -> FrameType:
        """The innermost frame outside of the helpers, else outside of this file."""
        first, helpers = sys._getframe(3), self._helpers
        frame: FrameType | None = first
        while frame is not None:
            code = frame.f_code
            helper = helpers.get(code)
            if helper is None:
                helper = helpers[code] = any(part in code.co_filename for part in HELPERS)
            if not helper:
                return frame
            frame = frame.f_back
        return first


def text_of(kind: str, detail: str, tensors: Sequence[Tensor], frame: FrameType) -> bytes:
    """A call as the log has it."""
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    site = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"[-SITE_BYTES:]
    return f"{kind}|{detail}|{shapes_of(tensors)}|{dtype}|{site}".encode()


def shapes_of(tensors: Sequence[Tensor]) -> str:
    """ "4x3", "8*4x3" for eight of them, "4,5" for others."""
    texts = ["x".join(map(str, tensor.shape)) or "1" for tensor in tensors]
    if len(texts) > 1 and len(set(texts)) == 1:
        return f"{len(texts)}*{texts[0]}"
    text = ",".join(texts)
    return text if len(text) <= SHAPES_BYTES else f"{len(texts)}*?"


# What is recorded of which call.

Described = tuple[str, str, Sequence[Tensor]]


def _all_to_all(
    _: Any, output: Tensor, input: Tensor, out: Sequence[int] = (), into: Sequence[int] = (), *__: Any
) -> Described:
    """Equal parts have one size on all ranks, uneven ones are told apart by their splits."""
    if not out and not into:
        return "all_to_all", "", [input]
    if max(len(out), len(into)) > MOST_SPLITS:
        return "all_to_all", "uneven", [input]
    return "all_to_all", f"from {' '.join(map(str, out)) or 'all'} to {' '.join(map(str, into)) or 'all'}", [input]


METHODS: dict[str, Callable[..., Described]] = {
    "allreduce": lambda _, tensors, *a: ("all_reduce", "", tensors),
    "allreduce_coalesced": lambda _, tensors, *a: ("all_reduce", "", tensors),
    # Of uneven parts every rank knows all sizes.
    "allgather": lambda _, outputs, inputs, *a: (
        "all_gather", "", inputs if len({part.shape for part in outputs[0]}) == 1 else outputs[0],
    ),
    "all_gather_single": lambda _, output, input, *a: ("all_gather", "", [input]),
    "_allgather_base": lambda _, output, input, *a: ("all_gather", "", [input]),
    "all_gather_single_coalesced": lambda _, outputs, inputs, *a: ("all_gather", "coalesced", inputs),
    "allgather_into_tensor_coalesced": lambda _, outputs, inputs, *a: ("all_gather", "coalesced", inputs),
    "allgather_coalesced": lambda _, outputs, inputs, *a: ("all_gather", "coalesced", inputs),
    "reduce_scatter": lambda _, outputs, inputs, *a: ("reduce_scatter", "", inputs[0]),
    "reduce_scatter_single": lambda _, output, input, *a: ("reduce_scatter", "", [input]),
    "_reduce_scatter_base": lambda _, output, input, *a: ("reduce_scatter", "", [input]),
    "reduce_scatter_single_coalesced": lambda _, outputs, inputs, *a: (
        "reduce_scatter", "coalesced", inputs,
    ),
    "reduce_scatter_tensor_coalesced": lambda _, outputs, inputs, *a: (
        "reduce_scatter", "coalesced", inputs,
    ),
    "all_to_all_single": _all_to_all,
    "alltoall_base": _all_to_all,
    # A list sends to each what that one's list receives from it; only the type is the same on all ranks.
    "alltoall": lambda _, outputs, inputs, *a: ("all_to_all", "list", inputs[:1]),
    "broadcast": lambda _, tensors, *a: ("broadcast", f"root {a[0].rootRank}" if a else "", tensors),
    "reduce": lambda _, tensors, *a: ("reduce", f"root {a[0].rootRank}" if a else "", tensors),
    "gather": lambda _, outputs, inputs, *a: ("gather", f"root {a[0].rootRank}" if a else "", inputs),
    "scatter": lambda _, outputs, inputs, *a: ("scatter", f"root {a[0].rootRank}" if a else "", outputs),
    "barrier": lambda _, *a: ("barrier", "", ()),
    "send": lambda _, tensors, peer, *a: ("send", f"to {peer}", tensors),
    "recv": lambda _, tensors, peer, *a: ("recv", f"from {peer}", tensors),
}  # fmt: skip


_recorder: Recorder | None = None
"""One of a process, like the methods that it stands behind."""


def record_calls(log: Log) -> Recorder:
    """From now on all calls of this process go into `log`. Once a process, before its first group."""
    global _recorder
    assert _recorder is None
    _recorder = recorder = Recorder(log)
    for name, describe in METHODS.items():
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, _method(recorder, getattr(dist.ProcessGroup, name), describe))
    dist.Work.wait = recorder.waiting(dist.Work.wait)  # type: ignore[method-assign]
    for name, kind in FUNCTIONAL.items():
        packet = getattr(torch.ops._c10d_functional, name)
        packet._op = _functional(recorder, packet._op, kind)
    packet = torch.ops._c10d_functional.wait_tensor
    packet._op = wraps(packet._op)(recorder.waiting(packet._op))
    return recorder


def _method(recorder: Recorder, method: Callable[..., Any], describe: Callable[..., Described]) -> Callable[..., Any]:
    def recorded(self: dist.ProcessGroup, *arguments: Any, **named: Any) -> Any:
        try:
            kind, detail, tensors = describe(self, *arguments, *named.values())
            place = recorder.enter(self, kind, detail, [tensors] if isinstance(tensors, Tensor) else tensors)
        except UNUSUAL:
            place = None
        if place is None:
            return method(self, *arguments, **named)
        try:
            work = method(self, *arguments, **named)
        except BaseException:
            recorder.failed(place)
            raise
        recorder.returned(place, work)
        return work

    return recorded


def _functional(recorder: Recorder, op: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """A functional collective: (tensor, ..., name of the group)."""

    @wraps(op)
    def recorded(tensor: Tensor, *arguments: Any) -> Any:
        group = arguments[-1]
        if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            return op(tensor, *arguments)
        if isinstance(group, str):
            group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
        detail = _all_to_all(None, tensor, tensor, *arguments[:2])[1] if kind == "all_to_all" else ""
        place = recorder.enter(group, kind, detail, [tensor])
        result = op(tensor, *arguments)
        if place is not None:
            recorder.returned(place, result)
        return result

    return recorded
