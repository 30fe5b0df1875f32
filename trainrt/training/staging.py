"""The way of a rank's state from its device into a slot, which is host memory: pinned once, copied on a stream of its own.

On a CPU streams and events do nothing, and a copy is over when it returns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class SideStream:
    """Copies to host memory that wait for what was queued before `mark`, and for nothing that is queued after it.

    `mark` and `hold_back` belong to the thread that trains; `copy` and `wait` may run in another one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream()
        self._marked, self._copied = self._module.Event(), self._module.Event()
        # Kept, so that no address is ever mapped to something else.
        self._pinned: dict[int, np.ndarray] = {}

    def pin(self, buffer: np.ndarray) -> None:
        """Page-lock shared memory, once; without it the device's copies would block, and pass through a buffer."""
        address = buffer.__array_interface__["data"][0]
        if self._device.type == "cuda" and buffer.nbytes and address not in self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, buffer.nbytes, 0))
            self._pinned[address] = buffer

    def mark(self) -> None:
        """What is queued up to here is what the next copies see."""
        self._marked.record()

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """Queue copies, with a change of dtype where the two differ."""
        if targets:
            with self._module.stream(self._stream):
                self._marked.wait(self._stream)
                torch._foreach_copy_(targets, sources, non_blocking=True)
                self._copied.record(self._stream)

    def hold_back(self) -> None:
        """What is queued from here on runs after the copies that are queued."""
        self._module.current_stream().wait_stream(self._stream)

    def wait(self) -> None:
        """Wait until the queued copies have arrived."""
        self._copied.synchronize()
