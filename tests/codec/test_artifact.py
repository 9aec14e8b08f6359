"""Artifacts on disk: whole or not at all, verified when opened, refused for another model."""

from __future__ import annotations

import errno
import json
import os
import struct

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors

from dynamo_kvtc.codec import artifact as artifact_module
from dynamo_kvtc.codec.artifact import Artifact, load_artifact, parse_artifact, rank_shape, save_artifact
from dynamo_kvtc.errors import (
    ArtifactError,
    ArtifactFormatError,
    ArtifactMismatchError,
    ArtifactVersionError,
    ConfigError,
)
from dynamo_kvtc.types import KVShape, ModelIdentity, RopeSpec
from tests.builders import case_seed, make_artifact, same_bits

SHAPE = KVShape(2, 2, 8, "bfloat16")


@pytest.fixture
def made():
    return make_artifact(SHAPE, groups=((0, 1), (1, 2)), components=6, seed=case_seed())


@pytest.fixture
def path(made, tmp_path):
    path = tmp_path / "sub" / "model.kvtc"
    save_artifact(path, made[0], made[1])
    return path


def test_round_trip(made, path):
    manifest, tensors, _ = made
    opened = load_artifact(path)
    assert opened.manifest == manifest
    assert opened.digest == manifest.digest
    assert set(opened._tensors) == set(tensors)
    assert all(same_bits(opened._tensors[name], tensors[name]) for name in tensors)
    assert opened.bytes_on_device() == sum(t.nbytes for t in tensors.values())
    assert opened.fingerprint == struct.unpack("<Q", bytes.fromhex(manifest.digest)[:8])[0]


def test_the_digest_does_not_depend_on_the_order_or_layout_of_tensors(made, tmp_path):
    manifest, tensors, _ = made
    turned = {name: tensors[name].t().contiguous().t() if tensors[name].dim() == 2 else tensors[name]
              for name in reversed(tensors)}  # fmt: skip
    assert save_artifact(tmp_path / "a", manifest, turned).digest == manifest.digest


def test_the_digest_covers_every_tensor_and_field(made, tmp_path):
    manifest, tensors, _ = made
    digests = {manifest.digest}
    for name in tensors:
        other = tensors[name].clone()
        other.reshape(-1).view(torch.uint8)[0] ^= 1
        digests.add(save_artifact(tmp_path / "a", manifest, {**tensors, name: other}).digest)
    for change in ({"block_tokens": 17}, {"calibration": {}}, {"profile": "paper"}, {"points": manifest.points[:1]}):
        digests.add(save_artifact(tmp_path / "a", msgspec.structs.replace(manifest, **change), tensors).digest)
    assert len(digests) == 1 + len(tensors) + 4


@pytest.mark.parametrize("broken", ["write", "fsync", "replace", "chmod"])
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_the_old_file_and_no_other(made, path, monkeypatch, broken, interrupt):
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise interrupt("now")

    if broken == "write":
        real = os.fdopen

        def half_written(handle, mode):
            file = real(handle, mode)
            file.write(b"half of it")
            file.close()
            raise interrupt("now")

        monkeypatch.setattr(artifact_module.os, "fdopen", half_written)
    else:
        monkeypatch.setattr(artifact_module.os, broken, fail)
    other = msgspec.structs.replace(made[0], block_tokens=32)
    with pytest.raises(ArtifactError if interrupt is OSError else interrupt, match="now"):
        save_artifact(path, other, made[1])
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_interrupt_after_the_move_is_not_hidden(made, path, monkeypatch):
    real = os.replace

    def late(source, target):
        real(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact_module.os, "replace", late)
    with pytest.raises(KeyboardInterrupt):
        save_artifact(path, made[0], made[1])
    assert load_artifact(path).digest == made[0].digest


def test_a_full_disk_is_named_and_the_old_file_stays(made, path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifact_module.os, "fsync", full)
    changed = {**made[1], "extra": torch.zeros(3)}
    with pytest.raises(ArtifactError, match=r"cannot write artifact .*model.kvtc, [\d,]+ bytes: No space left"):
        save_artifact(path, made[0], changed)
    assert load_artifact(path).digest == made[0].digest
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_saving_over_an_old_file_gives_the_new_one(made, path):
    other = save_artifact(path, msgspec.structs.replace(made[0], block_tokens=32), made[1])
    assert load_artifact(path).manifest == other
    assert oct(path.stat().st_mode & 0o777) == "0o644"


def test_a_flipped_bit_anywhere_is_refused(path):
    data = path.read_bytes()
    (header,) = struct.unpack_from("<Q", data)
    generator = np.random.default_rng(case_seed())
    original = parse_artifact(data)
    places = [*range(8), *generator.integers(8, 8 + header, 150), *generator.integers(8 + header, len(data), 100)]
    for place in map(int, [*places, len(data) - 1]):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(generator.integers(8))
        try:
            opened = parse_artifact(bytes(damaged))
        except ArtifactError:
            continue
        # Only another spelling of the same JSON may pass, such as a last digit that rounds to the same number.
        assert 8 <= place < 8 + header, f"byte {place}"
        assert opened.manifest == original.manifest, f"byte {place}"
        assert all(same_bits(opened._tensors[n], t) for n, t in original._tensors.items()), f"byte {place}"


def test_truncated_or_longer_files_are_refused(path):
    data = path.read_bytes()
    generator = np.random.default_rng(case_seed())
    for end in [0, 1, 7, 8, 9, len(data) - 1, *map(int, generator.integers(0, len(data), 20))]:
        with pytest.raises(ArtifactFormatError):
            parse_artifact(data[:end])
    with pytest.raises(ArtifactFormatError):
        parse_artifact(data + b"\0")


def with_header(data: bytes, change) -> bytes:
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def test_forged_header_lengths(path):
    data = path.read_bytes()
    for size in (0, 1, len(data), len(data) - 7, 2**32, 2**40, 2**63, 2**64 - 1):
        with pytest.raises(ArtifactFormatError):
            parse_artifact(struct.pack("<Q", size) + data[8:])


@pytest.mark.parametrize("field", ["shape", "data_offsets", "dtype"])
@pytest.mark.parametrize("value", [[2**40], [2**33, 2**33], [0, 2**60], [-1], [], "F64", "I8", "X", None])
def test_tensor_entries_that_lie(path, field, value):
    def lie(header):
        header["rank0.group0.mean"][field] = value

    with pytest.raises(ArtifactFormatError):
        parse_artifact(with_header(path.read_bytes(), lie))


def test_a_file_that_is_no_artifact(tmp_path):
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(save_tensors({"a": torch.zeros(3)}))
    with pytest.raises(ArtifactFormatError, match="no KVTC manifest"):
        load_artifact(plain)
    with pytest.raises(ArtifactError, match="kvtc calibrate"):
        load_artifact(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="cannot read"):
        load_artifact(tmp_path)


@pytest.mark.parametrize("nested", ["[" * 100_000 + "]" * 100_000, '{"format_version":1,"calibration":' + "[" * 900])
def test_deep_nesting_is_refused(path, nested):
    def lie(header):
        header["__metadata__"]["kvtc"] = nested

    with pytest.raises(ArtifactFormatError):
        parse_artifact(with_header(path.read_bytes(), lie))


@pytest.mark.parametrize("version", [0, 1, 3, 99])
def test_another_format_version_is_named(path, version):
    def lie(header):
        manifest = json.loads(header["__metadata__"]["kvtc"])
        # A later version may have any other fields: its number is all that is read.
        header["__metadata__"]["kvtc"] = json.dumps({"format_version": version, "anything": list(manifest)})

    with pytest.raises(ArtifactVersionError, match=f"version {version}; this release reads 2"):
        parse_artifact(with_header(path.read_bytes(), lie))


def test_wrong_digest_names_both(path, made):
    def lie(header):
        text = header["__metadata__"]["kvtc"]
        header["__metadata__"]["kvtc"] = text.replace(made[0].digest, "ab" * 32)

    with pytest.raises(ArtifactFormatError, match=f"digest {made[0].digest[:16]}.*abababababababab"):
        parse_artifact(with_header(path.read_bytes(), lie))


def test_tensor_parallel_ranks(tmp_path):
    manifest, tensors, zero = make_artifact(KVShape(2, 4, 8, "float16"), tp_size=2, components=4, seed=case_seed())
    path = tmp_path / "tp"
    save_artifact(path, manifest, tensors)
    one = load_artifact(path, rank=1)
    assert one.shape == zero.shape == KVShape(2, 2, 8, "float16")
    assert not same_bits(one.tensor("group0.mean", torch.float32, -1), zero.tensor("group0.mean", torch.float32, -1))
    assert one.bytes_on_device() + zero.bytes_on_device() == sum(t.nbytes for t in tensors.values())
    for rank in (-1, 2, 10**9):
        with pytest.raises(ArtifactMismatchError, match=rf"rank {rank} asked of .* 2 rank\(s\)"):
            load_artifact(path, rank=rank)
    for tp_size in (0, -1, 3, 8):
        with pytest.raises(ConfigError, match=f"tp_size {tp_size} does not divide 4"):
            rank_shape(manifest.shape, tp_size)


def test_tensor_names_dtype_and_shape(made):
    artifact: Artifact = made[2]
    assert artifact.tensor("group0.mean", torch.float32, 32).shape == (32,)
    with pytest.raises(ArtifactFormatError, match=r"rank0\.group0\.nothing"):
        artifact.tensor("group0.nothing", torch.float32)
    for dtype, shape in [
        (torch.float16, (32,)),
        (torch.float32, (31,)),
        (torch.float32, (-1, -1)),
        (torch.float32, ()),
    ]:
        with pytest.raises(ArtifactFormatError, match=r"rank0\.group0\.mean.*\(32,\); expected"):
            artifact.tensor("group0.mean", dtype, *shape)


MODEL = {"model": ModelIdentity("synthetic/model", "r1", "00" * 32, "SyntheticForCausalLM"),
         "shape": SHAPE, "rope": RopeSpec((1.0, 0.1, 0.01, 0.001))}  # fmt: skip
OTHER = {
    "model": {"revision": "r2", "weights_digest": "11" * 32, "architecture": "OtherForCausalLM"},
    "shape": {"layers": 3, "kv_heads": 4, "head_dim": 16, "dtype": "float16"},
    "rope": {"inv_freq": (1.0, 0.1, 0.01, 0.002), "attention_scaling": 1.5, "style": "interleaved"},
}


@pytest.mark.parametrize(("part", "field"), [(part, field) for part in OTHER for field in OTHER[part]])
def test_another_model_is_refused_naming_both_sides(part, field):
    artifact = make_artifact(SHAPE, rope=MODEL["rope"], components=4)[2]
    artifact.check_model(**MODEL)
    mine, value = getattr(MODEL[part], field), OTHER[part][field]
    values = {name: getattr(MODEL[part], name) for name in MODEL[part].__dataclass_fields__}
    other = {**MODEL, part: type(MODEL[part])(**{**values, field: value})}
    with pytest.raises(ArtifactMismatchError) as caught:
        artifact.check_model(**other)
    told = str(caught.value)
    assert f"{part}.{field}" in told
    assert str(mine) in told
    assert str(value) in told
    assert "calibrate again" in told


def test_another_name_for_the_same_weights_is_accepted():
    artifact = make_artifact(SHAPE, rope=MODEL["rope"], components=4)[2]
    renamed = ModelIdentity("/models/local-copy", "r1", "00" * 32, "SyntheticForCausalLM")
    artifact.check_model(renamed, MODEL["shape"], MODEL["rope"])


def test_point_index(made):
    artifact = made[2]
    assert [artifact.point_index(name) for name in ("fine", "coarse")] == [0, 1]
    with pytest.raises(ConfigError, match="'16' is not in the artifact; it has fine, coarse"):
        artifact.point_index("16")
