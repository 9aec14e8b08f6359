"""rANS kernels: the CPU's words, symbols and verdicts, bit for bit, and not a byte outside what they are given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dynamo_kvtc.errors import ConfigError, RecordCorruptError
from dynamo_kvtc.ops import rans
from dynamo_kvtc.ops.rans import reference
from tests.builders import case_seed, laplace_tables
from tests.ops.test_rans import draw, random_tables

POISON = 0x5A
GUARD = 5
"""Columns (and elements) beside every output that must stay as they were."""


class Case:
    """Random symbols and all that coding them takes, on the CPU and on the kernels' device."""

    def __init__(self, device: str, tokens: int, rank: int, split: int, wild: bool = True, offsets: bool = True):
        g = self.generator = np.random.default_rng(case_seed())
        self.device, self.tokens, self.rank, self.split = device, tokens, rank, split
        if wild:
            self.tables = random_tables(g, 7, int(g.integers(2, 100)) * 2)
        else:
            # What is common: no raw bits, few escapes, so that whole chunks take the short way.
            frequencies, shift = laplace_tables(8.0)
            self.tables = rans.ClassTables(frequencies, np.zeros_like(shift))
        count = len(self.tables.shift)
        self.classes = g.integers(0, count, rank).astype(np.uint8)
        self.first = int(g.integers(0, rank + 2))
        self.offsets = g.integers(-3, 4, tokens).astype(np.int8) if offsets else None
        self.symbols = draw(g, self.tables, self.classes, tokens).reshape(tokens, rank)
        if not wild:
            self.symbols = np.clip(self.symbols, -40, 40)
            self.symbols[g.random(self.symbols.shape) < 0.002] = 3000
        self.device_tables = rans.DeviceTables.build(self.tables, device)
        self.words, self.lengths = rans.encode_lanes(
            self.symbols, self.classes, self.tables, self.offsets, self.first, split
        )

    def on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @property
    def coding(self) -> dict:
        offsets = None if self.offsets is None else self.on_device(self.offsets)
        return {"offsets": offsets, "first": self.first, "lanes_per_token": self.split}

    def device_classes(self) -> torch.Tensor:
        dtype = self.generator.choice([np.uint8, np.int32])
        return self.on_device(self.classes.astype(dtype))


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    size = torch.empty((), dtype=dtype).element_size()
    return torch.full((*shape[:-1], shape[-1] * size), POISON, dtype=torch.uint8, device=device).view(dtype)


def untouched(x: torch.Tensor) -> bool:
    return bool((x.contiguous().view(torch.uint8) == POISON).all())


def decode(case: Case, words: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbols and verdicts, the outputs' surroundings checked."""
    symbols = poisoned((case.tokens + 1, case.rank + GUARD), torch.int16, case.device)
    bad = poisoned((case.tokens * case.split + GUARD,), torch.int32, case.device)
    rans.decode_symbols_device(
        case.on_device(words.view(np.int16)), case.on_device(starts), case.on_device(lengths.astype(np.int32)),
        case.device_classes(), case.device_tables, symbols[:-1, : case.rank], bad[:-GUARD], **case.coding,
    )  # fmt: skip
    assert untouched(symbols[-1:])
    assert untouched(symbols[:, case.rank :])
    assert untouched(bad[-GUARD:])
    return symbols[:-1, : case.rank].cpu().numpy(), bad[:-GUARD].cpu().numpy()


SHAPES = [
    (1, 1, 1), (1, 7, 8), (33, 33, 1), (17, 33, 2), (17, 7, 4), (16, 130, 8), (15, 65, 4), (1, 130, 2), (17, 1, 8),
    (3, 0, 2), (0, 5, 2),
]  # fmt: skip


@pytest.mark.parametrize("wild", [True, False])
@pytest.mark.parametrize(("tokens", "rank", "split"), SHAPES)
def test_encoding_makes_the_reference_words(kernel_device, tokens, rank, split, wild):
    case = Case(kernel_device, tokens, rank, split, wild, offsets=tokens != 16)
    lanes = tokens * split
    cap = 2 * -(-rank // split) + 2
    words = poisoned((lanes + 1, cap + GUARD), torch.int16, kernel_device)
    lengths = poisoned((lanes + GUARD,), torch.int32, kernel_device)
    skip = case.generator.random(tokens) < 0.3
    rows = poisoned((tokens, rank + GUARD), torch.int16, kernel_device)
    rows[:, :rank] = case.on_device(case.symbols)
    rans.encode_lanes_device(
        rows[:, :rank], case.device_classes(), case.device_tables, words[:-1, :cap], lengths[:lanes],
        skip=case.on_device(skip) if tokens != 17 else None, **case.coding,
    )  # fmt: skip
    assert untouched(words[-1:])
    assert untouched(words[:, cap:])
    assert untouched(lengths[lanes:])
    expected = np.where(np.repeat(skip, split) & (tokens != 17), 0, case.lengths)
    np.testing.assert_array_equal(lengths[:lanes].cpu().numpy(), expected)
    at = np.cumsum(case.lengths) - case.lengths
    found = words[:-1, :cap].cpu().numpy().view(np.uint16)
    for lane in np.flatnonzero(expected):
        np.testing.assert_array_equal(found[lane, cap - expected[lane] :], case.words[at[lane] :][: expected[lane]])
    if tokens != 17:
        assert untouched(words[:-1, :cap][torch.from_numpy(np.repeat(skip, split))])


@pytest.mark.parametrize("wild", [True, False])
def test_a_lane_that_needs_more_than_its_row_says_so(kernel_device, wild):
    case = Case(kernel_device, 17, 40, 2, wild)
    for cap in (int(np.median(case.lengths)), 1, 0):
        words = poisoned((35, cap + GUARD), torch.int16, kernel_device)
        lengths = poisoned((34,), torch.int32, kernel_device)
        rans.encode_lanes_device(
            case.on_device(case.symbols), case.device_classes(), case.device_tables, words[:-1, :cap], lengths,
            **case.coding,
        )  # fmt: skip
        assert untouched(words[-1:])
        assert untouched(words[:, cap:])
        expected = np.where(case.lengths > cap, -1, case.lengths)
        np.testing.assert_array_equal(lengths.cpu().numpy(), expected)
        at = np.cumsum(case.lengths) - case.lengths
        for lane in np.flatnonzero(expected > 0):
            row = words[lane, cap - expected[lane] : cap].cpu().numpy().view(np.uint16)
            np.testing.assert_array_equal(row, case.words[at[lane] :][: expected[lane]])


@pytest.mark.parametrize("wild", [True, False])
@pytest.mark.parametrize(("tokens", "rank", "split"), SHAPES)
def test_decoding_gives_the_symbols_back(kernel_device, tokens, rank, split, wild):
    """From lanes that lie in another order, with other words between them, some of them not there."""
    case = Case(kernel_device, tokens, rank, split, wild, offsets=tokens != 15)
    lanes = tokens * split
    gone = np.repeat(case.generator.random(tokens) < 0.2, split)
    lengths = np.where(gone, 0, case.lengths)
    own = np.cumsum(case.lengths) - case.lengths
    starts, staging = np.zeros(lanes, np.int64), [case.generator.integers(0, 1 << 16, 3).astype(np.uint16)]
    for lane in case.generator.permutation(lanes):
        starts[lane] = sum(len(part) for part in staging)
        staging.append(case.words[own[lane] :][: lengths[lane]])
        staging.append(case.generator.integers(0, 1 << 16, int(case.generator.integers(3))).astype(np.uint16))
    symbols, bad = decode(case, np.concatenate(staging), starts, lengths)
    np.testing.assert_array_equal(bad, 0)
    np.testing.assert_array_equal(symbols, np.where(gone[::split, None], 0, case.symbols))


@pytest.mark.parametrize(("tokens", "ranks", "split", "wides"), [
    (1, (1,), 1, (16,)), (17, (50, 33), 1, (16, 0)), (16, (66, 1, 200), 2, (32, 16, 16)), (15, (130,), 4, (48,)),
    (5, (130, 64), 8, (16, 64)), (5, (33, 40), 8, (0, 32)), (4, (7,), 4, (16,)), (3, (64, 0), 4, (64, 16)),
])  # fmt: skip
@pytest.mark.parametrize("wild", [True, False])
def test_levels_are_the_reference_levels(kernel_device, tokens, ranks, split, wides, wild):
    """Of several layer groups in one launch, each with its own components, or of some of them, to rows further down."""
    case = Case(kernel_device, tokens, max(ranks), split, wild)
    g, row = case.generator, int(case.generator.integers(0, 3))
    groups, outputs, expected, words, lengths = [], [], [], [], []
    for rank, wide in zip(ranks, wides, strict=True):
        first = min(case.first, wide)
        symbols = case.symbols[:, :rank].copy()
        own = rans.encode_lanes(symbols, case.classes[:rank], case.tables, case.offsets, first, split)
        words.append(own[0])
        lengths.append(own[1].copy())
        lengths[-1][:split] = 0
        centroid = g.uniform(-1, 1, rank).astype(np.float32)
        large = g.random(rank) < 0.2
        scale = np.where(large, g.integers(0, 1 << 20, rank), g.integers(0, 1 << 17, rank)).astype(np.int32)
        bias = g.integers(-(1 << 17), 1 << 17, rank).astype(np.int32)
        high, low = min(wide, rank), max(rank - wide, 0)
        outs = [
            poisoned((tokens + row + 1, -(-(columns + GUARD) // 16) * 16), dtype, kernel_device)
            for columns, dtype in ((high, torch.float16), (low, torch.int8))
        ]
        outputs.append((outs, (high, low)))
        on = [case.on_device(x) for x in (case.classes[:rank], centroid, scale, bias)]
        groups.append(rans.LevelGroup(*on, *outs, wide, first))
        expected.append((symbols, centroid, scale, bias, wide, first))
    factors = g.choice([0.25, 0.5946, 1.0, 2.0], (len(ranks), tokens)).astype(np.float32)
    starts, at = [], 0
    for own_words, own_lengths in zip(words, lengths, strict=True):
        # A lane that is not there has words all the same.
        full = own_lengths.copy()
        full[:split] = -1
        sizes = np.where(full < 0, 0, full)
        missing = len(own_words) - int(sizes.sum())
        starts.append(at + missing + np.cumsum(sizes) - sizes)
        starts[-1][:split] = at
        at += len(own_words)
    bad = poisoned((len(ranks), tokens * split + GUARD), torch.int32, kernel_device)
    offsets = None if case.offsets is None else case.on_device(np.stack([case.offsets] * len(ranks)))
    some = slice(1, None) if len(ranks) == 3 else slice(0, None)
    rans.decode_levels_device(
        case.on_device(np.concatenate(words).view(np.int16)), case.on_device(np.stack(starts))[some],
        case.on_device(np.stack(lengths).astype(np.int32))[some], case.device_tables, rans.LevelGroups.of(groups),
        bad[some, :-GUARD], factors=case.on_device(factors)[some],
        offsets=None if offsets is None else offsets[some], lanes_per_token=split, group=some.start, row=row,
    )  # fmt: skip
    assert untouched(bad[:, -GUARD:])
    for i, ((outs, columns), (symbols, *rest, first)) in enumerate(zip(outputs, expected, strict=True)):
        if i < some.start:
            assert all(untouched(out) for out in outs)
            continue
        np.testing.assert_array_equal(bad[i, :-GUARD].cpu().numpy(), 0)
        symbols[0] = 0
        wanted = reference.levels(symbols, *rest, factors[i], first)
        for out, levels, count in zip(outs, wanted, columns, strict=True):
            found = out[row : row + tokens, :count].cpu().numpy()
            np.testing.assert_array_equal(found.view(np.uint8), np.ascontiguousarray(levels).view(np.uint8))
            assert untouched(out[:row])
            assert untouched(out[row + tokens :])
            assert untouched(out[:, count:])


def verdicts(case: Case, words: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """What the CPU says of each lane, decoded alone as lane s of a token whose other lanes are good."""
    found = []
    for lane, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = words[start : start + length]
        component = np.arange(lane % case.split, case.rank, case.split)
        first = int((component < case.first).sum())
        offset = None if case.offsets is None else case.offsets[lane // case.split :][:1]
        try:
            rans.decode_lanes(own, [len(own)], case.classes[component], case.tables, offset, first)
        except RecordCorruptError:
            found.append(1)
        else:
            found.append(0)
    return np.array(found)


@pytest.mark.parametrize("wild", [True, False])
@pytest.mark.parametrize("split", [1, 4])
def test_damaged_lanes_are_flagged_as_on_the_cpu(kernel_device, split, wild):
    case = Case(kernel_device, 32 // split, 6 * split + 19, split, wild)
    starts = np.cumsum(case.lengths) - case.lengths
    flipped = case.words.copy()
    hit = case.generator.random(len(flipped)) < 0.03
    flipped[hit] ^= (1 << case.generator.integers(0, 16, int(hit.sum()))).astype(np.uint16)
    noise = case.generator.integers(0, 1 << 16, len(flipped)).astype(np.uint16)
    shorter = np.maximum(case.lengths - case.generator.integers(0, 3, len(starts)), 1)
    order = case.generator.permutation(len(starts))
    # The last lane could read beyond the buffer if any could.
    for words, at, lengths in (
        (flipped, starts, case.lengths), (noise, starts, case.lengths), (case.words, starts, shorter),
        (case.words, starts[order], case.lengths[order]), (np.zeros_like(noise), starts, case.lengths),
        (np.full_like(noise, 0xFFFF), starts, case.lengths),
    ):  # fmt: skip
        symbols, bad = decode(case, words, at, lengths)
        expected = verdicts(case, words, at, lengths)
        np.testing.assert_array_equal(bad, expected)
        if words is flipped:
            good = ~expected.reshape(-1, split).any(axis=1)
            undamaged = good & ~np.array([hit[s : s + n].any() for s, n in zip(starts, lengths, strict=True)]).reshape(
                -1, split
            ).any(axis=1)
            np.testing.assert_array_equal(symbols[undamaged], case.symbols[undamaged])


def test_lanes_outside_the_words_are_flagged_and_not_read(kernel_device):
    case = Case(kernel_device, 6, 20, 1)
    starts, lengths = np.cumsum(case.lengths) - case.lengths, case.lengths.copy()
    starts[0], lengths[1], starts[2], lengths[3] = -1, len(case.words) + 1, 1 << 62, -(1 << 31)
    _, bad = decode(case, case.words, starts, lengths)
    assert bad.tolist() == [1, 1, 1, 1, 0, 0]


def test_the_encoder_divides_exactly():
    """As the kernel does it, for every frequency: states next to every kind of multiple, and random ones."""
    f = np.arange(1, 4097, dtype=np.uint64)[:, None]
    generator = np.random.default_rng(case_seed())
    quotients = np.concatenate([np.arange(64), (1 << 20) - 1 - np.arange(64), generator.integers(0, 1 << 20, 500)])
    multiples = f * quotients.astype(np.uint64)[None, :]
    wild = np.broadcast_to(generator.integers(0, 1 << 32, 500, dtype=np.uint64), (4096, 500))
    edge = np.broadcast_to(np.uint64((1 << 32) - 1) - np.arange(4, dtype=np.uint64), (4096, 4))
    x = np.concatenate([multiples, multiples + f - 1, multiples + f // 2, wild, edge], axis=1)
    x = np.minimum(x, (1 << 32) - 1)
    reciprocal = np.minimum((1 << 32) // f, (1 << 32) - 1)
    quotient = (x * reciprocal) >> np.uint64(32)
    assert (quotient <= x // f).all()
    quotient += x - quotient * f >= f
    np.testing.assert_array_equal(quotient, x // f)


def test_device_tables_say_what_the_tables_say():
    tables = random_tables(np.random.default_rng(case_seed()), 9, 30)
    found = rans.DeviceTables.build(tables, "cpu")
    rows = np.arange(9)[:, None]
    column = tables.slots.astype(int)
    entry = found.decode.numpy()
    plain = (column < 29) & (tables.shift == 0)[:, None]
    np.testing.assert_array_equal(entry >> 24, np.where(plain, column - tables.alphabet, -128))
    np.testing.assert_array_equal(((entry >> 12) & 4095) + 1, tables.frequencies[rows, column])
    np.testing.assert_array_equal(entry & 4095, tables.starts[rows, column])
    coarse = np.repeat(found.coarse.numpy(), 16, axis=1)
    mixed = coarse == -0x7F000001
    np.testing.assert_array_equal(coarse[~mixed], entry[~mixed])
    assert (entry != -0x7F000001).all()
    for cell in np.argwhere(mixed[:, ::16]):
        assert len(np.unique(entry[cell[0], cell[1] * 16 :][:16])) > 1


def test_refusals(kernel_device):
    case = Case(kernel_device, 4, 20, 2)
    symbols, classes = case.on_device(case.symbols), case.on_device(case.classes)
    words, lengths = poisoned((8, 22), torch.int16, kernel_device), poisoned((8,), torch.int32, kernel_device)

    def encode(told: str, **changes) -> None:
        arguments = {"symbols": symbols, "classes": classes, "tables": case.device_tables, "words": words,
                     "lengths": lengths, **case.coding} | changes  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            rans.encode_lanes_device(**arguments)

    encode("lanes_per_token is 3", lanes_per_token=3)
    encode("words must be", lanes_per_token=4)
    encode("symbols must be", symbols=symbols.int())
    encode("21", symbols=poisoned((4, 21), torch.int16, kernel_device))
    encode("strides", symbols=symbols.t().contiguous().t())
    encode("classes must be", classes=classes.long())
    encode("offsets must be", offsets=torch.zeros(8, dtype=torch.int8, device=kernel_device))
    encode("skip must be", skip=torch.zeros(5, dtype=torch.bool, device=kernel_device))
    encode("lengths must be", lengths=lengths.long())
    encode("first is -1", first=-1)
    assert untouched(words)
    assert untouched(lengths)

    def groups(told: str, **changes) -> None:
        fields = {
            "classes": classes.to(torch.uint8), "centroid": torch.zeros(20), "scale": torch.zeros(20).int(),
            "bias": torch.zeros(20).int(), "wide": torch.zeros(4, 16).half(),
            "narrow": torch.zeros(4, 16, dtype=torch.int8), "wide_components": 16, "first": 3,
        } | changes  # fmt: skip
        on = {k: v.to(kernel_device) if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
        with pytest.raises(ConfigError, match=told):
            rans.LevelGroups.of([rans.LevelGroup(**on)])

    groups("wide_components is 8", wide_components=8)
    groups("at least first = 17", first=17)
    groups("wide must be", wide=torch.zeros(4, 15).half())
    groups("narrow must be", narrow=torch.zeros(4, 3, dtype=torch.int8))
    groups("narrow's rows must start", narrow=torch.zeros(4, 4, dtype=torch.int8))
    groups("scale must be", scale=torch.zeros(20))
    groups("centroid must be", centroid=torch.zeros(19))

    level_group = rans.LevelGroup(
        *(x.to(kernel_device) for x in (
            classes.to(torch.uint8), torch.zeros(20), torch.zeros(20).int(), torch.zeros(20).int(),
            torch.zeros(4, 16).half(), torch.zeros(4, 16, dtype=torch.int8),
        )), 16, 3,
    )  # fmt: skip

    def levels(told: str, row: int = 0, **changes) -> None:
        arguments = {
            "starts": torch.zeros(1, 8, dtype=torch.int64), "lengths": torch.zeros(1, 8).int(),
            "bad": torch.zeros(1, 8).int(), "factors": torch.ones(1, 4),
        } | changes  # fmt: skip
        on = {k: v.to(kernel_device) for k, v in arguments.items()}
        with pytest.raises(ConfigError, match=told):
            rans.decode_levels_device(
                words[0], tables=case.device_tables, groups=rans.LevelGroups.of([level_group]), row=row,
                lanes_per_token=2, **on,
            )  # fmt: skip

    levels("factors must be", factors=torch.ones(1, 3))
    levels("lengths must be", lengths=torch.zeros(1, 7).int())
    levels("bad must be", bad=torch.zeros(1, 9).int())
    levels("rows 1 to 5", row=1)
    levels("layer groups 0 to 2", starts=torch.zeros(2, 8, dtype=torch.int64), lengths=torch.zeros(2, 8).int(),
           bad=torch.zeros(2, 8).int(), factors=torch.ones(2, 4))  # fmt: skip


def test_a_cpu_tensor_is_refused_where_kernels_are_real(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = Case("cpu", 2, 3, 1)
    with pytest.raises(ConfigError, match="use encode_lanes"):
        rans.encode_lanes_device(
            torch.from_numpy(case.symbols), torch.from_numpy(case.classes), case.device_tables,
            torch.zeros(2, 8, dtype=torch.int16), torch.zeros(2, dtype=torch.int32),
        )  # fmt: skip


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dynamo_kvtc.ops.rans import triton as kernels

POINTERS = dict(
    words="i16", starts="i64", lengths="i32", offsets="i8", classes="u8", lut="i32", coarse="i32", slots="u8",
    shift="i32", symbols="i16", wide="fp16", narrow="i8", bad="i32", centroid="fp32", scale="i32", bias="i32",
    factors="fp32", places="i64",
    skip="u8", table="i64",
)
DECODE = dict(BLOCK=32, OFFSETS=True)
for kernel, constants in [
    (kernels.decode_levels_kernel, dict(DECODE, S=4, GROUPS=1)),
    (kernels.decode_symbols_kernel, dict(DECODE, S=1, GROUPS=4)),
    (kernels.encode_kernel, dict(BLOCK=32, S=4, OFFSETS=True, SKIP=True)),
]:
    types = {n: "*" + POINTERS[n] if n in POINTERS else "i32" for n in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=1))
    print(kernel.__name__, len(compiled.asm["cubin"]) > 0)
"""


def test_the_kernels_compile_for_hopper(monkeypatch):
    """In a process of its own: here they may be interpreted."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=root, timeout=300)
    assert done.stdout.split() == [
        "decode_levels_kernel",
        "True",
        "decode_symbols_kernel",
        "True",
        "encode_kernel",
        "True",
    ], done.stderr[-2000:]
