"""Synthetic artifacts and K/V that the tests share, and the seed of a test's random data."""

from __future__ import annotations

import math
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from dynamo_kvtc.calibrate.narrow import quantise_narrow
from dynamo_kvtc.codec.artifact import FORMAT_VERSION, Artifact, Manifest, Point, load_artifact, save_artifact
from dynamo_kvtc.codec.channels import from_rows, split_rows
from dynamo_kvtc.codec.kvtc_point import WIDE_STEP
from dynamo_kvtc.ops import project, quantize, rans
from dynamo_kvtc.ops.rope import apply_rope
from dynamo_kvtc.types import KVShape, ModelIdentity, RopeSpec

ALPHABET = 15
CLASSES = 16
LEADING = 6
"""Components that decide a token's fineness, or all live ones if there are fewer."""
WIDE_STEPS = 2.5
"""Standard deviation, in steps, from which a component is wide."""
ROUNDING = 0.4
CENTROID = 0.1
NOISE = 2.0**-7
"""Standard deviation of what no component holds, in the scaled domain."""

POINTS = (("fine", 0.1), ("coarse", 0.25))


def case_seed() -> int:
    """A seed from the running test's name, the same in every run: a change is judged by what it changed.

    KVTC_TEST_SEED=fresh draws a new one (`make soak` does), KVTC_TEST_SEED=<number> repeats one. Printed, so that
    pytest shows it if the test fails.
    """
    asked = os.environ.get("KVTC_TEST_SEED", "")
    if asked == "fresh":
        seed = secrets.randbits(32)
    elif asked:
        seed = int(asked)
    else:
        case = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
        _ASKED[case] += 1
        seed = crc32(f"{case} {_ASKED[case]}".encode())
    print(f"seed: KVTC_TEST_SEED={seed}")
    return seed


_ASKED: Counter[str] = Counter()
"""Seeds that a test has asked for: each of its own."""


def default_rope(shape: KVShape) -> RopeSpec:
    pairs = shape.head_dim // 2
    return RopeSpec(tuple(10000.0 ** (-i / pairs) for i in range(pairs)))


def make_artifact(
    shape: KVShape,
    rope: RopeSpec | None = None,
    groups: Sequence[tuple[int, int]] | None = None,
    points: Sequence[tuple[str, float]] = POINTS,
    tp_size: int = 1,
    seed: int = 0,
    components: int = 48,
    block_tokens: int = 16,
    lanes: int = 1,
) -> tuple[Manifest, dict[str, Tensor], Artifact]:
    """A kvtc artifact of random numbers, saved and opened: its manifest, its tensors, rank 0's view.

    Components' standard deviations decay from about 8 to 0.05 in the scaled domain, so a step of 0.1 makes symbols
    of some hundreds (classes with shifts) and a step of 0.25 keeps fewer components live. Tokens are of every
    fineness and of several table choices.
    """
    generator = np.random.default_rng(seed)
    groups = tuple(groups or ((0, shape.layers),))
    heads = shape.kv_heads // tp_size
    tensors: dict[str, Tensor] = {}
    sigmas: dict[str, list[float]] = {}
    for rank in range(tp_size):
        for g, (start, end) in enumerate(groups):
            channels = 2 * (end - start) * heads * shape.head_dim
            count = min(components, channels)
            basis, _ = np.linalg.qr(generator.standard_normal((channels, count)))
            sigma = 8.0 * np.exp(-np.linspace(0.0, math.log(160.0), count)) * generator.uniform(0.8, 1.2, count)
            sigma = np.sort(sigma)[::-1]
            name = f"rank{rank}.group{g}"
            sigmas[name] = sigma.tolist()
            weight = np.exp(generator.normal(0.0, 0.5, channels))
            tensors[f"{name}.mean"] = _float(generator.normal(0.0, 0.5, channels) / weight)
            tensors[f"{name}.weight"] = _float(weight)
            columns = torch.from_numpy(np.ascontiguousarray(basis))
            deviation = _float(np.concatenate([sigma, np.full(channels - count, NOISE)]))
            entries, scale, exponent = quantise_narrow(columns.float(), deviation)
            tensors[f"{name}.reach"] = _float(6 * np.sqrt((basis**2) @ sigma**2 + NOISE**2))
            tensors[f"{name}.wide"] = project.quantise_basis(columns)
            tensors[f"{name}.narrow"], tensors[f"{name}.scale"] = entries, scale
            tensors[f"{name}.exponent"] = torch.tensor([exponent], dtype=torch.int32)
            for p, (_, step) in enumerate(points):
                live = sigma[sigma > 0.3 * step]
                wide = max(min(LEADING, len(live)), int((live / step > WIDE_STEPS).sum()))
                wide = min(len(live), -(-wide // WIDE_STEP) * WIDE_STEP)
                tensors[f"{name}.point{p}.wide"] = torch.tensor([wide], dtype=torch.int32)
                classes = _classes(live / step)
                tensors[f"{name}.point{p}.classes"] = torch.from_numpy(classes)
                lane = lane_tensors(generator, sigma / step, classes, channels * (NOISE / step) ** 2, step)
                tensors |= {f"{name}.point{p}.{key}": value for key, value in lane.items()}
        for p, (_, step) in enumerate(points):
            tensors |= {f"rank{rank}.point{p}.{key}": value for key, value in class_tensors(step).items()}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        profile="kvtc",
        model=ModelIdentity("synthetic/model", "r1", "00" * 32, "SyntheticForCausalLM"),
        shape=shape,
        rope=rope or default_rope(shape),
        tp_size=tp_size,
        block_tokens=block_tokens,
        groups=groups,
        points=tuple(Point(name, step, 10.0, lanes=lanes) for name, step in points),
        calibration={"synthetic": {"seed": seed, "sigma": sigmas}},
    )
    return saved(manifest, tensors)


def class_tensors(step: float, rounding: float = ROUNDING, centroid: float = CENTROID) -> dict[str, Tensor]:
    """What an operating point's classes need, by name: tables, shifts, roundings, centroids, activity weights."""
    frequencies, shift = laplace_tables(8.0 / step)
    return {
        "frequencies": torch.from_numpy(frequencies),
        "shift": torch.from_numpy(shift),
        "rounding": torch.full((CLASSES,), int(rounding * 2**quantize.FRACTION_BITS), dtype=torch.int32),
        "centroid": torch.full((CLASSES,), centroid),
        "activity": torch.from_numpy(_activity(8.0 / step)),
    }


def lane_tensors(
    generator: np.random.Generator, sigma: np.ndarray, classes: np.ndarray, outside: float, step: float,
    rounding: float = ROUNDING, centroid: float = CENTROID,
) -> dict[str, Tensor]:  # fmt: skip
    """Random importance weights, thresholds to go with them, and the mean error, by name, from simulated tokens.

    sigma: standard deviations of all components, in steps; classes: uint8 of the live ones, the first of them;
    outside: energy that no component holds, in squared steps; step: the common step.
    """
    live, leading = len(classes), min(LEADING, len(classes))
    spread = np.sqrt(sigma[:leading] ** 2 + 1)
    weights = generator.normal(0.0, 2.4, (2, leading)) / spread
    y = generator.laplace(0.0, sigma / math.sqrt(2.0), (500, len(sigma)))
    front = _symbols(y[:, :leading], rounding)
    score = np.abs(front) @ weights[0] + front @ weights[1]
    bias = quantize.FINENESS_NEUTRAL + 0.5 - float(np.median(score))
    fineness = np.clip(np.round(score + bias), 0, quantize.FINENESS_LEVELS - 1)
    gain = np.exp2((fineness - quantize.FINENESS_NEUTRAL) / 4)[:, None]
    scaled = np.concatenate([y[:, :leading], y[:, leading:] * gain], axis=1)
    symbols = _symbols(scaled[:, :live], rounding)
    per_class = _activity(8.0 / step)[classes[leading:]]
    middle = float(np.median(np.abs(symbols[:, leading:]) @ per_class)) if live > leading else 1.0
    levels = symbols - np.sign(symbols) * centroid
    lost = (scaled[:, :live] - levels) ** 2
    lost[:, :leading] *= gain**2
    error = lost.sum(axis=1) + ((y[:, live:] * gain) ** 2).sum(axis=1)
    return {
        "importance": torch.from_numpy(np.round(weights * 2**quantize.SCORE_BITS).astype(np.int32)),
        "bias": torch.tensor([round(bias * 2**quantize.SCORE_BITS)], dtype=torch.int32),
        "thresholds": torch.from_numpy(np.round(middle * 2.0 ** ((np.arange(1, 16) - 8.5) / 2)).astype(np.int64)),
        "error": _float(np.array([error.mean() + outside * float((gain**2).mean())])),
    }


def _symbols(y: np.ndarray, rounding: float) -> np.ndarray:
    return np.sign(y) * np.floor(np.abs(y) + rounding)


def make_paper_artifact(
    shape: KVShape, groups: Sequence[tuple[int, int]], seed: int = 0
) -> tuple[Manifest, dict[str, Tensor], Artifact]:
    """A paper artifact of random numbers with runs of every type and of sizes 1 and 16; points as ``make_artifact``."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    sigmas: dict[str, list[float]] = {}
    for g, (start, end) in enumerate(groups):
        channels = (end - start) * shape.kv_heads * shape.head_dim
        for part in ("k", "v"):
            name = f"rank0.group{g}.{part}"
            basis, _ = np.linalg.qr(generator.standard_normal((channels, channels)))
            sigma = 5.0 * np.exp(-np.linspace(0.0, 4.0, channels))
            sigmas[name] = sigma.tolist()
            tensors[f"{name}.mean"] = _float(generator.normal(0.0, 0.5, channels))
            tensors[f"{name}.unit"] = torch.tensor([2.0**-9])
            tensors[f"{name}.basis"] = project.quantise_basis(torch.from_numpy(np.ascontiguousarray(basis)))
            for p, coarse in enumerate((False, True)):
                sizes, types = [1, 1, 1], [3, 2, 1]
                while sum(sizes) < channels and not (coarse and sum(sizes) > channels // 2):
                    sizes.append(16 if sum(sizes) + 16 <= channels else 1)
                    types.append(int(generator.integers(0, 4)))
                tensors[f"rank0.group{g}.point{p}.{part}.sizes"] = torch.tensor(sizes, dtype=torch.int32)
                tensors[f"rank0.group{g}.point{p}.{part}.types"] = torch.tensor(types, dtype=torch.uint8)
        for p in range(2):
            tensors[f"rank0.group{g}.point{p}.error"] = torch.tensor([10.0])
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        profile="paper",
        model=ModelIdentity("synthetic/model", "r1", "00" * 32, "SyntheticForCausalLM"),
        shape=shape,
        rope=default_rope(shape),
        tp_size=1,
        block_tokens=16,
        groups=tuple(groups),
        points=(Point("fine", 0.0, 4.0), Point("coarse", 0.0, 8.0)),
        calibration={"synthetic": {"seed": seed, "sigma": sigmas}},
    )
    return saved(manifest, tensors)


def saved(manifest: Manifest, tensors: dict[str, Tensor]) -> tuple[Manifest, dict[str, Tensor], Artifact]:
    """The artifact written and opened again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact.safetensors"
        manifest = save_artifact(path, manifest, tensors)
        return manifest, tensors, load_artifact(path)


def class_scales(largest: float) -> np.ndarray:
    """Laplace scale of each class, in steps: geometric from 0.15 to ``largest``."""
    return np.geomspace(0.15, max(largest, 0.3), CLASSES)


def laplace_tables(largest: float) -> tuple[np.ndarray, np.ndarray]:
    """frequencies uint16 [CLASSES, 2 * ALPHABET + 2] and shift uint8 [CLASSES]: wide classes leave low bits raw."""
    rows, shifts = [], []
    for scale in class_scales(largest):
        shift = max(0, math.ceil(math.log2(max(8.0 * scale / ALPHABET, 1.0))))
        edges = (np.arange(-ALPHABET, ALPHABET + 2) * 2.0**shift) - 0.5
        below = np.where(edges < 0, 0.5 * np.exp(edges / scale), 1 - 0.5 * np.exp(-np.abs(edges) / scale))
        mass = np.diff(below)
        rows.append(counts_of(np.append(mass, max(1 - mass.sum(), 0.0))))
        shifts.append(shift)
    return np.stack(rows), np.array(shifts, dtype=np.uint8)


def _activity(largest: float) -> np.ndarray:
    """int32 [CLASSES]: about 4096 in all for every component, whatever its scale."""
    return np.round(4096 / (1 + class_scales(largest))).astype(np.int32)


def counts_of(mass: np.ndarray) -> np.ndarray:
    """uint16 counts that sum to 4096, the last (escape) at least 1, symbols of next to no mass 0."""
    counts = np.floor(mass / mass.sum() * rans.PROBABILITY_TOTAL).astype(np.int64)
    counts[-1] = max(counts[-1], 1)
    counts[int(counts.argmax())] += rans.PROBABILITY_TOTAL - counts.sum()
    return counts.astype(np.uint16)


def random_kv(artifact: Artifact, tokens: int, seed: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """K (after RoPE) and V [L, H, T, D] that follow the artifact's spectrum, in its cache dtype.

    positions: int64 [T], default 0, 1, 2, ...
    """
    generator = np.random.default_rng(seed)
    shape = artifact.shape
    positions = torch.arange(tokens) if positions is None else positions
    ks, vs = [], []
    for g, (start, end) in enumerate(artifact.manifest.groups):
        name = f"group{g}"
        if artifact.manifest.profile == "paper":
            k, v = (_paper_rows(artifact, f"{name}.{part}", tokens, generator) for part in ("k", "v"))
            k, v = (from_rows(x, end - start, shape.kv_heads, shape.head_dim) for x in (k, v))
            ks.append(apply_rope(k, positions, artifact.manifest.rope))
            vs.append(v)
            continue
        sigma = np.array(artifact.manifest.calibration["synthetic"]["sigma"][f"rank{artifact.rank}.{name}"])
        channels = 2 * (end - start) * shape.kv_heads * shape.head_dim
        basis = artifact.tensor(f"{name}.wide", torch.int16, channels, -1).numpy() * 2.0**-project.BASIS_BITS
        z = generator.laplace(0.0, sigma / math.sqrt(2.0), (tokens, len(sigma)))
        rows = z @ basis.T + generator.normal(0.0, NOISE, (tokens, channels))
        weight = artifact.tensor(f"{name}.weight", torch.float32, channels).numpy()
        rows = rows / weight + artifact.tensor(f"{name}.mean", torch.float32, channels).numpy()
        k, v = split_rows(_float(rows), end - start, shape.kv_heads, shape.head_dim)
        ks.append(apply_rope(k, positions, artifact.manifest.rope))
        vs.append(v)
    return torch.cat(ks).to(shape.torch_dtype).contiguous(), torch.cat(vs).to(shape.torch_dtype).contiguous()


def _paper_rows(artifact: Artifact, name: str, tokens: int, generator: np.random.Generator) -> Tensor:
    sigma = np.array(artifact.manifest.calibration["synthetic"]["sigma"][f"rank0.{name}"])
    basis = artifact.tensor(f"{name}.basis", torch.int16, -1, -1).numpy() * 2.0**-project.BASIS_BITS
    rows = generator.laplace(0.0, sigma / math.sqrt(2.0), (tokens, len(sigma))) @ basis.T
    return _float(rows) + artifact.tensor(f"{name}.mean", torch.float32, -1)


def gapped_positions(tokens: int, seed: int, first: int = 0) -> Tensor:
    """int64 [T], rising, with at least one gap where there are two tokens."""
    steps = np.random.default_rng(seed).integers(1, 9, tokens)
    steps[0] = 0
    if tokens > 1:
        steps[-1] += 2
    return torch.from_numpy(first + np.cumsum(steps))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dtypes and bits: NaN equals the same NaN, and -0.0 differs from 0.0."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def _classes(scaled_sigma: np.ndarray) -> np.ndarray:
    """uint8 [R]: the class whose scale is nearest to each live component's."""
    scales = class_scales(float(scaled_sigma.max(initial=1.0)))
    distance = np.abs(np.log(scaled_sigma[:, None] / math.sqrt(2.0)) - np.log(scales))
    return distance.argmin(axis=1).astype(np.uint8)


def _float(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.float32)
