"""Bit allocation of profile ``paper``: the exact dynamic programme (Staniszewski and Lancucki, arXiv 2511.01815).

The components, by falling variance, are cut into consecutive runs; each run has an allowed size and a type. A token
costs 32 bits of scale and shift for every quantised run and 2, 4 or 8 bits a code; a component left out costs what it
holds. Over all such allocations within the budget, the programme finds the least sum over calibration tokens of
||y - y_q||^2. A budget is a whole number of bytes, so a token's packed bytes never exceed it.

Two parts. The table of every run's error, by every size and type at every start, is quadratic in nothing but large:
about starts * sum(sizes) * 3 * tokens quantised values, through the profile's own quantiser, where the coefficients
are. The programme itself is quadratic: components * budget * 13 steps and components * budget bytes of memory (the
budget counted in units of 2 bits), on the CPU. Both are done once for the loosest of several ratios; the tighter ones
are read off the same programme.

One thing is assumed: a quantised run is tried at a start only if the budget would bear it with every component before
it at 2 bits. That excludes nothing but allocations that skip early components in favour of far ones, which falling
variance makes useless.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamo_kvtc.calibrate import programme
from dynamo_kvtc.errors import CalibrationError, ConfigError, TooFewTokensError, UnreachableTargetError
from dynamo_kvtc.ops import affine, project

LEAST_RATIO = 2.0
"""16 bits a channel against fp8's 8: under this ratio there is nothing to buy."""

_UNIT_BITS = 2
_QUANTISED = (affine.INT2, affine.INT4, affine.FP8)
_STARTS = 512
"""Starts between two reports of progress."""
_ANALYSIS_TOKENS = 512

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Allocation:
    """What one operating point does with the components of K or of V.

    sizes: int32 [m], components of each run; types: uint8 [m], 0 none, 1 int2, 2 int4, 3 fp8; trailing components that
    no run holds are left out. bits: of a token, scales and shifts included; mse: mean over the calibration tokens of
    ||y - y_q||^2, in the squared unit of the coefficients.
    """

    sizes: Tensor
    types: Tensor
    bits: int
    mse: float


def allocate(coefficients: Tensor, channels: int, ratio: float, progress: Progress | None = None) -> Allocation:
    """``allocate_many`` for one ratio."""
    return allocate_many(coefficients, channels, [ratio], progress=progress)[0]


def allocate_many(
    coefficients: Tensor,
    channels: int,
    ratios: Sequence[float],
    sizes: Sequence[int] = affine.SIZES,
    progress: Progress | None = None,
) -> list[Allocation]:
    """The best allocation for each ratio, from one table of errors and one programme.

    coefficients: float32 [n, R] on any device, sorted by falling variance, every value within float16's range; they
        are what ``affine.normalise`` gives, or in any unit for which float16 scales and shifts will do.
    channels: P, of K or of V; the budget of a ratio is floor(2 * P / ratio) bytes a token.
    sizes: allowed run sizes, 1 among them.
    progress: called with the fraction done, 0 to 1.
    Raises UnreachableTargetError if a ratio is under 2 or leaves less than one run; ConfigError if an argument cannot
    be used.
    """
    _check(coefficients, ratios, sizes)
    budgets = [_budget_units(channels, ratio) for ratio in ratios]
    n, components = coefficients.shape
    most = affine.RUN_BITS + max(affine.CODE_BITS.values())
    units = min(max(budgets), components * most // _UNIT_BITS)
    reach = min(components, units)

    kinds = [(size, kind) for size in sorted(sizes) for kind in _QUANTISED]
    costs = [_cost_units(size, kind) for size, kind in kinds]
    energy = coefficients.double().square().sum(dim=0).cpu().numpy()
    table = _error_table(coefficients[:, :reach], kinds, costs, units, progress)
    choice, best = programme.solve(energy[:reach], table, np.array([size for size, _ in kinds]), np.array(costs), units)
    if progress:
        progress(1.0)

    out = []
    for budget in (min(b, units) for b in budgets):
        runs = [kinds[k] if k >= 0 else (1, affine.NONE) for k in programme.trace(choice, budget, kinds, costs)]
        merged = _merge_none(runs, sorted(sizes))
        total = float(best[budget] + energy[reach:].sum())
        out.append(
            Allocation(
                sizes=torch.tensor([size for size, _ in merged], dtype=torch.int32),
                types=torch.tensor([kind for _, kind in merged], dtype=torch.uint8),
                bits=sum(_cost_units(size, kind) * _UNIT_BITS for size, kind in merged if kind != affine.NONE),
                mse=total / n,
            )
        )
    return out


def fit_paper_part(
    rows: Tensor, mean: Tensor, basis: Tensor, unit: float, ratios: Sequence[float], progress: Progress | None = None
) -> list[Allocation]:
    """Allocations of K or of V of a layer group, for each ratio, from calibration rows.

    rows: float32 [n, P], as the codec will see them (zeros as mean if they are centred already); mean: float32 [P];
    basis: int16 [P, R], by falling variance; unit: from ``paper_unit``. All on one device.
    mse is in squared channel units and counts what the basis does not hold: K's plus V's is the artifact's ``error``.
    Tokens beyond the fixed-point range are left out, as the codec stores them exact.
    Raises UnreachableTargetError, ConfigError, and TooFewTokensError if no token is in range.
    """
    channels = basis.shape[0]
    gain = torch.full((channels,), 1.0 / unit, dtype=torch.float32, device=rows.device)
    parts, outside = [], []
    for start in range(0, rows.shape[0], _ANALYSIS_TOKENS):
        fixed, energy, saturated = project.fixed_point(rows[start : start + _ANALYSIS_TOKENS], mean, gain)
        exact = project.analyse_wide(fixed, basis)
        held = (exact * 2.0**-project.BASIS_BITS).square().sum(dim=1)
        parts.append(affine.normalise(exact)[~saturated])
        outside.append((energy - held).clamp(min=0)[~saturated])
    coefficients = torch.cat(parts)
    if not len(coefficients):
        raise TooFewTokensError(
            f"none of {rows.shape[0]} calibration tokens is within {project.INPUT_MAX} units of {unit} each"
        )
    rest = float(torch.cat(outside).mean()) * unit**2
    step = unit * 2.0 ** (affine.FRACTION_BITS - project.BASIS_BITS)
    return [
        Allocation(a.sizes, a.types, a.bits, a.mse * step**2 + rest)
        for a in allocate_many(coefficients, channels, ratios, progress=progress)
    ]


def paper_unit(variance: Tensor) -> float:
    """The fixed-point unit of a layer group's K or V, in channel units, from its channels' variances (float32 [P]).

    16 standard deviations of the largest channel are the greatest input: no token but an outlier that ought to be
    stored exact is lost, and the unit, 1/2048 of that deviation, adds 1/12 of its square to the error of a channel.
    Raises CalibrationError if no variance is positive or one is not finite.
    """
    largest = float(variance.max()) if variance.numel() else 0.0
    if not bool(variance.isfinite().all()) or not largest > 0:
        raise CalibrationError(f"the largest channel variance is {largest}; the rows are constant or damaged")
    # What the artifact stores is float32: the same number must come back.
    return float(torch.tensor(16.0 * largest**0.5 / project.INPUT_MAX, dtype=torch.float32))


def _check(coefficients: Tensor, ratios: Sequence[float], sizes: Sequence[int]) -> None:
    if coefficients.dtype != torch.float32 or coefficients.dim() != 2 or 0 in coefficients.shape:
        raise ConfigError(f"coefficients must be float32 [n, R]; got {coefficients.dtype} {tuple(coefficients.shape)}")
    if not ratios or 1 not in sizes or len(set(sizes)) != len(sizes) or min(sizes) < 1:
        raise ConfigError(f"ratios {list(ratios)}, run sizes {list(sizes)}: both are needed, sizes distinct and with 1")
    largest = float(coefficients.abs().max())
    if not largest <= affine.MAX_VALUE:
        raise ConfigError(f"the largest coefficient is {largest}; scales and shifts hold at most {affine.MAX_VALUE}")


def _budget_units(channels: int, ratio: float) -> int:
    """Units of 2 bits in floor(2 * channels / ratio) bytes."""
    least_bytes = (_cost_units(1, affine.INT2) * _UNIT_BITS + 7) // 8
    budget = int(2 * channels / ratio) if ratio >= LEAST_RATIO else 0
    if budget < least_bytes:
        raise UnreachableTargetError(
            f"ratio {ratio:g} is out of reach with {channels} channels; the paper profile does {LEAST_RATIO:g} to "
            f"{2 * channels / least_bytes:.1f}"
        )
    return budget * 8 // _UNIT_BITS


def _cost_units(size: int, kind: int) -> int:
    return (affine.RUN_BITS + size * affine.CODE_BITS[kind]) // _UNIT_BITS


def _error_table(
    coefficients: Tensor, kinds: list[tuple[int, int]], costs: list[int], units: int, progress: Progress | None
) -> np.ndarray:
    """float64 [len(kinds), reach]: squared error of a run of that kind starting there, infinite where not tried."""
    reach = coefficients.shape[1]
    x = coefficients.T.contiguous()
    table = np.full((len(kinds), reach), np.inf)
    starts = [max(0, min(reach - size, units - cost) + 1) for (size, _), cost in zip(kinds, costs, strict=True)]
    work, done = sum(size * count for (size, _), count in zip(kinds, starts, strict=True)), 0

    low = high = x
    span = 1
    for size in sorted({size for size, _ in kinds}):
        if size > reach:
            break
        low, high = _slide(low, span, size, torch.minimum), _slide(high, span, size, torch.maximum)
        span = size
        for k, count in enumerate(starts):
            if kinds[k][0] != size:
                continue
            for first in range(0, count, _STARTS):
                part = slice(first, min(first + _STARTS, count))
                rows = x[first : part.stop + size - 1]
                table[k, part] = affine.run_errors(rows, low[part], high[part], size, kinds[k][1]).numpy()
                done += (part.stop - first) * size
                if progress:
                    progress(0.9 * done / work)
    return table


def _slide(edge: Tensor, span: int, size: int, pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Minima or maxima of ``size`` consecutive rows from those of ``span``: [S, n] -> [S + span - size, n]."""
    while span < size:
        step = min(span, size - span)
        edge, span = pick(edge[:-step], edge[step:]), span + step
    return edge


def _merge_none(runs: list[tuple[int, int]], sizes: list[int]) -> list[tuple[int, int]]:
    """Single left-out components joined into runs of allowed sizes; those at the end dropped."""
    out: list[tuple[int, int]] = []
    skipped = 0
    for size, kind in runs:
        if kind == affine.NONE:
            skipped += size
            continue
        for large in reversed(sizes):
            count, skipped = divmod(skipped, large)
            out += [(large, affine.NONE)] * count
        out.append((size, kind))
    return out
