"""The quantiser on a GPU: checks, and the way to the kernels. Asynchronous, on the current stream.

Nothing is allocated where out, overflow and workspace are given. Batches start at any row stride, so K and V can be
written next to each other.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError, MissingDependencyError
from dynamo_kvtc.ops.affine.reference import Layout

if TYPE_CHECKING:
    from dynamo_kvtc.ops.affine.triton import Plan


def device_plan(runs: Layout, device: torch.device | str) -> Plan:
    """A layout's tables for the functions below, on ``device``. Made once."""
    return _kernels(torch.device(device)).plan(runs, device)


def encode_device(
    values: Tensor, plan: Plan, out: Tensor | None = None, overflow: Tensor | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``encode`` on the device, bit for bit.

    values: float64 [T, n], exact coefficients, normalised on the way as ``normalise`` does; or float32 [T, n], already
    normalised. Contiguous. out: uint8 [T, plan.width], any row stride; overflow: bool [T]; workspace: float32
    [T, 2 * plan.runs], contiguous. Returns out and overflow. Raises ConfigError for another dtype, shape or device.
    """
    if values.dtype not in (torch.float32, torch.float64) or not values.is_contiguous():
        raise ConfigError(f"values must be float32 or float64, contiguous; got {values.dtype}")
    _shape("values", values, values.dtype, (-1, plan.columns), plan)
    tokens = values.shape[0]
    out = _or_new("out", out, torch.uint8, (tokens, plan.width), plan)
    overflow = _or_new("overflow", overflow, torch.bool, (tokens,), plan)
    workspace = _or_new("workspace", workspace, torch.float32, (tokens, 2 * plan.runs), plan, contiguous=True)
    if tokens:
        _kernels(plan.device).encode(values, plan, out, overflow, workspace)
    return out, overflow


def decode_device(data: Tensor, plan: Plan, out: Tensor | None = None) -> Tensor:
    """``decode`` on the device: float32 [T, n] (out, any row stride) from uint8 [T, plan.width], bit for bit.

    An out of float16 gets the same numbers rounded, those beyond float16 its largest.
    """
    _shape("data", data, torch.uint8, (-1, plan.width), plan)
    dtype = torch.float16 if out is not None and out.dtype == torch.float16 else torch.float32
    out = _or_new("out", out, dtype, (data.shape[0], plan.columns), plan)
    if out.numel():
        _kernels(plan.device).decode(data, plan, out)
    return out


def squared_errors_device(values: Tensor, levels: Tensor, plan: Plan, kept: Tensor, lost: Tensor) -> None:
    """Per token, in input units squared: kept float64 [T], the energy of exact coefficients, and lost float64 [T],
    that of what quantising them loses.

    values: float64 [T, n] as for ``encode_device``; levels: float32 [T, n] from ``decode_device``; both contiguous.
    Each term is what float64 on a CPU gives; the order of a sum is the device's.
    """
    for name, x, dtype in (("values", values, torch.float64), ("levels", levels, torch.float32)):
        _shape(name, x, dtype, (-1, plan.columns), plan)
        if not x.is_contiguous():
            raise ConfigError(f"{name} must be contiguous; its strides are {x.stride()}")
    for name, x in (("levels", levels[:, 0] if plan.columns else kept), ("kept", kept), ("lost", lost)):
        if len(x) != len(values):
            raise ConfigError(f"{name} has {len(x)} tokens; values have {len(values)}")
    for name, x in (("kept", kept), ("lost", lost)):
        _shape(name, x, torch.float64, (len(values),), plan)
    if len(kept):
        _kernels(plan.device).errors(values, levels, kept, lost)


def valid_device(data: Tensor, plan: Plan, out: Tensor | None = None) -> Tensor:
    """``valid`` on the device: bool [T] (out)."""
    _shape("data", data, torch.uint8, (-1, plan.width), plan)
    out = _or_new("out", out, torch.bool, (data.shape[0],), plan)
    if len(out):
        _kernels(plan.device).valid(data, plan, out)
    return out


def to_planes(data: Tensor, block_start: Tensor, max_tokens: int, out: Tensor) -> None:
    """Every block's bytes by position, not by token: byte 0 of each of its tokens, then byte 1, and so on.

    data: uint8 [T, W], any row stride; block_start: int64 [B + 1] on the device, the first token of each block, then T
    (the caller's promise; blocks may be empty); max_tokens: at least the tokens of any block; out: uint8 [T * W], block
    b from block_start[b] * W on. Raises ConfigError for another dtype, shape or device.
    """
    _planes(data, out, block_start, max_tokens, back=False)


def from_planes(planes: Tensor, block_start: Tensor, max_tokens: int, out: Tensor) -> None:
    """The inverse of ``to_planes``: planes uint8 [T * W] into out uint8 [T, W]."""
    _planes(out, planes, block_start, max_tokens, back=True)


def _planes(data: Tensor, flat: Tensor, block_start: Tensor, max_tokens: int, back: bool) -> None:
    if data.dtype != torch.uint8 or data.dim() != 2 or (data.shape[1] > 1 and data.stride(1) != 1):
        raise ConfigError(f"tokens must be uint8 [T, W] with bytes next to each other; got {data.dtype} {data.shape}")
    if flat.dtype != torch.uint8 or flat.shape != (data.numel(),) or not flat.is_contiguous():
        raise ConfigError(f"planes must be uint8 [{data.numel()}], contiguous; got {flat.dtype} {tuple(flat.shape)}")
    if block_start.dtype != torch.int64 or block_start.dim() != 1 or not len(block_start):
        raise ConfigError(f"block_start must be int64 [B + 1]; got {block_start.dtype} {tuple(block_start.shape)}")
    if not data.device == flat.device == block_start.device or not block_start.is_contiguous():
        raise ConfigError(f"tokens, planes and block_start are on {data.device}, {flat.device}, {block_start.device}")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1")
    if data.numel() and len(block_start) > 1:
        _kernels(data.device).planes(data, flat, block_start, max_tokens, back)


def _or_new(
    name: str, x: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], plan: Plan, contiguous: bool = False
) -> Tensor:
    if x is None:
        return torch.empty(shape, dtype=dtype, device=plan.device)
    _shape(name, x, dtype, shape, plan)
    if contiguous and not x.is_contiguous():
        raise ConfigError(f"{name} must be contiguous; its strides are {x.stride()}")
    return x


def _shape(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], plan: Plan) -> None:
    """-1 in ``shape`` is any size. Elements of a row lie next to each other."""
    right = x.dim() == len(shape) and all(want in (-1, got) for want, got in zip(shape, x.shape, strict=True))
    if x.dtype != dtype or not right or x.device != plan.device:
        raise ConfigError(
            f"{name} must be {dtype} {list(shape)} on {plan.device}; got {x.dtype} {list(x.shape)} on {x.device}"
        )
    if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ConfigError(f"{name} must have the elements of a row next to each other; its strides are {x.stride()}")


def _kernels(device: torch.device) -> ModuleType:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"the device is {device}; this needs an NVIDIA GPU (encode and decode work anywhere)")
    try:
        from dynamo_kvtc.ops.affine import triton
    except ImportError as exc:
        raise MissingDependencyError("the quantiser on a GPU needs triton: pip install dynamo-kvtc[gpu]") from exc
    return triton
