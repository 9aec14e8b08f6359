"""Small arrays between host and GPU without allocating: pinned slots used in turn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.errors import ConfigError

_SLOTS = 4
_ALIGNMENT = 16


class Mailbox:
    """Sends dictionaries of arrays to a device, each in one copy on the current stream.

    A slot is used again after _SLOTS sends; the host then waits until the device has read it, which it has long done.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.device = device
        self._bytes = nbytes
        self._turn = 0
        if device.type == "cuda":
            self._host = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(_SLOTS)]
            self._there = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(_SLOTS)]
            self._sent = [torch.cuda.Event() for _ in range(_SLOTS)]

    @property
    def nbytes(self) -> int:
        return _SLOTS * self._bytes if self.device.type == "cuda" else 0

    def send(self, arrays: Mapping[str, NDArray]) -> dict[str, Tensor]:
        """The arrays as tensors on the device, valid until _SLOTS further sends. Raises ConfigError if too large."""
        if self.device.type != "cuda":
            return {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}
        turn = self._turn
        self._turn = (turn + 1) % _SLOTS
        self._sent[turn].synchronize()
        host, at, places = self._host[turn].numpy(), 0, {}
        for name, x in arrays.items():
            end = at + x.nbytes
            if end > self._bytes:
                raise ConfigError(f"{end} bytes of arrays for a chunk; the codec has room for {self._bytes}")
            host[at:end] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
            places[name] = (at, end, x)
            at = -(-end // _ALIGNMENT) * _ALIGNMENT
        self._there[turn][:at].copy_(self._host[turn][:at], non_blocking=True)
        self._sent[turn].record()
        return {
            name: self._there[turn][start:end].view(_DTYPES[x.dtype]).reshape(x.shape)
            for name, (start, end, x) in places.items()
        }


_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.uint8): torch.uint8,
}
