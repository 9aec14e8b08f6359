"""A coding's parts: seconds of its stages, and the least they could take at the rates that this GPU shows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dynamo_kvtc.codec.paged import PagedCodec
from dynamo_kvtc.codec.paged_groups import PagedPoint
from dynamo_kvtc.codec.paged_paper_point import PaperPoint

_WARM, _RUNS = 3, 9
_RAW_BYTES = 1 << 30


def median(call: Callable[[], object]) -> float:
    for _ in range(_WARM):
        call()
    times = []
    for _ in range(_RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def stages(codec: PagedCodec, call: Callable[[], Any]) -> dict[str, float]:
    """Seconds between one stage's end and the next's, summed by name; what has no stage is the host's doing."""
    torch.cuda.synchronize()
    codec.marks = []
    try:
        call()
        torch.cuda.synchronize()
        marks = codec.marks
    finally:
        codec.marks = None
    out: dict[str, float] = {}
    for (_, before), (name, event) in itertools.pairwise(marks):
        out[name] = out.get(name, 0.0) + before.elapsed_time(event) / 1e3
    return out


def decode_stages(codec: PagedCodec, call: Callable[[], Any]) -> tuple[float, float, dict[str, float]]:
    """Seconds from the call until the first and the last layer group are in the pages, and the stages'."""
    first, whole = [], []
    for _ in range(_RUNS):
        torch.cuda.synchronize()
        codec.marks = []
        start = torch.cuda.Event(enable_timing=True)
        start.record()
        restore = call()
        restore.finish()
        first.append(start.elapsed_time(restore.events[0]) / 1e3)
        whole.append(start.elapsed_time(restore.events[-1]) / 1e3)
        codec.marks = None
    return float(np.median(first)), float(np.median(whole)), stages(codec, lambda: call().finish())


def floors(
    point: PagedPoint | PaperPoint, tokens: int, raw_bytes: int, record_bytes: int, rates: dict[str, float]
) -> dict[str, float]:  # fmt: skip
    """The least a stage can take at the rates measured: its products on the matrix units, or its bytes once through
    device memory."""
    if isinstance(point, PaperPoint):
        return _paper_floors(point, tokens, raw_bytes, record_bytes, rates)
    ops8, ops16, memory = rates["int8_ops_s"], rates["bf16_ops_s"], rates["device_bytes_s"]
    raw, coded, groups = raw_bytes, record_bytes, point.groups
    narrow = sum(2 * tokens * g.channels * g.narrow for g in groups)
    high = sum(2 * tokens * g.wide_inputs * g.narrow for g in groups)
    wide16 = sum(2 * tokens * g.channels * g.wide for g in groups)
    wide8 = sum(2 * tokens * 2 * (g.channels + g.wide_inputs) * g.wide for g in groups)
    rank = sum(g.rank for g in groups)
    inputs = sum(g.channels + g.wide_inputs for g in groups)
    return {
        "decode project": narrow / ops8 + wide16 / ops16, "decode checksum": coded / memory,
        "decode rANS": (coded + tokens * rank) / memory,
        "encode gather": (raw + tokens * inputs) / memory, "encode project": (narrow + high + wide8) / ops8,
        "encode quantise": tokens * rank * (4 + 2) / memory, "encode rANS": (2 * tokens * rank + coded) / memory,
        "encode pack": 2 * coded / memory, "encode checksum": 2 * coded / memory,
    }  # fmt: skip


def _paper_floors(
    point: PaperPoint, tokens: int, raw: int, coded: int, rates: dict[str, float]
) -> dict[str, float]:  # fmt: skip
    ops8, ops16, memory = rates["int8_ops_s"], rates["bf16_ops_s"], rates["device_bytes_s"]
    product = sum(2 * tokens * (g.channels // 2) * part.rank for g in point.groups for part in (g.k, g.v))
    channels, width = (sum(getattr(g, name) for g in point.groups) for name in ("channels", "width"))
    rank = sum(part.rank for g in point.groups for part in (g.k, g.v))
    return {
        "decode project": product / ops16, "decode checksum": 2 * coded / memory,
        "decode DEFLATE": (coded + tokens * width) / memory, "decode dequantise": tokens * (width + 2 * rank) / memory,
        # Limbs of inputs and basis, 8 bits each: four products.
        "encode gather": (raw + 2 * tokens * channels) / memory, "encode project": 4 * product / ops8,
        "encode quantise": tokens * (8 * rank + width) / memory, "encode DEFLATE": (tokens * width + coded) / memory,
        "encode pack": 2 * coded / memory, "encode checksum": 2 * coded / memory,
    }  # fmt: skip


def measure_rates(device: torch.device) -> dict[str, float]:
    """What this GPU does, bytes and operations a second: the floors that stages are held against."""
    host = torch.empty(_RAW_BYTES, dtype=torch.uint8, pin_memory=True)
    there, other = (torch.empty(_RAW_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    out = {
        "h2d_bytes_s": _RAW_BYTES / _gpu_seconds(lambda: there.copy_(host, non_blocking=True)),
        "d2h_bytes_s": _RAW_BYTES / _gpu_seconds(lambda: host.copy_(there, non_blocking=True)),
        "device_bytes_s": 2 * _RAW_BYTES / _gpu_seconds(lambda: other.copy_(there)),
    }
    n = 8192
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    a16, b16 = a.bfloat16(), b.bfloat16()
    out["bf16_ops_s"] = 2 * n**3 / _gpu_seconds(lambda: a16 @ b16)
    # The matrix units take fp8 and int8 at the same rate; cuBLAS's fp8 product is the faster of its two.
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=device)
    fp8 = _gpu_seconds(lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))
    ai, bi = ((10 * x).to(torch.int8) for x in (a, b))
    int8 = _gpu_seconds(lambda: torch._int_mm(ai, bi.t()))
    out["int8_ops_s"] = 2 * n**3 / min(fp8, int8)
    return out


def _gpu_seconds(call: Callable[[], Any]) -> float:
    times = []
    for i in range(_WARM + _RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if i >= _WARM:
            times.append(start.elapsed_time(end) / 1e3)
    return float(np.median(times))
