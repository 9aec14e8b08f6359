"""The transform's kernels against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import project
from dynamo_kvtc.ops.project import device as op
from dynamo_kvtc.ops.rope import apply_rope
from dynamo_kvtc.types import RopeSpec
from tests.builders import case_seed


def int8(generator, *shape):
    return torch.from_numpy(generator.integers(-127, 128, shape)).to(torch.int8)


@pytest.fixture(params=["small", "large"])
def more_tokens(request, kernel_device, monkeypatch):
    """Tokens beyond the case's; "large": more than one tile of the kernels that large problems get, which only a GPU
    has (on Hopper they are ``hopper.py``'s)."""
    if request.param == "small":
        return 0
    if kernel_device == "cpu":
        pytest.skip("large tiles are a GPU's")
    monkeypatch.setattr("dynamo_kvtc.ops.project.triton._BUSY", -1.0)
    return 300


@pytest.mark.parametrize(
    ("tokens", "channels", "wide", "narrow", "inputs"),
    [(1, 128, 16, 33, 5), (17, 130, 7, 0, 0), (33, 256, 0, 140, 130), (16, 65, 20, 129, 1)],
)
def test_analysis_is_exact(kernel_device, more_tokens, tokens, channels, wide, narrow, inputs):
    generator = np.random.default_rng(case_seed())
    tokens += more_tokens
    wide_inputs = torch.from_numpy(np.sort(generator.permutation(channels)[:inputs]))
    fixed = torch.from_numpy(generator.integers(-127, 128, (tokens, channels)))
    fixed[:, wide_inputs] = torch.from_numpy(generator.integers(-2000, 2001, (tokens, inputs)))
    b_wide = torch.from_numpy(generator.integers(-9000, 9001, (channels, wide))).to(torch.int16)
    b_narrow = int8(generator, channels, narrow)
    high, low = op.limbs(fixed.to(torch.int16))
    basis = op.Analysis.of(b_wide.to(kernel_device), b_narrow.to(kernel_device), wide_inputs.to(kernel_device))
    out = torch.full((tokens, 2 * wide + narrow), 77, dtype=torch.int32, device=kernel_device)
    high_inputs = op.aligned(high[:, wide_inputs].to(kernel_device))
    op.analyse_device(op.aligned(low.to(kernel_device)), high_inputs, basis, out)
    expected = torch.cat(
        [
            project.analyse_wide(fixed.float(), b_wide).long(),
            project.analyse_narrow(fixed.float(), wide_inputs, b_narrow),
        ],
        dim=1,
    )
    assert int(expected.abs().max()) < 2**31
    found = out.cpu()
    found[:, wide : 2 * wide] += found[:, :wide] * 256
    assert torch.equal(found[:, wide:].long(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "layers", "heads", "dim", "pairs", "style", "wide", "narrow"),
    [
        (5, 2, 1, 64, 32, "half", 32, 70), (17, 1, 3, 96, 48, "half", 20, 16),
        (16, 1, 2, 20, 8, "interleaved", 16, 0), (1, 2, 1, 128, 64, "half", 40, 130),
        (3, 1, 1, 64, 16, "half", 0, 9),
    ],
)  # fmt: skip
def test_synthesis_scatters_what_the_reference_computes(
    kernel_device, more_tokens, dtype, tokens, layers, heads, dim, pairs, style, wide, narrow
):
    generator = np.random.default_rng(case_seed())
    tokens += more_tokens
    channels = 2 * layers * heads * dim
    rope = RopeSpec(tuple(1e4 ** (-i / pairs) for i in range(pairs)), 1.25, style)
    b_wide = torch.from_numpy(generator.integers(-9000, 9001, (channels, wide))).to(torch.int16)
    b_narrow = int8(generator, channels, narrow)
    gain = torch.from_numpy(np.exp(generator.normal(0, 0.3, channels))).float()
    mean = torch.from_numpy(generator.normal(0, 1, channels)).float()
    basis = op.synthesis_operands(
        *(x.to(kernel_device) for x in (b_wide, b_narrow)), 14, gain.to(kernel_device),
        mean.to(kernel_device), (1, 1 + layers), heads, dim, pairs, style == "interleaved", rope.attention_scaling,
    )  # fmt: skip
    levels = torch.from_numpy(generator.integers(-30, 31, (tokens, wide))).half()
    small = int8(generator, tokens, narrow)
    factors = torch.from_numpy(2.0 ** (generator.integers(-8, 5, tokens) / 4)).float()
    positions = torch.from_numpy(generator.integers(0, 5000, tokens))
    angles = positions[:, None].double() * torch.tensor(rope.inv_freq, dtype=torch.float64)

    blocks, block_tokens = 6 + more_tokens // 4, 4
    caches = [
        [torch.full((blocks, block_tokens, heads, dim), 7.0, dtype=dtype, device=kernel_device) for _ in range(2)]
        for _ in range(layers + 2)
    ]
    addresses = torch.tensor([[k.data_ptr(), v.data_ptr()] for k, v in caches], device=kernel_device)
    strides = caches[0][0].stride()
    aligned = 8 if dim in (64, 128) else 1
    pages = op.Pages(addresses, dtype, heads, dim, block_tokens, strides[0], strides[2], strides[1], aligned)
    slots = torch.from_numpy(generator.permutation(blocks * block_tokens)[:tokens])
    if tokens > 1:
        slots[tokens // 2] = -1
    if tokens > 2:
        slots[0] = -1
    op.synthesise_into_pages(
        op.aligned(small.to(kernel_device)), op.aligned(levels.to(kernel_device)), basis,
        factors.to(kernel_device), angles.cos().float().to(kernel_device),
        angles.sin().float().to(kernel_device), pages, slots.to(kernel_device),
    )  # fmt: skip

    rows = levels.double() @ (b_wide.double().T * 2.0**-14)
    rows += (small.double() @ b_narrow.double().T) * 2.0**-14 * factors.double()[:, None]
    rows = rows * gain.double() + mean.double()
    half = rows.float().reshape(tokens, 2, layers, heads, dim).permute(1, 2, 3, 0, 4)
    k = apply_rope(half[0].contiguous(), positions, rope)
    written = [t for t in range(tokens) if slots[t] >= 0]
    for layer, (k_pages, v_pages) in enumerate(caches):
        for found, expected in ((k_pages, k), (v_pages, half[1])):
            flat = found.cpu().reshape(-1, heads, dim)
            wanted = torch.full_like(flat, 7.0)
            if 1 <= layer <= layers:
                for t in written:
                    wanted[slots[t]] = expected[layer - 1, :, t].to(dtype)
            scale = float(wanted.float().abs().max())
            torch.testing.assert_close(flat.float(), wanted.float(), rtol=2.0**-7, atol=2e-3 * scale)
            untouched = torch.ones(len(flat), dtype=torch.bool)
            if 1 <= layer <= layers:
                untouched[slots[written]] = False
            assert bool((flat[untouched] == 7.0).all())


def test_refuses_unaligned_operands(kernel_device):
    basis = op.Analysis.of(*(torch.zeros(64, 4, dtype=t, device=kernel_device) for t in (torch.int16, torch.int8)),
                           torch.zeros(0, dtype=torch.int64, device=kernel_device))  # fmt: skip
    out = torch.empty(3, 8, dtype=torch.int32, device=kernel_device)
    high = op.aligned(torch.zeros(3, 0, dtype=torch.int8, device=kernel_device))
    with pytest.raises(ConfigError, match="multiples of 16 bytes"):
        op.analyse_device(torch.zeros(3, 65, dtype=torch.int8, device=kernel_device), high, basis, out)
    with pytest.raises(ConfigError, match=r"int32 \[3, 12\]"):
        op.analyse_device(torch.zeros(3, 64, dtype=torch.int8, device=kernel_device), high, basis, out[:, :7])
