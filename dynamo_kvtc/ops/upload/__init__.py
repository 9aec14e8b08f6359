"""Small arrays from the host to a GPU, by a kernel that reads them where they are.

A copy would wait its turn behind whatever else is being copied; of a long restore that is megabytes of records.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError

ALIGNMENT = 16
"""Bytes: both sides' size is a multiple of it."""


def bring(source: Tensor, target: Tensor) -> None:
    """target = source, by the current stream; source must stay what it is until the stream is there.

    source: uint8 [n], pinned; target: uint8 [n], on the device; contiguous, n a multiple of ALIGNMENT. Raises
    ConfigError for others.
    """
    for name, x in (("source", source), ("target", target)):
        if x.dtype != torch.uint8 or x.dim() != 1 or not x.is_contiguous() or len(x) % ALIGNMENT:
            raise ConfigError(
                f"{name} must be uint8 [n], contiguous, n a multiple of {ALIGNMENT}; got {x.dtype} {tuple(x.shape)}"
            )
    if source.shape != target.shape:
        raise ConfigError(f"source has {len(source)} bytes, target {len(target)}; they must agree")
    if target.is_cuda and len(target) and not source.is_pinned():
        raise ConfigError("source is not pinned: a GPU reads pinned memory only")
    if len(target):
        from dynamo_kvtc.ops.upload import triton as kernels

        kernels.bring(source, target)
