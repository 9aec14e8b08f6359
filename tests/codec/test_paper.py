"""Profile paper end to end: synthetic artifacts, the rate it promises, the error it predicts, damage it must notice."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dynamo_kvtc.calibrate.allocate import fit_paper_part, paper_unit
from dynamo_kvtc.codec.artifact import FORMAT_VERSION, Artifact, Manifest, Point, load_artifact, save_artifact
from dynamo_kvtc.codec.channels import from_rows, to_rows
from dynamo_kvtc.codec.paper import PaperProfile, _exact_sum
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.errors import (
    ArtifactFormatError,
    RecordCorruptError,
    RecordError,
    RecordFormatError,
)
from dynamo_kvtc.ops import affine, deflate, project
from dynamo_kvtc.ops.rope import apply_rope, remove_rope
from dynamo_kvtc.types import KVShape, ModelIdentity
from tests.builders import case_seed, default_rope, same_bits

RATIOS = (4.0, 8.0, 16.0)
NO_LIMIT = ExactPolicy(sinks=0, max_error=1e9)
SHAPES = {
    "bfloat16, 1 head of 128": KVShape(3, 1, 128, "bfloat16"),
    "float16, 3 heads of 64": KVShape(2, 3, 64, "float16"),
    "float32, 3 heads of 96": KVShape(2, 3, 96, "float32"),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


class Source:
    """A random linear model of a cache, and an artifact calibrated on it."""

    def __init__(self, shape: KVShape, folder: Path, seed: int, groups: int = 1) -> None:
        self.generator = np.random.default_rng(seed)
        self.shape, self.rope = shape, default_rope(shape)
        edges = np.linspace(0, shape.layers, groups + 1).astype(int).tolist()
        self.groups = tuple((edges[i], edges[i + 1]) for i in range(groups))
        self.tensors: dict[str, Tensor] = {}
        self.parts: dict[tuple[int, str], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for g, (start, end) in enumerate(self.groups):
            channels = (end - start) * shape.kv_heads * shape.head_dim
            rank = channels * 3 // 4
            errors = np.zeros(len(RATIOS))
            for name in ("k", "v"):
                basis, _ = np.linalg.qr(self.generator.standard_normal((channels, rank)))
                sigma = 20.0 * np.arange(1, rank + 1) ** -0.9
                self.parts[g, name] = basis, sigma, self.generator.normal(0, 2, channels)
                rows = self.rows(g, name, 1500)
                fixed = project.quantise_basis(torch.from_numpy(np.ascontiguousarray(basis)))
                mean, unit = rows.mean(dim=0), paper_unit(rows.var(dim=0))
                prefix = f"rank0.group{g}"
                self.tensors[f"{prefix}.{name}.mean"] = mean
                self.tensors[f"{prefix}.{name}.unit"] = torch.tensor([unit])
                self.tensors[f"{prefix}.{name}.basis"] = fixed
                for i, fit in enumerate(fit_paper_part(rows, mean, fixed, unit, RATIOS)):
                    self.tensors[f"{prefix}.point{i}.{name}.sizes"] = fit.sizes
                    self.tensors[f"{prefix}.point{i}.{name}.types"] = fit.types
                    errors[i] += fit.mse
            for i in range(len(RATIOS)):
                self.tensors[f"rank0.group{g}.point{i}.error"] = torch.tensor([errors[i]], dtype=torch.float32)
        self.artifact = self.save(folder / "paper.safetensors", self.tensors)

    def save(self, path: Path, tensors: dict[str, Tensor]) -> Artifact:
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            profile="paper",
            model=ModelIdentity("synthetic/paper", "r1", "00" * 32, "SyntheticForCausalLM"),
            shape=self.shape,
            rope=self.rope,
            tp_size=1,
            block_tokens=16,
            groups=self.groups,
            points=tuple(Point(f"{r:g}", 0.0, r) for r in RATIOS),
            calibration={},
        )
        save_artifact(path, manifest, tensors)
        return load_artifact(path)

    def rows(self, group: int, name: str, tokens: int) -> Tensor:
        basis, sigma, mean = self.parts[group, name]
        z = self.generator.laplace(0, np.sqrt(0.5), (tokens, len(sigma))) * sigma
        return torch.from_numpy(z @ basis.T + mean + self.generator.normal(0, 0.02, (tokens, len(mean)))).float()

    def kv(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh K after RoPE, V, and positions with gaps."""
        positions = torch.from_numpy(np.cumsum(self.generator.integers(1, 4, tokens)))
        s, out = self.shape, []
        for name in ("k", "v"):
            layers = [
                from_rows(self.rows(g, name, tokens), end - start, s.kv_heads, s.head_dim)
                for g, (start, end) in enumerate(self.groups)
            ]
            out.append(torch.cat(layers))
        return apply_rope(out[0], positions, self.rope).to(s.torch_dtype), out[1].to(s.torch_dtype), positions


@pytest.fixture(scope="module", params=list(SHAPES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(SHAPES[request.param], tmp_path_factory.mktemp("paper"), case_seed(), groups=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(KVShape(2, 1, 64, "bfloat16"), tmp_path_factory.mktemp("paper"), case_seed(), groups=2)


def squared_error(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    """float64 [T] over layers, heads and dims of K and V."""
    return sum(((x.double() - y.double()) ** 2).sum(dim=(0, 1, 3)) for x, y in zip(a, b, strict=True))


def test_error_falls_with_rate_and_is_what_calibration_foretold(source: Source) -> None:
    k, v, positions = source.kv(200)
    found = []
    for i, ratio in enumerate(RATIOS):
        codec = BlockCodec(source.artifact, f"{ratio:g}", NO_LIMIT)
        blocks = codec.encode_blocks(k, v, positions)
        decoded_k, decoded_v, decoded_positions = codec.decode_blocks([b.record for b in blocks])
        assert torch.equal(decoded_positions, positions)
        assert (decoded_k.dtype, decoded_k.shape) == (k.dtype, k.shape)
        lost = float(squared_error((k, v), (decoded_k, decoded_v)).mean())
        foretold = float(source.tensors[f"rank0.group0.point{i}.error"])
        # Rounding K and V to a 16-bit cache, before and after, is on top of the codec's own error.
        slack = 0.0 if k.dtype == torch.float32 else float(k.double().square().mean()) * 2.0**-16 * k[:, :, 0].numel()
        assert 0.85 * foretold < lost < 1.15 * foretold + 4 * slack, (ratio, lost, foretold, slack)
        found.append(lost)
    assert found[0] < 0.6 * found[1]
    assert found[1] < 0.8 * found[2]


def test_reported_error_is_the_decoded_error(source: Source) -> None:
    k, v, positions = source.kv(40)
    k, v = remove_rope(k.float(), positions, source.rope), v.float()
    for i in range(len(RATIOS)):
        profile = PaperProfile(source.artifact, i)
        symbols, error = profile.quantise(0, k, v)
        assert error.dtype == torch.float64
        found, lost = error * profile.groups[0].mean_error, squared_error((k, v), profile.dequantise(0, symbols))
        # A basis of 16-bit numbers is orthonormal up to some 5e-5, so much of the energy is in doubt.
        energy = squared_error((k, v), (torch.zeros_like(k), torch.zeros_like(v)))
        assert ((found - lost).abs() <= 0.01 * lost + 1e-4 * energy).all()


def test_the_error_is_summed_exactly() -> None:
    """Any order of the components gives the same bits, up to the largest sum there can be."""
    generator = np.random.default_rng(case_seed())
    terms = torch.from_numpy(generator.exponential(1.0, (40, 3000)) * 2.0 ** generator.uniform(-14, 45, (40, 3000)))
    total = _exact_sum(terms)
    assert total.dtype == torch.float64
    for _ in range(20):
        assert torch.equal(_exact_sum(terms[:, torch.from_numpy(generator.permutation(3000))]), total)
    wanted = [math.fsum(row) for row in terms.tolist()]
    torch.testing.assert_close(total, torch.tensor(wanted, dtype=torch.float64), rtol=1e-15, atol=3000 * 2.0**-4)
    # A channel of 2**15 units in each of 2**17, lost four times over in a run of 2**10.
    assert float(_exact_sum(torch.full((1, 2**10), 2.0**49))) == 2.0**59


def test_a_tokens_error_does_not_depend_on_the_batch(small: Source) -> None:
    """To the last bit, or a token next to the bound would be exact in one batch and coded in another."""
    k, v, positions = small.kv(90)
    k, v = remove_rope(k.float(), positions, small.rope)[:1], v.float()[:1]
    profile = PaperProfile(small.artifact, 1)
    data, error = profile.quantise(0, k, v)
    for size in (1, 7, 64):
        parts = [profile.quantise(0, k[:, :, i : i + size], v[:, :, i : i + size]) for i in range(0, 90, size)]
        assert torch.equal(torch.cat([d for d, _ in parts]), data)
        assert torch.equal(torch.cat([e for _, e in parts]), error)


def test_rate_never_exceeds_the_nominal_budget(source: Source) -> None:
    s = source.shape
    k, v, _ = source.kv(64)
    for i, ratio in enumerate(RATIOS):
        profile = PaperProfile(source.artifact, i)
        symbols, _ = profile.quantise(0, k.float(), v.float())
        raw = 2 * 2 * s.layers * s.kv_heads * s.head_dim
        assert 0.9 * raw / ratio < symbols.shape[1] <= raw / ratio
        payloads = profile.pack(0, symbols, [64])
        # Even where it finds nothing to gain, DEFLATE adds 5 bytes to 64 KiB.
        assert len(payloads[0]) <= symbols.numel() + 5


@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_records_do_not_depend_on_what_is_encoded_with_them(small: Source, tokens: int) -> None:
    codec = BlockCodec(small.artifact, "8", NO_LIMIT)
    k, v, positions = small.kv(tokens)
    together = [b.record for b in codec.encode_blocks(k, v, positions)]
    assert len(together) == -(-tokens // 16)
    for i, record in enumerate(together):
        own = slice(16 * i, min(16 * (i + 1), tokens))
        assert codec.encode_block(k[:, :, own], v[:, :, own], positions[own]).record == record
    whole = codec.decode_blocks(together)
    parts = [codec.decode_block(record) for record in together]
    assert same_bits(whole[0], torch.cat([p[0] for p in parts], dim=2))
    assert same_bits(whole[1], torch.cat([p[1] for p in parts], dim=2))
    assert torch.equal(whole[2], positions)


def test_symbols_do_not_depend_on_the_batch(small: Source) -> None:
    profile = PaperProfile(small.artifact, 1)
    k, v, _ = small.kv(33)
    k, v = k[:1].float(), v[:1].float()
    together, _ = profile.quantise(0, k, v)
    alone = [profile.quantise(0, k[:, :, i : i + 1], v[:, :, i : i + 1])[0] for i in range(33)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_exact_tokens_come_back_bit_for_bit(source: Source, share: float) -> None:
    codec = BlockCodec(source.artifact, "8", NO_LIMIT)
    k, v, positions = source.kv(35)
    exact = torch.from_numpy(source.generator.random(35) < share)
    blocks = codec.encode_blocks(k, v, positions, exact)
    decoded = codec.decode_blocks([b.record for b in blocks])
    for x, y in zip((k, v), decoded, strict=False):
        assert same_bits(x[:, :, exact].contiguous(), y[:, :, exact].contiguous())
    assert sum(b.exact.policy for b in blocks) == int(exact.sum())


def test_tokens_that_cannot_be_coded_become_exact(small: Source) -> None:
    codec = BlockCodec(small.artifact, "8")
    k, v, positions = small.kv(24)
    positions = positions + 100
    k[0, 0, 3, 5], v[1, 0, 7, 1], k[1, 0, 11, 0] = float("nan"), float("-inf"), 1e30
    v[:, :, 13] = 200.0
    blocks = codec.encode_blocks(k, v, positions)
    decoded = codec.decode_blocks([b.record for b in blocks])
    wild = torch.tensor([3, 7, 11, 13])
    for x, y in zip((k, v), decoded, strict=False):
        assert same_bits(x[:, :, wild].contiguous(), y[:, :, wild].contiguous())
    assert sum(b.exact.total for b in blocks) >= 4
    tame = torch.tensor([i for i in range(24) if i not in wild.tolist()])
    assert decoded[0][:, :, tame].isfinite().all()


def test_pack_is_one_stream_of_byte_positions(small: Source) -> None:
    profile = PaperProfile(small.artifact, 1)
    k, v, _ = small.kv(20)
    symbols, _ = profile.quantise(0, k[:1].float(), v[:1].float())
    payloads = profile.pack(0, symbols, [16, 0, 4])
    assert payloads[1] == b""
    assert deflate.inflate(payloads[0], 16 * symbols.shape[1]) == symbols[:16].T.numpy().tobytes()
    assert torch.equal(profile.unpack(0, payloads, [16, 0, 4]), symbols)
    assert profile.unpack(0, [], []).shape == (0, symbols.shape[1])


def test_kernels_make_and_read_the_payloads_bytes(small: Source, kernel_device: str) -> None:
    """Coefficients to what DEFLATE is given, K beside V, and back to components, without leaving the device."""
    profile = PaperProfile(small.artifact, 1)
    k, v, _ = small.kv(20)
    symbols, _ = profile.quantise(0, k[:1].float(), v[:1].float())
    payloads = profile.pack(0, symbols, [16, 4])
    group = profile.groups[0]
    data = torch.full((20, symbols.shape[1]), 0xA5, dtype=torch.uint8, device=kernel_device)
    starts = torch.tensor([0, 16, 20], device=kernel_device)
    split = group.k.runs.width
    parts = ((group.k, k, data[:, :split]), (group.v, v, data[:, split:]))
    for part, x, out in parts:
        fixed, _, _ = project.fixed_point(to_rows(x[:1].float()), part.mean, part.analysis_gain)
        coefficients = project.analyse_wide(fixed, part.basis)
        plan = affine.device_plan(part.host_runs, kernel_device)
        affine.encode_device(coefficients.to(kernel_device), plan, out)
    planes = torch.empty(data.numel(), dtype=torch.uint8, device=kernel_device)
    affine.to_planes(data, starts, 16, planes)
    inflated = [deflate.inflate(p, n * symbols.shape[1]) for p, n in zip(payloads, (16, 4), strict=True)]
    assert planes.cpu().numpy().tobytes() == b"".join(inflated)

    back = torch.zeros_like(data)
    affine.from_planes(planes, starts, 16, back)
    assert torch.equal(back.cpu(), symbols)
    for part, own in ((group.k, symbols[:, :split]), (group.v, symbols[:, split:])):
        plan = affine.device_plan(part.host_runs, kernel_device)
        found = affine.decode_device(own.to(kernel_device), plan)
        assert same_bits(found.cpu(), affine.decode(own, part.host_runs))
        assert affine.valid_device(own.to(kernel_device), plan).all()


def test_damaged_payloads_are_refused(small: Source) -> None:
    profile = PaperProfile(small.artifact, 1)
    k, v, _ = small.kv(16)
    symbols, _ = profile.quantise(0, k[:1].float(), v[:1].float())
    (payload,) = profile.pack(0, symbols, [16])
    for damaged in (payload[:-1], payload[: len(payload) // 2], b"", payload + b"\0"):
        with pytest.raises(RecordCorruptError):
            profile.unpack(0, [damaged], [16])
    for tokens in (15, 17):
        with pytest.raises(RecordCorruptError):
            profile.unpack(0, [payload], [tokens])
    with pytest.raises(RecordFormatError, match="without coded tokens"):
        profile.unpack(0, [b"\3\0"], [0])
    for part in (0, profile.groups[0].k.runs.width):
        forged = symbols.clone()
        forged[5, part : part + 2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)
        with pytest.raises(RecordFormatError, match="1 of 16 tokens"):
            profile.unpack(0, profile.pack(0, forged, [16]), [16])


def test_damaged_records_are_refused_or_decode_to_the_same(small: Source) -> None:
    codec = BlockCodec(small.artifact, "16", NO_LIMIT)
    k, v, positions = small.kv(16)
    record = codec.encode_block(k, v, positions).record
    generator = np.random.default_rng(case_seed())
    for at in generator.integers(0, len(record), 60).tolist():
        damaged = bytearray(record)
        damaged[at] ^= 1 << int(generator.integers(8))
        with pytest.raises(RecordError):
            codec.decode_block(bytes(damaged))
    with pytest.raises(RecordError):
        codec.decode_block(record[:-1])


FORGERIES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "size": ("point1.k.sizes", lambda x: torch.cat([x[:-1], torch.tensor([17], dtype=torch.int32)])),
    "negative size": ("point1.v.sizes", lambda x: -x),
    "too many": ("point1.v.sizes", lambda x: torch.full_like(x, 1024)),
    "type": ("point1.k.types", lambda x: x + 3),
    "types short": ("point1.k.types", lambda x: x[:-1].clone()),
    "sizes dtype": ("point1.k.sizes", lambda x: x.long()),
    "sizes rank": ("point1.k.sizes", lambda x: x[None]),
    "mean": ("k.mean", lambda x: x * float("nan")),
    "mean shape": ("v.mean", lambda x: x[1:].clone()),
    "basis dtype": ("v.basis", lambda x: x.float()),
    "basis shape": ("v.basis", lambda x: x[1:].clone()),
    "basis beyond 1": ("k.basis", lambda x: torch.full_like(x, -(2**14) - 1)),
    "basis least": ("v.basis", lambda x: torch.full_like(x, -(2**15))),
    "unit zero": ("k.unit", lambda x: x * 0),
    "unit negative": ("v.unit", lambda x: -x),
    "unit infinite": ("v.unit", lambda x: x / 0),
    "unit tiny": ("v.unit", lambda x: torch.full_like(x, 1e-45)),
    "unit nan": ("v.unit", lambda x: x * float("nan")),
    "error negative": ("point1.error", lambda x: -x),
    "error nan": ("point1.error", lambda x: x * float("nan")),
}


@pytest.mark.parametrize("name", list(FORGERIES))
def test_forged_artifacts_are_refused(small: Source, tmp_path: Path, name: str) -> None:
    tensor, forge = FORGERIES[name]
    tensors = dict(small.tensors)
    tensors[f"rank0.group1.{tensor}"] = forge(tensors[f"rank0.group1.{tensor}"])
    artifact = small.save(tmp_path / "forged.safetensors", tensors)
    with pytest.raises(ArtifactFormatError):
        PaperProfile(artifact, 1)


def test_missing_tensor_is_named(small: Source, tmp_path: Path) -> None:
    tensors = {name: t for name, t in small.tensors.items() if name != "rank0.group0.v.unit"}
    with pytest.raises(ArtifactFormatError, match=r"rank0\.group0\.v\.unit"):
        PaperProfile(small.save(tmp_path / "forged.safetensors", tensors), 0)


def test_allocation_that_leaves_everything_out_still_decodes_to_the_mean(small: Source, tmp_path: Path) -> None:
    tensors = dict(small.tensors)
    for name in ("k", "v"):
        tensors[f"rank0.group0.point0.{name}.sizes"] = torch.tensor([16], dtype=torch.int32)
        tensors[f"rank0.group0.point0.{name}.types"] = torch.tensor([affine.NONE], dtype=torch.uint8)
    codec = BlockCodec(small.save(tmp_path / "empty.safetensors", tensors), "4", NO_LIMIT)
    k, v, positions = small.kv(5)
    _, decoded, _ = codec.decode_block(codec.encode_block(k, v, positions).record)
    assert same_bits(decoded[:1].contiguous(), from_rows(tensors["rank0.group0.v.mean"].expand(5, -1), 1, 1, 64)
                     .to(torch.bfloat16).contiguous())  # fmt: skip


@needs_gpu
@pytest.mark.gpu
def test_gpu_writes_the_same_records(source: Source) -> None:
    k, v, positions = source.kv(50)
    for ratio in RATIOS:
        here = BlockCodec(source.artifact, f"{ratio:g}", NO_LIMIT)
        there = BlockCodec(source.artifact, f"{ratio:g}", NO_LIMIT, device="cuda")
        # Removing RoPE is not exact across devices, so the symbols are compared from the same input.
        rows_k = remove_rope(k.float(), positions, source.rope)
        mine, _ = here.profile.quantise(0, rows_k, v.float())
        theirs, _ = there.profile.quantise(0, rows_k.cuda(), v.float().cuda())
        assert torch.equal(mine, theirs.cpu())
        records = [b.record for b in there.encode_blocks(k.cuda(), v.cuda(), positions.cuda())]
        decoded, wanted = there.decode_blocks(records), here.decode_blocks(records)
        for x, y in zip(decoded[:2], wanted[:2], strict=True):
            torch.testing.assert_close(x.cpu().float(), y.float(), rtol=2e-2, atol=1e-2)
