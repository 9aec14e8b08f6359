"""What format version 2 wrote is read for ever: tests/fixtures/v2, which is never regenerated."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dynamo_kvtc.codec.artifact import Artifact, load_artifact, parse_artifact
from dynamo_kvtc.codec.kvtc_point import KvtcPoint
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.errors import ArtifactVersionError, RecordVersionError
from tests.builders import same_bits

FOLDER = Path(__file__).parent.parent / "fixtures" / "v2"
NAMES = sorted(path.stem for path in FOLDER.glob("*.record"))


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return load_artifact(FOLDER / "artifact.safetensors")


def load(name: str, artifact: Artifact) -> tuple[BlockCodec, bytes, dict[str, torch.Tensor]]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        codec = BlockCodec(artifact, file.metadata()["point"])
    return codec, (FOLDER / f"{name}.record").read_bytes(), arrays


def test_the_files_are_all_there(artifact):
    assert len(NAMES) == 8
    assert artifact.digest == (FOLDER / "DIGEST").read_text().strip()
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000


def test_the_files_hold_both_kinds_of_everything(artifact):
    """Wide and narrow components and inputs, symbols at a limit, one lane a token and two."""
    points = [KvtcPoint.load(artifact, i) for i in range(3)]
    assert [point.lanes for point in points] == [1, 1, 2]
    assert all(0 < g.wide.shape[1] < len(g.classes) for point in points for g in point.groups)
    assert any(0 < len(g.wide_inputs) < len(g.mean) for g in points[2].groups)
    clipped = 0
    for name in NAMES:
        codec, _, arrays = load(name, artifact)
        for g, group in enumerate(codec.profile.groups):
            width = group.wide.shape[1]
            clipped += int((arrays[f"symbols{g}"][:, 1 + width :].abs() == group.limits[width:]).sum())
    assert clipped > 0


def test_the_files_hold_many_lane_bytes(artifact):
    lanes: set[int] = set()
    for name in NAMES:
        _, _, arrays = load(name, artifact)
        lanes |= {int(x) for g in range(2) for x in arrays[f"symbols{g}"][:, 0]}
    assert len({lane % 16 for lane in lanes}) == 13
    assert len({lane // 16 for lane in lanes}) >= 6


@pytest.mark.parametrize("name", NAMES)
def test_todays_code_writes_the_same_record(name, artifact):
    codec, record, arrays = load(name, artifact)
    block = codec.encode_block(arrays["k"], arrays["v"], arrays["positions"], arrays["exact"])
    assert block.record == record


@pytest.mark.parametrize("name", NAMES)
def test_todays_code_reads_the_same_symbols(name, artifact):
    codec, record, arrays = load(name, artifact)
    parsed = codec.parse(record)
    assert parsed.header.positions.tolist() == arrays["positions"].tolist()
    assert parsed.header.exact.tolist() == arrays["exact"].tolist()
    for g, (start, end) in enumerate(artifact.manifest.groups):
        _, payload = codec._split_section(parsed, g, end - start)
        symbols = codec.profile.unpack(g, [payload], [parsed.header.coded_tokens])
        assert torch.equal(symbols, arrays[f"symbols{g}"])


@pytest.mark.parametrize("name", NAMES)
def test_todays_code_decodes_the_same_tensors(name, artifact):
    """Exact tokens to the bit. Coded ones to one bfloat16 rounding, for a machine may sum in another order."""
    codec, record, arrays = load(name, artifact)
    k, v, positions = codec.decode_block(record)
    assert torch.equal(positions, arrays["positions"])
    exact = arrays["exact"]
    for found, wanted, original in ((k, arrays["k_decoded"], arrays["k"]), (v, arrays["v_decoded"], arrays["v"])):
        assert same_bits(found[:, :, exact], original[:, :, exact])
        torch.testing.assert_close(found[:, :, ~exact].float(), wanted[:, :, ~exact].float(), rtol=2.0**-7, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_written_from_the_document_alone_reads_the_same_symbols(name, artifact):
    """FORMAT.md's tables and pseudocode in plain Python: no code of the package between the bytes and the symbols."""
    _, record, arrays = load(name, artifact)
    tokens, exact, _, groups, header = struct.unpack_from("<HHBBH", record, 24)
    point, at = record[6], header
    for g in range(groups):
        (size,) = struct.unpack_from("<I", record, 36 + 8 * g)
        start, end = artifact.manifest.groups[g]
        shape = artifact.manifest.shape
        payload = record[at + exact * (end - start) * 2 * shape.kv_heads * shape.head_dim * 2 : at + size]
        at += size
        wanted = arrays[f"symbols{g}"].tolist()
        if tokens == exact:
            assert payload == b""
            assert wanted == []
            continue
        assert lanes_by_the_document(payload, tokens - exact, point, g, artifact) == wanted
    assert at == len(record)


def lanes_by_the_document(payload: bytes, tokens: int, point: int, g: int, artifact: Artifact) -> list[list[int]]:
    tensors = artifact._tensors
    classes = tensors[f"rank0.group{g}.point{point}.classes"].tolist()
    leading = tensors[f"rank0.group{g}.point{point}.importance"].shape[1]
    lanes = artifact.manifest.points[point].lanes
    counts = tensors[f"rank0.point{point}.frequencies"].tolist()
    shifts = tensors[f"rank0.point{point}.shift"].tolist()
    escape = len(counts[0]) - 1
    largest = (len(counts[0]) - 2) // 2

    least, width = struct.unpack_from("<HB", payload)
    count = tokens * lanes
    lengths = [least + int.from_bytes(payload[4 + width * n : 4 + width * (n + 1)], "little") for n in range(count)]
    parameters = list(payload[4 + width * count : 4 + width * count + tokens])
    assert all(byte % 16 <= 12 for byte in parameters)
    size = width * count + tokens
    body = payload[4 + size + size % 2 :]
    words = list(struct.unpack(f"<{len(body) // 2}H", body))
    assert sum(lengths) == len(words)

    out = []
    for n in range(count):
        lane, words = words[: lengths[n]], words[lengths[n] :]
        x, lane = lane[0] << 16 | lane[1], lane[2:]
        parameter = parameters[n // lanes]
        if n % lanes == 0:
            out.append([parameter] + [0] * len(classes))
        offset = 2 * (parameter // 16 - 8)
        for j in range(n % lanes, len(classes), lanes):
            c = classes[j]
            if j >= leading:
                c = min(max(c + offset, 0), len(counts) - 1)
            slot, below, column = x % 4096, 0, 0
            while below + counts[c][column] <= slot:
                below += counts[c][column]
                column += 1
            x = counts[c][column] * (x // 4096) + slot - below
            if x < 2**16:
                x = x << 16 | lane.pop(0)
            if column == escape:
                q = x % 2**16
                x = x - q + lane.pop(0)
            else:
                q = (column - largest) << shifts[c]
                if shifts[c]:
                    q += x % 2 ** shifts[c]
                    x //= 2 ** shifts[c]
                    if x < 2**16:
                        x = x << 16 | lane.pop(0)
            out[-1][1 + j] = (q + 2**15) % 2**16 - 2**15
        assert x == 2**16
        assert lane == []
    return out


@pytest.mark.parametrize("version", [0, 1, 3])
def test_another_version_is_refused_by_its_number(artifact, version):
    """Version 1 was never released: nothing reads it."""
    codec, record, _ = load("block-16", artifact)
    with pytest.raises(RecordVersionError, match=f"record format version {version}; this release reads 2"):
        codec.decode_block(record[:4] + bytes([version]) + record[5:])
    data = (FOLDER / "artifact.safetensors").read_bytes()
    old = data.replace(b'{\\"format_version\\":2,', b'{\\"format_version\\":%d,' % version)
    assert old != data
    with pytest.raises(ArtifactVersionError, match=f"version {version}; this release reads 2"):
        parse_artifact(old)
