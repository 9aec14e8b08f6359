"""Operating points out of a transform and sampled caches: step and tables (kvtc), bit allocation (paper)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dynamo_kvtc.calibrate.allocate import fit_paper_part, paper_unit
from dynamo_kvtc.calibrate.collect import CacheModel, CacheSample, Fisher, Part, Progress
from dynamo_kvtc.calibrate.covariance import eigenbasis
from dynamo_kvtc.calibrate.importance import LEADING, ImportanceModel, component_order, fit_importance
from dynamo_kvtc.calibrate.narrow import quantise_narrow
from dynamo_kvtc.calibrate.solve import solve_step
from dynamo_kvtc.calibrate.tables import PointTables, fit_tables
from dynamo_kvtc.codec.artifact import Point
from dynamo_kvtc.codec.kvtc_point import LANES
from dynamo_kvtc.codec.lanes import LANE_BITS, overhead_bits_per_token
from dynamo_kvtc.ops.project import BASIS_BITS, INPUT_MAX, quantise_basis
from dynamo_kvtc.ops.quantize import ENERGY_MAX, INPUT_BITS, SYMBOL_MAX
from dynamo_kvtc.types import RopeSpec

_FITTING_SHARE = 0.999
"""Share of tokens whose channels must fit the transform's fixed point; the others are stored exact."""

_REACH_SHARE = 0.9995
"""Share of tokens that a channel's reach covers; what lies beyond it is clipped, and counted in the error."""

_SOLVE_TOKENS = 1024
"""Tokens on which the step is searched; the tables at the step found use all of the sample."""


_LANE_SHARE = 0.02
"""Of a token's bits in a layer group that its lanes may cost: a GPU decodes lanes side by side."""


@dataclass
class KvtcTransform:
    """One part's transform: x -> ((x - mean) * weight) @ basis.

    wide: int16 [P, R], the basis in 16 bits; narrow: int8 [P, R], scale: uint8 [R], exponent: the same in 8 bits;
    probes: components behind the leading ones (``importance``).
    """

    part: Part
    mean: Tensor
    weight: Tensor
    wide: Tensor
    narrow: Tensor
    scale: Tensor
    exponent: int
    probes: int = 0

    @classmethod
    def fit(cls, part: Part, mean: Tensor, covariance: Tensor, weight: Tensor, rank: int) -> KvtcTransform:
        """PCA of the weighted channels. covariance float32 [P, P] is overwritten."""
        covariance.mul_(weight[:, None]).mul_(weight)
        basis, variance = eigenbasis(covariance, min(rank, len(mean)))
        order, probes = component_order(basis.shape[1])
        basis = basis[:, order.to(basis.device)].contiguous()
        variance[: len(order)] = variance[order.to(variance.device)]
        return cls(part, mean, weight, quantise_basis(basis), *quantise_narrow(basis, variance.sqrt()), probes)

    def coefficients(self, rows: Tensor, rank: int | None = None) -> Tensor:
        """float32 [n, R], or the first ``rank`` of them, of rows float32 [n, P]."""
        return self.scaled(rows) @ self.wide[:, :rank].float() * 2.0**-BASIS_BITS

    def scaled(self, rows: Tensor) -> Tensor:
        """float32 [n, P]: the channels as the transform sees them."""
        return (rows - self.mean) * self.weight


@dataclass
class KvtcPoints:
    """Operating points of all ranks over one set of transforms; ``add`` fits one more.

    peak, norm: largest scaled channel and Euclidean norm of all but the most extreme tokens; reach: float32 [P] per
    part, how far all but one in 2,000 of its values go; outside: float32 [n] per part, each token's energy that no
    component holds; lanes: rANS lanes a token (default: by their cost).
    """

    transforms: list[KvtcTransform]
    importance: list[ImportanceModel]
    coefficients: list[Tensor]
    outside: list[Tensor]
    peak: float
    norm: float
    reach: list[Tensor]
    raw_bits_per_token: int
    block_tokens: int
    lanes: int | None = None
    points: list[Point] = field(default_factory=list)
    fitted: list[list[PointTables]] = field(default_factory=list)

    @classmethod
    def sample(
        cls, transforms: list[KvtcTransform], importance: list[ImportanceModel], sample: CacheSample, rope: RopeSpec,
        raw_bytes_per_token: int, block_tokens: int,
    ) -> KvtcPoints:  # fmt: skip
        coefficients, outside, reach, peak, norm = [], [], [], 0.0, 0.0
        for t in transforms:
            rows = sample.rows(t.part, rope)
            coefficients.append(t.coefficients(rows))
            scaled = t.scaled(rows)
            reach.append(_quantile(scaled.abs(), _REACH_SHARE))
            peak = max(peak, float(scaled.abs().amax(dim=1).quantile(_FITTING_SHARE)))
            length = scaled.norm(dim=1)
            norm = max(norm, float(length.quantile(_FITTING_SHARE)))
            outside.append((length.square() - coefficients[-1].norm(dim=1).square()).clamp(min=0))
        return cls(
            transforms, importance, coefficients, outside, peak, norm, reach, 8 * raw_bytes_per_token, block_tokens
        )

    @property
    def ranks(self) -> int:
        return self.transforms[-1].part.rank + 1

    def fit(self, step: float, tokens: int | None = None) -> list[PointTables]:
        """Tables of every rank at this step."""
        stride = 1 if tokens is None else max(1, len(self.coefficients[0]) // tokens)
        out = []
        for rank in range(self.ranks):
            mine = [i for i, t in enumerate(self.transforms) if t.part.rank == rank]
            coefficients = [self.coefficients[i][::stride] for i in mine]
            scales = [self.transforms[i].scale for i in mine]
            outside = [self.outside[i][::stride] for i in mine]
            out.append(fit_tables(coefficients, step, [self.importance[i] for i in mine], scales, outside))
        return out

    def ratio(self, tables: list[PointTables]) -> float:
        """Coded tokens' ratio of these tables, record headers included."""
        overhead = overhead_bits_per_token(len(tables[0].groups), self.block_tokens, self.lanes or lanes_of(tables))
        return self.raw_bits_per_token / sum(t.bits + overhead for t in tables)

    def reachable(self) -> tuple[float, float]:
        """Smallest and largest sensible step: inputs and symbols must fit their bits, and something be left to code."""
        spread = max(float(y.abs().max()) for y in self.coefficients)
        one = 2**INPUT_BITS
        return max(self.peak * one / INPUT_MAX, self.norm * one / ENERGY_MAX**0.5, spread / SYMBOL_MAX), spread

    def solve(self, ratio: float) -> float:
        """The step for a ratio. Raises UnreachableTargetError."""
        return solve_step(
            lambda step: self.ratio(self.fit(step, _SOLVE_TOKENS)), ratio, *self.reachable(), self.start()
        )

    def start(self) -> float:
        """Where to begin a search: at the last point's step, else in the middle of what is reachable."""
        return self.points[-1].step if self.points else math.prod(self.reachable()) ** 0.5

    def trial(self, name: str, step: float) -> KvtcPoints:
        """The same transforms with this one point."""
        alone = replace(self, points=[], fitted=[])
        alone.add(name, step)
        return alone

    def add(self, name: str, step: float) -> None:
        tables = self.fit(step)
        self.fitted.append(tables)
        lanes = self.lanes or lanes_of(tables)
        self.points.append(Point(name=name, step=step, expected_ratio=self.ratio(tables), lanes=lanes))

    def tensors(self) -> dict[str, Tensor]:
        """The artifact's tensors, the basis trimmed to the components that live at some point."""
        out: dict[str, Tensor] = {}
        for i, t in enumerate(self.transforms):
            rank, group = t.part.rank, t.part.group
            prefix = f"rank{rank}.group{group}"
            live = max(len(tables[rank].groups[group].classes) for tables in self.fitted)
            wide = max(tables[rank].groups[group].wide for tables in self.fitted)
            out[f"{prefix}.mean"], out[f"{prefix}.weight"] = t.mean, t.weight
            out[f"{prefix}.reach"] = self.reach[i]
            out[f"{prefix}.wide"] = t.wide[:, : max(wide, 1)].contiguous()
            out[f"{prefix}.narrow"] = t.narrow[:, : max(live, 1)].contiguous()
            out[f"{prefix}.scale"] = t.scale[: max(live, 1)].contiguous()
            out[f"{prefix}.exponent"] = torch.tensor([t.exponent], dtype=torch.int32)
            for p, tables in enumerate(self.fitted):
                fit = tables[rank].groups[group]
                out[f"{prefix}.point{p}.classes"] = torch.from_numpy(fit.classes)
                out[f"{prefix}.point{p}.wide"] = torch.tensor([fit.wide], dtype=torch.int32)
                out[f"{prefix}.point{p}.error"] = torch.tensor([fit.error], dtype=torch.float32)
                out[f"{prefix}.point{p}.importance"] = fit.importance
                out[f"{prefix}.point{p}.bias"] = torch.tensor([fit.bias], dtype=torch.int32)
                out[f"{prefix}.point{p}.thresholds"] = fit.thresholds
        for i, tables in enumerate(self.fitted):
            for rank, shared in enumerate(tables):
                prefix = f"rank{rank}.point{i}"
                out[f"{prefix}.frequencies"] = torch.from_numpy(shared.tables.frequencies)
                out[f"{prefix}.shift"] = torch.from_numpy(shared.tables.shift)
                out[f"{prefix}.rounding"] = torch.from_numpy(shared.rounding)
                out[f"{prefix}.centroid"] = torch.from_numpy(shared.centroid)
                out[f"{prefix}.activity"] = torch.from_numpy(shared.activity)
        return out


def _quantile(x: Tensor, share: float) -> Tensor:
    """float32 [P]: each column's quantile (torch.quantile refuses large inputs)."""
    count = max(1, round((1 - share) * len(x)))
    return x.topk(count, dim=0).values[-1]


def lanes_of(tables: list[PointTables]) -> int:
    """rANS lanes a token: as many as a mean layer group's bits allow."""
    groups = sum(len(table.groups) for table in tables)
    allowed = _LANE_SHARE * sum(table.bits for table in tables) / groups / LANE_BITS
    return max(lanes for lanes in LANES if lanes <= max(allowed, 1))


def token_importance(
    model: CacheModel, transforms: list[KvtcTransform], fisher: Fisher, progress: Progress
) -> list[ImportanceModel]:
    """A model per transform of how much a token matters, from the tokens that ``fisher_weights`` judged."""
    features: list[list[Tensor]] = [[] for _ in transforms]
    ages = []
    for i, judged in enumerate(fisher.tokens):
        k, v = model.prefill(judged.context)
        at = torch.arange(judged.first, judged.first + judged.values.shape[1], device=k.device)
        tokens = CacheSample(k[:, :, at], v[:, :, at], at)
        for features_of, t in zip(features, transforms, strict=True):
            features_of.append(t.coefficients(tokens.rows(t.part, model.rope), LEADING))
        ages.append((len(judged.context) - at).float())
        progress("token importance", (i + 1) / len(fisher.tokens))
    if not fisher.tokens:
        return [ImportanceModel.none() for _ in transforms]
    values = torch.cat([judged.values for judged in fisher.tokens], dim=1)
    age = torch.cat(ages)
    return [fit_importance(torch.cat(f), values[i], age, transforms[i].probes) for i, f in enumerate(features)]


def fit_paper(
    part: Part, mean: Tensor, covariance: Tensor, sample: Callable[[Part], Tensor], ratios: tuple[float, ...],
    max_rank: int, progress: Progress,
) -> tuple[dict[str, Tensor], list[float]]:  # fmt: skip
    """One part's tensors for profile paper, K and V apart, and the bits per token it spends at each ratio."""
    out: dict[str, Tensor] = {}
    prefix = f"rank{part.rank}.group{part.group}"
    half = part.channels // 2
    # Every kept component costs at least 2 of the 16 * half / ratio bits.
    rank = min(half, max_rank, int(8 * half / min(ratios)))
    rows = sample(part)
    errors = torch.zeros(len(ratios))
    bits = [0.0] * len(ratios)
    for i, (name, columns) in enumerate((("k", slice(0, half)), ("v", slice(half, None)))):
        progress(f"bit allocation, layer group {part.group}", i / 2)
        block = covariance[columns, columns].clone()
        unit = paper_unit(block.diagonal().clone())
        basis = quantise_basis(eigenbasis(block, rank)[0])
        fits = fit_paper_part(rows[:, columns].contiguous(), mean[columns].contiguous(), basis, unit, ratios)
        live = max(int(fit.sizes.sum()) for fit in fits)
        out[f"{prefix}.{name}.mean"] = mean[columns].contiguous()
        out[f"{prefix}.{name}.unit"] = torch.tensor([unit], dtype=torch.float32)
        out[f"{prefix}.{name}.basis"] = basis[:, :live].contiguous()
        for p, fit in enumerate(fits):
            out[f"{prefix}.point{p}.{name}.sizes"] = fit.sizes
            out[f"{prefix}.point{p}.{name}.types"] = fit.types
            errors[p] += fit.mse
            bits[p] += fit.bits
    for p in range(len(ratios)):
        out[f"{prefix}.point{p}.error"] = errors[p : p + 1].clone()
    progress(f"bit allocation, layer group {part.group}", 1.0)
    return out, bits
