"""The transform on the GPU: its operands as the kernels want them, and the checks before they are launched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.project import BASIS_BITS, INPUT_MAX

ALIGNMENT = 16
"""Bytes: rows of what a kernel reads through a tensor descriptor start at multiples of it."""
MAX_LIMB_SUM = 2**17 - 1
"""Products of two limbs, each up to 2**14, that fit int32 when added."""
_LIMB = 256


def padded(columns: int, itemsize: int) -> int:
    """Columns of a row that starts at a multiple of ALIGNMENT bytes; at least one such stretch, so none is empty."""
    step = ALIGNMENT // itemsize
    return max(step, -(-columns // step) * step)


def aligned(x: Tensor) -> Tensor:
    """A copy of x [n, m] whose rows start at multiples of ALIGNMENT bytes; what lies between them is 0.

    Returns a view [n, max(m, 1)] of it: an operand without columns gets one of zeros.
    """
    rows, columns = x.shape
    out = torch.zeros(rows, padded(columns, x.itemsize), dtype=x.dtype, device=x.device)
    out[:, :columns] = x
    return out[:, : max(columns, 1)]


def limbs(x: Tensor) -> tuple[Tensor, Tensor]:
    """int16 x as int8 (high, low), x = 256 * high + low; |x| is at most 127 * 256 + 127."""
    high = (x.to(torch.int32) + _LIMB // 2) >> 8
    return high.to(torch.int8), (x.to(torch.int32) - high * _LIMB).to(torch.int8)


@dataclass(frozen=True)
class Analysis:
    """A layer group's operands for ``analyse_device``, rows aligned: a wide component's two limbs are apart.

    low: int8 [2W + N, P], the W wide components' high limbs, their low limbs, the N narrow ones; high: int8
    [2W + N, max(Pw, 1)], the same for the wide inputs alone.
    """

    low: Tensor
    high: Tensor
    width: int

    @classmethod
    def of(cls, wide: Tensor, narrow: Tensor, wide_inputs: Tensor) -> Analysis:
        """wide: int16 [P, W]; narrow: int8 [P, N]; wide_inputs: int64 [Pw]; all on the device to be used."""
        rows = torch.cat([*limbs(wide.T), narrow.T])
        return cls(aligned(rows), aligned(rows[:, wide_inputs]), wide.shape[1])

    @property
    def products(self) -> int:
        """Columns of what ``analyse_device`` makes."""
        return len(self.low)

    @property
    def nbytes(self) -> int:
        return self.low.untyped_storage().nbytes() + self.high.untyped_storage().nbytes()


def analyse_device(low: Tensor, high: Tensor, basis: Analysis, out: Tensor) -> None:
    """Exact coefficients of fixed-point inputs, modulo 2**32: a wide component's is 256 * out[:, j] + out[:, W + j], by
    its basis's limbs, a narrow one's out[:, W + j].

    low: int8 [T, P], the low limbs; high: int8 [T, max(Pw, 1)], the wide inputs' high limbs (zeros where there are
    none); rows aligned. out: int32 [T, 2W + N].
    """
    from dynamo_kvtc.ops.project import triton as kernels

    for name, x in (("low", low), ("high", high)):
        _check_operand(name, x, torch.int8)
    if out.dtype != torch.int32 or out.shape != (len(low), basis.products):
        raise ConfigError(f"out must be int32 [{len(low)}, {basis.products}]; got {out.dtype} {tuple(out.shape)}")
    for name, x, operand in (("low", low, basis.low), ("high", high, basis.high)):
        if x.shape[1] != operand.shape[1]:
            raise ConfigError(f"{name} has {x.shape[1]} columns; the basis has {operand.shape[1]}")
    kernels.analyse(low, high, basis.low, basis.high, out)


@dataclass(frozen=True)
class WideAnalysis:
    """Operands for ``analyse_wide_device``: R components of P channels, columns ``offset`` on of its inputs.

    limbs: int8 [2R, offset + P], rows aligned: the components' high limbs, then their low ones; zeros before offset.
    """

    limbs: Tensor

    @classmethod
    def of(cls, basis: Tensor, offset: int = 0) -> WideAnalysis:
        """basis: int16 [P, R], on the device to be used. Raises ConfigError if a product's sums could leave 32 bits, or
        an entry two limbs, which none of an orthonormal basis of BASIS_BITS does."""
        if len(basis) > MAX_LIMB_SUM:
            raise ConfigError(
                f"{len(basis)} channels; exact sums of limbs take at most {MAX_LIMB_SUM}: more layer groups"
            )
        if basis.numel() and int(basis.to(torch.int32).abs().max()) > INPUT_MAX:
            raise ConfigError(f"a basis entry is beyond {INPUT_MAX}; two limbs hold no more")
        both = torch.zeros(2 * basis.shape[1], offset + len(basis), dtype=torch.int8, device=basis.device)
        for i, limb in enumerate(limbs(basis.T)):
            both[i * basis.shape[1] : (i + 1) * basis.shape[1], offset:] = limb
        return cls(aligned(both))

    @property
    def rank(self) -> int:
        return len(self.limbs) // 2

    @property
    def nbytes(self) -> int:
        return self.limbs.untyped_storage().nbytes()


def analyse_wide_device(inputs: Tensor, basis: WideAnalysis, out: Tensor, products: Tensor) -> None:
    """``analyse_wide`` on the device: exact coefficients, float64 [T, R] (out, contiguous).

    inputs: int8 [2T, offset + P], rows aligned: the tokens' low limbs, then their high ones, each within -128..127 as
    ``ops.pages.gather_fixed`` writes them; columns before offset do not matter. products: int32 [2T, 2R], contiguous,
    workspace. Raises ConfigError for another dtype or shape.
    """
    from dynamo_kvtc.ops.project import triton as kernels

    _check_operand("inputs", inputs, torch.int8)
    tokens, rank = len(inputs) // 2, basis.rank
    if len(inputs) % 2 or inputs.shape[1] != basis.limbs.shape[1]:
        raise ConfigError(f"inputs must be int8 [2T, {basis.limbs.shape[1]}]; got {tuple(inputs.shape)}")
    for name, x, dtype, shape in (
        ("out", out, torch.float64, (tokens, rank)), ("products", products, torch.int32, (2 * tokens, 2 * rank)),
    ):  # fmt: skip
        if x.dtype != dtype or x.shape != shape or not x.is_contiguous():
            raise ConfigError(f"{name} must be {dtype} {list(shape)}, contiguous; got {x.dtype} {tuple(x.shape)}")
    if tokens and rank:
        kernels.analyse_wide(inputs, basis.limbs, products, out)


def square_sums_device(inputs: Tensor, out: Tensor) -> None:
    """out int64 [T]: sums of the squares of inputs given as limbs, int8 [2T, P], low ones first, rows aligned."""
    from dynamo_kvtc.ops.project import triton as kernels

    _check_operand("inputs", inputs, torch.int8)
    if out.dtype != torch.int64 or out.shape != (len(inputs) // 2,) or len(inputs) % 2 or not out.is_contiguous():
        raise ConfigError(f"out must be int64 [{len(inputs) // 2}]; got {out.dtype} {tuple(out.shape)}")
    if len(out):
        kernels.square_sums(inputs, out)


@dataclass(frozen=True)
class Synthesis:
    """A layer group's operands for ``synthesise_into_pages``. Columns are padded heads (``head_columns``), Pp in all.

    narrow: int8 [Pp, N]; wide: float16 [Pp, W]; gain, mean: float32 [P]; narrow_unit: steps per unit of the narrow
    product; first_head: the head of the first column, of K's Lg H heads and then V's: K or V may come alone.
    """

    narrow: Tensor
    wide: Tensor
    gain: Tensor
    mean: Tensor
    narrow_unit: float
    first_layer: int
    layers: int
    head: int
    interleaved: bool
    scaling: float
    first_head: int = 0

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in (self.narrow, self.wide, self.gain, self.mean))


@dataclass(frozen=True)
class Pages:
    """Where a cache's pages are: addresses int64 [L, 2] (bytes, K and V of each layer), strides in elements.

    alignment: elements that divide every address and stride; a power of two, at most 16 bytes. table, group_of: of a
    cache whose layers are of several groups, ``ops.pages.cache.PageTable``.
    """

    addresses: Tensor
    dtype: torch.dtype
    heads: int
    head_dim: int
    block_tokens: int
    stride_block: int
    stride_head: int
    stride_token: int
    alignment: int = 1
    table: Tensor | None = None
    group_of: Tensor | None = None


def head_columns(head_dim: int, pairs: int, interleaved: bool) -> Tensor:
    """int64 [HEAD]: which dim of a head each column of a padded head holds, -1 for none; HEAD is a power of two.

    Dims that RoPE rotates together are neighbours. Pairs of them are dealt out to four, in turn, and each gets up to
    eight that follow each other: as matrix units deal out the columns of a product to threads.
    """
    width = 1 << max(1, (head_dim - 1).bit_length())
    out = torch.full((width,), -1, dtype=torch.int64)
    order = torch.arange(width // 2)
    if run := pairs_in_a_run(width):
        order = order.view(-1, 4, run).transpose(1, 2).reshape(-1)
    for column, i in enumerate(order.tolist()):
        if i < (head_dim + 1) // 2:
            dims = (i, i + pairs) if i < pairs and not interleaved else (2 * i, 2 * i + 1)
            out[2 * column] = dims[0]
            if dims[1] < head_dim:
                out[2 * column + 1] = dims[1]
    return out


def pairs_in_a_run(width: int) -> int:
    """Of a padded head: pairs that follow each other in one thread; 0 if they stay as they are."""
    return min(8, width // 8)


def synthesis_operands(
    wide: Tensor, narrow: Tensor, exponent: int, gain: Tensor, mean: Tensor, layers: tuple[int, int],
    heads: int, head_dim: int, pairs: int, interleaved: bool, scaling: float, first_head: int = 0,
) -> Synthesis:  # fmt: skip
    """wide: int16 [P, W]; narrow: int8 [P, N]; gain, mean: float32 [P]; on the device to be used. P = 2 Lg H D, or half
    of it for K (first_head 0) or V (first_head Lg H) alone."""
    columns = head_columns(head_dim, pairs, interleaved).to(wide.device)
    units = len(mean) // head_dim
    index = (torch.arange(units, device=wide.device)[:, None] * head_dim + columns).where(columns >= 0, -1).reshape(-1)
    there = index >= 0

    def rows(x: Tensor) -> Tensor:
        return torch.where(there.reshape(-1, *[1] * (x.dim() - 1)), x[index.clamp(min=0)], 0)

    full = (rows(wide).float() * 2.0**-BASIS_BITS).half()
    return Synthesis(
        aligned(rows(narrow)), aligned(full), gain, mean, 2.0**-exponent, layers[0],
        layers[1] - layers[0], len(columns), interleaved, scaling, first_head,
    )  # fmt: skip


def synthesise_into_pages(
    narrow: Tensor, wide: Tensor, basis: Synthesis, factors: Tensor, cos: Tensor, sin: Tensor, pages: Pages,
    slots: Tensor,
) -> None:  # fmt: skip
    """Decoded levels to K (RoPE applied) and V in the engine's pages, in one pass.

    narrow: int8 [T, max(N, 1)]; wide: float16 [T, max(W, 1)]; rows aligned; zeros where there is no component.
    factors: float32 [T], what a token's narrow levels are to be multiplied by; cos, sin: float32 [T, pairs]; slots:
    int64 [T], -1 for a token not to be written.
    """
    from dynamo_kvtc.ops.project import triton as kernels

    _check_operand("narrow", narrow, torch.int8)
    _check_operand("wide", wide, torch.float16)
    kernels.synthesise(narrow, wide, basis, factors, cos, sin, pages, slots)


def each_tile(device: torch.device) -> Iterator[None]:
    """Repeats a loop's body for every form that products on a device come in, whatever their size: for whoever compiles
    ahead. Products of other threads get that form, too, meanwhile; they are as right."""
    if device.type != "cuda":
        yield
        return
    from dynamo_kvtc.ops.project import triton as kernels

    yield from kernels.each_tile()


def _check_operand(name: str, x: Tensor, dtype: torch.dtype) -> None:
    fits = x.dtype == dtype and x.dim() == 2 and x.stride(1) == 1 and x.shape[1] > 0
    if not fits or x.data_ptr() % ALIGNMENT or x.stride(0) * x.itemsize % ALIGNMENT:
        raise ConfigError(
            f"{name} must be {dtype} [T, n > 0] with rows at multiples of {ALIGNMENT} bytes; got {x.dtype} "
            f"{tuple(x.shape)} of strides {x.stride()}"
        )
