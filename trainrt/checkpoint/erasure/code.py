"""A systematic erasure code: k data shards and m parity shards of equal length; any k of the k + m give back all.

Parity shard r (0 <= r < m <= 3) is, byte by byte,  sum over i of D[i] * (2^r)^i  in GF(2^8): r = 0 is XOR, r = 1 makes
it the P+Q of RAID-6 (H. P. Anvin, "The mathematics of RAID-6"), r = 2 the P+Q+R of RAID-Z3, which took 1, 2 and 4 as
generators for the same reason: each is one or two doublings a shard.

Why any k shards do (the code is MDS): with e data shards lost, the equations of e parity rows restricted to the lost
columns have, for every choice of rows, a determinant that is a Vandermonde determinant in the distinct elements 2^i, or
one times a product of them, or (rows 0 and 2) the square of one, the characteristic being 2. None is zero for
k <= 255. This is where a Vandermonde matrix may be appended as it stands; with four rows it may not
(J. S. Plank, Y. Ding, "Note: Correction to the 1997 tutorial on Reed-Solomon coding"), hence m <= 3.

A library without I/O. Calls hold no lock and release the GIL in a few long stretches; a `Code` may be shared by
threads. XOR alone (m = 1, and one lost data shard rebuilt with parity shard 0) needs numpy and nothing else;
the rest imports numba at its first use: see `Code.warm_up`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trainrt.checkpoint.erasure.field import Matrix, invert, multiply, power
from trainrt.errors import ConfigError, StoreError

MOST_PARITY = 3
MOST_SHARDS = 255

Shard = np.ndarray | None  # uint8, one-dimensional, contiguous, 8-aligned, a multiple of 8 long; None: all zeros


class Code:
    """A code of k data and m parity shards, numbered 0..k-1 (data) and k..k+m-1 (parity).

    Shards are one-dimensional contiguous uint8 arrays, all of one length, a multiple of 8, at addresses that are a
    multiple of 8. None stands for a shard known to be all zeros, and is not read. Outputs must not overlap inputs.
    Wrong arrays are bugs: ValueError.
    """

    def __init__(self, k: int, m: int) -> None:
        if not 1 <= m <= MOST_PARITY:
            raise ConfigError(f"snapshot.parity_shards = {m} is not possible; allowed: 1 to {MOST_PARITY}")
        if not 1 <= k <= MOST_SHARDS - m:
            raise ConfigError(
                f"snapshot.data_shards = {k} is not possible with parity_shards = {m}; allowed: 1 to {MOST_SHARDS - m}"
            )
        self.k, self.m = k, m

    def __repr__(self) -> str:
        return f"Code(k={self.k}, m={self.m})"

    def encode(self, data: Sequence[Shard], parity: np.ndarray, index: int) -> None:
        """Write parity shard `index` (0..m-1) of the k data shards into `parity`."""
        if not 0 <= index < self.m:
            raise ValueError(f"parity index {index} of {self}")
        (out,), shards = _checked([parity], self._all(data))
        if index == 0:
            _xor(shards, out)
        else:
            _encode((index,), shards, [out])

    def encode_all(self, data: Sequence[Shard], parity: Sequence[np.ndarray]) -> None:
        """Write all m parity shards, reading the data once."""
        if len(parity) != self.m:
            raise ValueError(f"{len(parity)} parity shards for {self}")
        outs, shards = _checked(parity, self._all(data))
        if self.m == 1:
            _xor(shards, outs[0])
        else:
            _encode(tuple(range(self.m)), shards, outs)

    def decode(self, have: Mapping[int, Shard], want: int, out: np.ndarray) -> None:
        """Write shard `want` into `out`, from any k (or more) of the others. Raises StoreError if there are fewer."""
        self.decode_many(have, {want: out})

    def decode_many(self, have: Mapping[int, Shard], out: Mapping[int, np.ndarray]) -> None:
        """Write several lost shards (number -> where to), reading what there is once."""
        wants, names = tuple(sorted(out)), tuple(sorted(have))
        for name in (*wants, *names):
            if not 0 <= name < self.k + self.m:
                raise ValueError(f"shard {name} of {self}")
        if not wants or set(wants) & set(names):
            raise ValueError(f"nothing to rebuild: {wants} wanted, {names} there")
        if len(names) < self.k:
            missing = [n for n in range(self.k + self.m) if n not in have]
            raise StoreError(
                f"{self.k} of {self.k + self.m} shards are needed and {len(names)} are there; missing: "
                + ", ".join(self.name(n) for n in missing)
            )
        if wants[0] >= self.k and names[: self.k] == tuple(range(self.k)):
            for want in wants:
                self.encode([have[i] for i in range(self.k)], out[want], want - self.k)
            return
        plan = _plan(self.k, names, wants)
        inputs = [have.get(i) for i in range(self.k)] + [have.get(self.k + r) for r in range(MOST_PARITY)]
        used = [*range(self.k), *(self.k + r for r in plan.parity)]
        outs, shards = _checked([out[w] for w in wants], [inputs[i] if i in used else None for i in range(len(inputs))])
        if plan.closing == 0 and len(outs) == 1:
            _xor(shards, outs[0])
        else:
            _decode(plan, shards[: self.k], shards[self.k :], outs)

    def name(self, shard: int) -> str:
        """How messages call a shard."""
        return f"data shard {shard}" if shard < self.k else f"parity shard {shard - self.k}"

    def warm_up(self) -> None:
        """Load what encode and decode need, so that the first call is not a slow one.

        Nothing for m = 1. Else numba: compiled once per machine and kept beside the package (or in numba's cache
        directory), from then on loaded.
        """
        if self.m == 1:
            return
        data: list[Shard] = [None] * self.k
        parity = [np.zeros(8, np.uint8) for _ in range(self.m)]
        self.encode_all(data, parity)
        self.decode({i: None for i in range(1, self.k + self.m) if i != self.k}, 0, parity[0])

    def _all(self, data: Sequence[Shard]) -> Sequence[Shard]:
        if len(data) != self.k:
            raise ValueError(f"{len(data)} data shards for {self}")
        return data


def _checked(outs: Sequence[np.ndarray], shards: Sequence[Shard]) -> tuple[list[np.ndarray], list[Shard]]:
    """The arrays as words. Raises ValueError for what the kernels, which take addresses, could not survive."""
    given = [a for a in (*outs, *shards) if a is not None]
    addresses = [a.ctypes.data for a in given]
    size = given[0].size
    for array, address in zip(given, addresses, strict=True):
        if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous:
            raise ValueError(f"a shard is a contiguous row of uint8, not {array.dtype} of shape {array.shape}")
        if array.size != size or size % 8 or address % 8:
            raise ValueError(
                f"shards are of one length, a multiple of 8, at addresses that are; not {array.size} bytes at "
                f"{address:#x} beside {size}"
            )
    for number, array in enumerate(outs):
        # By hand: np.may_share_memory lets the GIL go, and waits for it, at each call.
        others = [*addresses[:number], *addresses[number + 1 :]]
        if not array.flags.writeable or any(abs(other - addresses[number]) < size for other in others):
            raise ValueError("an output is read-only, or overlaps another shard")
    return [a.view(np.uint64) for a in outs], [None if a is None else a.view(np.uint64) for a in shards]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How wanted shards follow from those there: out[w] = sum over rows r of (row r of the data xor parity r) * c.

    Row r of the data is taken over the data shards there. `parity` are the parity shards that go in.
    """

    parity: tuple[int, ...]
    constants: Matrix  # per wanted shard, per row 0..2
    closing: int  # the number of the wanted shard that is row 0 xor the wanted ones before it; -1: none


@lru_cache(maxsize=1024)
def _plan(k: int, names: tuple[int, ...], wants: tuple[int, ...]) -> _Plan:
    """`names` are the shards there, at least k of them; `wants` are not among them."""
    lost = [i for i in range(k) if i not in names]
    parity = tuple(n - k for n in names if n >= k)[: len(lost)]
    # Lost data = inverse * (row xor parity), for the rows whose parity is there.
    inverse = invert(tuple(tuple(power(r * i) for i in lost) for r in parity))
    constants = []
    for want in wants:
        of_row = [0] * MOST_PARITY
        for position, i in enumerate(lost):
            # What the lost shard i counts for in the wanted one: all, nothing, or its place in a parity row.
            weight = power((want - k) * i) if want >= k else int(want == i)
            for row, constant in zip(parity, inverse[position], strict=True):
                of_row[row] ^= multiply(weight, constant)
        if want >= k:
            of_row[want - k] = 1
        constants.append(tuple(of_row))
    # Where all lost data is wanted, the last costs no multiplication; if it is the only one, this is plain XOR.
    closes = 0 in parity and wants[: len(lost)] == tuple(lost)
    return _Plan(parity, tuple(constants), closing=len(lost) - 1 if closes else -1)


def _xor(shards: Sequence[Shard], out: np.ndarray) -> None:
    """Plain numpy: as fast as memory, and the store's usual case does not wait for a compiler.

    Whole shards at a time: in pieces that stay in the cache it would be a fifth faster when alone, and ten times slower
    beside a busy thread, since each call waits for the GIL at its end.
    """
    there = [shard for shard in shards if shard is not None]
    if len(there) < 2:
        out[:] = there[0] if there else 0
        return
    np.bitwise_xor(there[0], there[1], out=out)
    for shard in there[2:]:
        np.bitwise_xor(out, shard, out=out)


def _addresses(shards: Sequence[Shard], *, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and strides of shards as the kernels take them, filled up with zeros to a multiple."""
    from trainrt.checkpoint.erasure.kernels import ZEROS

    filled = [*shards, *[None] * (-len(shards) % multiple)]
    addresses = np.array([(ZEROS if s is None else s).ctypes.data for s in filled], np.uint64)
    return addresses, np.array([s is not None for s in filled], np.uint64)


def _encode(rows: tuple[int, ...], shards: Sequence[Shard], outs: Sequence[np.ndarray]) -> None:
    from trainrt.checkpoint.erasure import kernels

    kind = {(1,): kernels.Q, (2,): kernels.R, (0, 1): kernels.PQ, (0, 1, 2): kernels.PQR}[rows]
    of_row = dict(zip(rows, outs, strict=True))
    # A row that is not asked for is not touched: any array of the length will do in its place.
    p, q, r = (of_row.get(row, outs[0]) for row in range(MOST_PARITY))
    kernels.encode(kind, *_addresses(shards, multiple=4), p, q, r)


def _decode(plan: _Plan, data: Sequence[Shard], parity: Sequence[Shard], outs: Sequence[np.ndarray]) -> None:
    from trainrt.checkpoint.erasure import kernels

    constants = np.array(plan.constants, np.uint64)
    bits = (constants[:, :, None] >> np.arange(8, dtype=np.uint64)) & np.uint64(1)
    kernels.decode(
        kernels.PQR if constants[:, 2].any() else kernels.PQ,
        *_addresses(data, multiple=4),
        *_addresses(parity, multiple=1),
        -bits,  # 0 or all ones
        plan.closing,
        _addresses(outs, multiple=1)[0],
        outs[0].size,
    )
