"""The kernel behind ``ops.upload``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 1024


@triton.jit(do_not_specialize=["n"])
def _bring(source, target, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # A mask that is the same for four words lets them be one load, and one request over the bus.
    mask = i // 4 * 4 < n
    tl.store(target + i, tl.load(source + i, mask=mask), mask=mask)


def bring(source: Tensor, target: Tensor) -> None:
    words = len(target) // 4
    _bring[(triton.cdiv(words, _WORDS),)](
        source.view(torch.int32), target.view(torch.int32), words, _WORDS, num_warps=4
    )  # fmt: skip
