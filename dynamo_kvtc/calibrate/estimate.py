"""What a calibration will take: seconds per phase and the peak of memory, told before it starts.

Operations and bytes are counted from the shapes; the speed is a short GEMM on the very device. Nothing here is exact:
times are within a factor of two where they were compared, memory is meant to err on the high side.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dynamo_kvtc.calibrate.collect import Part, parts_of, split_layers
from dynamo_kvtc.calibrate.run import CalibrationConfig
from dynamo_kvtc.errors import CalibrationError
from dynamo_kvtc.ops import affine
from dynamo_kvtc.types import KVShape

PROBE_SECONDS = 0.5

# Operations per P**3 of a symmetric eigen-decomposition with vectors, at GEMM speed: most of it is not GEMM. The CPU's
# is measured (LAPACK, P 1,920 to 5,760), the GPU's a guess (cuSOLVER).
_EIGEN_OPS = {"cpu": 12.0, "cuda": 120.0}
_NARROW_OPS = {"cpu": 16_000.0, "cuda": 500.0}
_NARROW_ROW_OPS = {"cpu": 0.0, "cuda": 5e9}
"""Rounding to 8 bits goes row by row: operations, at GEMM speed, per entry of the basis (bound by memory; measured on a
CPU, P 960 and 1,920) and per row (bound by launches, 0.1 ms; a guess)."""

_MODEL_EFFICIENCY = 0.45
"""Share of the GEMM speed that a transformer's forward pass reaches on a small model."""

_TABLE_OPS = 40_000.0
"""Operations, at GEMM speed, that one fit of the tables takes per coefficient: elementwise work, bound by memory."""

_SEARCH_FITS, _SEARCH_TOKENS = 12, 1024
"""Fits until a step is found, and the tokens they look at."""

_ALLOCATION_OPS = 160.0
_ALLOCATION_VALUES = 3 * 512 * sum(affine.SIZES)
"""Profile paper quantises this many values for every component, per K and V, in each of 3 types and all run sizes, on
512 tokens; operations for each, at GEMM speed."""

_CODE_OPS = 40.0
"""Operations per multiply-add of the transform when a cache is encoded and decoded: exact arithmetic, entropy coder."""


@dataclass(frozen=True)
class Job:
    """What decides the cost. parameters: of the model; vocabulary: words; length: tokens of a sequence;
    fit_tokens, held_out_tokens: in all; kl_sequences: for the expected KL."""

    shape: KVShape
    config: CalibrationConfig
    parameters: int
    vocabulary: int
    length: int
    fit_tokens: int
    held_out_tokens: int
    kl_sequences: int

    @property
    def parts(self) -> list[Part]:
        return parts_of(self.shape, split_layers(self.shape.layers, self.config.groups), self.config.tp_size)

    def rank(self, part: Part) -> int:
        return min(part.channels, self.config.max_rank)


@dataclass(frozen=True)
class Speed:
    """Multiply-adds count as two operations. linear: float32 GEMM; model: GEMM in the arithmetic's dtype."""

    linear_ops_per_second: float
    model_ops_per_second: float


@dataclass(frozen=True)
class Estimate:
    """seconds: by phase; peak_bytes: beyond what the loaded model holds already."""

    seconds: dict[str, float]
    peak_bytes: int

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def probe(device: torch.device, dtype: torch.dtype) -> Speed:
    """Measures this device for about half a second."""
    linear = _gemm_speed(device, torch.float32, PROBE_SECONDS / 2)
    return Speed(linear, linear if dtype == torch.float32 else _gemm_speed(device, dtype, PROBE_SECONDS / 2))


def _gemm_speed(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    size = 1024 if device.type == "cpu" else 4096
    a = torch.ones(size, size, dtype=dtype, device=device)

    def run(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    run(1)
    once = run(1)
    times = max(1, int(seconds / max(once, 1e-6)))
    return 2.0 * size**3 * times / max(run(times), 1e-9)


def estimate(job: Job, speed: Speed, device_type: str) -> Estimate:
    """Time and memory of ``run.calibrate`` for this job."""
    config, parts = job.config, job.parts
    forward = 2.0 * job.parameters / (speed.model_ops_per_second * _MODEL_EFFICIENCY)
    linear = speed.linear_ops_per_second
    points = len(config.ratios) + len(config.kls)
    ranks = sum(job.rank(part) for part in parts)
    transform = sum(part.channels * job.rank(part) for part in parts)
    sample = min(config.sample_tokens, job.held_out_tokens)
    paper = config.profile == "paper"

    seconds = {}
    if not paper:
        sequences = min(config.fisher_sequences, -(-job.fit_tokens // job.length))
        continuation = job.length // 4
        # The context once for the gradient and, for three quarters of the sequences, once for the tokens' importance;
        # the continuation forwards and backwards.
        seconds["Fisher weights"] = forward * sequences * (1.75 * (job.length - continuation) + 3 * continuation)
    seconds["covariance"] = job.fit_tokens * (forward + 2.0 * sum(p.channels**2 for p in parts) / linear)
    eigen = sum(2 * (p.channels / 2) ** 3 if paper else p.channels**3 for p in parts)
    seconds["PCA"] = _EIGEN_OPS[device_type] * eigen / linear
    if not paper:
        rows = sum(part.channels for part in parts)
        seconds["PCA"] += (_NARROW_OPS[device_type] * transform + _NARROW_ROW_OPS[device_type] * rows) / linear
    seconds["coefficients"] = job.held_out_tokens * forward + 2.0 * sample * transform / linear
    if not paper:
        fitted_tokens = _SEARCH_FITS * min(_SEARCH_TOKENS, sample) + sample
        seconds["step sizes and tables"] = _TABLE_OPS * points * fitted_tokens * ranks / linear
    else:
        kept = sum(min(part.channels / 2, 8 * part.channels / 2 / min(config.ratios)) for part in parts)
        seconds["bit allocation"] = 2 * kept * _ALLOCATION_VALUES * _ALLOCATION_OPS / linear
    if job.kl_sequences:
        # A target KL is solved with about four measurements.
        measured = len(config.ratios) + 5 * len(config.kls)
        tokens = job.kl_sequences * job.length
        seconds["expected KL"] = measured * tokens * (1.25 * forward + _CODE_OPS * transform / linear)
    return Estimate(seconds, _peak_bytes(job, parts, ranks, sample))


def _peak_bytes(job: Job, parts: list[Part], ranks: int, sample: int) -> int:
    widest = max(part.channels for part in parts)
    covariances = 4 * sum(part.channels**2 for part in parts)
    # Wide and narrow entries, or profile paper's wide ones alone.
    bases = (2 if job.config.profile == "paper" else 3) * sum(part.channels * job.rank(part) for part in parts)
    as_float = 4 * max(part.channels * job.rank(part) for part in parts)
    cache = job.length * job.shape.bytes_per_token
    logits = 4 * job.vocabulary * (job.length // 4)
    phases = [
        # Fisher: the caches, their gradients in float32, activations of the continuation, a few copies of the logits.
        8 * cache + 6 * logits,
        # Covariance: all accumulators, a sequence's rows twice in float32.
        covariances + 3 * cache + 8 * job.length * widest,
        # PCA: the accumulators left, the solver's copy, vectors and workspace, the bases so far.
        covariances + 4 * 4 * widest**2 + bases,
        # Tables: a basis in float32, the sample's cache and rows, its coefficients in float32, and scratch of the same
        # size three times.
        bases + as_float + sample * job.shape.bytes_per_token * 3 + 4 * 4 * sample * ranks,
        # Expected KL: the bases in the codec, a cache thrice, two sets of log-probabilities.
        3 * bases + 4 * cache + 3 * logits if job.kl_sequences else 0,
    ]
    return max(phases)


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process can still take on the device, None if the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [value for value in (_available_bytes(), _cgroup_bytes()) if value is not None]
    return min(found) if found else None


def check_memory(job: Job, estimated: Estimate, free: int | None, device_type: str) -> None:
    """Raises CalibrationError naming both numbers and the remedy if the job cannot fit."""
    if free is None or estimated.peak_bytes <= free:
        return
    remedies = []
    for groups in range(job.config.groups + 1, job.shape.layers + 1):
        other = replace(job, config=replace(job.config, groups=groups))
        ranks = sum(other.rank(part) for part in other.parts)
        needed = _peak_bytes(other, other.parts, ranks, min(job.config.sample_tokens, job.held_out_tokens))
        if needed <= free:
            remedies.append(f"--groups {groups} needs {gib(needed)}")
            break
    remedies.append("a shorter --context" if job.length > 512 else "more memory")
    remedies.append("a GPU with more memory" if device_type == "cuda" else "a machine with more memory or a GPU")
    raise CalibrationError(
        f"calibrating {job.config.groups} layer groups of {max(p.channels for p in job.parts)} channels needs about "
        f"{gib(estimated.peak_bytes)} of {'GPU' if device_type == 'cuda' else 'main'} memory; {gib(free)} is free. "
        f"Ways out: {'; '.join(remedies)}"
    )


def gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves: MemAvailable is the host's."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = (root / limit_name).read_text().strip(), (root / used_name).read_text().strip()
        except OSError:
            continue
        # "max", or a number near 2**63 in the older hierarchy, is no limit.
        if limit.isdigit() and int(limit) < 2**60:
            return max(int(limit) - int(used), 0)
    return None
