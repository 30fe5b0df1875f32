"""Copies to host memory beside the device's own stream. Their order is proven where there is a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainrt.training.staging import SideStream

SIZES = (1000, 1, 4096)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def targets(buffer: np.ndarray, dtype: torch.dtype) -> list[torch.Tensor]:
    flat = torch.from_numpy(buffer)
    ends = np.cumsum([size * dtype.itemsize for size in SIZES]).tolist()
    return [flat[end - size * dtype.itemsize : end].view(dtype) for size, end in zip(SIZES, ends, strict=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_changed_after_the_mark_is_copied_as_it_was(device: str, dtype: torch.dtype) -> None:
    side = SideStream(torch.device(device))
    live = [torch.randn(size, device=device) for size in SIZES]
    before = [tensor.to(dtype, copy=True).cpu() for tensor in live]
    buffer = np.zeros(sum(SIZES) * 4, np.uint8)
    side.pin(buffer)
    side.mark()
    side.copy(targets(buffer, dtype), live)
    side.hold_back()
    for tensor in live:
        tensor.zero_()
    side.wait()
    for found, wanted in zip(targets(buffer, dtype), before, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_copy_does_not_wait_for_what_is_queued_after_the_mark() -> None:
    side = SideStream(torch.device("cuda"))
    live = [torch.ones(size, device="cuda") for size in SIZES]
    buffer = np.zeros(sum(SIZES) * 4, np.uint8)
    side.pin(buffer)
    side.mark()
    torch.cuda._sleep(1 << 31)
    later = torch.cuda.Event()
    later.record()
    side.copy(targets(buffer, torch.float32), live)
    side.wait()
    assert not later.query()
