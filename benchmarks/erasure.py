"""GB/s of data bytes through the erasure code, against a memory copy of the same bytes, ISA-L and zfec.

    python -m benchmarks.erasure [--pairs 9] [--megabytes 16]

One thread. The arms of a case run in turn, `pairs` times; printed are the median GB/s of each arm, and the median of the
pairwise ratios of ours to it with their spread: above 1 ours is faster. GB/s counts the k data shards, whatever
is read or written, so arms of one case compare. Peers that are not installed (`pip install pyeclib zfec`; a libisal of
the system does as well) are said to be missing.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from trainrt.checkpoint.erasure.code import Code

K = 4
Arm = Callable[[], object]


def aligned(size: int) -> np.ndarray:
    """Touched memory at a multiple of 64, which ISA-L's RAID functions ask for."""
    whole = np.zeros(size + 64, np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + size]


def find_isal() -> ctypes.CDLL | None:
    """The library pyeclib brings, else the system's."""
    spec = importlib.util.find_spec("pyeclib")
    bundled = Path(spec.origin or "").parents[1] / "pyeclib.libs" if spec else Path()
    names = [*map(str, bundled.glob("libisal*")), ctypes.util.find_library("isal")]
    return next((ctypes.CDLL(name) for name in names if name), None)


class Isal:
    """ISA-L through ctypes: no copies and no headers around the shards."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._kept: list[np.ndarray] = []  # what the library knows only by address

    def pointers(self, arrays: Sequence[np.ndarray]) -> ctypes.Array[ctypes.c_void_p]:
        self._kept += arrays
        return (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))

    def matrix(self, m: int) -> ctypes.Array[ctypes.c_ubyte]:
        """Identity over the parity rows of its Vandermonde code."""
        matrix = (ctypes.c_ubyte * ((K + m) * K))()
        self.library.gf_gen_rs_matrix(matrix, K + m, K)
        return matrix

    def arm(self, rows: bytes, sources: Sequence[np.ndarray], outs: Sequence[np.ndarray]) -> Arm:
        tables = (ctypes.c_ubyte * (32 * K * len(outs)))()
        self.library.ec_init_tables(K, len(outs), rows, tables)
        arguments = (sources[0].size, K, len(outs), tables, self.pointers(sources), self.pointers(outs))
        return lambda: self.library.ec_encode_data(*arguments)

    def encode(self, data: Sequence[np.ndarray], parity: Sequence[np.ndarray]) -> Arm:
        return self.arm(bytes(self.matrix(len(parity)))[K * K :], data, parity)

    def decode(
        self, every: Sequence[np.ndarray], lost: Sequence[int], wanted: Sequence[int], outs: Sequence[np.ndarray]
    ) -> Arm:
        """Data shards `wanted` from the first K that are not lost; the matrix is inverted beforehand."""
        matrix = bytes(self.matrix(len(every) - K))
        there = [i for i in range(len(every)) if i not in lost][:K]
        rows = (ctypes.c_ubyte * (K * K))(*b"".join(matrix[i * K : i * K + K] for i in there))
        inverse = (ctypes.c_ubyte * (K * K))()
        self.library.gf_invert_matrix(rows, inverse, K)
        chosen = b"".join(bytes(inverse)[i * K : i * K + K] for i in wanted)
        return self.arm(chosen, [every[i] for i in there], outs)

    def raid(self, data: Sequence[np.ndarray], parity: Sequence[np.ndarray]) -> Arm:
        """Its special functions for one and two parity shards."""
        function = {1: self.library.xor_gen, 2: self.library.pq_gen}[len(parity)]
        arrays = self.pointers([*data, *parity])
        return lambda: function(len(arrays), data[0].size, arrays)


def encoding(m: int, data: Sequence[np.ndarray], copies: Sequence[np.ndarray], isal: Isal | None) -> dict[str, Arm]:
    code = Code(K, m)
    code.warm_up()
    parity, theirs = ([aligned(data[0].size) for _ in range(m)] for _ in range(2))
    arms: dict[str, Arm] = {"ours": lambda: code.encode_all(data, parity), "memory copy": copy(data, copies)}
    if isal:
        arms["ISA-L ec_encode_data"] = isal.encode(data, theirs)
        if m < 3:
            arms["ISA-L xor_gen" if m == 1 else "ISA-L pq_gen"] = isal.raid(data, theirs)
    if importlib.util.find_spec("zfec"):
        import zfec

        encoder = zfec.Encoder(K, K + m)
        arms["zfec"] = lambda: encoder.encode(tuple(data), tuple(range(K, K + m)))
    return arms


def one_row(data: Sequence[np.ndarray], copies: Sequence[np.ndarray], isal: Isal | None) -> dict[str, Arm]:
    """What a node that keeps the second parity shard does."""
    code, out = Code(K, 2), aligned(data[0].size)
    arms: dict[str, Arm] = {"ours": lambda: code.encode(data, out, 1), "memory copy": copy(data, copies)}
    if isal:
        arms["ISA-L ec_encode_data"] = isal.arm(bytes(isal.matrix(2))[(K + 1) * K :], data, [aligned(out.size)])
    return arms


def decoding(
    lost: Sequence[int],
    wanted: Sequence[int],
    data: Sequence[np.ndarray],
    copies: Sequence[np.ndarray],
    isal: Isal | None,
) -> dict[str, Arm]:
    """Data shards `lost` of 4+2, those `wanted` rebuilt."""
    code = Code(K, 2)
    code.warm_up()
    parity = [aligned(data[0].size) for _ in range(2)]
    outs, theirs = ([aligned(data[0].size) for _ in wanted] for _ in range(2))
    code.encode_all(data, parity)
    every = [*data, *parity]
    have, out = {i: a for i, a in enumerate(every) if i not in lost}, dict(zip(wanted, outs, strict=True))
    arms: dict[str, Arm] = {"ours": lambda: code.decode_many(have, out), "memory copy": copy(data, copies)}
    if isal:
        arms["ISA-L ec_encode_data"] = isal.decode(every, lost, wanted, theirs)
    if importlib.util.find_spec("zfec"):
        import zfec

        # zfec's parity is of another code; its time does not depend on what the bytes are.
        # It takes a data shard that is there at its own place, and rebuilds all that are lost.
        there = tuple(i if i not in lost else K + sorted(lost).index(i) for i in range(K))
        decoder, blocks = zfec.Decoder(K, K + 2), tuple(every[i] for i in there)
        arms["zfec"] = lambda: decoder.decode(blocks, there)
    for name in ["ours", *[name for name in arms if name.startswith("ISA-L")]]:
        arms[name]()
    assert all(np.array_equal(o, data[w]) for o, w in zip(outs, wanted, strict=True))
    assert not isal or all(np.array_equal(o, data[w]) for o, w in zip(theirs, wanted, strict=True))
    return arms


def copy(data: Sequence[np.ndarray], copies: Sequence[np.ndarray]) -> Arm:
    def run() -> None:
        for source, target in zip(data, copies, strict=True):
            np.copyto(target, source)

    return run


def measure(title: str, arms: dict[str, Arm], *, data_bytes: int, pairs: int) -> None:
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for _ in range(pairs):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            rates[name].append(data_bytes / (time.perf_counter() - start) / 1e9)
    print(f"{title}: ours {statistics.median(rates['ours']):.1f} GB/s")
    for name in list(arms)[1:]:
        ratios = [mine / peer for mine, peer in zip(rates["ours"], rates[name], strict=True)]
        print(
            f"  {name:22s} {statistics.median(rates[name]):5.1f} GB/s   ours over it: median "
            f"{statistics.median(ratios):.2f}  min {min(ratios):.2f}  max {max(ratios):.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=16, help="MiB of a shard")
    options = parser.parse_args()
    size = options.megabytes << 20
    rng = np.random.default_rng(0)
    data, copies = ([aligned(size) for _ in range(K)] for _ in range(2))
    for shard in data:
        shard[:] = rng.integers(0, 256, size, np.uint8)
    library = find_isal()
    isal = Isal(library) if library else None
    missing = ([] if isal else ["ISA-L"]) + ([] if importlib.util.find_spec("zfec") else ["zfec"])
    print(f"shards of {options.megabytes} MiB, one thread, {options.pairs} rounds in turn")
    if missing:
        print(f"not installed, left out: {', '.join(missing)}")
    cases = {f"encode {K}+{m}": encoding(m, data, copies, isal) for m in (1, 2, 3)}
    cases[f"encode {K}+2, the second row alone"] = one_row(data, copies, isal)
    cases[f"decode {K}+2, one shard lost"] = decoding([1], [1], data, copies, isal)
    cases[f"decode {K}+2, two lost, one rebuilt"] = decoding([0, 2], [0], data, copies, isal)
    cases[f"decode {K}+2, two lost, both rebuilt"] = decoding([0, 2], [0, 2], data, copies, isal)
    for title, arms in cases.items():
        measure(title, arms, data_bytes=K * size, pairs=options.pairs)


if __name__ == "__main__":
    main()
