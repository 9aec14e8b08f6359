"""The quantiser's kernels: bit for bit what ``reference`` gives.

Scales and shifts come first (a launch per size of run that occurs), since a byte may hold codes of two runs; then a
thread makes each byte from the components in it. Every float32 operation is one IEEE operation, in the reference's
order: launches forbid fused multiply-adds, divisions are rounded ones, and roundings to fp8 and to whole codes are
written out.
"""

# Triton's decorators hide the types of what they wrap.
# mypy: disable-error-code="misc"
from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamo_kvtc.ops.affine import FRACTION_BITS
from dynamo_kvtc.ops.affine.reference import FP8, INT2, INT4, Layout

_NORMAL = tl.constexpr(2.0**-FRACTION_BITS)
_TILE = 2048
_BYTES = 256
_COLUMNS = 512
_PLANE_TOKENS, _PLANE_BYTES = 16, 128


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


_THIRD, _FIFTEENTH, _HALF_OF_448 = _float32(1.0 / 3.0), _float32(1.0 / 15.0), _float32(0.5 / 448.0)


@dataclass(frozen=True)
class Plan:
    """A layout's tables on the device, int32: what a thread looks up for its run, its byte or its component.

    groups: per size of run: (size, index of each run, its first live component, its type).
    fp8_columns: component of each fp8 byte. digits: [4 * digit bytes], component * 4 + (low digit of int4: 1, high: 2,
    int2: 3), or 0 for padding. byte_of, where: per component, its byte and (type * 8 + shift in it); run_of: its run.
    """

    runs: int
    width: int
    columns: int
    codes_at: int
    digits_at: int
    digit_count: int
    groups: tuple[tuple[int, Tensor, Tensor, Tensor], ...]
    fp8_columns: Tensor
    digits: Tensor
    run_of: Tensor
    byte_of: Tensor
    where: Tensor

    @cached_property
    def device(self) -> torch.device:
        return self.run_of.device


def plan(runs: Layout, device: torch.device | str) -> Plan:
    def table(values: Tensor | list[int]) -> Tensor:
        # At least one element: an empty tensor has no address.
        values = torch.as_tensor(values, dtype=torch.int32)
        return (values if values.numel() else torch.zeros(1, dtype=torch.int32)).contiguous().to(device)

    int4, int2, fp8 = (runs.columns[kind].cpu() for kind in (INT4, INT2, FP8))
    digit_bytes = runs.width - runs.digits_at
    digits = torch.zeros(4 * digit_bytes, dtype=torch.int64)
    split = 2 * len(int4)
    digits[0:split:2], digits[1:split:2] = int4 * 4 + 1, int4 * 4 + 2
    digits[split : runs.digits] = int2 * 4 + 3
    byte_of, where = (torch.zeros(len(runs.live), dtype=torch.int64) for _ in range(2))
    byte_of[fp8], where[fp8] = runs.codes_at + torch.arange(len(fp8)), FP8 * 8
    at = 2 * torch.arange(len(int4))
    byte_of[int4], where[int4] = runs.digits_at + at // 4, INT4 * 8 + 2 * (at % 4)
    at = split + torch.arange(len(int2))
    byte_of[int2], where[int2] = runs.digits_at + at // 4, INT2 * 8 + 2 * (at % 4)

    by_size: dict[int, list[tuple[int, int, int]]] = {}
    for kind, size, members, own in runs.kinds:
        firsts = own.reshape(-1, size)[:, 0].tolist()
        by_size.setdefault(size, []).extend(zip(members.tolist(), firsts, [kind] * len(members), strict=True))
    groups = tuple(
        (size, *(table(list(column)) for column in zip(*sorted(rows), strict=True)))
        for size, rows in sorted(by_size.items())
    )
    return Plan(
        runs.runs, runs.width, len(runs.live), runs.codes_at, runs.digits_at, runs.digits,
        groups,  # type: ignore[arg-type]
        table(fp8), table(digits), table(runs.run_of.cpu()), table(byte_of), table(where),
    )  # fmt: skip


@triton.jit
def _value(values, at, mask, EXACT: tl.constexpr):
    """float32 components; exact coefficients are normalised as ``affine.normalise`` does."""
    v = tl.load(values + at, mask=mask, other=0.0)
    if EXACT:
        v = (v * _NORMAL).to(tl.float32)
        v = tl.where(v == 0.0, 0.0, v)
    return v


@triton.jit(do_not_specialize=["total"])
def _fit_kernel(
    values, stats, run_index, first, kind, count, total, runs, columns,
    THIRD: tl.constexpr, FIFTEENTH: tl.constexpr, HALF_OF_448: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Scale and shift of the runs of one size: stats[t, run] and stats[t, runs + run]."""
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = p < total
    token, r = (p // count).to(tl.int64), p % count
    at = token * columns + tl.load(first + r, mask=mask, other=0)
    v = _value(values, at[:, None] + tl.arange(0, SIZE)[None, :], mask[:, None], EXACT)
    low, high = tl.min(v, axis=1), tl.max(v, axis=1)
    # A minimum may skip NaN; the reference's does not.
    nan = tl.max((v != v).to(tl.int32), axis=1) > 0
    low, high = tl.where(nan, float("nan"), low), tl.where(nan, float("nan"), high)
    k = tl.load(kind + r, mask=mask, other=1)
    factor = tl.where(k == 3, HALF_OF_448, tl.where(k == 2, FIFTEENTH, THIRD))
    scale = (high - low) * factor
    shift = tl.where(k == 3, low * 0.5 + high * 0.5, low)
    run = tl.load(run_index + r, mask=mask, other=0)
    out = stats + token * (2 * runs) + run
    tl.store(out, scale.to(tl.float16).to(tl.float32), mask=mask)
    tl.store(out + runs, shift.to(tl.float16).to(tl.float32), mask=mask)


@triton.jit
def _code(values, stats, run_of, token, column, mask, runs, columns, EXACT: tl.constexpr):
    """(value - shift) / scale, not yet rounded."""
    run = tl.load(run_of + column, mask=mask, other=0)
    at = token * (2 * runs) + run
    scale, shift = tl.load(stats + at, mask=mask, other=1.0), tl.load(stats + at + runs, mask=mask, other=0.0)
    v = _value(values, token * columns + column, mask, EXACT)
    return tl.div_rn(v - shift, tl.where(scale > 0, scale, float("inf")))


@triton.jit
def _to_e4m3(x):
    """The byte of x clamped to -448 .. 448 and rounded to E4M3, ties to even; NaN gives 0."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.where(x == x, tl.abs(x), 0.0), 448.0)
    b = size.to(tl.int32, bitcast=True)
    # 3 of float32's 23 fraction bits are kept; the exponents' biases are 127 and 7.
    normal = ((b + 0x7FFFF + ((b >> 20) & 1)) >> 20) - 960
    # Adding 1.5 * 2**14 rounds to multiples of 2**-9, the step of E4M3's subnormals.
    small = (size + 24576.0).to(tl.int32, bitcast=True) - 0x46C00000
    sign = (bits >> 24) & 0x80
    return tl.where(x == x, tl.where(size < 0.015625, small, normal) | sign, 0)


@triton.jit
def _encode_kernel(
    values, stats, out, overflow, run_of, fp8_columns, digits, runs, columns, out_stride, codes_at, n8, digit_bytes,
    BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A token's bytes. Programs 0 of the second axis write scales and shifts, the others codes."""
    token = tl.program_id(0).to(tl.int64)
    row = out + token * out_stride
    i = tl.arange(0, BLOCK)
    tile = tl.program_id(1)
    if tile == 0:
        bad = tl.zeros((BLOCK,), dtype=tl.int32)
        done = 0
        while done < 2 * runs:
            j = done + i
            mask = j < 2 * runs
            p = tl.load(stats + token * (2 * runs) + j, mask=mask, other=0.0)
            finite = tl.abs(p) < float("inf")
            bad |= (finite == 0).to(tl.int32)
            half = tl.where(finite, p, 0.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
            tl.store(row + 2 * j, (half & 0xFF).to(tl.uint8), mask=mask)
            tl.store(row + 2 * j + 1, ((half >> 8) & 0xFF).to(tl.uint8), mask=mask)
            done += BLOCK
        tl.store(overflow + token, tl.max(bad, axis=0).to(tl.uint8))
    else:
        at = (tile - 1) * BLOCK
        e = at + i
        if at < n8:
            mask = e < n8
            column = tl.load(fp8_columns + e, mask=mask, other=0)
            code = _code(values, stats, run_of, token, column, mask, runs, columns, EXACT)
            tl.store(row + codes_at + e, _to_e4m3(code).to(tl.uint8), mask=mask)
        if at + BLOCK > n8:
            d = e - n8
            mask = (d >= 0) & (d < digit_bytes)
            byte = tl.zeros((BLOCK,), dtype=tl.int32)
            for part in tl.static_range(4):
                entry = tl.load(digits + 4 * d + part, mask=mask, other=0)
                role = entry & 3
                own = mask & (role > 0)
                code = _code(values, stats, run_of, token, entry >> 2, own, runs, columns, EXACT)
                top = tl.where(role == 3, 3.0, 15.0)
                code = tl.minimum(tl.maximum(tl.where(code == code, code, 0.0), 0.0), top)
                # Adding 1.5 * 2**23 rounds to whole numbers, ties to even, into the low bits.
                whole = (code + 12582912.0).to(tl.int32, bitcast=True) & 15
                digit = tl.where(role == 2, whole >> 2, whole & 3)
                byte |= tl.where(own, digit << (2 * part), 0)
            tl.store(row + codes_at + e, byte.to(tl.uint8), mask=mask)


@triton.jit
def _half(row, j, mask):
    """float32 of the float16 number j of a token's; rows may start at odd addresses."""
    low = tl.load(row + 2 * j, mask=mask, other=0).to(tl.int32)
    high = tl.load(row + 2 * j + 1, mask=mask, other=0).to(tl.int32)
    return (low | (high << 8)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _decode_kernel(
    data, out, run_of, byte_of, where, runs, columns, stride, out_stride, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < columns
    row = data + token * stride
    byte = tl.load(row + tl.load(byte_of + c, mask=mask, other=0), mask=mask, other=0).to(tl.int32)
    entry = tl.load(where + c, mask=mask, other=0)
    kind = entry >> 3
    whole = (byte >> (entry & 7)) & tl.where(kind == 1, 3, 15)
    size = byte & 0x7F
    # Normal numbers are rebiased from 7 to 127; below them the mantissa counts steps of 2**-9.
    small = (size.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
    bits = tl.where(size == 0x7F, 0x7FC00000, tl.where(size < 8, small, (size << 20) + 0x3C000000))
    fp8 = (bits | ((byte & 0x80) << 24)).to(tl.float32, bitcast=True)
    code = tl.where(kind == 3, fp8, whole.to(tl.float32))
    run = tl.load(run_of + c, mask=mask, other=0)
    scale, shift = _half(row, run, mask), _half(row, runs + run, mask)
    v = code * scale + shift
    if HALF:
        # An infinity would make the product's whole row NaN.
        v = tl.minimum(tl.maximum(v, -65504.0), 65504.0).to(tl.float16)
    tl.store(out + token * out_stride + c, v, mask=mask)


@triton.jit
def _eighths(term):
    """int64, the nearest number of eighths: sums of them are the same in any order, and the CPU's."""
    scaled = term * 8
    # Adding 2**52 leaves no fraction, ties to even; from there on there is none.
    near = (scaled + 4503599627370496.0) - 4503599627370496.0
    return tl.where(scaled < 4503599627370496.0, near, scaled).to(tl.int64)


@triton.jit
def _errors_kernel(values, levels, kept, lost, columns, UNIT: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    energy, error = tl.zeros((BLOCK,), dtype=tl.int64), tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(0, columns, BLOCK):
        c = first + tl.arange(0, BLOCK)
        exact = tl.load(values + token * columns + c, mask=c < columns, other=0.0) * UNIT
        rest = exact - tl.load(levels + token * columns + c, mask=c < columns, other=0.0).to(tl.float64) * LEVEL
        energy += _eighths(exact * exact)
        error += _eighths(rest * rest)
    tl.store(kept + token, tl.sum(energy, axis=0).to(tl.float64) * 0.125)
    tl.store(lost + token, tl.sum(error, axis=0).to(tl.float64) * 0.125)


@triton.jit
def _valid_kernel(data, out, runs, stride, codes_at, digits_at, width, padding_shift, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = data + token * stride
    i = tl.arange(0, BLOCK)
    bad = tl.zeros((BLOCK,), dtype=tl.int32)
    done = 0
    while done < 2 * runs:
        j = done + i
        p = _half(row, j, j < 2 * runs)
        bad |= ((tl.abs(p) < float("inf")) == 0).to(tl.int32) | ((j < runs) & (p < 0)).to(tl.int32)
        done += BLOCK
    done = codes_at
    while done < digits_at:
        j = done + i
        byte = tl.load(row + j, mask=j < digits_at, other=0).to(tl.int32)
        bad |= ((byte & 0x7F) == 0x7F).to(tl.int32)
        done += BLOCK
    if padding_shift > 0:
        last = tl.load(row + width - 1).to(tl.int32)
        bad |= ((last >> padding_shift) != 0).to(tl.int32)
    tl.store(out + token, (tl.max(bad, axis=0) == 0).to(tl.uint8))


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["block_start"])
def _planes_kernel(
    data, planes, block_start, tiles, width, stride, TOKENS: tl.constexpr, BYTES: tl.constexpr, BACK: tl.constexpr
):
    """Byte w of token t of block b: data[t * stride + w] <-> planes[first * width + w * tokens + t - first]."""
    b = tl.program_id(0) // tiles
    first = tl.load(block_start + b)
    tokens = tl.load(block_start + b + 1) - first
    t = ((tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS))[:, None].to(tl.int64)
    w = (tl.program_id(1) * BYTES + tl.arange(0, BYTES))[None, :].to(tl.int64)
    mask = (t < tokens) & (w < width)
    rows = data + (first + t) * stride + w
    columns = planes + first * width + w * tokens + t
    if BACK:
        tl.store(rows, tl.load(columns, mask=mask), mask=mask)
    else:
        tl.store(columns, tl.load(rows, mask=mask), mask=mask)


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def encode(values: Tensor, p: Plan, out: Tensor, overflow: Tensor, stats: Tensor) -> None:
    tokens = values.shape[0]
    exact = values.dtype == torch.float64
    with _on(values.device):
        for size, index, first, kind in p.groups:
            rows = max(_TILE // size, 1)
            total = tokens * len(index)
            _fit_kernel[(triton.cdiv(total, rows),)](
                values, stats, index, first, kind, len(index), total, p.runs, p.columns,
                THIRD=_THIRD, FIFTEENTH=_FIFTEENTH, HALF_OF_448=_HALF_OF_448, SIZE=size, ROWS=rows, EXACT=exact,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        codes = p.width - p.codes_at
        _encode_kernel[(tokens, 1 + triton.cdiv(codes, _BYTES))](
            values, stats, out, overflow.view(torch.uint8), p.run_of, p.fp8_columns, p.digits, p.runs, p.columns,
            out.stride(0), p.codes_at, p.digits_at - p.codes_at, p.width - p.digits_at,
            BLOCK=_BYTES, EXACT=exact, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def decode(data: Tensor, p: Plan, out: Tensor) -> None:
    with _on(data.device):
        _decode_kernel[(data.shape[0], triton.cdiv(p.columns, _COLUMNS))](
            data, out, p.run_of, p.byte_of, p.where, p.runs, p.columns, data.stride(0), out.stride(0),
            HALF=out.dtype == torch.float16, BLOCK=_COLUMNS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def errors(values: Tensor, levels: Tensor, kept: Tensor, lost: Tensor) -> None:
    with _on(values.device):
        _errors_kernel[(len(values),)](
            values, levels, kept, lost, values.shape[1], UNIT=2.0**-14, LEVEL=256.0, BLOCK=_COLUMNS, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip


def valid(data: Tensor, p: Plan, out: Tensor) -> None:
    with _on(data.device):
        _valid_kernel[(data.shape[0],)](
            data, out.view(torch.uint8), p.runs, data.stride(0), p.codes_at, p.digits_at, p.width,
            2 * (p.digit_count % 4), BLOCK=_BYTES, num_warps=4,
        )  # fmt: skip


def planes(data: Tensor, flat: Tensor, block_start: Tensor, max_tokens: int, back: bool) -> None:
    tiles = triton.cdiv(max_tokens, _PLANE_TOKENS)
    with _on(data.device):
        _planes_kernel[((len(block_start) - 1) * tiles, triton.cdiv(data.shape[1], _PLANE_BYTES))](
            data, flat, block_start, tiles, data.shape[1], data.stride(0),
            TOKENS=_PLANE_TOKENS, BYTES=_PLANE_BYTES, BACK=back, num_warps=4,
        )  # fmt: skip
