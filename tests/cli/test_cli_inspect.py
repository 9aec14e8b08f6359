"""``kvtc inspect`` on artifacts, records and neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dynamo_kvtc.cli.main import main
from dynamo_kvtc.codec.artifact import save_artifact
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.types import KVShape
from tests.builders import make_artifact, random_kv

SHAPE = KVShape(layers=3, kv_heads=2, head_dim=8, dtype="bfloat16")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An artifact of two layer groups and a record of 16 tokens of it, 2 exact ones, with a gap before the last."""
    root = tmp_path_factory.mktemp("inspect")
    manifest, tensors, artifact = make_artifact(
        SHAPE, groups=[(0, 1), (1, 3)], components=24, points=(("16", 0.2), ("kl=0.005", 0.3))
    )
    save_artifact(root / "a.safetensors", manifest, tensors)
    positions = torch.arange(100, 116)
    positions[-1] = 200
    k, v = random_kv(artifact, 16, 1, positions)
    exact = torch.zeros(16, dtype=torch.bool)
    exact[[0, 5]] = True
    block = BlockCodec(artifact, "kl=0.005").encode_block(k, v, positions, exact)
    assert block.exact.total == 2
    (root / "block.kvtc").write_bytes(block.record)
    return root / "a.safetensors", root / "block.kvtc"


def inspect(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_artifact_as_json(files: tuple[Path, Path]) -> None:
    code, out, _ = inspect(files[0], "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["kind"], facts["profile"], facts["tp_size"], facts["block_tokens"]) == ("artifact", "kvtc", 1, 16)
    assert facts["shape"] == {"layers": 3, "kv_heads": 2, "head_dim": 8, "dtype": "bfloat16"}
    assert facts["model"]["model_id"] == "synthetic/model"
    assert facts["groups"] == [{"layers": "0-0", "channels_per_rank": 32}, {"layers": "1-2", "channels_per_rank": 64}]
    assert [p["name"] for p in facts["points"]] == ["16", "kl=0.005"]
    assert facts["points"][0]["components"][0] >= facts["points"][1]["components"][0] > 0
    for point in facts["points"]:
        assert all(0 < wide < live for wide, live in zip(point["wide_components"], point["components"], strict=True))
        assert point["lanes"] == 1
    assert facts["points"][1]["step"] == 0.3
    assert facts["points"][1]["expected_kl"] is None
    assert facts["raw_bytes_per_token"] == 192
    assert facts["bytes"] == files[0].stat().st_size
    assert bytes.fromhex(facts["fingerprint"])[::-1] == bytes.fromhex(facts["digest"])[:8]


def test_record_as_json(files: tuple[Path, Path]) -> None:
    code, out, _ = inspect(files[1], "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["kind"], facts["profile"], facts["point"], facts["rank"]) == ("record", "kvtc", 1, 0)
    assert (facts["tokens"], facts["exact_tokens"], facts["coded_tokens"]) == (16, 2, 14)
    assert facts["exact_positions"] == [100, 105]
    assert (facts["first_position"], facts["last_position"], facts["position_gaps"]) == (100, 200, True)
    assert facts["bytes"] == files[1].stat().st_size
    assert facts["header_bytes"] + sum(s["bytes"] for s in facts["sections"]) == facts["bytes"]
    assert facts["artifact"] == json.loads(inspect(files[0], "--json")[1])["fingerprint"]


def test_text_says_the_same(files: tuple[Path, Path]) -> None:
    code, out, _ = inspect(files[0])
    assert code == 0
    for text in ("artifact", "synthetic/model", "bfloat16", "layers 1-2", "name kl=0.005", "step 0.3"):
        assert text in out
    code, out, _ = inspect(files[1])
    assert code == 0
    for text in ("record", "100, 105", "layer_group 1", "position_gaps:   yes"):
        assert text in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is neither a record"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), r"it starts with b'\\x89PNG'"),
        (b"KVTC", "a record has at least"),
        (b"KVTC" + bytes(200), "record format version 0"),
        (b"\xff\0\0\0\0\0\0\0{}", "the header says 255 bytes"),
        (b"\x02\0\0\0\0\0\0\0{}", "no KVTC manifest"),
    ],
)
def test_garbage_is_refused_with_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    code, out, err = inspect(tmp_path / "x")
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message.replace("\\\\", "\\") in err


@pytest.mark.parametrize("which", [0, 1])
def test_damage_anywhere_is_found(files: tuple[Path, Path], which: int, tmp_path: Path) -> None:
    data = bytearray(files[which].read_bytes())
    data[-1] ^= 1
    (tmp_path / "x").write_bytes(data)
    code, _, err = inspect(tmp_path / "x")
    assert code == 2
    assert "checksum" in err or "digest" in err


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.kvtc", tmp_path):
        code, _, err = inspect(path)
        assert code == 2
        assert err.startswith("error: ")
        assert str(path) in err
