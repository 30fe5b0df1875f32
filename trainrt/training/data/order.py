"""The order of samples: a pure function of (seed, step), so that a resume needs a number and no state.

Each epoch is a permutation with random access: a Feistel network over the next power of four, with
cycle walking for what falls outside (Black and Rogaway, CT-RSA 2002, section 4).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6


def sample_ids(seed: int, step: int, *, global_batch: int, length: int) -> NDArray[np.int64]:
    """The ids of the samples of a step (from 0), each in [0, length). Steps run through the epochs without a gap."""
    position = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    epoch, index = np.divmod(position, length)
    ids = np.empty_like(index)
    for e in np.unique(epoch):
        chosen = epoch == e
        ids[chosen] = _permute(index[chosen].astype(np.uint64), length, _key(seed, int(e)))
    return ids


def logical_shards(seed: int, step: int, *, global_batch: int, microbatch: int, length: int) -> list[NDArray[np.int64]]:
    """The ids of each logical shard of a step: the fixed units of the global batch, whatever the mesh."""
    ids = sample_ids(seed, step, global_batch=global_batch, length=length)
    return [ids[at : at + microbatch] for at in range(0, global_batch, microbatch)]


def _key(seed: int, epoch: int) -> NDArray[np.uint64]:
    return np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64).astype(np.uint64)


def _permute(x: NDArray[np.uint64], length: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    x = _feistel(x, half, key)
    outside = x >= length
    while outside.any():
        x[outside] = _feistel(x[outside], half, key)
        outside = x >= length
    return x.astype(np.int64)


def _feistel(x: NDArray[np.uint64], half: int, key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = np.uint64((1 << half) - 1)
    left, right = x >> np.uint64(half), x & mask
    for k in key:
        left, right = right, left ^ (_mix(right ^ k) & mask)
    return (left << np.uint64(half)) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
