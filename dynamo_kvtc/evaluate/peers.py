"""Peers: ways to store a cache that need no calibration. All of them quantise K after RoPE, as an engine caches it.

Each quantiser takes float32 [L, H, T, D], the coded tokens alone and in order, and returns the float32 values that
come back and the bits they take, scales included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamo_kvtc.codec.policy import ExactCounts
from dynamo_kvtc.evaluate.codecs import CodedBytes, split_count, token_bytes

Quantiser = Callable[[Tensor], tuple[Tensor, int]]

E4M3_MAX = 448.0
E2M1_MAX = 6.0
NVFP4_BLOCK = 16
KIVI_GROUP = 32
KIVI_BITS = 2
FLOAT16_MAX = 65504.0

# The magnitudes of E2M1 (OCP Microscaling Formats v1.0, 5.3.3) and the limits between them. A value on a limit
# goes to the neighbour with an even significand; a limit that must go up is moved down by one float32.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_LIMITS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


@dataclass(frozen=True)
class PeerCodec:
    """A ``CacheCodec`` of one quantiser for K and one for V. Exact tokens are left out and put back untouched."""

    name: str
    keys: Quantiser
    values: Quantiser

    def run(self, k: Tensor, v: Tensor, positions: Tensor, exact_mask: Tensor) -> tuple[Tensor, Tensor, CodedBytes]:
        """See ``CacheCodec.run``."""
        coded = (~exact_mask).to(k.device)
        out, bits = [], 0
        for x, quantise in ((k, self.keys), (v, self.values)):
            values, spent = quantise(x[:, :, coded].float())
            restored = x.clone()
            restored[:, :, coded] = values.to(x.dtype)
            out.append(restored)
            bits += spent
        tokens, exact = split_count(exact_mask)
        size = token_bytes(k)
        spent_bytes = CodedBytes(-(-bits // 8), exact * size, tokens * size, tokens, ExactCounts(policy=exact))
        return out[0], out[1], spent_bytes


def fp8(x: Tensor) -> tuple[Tensor, int]:
    """E4M3 (Micikevicius et al., arXiv 2209.05433) with one float32 scale per layer and KV head, K and V apart, for
    all tokens: an engine's static scale at its best, since it is fitted to the very tokens.
    """
    scale = x.abs().amax(dim=(2, 3), keepdim=True) / E4M3_MAX
    return to_e4m3(_divide(x, scale)) * scale, 8 * x.numel() + 32 * scale.numel()


def nvfp4(x: Tensor) -> tuple[Tensor, int]:
    """NVFP4: E2M1 values, an E4M3 scale per 16 consecutive dims of a head, a float32 scale per layer (K and V apart).

    4.5 bits a value where 16 divides the head dim; a last block that is shorter has a scale of its own. Scales as in
    "Pretraining Large Language Models with NVFP4" (NVIDIA, arXiv 2509.25149): the tensor's brings the largest block
    scale to 448, a block's brings its largest value to 6.
    """
    blocks = _blocks(x, 3, NVFP4_BLOCK)
    tensor_scale = x.abs().amax(dim=(1, 2, 3))[:, None, None, None, None] / (E2M1_MAX * E4M3_MAX)
    wanted = blocks.abs().amax(dim=-1, keepdim=True) / E2M1_MAX
    scale = to_e4m3(_divide(wanted, tensor_scale))
    values = to_e2m1(_divide(blocks, scale * tensor_scale)) * scale * tensor_scale
    return values.flatten(3)[..., : x.shape[3]], 4 * x.numel() + 8 * scale.numel() + 32 * tensor_scale.numel()


def kivi_keys(x: Tensor) -> tuple[Tensor, int]:
    """KIVI's keys (Liu et al., arXiv 2402.02750): 2 bits per channel over groups of 32 tokens, in order.

    A float16 scale and zero point per channel and group. KIVI keeps a tail that fills no group in full precision;
    here that is the window's part, and a last group that is shorter is coded like the others.
    """
    values, bits = _kivi(x.transpose(2, 3))
    return values.transpose(2, 3), bits


def kivi_values(x: Tensor) -> tuple[Tensor, int]:
    """KIVI's values: 2 bits per token over groups of 32 dims of a head, a float16 scale and zero point per group."""
    return _kivi(x)


def _kivi(x: Tensor) -> tuple[Tensor, int]:
    """Asymmetric 2-bit quantisation over groups of 32 of the last dim: q = round((x - least) / scale)."""
    groups = _blocks(x, 3, KIVI_GROUP, pad_with_last=True)
    least, most = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    zero = _float16(least)
    scale = _float16((most - least) / (2**KIVI_BITS - 1))
    levels = _divide(groups - zero, scale).round().clamp(0, 2**KIVI_BITS - 1)
    values = (levels * scale + zero).flatten(3)[..., : x.shape[3]]
    return values, KIVI_BITS * x.numel() + 2 * 16 * scale.numel()


def to_e4m3(x: Tensor) -> Tensor:
    """float32 values rounded to E4M3 (no infinity, largest 448), ties to even, saturating."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def to_e2m1(x: Tensor) -> Tensor:
    """float32 values rounded to E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6), ties to even, saturating."""
    magnitudes = torch.tensor(_E2M1, device=x.device)
    limits = torch.tensor([limit for limit, _ in _E2M1_LIMITS], device=x.device)
    goes_up = torch.tensor([up for _, up in _E2M1_LIMITS], device=x.device)
    limits = torch.where(goes_up, torch.nextafter(limits, torch.zeros_like(limits)), limits)
    return magnitudes[torch.bucketize(x.abs(), limits)].copysign(x)


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, and 0 where the scale is 0: all of its values are (next to) 0."""
    return torch.where(scale > 0, x / scale.where(scale > 0, torch.ones_like(scale)), torch.zeros_like(x))


def _float16(x: Tensor) -> Tensor:
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float()


def _blocks(x: Tensor, dim: int, size: int, pad_with_last: bool = False) -> Tensor:
    """The last dim cut into blocks: [..., n] -> [..., ceil(n / size), size]; a short last block is filled up with
    zeros, or with the last value, which changes neither its least nor its largest."""
    missing = -x.shape[dim] % size
    if missing:
        last = x[..., -1:] if pad_with_last else torch.zeros_like(x[..., -1:])
        x = torch.cat([x, last.expand(*x.shape[:-1], missing)], dim=-1)
    return x.unflatten(-1, (-1, size))


PEERS = {
    codec.name: codec
    for codec in (
        PeerCodec("fp8", fp8, fp8),
        PeerCodec("nvfp4", nvfp4, nvfp4),
        PeerCodec("kivi2", kivi_keys, kivi_values),
    )
}
