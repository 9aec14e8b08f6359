"""The paged cache: the reference against plain indexing, the kernels against the reference, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamo_kvtc.codec.channels import join_rows
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import pages
from dynamo_kvtc.ops.pages import INPUT_MAX, FixedInputs, PagedCache, reference
from dynamo_kvtc.ops.rope import Rotations, apply_rope, remove_rope
from tests.builders import case_seed, same_bits
from tests.ops.paged import Paged, moved, poisoned_rows, random_inputs, random_rope, random_slots

# layout, dtype, heads, head dim, rotated pairs, style, tokens
CASES = [
    ("heads-first", torch.bfloat16, 3, 64, 32, "half", 17),
    ("tokens-first", torch.float16, 1, 96, 48, "half", 16),
    ("cross-layer", torch.bfloat16, 4, 128, 64, "half", 15),
    ("tokens-first", torch.float32, 3, 20, 10, "interleaved", 17),
    ("heads-first", torch.bfloat16, 2, 96, 20, "half", 33),
    ("cross-layer", torch.float32, 1, 64, 8, "interleaved", 1),
    ("heads-first", torch.float16, 3, 20, 3, "half", 16),
]
case = pytest.mark.parametrize(("layout", "dtype", "heads", "dim", "pairs", "style", "tokens"), CASES)
LAYERS = (1, 3)


def kernels():
    return pytest.importorskip("dynamo_kvtc.ops.pages.triton")


def angles(rope, tokens, generator):
    return Rotations(rope).at(torch.from_numpy(generator.integers(0, 2**31, tokens)))


def contiguous(cache: PagedCache, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v [Lg, H, T, D] of LAYERS, a token at a time."""
    n = cache.tokens_per_block
    return tuple(
        torch.stack([torch.stack([x[s // n, :, s % n] for s in slots.tolist()], dim=1) for x in views[slice(*LAYERS)]])
        for views in (cache.k, cache.v)
    )  # type: ignore[return-value]


def joined(low, high, inputs):
    """The inputs that two bytes stand for, int64 [T, P]; narrow ones as clamped."""
    out = low.long()
    wide = inputs.wide_slot >= 0
    out[:, wide] += 256 * high[:, inputs.wide_slot[wide].long()].long()
    return out


@case
def test_fixed_inputs_are_those_of_the_contiguous_cache(layout, dtype, heads, dim, pairs, style, tokens):
    generator = np.random.default_rng(case_seed())
    cache = Paged.random(layout, dtype, 4, 5, heads, 16, dim, generator).cache
    slots, rope = random_slots(cache, tokens, generator), random_rope(style, pairs, generator)
    channels = cache.channels(LAYERS)
    inputs = random_inputs(channels, dim, generator)
    positions = torch.from_numpy(generator.integers(0, 2**31, tokens))
    cos, sin = Rotations(rope).at(positions)
    out = poisoned_rows(tokens, channels, inputs.wide, "cpu")
    pages.gather_fixed(cache, LAYERS, slots, cos, sin, rope, inputs, out)

    k, v = contiguous(cache, slots)
    rows = join_rows(remove_rope(k.float(), positions, rope), v.float())
    fixed = ((rows - inputs.mean) * inputs.gain).round()
    saturated = (fixed.abs() > INPUT_MAX).any(dim=1)
    exact = fixed.clamp(-INPUT_MAX, INPUT_MAX).long()
    assert torch.equal(out.saturated.bool(), saturated)
    assert torch.equal(out.energy, exact.square().sum(dim=1))
    narrow = torch.where(inputs.wide_slot >= 0, exact, exact.clamp(-127, 127))
    assert torch.equal(joined(out.low[:, :channels], out.high, inputs), narrow)
    assert bool((out.low[:, channels:] == 0x55).all())
    assert bool((out.high[:, inputs.wide :] == 0x55).all())


@case
def test_the_kernel_gathers_the_same_bytes(layout, dtype, heads, dim, pairs, style, tokens, kernel_device):
    generator = np.random.default_rng(case_seed())
    paged = Paged.random(layout, dtype, 4, 5, heads, 16, dim, generator)
    cache = paged.cache
    slots, rope = random_slots(cache, tokens, generator), random_rope(style, pairs, generator)
    n, group = cache.tokens_per_block, cache.k[LAYERS[0] : LAYERS[1]]
    for t, value in zip(range(0, tokens, 3), (float("nan"), float("inf"), -float("inf"), 3e38), strict=False):
        group[t % 2][slots[t] // n, 0, slots[t] % n, t % dim] = value
    if tokens > 2:
        slots[1], slots[tokens - 1] = -1, cache.slots
    channels = cache.channels(LAYERS)
    inputs = random_inputs(channels, dim, generator, wide=0.0 if tokens == 16 else 0.1)
    cos, sin = angles(rope, tokens, generator)
    truth = poisoned_rows(tokens, channels, inputs.wide, "cpu")
    reference.gather_fixed(cache, LAYERS, slots, cos, sin, rope, inputs, truth)
    assert int(truth.saturated[0]) == 1

    there, out = paged.on(kernel_device, layout), poisoned_rows(tokens, channels, inputs.wide, kernel_device)
    on = [x.to(kernel_device) for x in (slots, cos, sin)]
    kernels().gather_fixed(there.cache, LAYERS, *on, rope, moved(inputs, kernel_device), out)
    assert torch.equal(out.saturated.cpu(), truth.saturated)
    coded = truth.saturated == 0
    for name in ("low", "high", "energy"):
        assert torch.equal(getattr(out, name).cpu()[coded], getattr(truth, name)[coded]), name
    assert bool((out.low[:, channels:] == 0x55).all())
    assert bool((out.high[:, inputs.wide :] == 0x55).all())
    assert same_bits(there.memory.cpu(), paged.memory)


def test_inputs_at_the_edges_of_a_byte_and_of_the_range(kernel_device):
    """Halves round to even; 32639.5 is the first that saturates, and nothing beyond it does not; -32639 to 32639 are
    two bytes."""
    values = [0.5, 1.5, -2.5, 127.5, -128.5, 128.0, -128.0, 255.5, 32639.0, -32639.0, 32639.49]
    values += [32639.5, -32640.0, 2.0**22, -(2.0**24) - 2.0**23, 1e30, -float("inf")]
    memory = torch.zeros(1, 1, 2, len(values), 1, 4)
    memory[0, 0, 0, :, 0, 0] = memory[0, 0, 1, :, 0, 1] = torch.tensor(values)
    wide_slot = torch.tensor([0] + [-1] * 7, dtype=torch.int32)
    inputs = FixedInputs.of(torch.zeros(8), torch.ones(8), wide_slot, 4)
    rope, slots = random_rope("half", 2, np.random.default_rng(0), 1.0), torch.arange(len(values))
    cos, sin = Rotations(rope).at(torch.zeros(len(values), dtype=torch.int64))
    out = poisoned_rows(len(values), 8, 1, kernel_device)
    cache = Paged.of(memory.to(kernel_device), "tokens-first").cache
    on = [x.to(kernel_device) for x in (slots, cos, sin)]
    kernels().gather_fixed(cache, (0, 1), *on, rope, moved(inputs, kernel_device), out)
    want = [0, 2, -2, 128, -128, 128, -128, 256, 32639, -32639, 32639]
    assert out.saturated.tolist() == [0] * 11 + [1] * 6
    assert (out.low[:11, 0].int() + 256 * out.high[:11, 0].int()).tolist() == want
    assert out.low[:11, 5].tolist() == [max(-127, min(127, x)) for x in want]
    assert out.energy[:11].tolist() == [2 * x * x for x in want]


@case
def test_scattered_rows_are_those_of_the_contiguous_cache(layout, dtype, heads, dim, pairs, style, tokens):
    generator = np.random.default_rng(case_seed())
    cache = Paged.random(layout, dtype, 4, 5, heads, 16, dim, generator).cache
    slots, rope = random_slots(cache, tokens, generator), random_rope(style, pairs, generator)
    rows = torch.from_numpy(generator.standard_normal((tokens, cache.channels(LAYERS)))).float()
    positions = torch.from_numpy(generator.integers(0, 2**31, tokens))
    cos, sin = Rotations(rope).at(positions)
    ones = torch.ones(tokens, dtype=torch.uint8)
    pages.scatter_rows(cache, LAYERS, slots, rows, cos, sin, rope, ones)
    k, v = contiguous(cache, slots)
    half = rows.shape[1] // 2
    shaped = [x.reshape(tokens, 2, heads, dim).permute(1, 2, 0, 3) for x in (rows[:, :half], rows[:, half:])]
    assert same_bits(k, apply_rope(shaped[0].contiguous(), positions, rope).to(dtype))
    assert same_bits(v, shaped[1].contiguous().to(dtype))


@case
def test_the_kernel_scatters_the_same_bits(layout, dtype, heads, dim, pairs, style, tokens, kernel_device):
    generator = np.random.default_rng(case_seed())
    paged = Paged.random(layout, dtype, 4, 5, heads, 16, dim, generator)
    there = paged.on(kernel_device, layout)
    slots, rope = random_slots(paged.cache, tokens, generator), random_rope(style, pairs, generator)
    slots[1::5] = -1
    slots[2::7] = paged.cache.slots + 3
    # Every exponent that float32 has: values beyond the dtype's, its subnormals, ties.
    shape = (tokens, paged.cache.channels(LAYERS))
    rows = torch.from_numpy(generator.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32))
    usual = torch.from_numpy(generator.standard_normal(shape)).float()
    rows = torch.where(rows.isnan() | torch.from_numpy(generator.random(shape) < 0.5), usual, rows)
    rows[torch.from_numpy(generator.random(shape) < 0.1)] = 1.0 + 2.0**-8
    cos, sin = angles(rope, tokens, generator)
    keep = torch.from_numpy(generator.integers(0, 3, tokens).astype(np.uint8))
    reference.scatter_rows(paged.cache, LAYERS, slots, rows, cos, sin, rope, keep)
    on = [x.to(kernel_device) for x in (slots, rows, cos, sin)]
    kernels().scatter_rows(there.cache, LAYERS, *on, rope, keep.to(kernel_device))
    found, truth = there.memory.cpu(), paged.memory
    # Two infinities make a NaN, whose sign is the machine's.
    assert torch.equal(found.isnan(), truth.isnan())
    zeroed = [torch.where(x.isnan(), 0, x) for x in (found, truth)]
    assert same_bits(*zeroed)


def records(tokens, layers, cache, generator):
    """base, index, count of tokens in records of 1 to 4 exact tokens, and the buffer's bytes: gaps of 2 to 30."""
    base, index, count, at = [], [], [], 2
    while len(base) < tokens:
        exact = min(int(generator.integers(1, 5)), tokens - len(base))
        base += [at] * exact
        index += range(exact)
        count += [exact] * exact
        at += exact * cache.channels(layers) * cache.dtype.itemsize + 2 * int(generator.integers(1, 16))
    return torch.tensor(base), torch.tensor(index, dtype=torch.int32), torch.tensor(count, dtype=torch.int32), at


@case
def test_exact_tokens_leave_as_sections_have_them_and_come_back(layout, dtype, heads, dim, pairs, style, tokens):
    generator = np.random.default_rng(case_seed())
    paged = Paged.random(layout, dtype, 4, 5, heads, 16, dim, generator)
    slots = random_slots(paged.cache, tokens, generator)
    base, index, count, size = records(tokens, LAYERS, paged.cache, generator)
    buffer = torch.full((size,), 0xA5, dtype=torch.uint8)
    pages.gather_exact(paged.cache, [LAYERS], slots, base[None], index, count, buffer)
    left = torch.ones(size, dtype=torch.bool)
    for start in base.unique().tolist():
        of = slots[base == start]
        section = torch.stack(contiguous(paged.cache, of), dim=2).contiguous().view(torch.uint8).flatten()
        assert torch.equal(buffer[start : start + len(section)], section)
        left[start : start + len(section)] = False
    assert bool((buffer[left] == 0xA5).all())

    blank = Paged.of(torch.zeros_like(paged.memory), layout)
    pages.scatter_exact(blank.cache, [LAYERS], slots, base[None], index, count, buffer)
    for mine, truth in zip(contiguous(blank.cache, slots), contiguous(paged.cache, slots), strict=True):
        assert same_bits(mine, truth)
    assert int((blank.memory != 0).sum()) <= tokens * blank.cache.channels(LAYERS)


@case
@pytest.mark.parametrize("pinned", [False, True])
def test_the_kernel_moves_the_same_exact_bytes(layout, dtype, heads, dim, pairs, style, tokens, pinned, kernel_device):
    if pinned and kernel_device == "cpu":
        pytest.skip("pinned memory needs an NVIDIA GPU")
    generator = np.random.default_rng(case_seed())
    paged = Paged.random(layout, dtype, 4, 5, heads, 16, dim, generator)
    slots = random_slots(paged.cache, tokens, generator)
    first, index, count, size = records(tokens, LAYERS, paged.cache, generator)
    # A smaller group of the same records, behind the others.
    groups, base, size = [LAYERS, (3, 4)], torch.stack([first, first + size]), 2 * size
    # A slot that is not there, a record that is cut off, one before the buffer, one at an odd byte. None may overlap:
    # on a GPU the order of their writes would decide.
    if tokens > 15:
        slots[2], slots[5] = -1, paged.cache.slots
        base[:, first == first[9]] = -(2**40)
        base[:, first == first[13]] += 1
    buffer = torch.full((size - 2 * dim,), 0xA5, dtype=torch.uint8)
    there = paged.on(kernel_device, layout)
    on = [x.to(kernel_device) for x in (slots, base, index, count)]
    mine = buffer.pin_memory() if pinned else buffer.to(kernel_device, copy=True)
    reference.move_exact(paged.cache, groups, slots, base, index, count, buffer, False)
    kernels().move_exact(there.cache, groups, *on, mine, False)
    if kernel_device == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(mine.cpu(), buffer)

    noise = torch.from_numpy(generator.integers(0, 256, len(buffer), dtype=np.uint8))
    reference.move_exact(paged.cache, groups, slots, base, index, count, noise, True)
    mine.copy_(noise)
    kernels().move_exact(there.cache, groups, *on, mine, True)
    # NaNs of any payload among them: compared as bytes.
    assert torch.equal(there.memory.cpu().view(torch.uint8), paged.memory.view(torch.uint8))


def test_no_tokens_at_all(kernel_device):
    cache = Paged.random("heads-first", torch.bfloat16, 1, 1, 1, 4, 8, np.random.default_rng(0)).on(
        kernel_device, "heads-first"
    )
    none = torch.empty(0, dtype=torch.int64, device=kernel_device)
    rope = random_rope("half", 4, np.random.default_rng(0))
    inputs = moved(random_inputs(16, 8, np.random.default_rng(0)), kernel_device)
    for module in (kernels(), reference):
        out = poisoned_rows(0, 16, inputs.wide, kernel_device)
        cos = torch.empty(0, 4, device=kernel_device)
        module.gather_fixed(cache.cache, (0, 1), none, cos, cos, rope, inputs, out)
        module.scatter_rows(cache.cache, (0, 1), none, torch.empty(0, 16, device=kernel_device), cos, cos, rope, none)
        module.move_exact(cache.cache, [(0, 1)], none, none[None], none, none, torch.empty(0, dtype=torch.uint8), False)


def test_slots_of_a_block_table():
    for dtype in (torch.int32, torch.int64):
        assert pages.slots_of(torch.tensor([3, 0, 5], dtype=dtype), 2).tolist() == [6, 7, 0, 1, 10, 11]
    with pytest.raises(ConfigError, match="float32"):
        pages.slots_of(torch.zeros(3), 2)
    with pytest.raises(ConfigError, match="0 tokens a block"):
        pages.slots_of(torch.arange(3), 0)


def test_check_slots():
    cache = Paged.random("heads-first", torch.bfloat16, 1, 3, 1, 4, 8, np.random.default_rng(0)).cache
    pages.check_slots(cache, torch.tensor([11, 0, 11]))
    pages.check_slots(cache, torch.empty(0, dtype=torch.int64))
    for bad, told in [
        (torch.tensor([0, 12]), "0 to 12; the cache has 12"),
        (torch.tensor([3, -1]), "-1 to 3"),
        (torch.tensor([3], dtype=torch.int32), "int32"),
        (torch.tensor([11, 0, 11]), "twice"),
    ]:
        with pytest.raises(ConfigError, match=told):
            pages.check_slots(cache, bad, written=True)


def test_a_cache_is_refused_unless_all_views_are_alike():
    k = torch.zeros(3, 2, 4, 8)
    for ks, vs, told in [
        ([], [], "1 layer or more"),
        ([k], [k, k], "1 of K, 2 of V"),
        ([k[0]], [k[0]], "layer 0"),
        ([k.double()], [k.double()], "float64"),
        ([k, k], [k, k.half()], "layer 1: V is torch.float16"),
        ([k, k[:2]], [k, k], r"layer 1: K is .*\(2, 2, 4, 8\)"),
        ([k], [torch.zeros(3, 2, 4, 16)[..., :8]], r"layer 0: V .* strides \(128, 64, 16, 1\)"),
        ([k.to("meta")], [k], "meta"),
        ([k.transpose(2, 3)], [k.transpose(2, 3)], "must be 1"),
        ([k[:1].expand(3, 2, 4, 8)], [k[:1].expand(3, 2, 4, 8)], "share memory"),
        ([k.as_strided((3, 2, 4, 8), (63, 32, 8, 1))], [k.as_strided((3, 2, 4, 8), (63, 32, 8, 1))], "share memory"),
        ([k[:0]], [k[:0]], r"\(0, 2, 4, 8\)"),
    ]:
        with pytest.raises(ConfigError, match=told):
            PagedCache.of(ks, vs)
    # A single head or token may have any stride.
    PagedCache.of([torch.zeros(3, 1, 4, 8).expand(3, 1, 4, 8)], [torch.zeros(3, 1, 4, 8)])


def test_a_cache_knows_its_shape():
    cache = Paged.random("cross-layer", torch.float16, 4, 5, 3, 16, 20, np.random.default_rng(0)).cache
    assert (cache.layers, cache.blocks, cache.heads, cache.tokens_per_block, cache.head_dim) == (4, 5, 3, 16, 20)
    assert (cache.slots, cache.channels((1, 3)), cache.dtype) == (80, 240, torch.float16)
    assert cache.strides == (4 * 2 * 3 * 16 * 20, 16 * 20, 20)
    assert cache.addresses.tolist() == [[k.data_ptr(), v.data_ptr()] for k, v in zip(cache.k, cache.v, strict=True)]


def test_inputs_are_refused_if_columns_are_not_numbered():
    ones = torch.ones(16)
    for slot, dim, told in [
        ([-1] * 14 + [0, 0], 8, "number its 2 wide"),
        ([-1] * 14 + [0, 2], 8, "0 to 1"),
        ([-1] * 15, 8, r"wide_slot must be torch.int32 \[16\]"),
        ([-1] * 16, 5, "multiple of 2 heads of 5"),
    ]:
        with pytest.raises(ConfigError, match=told):
            FixedInputs.of(ones, ones, torch.tensor(slot, dtype=torch.int32), dim)


def test_calls_are_refused_before_anything_is_touched():
    generator = np.random.default_rng(0)
    cache = Paged.random("heads-first", torch.bfloat16, 2, 3, 1, 4, 8, generator).cache
    rope, slots = random_rope("half", 4, generator), torch.arange(5)
    cos, sin = angles(rope, 5, generator)
    inputs = random_inputs(32, 8, generator)
    rows, keep = torch.zeros(5, 32), torch.ones(5, dtype=torch.uint8)
    out = poisoned_rows(5, 32, inputs.wide, "cpu")
    for change, told in [
        ({"layers": (1, 3)}, r"\[1, 3\) are asked for; the cache has 2"),
        ({"layers": (1, 1)}, r"\[1, 1\)"),
        ({"layers": (0, 1)}, "32 channels, 4 heads; layers .* have 16"),
        ({"slots": slots.int()}, "slots must be torch.int64"),
        ({"slots": slots[None]}, "slots"),
        ({"cos": cos[:4]}, r"cos must be torch.float32 \[5, 4\]"),
        ({"sin": sin.double()}, "sin"),
        ({"rope": random_rope("half", 5, generator)}, "rotates 10 dims but the head has 8"),
        ({"inputs": random_inputs(32, 4, generator)}, "heads of 8"),
        ({"out": poisoned_rows(4, 32, inputs.wide, "cpu")}, r"low must be torch.int8 \[5, 32 or more\]"),
        ({"out": poisoned_rows(5, 24, inputs.wide, "cpu")}, "low"),
    ]:
        good = {"layers": (0, 2), "slots": slots, "cos": cos, "sin": sin, "rope": rope, "inputs": inputs, "out": out}
        with pytest.raises(ConfigError, match=told):
            pages.gather_fixed(cache, **{**good, **change})
    assert bool((out.low == 0x55).all())
    for bad_rows, bad_keep, told in [
        (rows[:, :31], keep, r"rows must be torch.float32 \[5, 32\]"),
        (torch.zeros(32, 5).T, keep, "contiguous rows"),
        (rows, keep.bool(), "keep must be torch.uint8"),
    ]:
        with pytest.raises(ConfigError, match=told):
            pages.scatter_rows(cache, (0, 2), slots, bad_rows, cos, sin, rope, bad_keep)
    base, index = slots[None] * 2, slots.int()
    buffer = torch.zeros(101, dtype=torch.uint8)
    for move in (pages.gather_exact, pages.scatter_exact):
        for bad, told in [
            ((slots, index, index, index, buffer), "base must be torch.int64"),
            ((slots, base, slots, index, buffer), "index must be torch.int32"),
            ((slots, base, index, index[:4], buffer), r"count must be torch.int32 \[5\]"),
            ((slots, base, index, index, buffer.to("meta")), "pinned"),
            ((slots, base, index, index, buffer[1:]), "odd address"),
        ]:
            with pytest.raises(ConfigError, match=told):
                move(cache, [(0, 2)], *bad)
        for groups in ([], [(1, 2), (0, 1)]):
            with pytest.raises(ConfigError, match="follow each other"):
                move(cache, groups, slots, base, index, index, buffer)
