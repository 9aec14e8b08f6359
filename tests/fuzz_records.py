"""Damages records and artifacts at random: every outcome must be a named error, or a decode nobody can fault.

    python -m tests.fuzz_records --records 20000 --artifacts 500 --seed 1

An unsigned mutation (bytes changed, checksums left) must always be refused. A re-signed one (checksums or digest made
to fit again) may decode, since it says a valid thing: then shapes, dtypes and positions must be right and every coded
value finite. Nothing may crash, raise anything but a KvtcError, or allocate by a forged length: the address space is
capped a little above what the process holds, and its peak of resident memory is looked at.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from dynamo_kvtc.codec import artifact as artifact_module
from dynamo_kvtc.codec.artifact import METADATA_KEY, Artifact, Manifest, parse_artifact
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.errors import ArtifactError, KvtcError, RecordError
from dynamo_kvtc.types import KVShape
from tests.builders import CLASSES, gapped_positions, make_artifact, make_paper_artifact, random_kv

PROFILES = ("kvtc", "paper")
HEADROOM_BYTES = 384 * 2**20
PEAK_GROWTH_BYTES = 96 * 2**20
FIXED_BYTES, ENTRY_BYTES, CHECKSUM = 36, 8, 32
FIELDS = {"magic": (0, 4), "version": (4, 1), "profile": (5, 1), "point": (6, 1), "flags": (7, 1), "artifact": (8, 8),
          "total": (16, 4), "first": (20, 4), "tokens": (24, 2), "exact": (26, 2), "rank": (28, 1), "groups": (29, 1),
          "header": (30, 2)}  # fmt: skip


class FuzzFailure(AssertionError):
    """What a mutation did that it must not."""


def corpus(seed: int, profile: str) -> tuple[BlockCodec, list[bytes]]:
    """The codec of a small artifact of ``profile``, and valid records of all kinds."""
    generator = np.random.default_rng(seed)
    groups = ((0, 1), (1, 3))
    if profile == "paper":
        artifact = make_paper_artifact(KVShape(3, 1, 16, "float16"), groups, seed)[2]
    else:
        lanes = (1, 2, 4, 8)[seed % 4]
        artifact = make_artifact(KVShape(3, 1, 8, "float16"), groups=groups, seed=seed, components=12, lanes=lanes)[2]
    codec = BlockCodec(artifact, "coarse", ExactPolicy(sinks=0))
    records = []
    for i in range(24):
        tokens = int(generator.choice([1, 2, 7, 8, 9, 16, 33]))
        first = int(generator.integers(0, 2**20))
        positions = gapped_positions(tokens, i, first) if i % 2 else torch.arange(first, first + tokens)
        k, v = random_kv(artifact, tokens, seed + i, positions)
        exact = torch.from_numpy(generator.random(tokens) < (0.0, 0.3, 1.0)[i % 3])
        records.append(codec.encode_block(k, v, positions, exact).record)
    return codec, records


# Mutations of bytes. Each takes the generator, the bytes and another valid file to splice with.
def flip_bits(generator: np.random.Generator, data: bytes, other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(int(generator.choice([1, 1, 1, 2, 3, 9]))):
        bit = int(generator.integers(8 * len(out)))
        out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def set_bytes(generator: np.random.Generator, data: bytes, other: bytes) -> bytes:
    out = bytearray(data)
    start = int(generator.integers(len(out)))
    size = int(generator.choice([1, 2, 4, 16]))
    fill = int(generator.choice([0x00, 0xFF, 0xA5, 0x7F]))
    out[start : start + size] = bytes([fill]) * len(out[start : start + size])
    return bytes(out)


def truncate(generator: np.random.Generator, data: bytes, other: bytes) -> bytes:
    return data[: int(generator.integers(len(data)))]


def extend(generator: np.random.Generator, data: bytes, other: bytes) -> bytes:
    return data + generator.bytes(int(generator.choice([1, 2, 8, 300])))


def splice(generator: np.random.Generator, data: bytes, other: bytes) -> bytes:
    return data[: int(generator.integers(len(data) + 1))] + other[int(generator.integers(len(other) + 1)) :]


def overwrite(generator: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """A stretch of the other file over the same place in this one."""
    start = int(generator.integers(len(data)))
    size = int(generator.integers(1, 64))
    return data[:start] + other[start : start + size] + data[start + len(other[start : start + size]) :]


def delete(generator: np.random.Generator, data: bytes, other: bytes) -> bytes:
    start = int(generator.integers(len(data)))
    return data[:start] + data[start + int(generator.integers(1, 9)) :]


def noise(generator: np.random.Generator, data: bytes, other: bytes) -> bytes:
    return data[: int(generator.integers(0, 40))] + generator.bytes(int(generator.integers(0, 400)))


def set_field(generator: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """One header field or section table entry set to a number at an edge, or near what it was."""
    out = bytearray(data)
    offset, size = FIELDS[str(generator.choice(list(FIELDS)))]
    if generator.random() < 0.3:
        offset, size = FIXED_BYTES + 4 * int(generator.integers(4)), 4
    old = int.from_bytes(out[offset : offset + size], "little")
    top = 256**size - 1
    edges = [0, 1, 2, top, top // 2, top // 2 + 1, old + 1, old - 1, 2 * old, int(generator.integers(0, 2**62))]
    out[offset : offset + size] = (edges[int(generator.integers(len(edges)))] % (top + 1)).to_bytes(size, "little")
    return bytes(out)


def hit_sections(generator: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """Damage behind the header only: signed again, it reaches the lane lengths, the rANS decoder and exact tokens."""
    header = int.from_bytes(data[30:32], "little")
    mutate = (flip_bits, flip_bits, set_bytes, delete)[int(generator.integers(4))]
    return data[:header] + mutate(generator, data[header:] or b"\0", other)


BYTE_MUTATIONS = [flip_bits, set_bytes, truncate, extend, splice, overwrite, delete, noise]
RECORD_MUTATIONS = [*BYTE_MUTATIONS, set_field, set_field, hit_sections, hit_sections, hit_sections]


def resign_record(data: bytes, fix_total: bool, fix_sizes: bool) -> bytes:
    """The record with total, section sizes (if asked) and every checksum made to fit what is there."""
    if len(data) < FIXED_BYTES:
        return data
    out = bytearray(data)
    groups, header = out[29], int.from_bytes(out[30:32], "little")
    if fix_total:
        struct.pack_into("<I", out, 16, len(out))
    if FIXED_BYTES + groups * ENTRY_BYTES > len(out):
        return bytes(out)
    if fix_sizes and groups and header < len(out):
        used = sum(struct.unpack_from("<I", out, FIXED_BYTES + i * ENTRY_BYTES)[0] for i in range(groups - 1))
        struct.pack_into("<I", out, FIXED_BYTES + (groups - 1) * ENTRY_BYTES, max(len(out) - header - used, 0) % 2**32)
    at = header
    for i in range(groups):
        (size,) = struct.unpack_from("<I", out, FIXED_BYTES + i * ENTRY_BYTES)
        struct.pack_into("<I", out, FIXED_BYTES + i * ENTRY_BYTES + 4, zlib.crc32(out[at : at + size]))
        at += size
    out[CHECKSUM : CHECKSUM + 4] = b"\0\0\0\0"
    struct.pack_into("<I", out, CHECKSUM, zlib.crc32(out[:header]))
    return bytes(out)


def fuzz_records(count: int, seed: int, counts: Counter[str]) -> None:
    """Profiles in turn. Raises FuzzFailure, naming the mutation, at the first outcome that is not allowed."""
    corpora = {profile: corpus(seed, profile) for profile in PROFILES}
    for codec, records in corpora.values():
        codec.decode_blocks(records)
    for i in range(count):
        profile = PROFILES[i % len(PROFILES)]
        codec, records = corpora[profile]
        generator = np.random.default_rng([seed, i])
        data, other = (records[int(j)] for j in generator.integers(len(records), size=2))
        mutate = RECORD_MUTATIONS[int(generator.integers(len(RECORD_MUTATIONS)))]
        mutated = mutate(generator, data, other)
        signed = bool(generator.random() < 0.5)
        if signed:
            mutated = resign_record(mutated, generator.random() < 0.8, generator.random() < 0.8)
        label = f"{profile} record {i} of seed {seed}: {mutate.__name__}{' re-signed' if signed else ''}"
        outcome = judge(label, lambda c=codec, m=mutated: decode(c, m), RecordError)
        if outcome == "decoded" and mutated in records:
            outcome = "unchanged"
        if outcome == "decoded" and not signed:
            raise FuzzFailure(f"{label}: decoded though its checksums were not made to fit")
        counts[f"{profile} records {'re-signed' if signed else 'unsigned'}: {outcome}"] += 1


def decode(codec: BlockCodec, data: bytes) -> None:
    """Decodes and checks everything a decode promises. Raises RecordError or FuzzFailure."""
    parsed = codec.parse(data)
    k, v, positions = codec.decode_blocks([data])
    shape, tokens = codec.shape, parsed.header.tokens
    for name, x in (("k", k), ("v", v)):
        if x.shape != (shape.layers, shape.kv_heads, tokens, shape.head_dim) or x.dtype != shape.torch_dtype:
            raise FuzzFailure(f"{name} is {x.dtype} {tuple(x.shape)} for {tokens} tokens")
        if not bool(x[:, :, torch.from_numpy(~parsed.header.exact)].isfinite().all()):
            raise FuzzFailure(f"a coded token of {name} is not finite")
    if positions.shape != (tokens,) or not bool(((positions >= 0) & (positions < 2**31)).all()):
        raise FuzzFailure(f"positions are {positions.tolist()[:4]}... for {tokens} tokens")


def judge(label: str, attempt: Callable[[], object], allowed: type[KvtcError]) -> str:
    """ "decoded", or the name of the error. Raises FuzzFailure for an error that is not ``allowed``."""
    try:
        attempt()
    except allowed as exc:
        return type(exc).__name__
    except Exception as exc:
        raise FuzzFailure(f"{label}: {type(exc).__name__}: {exc}") from exc
    return "decoded"


# Lies told in an artifact's manifest or tensors, to be signed again. Each must be refused.
def _set(name: str, value: object) -> Callable[[dict, dict], None]:
    """Sets an element of a tensor, or replaces the tensor by one."""

    def lie(manifest: dict, tensors: dict[str, Tensor]) -> None:
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            tensors[name].reshape(-1)[-1] = value

    lie.__name__ = f"{name} = {value if not isinstance(value, Tensor) else tuple(value.shape)}"
    return lie


def _change(path: str, value: object) -> Callable[[dict, dict], None]:
    def lie(manifest: dict, tensors: dict[str, Tensor]) -> None:
        *parents, last = path.split(".")
        place = manifest
        for part in parents:
            place = place[int(part) if isinstance(place, list) else part]
        if value is KeyError:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value

    lie.__name__ = f"manifest {path} = {str(value)[:60]}"
    return lie


def _drop(name: str) -> Callable[[dict, dict], None]:
    def lie(manifest: dict, tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    lie.__name__ = f"without {name}"
    return lie


NAN, INF = float("nan"), float("inf")
TENSOR_NAMES = ["group0.mean", "group0.weight", "group0.reach", "group0.wide", "group1.narrow", "group1.scale",
                "group1.exponent", "group0.point1.classes", "group0.point1.wide", "group1.point1.error",
                "group0.point1.importance", "group1.point1.bias", "group0.point1.thresholds", "point1.frequencies",
                "point1.shift", "point1.rounding", "point1.centroid", "point1.activity"]  # fmt: skip
LIES = [
    *[_set("rank0.group0.weight", x) for x in (NAN, INF, 0.0, -1.0, 1e-45, 1e38)],
    *[_set("rank0.group1.mean", x) for x in (NAN, INF, -INF, 1e38)],
    *[_set("rank0.group0.point1.error", x) for x in (NAN, INF, -1.0)],
    *[_set("rank0.point1.centroid", x) for x in (NAN, INF, 1.0, -7.0)],
    *[_set("rank0.point1.rounding", x) for x in (-1, 2**20, 2**31 - 1, -(2**31))],
    *[_set("rank0.group0.point1.classes", x) for x in (CLASSES, 64, 255)],
    *[_set("rank0.point1.shift", x) for x in (13, 32, 255)],
    *[_set("rank0.point1.frequencies", x) for x in (0, 1000, 65535)],
    _set("rank0.point1.frequencies", torch.full((CLASSES, 32), 128, dtype=torch.int32)),
    _set("rank0.point1.frequencies", torch.zeros(CLASSES, 32, dtype=torch.uint16)),
    _set("rank0.point1.frequencies", torch.zeros(0, 32, dtype=torch.uint16)),
    _set("rank0.point1.frequencies", torch.full((200, 32), 128, dtype=torch.uint16)),
    _set("rank0.point1.frequencies", torch.full((CLASSES, 31), 128, dtype=torch.uint16)),
    *[_set("rank0.group0.reach", x) for x in (NAN, -1.0, -INF)],
    _set("rank0.group0.reach", torch.zeros(15)),
    _set("rank0.group0.wide", torch.zeros(16, 200, dtype=torch.int8)),
    _set("rank0.group0.wide", torch.zeros(16, 1, dtype=torch.int16)),
    _set("rank0.group0.wide", torch.zeros(17, 12, dtype=torch.int16)),
    _set("rank0.group0.wide", torch.zeros(0, 0, dtype=torch.int16)),
    _set("rank0.group0.wide", torch.full((16, 12), -32768, dtype=torch.int16)),
    _set("rank0.group0.narrow", torch.zeros(16, 12, dtype=torch.int16)),
    _set("rank0.group0.narrow", torch.zeros(16, 1, dtype=torch.int8)),
    _set("rank0.group0.narrow", torch.zeros(17, 12, dtype=torch.int8)),
    _set("rank0.group0.narrow", torch.zeros(0, 12, dtype=torch.int8)),
    *[_set("rank0.group0.scale", x) for x in (0, 255)],
    *[_set("rank0.group0.scale", torch.ones(n, dtype=torch.uint8)) for n in (0, 11, 13)],
    _set("rank0.group0.scale", torch.ones(12, dtype=torch.int32)),
    *[_set("rank0.group0.exponent", x) for x in (-1, 0, 26, 2**31 - 1, -(2**31))],
    *[_set("rank0.group0.exponent", torch.ones(n, dtype=torch.int32)) for n in (0, 2)],
    *[_set("rank0.group0.point1.wide", x) for x in (-1, 5, 13, 2**31 - 1, -(2**31))],
    _set("rank0.group0.point1.wide", torch.ones(1, dtype=torch.int64)),
    _set("rank0.group0.mean", torch.zeros(15)),
    _set("rank0.group0.mean", torch.zeros(1, 16)),
    _set("rank0.group0.mean", torch.zeros(16, dtype=torch.float64)),
    _set("rank0.group0.weight", torch.zeros(())),
    _set("rank0.group0.point1.error", torch.zeros(0)),
    *[_set("rank0.group0.point1.thresholds", x) for x in (-1, -(2**63))],
    *[_set("rank0.group1.point1.thresholds", torch.zeros(n, dtype=torch.int64)) for n in (0, 14, 16)],
    _set("rank0.group1.point1.thresholds", torch.zeros(15, dtype=torch.int32)),
    _set("rank0.group1.point1.thresholds", torch.zeros(1, 15, dtype=torch.int64)),
    *[_set("rank0.point1.activity", x) for x in (-1, -(2**31))],
    *[_set("rank0.point1.activity", torch.zeros(n, dtype=torch.int32)) for n in (0, CLASSES - 1, CLASSES + 1)],
    _set("rank0.point1.activity", torch.zeros(CLASSES, dtype=torch.int64)),
    *[_set("rank0.group0.point1.importance", torch.zeros(2, n, dtype=torch.int32)) for n in (13, 4000)],
    *[_set("rank0.group0.point1.importance", torch.zeros(n, 4, dtype=torch.int32)) for n in (0, 1, 3)],
    _set("rank0.group0.point1.importance", torch.zeros(8, dtype=torch.int32)),
    _set("rank0.group0.point1.importance", torch.zeros(2, 4, dtype=torch.float32)),
    *[_set("rank0.group1.point1.bias", torch.zeros(n, dtype=torch.int32)) for n in (0, 2)],
    _set("rank0.group1.point1.bias", torch.zeros(1, dtype=torch.int64)),
    _set("rank0.group1.point1.bias", torch.zeros((), dtype=torch.int32)),
    *[_drop(f"rank0.{name}") for name in TENSOR_NAMES],
    *[_change("points.1.step", x) for x in (0, -0.25, 1e-300, 1e300, "0.25", None)],
    *[_change("points.1.lanes", x) for x in (0, -1, 3, 16, 10**30, "1", 1.5, None)],
    *[_change("groups", x) for x in ([], [[0, 3], [3, 3]], [[0, 2]], [[1, 3]], [[0, 2], [1, 3]], [[0, 1], [2, 3]],
                                     [[0, 1], [1, 4]], [[-1, 3]], [[0, 1, 3]], [[0, 1]] * 65, 3,
                                     [[i, i + 1] for i in range(3)])],
    *[_change("tp_size", x) for x in (0, -1, 2, 10**9, 2**63, 10**30, 1.5, True)],
    *[_change("shape.layers", x) for x in (0, -3, 2, 4, 10**12, 10**30, "3")],
    *[_change("shape.kv_heads", x) for x in (0, 2, 2**40)],
    *[_change("shape.head_dim", x) for x in (0, 7, 9, 16, 2**62)],
    *[_change("shape.dtype", x) for x in ("float8", "", 16)],
    *[_change("rope.inv_freq", x) for x in ([], [1.0] * 5, [1e300] * 4, [1.0, None], [-1e9], "x", [1.0] * 10000)],
    *[_change("rope.attention_scaling", x) for x in (0, -1.0, 1e300, 1e-300, None)],
    *[_change("rope.style", x) for x in ("", "quarter", 1)],
    *[_change("block_tokens", x) for x in (0, -16, 1025, 2**40)],
    *[_change("profile", x) for x in ("", "kvtc2", 2)],
    *[_change("points", x) for x in ([], [{"name": "a", "step": 1.0, "expected_ratio": 1.0}] * 256)],
    *[_change("points.1.name", x) for x in ("fine", 16)],
    *[_change("format_version", x) for x in (0, 1, 3, -1, "1", None, [1], 10**40)],
    *[_change("digest", x) for x in ("", "zz", 5)],
    *[_change(x, KeyError) for x in ("profile", "model", "shape", "rope", "tp_size", "groups", "points", "calibration",
                                     "format_version", "shape.dtype", "rope.inv_freq", "points.1.step")],
    _change("surprise", 1),
    _change("points.1.surprise", 1),
]  # fmt: skip


LARGEST, LEAST = 2**31 - 1, -(2**31)
# Extreme numbers that are nonsense but harm nobody: such an artifact opens, and what it codes comes back.
ODDITIES = [
    *[_set("rank0.group1.point1.bias", x) for x in (LARGEST, LEAST, 0)],
    *[_set("rank0.group0.point1.importance", x) for x in (LARGEST, LEAST)],
    *[_set("rank0.group0.point1.importance", torch.full((2, 6), x, dtype=torch.int32)) for x in (LARGEST, LEAST, 0)],
    _set("rank0.group0.point1.importance", torch.zeros(2, 0, dtype=torch.int32)),
    *[_set("rank0.point1.activity", torch.full((CLASSES,), x, dtype=torch.int32)) for x in (LARGEST, 0)],
    _set("rank0.group1.point1.thresholds", 2**63 - 1),
    *[_set("rank0.group1.point1.thresholds", torch.full((15,), x)) for x in (2**63 - 1, -(2**63), 0)],
    *[_set("rank0.group0.reach", x) for x in (INF, 1e38)],
]


def forge_artifact(data: bytes, lie: Callable[[dict, dict], None]) -> bytes:
    """The artifact with one lie told and the digest made to fit wherever the manifest can still be read."""
    (size,) = struct.unpack_from("<Q", data)
    manifest = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][METADATA_KEY])
    tensors = {name: tensor.clone() for name, tensor in load_tensors(data).items()}
    lie(manifest, tensors)
    if not lie.__name__.startswith("manifest digest"):
        try:
            parsed = msgspec.json.decode(json.dumps(manifest), type=Manifest)
            manifest["digest"] = artifact_module._digest(parsed, tensors)
        except msgspec.MsgspecError:
            pass
    return save_tensors(tensors, metadata={METADATA_KEY: json.dumps(manifest)})


def header_lies(data: bytes, generator: np.random.Generator) -> bytes:
    """The safetensors header forged: its length, a tensor's shape, offsets or dtype, or nonsense in the manifest."""
    (size,) = struct.unpack_from("<Q", data)
    kind = int(generator.integers(6))
    if kind == 0:
        lengths = [0, 1, size - 1, size + 1, len(data), len(data) - 8, 2**32, 2**63, 2**64 - 1]
        return struct.pack("<Q", lengths[int(generator.integers(len(lengths)))]) + data[8:]
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    entry = header[names[int(generator.integers(len(names)))]]
    if kind == 1:
        entry["shape"] = [[2**40], [2**32, 2**32], [-1], [1, 1, 1, 1], [0], ["4"]][int(generator.integers(6))]
    elif kind == 2:
        entry["data_offsets"] = [[0, 2**50], [2**63, 2**64 - 1], [8, 4], [0, 0], [-4, 4]][int(generator.integers(5))]
    elif kind == 3:
        entry["dtype"] = str(generator.choice(["F64", "I8", "F9", "BOOL", ""]))
    elif kind == 4:
        nested = "[" * 200_000
        header["__metadata__"][METADATA_KEY] = str(generator.choice(["", "{}", "null", "\ud800", nested, "[1]"]))
    else:
        header["__metadata__"] = [None, [], 5, {METADATA_KEY: 5}, {"other": "x"}][int(generator.integers(5))]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def fuzz_artifacts(count: int, seed: int, counts: Counter[str]) -> None:
    """Raises FuzzFailure, naming the mutation, at the first outcome that is not allowed."""
    manifest, tensors, _ = make_artifact(KVShape(3, 1, 8, "float16"), groups=((0, 1), (1, 3)), seed=seed, components=12)
    files = [save_tensors(tensors, metadata={METADATA_KEY: msgspec.json.encode(manifest).decode()})]
    manifest, tensors, _ = make_artifact(KVShape(2, 2, 8, "bfloat16"), seed=seed + 1, components=12)
    files.append(save_tensors(tensors, metadata={METADATA_KEY: msgspec.json.encode(manifest).decode()}))
    manifest, tensors, _ = make_paper_artifact(KVShape(3, 1, 16, "float16"), ((0, 1), (1, 3)), seed)
    files.append(save_tensors(tensors, metadata={METADATA_KEY: msgspec.json.encode(manifest).decode()}))
    meanings = [meaning(parse_artifact(data)) for data in files]
    large = large_artifact(seed)
    for i in range(count):
        generator = np.random.default_rng([seed, i, 1])
        if i % 2 == 0:
            lie = LIES[i // 2] if i // 2 < len(LIES) else LIES[int(generator.integers(len(LIES)))]
            mutated, label, kind = forge_artifact(files[0], lie), lie.__name__, "re-signed"
        elif i % 4 == 1:
            mutated, label, kind = header_lies(files[i // 4 % 2 * 2], generator), "header_lies", "header"
        elif i % 12 == 3:
            oddity = ODDITIES[i // 12 % len(ODDITIES)]
            label = f"artifact {i} of seed {seed}: {oddity.__name__}"
            odd = forge_artifact(large, oddity)
            counts[f"artifacts odd: {judge(label, lambda d=odd, s=seed + i: use_artifact(d, s), KvtcError)}"] += 1
            continue
        else:
            which, other = generator.choice(len(files), 2, replace=False).tolist()
            mutate = BYTE_MUTATIONS[int(generator.integers(len(BYTE_MUTATIONS)))]
            mutated, label, kind = mutate(generator, files[which], files[other]), mutate.__name__, "unsigned"
        label = f"artifact {i} of seed {seed}: {label}"
        opened: list[Artifact] = []

        def attempt(data: bytes = mutated, opened: list[Artifact] = opened) -> None:
            opened.append(parse_artifact(data))
            BlockCodec(opened[0], "coarse")

        outcome = judge(label, attempt, ArtifactError)
        # The digest covers what an artifact says, not the spelling: 0.10 for 0.1 in its JSON is no other artifact.
        if outcome == "decoded" and kind != "re-signed" and meaning(opened[0]) in meanings:
            outcome = "unchanged"
        if outcome == "decoded":
            raise FuzzFailure(f"{label}: was taken for a usable artifact")
        counts[f"artifacts {kind}: {outcome}"] += 1


def large_artifact(seed: int) -> bytes:
    """An artifact of 384 and 768 channels, two lanes a token, signed: with fewer channels, components leak into each
    other, and coding what was decoded need not give the same record."""
    manifest, tensors, _ = make_artifact(
        KVShape(3, 2, 96, "float16"), groups=((0, 1), (1, 3)), seed=seed, components=12, lanes=2
    )
    return save_tensors(tensors, metadata={METADATA_KEY: msgspec.json.encode(manifest).decode()})


def use_artifact(data: bytes, seed: int) -> None:
    """Codes random tokens with it, decodes them, and codes what came back. Raises FuzzFailure if anything is off."""
    artifact = parse_artifact(data)
    codec = BlockCodec(artifact, "coarse", ExactPolicy(sinks=0, max_error=float("inf")))
    k, v = random_kv(artifact, 20, seed)
    block = codec.encode_block(k, v, torch.arange(20))
    decode(codec, block.record)
    if block.exact.total == 20:
        raise FuzzFailure("no token could be coded")
    exact = torch.from_numpy(codec.parse(block.record).header.exact)
    if codec.encode_block(*codec.decode_block(block.record), exact).record != block.record:
        raise FuzzFailure("coding what was decoded gives another record")


def meaning(artifact: Artifact) -> tuple[Manifest, str]:
    return artifact.manifest, artifact_module._digest(artifact.manifest, artifact._tensors)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Within it, no more than HEADROOM_BYTES can be mapped; afterwards, resident memory must have grown little."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    old = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(statm.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (mapped + HEADROOM_BYTES, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > PEAK_GROWTH_BYTES:
        raise FuzzFailure(f"resident memory grew by {grown} bytes; allowed is {PEAK_GROWTH_BYTES}")


def warm_up(seed: int) -> None:
    """Compiles the kernels and starts the threads, so that what memory is mapped later is the codec's."""
    for profile in PROFILES:
        codec, records = corpus(seed, profile)
        codec.decode_blocks(records)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20000)
    parser.add_argument("--artifacts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, printed")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed {seed}", flush=True)
    counts: Counter[str] = Counter()
    started = time.monotonic()
    warm_up(seed)
    with bounded_memory():
        fuzz_records(options.records, seed, counts)
        fuzz_artifacts(options.artifacts, seed, counts)
    for name, number in sorted(counts.items()):
        print(f"{number:7d}  {name}")
    print(
        f"{options.records} records and {options.artifacts} artifacts in {time.monotonic() - started:.0f} s: no failure"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
