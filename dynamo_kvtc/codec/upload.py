"""Small arrays from the host to a GPU, many in one piece that nobody waits for."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.ops.upload import ALIGNMENT, bring


class Uploads:
    """What is on its way to a device.

    The memory comes from PyTorch's caches on both sides and goes back to them; in a steady state none is asked of the
    driver. Not thread-safe: each thread has its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # PyTorch does not know that a kernel reads the pinned side: it is kept until that is done.
        self._busy: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def send(self, arrays: Mapping[str, NDArray]) -> dict[str, Tensor]:
        """The arrays as tensors on the device, by the current stream: they are for kernels on it."""
        if self._device.type != "cuda":
            return {name: torch.from_numpy(np.array(x, order="C")) for name, x in arrays.items()}
        while self._busy and self._busy[0][0].query():
            self._busy.popleft()
        places, at = {}, 0
        for name, x in arrays.items():
            places[name] = (at, at + x.nbytes)
            at = -(-(at + x.nbytes) // ALIGNMENT) * ALIGNMENT
        pinned = torch.empty(at, dtype=torch.uint8, pin_memory=True)
        host = pinned.numpy()
        for name, (start, end) in places.items():
            host[start:end] = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
        there = torch.empty(at, dtype=torch.uint8, device=self._device)
        bring(pinned, there)
        done = torch.cuda.Event()
        done.record()
        self._busy.append((done, pinned))
        return {
            name: there[start:end].view(_DTYPES[arrays[name].dtype]).reshape(arrays[name].shape)
            for name, (start, end) in places.items()
        }


_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.uint8): torch.uint8,
}
