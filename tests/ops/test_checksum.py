"""CRC-32 against zlib, and the kernel's copies: odd sizes and alignments, nothing outside the ranges written."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import checksum
from dynamo_kvtc.ops.checksum import reference
from tests.builders import case_seed

POISON = 0xA5
SIZES = [0, 1, 2, 3, 4, 5, 127, 129, 1000, 16383, 16384, 16385, 40000]


def ranges(
    generator: np.random.Generator, sizes: list[int], device: str, step: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """source, source_start, size, poisoned target, target_start: at starts that are multiples of ``step``."""
    gaps = generator.integers(0, 40, (2, len(sizes)))
    starts = np.zeros((2, len(sizes)), dtype=np.int64)
    for row in range(2):
        at = 0
        for i, size in enumerate(sizes):
            at = -(-(at + int(gaps[row, i])) // step) * step
            starts[row, i] = at
            at += size
    total = sum(sizes) + 80 * len(sizes) + 64
    source = torch.from_numpy(generator.integers(0, 256, total, dtype=np.uint8)).to(device)
    target = torch.full((total,), POISON, dtype=torch.uint8, device=device)
    source_start, target_start = (torch.from_numpy(row.copy()).to(device) for row in starts)
    return source, source_start, torch.tensor(sizes, device=device), target, target_start


def poisoned(count: int, device: str) -> Tensor:
    return torch.full((count,), 0x5A5A5A5A, dtype=torch.int32, device=device)


def expect(source: Tensor, source_start: Tensor, size: Tensor, target: Tensor, target_start: Tensor, crc: Tensor):
    wanted, sums = torch.full_like(target, POISON, device="cpu"), []
    host = source.cpu()
    for start, count, to in zip(source_start.tolist(), size.tolist(), target_start.tolist(), strict=True):
        part = host[start : start + count]
        wanted[to : to + count] = part
        sums.append(zlib.crc32(part.numpy().tobytes()))
    assert [c & 0xFFFFFFFF for c in crc.cpu().tolist()] == sums
    assert torch.equal(target.cpu(), wanted)


def test_reference_is_zlib_and_copies() -> None:
    generator = np.random.default_rng(case_seed())
    data = generator.bytes(1000)
    assert checksum.crc32(data) == checksum.crc32(memoryview(data)) == zlib.crc32(data)
    assert checksum.crc32(b"123456789") == 0xCBF43926
    source, start, size, target, to = ranges(generator, SIZES, "cpu")
    crc = poisoned(len(SIZES), "cpu")
    checksum.copy_ranges(source, start, size, target, to, crc)
    expect(source, start, size, target, to, crc)


def test_arithmetic_of_polynomials() -> None:
    generator = np.random.default_rng(case_seed())
    a, b, c = generator.integers(0, 2**32, (3, 50), dtype=np.uint32)
    product = reference.multiply(a, b)
    assert np.array_equal(product, reference.multiply(b, a))
    assert np.array_equal(reference.multiply(product, c), reference.multiply(a, reference.multiply(b, c)))
    exponents = generator.integers(0, 2**40, 50)
    back = reference.multiply(reference.power(exponents), reference.power(-exponents))
    assert (back == reference.ONE).all()
    # A zero byte behind a message multiplies its register by x**8.
    data = generator.bytes(33)
    register = reference.multiply(np.uint32(zlib.crc32(data) ^ 0xFFFFFFFF), reference.power(np.array([8])))
    assert int(register[0]) ^ 0xFFFFFFFF == zlib.crc32(data + b"\0")


@pytest.mark.parametrize(("step", "host"), [(1, False), (1, True), (16, False)])
def test_kernel_copies_and_sums(kernel_device: str, step: int, host: bool) -> None:
    generator = np.random.default_rng(case_seed())
    source, start, size, target, to = ranges(generator, SIZES, kernel_device, step)
    crc = poisoned(len(SIZES), kernel_device)
    address = start + source.data_ptr()
    checksum.copy_addresses_device(address, size, target, to, crc, max(SIZES), source_is_host=host)
    expect(source, start, size, target, to, crc)


def test_kernel_sums_without_a_copy(kernel_device: str) -> None:
    generator = np.random.default_rng(case_seed())
    source, start, size, target, to = ranges(generator, SIZES[:9], kernel_device)
    crc = poisoned(9, kernel_device)
    checksum.copy_ranges_device(source, start, size, None, None, crc, 1000)
    checksum.copy_ranges(source, start, size, target, to, again := poisoned(9, kernel_device))
    assert torch.equal(crc, again)


def test_every_alignment_of_a_short_range(kernel_device: str) -> None:
    generator = np.random.default_rng(case_seed())
    for by in range(0, 16, 5):
        size = [int(generator.integers(1, 70)) for _ in range(4)]
        source, start, sizes, target, to = ranges(generator, size, kernel_device, 16)
        start, to = start + by, to + torch.arange(4, device=kernel_device)
        crc = poisoned(4, kernel_device)
        checksum.copy_ranges_device(source, start, sizes, target, to, crc, 70)
        expect(source, start, sizes, target, to, crc)


def test_long_ranges_need_factors_beyond_the_first_table(kernel_device: str) -> None:
    """More than 32 chunks; most of it zeros, whose chunks multiply to nothing but must still be counted."""
    pytest.importorskip("triton")
    from dynamo_kvtc.ops.checksum import triton

    tables = triton._tables(torch.device(kernel_device)).cpu().numpy().view(np.uint32)
    for chunk, pad in ((40, 0), (2**17, 127)):
        low = tables[triton._FACTORS + chunk % 32 * 128 + pad]
        found = reference.multiply(low, tables[triton._HIGH_CHUNKS + chunk // 32])
        assert int(found) == int(reference.power(np.array([8 * (chunk * triton.CHUNK_BYTES - pad)]))[0])
    if kernel_device == "cuda":
        size = 34 * triton.CHUNK_BYTES + 77
        source = torch.randint(0, 256, (size + 9,), dtype=torch.uint8, device="cuda")
        crc = poisoned(1, "cuda")
        start, count = torch.tensor([9], device="cuda"), torch.tensor([size], device="cuda")
        checksum.copy_ranges_device(source, start, count, None, None, crc, size)
        assert int(crc[0]) & 0xFFFFFFFF == zlib.crc32(source[9:].cpu().numpy().tobytes())


def test_sizes_beyond_the_bound_are_cut(kernel_device: str) -> None:
    generator = np.random.default_rng(case_seed())
    source, start, _, target, to = ranges(generator, [50, 50], kernel_device)
    crc = poisoned(2, kernel_device)
    wild = torch.tensor([-(2**40), 2**40], device=kernel_device)
    checksum.copy_ranges_device(source, start, wild, target, to, crc, 50)
    expect(source, start, torch.tensor([0, 50]), target, to, crc)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("pinned", ["source", "target"])
def test_host_memory_is_read_and_written(pinned: str) -> None:
    generator = np.random.default_rng(case_seed())
    source, start, size, target, to = ranges(generator, SIZES, "cuda", 2)
    source = source.cpu().pin_memory() if pinned == "source" else source
    target = target.cpu().pin_memory() if pinned == "target" else target
    crc = poisoned(len(SIZES), "cuda")
    checksum.copy_ranges_device(source, start, size, target, to, crc, max(SIZES))
    torch.cuda.synchronize()
    expect(source, start, size, target, to, crc)


def test_nothing_to_do(kernel_device: str) -> None:
    none, zero = torch.empty(0, dtype=torch.int64, device=kernel_device), torch.zeros(1, device=kernel_device)
    crc = torch.empty(0, dtype=torch.int32, device=kernel_device)
    checksum.copy_ranges_device(zero.view(torch.uint8), none, none, None, None, crc, 100)


def test_refusals(kernel_device: str) -> None:
    source, start, size, target, to = ranges(np.random.default_rng(0), [4, 5], kernel_device)
    crc = poisoned(2, kernel_device)
    bad = [
        (source.int(), start, size, target, to, crc, 5),
        (source, start.int(), size, target, to, crc, 5),
        (source, start, size[:1], target, to, crc, 5),
        (source, start, size, target, None, crc, 5),
        (source, start, size, target[::2], to, crc, 5),
        (source, start, size, target, to, crc.float(), 5),
        (source, start, size, target, to, crc, -1),
        (source, start, size, target, to, crc, 2**32),
    ]
    for arguments in bad:
        with pytest.raises(ConfigError):
            checksum.copy_ranges_device(*arguments)
    assert (crc == 0x5A5A5A5A).all()
    many = torch.zeros(2**14, dtype=torch.int64, device=kernel_device)
    with pytest.raises(ConfigError, match="split"):
        checksum.copy_ranges_device(source, many, many, None, None, many.int(), 2**32 - 1)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dynamo_kvtc.ops.checksum import triton as kernels

fixed = dict(
    COLUMNS=kernels.COLUMNS, ROWS=kernels.ROWS, GROUPS=kernels.GROUPS, LINE=kernels.LINE_BYTES,
    LOW_CHUNKS=kernels._LOW_CHUNKS, FACTORS=kernels._FACTORS, COLUMN_POWERS=kernels._COLUMN_POWERS,
    HIGH_CHUNKS=kernels._HIGH_CHUNKS, ROW_BITS=kernels._ROW, WORD_BITS=kernels._WORD,
    TWO_WORD_BITS=kernels._TWO_WORDS, HAS_TARGET=True,
)
signature = dict(
    source_start="*i64", size="*i64", target_start="*i64", crc="*i32", tables="*i32", source_base="i64",
    target_base="i64", max_size="i64", chunks="i32", BY_TARGET="constexpr", **dict.fromkeys(fixed, "constexpr"),
)
source = ASTSource(kernels._copy_kernel, signature, {**fixed, "BY_TARGET": False})
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
assert "ld.global.v4.b32" in kernel.asm["ptx"] and "st.global.v4.b32" in kernel.asm["ptx"]
"""


def test_kernels_compile_for_hopper_without_one() -> None:
    """Whole 16-byte accesses, which PCIe needs, must survive the compiler."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-c", COMPILE], check=True, env=environment, cwd=Path(__file__).parents[2], timeout=300
    )
