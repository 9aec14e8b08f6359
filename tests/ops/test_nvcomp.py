"""nvCOMP: what can be asked without a GPU, and on one that its DEFLATE and zlib's are the same."""

from __future__ import annotations

import ctypes
import sys
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError, MissingDependencyError
from dynamo_kvtc.ops import deflate
from dynamo_kvtc.ops.deflate import nvcomp
from dynamo_kvtc.ops.deflate.nvcomp import BatchDecoder, BatchEncoder, Codec
from tests.builders import case_seed

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture
def fresh_library():
    nvcomp.library.cache_clear()
    yield
    nvcomp.library.cache_clear()


def test_missing_nvcomp_names_the_remedy(monkeypatch, fresh_library) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.libnvcomp", None)
    with pytest.raises(MissingDependencyError, match=r"pip install dynamo-kvtc\[gpu\]"):
        BatchEncoder(Codec.DEFLATE, 1, 100)


@pytest.mark.parametrize("found", [None, ctypes.CDLL(None)])
def test_a_library_that_is_not_nvcomp_is_refused(monkeypatch, fresh_library, found) -> None:
    package = type(sys)("nvidia.libnvcomp")
    package.load_library = lambda: found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvidia.libnvcomp", package)
    with pytest.raises(MissingDependencyError, match="pip install"):
        nvcomp.library()


def test_options_are_64_bytes() -> None:
    assert ctypes.sizeof(nvcomp._Options) == 64
    assert nvcomp._Options.delta.offset == 8


def test_wrong_sizes_are_refused_before_anything_is_loaded(monkeypatch, fresh_library) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.libnvcomp", None)
    for chunks, longest in ((0, 100), (1, 0), (1, 2**16 + 1)):
        with pytest.raises(ConfigError, match="DEFLATE"):
            BatchEncoder(Codec.DEFLATE, chunks, longest)
    with pytest.raises(ConfigError, match="effort is 6"):
        BatchEncoder(Codec.DEFLATE, 1, 100, effort=6)
    with pytest.raises(ConfigError, match="ANS"):
        BatchDecoder(Codec.ANS, 1, 2**25 + 1)


@pytest.mark.parametrize("codec", Codec)
def test_the_library_answers_without_a_gpu(codec: Codec) -> None:
    """Options by value reach it whole: a wrong data type is refused, and Bitcomp's changes the alignment."""
    pytest.importorskip("nvidia.libnvcomp")
    for kind in (BatchEncoder, BatchDecoder):
        with pytest.raises(ConfigError, match="device cpu"):
            kind(codec, 4, 1000, "cpu")
    batch = nvcomp._Batch(codec, "Compress", nvcomp._Options(0, codec.value[1] or 0), 4, 1000, 1000)
    assert batch.input_alignment == {"Bitcomp": 2, "ANS": 16}.get(codec.value[0], 1)
    with pytest.raises(MissingDependencyError, match="status"):
        nvcomp._Batch(codec, "Compress", nvcomp._Options(99, 99), 4, 1000, 1000)


def chunks_of(sizes: list[int], lap: float = 10.0) -> list[bytes]:
    generator = np.random.default_rng(case_seed())
    return [np.clip(generator.laplace(128, lap, n), 0, 255).astype(np.uint8).tobytes() for n in sizes]


def laid_out(chunks: list[bytes], room: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """bytes, starts (multiples of 16), sizes; ``room``: bytes for each instead of its own."""
    starts, at = [], 0
    for chunk in chunks:
        starts.append(at)
        at += -(-(room or len(chunk)) // 16) * 16
    flat = np.full(at, 0xA5, dtype=np.uint8)
    for start, chunk in zip(starts, chunks, strict=True):
        flat[start : start + len(chunk)] = np.frombuffer(chunk, np.uint8)
    return torch.from_numpy(flat).cuda(), torch.tensor(starts).cuda(), torch.tensor([len(c) for c in chunks]).cuda()


def compress(codec: Codec, chunks: list[bytes]) -> list[bytes]:
    source, start, size = laid_out(chunks)
    encoder = BatchEncoder(codec, len(chunks) + 3, max(map(len, chunks)))
    target = torch.full((len(chunks) * encoder.room,), 0xA5, dtype=torch.uint8, device="cuda")
    to = torch.arange(len(chunks), device="cuda") * encoder.room
    found, status = torch.full_like(size, -1), torch.full((len(chunks),), -1, dtype=torch.int32, device="cuda")
    encoder.encode(source, start, size, target, to, found, status)
    assert status.tolist() == [0] * len(chunks)
    host = target.cpu().numpy().tobytes()
    return [host[a : a + n] for a, n in zip(to.tolist(), found.tolist(), strict=True)]


def decompress(codec: Codec, payloads: list[bytes], sizes: list[int]) -> list[bytes]:
    source, start, size = laid_out(payloads)
    decoder = BatchDecoder(codec, len(payloads) + 3, max(sizes))
    target, to, room = laid_out([b"\xa5" * n for n in sizes])
    found, status = torch.full_like(size, -1), torch.full((len(payloads),), -1, dtype=torch.int32, device="cuda")
    decoder.decode(source, start, size, target, to, room, found, status)
    assert status.tolist() == [0] * len(payloads)
    assert found.tolist() == sizes
    host = target.cpu().numpy().tobytes()
    return [host[a : a + n] for a, n in zip(to.tolist(), sizes, strict=True)]


class TestOnGpu:
    pytestmark = on_gpu

    def setup_method(self) -> None:
        pytest.importorskip("nvidia.libnvcomp")

    @pytest.mark.parametrize("codec", Codec)
    def test_round_trip(self, codec: Codec) -> None:
        sizes = [2, 4, 100, 1000, 4096, 30000, 65536]
        chunks = chunks_of(sizes)
        assert decompress(codec, compress(codec, chunks), sizes) == chunks

    def test_zlib_reads_nvcomps_deflate(self) -> None:
        chunks = chunks_of([1, 3, 1000, 65535, 65536])
        for chunk, payload in zip(chunks, compress(Codec.DEFLATE, chunks), strict=True):
            assert deflate.inflate(payload, len(chunk)) == chunk

    @pytest.mark.parametrize("level", [0, 1, 6, 9])
    def test_nvcomp_reads_zlibs(self, level: int) -> None:
        sizes = [1, 3, 1000, 65536, 300_000, 2_000_000]
        chunks, payloads = chunks_of(sizes), []
        for chunk in chunks:
            encoder = zlib.compressobj(level, zlib.DEFLATED, -15)
            payloads.append(encoder.compress(chunk) + encoder.flush())
        assert decompress(Codec.DEFLATE, payloads, sizes) == chunks

    def test_exact_tokens_shrink(self) -> None:
        values = torch.randn(100_000).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
        for codec in (Codec.ANS_HALF, Codec.BITCOMP_HALF):
            payload = compress(codec, [values])
            assert decompress(codec, payload, [len(values)]) == [values]
            assert len(payload[0]) < (0.85 if codec is Codec.ANS_HALF else 1.05) * len(values)

    def test_unaligned_buffers_and_too_many_chunks_are_refused(self) -> None:
        source, start, size = laid_out([b"abc"])
        encoder = BatchEncoder(Codec.DEFLATE, 1, 100)
        target, status = torch.empty(encoder.room, dtype=torch.uint8).cuda(), torch.empty(1, dtype=torch.int32).cuda()
        with pytest.raises(ConfigError, match="multiple of 16"):
            encoder.encode(source[1:], start, size, target, start, size.clone(), status)
        two = torch.zeros(2, dtype=torch.int64, device="cuda")
        with pytest.raises(ConfigError, match="at most 1"):
            encoder.encode(source, two, two, target, two, two, status.new_zeros(2))
