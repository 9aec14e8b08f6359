"""Small arrays to a GPU by a kernel: every byte, and no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.upload import bring
from tests.builders import case_seed


@pytest.mark.parametrize("size", [0, 16, 48, 4096, 4112, 100_000])
def test_all_of_it_arrives_and_nothing_beside(size, kernel_device):
    pytest.importorskip("dynamo_kvtc.ops.upload.triton")
    generator = np.random.default_rng(case_seed())
    source = torch.from_numpy(generator.integers(0, 256, size, dtype=np.uint8))
    if kernel_device == "cuda":
        source = source.pin_memory()
    room = torch.full((size + 32,), 0x55, dtype=torch.uint8, device=kernel_device)
    bring(source, room[16 : size + 16])
    assert torch.equal(room[16 : size + 16].cpu(), source)
    assert bool((room[:16] == 0x55).all())
    assert bool((room[size + 16 :] == 0x55).all())


def test_what_it_does_not_take():
    room = torch.zeros(32, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="multiple of 16"):
        bring(room[:8], room[:8])
    with pytest.raises(ConfigError, match="uint8"):
        bring(room.view(torch.int32), room)
    with pytest.raises(ConfigError, match="16 bytes, target 32"):
        bring(room[:16], room)
