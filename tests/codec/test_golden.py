"""What format version 1 wrote is read for ever: tests/fixtures/v1, which is never regenerated."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dynamo_kvtc.codec.artifact import Artifact, load_artifact
from dynamo_kvtc.codec.pipeline import BlockCodec
from tests.builders import same_bits

FOLDER = Path(__file__).parent.parent / "fixtures" / "v1"
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
    assert len(NAMES) == 6
    assert artifact.digest == (FOLDER / "DIGEST").read_text().strip()
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000


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
    counts = tensors[f"rank0.point{point}.frequencies"].tolist()
    shifts = tensors[f"rank0.point{point}.shift"].tolist()
    escape = len(counts[0]) - 1
    largest = (len(counts[0]) - 2) // 2

    least, width = struct.unpack_from("<HB", payload)
    lengths = [least + int.from_bytes(payload[4 + width * n : 4 + width * (n + 1)], "little") for n in range(tokens)]
    parameters = list(payload[4 + width * tokens : 4 + (width + 1) * tokens])
    assert all(byte % 16 <= 12 for byte in parameters)
    body = payload[4 + (width + 1) * tokens + (width + 1) * tokens % 2 :]
    words = list(struct.unpack(f"<{len(body) // 2}H", body))
    assert sum(lengths) == len(words)

    out = []
    for length, parameter in zip(lengths, parameters, strict=True):
        lane, words = words[:length], words[length:]
        x, lane = lane[0] << 16 | lane[1], lane[2:]
        symbols = [parameter]
        offset = 2 * (parameter // 16 - 8)
        for j, c in enumerate(classes):
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
            symbols.append((q + 2**15) % 2**16 - 2**15)
        assert x == 2**16
        assert lane == []
        out.append(symbols)
    return out
