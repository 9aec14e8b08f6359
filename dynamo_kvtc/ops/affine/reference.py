"""The affine quantiser in torch, on any device.

Every step is one elementwise IEEE operation or a minimum or maximum, so devices and batches agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE, INT2, INT4, FP8 = 0, 1, 2, 3
_TOP = {INT2: 3.0, INT4: 15.0, FP8: 448.0}
_FP8_NAN = 0x7F
_CHUNK_VALUES = 2**26
"""Values whose errors are computed at once: bounds the workspace, changes no result."""


class Layout:
    """Byte and component indices of an allocation's quantised runs.

    live: int64 [n], the components that are quantised; width: bytes a token; runs: quantised runs q; run_of: int64 [n],
    the run of each live component; columns: per type, the live components of it, int64; kinds: (type, size, runs
    int64 [c], live components int64 [c * size]) of every pair of type and size that occurs.
    """

    def __init__(self, sizes: list[int], types: list[int], device: torch.device | str) -> None:
        live: list[int] = []
        run_of: list[int] = []
        columns: dict[int, list[int]] = {INT2: [], INT4: [], FP8: []}
        kinds: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        component = run = 0
        for size, kind in zip(sizes, types, strict=True):
            if kind != NONE:
                own = list(range(len(live), len(live) + size))
                members = kinds.setdefault((kind, size), ([], []))
                members[0].append(run)
                members[1].extend(own)
                columns[kind].extend(own)
                live.extend(range(component, component + size))
                run_of.extend([run] * size)
                run += 1
            component += size

        def index(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.live, self.run_of, self.runs = index(live), index(run_of), run
        self.columns = {kind: index(own) for kind, own in columns.items()}
        self.kinds = [(kind, size, index(runs), index(own)) for (kind, size), (runs, own) in kinds.items()]
        self.digits = 2 * len(columns[INT4]) + len(columns[INT2])
        self.codes_at = 4 * run
        self.digits_at = self.codes_at + len(columns[FP8])
        self.width = self.digits_at + (self.digits + 3) // 4


def fit(low: Tensor, high: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Scale and shift, float32 holding float16 numbers, of runs from their least and greatest value."""
    if kind == FP8:
        # Halves first: the sum of two floats may overflow where the middle does not.
        shift, scale = low * 0.5 + high * 0.5, (high - low) * (0.5 / _TOP[FP8])
    else:
        # Times the reciprocal: devices differ in how they divide by a constant.
        shift, scale = low, (high - low) * (1.0 / _TOP[kind])
    return scale.to(torch.float16).to(torch.float32), shift.to(torch.float16).to(torch.float32)


def codes(values: Tensor, scale: Tensor, shift: Tensor, kind: int) -> Tensor:
    """float32 codes. Where the scale is 0 (one value, or a range below float16) they are 0."""
    code = (values - shift).div_(torch.where(scale > 0, scale, torch.inf))
    if kind == FP8:
        return code.clamp_(-_TOP[FP8], _TOP[FP8]).to(torch.float8_e4m3fn).to(torch.float32)
    return code.round_().clamp_(0.0, _TOP[kind])


def levels(code: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Overwrites ``code`` with what it stands for."""
    return code.mul_(scale).add_(shift)


def run_errors(rows: Tensor, low: Tensor, high: Tensor, size: int, kind: int) -> Tensor:
    count, n = low.shape
    out = torch.empty(count, dtype=torch.float64)
    at_once = max(1, _CHUNK_VALUES // (size * n))
    for first in range(0, count, at_once):
        some = min(at_once, count - first)
        part = slice(first, first + some)
        windows = rows.as_strided((some, size, n), (n, n, 1), rows.storage_offset() + first * n)
        scale, shift = fit(low[part, None], high[part, None], kind)
        lost = levels(codes(windows, scale, shift, kind), scale, shift).sub_(windows).square_()
        # float32 over a run, float64 over the tokens.
        out[part] = lost.sum(dim=1).double().sum(dim=1).cpu()
    return out


def encode(values: Tensor, runs: Layout) -> tuple[Tensor, Tensor]:
    tokens, device = values.shape[0], values.device
    scales = torch.zeros(tokens, runs.runs, device=device)
    shifts = torch.zeros(tokens, runs.runs, device=device)
    code = torch.zeros_like(values)
    for kind, size, members, own in runs.kinds:
        part = values[:, own].reshape(tokens, len(members), size)
        scale, shift = fit(part.amin(dim=2), part.amax(dim=2), kind)
        scales[:, members], shifts[:, members] = scale, shift
        code[:, own] = codes(part, scale[:, :, None], shift[:, :, None], kind).flatten(1)
    overflow = ~(scales.isfinite().all(dim=1) & shifts.isfinite().all(dim=1))
    code = code.nan_to_num_(0.0)

    out = torch.empty(tokens, runs.width, dtype=torch.uint8, device=device)
    pairs = torch.cat([scales, shifts], dim=1).nan_to_num_(0.0, 0.0, 0.0).to(torch.float16)
    out[:, : runs.codes_at] = pairs.view(torch.uint8)
    out[:, runs.codes_at : runs.digits_at] = code[:, runs.columns[FP8]].to(torch.float8_e4m3fn).view(torch.uint8)
    digits = torch.zeros(tokens, (runs.width - runs.digits_at) * 4, dtype=torch.uint8, device=device)
    nibbles = code[:, runs.columns[INT4]].to(torch.uint8)
    split = 2 * nibbles.shape[1]
    digits[:, 0:split:2] = nibbles & 3
    digits[:, 1:split:2] = nibbles >> 2
    digits[:, split : runs.digits] = code[:, runs.columns[INT2]].to(torch.uint8)
    d = digits.unflatten(1, (runs.width - runs.digits_at, 4))
    out[:, runs.digits_at :] = d[:, :, 0] | d[:, :, 1] << 2 | d[:, :, 2] << 4 | d[:, :, 3] << 6
    return out, overflow


def decode(data: Tensor, runs: Layout) -> Tensor:
    pairs, digits = _pairs(data, runs), _digits(data, runs)
    code = torch.empty(data.shape[0], len(runs.live), device=data.device)
    floats = data[:, runs.codes_at : runs.digits_at].contiguous().view(torch.float8_e4m3fn)
    code[:, runs.columns[FP8]] = floats.to(torch.float32)
    split = 2 * len(runs.columns[INT4])
    code[:, runs.columns[INT4]] = (digits[:, 0:split:2] | digits[:, 1:split:2] << 2).to(torch.float32)
    code[:, runs.columns[INT2]] = digits[:, split : runs.digits].to(torch.float32)
    return levels(code, pairs[:, runs.run_of], pairs[:, runs.runs + runs.run_of])


def valid(data: Tensor, runs: Layout) -> Tensor:
    pairs = _pairs(data, runs)
    floats = data[:, runs.codes_at : runs.digits_at]
    scales_positive = (pairs[:, : runs.runs] >= 0).all(dim=1)
    finite = pairs.isfinite().all(dim=1) & ((floats & _FP8_NAN) != _FP8_NAN).all(dim=1)
    good = finite & scales_positive
    if runs.digits % 4:
        good &= data[:, -1] >> 2 * (runs.digits % 4) == 0
    return good


def _pairs(data: Tensor, runs: Layout) -> Tensor:
    """float32 [T, 2q]: scales, then shifts."""
    # A copy of its own: tokens may start at odd addresses, where no float16 can be viewed.
    flat = data[:, : runs.codes_at].reshape(-1).clone()
    return flat.view(torch.float16).to(torch.float32).reshape(data.shape[0], 2 * runs.runs)


def _digits(data: Tensor, runs: Layout) -> Tensor:
    """uint8 [T, digits and padding], each 0 to 3."""
    packed = data[:, runs.digits_at :]
    return torch.stack([packed >> bits & 3 for bits in (0, 2, 4, 6)], dim=2).flatten(1)
