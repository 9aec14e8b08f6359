"""nvCOMP's coders on the bytes that profile paper codes, and on exact tokens: `kvtc bench entropy`, for choosing a
coder, not for records.

Only DEFLATE, nvCOMP's or zlib's, makes records of profile paper: what GDeflate and ANS write nothing but nvCOMP reads.
Every coder must give its bytes back before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dynamo_kvtc.bench.codec import MAX_RANK
from dynamo_kvtc.bench.shapes import shape_of
from dynamo_kvtc.bench.synthetic import Synthetic, rows_of
from dynamo_kvtc.codec.paper import PaperProfile
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.deflate.host import HostDecoder, HostEncoder
from dynamo_kvtc.ops.deflate.nvcomp import BatchDecoder, BatchEncoder, Codec

CODERS = {"deflate": Codec.DEFLATE, "zlib": None, "gdeflate": Codec.GDEFLATE, "ans": Codec.ANS}


@dataclass(frozen=True)
class CoderResult:
    """ratio: bytes in over bytes out; *_gb_s: 10**9 uncompressed bytes a second."""

    ratio: float
    encode_gb_s: float
    decode_gb_s: float


@dataclass(frozen=True)
class EntropyCase:
    """coders: names in CODERS; shape: of a synthetic cache, of which ``tokens`` are coded by profile paper at ``ratio``
    (before the coder), in ``groups`` layer groups and blocks of ``block_tokens``; device: where nvCOMP's coders run."""

    coders: tuple[str, ...]
    shape: str = "smollm2-135m"
    ratio: float = 16.0
    tokens: int = 1024
    groups: int = 10
    device: str = "cpu"
    block_tokens: int = 16


def run(case: EntropyCase, tell: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """What each coder does to the first layer group's payloads; on a GPU also "exact tokens", ANS on K and V as they
    are. tell: takes a line before each. Raises ConfigError for a coder, shape or size that cannot be, CalibrationError
    for a ratio, MissingDependencyError for nvCOMP.
    """
    if unknown := sorted(set(case.coders) - set(CODERS)):
        raise ConfigError(f"coders {', '.join(unknown)} are unknown; known: {', '.join(CODERS)}")
    if case.tokens < case.block_tokens:
        raise ConfigError(f"tokens is {case.tokens}; it must be at least a block, {case.block_tokens}")
    tell(f"a synthetic cache of {case.tokens} tokens of {case.shape}")
    chunks, exact = payload_bytes(case)
    out = {}
    for name in case.coders:
        tell(f"{name} on {len(chunks)} blocks of {chunks.shape[1]} bytes")
        out[name] = time_coder(name, chunks)
    if exact.device.type == "cuda":
        tell("ANS on exact tokens")
        out["exact tokens"] = exact_token_gain(exact, case.block_tokens)
    return {name: asdict(result) for name, result in out.items()}


def payload_bytes(case: EntropyCase) -> tuple[Tensor, Tensor]:
    """The first layer group's payloads before DEFLATE, uint8 [blocks, bytes], and its tokens as the cache has them,
    [T, channels]."""
    device = torch.device(case.device)
    shape = shape_of(case.shape)
    made = Synthetic(shape, (case.ratio,), case.groups, MAX_RANK["paper"], case.block_tokens, device, profile="paper")
    tokens = case.tokens // case.block_tokens * case.block_tokens
    cache, slots = made.cache(tokens)
    # The profile's input has no RoPE: all tokens at position 0.
    made.fill(cache, slots, torch.zeros(tokens, dtype=torch.int64))
    start, end = made.artifact.manifest.groups[0]
    k, v = (x[start:end].to(device) for x in rows_of(cache, slots))
    symbols, _ = PaperProfile(made.artifact, 0, device).quantise(0, k.float(), v.float())
    blocks = symbols.view(-1, case.block_tokens, symbols.shape[1]).transpose(1, 2)
    exact = torch.cat([k, v]).permute(2, 0, 1, 3).reshape(tokens, -1)
    return blocks.reshape(len(blocks), -1).contiguous(), exact


def time_coder(deflate: str, chunks: Tensor, effort: int = 0, repeats: int = 5) -> CoderResult:
    """chunks: uint8 [N, bytes of a chunk], where the coder runs ("zlib": anywhere); deflate: a name in CODERS.

    Raises ConfigError for another name or dtype or if the bytes do not come back, MissingDependencyError for nvCOMP.
    """
    if deflate not in CODERS:
        raise ConfigError(f"deflate is {deflate!r}; it must be one of {', '.join(CODERS)}")
    return _time(CODERS[deflate], chunks, effort, repeats)


def exact_token_gain(values: Tensor, chunk_tokens: int = 16) -> CoderResult:
    """What a lossless coder of half-precision numbers (nvCOMP's ANS) would save on exact tokens.

    values: bfloat16 or float16 [T, channels] on a GPU, as they are stored. Records do not use it: this says whether
    they should.
    """
    if values.dtype not in (torch.bfloat16, torch.float16) or values.dim() != 2 or len(values) < chunk_tokens:
        raise ConfigError(
            f"exact tokens are bfloat16 or float16 [{chunk_tokens} or more, channels]; got {values.dtype} "
            f"{tuple(values.shape)}"
        )
    blocks = values[: len(values) // chunk_tokens * chunk_tokens].contiguous().view(torch.uint8)
    return _time(Codec.ANS_HALF, blocks.reshape(len(values) // chunk_tokens, -1), 0, 5)


def _time(codec: Codec | None, chunks: Tensor, effort: int, repeats: int) -> CoderResult:
    if chunks.dtype != torch.uint8 or chunks.dim() != 2 or not chunks.numel():
        raise ConfigError(f"chunks must be uint8 [N, bytes]; got {chunks.dtype} {tuple(chunks.shape)}")
    (n, longest), device = chunks.shape, chunks.device
    padded = -(-longest // 16) * 16
    source = torch.zeros(n, padded, dtype=torch.uint8, device=device)
    source[:, :longest] = chunks
    numbers = torch.arange(n, device=device)
    sizes = torch.full((n,), longest, dtype=torch.int64, device=device)
    encoder = BatchEncoder(codec, n, longest, device, effort) if codec else HostEncoder(n, longest)
    decoder = BatchDecoder(codec, n, longest, device) if codec else HostDecoder(n, longest)
    packed = torch.empty(n * encoder.room, dtype=torch.uint8, device=device)
    back, made, found = torch.zeros_like(source), torch.zeros_like(sizes), torch.zeros_like(sizes)
    status = torch.full((2, n), -1, dtype=torch.int32, device=device)

    def encode() -> None:
        encoder.encode(source.view(-1), numbers * padded, sizes, packed, numbers * encoder.room, made, status[0])

    def decode() -> None:
        decoder.decode(
            packed, numbers * encoder.room, made, back.view(-1), numbers * padded, sizes, found, status[1]
        )  # fmt: skip

    encode()
    decode()
    if bool(status.any()) or not torch.equal(found, sizes) or not torch.equal(back, source):
        raise ConfigError(f"{'zlib' if codec is None else codec.name} does not give {n} chunks of {longest} bytes back")
    total = chunks.numel()
    rates = [total / _seconds(step, device, repeats) / 1e9 for step in (encode, decode)]
    return CoderResult(total / int(made.sum()), *rates)


def _seconds(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    """The median."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]
