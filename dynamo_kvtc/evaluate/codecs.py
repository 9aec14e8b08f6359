"""What a codec is to the measurements: a cache goes in, the cache it gives back and its bytes come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.kvtc import KvtcProfile
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactCounts, ExactPolicy
from dynamo_kvtc.errors import ConfigError

STORAGE_BYTES = 2
"""Bytes a value of "16-bit storage", which every ratio is against. That is the cache dtype's own size where it has 16
bits; a float32 cache counts 2 bytes a value too, for coded and exact tokens alike, so that ratios compare."""


@dataclass(frozen=True)
class CodedBytes:
    """Where the bytes of a coded cache went. Sums with ``+``.

    coded_bytes: all bytes but the exact tokens' values: headers, section tables, scales and streams.
    exact_bytes: the exact tokens' values, in 16-bit storage.
    raw_bytes: what the coded tokens take in 16-bit storage.
    coded_tokens, exact: tokens coded, and tokens kept exact by reason. With tensor parallelism each rank codes its own
        heads, and a token counts once per rank.
    entropy_bits: exact cross-entropy of the coded symbols under the artifact's static tables, in bits; None where
        there are none (peers, profile paper).
    """

    coded_bytes: int
    exact_bytes: int
    raw_bytes: int
    coded_tokens: int
    exact: ExactCounts = field(default_factory=ExactCounts)
    entropy_bits: float | None = None

    @property
    def exact_tokens(self) -> int:
        return self.exact.total

    @property
    def ratio_coded(self) -> float:
        """16-bit bytes of the coded tokens over the bytes they take. 0 if nothing was coded."""
        return self.raw_bytes / max(self.coded_bytes, 1)

    @property
    def ratio_total(self) -> float:
        """16-bit bytes of all tokens over all bytes, exact tokens included."""
        return (self.raw_bytes + self.exact_bytes) / max(self.coded_bytes + self.exact_bytes, 1)

    @property
    def bytes_over_entropy(self) -> float | None:
        """Coded bytes, headers included, over the cross-entropy of their symbols; None where that is not known."""
        return 8 * self.coded_bytes / self.entropy_bits if self.entropy_bits else None

    def __add__(self, other: CodedBytes) -> CodedBytes:
        known = self.entropy_bits is not None and other.entropy_bits is not None
        return CodedBytes(
            self.coded_bytes + other.coded_bytes,
            self.exact_bytes + other.exact_bytes,
            self.raw_bytes + other.raw_bytes,
            self.coded_tokens + other.coded_tokens,
            add_counts(self.exact, other.exact),
            (self.entropy_bits or 0.0) + (other.entropy_bits or 0.0) if known else None,
        )


class CacheCodec(Protocol):
    """Codes a cache and gives it back."""

    @property
    def name(self) -> str: ...

    def run(self, k: Tensor, v: Tensor, positions: Tensor, exact_mask: Tensor) -> tuple[Tensor, Tensor, CodedBytes]:
        """k, v: [L, H, T, D] in engine form (K after RoPE, the cache's dtype); positions: int64 [T]; exact_mask: bool
        [T], tokens that must come back bit-exact, at least one of them False. Returns k, v of the same form and
        device, and the bytes.
        """
        ...


class RawCodec:
    """The cache as it is: ratio 1, and the noise floor of the measurement."""

    name = "raw"

    def run(self, k: Tensor, v: Tensor, positions: Tensor, exact_mask: Tensor) -> tuple[Tensor, Tensor, CodedBytes]:
        size = token_bytes(k)
        coded, exact = split_count(exact_mask)
        return k, v, CodedBytes(coded * size, exact * size, coded * size, coded, ExactCounts(policy=exact))


class RecordCodec:
    """Records of one operating point, block by block as an engine stores them."""

    def __init__(
        self, name: str, artifact: Artifact, point: str, policy: ExactPolicy | None = None,
        device: torch.device | str = "cpu", other_ranks: Sequence[Artifact] = (),
    ) -> None:  # fmt: skip
        """artifact: as rank 0 sees it; other_ranks: as ranks 1, 2, ... see it, where tp_size is above 1: each rank
        codes its own KV heads, as in the engine. policy: only its max_error is used, the mask is ``run``'s.
        Raises ConfigError if the artifact has no such point or a rank is missing.
        """
        ranks = [artifact, *other_ranks]
        if [a.rank for a in ranks] != list(range(artifact.manifest.tp_size)):
            raise ConfigError(
                f"{name}: the artifact is for {artifact.manifest.tp_size} tensor-parallel rank(s); got rank(s) "
                f"{', '.join(str(a.rank) for a in ranks)}"
            )
        self.name = name
        self.artifact = artifact
        self.codecs = [BlockCodec(a, point, policy, device) for a in ranks]

    def run(self, k: Tensor, v: Tensor, positions: Tensor, exact_mask: Tensor) -> tuple[Tensor, Tensor, CodedBytes]:
        """See ``CacheCodec.run``. Raises ConfigError if k or v is not of the artifact's shape and dtype."""
        heads = self.artifact.shape.kv_heads
        # Rank r has the r-th run of heads.
        by_rank = [(k, v)] if len(self.codecs) == 1 else zip(k.split(heads, dim=1), v.split(heads, dim=1), strict=True)
        parts = [
            _run_rank(codec, rank_k, rank_v, positions, exact_mask)
            for codec, (rank_k, rank_v) in zip(self.codecs, by_rank, strict=True)
        ]
        total = parts[0][2]
        for part in parts[1:]:
            total = total + part[2]
        return (
            torch.cat([part[0] for part in parts], dim=1).to(k.device),
            torch.cat([part[1] for part in parts], dim=1).to(v.device),
            total,
        )


def _run_rank(
    codec: BlockCodec, k: Tensor, v: Tensor, positions: Tensor, exact_mask: Tensor
) -> tuple[Tensor, Tensor, CodedBytes]:
    blocks = codec.encode_blocks(k, v, positions, exact_mask)
    records = [block.record for block in blocks]
    counts = ExactCounts()
    for block in blocks:
        counts = add_counts(counts, block.exact)
    stored = counts.total * codec.shape.bytes_per_token
    coded = k.shape[2] - counts.total
    size = token_bytes(k)
    spent = CodedBytes(
        coded_bytes=sum(map(len, records)) - stored,
        exact_bytes=counts.total * size,
        raw_bytes=coded * size,
        coded_tokens=coded,
        exact=counts,
        entropy_bits=record_entropy_bits(codec, records),
    )
    return *codec.decode_blocks(records)[:2], spent


def record_symbols(codec: BlockCodec, records: Sequence[bytes], group: int) -> Tensor:
    """Symbols [T, W] of one layer group of consecutive records' coded tokens. Raises RecordError."""
    start, end = codec.artifact.manifest.groups[group]
    parsed = [codec.parse(record) for record in records]
    payloads = []
    for record in parsed:
        # A section begins with its layers' exact values; what follows is the profile's.
        exact_tokens = record.header.tokens - record.header.coded_tokens
        payloads.append(record.section(group)[exact_tokens * (end - start) * codec.shape.bytes_per_layer_token :])
    return codec.profile.unpack(group, payloads, [record.header.coded_tokens for record in parsed])


def record_entropy_bits(codec: BlockCodec, records: Sequence[bytes]) -> float | None:
    """Exact cross-entropy of the records' symbols under the static tables, in bits; None for other profiles."""
    profile = codec.profile
    if not isinstance(profile, KvtcProfile):
        return None
    return sum(profile.cross_entropy_bits(g, record_symbols(codec, records, g)) for g in range(len(profile.groups)))


def token_bytes(k: Tensor) -> int:
    """K and V of one token of [L, H, T, D] in 16-bit storage, in bytes."""
    layers, heads, _, dim = k.shape
    return 2 * layers * heads * dim * STORAGE_BYTES


def split_count(exact_mask: Tensor) -> tuple[int, int]:
    """How many tokens are coded and how many exact."""
    exact = int(exact_mask.sum())
    return len(exact_mask) - exact, exact


def add_counts(a: ExactCounts, b: ExactCounts) -> ExactCounts:
    """Sum by reason."""
    return ExactCounts(a.policy + b.policy, a.nonfinite + b.nonfinite, a.error_bound + b.error_bound)
