"""How fast blocks leave a GPU coded and come back, against moving the same bytes raw and against computing them again.

A case first proves its result: records of some blocks are the CPU's byte for byte, every block is reported sound, and
what comes back is as far from what left as the CPU's decoder says. Times are medians of wall-clock seconds around the
whole call, host work included; stages are GPU events of one further run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_kvtc.bench.shapes import model_of
from dynamo_kvtc.bench.stages import decode_stages, floors, measure_rates, median, stages
from dynamo_kvtc.bench.synthetic import Synthetic, rows_of
from dynamo_kvtc.calibrate.collect import default_groups
from dynamo_kvtc.codec.paged import Blocks, PagedCodec, PagedLimits
from dynamo_kvtc.codec.paged_groups import PagedPoint
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.errors import CalibrationError, ConfigError
from dynamo_kvtc.ops.deflate.nvcomp import MAX_CHUNK_BYTES, Codec
from dynamo_kvtc.ops.pages import PagedCache
from dynamo_kvtc.types import KVShape

MAX_RANK = {"kvtc": 6144, "paper": 10_000}
"""As `kvtc calibrate` has it."""
_TOLERANCE = 2e-3

Row = dict[str, Any]


@dataclass(frozen=True)
class CodecCase:
    """What to measure. ratios: of coded tokens (profile paper: before DEFLATE); requests x tokens are coded in one
    call; profile: "kvtc" or "paper"; groups: layer groups (default: kvtc as `kvtc calibrate` has it; paper as few as
    nvCOMP's DEFLATE can take); max_rank: components kept per layer group; lanes: rANS lanes a token (default: by their
    cost); prefill: whether to time a random-weight model of the shape, too."""

    shape: str
    ratios: tuple[float, ...]
    tokens: int
    requests: int = 1
    profile: str = "kvtc"
    groups: int | None = None
    max_rank: int | None = None
    lanes: int | None = None
    block_tokens: int = 16
    prefill: bool = True
    small_tokens: int = 512
    limits: PagedLimits | None = None


@dataclass
class Coded:
    """A synthetic cache, its records, and where they were restored to."""

    codec: PagedCodec
    decoder: PagedCodec
    blocks: Blocks
    back: Blocks
    arena: Tensor
    encoded: Any


def run(case: CodecCase, progress: Callable[[str], None]) -> list[Row]:
    """One row per ratio. Raises ConfigError without a GPU, CalibrationError if a result is not right."""
    if not torch.cuda.is_available():
        raise ConfigError("`kvtc bench codec` needs an NVIDIA GPU; there is none here")
    device = torch.device("cuda")
    shape = model_of(case.shape).kv
    rates = measure_rates(device)
    progress(f"rates: {rates}")
    synthetic = synthesise(case, shape, device)
    cache, slots = synthetic.cache(case.tokens * case.requests)
    positions = torch.arange(case.tokens).repeat(case.requests)
    synthetic.fill(cache, slots, positions)
    progress("artifact and cache made")
    prefill = None
    if case.prefill:
        from dynamo_kvtc.hf.random_model import prefill_seconds

        prefill = prefill_seconds(model_of(case.shape), case.tokens)
        progress(f"prefill of {case.tokens} tokens: {prefill:.3f} s")
    rows = []
    for ratio in case.ratios:
        coded = code(case, synthetic, cache, slots, positions, f"{ratio:g}")
        error = verify(case, coded, f"{ratio:g}")
        progress(f"ratio {ratio:g}: verified")
        rows.append(_timed(case, coded, ratio, rates) | {"relative_error": error, "prefill_s": prefill})
        del coded
        torch.cuda.empty_cache()
        progress(f"ratio {ratio:g}: done")
    return rows


def synthesise(case: CodecCase, shape: KVShape, device: torch.device) -> Synthetic:
    """The case's artifact, and caches to code with it."""
    if case.profile not in MAX_RANK:
        raise ConfigError(f"profile is {case.profile!r}; it must be one of {', '.join(MAX_RANK)}")
    groups = case.groups
    if groups is None and case.profile == "paper":
        # Codes of a block and layer group are one chunk of DEFLATE.
        codes = case.block_tokens * shape.bytes_per_token / min(case.ratios)
        groups = min(shape.layers, -(-int(codes) // MAX_CHUNK_BYTES[Codec.DEFLATE]))
    groups = groups or default_groups(shape, 1)
    rank = case.max_rank or MAX_RANK[case.profile]
    return Synthetic(shape, case.ratios, groups, rank, case.block_tokens, device, case.lanes, case.profile)


def code(
    case: CodecCase, synthetic: Synthetic, cache: PagedCache, slots: Tensor, positions: Tensor, name: str,
    deflate: str = "deflate",
) -> Coded:  # fmt: skip
    """Codes the cache and restores it to another. Raises CalibrationError if a block does not come back."""
    raw_bytes = len(slots) * synthetic.shape.bytes_per_token
    arena = torch.empty(
        int(2.5 * raw_bytes / float(name)) + (64 << 20), dtype=torch.uint8, pin_memory=cache.device.type == "cuda"
    )
    codec = PagedCodec(synthetic.artifact, name, cache, limits=case.limits, deflate=deflate)
    blocks = Blocks.uniform(slots, positions, case.block_tokens)
    encoded = codec.encode(blocks, arena)
    encoded.finish()
    target, target_slots = synthetic.cache(len(slots))
    decoder = PagedCodec(synthetic.artifact, name, target, limits=case.limits, deflate=deflate)
    back = Blocks.uniform(target_slots, None, case.block_tokens)
    status = decoder.decode(arena, encoded.offsets, encoded.sizes, back).finish()
    if status.any():
        raise CalibrationError(f"{int((status != 0).sum())} of {len(status)} blocks did not come back: {set(status)}")
    return Coded(codec, decoder, blocks, back, arena, encoded)


def verify(case: CodecCase, coded: Coded, name: str) -> float:
    """Relative error of what came back. Raises CalibrationError if records or cache are not what the CPU makes."""
    size, records, slots, back = case.block_tokens, coded.encoded.records(), coded.blocks.slots, coded.back.slots
    positions, cache, target = coded.blocks.positions, coded.codec.cache, coded.decoder.cache
    assert positions is not None
    reference = BlockCodec(coded.codec.artifact, name)
    last = len(records) - 1
    for b in sorted({min(1, last), last}):
        own = slice(b * size, min((b + 1) * size, len(slots)))
        theirs = reference.encode_block(*rows_of(cache, slots[own]), positions[own]).record
        # DEFLATE may be spelt in more than one way; what the record says may not.
        wanted = torch.stack(reference.decode_block(theirs)[:2]).float()
        said = torch.stack(reference.decode_block(records[b])[:2]).float()
        if not torch.equal(said, wanted) or (case.profile == "kvtc" and theirs != records[b]):
            raise CalibrationError(f"block {b}: the GPU's record is not the CPU's")
        found = torch.stack(rows_of(target, back[own])).float()
        off = float((found - wanted).norm() / wanted.norm())
        if not off <= _TOLERANCE:
            raise CalibrationError(f"block {b}: the GPU's cache is {off:.2e} from the CPU's; allowed is {_TOLERANCE}")
    some = slice(0, min(4096, len(slots)))
    before, after = (torch.stack(rows_of(c, s[some])).float() for c, s in ((cache, slots), (target, back)))
    return float((after - before).norm() / before.norm())


def _timed(case: CodecCase, coded: Coded, ratio: float, rates: dict[str, float]) -> Row:
    codec, decoder, encoded, arena = coded.codec, coded.decoder, coded.encoded, coded.arena
    slots = coded.blocks.slots

    def encode() -> None:
        codec.encode(coded.blocks, arena).finish()

    def restore() -> Any:
        return decoder.decode(arena, encoded.offsets, encoded.sizes, coded.back)

    def decode() -> None:
        restore().finish()

    raw_bytes = len(slots) * codec.artifact.shape.bytes_per_token
    row: Row = {
        "shape": case.shape, "profile": case.profile, "tokens": len(slots), "requests": case.requests, "ratio": ratio,
        **_point(codec), "device": torch.cuda.get_device_name(), "torch": str(torch.__version__), "rates": rates,
        "raw_bytes": raw_bytes, "record_bytes": int(encoded.sizes.sum()),
        "exact_tokens": int(encoded.exact.sum()),
        "basis_bytes": codec.basis_bytes, "workspace_bytes": codec.workspace_bytes,
        "raw_h2d_s": raw_bytes / rates["h2d_bytes_s"], "raw_d2h_s": raw_bytes / rates["d2h_bytes_s"],
        "encode_s": median(encode), "decode_s": median(decode),
    }  # fmt: skip
    n = int(np.searchsorted(np.cumsum(coded.back.counts), min(case.small_tokens, len(slots)))) + 1
    tokens = int(coded.back.counts[:n].sum())
    small = Blocks.uniform(coded.back.slots[:tokens], None, case.block_tokens)
    row["small_tokens"] = tokens
    row["small_decode_s"] = median(
        lambda: decoder.decode(arena, encoded.offsets[:n], encoded.sizes[:n], small).finish()
    )
    row["first_group_s"], row["all_groups_s"], row["decode_stages_s"] = decode_stages(decoder, restore)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decode()
    # What a restore needs beside cache and bases: the decoder's workspace, and what the call took for itself.
    row["restore_bytes"] = decoder.restore_workspace_bytes + torch.cuda.max_memory_allocated() - before
    row["encode_stages_s"] = stages(codec, encode)
    row["floors_s"] = floors(codec.point, len(slots), raw_bytes, row["record_bytes"], rates)
    return row


def _point(codec: PagedCodec) -> Row:
    """The operating point's shape. rank: of each layer group; of profile paper K's and V's together."""
    point = codec.point
    told: Row = {"groups": len(point.groups), "channels": [g.channels for g in point.groups]}
    if isinstance(point, PagedPoint):
        return told | {
            "rank": [g.rank for g in point.groups], "wide_components": [g.wide for g in point.groups],
            "wide_inputs": [g.wide_inputs for g in point.groups], "lanes": point.lanes,
        }  # fmt: skip
    return told | {"rank": [g.k.rank + g.v.rank for g in point.groups], "code_bytes": [g.width for g in point.groups]}
