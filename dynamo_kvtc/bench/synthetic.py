"""A cache and an artifact of any model's shape whose spectrum is a real one's, without the model.

Spread of SmolLM2-135M's components, standard deviations in the Fisher-weighted domain of its two layer groups of 5,760
channels (8,192 held-out tokens of WikiText-2, GSM8K and Python, calibrated on 640,000; one H200, 2026-11-22). A group
of P channels gets the same curve, stretched to P components: a larger model is taken to spread its cache over its
channels as the small one does. No larger model was at hand to measure.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_kvtc.calibrate.collect import Part, parts_of, split_layers
from dynamo_kvtc.calibrate.importance import LEADING, ImportanceModel
from dynamo_kvtc.calibrate.narrow import quantise_narrow
from dynamo_kvtc.calibrate.points import KvtcPoints, KvtcTransform
from dynamo_kvtc.codec.artifact import FORMAT_VERSION, Artifact, Manifest, seal
from dynamo_kvtc.ops.pages import PagedCache, scatter_rows
from dynamo_kvtc.ops.project import BASIS_BITS, quantise_basis
from dynamo_kvtc.ops.quantize import FINENESS_NEUTRAL
from dynamo_kvtc.ops.rope import rotations_of
from dynamo_kvtc.types import KVShape, ModelIdentity, RopeSpec

MEASURED_CHANNELS = 5760
_AT = (
    0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560,
    3072, 3584, 4096, 4608, 5120, 5440, 5759,
)  # fmt: skip
_DEVIATION = (
    (21.7747, 16.8064, 14.0681, 13.4534, 13.2552, 11.3313, 9.6679, 8.2432, 7.48, 6.1626, 5.1511, 4.054, 3.4402, 2.7862,
     2.3461, 1.8155, 1.5183, 1.099, 0.8461, 0.5644, 0.4018, 0.3078, 0.2431, 0.1916, 0.1556, 0.1064, 0.0742, 0.0522,
     0.0369, 0.0243, 0.0141, 0.0108, 0.0064),
    (47.28, 38.1263, 35.7192, 28.9337, 26.7636, 23.5722, 19.2495, 16.2769, 14.0839, 10.6694, 7.8877, 5.1984, 3.8588,
     2.8436, 2.197, 1.5673, 1.2009, 0.8358, 0.6427, 0.4518, 0.3401, 0.2603, 0.2042, 0.1662, 0.1372, 0.0968, 0.069,
     0.0468, 0.0315, 0.0216, 0.014, 0.0105, 0.0105),
)  # fmt: skip

_OUTLIERS = 0.4
"""Share of the channels that the largest components live in: such channels need two bytes an input. Of SmolLM2's, about
half do at 20x and a quarter at 30x."""
_OUTLIER_COMPONENTS = 64 / MEASURED_CHANNELS
_SPREAD = 0.15
"""Standard deviation of the logarithm of a token's activity."""
_FINENESS_SPREAD = 1.5
_CHUNK = 4096


def spectrum(channels: int, group: int) -> Tensor:
    """float32 [P], falling: the measured curve of the first or (for later groups) second group, stretched to P."""
    at = torch.tensor(_AT, dtype=torch.float64) * (channels / MEASURED_CHANNELS)
    log = torch.tensor(_DEVIATION[min(group, 1)], dtype=torch.float64).log()
    where = torch.arange(channels, dtype=torch.float64)
    i = torch.searchsorted(at, where, right=True).clamp(1, len(at) - 1)
    share = ((where - at[i - 1]) / (at[i] - at[i - 1])).clamp(0, 1)
    return (log[i - 1] + share * (log[i] - log[i - 1])).exp().float()


class Synthetic:
    """Random orthonormal components with that spectrum: their artifact, and caches that follow it."""

    def __init__(
        self, shape: KVShape, ratios: tuple[float, ...], groups: int, max_rank: int, block_tokens: int,
        device: torch.device, lanes: int | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.device = shape, device
        self.rope = RopeSpec(tuple(5e5 ** (-2 * i / shape.head_dim) for i in range(shape.head_dim // 2)))
        self._generator = torch.Generator(device).manual_seed(0)
        bounds = split_layers(shape.layers, groups)
        self._parts = parts_of(shape, bounds, 1)
        self._transforms = [self._transform(part, min(max_rank, part.channels)) for part in self._parts]
        self._deviations = [spectrum(part.channels, part.group).to(device) for part in self._parts]
        sample = [self._components(i, _CHUNK) for i in range(len(self._parts))]
        reach, outside, peak, norm = [], [], 0.0, 0.0
        for transform, y in zip(self._transforms, sample, strict=True):
            scaled = self._scaled(transform, y)
            outside.append((scaled.square().sum(dim=1) - y.square().sum(dim=1)).clamp(min=0))
            reach.append(scaled.abs().topk(3, dim=0).values[-1])
            peak = max(peak, float(scaled.abs().amax(dim=1).quantile(0.999)))
            norm = max(norm, float(scaled.norm(dim=1).quantile(0.999)))
        points = KvtcPoints(
            self._transforms, [self._importance(i) for i in range(len(self._parts))], sample, outside, peak, norm,
            reach,
            8 * shape.bytes_per_token, block_tokens, lanes,
        )  # fmt: skip
        for ratio in ratios:
            points.add(f"{ratio:g}", points.solve(ratio))
        identity = ModelIdentity("synthetic", "", "0" * 64, "Synthetic")
        manifest = Manifest(
            FORMAT_VERSION, "kvtc", identity, shape, self.rope, 1, block_tokens, bounds, tuple(points.points),
            {"synthetic": "spectrum of SmolLM2-135M-Instruct, stretched"},
        )  # fmt: skip
        self.artifact = Artifact(*seal(manifest, points.tensors()))

    def cache(self, tokens: int, page_tokens: int = 16) -> tuple[PagedCache, Tensor]:
        """An empty cache with room for these tokens, pages in random order, and their slots int64 [T] on the CPU."""
        s, pages = self.shape, -(-tokens // page_tokens)
        views = [
            torch.zeros(pages, page_tokens, s.kv_heads, 2 * s.head_dim, dtype=s.torch_dtype, device=self.device)
            for _ in range(s.layers)
        ]
        k, v = ([x[..., part].transpose(1, 2) for x in views] for part in (slice(s.head_dim), slice(s.head_dim, None)))
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(1))
        return PagedCache.of(k, v), (order[:, None] * page_tokens + torch.arange(page_tokens)).flatten()[:tokens]

    def fill(self, cache: PagedCache, slots: Tensor, positions: Tensor) -> None:
        """Tokens that follow the spectrum, K after RoPE."""
        rotations = rotations_of(self.rope, self.device)
        for start in range(0, len(slots), _CHUNK):
            own = slice(start, start + _CHUNK)
            there = slots[own].to(self.device)
            cos, sin = rotations.at(positions[own].to(self.device))
            keep = torch.ones(len(there), dtype=torch.uint8, device=self.device)
            for i, (part, transform) in enumerate(zip(self._parts, self._transforms, strict=True)):
                rows = self._scaled(transform, self._components(i, len(there))) / transform.weight + transform.mean
                layers = (part.layers.start, part.layers.stop)
                scatter_rows(cache, layers, there, rows.contiguous(), cos, sin, self.rope, keep)

    def _transform(self, part: Part, rank: int) -> KvtcTransform:
        channels = part.channels
        basis = torch.randn(channels, rank, generator=self._generator, device=self.device)
        outliers = max(2, int(channels * _OUTLIERS))
        sparse = max(1, min(int(channels * _OUTLIER_COMPONENTS), outliers // 2, rank))
        order = torch.randperm(channels, generator=self._generator, device=self.device)
        basis[order[outliers:], :sparse] = 0
        basis = torch.linalg.qr(basis).Q.contiguous()
        weight = (0.5 * torch.randn(channels, generator=self._generator, device=self.device)).exp()
        mean = torch.randn(channels, generator=self._generator, device=self.device) / weight
        deviation = spectrum(channels, part.group).to(self.device)
        return KvtcTransform(part, mean, weight, quantise_basis(basis), *quantise_narrow(basis, deviation))

    def _importance(self, i: int) -> ImportanceModel:
        """Weights that spread fineness by about as much as real ones do."""
        count = min(LEADING, self._transforms[i].wide.shape[1])
        spread = self._deviations[i][:count].double().cpu()
        weights = torch.randn(2, count, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        weights *= _FINENESS_SPREAD / (2 * count) ** 0.5 / spread
        bias = FINENESS_NEUTRAL - float((weights[0] * spread * (2 / torch.pi) ** 0.5).sum())
        return ImportanceModel(weights, bias)

    def _components(self, i: int, tokens: int) -> Tensor:
        """float32 [T, R]."""
        rank = self._transforms[i].wide.shape[1]
        z = torch.randn(tokens, rank, generator=self._generator, device=self.device)
        activity = (_SPREAD * torch.randn(tokens, 1, generator=self._generator, device=self.device)).exp()
        return z * activity * self._deviations[i][:rank]

    def _scaled(self, transform: KvtcTransform, y: Tensor) -> Tensor:
        """Channels [T, P] in the weighted domain; what no kept component holds is spread over all of them."""
        part = transform.part
        rows = (y.to(torch.bfloat16) @ transform.wide.T.to(torch.bfloat16)).float() * 2.0**-BASIS_BITS
        rest = self._deviations[self._parts.index(part)][y.shape[1] :].square().sum().div(part.channels).sqrt()
        rows += rest * torch.randn(rows.shape, generator=self._generator, device=self.device)
        return rows


def rows_of(cache: PagedCache, slots: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [L, H, T, D] on the CPU of tokens at slots int64 [T]."""
    page, offset = slots // cache.tokens_per_block, slots % cache.tokens_per_block
    at = (page.to(cache.device), slice(None), offset.to(cache.device))
    k, v = (torch.stack([x[at].transpose(0, 1).cpu() for x in views]) for views in (cache.k, cache.v))
    return k.contiguous(), v.contiguous()
