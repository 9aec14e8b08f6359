"""The coders' bench proves before it times."""

from __future__ import annotations

import pytest
import torch

from dynamo_kvtc.bench.entropy import CODERS, exact_token_gain, time_coder
from dynamo_kvtc.errors import ConfigError

CHUNKS = torch.randn(6, 3001).mul(8).to(torch.int8).view(torch.uint8)


def test_zlib_anywhere():
    result = time_coder("zlib", CHUNKS, repeats=1)
    assert 1.2 < result.ratio < 2
    assert result.encode_gb_s > 0


def test_bad_calls_are_refused():
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
        assert time_coder(name, CHUNKS.cuda(), repeats=1).ratio > 1.2
    assert exact_token_gain(torch.randn(64, 512, device="cuda").bfloat16()).ratio > 1.1
