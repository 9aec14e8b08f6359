"""Small arrays from the host to a GPU, many in one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16


def send(arrays: Mapping[str, NDArray], device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors on the device, by the current stream: they are for kernels on it.

    The memory comes from PyTorch's caches on both sides and goes back to them; in a steady state none is asked of the
    driver.
    """
    if device.type != "cuda":
        return {name: torch.from_numpy(np.array(x, order="C")) for name, x in arrays.items()}
    places, at = {}, 0
    for name, x in arrays.items():
        places[name] = (at, at + x.nbytes)
        at = -(-(at + x.nbytes) // _ALIGNMENT) * _ALIGNMENT
    pinned = torch.empty(at, dtype=torch.uint8, pin_memory=True)
    host = pinned.numpy()
    for name, (start, end) in places.items():
        host[start:end] = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
    there = pinned.to(device, non_blocking=True)
    return {
        name: there[start:end].view(_DTYPES[arrays[name].dtype]).reshape(arrays[name].shape)
        for name, (start, end) in places.items()
    }


_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.uint8): torch.uint8,
}
