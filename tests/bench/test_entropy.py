"""The coders' bench proves before it times."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

from dynamo_kvtc.bench import entropy, shapes
from dynamo_kvtc.bench.entropy import CODERS, EntropyCase, exact_token_gain, payload_bytes, time_coder
from dynamo_kvtc.cli.main import main
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.types import KVShape

CHUNKS = torch.randn(6, 3001).mul(8).to(torch.int8).view(torch.uint8)


def test_zlib_anywhere():
    result = time_coder("zlib", CHUNKS, repeats=1)
    assert 1.2 < result.ratio < 2
    assert result.encode_gb_s > 0


@pytest.fixture
def tiny(monkeypatch):
    model = shapes.ModelShape(KVShape(4, 2, 16, "bfloat16"), 64, 128, 4, 100)
    monkeypatch.setitem(shapes.MODELS, "tiny", model)
    return EntropyCase(("zlib",), "tiny", 8.0, 70, 2)


def test_the_bytes_are_those_that_the_profile_packs(tiny):
    chunks, exact = payload_bytes(tiny)
    # 70 tokens are 4 whole blocks; 2 layers of 2 heads of 16, K and V.
    assert exact.shape == (64, 128)
    assert exact.float().std() > 0
    assert len(chunks) == 4
    assert chunks.shape[1] % 16 == 0
    told = []
    result = entropy.run(tiny, told.append)
    assert list(result) == ["zlib"]
    assert set(result["zlib"]) == {"ratio", "encode_gb_s", "decode_gb_s"}
    assert len(told) == 2


def test_the_command(tiny, tmp_path):
    path = tmp_path / "entropy.json"
    arguments = ["bench", "entropy", "--shape", "tiny", "--ratio", 8, "--tokens", 64, "--groups", 2, "--device", "cpu"]
    done = CliRunner().invoke(main, [str(x) for x in [*arguments, "--json", path]])
    assert done.exit_code == 0, done.output
    assert json.loads(path.read_text())["zlib"]["ratio"] > 0
    refused = CliRunner().invoke(main, [str(x) for x in [*arguments, "--coder", "lz4"]])
    assert refused.exit_code == 2
    assert "lz4" in refused.output


def test_bad_calls_are_refused(tiny):
    with pytest.raises(ConfigError, match="at least a block, 16"):
        entropy.run(dataclasses.replace(tiny, tokens=8), print)
    with pytest.raises(ConfigError, match="'lz4'"):
        time_coder("lz4", CHUNKS)
    with pytest.raises(ConfigError, match="uint8"):
        time_coder("zlib", CHUNKS.float())
    with pytest.raises(ConfigError, match="float32"):
        exact_token_gain(torch.randn(32, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_every_coder_and_exact_tokens():
    pytest.importorskip("nvidia.libnvcomp")
    for name in CODERS:
        # ANS has tables of its own in each chunk: of 3 KB they are a tenth.
        assert time_coder(name, CHUNKS.cuda(), repeats=1).ratio > (1.0 if name == "ans" else 1.2)
    assert exact_token_gain(torch.randn(64, 512, device="cuda").bfloat16()).ratio > 1.1
