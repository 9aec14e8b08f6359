"""zlib behind the interface of ``nvcomp``'s batches: chunks to the host, one after another, and back.

For machines without nvCOMP and for chunks that it does not take. It waits for the device and is far slower, so it is
used where it was asked for by name, never instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError, RecordCorruptError
from dynamo_kvtc.ops import deflate

_ALIGNMENT = 16


class HostEncoder:
    """See ``nvcomp.BatchEncoder``."""

    def __init__(self, max_chunks: int, max_chunk_bytes: int) -> None:
        _check(max_chunks, max_chunk_bytes)
        self.max_chunks, self.max_chunk_bytes = max_chunks, max_chunk_bytes
        # What does not compress is stored, with 5 bytes for at least each 16 KiB.
        self.room = -(-(max_chunk_bytes + max_chunk_bytes // 1024 + 64) // _ALIGNMENT) * _ALIGNMENT

    def encode(
        self, source: Tensor, source_start: Tensor, source_size: Tensor, target: Tensor, target_start: Tensor,
        target_size: Tensor, status: Tensor,
    ) -> None:  # fmt: skip
        """Raises ConfigError for a chunk that is too long."""
        sizes, data = source_size.tolist(), source.cpu().numpy()
        if len(sizes) > self.max_chunks or max(sizes, default=0) > self.max_chunk_bytes:
            raise ConfigError(
                f"{len(sizes)} chunks of up to {max(sizes, default=0)} bytes; this was made for {self.max_chunks} of "
                f"{self.max_chunk_bytes}"
            )
        made = []
        for start, size, to in zip(source_start.tolist(), sizes, target_start.tolist(), strict=True):
            payload = deflate.deflate(data[start : start + size].tobytes())
            target[to : to + len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(target.device)
            made.append(len(payload))
        target_size.copy_(torch.tensor(made, dtype=torch.int64))
        status.zero_()


class HostDecoder:
    """See ``nvcomp.BatchDecoder``; unlike it, this reads any bytes safely."""

    def __init__(self, max_chunks: int, max_chunk_bytes: int) -> None:
        _check(max_chunks, max_chunk_bytes)

    def decode(
        self, source: Tensor, source_start: Tensor, source_size: Tensor, target: Tensor, target_start: Tensor,
        target_room: Tensor, target_size: Tensor, status: Tensor,
    ) -> None:  # fmt: skip
        data, found, bad = source.cpu().numpy(), [], []
        columns = (source_start, source_size, target_start, target_room)
        for start, size, to, room in zip(*(x.tolist() for x in columns), strict=True):
            try:
                chunk = deflate.inflate(data[start : start + size].tobytes(), room)
            except RecordCorruptError:
                chunk = b""
            if chunk:
                target[to : to + room] = torch.frombuffer(bytearray(chunk), dtype=torch.uint8).to(target.device)
            found.append(len(chunk))
            bad.append(int(len(chunk) != room))
        target_size.copy_(torch.tensor(found, dtype=torch.int64))
        status.copy_(torch.tensor(bad, dtype=torch.int32))


def _check(max_chunks: int, max_chunk_bytes: int) -> None:
    if max_chunks < 1 or max_chunk_bytes < 1:
        raise ConfigError(f"{max_chunks} chunks of up to {max_chunk_bytes} bytes; both must be at least 1")
