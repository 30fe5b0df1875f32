"""The loops over the bytes of shards, compiled. Importing this module imports numba: do it inside functions.

Eight bytes are worked on as one 64-bit word. Doubling in GF(2^8) shifts all eight at once and folds the bits that
fell out back in by masks (H. P. Anvin, "The mathematics of RAID-6", section 4), which the compiler widens to the
vectors of the machine. There is no table, so what is left of the cost is reading memory.

Row r of the parity is the polynomial  sum over i of D[i] * (2^r)^i,  evaluated by Horner's rule from the last shard
to the first: one multiplication by 1, 2 or 4 a shard. Four shards are taken at a time, and a block is finished
before the next is begun, so that the parity's block waits in the cache for the next four.

Arrays come as addresses, because one compiled form then serves any number of shards: `code.py` has checked lengths
and keeps the arrays alive. A shard of zeros is the address of `ZEROS` with stride 0; all others have stride 1.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

# Words of a block, by trial. Encoding streams, and is best when the blocks of four shards and three parity rows fill
# a good part of the second cache (224 KiB). Decoding computes between its reads, which overlap only if that is short.
ENCODE_BLOCK = 4096
DECODE_BLOCK = 192
ZEROS = np.zeros(ENCODE_BLOCK, np.uint64)

Q, R, PQ, PQR = 1, 2, 3, 4  # which rows a pass computes

_TOP = np.uint64(0x8080808080808080)
_REST = np.uint64(0x7F7F7F7F7F7F7F7F)
_FOLD = np.uint64(0x1D1D1D1D1D1D1D1D)
_ONE = np.uint64(1)
_SEVEN = np.uint64(7)
_WORD = np.uint64(8)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_NONE = np.uint64(0)


@intrinsic
def _pointer(_context, _address):
    """An address (uint64) as a pointer to words."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint64)(types.uint64), generate


@njit(nogil=True)
def _words(address, stride, start, count):
    """`count` words of a shard, from word `start` on."""
    return carray(_pointer(address + np.uint64(start) * stride * _WORD), (count,))  # type: ignore[call-arg]


@njit(nogil=True)
def _x2(v):
    """Eight bytes doubled: where a top bit falls out (h), 0x80 - 1 = 0x7f lets 0x1d through."""
    h = v & _TOP
    return ((v & _REST) << _ONE) ^ ((h - (h >> _SEVEN)) & _FOLD)


@njit(nogil=True)
def _x4(v):
    return _x2(_x2(v))


# One step of Horner's rule over four shards, d the highest. `keep` is 0 for the first step of a block, which forgets
# what stood there, and all ones for the others.


@njit(nogil=True)
def _step_q(keep, a, b, c, d, q):
    for i in range(q.size):
        q[i] = a[i] ^ _x2(b[i] ^ _x2(c[i] ^ _x2(d[i] ^ _x2(q[i] & keep))))


@njit(nogil=True)
def _step_r(keep, a, b, c, d, r):
    for i in range(r.size):
        r[i] = a[i] ^ _x4(b[i] ^ _x4(c[i] ^ _x4(d[i] ^ _x4(r[i] & keep))))


@njit(nogil=True)
def _step_pq(keep, a, b, c, d, p, q):
    for i in range(p.size):
        ai, bi, ci, di = a[i], b[i], c[i], d[i]
        p[i] = ai ^ bi ^ ci ^ di ^ (p[i] & keep)
        q[i] = ai ^ _x2(bi ^ _x2(ci ^ _x2(di ^ _x2(q[i] & keep))))


@njit(nogil=True)
def _step_pqr(keep, a, b, c, d, p, q, r):
    for i in range(p.size):
        ai, bi, ci, di = a[i], b[i], c[i], d[i]
        p[i] = ai ^ bi ^ ci ^ di ^ (p[i] & keep)
        q[i] = ai ^ _x2(bi ^ _x2(ci ^ _x2(di ^ _x2(q[i] & keep))))
        r[i] = ai ^ _x4(bi ^ _x4(ci ^ _x4(di ^ _x4(r[i] & keep))))


@njit(nogil=True)
def _block(rows, shards, strides, start, p, q, r):
    """Parity of all shards over one block of words. The number of shards is a multiple of four."""
    count = q.size
    keep = _NONE
    for g in range(shards.size - 4, -1, -4):
        a = _words(shards[g], strides[g], start, count)
        b = _words(shards[g + 1], strides[g + 1], start, count)
        c = _words(shards[g + 2], strides[g + 2], start, count)
        d = _words(shards[g + 3], strides[g + 3], start, count)
        if rows == Q:
            _step_q(keep, a, b, c, d, q)
        elif rows == R:
            _step_r(keep, a, b, c, d, r)
        elif rows == PQ:
            _step_pq(keep, a, b, c, d, p, q)
        else:
            _step_pqr(keep, a, b, c, d, p, q, r)
        keep = _ALL


@njit(nogil=True, cache=True)
def encode(rows, shards, strides, p, q, r):
    """Parity rows of whole shards into p, q, r (word arrays of one length; those not asked for are not touched)."""
    for start in range(0, q.size, ENCODE_BLOCK):
        stop = min(start + ENCODE_BLOCK, q.size)
        _block(rows, shards, strides, start, p[start:stop], q[start:stop], r[start:stop])


@njit(nogil=True)
def _bits(masks):
    return masks[0], masks[1], masks[2], masks[3], masks[4], masks[5], masks[6], masks[7]


# A sum of products with constants, by Horner's rule over the bits of the constants: bit b of each constant is a
# mask of all ones or zeros, so the seven doublings are shared by all the products.


@njit(nogil=True)
def _combine_two(out, s, t, sp, tp, s_masks, t_masks):
    m, n = _bits(s_masks), _bits(t_masks)
    for i in range(out.size):
        u, v = s[i] ^ sp[i], t[i] ^ tp[i]
        w = (u & m[7]) ^ (v & n[7])
        w = _x2(w) ^ (u & m[6]) ^ (v & n[6])
        w = _x2(w) ^ (u & m[5]) ^ (v & n[5])
        w = _x2(w) ^ (u & m[4]) ^ (v & n[4])
        w = _x2(w) ^ (u & m[3]) ^ (v & n[3])
        w = _x2(w) ^ (u & m[2]) ^ (v & n[2])
        w = _x2(w) ^ (u & m[1]) ^ (v & n[1])
        out[i] = _x2(w) ^ (u & m[0]) ^ (v & n[0])


@njit(nogil=True)
def _combine_one_more(out, s, sp, s_masks):
    m = _bits(s_masks)
    for i in range(out.size):
        u = s[i] ^ sp[i]
        w = u & m[7]
        w = _x2(w) ^ (u & m[6])
        w = _x2(w) ^ (u & m[5])
        w = _x2(w) ^ (u & m[4])
        w = _x2(w) ^ (u & m[3])
        w = _x2(w) ^ (u & m[2])
        w = _x2(w) ^ (u & m[1])
        out[i] ^= _x2(w) ^ (u & m[0])


@njit(nogil=True)
def _close(out, p, kept_p, outs, start):
    """A lost shard as what is left of row 0 when the other lost ones, `outs`, are taken away."""
    for i in range(out.size):
        out[i] = p[i] ^ kept_p[i]
    for other in outs:
        shard = _words(other, _ONE, start, out.size)
        for i in range(out.size):
            out[i] ^= shard[i]


@njit(nogil=True, cache=True)
def decode(rows, shards, strides, parity, parity_strides, masks, closing, outs, words):
    """Each of `outs` as the sum over the parity rows of (row of the shards xor its parity shard) times a constant.

    `masks` is uint64 of shape (outs, 3 rows, 8 bits): the constants, bit by bit, each bit as a mask. Out number
    `closing`, if there is one, follows from those before it, and its masks are not looked at.
    """
    scratch = np.empty((3, DECODE_BLOCK), np.uint64)
    for start in range(0, words, DECODE_BLOCK):
        count = min(DECODE_BLOCK, words - start)
        p, q, r = scratch[0, :count], scratch[1, :count], scratch[2, :count]
        _block(rows, shards, strides, start, p, q, r)
        kept_p = _words(parity[0], parity_strides[0], start, count)
        kept_q = _words(parity[1], parity_strides[1], start, count)
        kept_r = _words(parity[2], parity_strides[2], start, count)
        for j in range(outs.size):
            out = _words(outs[j], _ONE, start, count)
            if j == closing:
                _close(out, p, kept_p, outs[:j], start)
                continue
            _combine_two(out, p, q, kept_p, kept_q, masks[j, 0], masks[j, 1])
            if rows == PQR:
                _combine_one_more(out, r, kept_r, masks[j, 2])
