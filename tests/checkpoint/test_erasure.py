"""The erasure code gives back every byte, against arithmetic that shares nothing with it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainrt.checkpoint.erasure.code import Code, Shard
from trainrt.errors import ConfigError, StoreError

BLOCK_BYTES = 32 << 10  # of the encoding kernel; that of decoding divides it or is smaller


def product(a: int, b: int) -> int:
    """Of two polynomials over GF(2): long multiplication, then long division by x^8 + x^4 + x^3 + x^2 + 1."""
    value = 0
    for bit in range(8):
        if b >> bit & 1:
            value ^= a << bit
    for degree in range(15, 7, -1):
        if value >> degree & 1:
            value ^= 0b100011101 << (degree - 8)
    return value


PRODUCT = np.array([[product(a, b) for b in range(256)] for a in range(256)], np.uint8)
INVERSE = {a: int(np.flatnonzero(PRODUCT[a] == 1)[0]) for a in range(1, 256)}


def weight(row: int, shard: int) -> int:
    """(2^row)^shard by repeated multiplication."""
    value = 1
    for _ in range(shard):
        value = product(value, 1 << row)
    return value


def reference(data: list[np.ndarray], row: int) -> np.ndarray:
    parity = np.zeros_like(data[0])
    for i, shard in enumerate(data):
        parity ^= PRODUCT[weight(row, i)][shard]
    return parity


def shards(k: int, m: int, size: int, seed: int = 0) -> list[np.ndarray]:
    """k random data shards and their m parity shards, the latter by the reference."""
    rng = np.random.default_rng(seed)
    data = [rng.integers(0, 256, size, np.uint8) for _ in range(k)]
    return data + [reference(data, row) for row in range(m)]


def without(every: list[np.ndarray], lost: tuple[int, ...]) -> dict[int, Shard]:
    return {i: shard for i, shard in enumerate(every) if i not in lost}


def rebuilt(code: Code, have: dict[int, Shard], want: int, size: int) -> np.ndarray:
    out = np.full(size, 0xA5, np.uint8)
    code.decode(have, want, out)
    return out


def rank(matrix: list[list[int]]) -> int:
    """By elimination in the arithmetic above."""
    rows, found = [np.array(row, np.uint8) for row in matrix], 0
    for column in range(len(matrix[0])):
        pivot = next((i for i in range(found, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        rows[found] = PRODUCT[INVERSE[int(rows[found][column])]][rows[found]]
        for i in range(found + 1, len(rows)):
            if rows[i][column]:
                rows[i] = rows[i] ^ PRODUCT[rows[i][column]][rows[found]]
        found += 1
    return found


sizes = st.one_of(st.integers(1, 40), st.integers(BLOCK_BYTES // 8 - 2, BLOCK_BYTES // 8 + 2)).map(lambda n: 8 * n)


@settings(deadline=None, max_examples=60)
@given(k=st.integers(1, 8), m=st.integers(1, 3), size=sizes, seed=st.integers(0, 1000), draw=st.data())
def test_any_losses_up_to_m_come_back(k: int, m: int, size: int, seed: int, draw: st.DataObject) -> None:
    code, every = Code(k, m), shards(k, m, size, seed)
    parity = [np.full(size, 0xA5, np.uint8) for _ in range(m)]
    code.encode_all(every[:k], parity)
    assert all(np.array_equal(parity[row], every[k + row]) for row in range(m))
    for row in range(m):
        code.encode(every[:k], parity[0], row)
        assert np.array_equal(parity[0], every[k + row])
    lost = tuple(draw.draw(st.sets(st.integers(0, k + m - 1), min_size=1, max_size=m)))
    out = {i: np.full(size, 0xA5, np.uint8) for i in lost}
    code.decode_many(without(every, lost), out)
    assert all(np.array_equal(out[i], every[i]) for i in lost)
    assert np.array_equal(rebuilt(code, without(every, lost), lost[-1], size), every[lost[-1]])


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_every_pattern_of_losses_comes_back(k: int, m: int) -> None:
    code, every = Code(k, m), shards(k, m, 64)
    for count in range(1, m + 1):
        for lost in itertools.combinations(range(k + m), count):
            have = without(every, lost)
            for want in lost:
                assert np.array_equal(rebuilt(code, have, want, 64), every[want]), (lost, want)
            out = {i: np.empty(64, np.uint8) for i in lost}
            code.decode_many(have, out)
            assert all(np.array_equal(out[i], every[i]) for i in lost), lost


def test_every_twelve_shards_of_12_plus_3_are_independent() -> None:
    """With it every smaller k and m: their patterns are those in which the shards they lack count as lost or zero."""
    k, m = 12, 3
    code = Code(k, m)
    generator = [[int(i == j) for j in range(k)] for i in range(k)]
    for row in range(m):
        columns = []
        for j in range(k):
            unit, parity = [np.full(8, i == j, np.uint8) for i in range(k)], np.empty(8, np.uint8)
            code.encode(unit, parity, row)
            columns.append(int(parity[0]))
        generator.append(columns)
    for lost in itertools.combinations(range(k + m), m):
        assert rank([row for i, row in enumerate(generator) if i not in lost]) == k, lost
    assert rank([generator[0], *generator[:11]]) == 11  # the proof can fail


@pytest.mark.parametrize("lost", [(0, 100, 251), (3, 250, 252), (17, 18, 253), (251, 253, 254)])
def test_the_widest_code_comes_back(lost: tuple[int, ...]) -> None:
    code, every = Code(252, 3), shards(252, 3, 16)
    for want in lost:
        assert np.array_equal(rebuilt(code, without(every, lost), want, 16), every[want])


@pytest.mark.parametrize("m", [1, 3])
def test_long_shards_are_whole_across_blocks(m: int) -> None:
    size = 5 * BLOCK_BYTES + 8
    code, every = Code(3, m), shards(3, m, size)
    parity = [np.empty(size, np.uint8) for _ in range(m)]
    code.encode_all(every[:3], parity)
    assert all(np.array_equal(parity[row], every[3 + row]) for row in range(m))
    lost = tuple(range(m))
    assert np.array_equal(rebuilt(code, without(every, lost), 0, size), every[0])


def test_more_shards_than_needed_do_no_harm() -> None:
    code, every = Code(3, 3), shards(3, 3, 40)
    for want in range(6):
        assert np.array_equal(rebuilt(code, without(every, (want,)), want, 40), every[want])


@pytest.mark.parametrize("zeros", [(0,), (3,), (1, 2), (0, 1, 2, 3)])
def test_a_shard_of_zeros_need_not_be_there(zeros: tuple[int, ...]) -> None:
    code, every = Code(4, 3), shards(4, 0, 48)
    for i in zeros:
        every[i][:] = 0
    every += [reference(every, row) for row in range(3)]
    thin: list[Shard] = [None if not shard.any() else shard for shard in every]
    parity = [np.full(48, 0xA5, np.uint8) for _ in range(3)]
    code.encode_all(thin[:4], parity)
    assert all(np.array_equal(parity[row], every[4 + row]) for row in range(3))
    code.encode(thin[:4], parity[2], 0)
    assert np.array_equal(parity[2], every[4])
    for lost in itertools.combinations(range(7), 3):
        have = {i: shard for i, shard in enumerate(thin) if i not in lost}
        for want in lost:
            assert np.array_equal(rebuilt(code, have, want, 48), every[want]), (lost, want)


@pytest.mark.parametrize("lost", [(1,), (0, 2), (1, 3), (0, 1, 2), (2, 3, 4)])
def test_a_flipped_byte_in_what_is_read_is_seen_in_what_is_rebuilt(lost: tuple[int, ...]) -> None:
    code, every = Code(3, 3), shards(3, 3, 40)
    have = without(every, lost)
    read = [i for i in have if i < 3] + [i for i in have if i >= 3][: len([i for i in lost if i < 3])]
    for i in read:
        damaged = every[i].copy()
        damaged[21] ^= 0x10
        out = rebuilt(code, {**have, i: damaged}, lost[0], 40)
        assert np.flatnonzero(out != every[lost[0]]).tolist() == [21]


def test_too_many_losses_are_refused_by_name() -> None:
    every = shards(4, 2, 16)
    with pytest.raises(
        StoreError,
        match=r"4 of 6 shards are needed and 3 are there; missing: data shard 0, data shard 3, parity shard 1",
    ):
        Code(4, 2).decode(without(every, (0, 3, 5)), 0, np.empty(16, np.uint8))


@pytest.mark.parametrize(("k", "m"), [(4, 0), (4, 4), (0, 1), (254, 2), (255, 1)])
def test_codes_that_do_not_exist_are_refused(k: int, m: int) -> None:
    with pytest.raises(ConfigError, match="allowed: 1 to"):
        Code(k, m)


def test_arrays_the_kernels_could_not_take_are_refused() -> None:
    code, every, out = Code(2, 2), shards(2, 2, 16), np.empty(16, np.uint8)
    for bad in [
        np.zeros(24, np.uint8),
        np.zeros(12, np.uint8),
        np.zeros(16, np.int8),
        np.zeros((2, 8), np.uint8),
        np.zeros(32, np.uint8)[::2],
        np.zeros(24, np.uint8)[1:17],
    ]:
        with pytest.raises(ValueError, match="shard"):
            code.encode([every[0], bad], out, 1)
        with pytest.raises(ValueError, match="shard"):
            code.encode(every[:2], bad, 1)
    with pytest.raises(ValueError, match="overlaps"):
        code.encode(every[:2], every[1], 0)
    with pytest.raises(ValueError, match="overlaps"):
        code.encode_all(every[:2], [out, out])
    with pytest.raises(ValueError, match="read-only"):
        code.encode(every[:2], np.frombuffer(bytes(16), np.uint8), 0)
    with pytest.raises(ValueError, match="parity index"):
        code.encode(every[:2], out, 2)
    with pytest.raises(ValueError, match="nothing to rebuild"):
        code.decode(dict(enumerate(every)), 1, out)


def test_xor_needs_no_numba() -> None:
    program = """
import sys
import numpy as np
from trainrt.checkpoint.erasure.code import Code
one, two, parity, out = (np.arange(i, i + 64, dtype=np.uint8) for i in range(4))
Code(2, 1).warm_up()
Code(2, 1).encode([one, two], parity, 0)
Code(2, 2).encode([one, two], parity, 0)
Code(2, 1).decode({1: two, 2: parity}, 0, out)
assert (out == one).all()
Code(2, 2).decode({0: one, 2: parity}, 1, out)
assert (out == two).all()
assert "numba" not in sys.modules
Code(2, 2).warm_up()
assert "numba" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_threads_share_a_code() -> None:
    code = Code(5, 3)
    everyone = [shards(5, 3, 4 * BLOCK_BYTES, seed) for seed in range(4)]
    patterns = list(itertools.combinations(range(8), 3))[::4]

    def work(every: list[np.ndarray]) -> bool:
        return all(
            np.array_equal(rebuilt(code, without(every, lost), lost[0], every[0].size), every[lost[0]])
            for lost in patterns
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, everyone))
