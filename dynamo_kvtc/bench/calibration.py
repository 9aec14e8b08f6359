"""How long calibrating a model of a given shape takes, without the model: its cache and gradients are synthetic.

The cache's channels are mixed from independent factors whose spread falls as a power law, as a real cache's spectrum
does; the model's own forward passes are not part of the figure. The result is proven before it is reported: every
operating point must reach its ratio on records of unseen synthetic text.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynamo_kvtc.calibrate.run import CalibrationConfig, CalibrationTexts, calibrate
from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.errors import CalibrationError
from dynamo_kvtc.ops.rope import apply_rope
from dynamo_kvtc.types import KVShape, ModelIdentity, RopeSpec

FACTORS = 16384
DECAY = 0.7
_NOISE = 0.01
_TOLERANCE = 0.1


@dataclass
class SyntheticModel:
    """Stands in for ``hf.model.Model`` in ``calibrate``: token ids only seed the generator."""

    shape: KVShape
    target: torch.device
    rope: RopeSpec = field(init=False)
    identity: ModelIdentity = field(init=False)
    _mix: Tensor = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        self.rope = RopeSpec(tuple(1e6 ** (-2 * i / s.head_dim) for i in range(s.head_dim // 2)))
        self.identity = ModelIdentity("synthetic", "", "0" * 64, "Synthetic")
        generator = torch.Generator(self.target).manual_seed(0)
        channels = 2 * s.layers * s.kv_heads * s.head_dim
        factors = min(FACTORS, channels)
        mix = torch.randn(factors, channels, generator=generator, device=self.target)
        spread = torch.arange(1, factors + 1, device=self.target, dtype=torch.float32) ** -DECAY
        self._mix = (mix * spread[:, None]).to(torch.bfloat16)

    @property
    def device(self) -> torch.device:
        return self.target

    def prefill(self, ids: Tensor, chunk_tokens: int = 2048) -> tuple[Tensor, Tensor]:
        """K and V [L, H, T, D] that follow the mixture, K after RoPE."""
        s = self.shape
        generator = torch.Generator(self.target).manual_seed(int(ids[0]))
        z = torch.randn(len(ids), self._mix.shape[0], generator=generator, device=self.target)
        rows = (z.to(torch.bfloat16) @ self._mix).float()
        rows += _NOISE * torch.randn(rows.shape, generator=generator, device=self.target)
        k, v = rows.reshape(len(ids), 2, s.layers, s.kv_heads, s.head_dim).permute(1, 2, 3, 0, 4)
        positions = torch.arange(len(ids), device=self.target)
        return apply_rope(k.contiguous(), positions, self.rope).to(s.torch_dtype), v.to(s.torch_dtype)

    def fisher_gradients(
        self, context: Tensor, continuation: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Gradients whose scale differs by channel and token; float32 [L, H, Tc, D]."""
        s = self.shape
        device_generator = torch.Generator(self.target).manual_seed(int(context[0]) + 1)
        scale = torch.rand(len(context), 1, generator=device_generator, device=self.target) + 0.1
        shape = (s.layers, s.kv_heads, len(context), s.head_dim)
        gk, gv = (torch.randn(shape, generator=device_generator, device=self.target) * scale for _ in range(2))
        return gk, gv


def time_calibration(
    shape: KVShape, tokens: int, ratios: tuple[float, ...], groups: int, device: str, context: int = 2048
) -> dict[str, object]:
    """Seconds by phase, peak memory in bytes, and the ratio each point reached on records. Raises CalibrationError."""
    target = torch.device(device)
    model = SyntheticModel(shape, target)
    count = -(-tokens // context)
    # Ids are seeds: a sequence's first id makes it another text.
    sequences = [torch.full((context,), i, dtype=torch.int64) for i in range(count + 9)]
    texts = CalibrationTexts(sequences[:count], sequences[count : count + 8], {"synthetic": tokens})
    config = CalibrationConfig(groups=groups, ratios=ratios)
    phases: dict[str, float] = {}
    clock = [time.perf_counter()]

    def progress(phase: str, share: float) -> None:
        if target.type == "cuda":
            torch.cuda.synchronize(target)
        now = time.perf_counter()
        # The time before a phase first reports belongs to it: phases report as they go, not as they begin.
        phases[phase] = phases.get(phase, 0.0) + now - clock[0]
        clock[0] = now

    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target)
    started = time.perf_counter()
    manifest, tensors = calibrate(model, texts, config, progress)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(target) if target.type == "cuda" else None

    artifact = Artifact(manifest, tensors)
    k, v = model.prefill(sequences[-1][:256])
    positions = torch.arange(256)
    reached = {}
    for point in manifest.points:
        blocks = BlockCodec(artifact, point.name, ExactPolicy(), target).encode_blocks(k, v, positions)
        exact = sum(block.exact.total for block in blocks) * shape.bytes_per_token
        coded_bytes = sum(len(block.record) for block in blocks) - exact
        ratio = (256 * shape.bytes_per_token - exact) / coded_bytes
        if abs(ratio / float(point.name) - 1) > _TOLERANCE:
            raise CalibrationError(f"operating point {point.name} reached a ratio of {ratio:.2f} on unseen text")
        reached[point.name] = round(ratio, 3)
    return {
        "seconds": round(seconds, 2),
        "phases": {name: round(value, 2) for name, value in phases.items()},
        "peak_bytes": peak,
        "ratios": reached,
        "tokens": count * context,
        "groups": groups,
        "device": torch.cuda.get_device_name(target) if target.type == "cuda" else "cpu",
        "artifact_bytes": sum(t.nbytes for t in tensors.values()),
    }
