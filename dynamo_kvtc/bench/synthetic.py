"""A cache and an artifact of any model's shape whose spectrum is a real one's, without the model.

Spread of SmolLM2-135M's components, standard deviations in the Fisher-weighted domain of its layer groups, two of 5,760
channels or four of 2,688 or 3,072 (8,192 held-out tokens of WikiText-2, GSM8K and Python, calibrated on 560,000; one
H200, 2026-11-22). A group of P channels gets the curve of a group as deep in the model, stretched to P components: a
larger model is taken to spread its cache over its channels as the small one does. No larger model was at hand to
measure.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_kvtc.calibrate.collect import parts_of, split_layers
from dynamo_kvtc.calibrate.importance import LEADING, ImportanceModel, component_order
from dynamo_kvtc.calibrate.narrow import quantise_narrow
from dynamo_kvtc.calibrate.points import KvtcPoints, KvtcTransform, fit_paper
from dynamo_kvtc.codec.artifact import FORMAT_VERSION, Artifact, Manifest, Point, seal
from dynamo_kvtc.ops.pages import PagedCache, scatter_rows
from dynamo_kvtc.ops.project import BASIS_BITS, quantise_basis
from dynamo_kvtc.ops.quantize import FINENESS_NEUTRAL
from dynamo_kvtc.ops.rope import rotations_of
from dynamo_kvtc.types import KVShape, ModelIdentity, RopeSpec

MEASURED_CHANNELS = 5760
"""Of a group of two; ``_AT`` counts its components, and the same shares of a smaller group's."""
_AT = (
    0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560,
    3072, 3584, 4096, 4608, 5120, 5440, 5759,
)  # fmt: skip
_OF_TWO_GROUPS = (
    (21.7753, 16.8065, 14.0682, 13.4539, 13.2553, 11.331, 9.6676, 8.2434, 7.4801, 6.1627, 5.1512, 4.0539, 3.4402,
     2.7861, 2.3462, 1.8155, 1.5184, 1.0991, 0.8461, 0.5644, 0.4018, 0.3078, 0.2433, 0.1915, 0.1556, 0.1089, 0.0758,
     0.0524, 0.0358, 0.0243, 0.0143, 0.0092, 0.0065),
    (47.2812, 38.1266, 35.7196, 28.9332, 26.7637, 23.5715, 19.2491, 16.2763, 14.0841, 10.6697, 7.8877, 5.1984,
     3.8588, 2.8437, 2.1969, 1.5673, 1.2008, 0.8358, 0.6427, 0.4525, 0.34, 0.2586, 0.2042, 0.167, 0.1358, 0.0963,
     0.0682, 0.0487, 0.0375, 0.0227, 0.0201, 0.0127, 0.0062),
)  # fmt: skip
_OF_FOUR_GROUPS = (
    (16.7324, 16.7324, 12.3159, 12.3159, 12.0961, 11.1768, 10.2822, 8.55, 7.251, 6.6174, 6.0612, 4.9939, 4.131,
     3.2986, 2.8256, 2.2285, 1.9567, 1.4603, 1.179, 0.8189, 0.5952, 0.4347, 0.3233, 0.2521, 0.1976, 0.1284, 0.0864,
     0.0585, 0.0389, 0.024, 0.0153, 0.0073, 0.0048),
    (15.0749, 15.0749, 15.0749, 11.6243, 11.6243, 11.1043, 9.3637, 7.4699, 6.4168, 5.1612, 4.6157, 3.7401, 3.1996,
     2.5262, 2.0946, 1.6259, 1.3705, 1.024, 0.7951, 0.5454, 0.4047, 0.3072, 0.2463, 0.202, 0.165, 0.1159, 0.0835,
     0.0587, 0.0424, 0.0285, 0.0177, 0.0122, 0.0049),
    (44.4535, 44.4535, 44.4535, 36.1416, 36.1416, 28.029, 27.28, 22.7509, 18.4309, 15.724, 14.2559, 9.9959, 6.7912,
     4.2215, 3.025, 2.0567, 1.6139, 1.0609, 0.7916, 0.5202, 0.3895, 0.3017, 0.2392, 0.1954, 0.1599, 0.1133, 0.0796,
     0.0557, 0.039, 0.0254, 0.0149, 0.0102, 0.0102),
    (31.0325, 31.0325, 18.9305, 18.9305, 16.7487, 12.961, 10.8437, 9.2313, 8.1513, 6.1953, 5.2106, 3.7913, 3.0366,
     2.2989, 1.9297, 1.4528, 1.2381, 0.9048, 0.7103, 0.5251, 0.4048, 0.3104, 0.2383, 0.1865, 0.1497, 0.1043, 0.072,
     0.0523, 0.0362, 0.0236, 0.0156, 0.0128, 0.0043),
)  # fmt: skip

_CHANNEL_SPREAD = 1.2
"""Standard deviation of the logarithm of how far channels reach, in the components that hold nearly all of the energy.
It sets how many channels need two bytes an input: of SmolLM2's in four groups, 51, 39, 30 and 47% at 20x and 37.5% of
the components, 33, 16, 18 and 19% at 30x and 25%, 9, 3, 5 and 3% at 60x; here (1,024 channels) about 41, 29, 58 and 38,
24, 15, 42 and 23, 7, 4, 18 and 8%."""
_LARGE_COMPONENTS = 512 / MEASURED_CHANNELS
_SPREAD = 0.15
"""Standard deviation of the logarithm of a token's activity."""
_FINENESS_SPREAD = 1.5
_CHUNK = 4096


def spectrum(channels: int, group: int, groups: int) -> Tensor:
    """float32 [P], falling: the curve measured for layer group ``group`` of ``groups``, stretched to P components."""
    curves = _OF_TWO_GROUPS if groups <= 2 else _OF_FOUR_GROUPS
    curve = curves[round(group * (len(curves) - 1) / max(groups - 1, 1))]
    at = torch.tensor(_AT, dtype=torch.float64) * (channels / MEASURED_CHANNELS)
    log = torch.tensor(curve, dtype=torch.float64).log()
    where = torch.arange(channels, dtype=torch.float64)
    i = torch.searchsorted(at, where, right=True).clamp(1, len(at) - 1)
    share = ((where - at[i - 1]) / (at[i] - at[i - 1])).clamp(0, 1)
    return (log[i - 1] + share * (log[i] - log[i - 1])).exp().float()


class Synthetic:
    """Random orthonormal components with that spectrum: their artifact, and caches that follow it."""

    def __init__(
        self, shape: KVShape, ratios: tuple[float, ...], groups: int, max_rank: int, block_tokens: int,
        device: torch.device, lanes: int | None = None, profile: str = "kvtc",
    ) -> None:  # fmt: skip
        """lanes: of profile kvtc. Raises CalibrationError for a ratio that cannot be reached."""
        self.shape, self.device = shape, device
        self.rope = RopeSpec(tuple(5e5 ** (-2 * i / shape.head_dim) for i in range(shape.head_dim // 2)))
        self._generator = torch.Generator(device).manual_seed(0)
        bounds = split_layers(shape.layers, groups)
        self._parts = parts_of(shape, bounds, 1)
        self._deviations = [spectrum(part.channels, part.group, groups).to(device) for part in self._parts]
        self._transforms = [self._transform(i, min(max_rank, part.channels)) for i, part in enumerate(self._parts)]
        if profile == "paper":
            points, tensors = self._paper(ratios, max_rank)
        else:
            points, tensors = self._kvtc(ratios, block_tokens, lanes)
        identity = ModelIdentity("synthetic", "", "0" * 64, "Synthetic")
        manifest = Manifest(
            FORMAT_VERSION, profile, identity, shape, self.rope, 1, block_tokens, bounds, tuple(points),
            {"synthetic": "spectrum of SmolLM2-135M-Instruct, stretched"},
        )  # fmt: skip
        self.artifact = Artifact(*seal(manifest, tensors))

    def _kvtc(
        self, ratios: tuple[float, ...], block_tokens: int, lanes: int | None
    ) -> tuple[list[Point], dict[str, Tensor]]:
        sample = [self._components(i, _CHUNK) for i in range(len(self._parts))]
        reach, outside, peak, norm = [], [], 0.0, 0.0
        for transform, y in zip(self._transforms, sample, strict=True):
            scaled = self._scaled(transform, y)
            outside.append((scaled.square().sum(dim=1) - y.square().sum(dim=1)).clamp(min=0))
            reach.append(scaled.abs().topk(3, dim=0).values[-1])
            peak = max(peak, float(scaled.abs().amax(dim=1).quantile(0.999)))
            norm = max(norm, float(scaled.norm(dim=1).quantile(0.999)))
        importance = [self._importance(i) for i in range(len(self._parts))]
        points = KvtcPoints(
            self._transforms, importance, sample, outside, peak, norm, reach, 8 * self.shape.bytes_per_token,
            block_tokens, lanes,
        )  # fmt: skip
        for ratio in ratios:
            points.add(f"{ratio:g}", points.solve(ratio))
        return points.points, points.tensors()

    def _paper(self, ratios: tuple[float, ...], max_rank: int) -> tuple[list[Point], dict[str, Tensor]]:
        """Of the same cache: its covariance is known, no token need be drawn for it."""
        tensors: dict[str, Tensor] = {}
        bits = [0.0] * len(ratios)
        for i, (part, transform) in enumerate(zip(self._parts, self._transforms, strict=True)):
            rank = transform.wide.shape[1]
            spread = transform.wide.float() * (2.0**-BASIS_BITS * self._deviations[i][:rank])
            covariance = spread @ spread.T
            covariance.diagonal().add_(self._rest(i, rank) ** 2)
            covariance.div_(transform.weight[:, None]).div_(transform.weight)
            fitted, spent = fit_paper(
                part, transform.mean, covariance, lambda p: self._rows(self._parts.index(p), _CHUNK), ratios, max_rank,
                lambda *_: None,
            )  # fmt: skip
            tensors.update(fitted)
            bits = [a + b for a, b in zip(bits, spent, strict=True)]
        raw_bits = 8 * self.shape.bytes_per_token
        return [Point(f"{r:g}", 0.0, raw_bits / b) for r, b in zip(ratios, bits, strict=True)], tensors

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
            for i, part in enumerate(self._parts):
                layers = (part.layers.start, part.layers.stop)
                scatter_rows(cache, layers, there, self._rows(i, len(there)), cos, sin, self.rope, keep)

    def _transform(self, i: int, rank: int) -> KvtcTransform:
        part, channels = self._parts[i], self._parts[i].channels
        basis = torch.randn(channels, rank, generator=self._generator, device=self.device)
        reach = (_CHANNEL_SPREAD * torch.randn(channels, 1, generator=self._generator, device=self.device)).exp()
        basis[:, : max(1, int(channels * _LARGE_COMPONENTS))] *= reach
        basis = torch.linalg.qr(basis).Q.contiguous()
        weight = (0.5 * torch.randn(channels, generator=self._generator, device=self.device)).exp()
        mean = torch.randn(channels, generator=self._generator, device=self.device) / weight
        order, probes = component_order(rank)
        basis = basis[:, order.to(self.device)].contiguous()
        self._deviations[i][:rank] = self._deviations[i][order.to(self.device)]
        narrow = quantise_narrow(basis, self._deviations[i])
        return KvtcTransform(part, mean, weight, quantise_basis(basis), *narrow, probes)

    def _importance(self, i: int) -> ImportanceModel:
        """Weights that spread fineness by about as much as real ones do."""
        count = min(LEADING, self._transforms[i].wide.shape[1])
        spread = self._deviations[i][:count].double().cpu()
        weights = torch.randn(2, count, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        weights *= _FINENESS_SPREAD / (2 * count) ** 0.5 / spread
        bias = FINENESS_NEUTRAL - float((weights[0] * spread * (2 / torch.pi) ** 0.5).sum())
        return ImportanceModel(weights, bias, self._transforms[i].probes)

    def _components(self, i: int, tokens: int) -> Tensor:
        """float32 [T, R]."""
        rank = self._transforms[i].wide.shape[1]
        z = torch.randn(tokens, rank, generator=self._generator, device=self.device)
        activity = (_SPREAD * torch.randn(tokens, 1, generator=self._generator, device=self.device)).exp()
        return z * activity * self._deviations[i][:rank]

    def _scaled(self, transform: KvtcTransform, y: Tensor) -> Tensor:
        """Channels [T, P] in the weighted domain; what no kept component holds is spread over all of them."""
        rows = (y.to(torch.bfloat16) @ transform.wide.T.to(torch.bfloat16)).float() * 2.0**-BASIS_BITS
        rest = self._rest(self._parts.index(transform.part), y.shape[1])
        rows += rest * torch.randn(rows.shape, generator=self._generator, device=self.device)
        return rows

    def _rest(self, i: int, rank: int) -> Tensor:
        """Standard deviation of a channel, in the weighted domain, by what components from ``rank`` on hold."""
        return self._deviations[i][rank:].square().sum().div(self._parts[i].channels).sqrt()

    def _rows(self, i: int, tokens: int) -> Tensor:
        """Channels [T, P] of part i without RoPE."""
        transform = self._transforms[i]
        return (self._scaled(transform, self._components(i, tokens)) / transform.weight + transform.mean).contiguous()


def rows_of(cache: PagedCache, slots: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [L, H, T, D] on the CPU of tokens at slots int64 [T]."""
    page, offset = slots // cache.tokens_per_block, slots % cache.tokens_per_block
    at = (page.to(cache.device), slice(None), offset.to(cache.device))
    k, v = (torch.stack([x[at].transpose(0, 1).cpu() for x in views]) for views in (cache.k, cache.v))
    return k.contiguous(), v.contiguous()
