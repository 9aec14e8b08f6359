"""How fast blocks leave a GPU coded and come back, against moving the same bytes raw and against computing them again.

A case first proves its result: records of some blocks are the CPU's byte for byte, every block is reported sound, and
what comes back is as far from what left as the CPU's decoder says. Times are medians of wall-clock seconds around the
whole call, host work included; stages are GPU events of one further run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_kvtc.bench.shapes import model_of
from dynamo_kvtc.bench.synthetic import Synthetic, rows_of
from dynamo_kvtc.calibrate.collect import default_groups
from dynamo_kvtc.codec.paged import Blocks, PagedCodec, PagedLimits
from dynamo_kvtc.codec.paged_groups import PagedGroup
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.errors import CalibrationError, ConfigError
from dynamo_kvtc.types import KVShape

_CHECKED_BLOCKS = 2
_WARM, _RUNS = 3, 9
_RAW_BYTES = 1 << 30
_TOLERANCE = 2e-3

Row = dict[str, Any]


@dataclass(frozen=True)
class CodecCase:
    """What to measure. ratios: of coded tokens; requests x tokens are coded in one call; groups: layer groups (default:
    as `kvtc calibrate` has it); max_rank: components kept per layer group; lanes: rANS lanes a token (default: by
    their cost); prefill: whether to time a random-weight model of the shape, too."""

    shape: str
    ratios: tuple[float, ...]
    tokens: int
    requests: int = 1
    groups: int | None = None
    max_rank: int = 6144
    lanes: int | None = None
    block_tokens: int = 16
    prefill: bool = True
    small_tokens: int = 512
    limits: PagedLimits | None = None


def run(case: CodecCase, progress: Callable[[str], None]) -> list[Row]:
    """One row per ratio. Raises ConfigError without a GPU, CalibrationError if a result is not right."""
    if not torch.cuda.is_available():
        raise ConfigError("`kvtc bench codec` needs an NVIDIA GPU; there is none here")
    device = torch.device("cuda")
    shape = model_of(case.shape).kv
    rates = measure_rates(device)
    progress(f"rates: {rates}")
    groups = case.groups or default_groups(shape, 1)
    synthetic = Synthetic(shape, case.ratios, groups, case.max_rank, case.block_tokens, device, case.lanes)
    total = case.tokens * case.requests
    cache, slots = synthetic.cache(total)
    positions = torch.arange(case.tokens).repeat(case.requests)
    synthetic.fill(cache, slots, positions)
    progress("artifact and cache made")
    prefill = None
    if case.prefill:
        from dynamo_kvtc.hf.random_model import prefill_seconds

        prefill = prefill_seconds(model_of(case.shape), case.tokens)
        progress(f"prefill of {case.tokens} tokens: {prefill:.3f} s")
    rows = []
    for ratio in case.ratios:
        rows.append(_one(case, synthetic, cache, slots, positions, ratio, rates, progress) | {"prefill_s": prefill})
        torch.cuda.empty_cache()
        progress(f"ratio {ratio:g}: done")
    return rows


def _one(
    case: CodecCase, synthetic: Synthetic, cache: Any, slots: Tensor, positions: Tensor, ratio: float,
    rates: dict[str, float], progress: Callable[[str], None],
) -> Row:  # fmt: skip
    shape, name = synthetic.shape, f"{ratio:g}"
    raw_bytes = len(slots) * shape.bytes_per_token
    arena = torch.empty(int(2.5 * raw_bytes / ratio) + (64 << 20), dtype=torch.uint8, pin_memory=True)
    codec = PagedCodec(synthetic.artifact, name, cache, limits=case.limits)
    blocks = Blocks.uniform(slots, positions, case.block_tokens)
    encoded = codec.encode(blocks, arena)
    encoded.finish()
    target, target_slots = synthetic.cache(len(slots))
    decoder = PagedCodec(synthetic.artifact, name, target, limits=case.limits)
    back = Blocks.uniform(target_slots, None, case.block_tokens)
    status = decoder.decode(arena, encoded.offsets, encoded.sizes, back).finish()
    if status.any():
        raise CalibrationError(f"{int((status != 0).sum())} of {len(status)} blocks did not come back: {set(status)}")
    error = _verify(case, synthetic, name, cache, slots, positions, target, target_slots, encoded)
    progress(f"ratio {name}: verified")

    def encode() -> None:
        codec.encode(blocks, arena).finish()

    def decode() -> None:
        decoder.decode(arena, encoded.offsets, encoded.sizes, back).finish()

    point = codec.point
    assert point is not None
    row: Row = {
        "shape": case.shape, "profile": "kvtc", "tokens": len(slots), "requests": case.requests, "ratio": ratio,
        "groups": len(point.groups), "rank": [g.rank for g in point.groups],
        "wide_components": [g.wide for g in point.groups],
        "wide_inputs": [g.wide_inputs for g in point.groups],
        "channels": [g.channels for g in point.groups], "lanes": point.lanes,
        "device": torch.cuda.get_device_name(), "torch": str(torch.__version__), "rates": rates,
        "raw_bytes": raw_bytes, "record_bytes": int(encoded.sizes.sum()),
        "exact_tokens": int(encoded.exact.sum()), "relative_error": error,
        "basis_bytes": codec.basis_bytes, "workspace_bytes": codec.workspace_bytes,
        "raw_h2d_s": raw_bytes / rates["h2d_bytes_s"], "raw_d2h_s": raw_bytes / rates["d2h_bytes_s"],
        "encode_s": _median(encode), "decode_s": _median(decode),
    }  # fmt: skip
    few = slots[: case.small_tokens]
    small = Blocks.uniform(target_slots[: len(few)], None, case.block_tokens)
    n = len(small.counts)
    row["small_tokens"] = len(few)
    row["small_decode_s"] = _median(
        lambda: decoder.decode(arena, encoded.offsets[:n], encoded.sizes[:n], small).finish()
    )
    row["first_group_s"], row["all_groups_s"], row["decode_stages_s"] = _decode_stages(
        decoder, lambda: decoder.decode(arena, encoded.offsets, encoded.sizes, back)
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decode()
    # What a restore needs beside cache and bases: the decoder's workspace, and what the call took for itself.
    row["restore_bytes"] = decoder.restore_workspace_bytes + torch.cuda.max_memory_allocated() - before
    row["encode_stages_s"] = _stages(codec, encode)
    row["floors_s"] = _floors(point.groups, shape, len(slots), row, rates)
    return row


def _verify(
    case: CodecCase, synthetic: Synthetic, name: str, cache: Any, slots: Tensor, positions: Tensor, target: Any,
    target_slots: Tensor, encoded: Any,
) -> float:  # fmt: skip
    """Relative error of what came back. Raises CalibrationError if records or cache are not what the CPU makes."""
    size, records = case.block_tokens, encoded.records()
    reference = BlockCodec(synthetic.artifact, name)
    last = len(records) - 1
    for b in sorted({1, last})[:_CHECKED_BLOCKS]:
        own = slice(b * size, min((b + 1) * size, len(slots)))
        k, v = rows_of(cache, slots[own])
        if reference.encode_block(k, v, positions[own]).record != records[b]:
            raise CalibrationError(f"block {b}: the GPU's record is not the CPU's")
        found = torch.stack(rows_of(target, target_slots[own])).float()
        wanted = torch.stack(reference.decode_block(records[b])[:2]).float()
        off = float((found - wanted).norm() / wanted.norm())
        if not off <= _TOLERANCE:
            raise CalibrationError(f"block {b}: the GPU's cache is {off:.2e} from the CPU's; allowed is {_TOLERANCE}")
    some = slice(0, min(4096, len(slots)))
    before, after = (torch.stack(rows_of(c, s[some])).float() for c, s in ((cache, slots), (target, target_slots)))
    return float((after - before).norm() / before.norm())


def _median(call: Callable[[], object]) -> float:
    for _ in range(_WARM):
        call()
    times = []
    for _ in range(_RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _stages(codec: PagedCodec, call: Callable[[], Any]) -> dict[str, float]:
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


def _decode_stages(codec: PagedCodec, call: Callable[[], Any]) -> tuple[float, float, dict[str, float]]:
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
    return float(np.median(first)), float(np.median(whole)), _stages(codec, lambda: call().finish())


def _floors(
    groups: tuple[PagedGroup, ...], shape: KVShape, tokens: int, row: Row, rates: dict[str, float]
) -> dict[str, float]:
    """The least a stage can take at the rates measured: its products on the matrix units, or its bytes once through
    device memory or over the link."""
    ops8, ops16, memory = rates["int8_ops_s"], rates["bf16_ops_s"], rates["device_bytes_s"]
    raw, coded = row["raw_bytes"], row["record_bytes"]
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
