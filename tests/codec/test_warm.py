"""No request waits for a compiler: what has been compiled ahead is all there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dynamo_kvtc.codec.paged import Blocks, PagedCodec, PagedLimits
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.codec.warm import compile_all
from dynamo_kvtc.ops.pages import PagedCache, slots_of
from dynamo_kvtc.types import KVShape
from tests.builders import case_seed, make_artifact, make_paper_artifact, random_kv

ROOT = Path(__file__).parents[2]


def test_traffic_asks_for_no_other_forms():
    pytest.importorskip("triton")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.codec.forms", str(case_seed())], cwd=ROOT, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""


@pytest.mark.gpu
@pytest.mark.parametrize("profile", ["kvtc", "paper"])
def test_nothing_is_compiled_later(profile):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    from triton import knobs

    shape, tokens, pages = KVShape(4, 8, 128, "bfloat16"), 16, 600
    make = {"kvtc": make_artifact, "paper": make_paper_artifact}[profile]
    artifact = make(shape, groups=((0, 1), (1, 3), (3, 4)), seed=case_seed())[2]
    views = [torch.zeros(pages, 8, tokens, 256, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    cache = PagedCache.of([x[..., :128] for x in views], [x[..., 128:] for x in views])
    # zlib: nvCOMP compiles nothing of ours, and may not be there.
    codec = PagedCodec(artifact, "fine", cache, ExactPolicy(max_error=1e9), PagedLimits(), deflate="zlib")
    arena = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    compile_all(codec, arena)
    assert not any(view.any() for view in views)

    k, v = random_kv(artifact, pages * tokens, case_seed())
    for layer, view in enumerate(views):
        for part, x in ((slice(128), k), (slice(128, None), v)):
            view[..., part] = x[layer].reshape(8, pages, tokens, 128).transpose(0, 1).cuda()
    compiled: list[str] = []
    before, knobs.runtime.jit_post_compile_hook = (
        knobs.runtime.jit_post_compile_hook, lambda **told: compiled.append(told["repr"]),
    )  # fmt: skip
    generator = np.random.default_rng(case_seed())
    coded = 0
    try:
        for count in (1, 2, 7, 16, 100, 255, 256, 511, 600):
            chosen = torch.from_numpy(generator.permutation(pages)[:count])
            slots = slots_of(chosen, tokens)
            exact = torch.from_numpy(generator.random(len(slots)) < 0.05)
            for asked in (None, exact):
                encoded = codec.encode(Blocks.uniform(slots, slots, tokens, asked), arena, 0)
                encoded.finish()
                coded += int((~encoded.exact).sum())
                again = Blocks.uniform(slots, None, tokens)
                for by_group in (True, False):
                    codec.decode(arena, encoded.offsets, encoded.sizes, again, by_group).finish()
    finally:
        knobs.runtime.jit_post_compile_hook = before
    assert coded
    assert not compiled
