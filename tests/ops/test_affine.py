"""The paper's quantiser: bytes worked out by hand, error bounds, independence of the batch, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import affine
from dynamo_kvtc.ops.affine import cpu, reference
from tests.builders import case_seed

KINDS = (affine.INT2, affine.INT4, affine.FP8)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def random_layout(generator: np.random.Generator, most: int = 12) -> tuple[affine.Layout, int]:
    sizes = generator.choice([1, 16, 64], generator.integers(1, most)).tolist()
    types = generator.integers(0, 4, len(sizes)).tolist()
    return affine.layout(torch.tensor(sizes), torch.tensor(types), sum(sizes)), sum(sizes)


def random_values(generator: np.random.Generator, tokens: int, columns: int) -> Tensor:
    scale = np.exp(generator.uniform(-6, 6, columns))
    return torch.from_numpy((generator.laplace(0, 1, (tokens, columns)) * scale).astype(np.float32))


def test_bytes_worked_out_by_hand() -> None:
    runs = reference.Layout([1, 3, 2, 4, 1], [affine.INT2, affine.INT4, affine.NONE, affine.INT2, affine.FP8], "cpu")
    assert runs.live.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10]
    values = torch.tensor([[5.0, -15.0, 0.0, 15.0, 0.0, 1.0, 2.0, 3.0, -7.0]])
    data, overflow = affine.encode(values, runs)
    scales = [0.0, 2.0, 1.0, 0.0]
    shifts = [5.0, -15.0, 0.0, -7.0]
    # int4 codes 0, 7.5 -> 8 (ties to even), 15: digits 0 0, 0 2, 3 3; int2 codes 0 (the run of one), then 0 1 2 3.
    digits = [0, 0, 0, 2, 3, 3, 0, 0, 1, 2, 3]
    packed = [sum(d << 2 * i for i, d in enumerate(digits[at : at + 4])) for at in (0, 4, 8)]
    wanted = np.array(scales + shifts, dtype="<f2").tobytes() + bytes([0]) + bytes(packed)
    assert bytes(data[0].tolist()) == wanted
    assert not overflow.any()
    assert affine.decode(data, runs).tolist() == [[5.0, -15.0, 1.0, 15.0, 0.0, 1.0, 2.0, 3.0, -7.0]]
    assert affine.valid(data, runs).tolist() == [True]


def test_fp8_run_is_e4m3_around_the_middle() -> None:
    runs = reference.Layout([4], [affine.FP8], "cpu")
    values = torch.tensor([[-438.0, 10.0, 110.0, 458.0]])
    data, _ = affine.encode(values, runs)
    assert np.frombuffer(bytes(data[0, :4].tolist()), "<f2").tolist() == [1.0, 10.0]
    # -448 and 448 are the ends; 100 lies between 96 and 104, ties to the even mantissa: 96 = 1.5 * 64.
    assert affine.decode(data, runs).tolist() == [[-438.0, 10.0, 106.0, 458.0]]
    assert data[0, 4:].tolist() == [0xFE, 0x00, 0x6C, 0x7E]


def test_error_is_within_half_a_level() -> None:
    generator = np.random.default_rng(case_seed())
    for _ in range(20):
        runs, _ = random_layout(generator)
        values = random_values(generator, 9, len(runs.live))
        data, overflow = affine.encode(values, runs)
        lost = (affine.decode(data, runs) - values).abs()
        assert not overflow.any()
        assert affine.valid(data, runs).all()
        for kind, size, _, own in runs.kinds:
            part, off = values[:, own].reshape(9, -1, size), lost[:, own].reshape(9, -1, size)
            reach = (part.amax(dim=2) - part.amin(dim=2))[:, :, None]
            half_level = {affine.INT2: reach / 6, affine.INT4: reach / 30, affine.FP8: reach / 2 / 448 * 16}[kind]
            # What rounding scale and shift to float16 adds: 2**-11 of each at most, and its least number.
            rounding = part.abs().amax(dim=2, keepdim=True) * 2.0**-10 + reach * 2.0**-10 + 2.0**-20
            assert (off <= half_level + rounding).all(), (kind, size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 60000.0, 1e-9])
def test_constant_run_is_its_shift(kind: int, value: float) -> None:
    for size in (1, 16):
        runs = affine.layout(torch.tensor([size]), torch.tensor([kind]), 16)
        data, overflow = affine.encode(torch.full((2, size), value), runs)
        assert not overflow.any()
        assert torch.equal(affine.decode(data, runs), torch.full((2, size), value).half().float())
        assert not data[:, :2].any()
        assert not (data[:, 4:] & 0x7F).any()


def test_range_below_float16_does_not_divide_by_zero() -> None:
    values = torch.tensor([[1e-12, 3e-12] * 8])
    for kind in KINDS:
        runs = affine.layout(torch.tensor([16]), torch.tensor([kind]), 16)
        assert affine.decode(affine.encode(values, runs)[0], runs).abs().max() < 1e-11


def test_tokens_do_not_depend_on_their_batch() -> None:
    generator = np.random.default_rng(case_seed())
    runs, _ = random_layout(generator)
    values = random_values(generator, 13, len(runs.live))
    together = affine.encode(values, runs)[0]
    alone = torch.cat([affine.encode(values[i : i + 1], runs)[0] for i in range(13)])
    assert torch.equal(together, alone)
    levels = affine.decode(together, runs)
    assert torch.equal(levels, torch.cat([affine.decode(together[i : i + 1], runs) for i in range(13)]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_overflow_is_the_tokens_own_and_its_bytes_are_well_formed(bad: float) -> None:
    for kind in KINDS:
        runs = affine.layout(torch.tensor([16, 1]), torch.tensor([kind, kind]), 17)
        for column in (3, 16):
            values = torch.randn(3, 17)
            values[1, column] = bad
            data, overflow = affine.encode(values, runs)
            assert overflow.tolist() == [False, True, False]
            assert affine.valid(data, runs).all()


def test_valid_refuses_what_no_encoder_writes() -> None:
    sizes, types = torch.tensor([16, 1]), torch.tensor([affine.FP8, affine.INT2], dtype=torch.uint8)
    runs = affine.layout(sizes, types, 17)
    data, _ = affine.encode(torch.randn(1, 17), runs)
    infinite = np.frombuffer(np.array(np.inf, "<f2").tobytes(), np.uint8)
    forged = {"scale": (0, infinite), "shift": (4, infinite), "negative scale": (1, [0xBC]), "code": (8, [0x7F])}
    forged |= {"negative code": (9, [0xFF]), "padding": (24, [0x04])}
    for name, (at, what) in forged.items():
        worse = data.clone()
        worse[0, at : at + len(what)] = torch.tensor(list(what), dtype=torch.uint8)
        assert affine.valid(worse, runs).tolist() == [False], name


def test_empty_layouts_and_batches() -> None:
    for sizes, types in (([], []), ([16], [affine.NONE])):
        runs = affine.layout(torch.tensor(sizes, dtype=torch.int32), torch.tensor(types, dtype=torch.uint8), 16)
        data, overflow = affine.encode(torch.empty(3, 0), runs)
        assert data.shape == (3, 0)
        assert not overflow.any()
        assert affine.decode(data, runs).shape == (3, 0)
        assert affine.valid(data, runs).tolist() == [True] * 3
    runs = affine.layout(torch.tensor([16]), torch.tensor([affine.FP8]), 16)
    data, _ = affine.encode(torch.empty(0, 16), runs)
    assert data.shape == (0, 20)
    assert affine.decode(data, runs).shape == (0, 16)


def test_normalise_has_room_for_the_worst_coefficient() -> None:
    worst = torch.tensor([[2.0**15 * 2.0**8.5 * 2.0**14, -0.0]], dtype=torch.float64)
    values = affine.normalise(worst)
    assert values[0, 0] < affine.MAX_VALUE
    assert not torch.signbit(values[0, 1])


@pytest.mark.parametrize(
    ("sizes", "types", "components"),
    [([2], [1], 16), ([16], [4], 16), ([16, 1], [1, 1], 16), ([16], [1, 1], 99), ([0], [1], 9), ([-1], [1], 9)],
)
def test_layout_refuses(sizes: list[int], types: list[int], components: int) -> None:
    with pytest.raises(ConfigError):
        affine.layout(torch.tensor(sizes), torch.tensor(types), components)


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    runs = affine.layout(torch.tensor([16]), torch.tensor([affine.INT4]), 16)
    for values in (torch.zeros(2, 15), torch.zeros(2, 16, dtype=torch.float64), torch.zeros(16)):
        with pytest.raises(ConfigError):
            affine.encode(values, runs)
    for data in (torch.zeros(2, runs.width + 1, dtype=torch.uint8), torch.zeros(2, runs.width)):
        with pytest.raises(ConfigError):
            affine.decode(data, runs)
    with pytest.raises(ConfigError, match="do not fit"):
        affine.run_errors(torch.zeros(16, 2), torch.zeros(2, 2), torch.zeros(2, 2), 16, affine.INT4)


def windows(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    every = rows.unfold(0, size, 1)
    return every.amin(dim=2), every.amax(dim=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 16, 64])
def test_run_errors_are_what_encoding_loses(kind: int, size: int) -> None:
    generator = np.random.default_rng(case_seed())
    rows = random_values(generator, 70, 37)
    low, high = windows(rows, size)
    runs = affine.layout(torch.tensor([size]), torch.tensor([kind]), size)
    wanted = []
    for start in range(70 - size + 1):
        values = rows[start : start + size].T.contiguous()
        lost = affine.decode(affine.encode(values, runs)[0], runs) - values
        wanted.append(float(lost.double().square().sum()))
    for found in (
        affine.run_errors(rows, low, high, size, kind),
        reference.run_errors(rows, low, high, size, kind),
    ):
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=0)


def test_fp8_rounding_is_torchs() -> None:
    generator = np.random.default_rng(case_seed())
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = every[every.isfinite()].sort().values
    ties = (levels[1:] + levels[:-1]) / 2
    near = torch.cat([levels, ties, torch.nextafter(ties, levels[1:]), torch.nextafter(ties, levels[:-1])])
    wide = torch.from_numpy(generator.uniform(-500, 500, 4000).astype(np.float32))
    tiny = torch.from_numpy((generator.normal(size=4000) * 2.0**-7).astype(np.float32))
    code = torch.cat([near, wide, tiny])
    wanted = code.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    found = code.numpy().copy()
    cpu._round_fp8(found, found.view(np.int32))
    assert np.array_equal(found, wanted.numpy())


@needs_gpu
@pytest.mark.gpu
def test_gpu_gives_the_same_bytes_and_errors() -> None:
    generator = np.random.default_rng(case_seed())
    sizes = torch.tensor([1, 1, 16, 64, 16, 256, 64, 1024, 1])
    types = torch.tensor([1, 3, 3, 3, 2, 2, 0, 1, 2])
    here, there = (affine.layout(sizes, types, 1443, device) for device in ("cpu", "cuda"))
    values = random_values(generator, 300, len(here.live))
    data, overflow = affine.encode(values, here)
    found, overflow_found = affine.encode(values.cuda(), there)
    assert torch.equal(found.cpu(), data)
    assert torch.equal(overflow_found.cpu(), overflow)
    assert torch.equal(affine.decode(found, there).cpu(), affine.decode(data, here))
    rows = values.T[:200].contiguous()
    for kind in KINDS:
        low, high = windows(rows, 64)
        errors = affine.run_errors(rows.cuda(), low.cuda(), high.cuda(), 64, kind)
        torch.testing.assert_close(errors.cpu(), affine.run_errors(rows, low, high, 64, kind), rtol=1e-5, atol=0)
