"""Samples to batches, and what proves which samples were in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack samples of equal length: input_ids and labels, (B, S) of int64."""
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}


def digest_batch(batch: Mapping[str, Any]) -> int:
    """xxh3-64 over the tensors of a batch, by name."""
    state = xxhash.xxh3_64()
    for name in sorted(batch):
        state.update(name.encode())
        value = batch[name]
        if isinstance(value, torch.Tensor):
            state.update(value.contiguous().view(torch.uint8).numpy())
        else:
            state.update(repr(value).encode())
    return state.intdigest()
