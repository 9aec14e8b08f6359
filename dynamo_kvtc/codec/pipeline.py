"""READ FIRST: one block's way out of the engine's cache and back, on one screen.

    encode: K without RoPE -> per layer group: transform, quantise -> which tokens stay exact -> entropy code -> record
    decode: record, verified -> per layer group: entropy decode -> dequantise, inverse transform -> RoPE -> exact tokens

K and V are in the engine's form: [L, H, T, D], K after RoPE, in the cache's dtype. A record holds one block. Layer
groups decode one at a time, in any order, so attention on the first layers can start before the last are back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.kvtc import KvtcProfile
from dynamo_kvtc.codec.paper import PaperProfile
from dynamo_kvtc.codec.policy import ExactCounts, ExactPolicy
from dynamo_kvtc.codec.profile import PROFILE_IDS, Profile
from dynamo_kvtc.codec.record import MAX_BLOCK_TOKENS, Record, RecordHeader, build_record, parse_record
from dynamo_kvtc.errors import ConfigError, RecordFormatError, RecordMismatchError
from dynamo_kvtc.ops.rope import apply_rope, remove_rope

PROFILES: dict[str, Callable[[Artifact, int, torch.device | str], Profile]] = {
    "kvtc": KvtcProfile,
    "paper": PaperProfile,
}

_CHUNK_TOKENS = 1024
"""Tokens transformed at once: bounds the float64 workspace, changes no result."""
_TILE_TOKENS = 256
"""Tokens brought back at once: what lies between two steps stays in a CPU's caches. Changes no result."""


@dataclass(frozen=True)
class EncodedBlock:
    """A block's record and how many of its tokens are exact in it, by reason."""

    record: bytes
    exact: ExactCounts


class BlockCodec:
    """Encodes and decodes blocks at one operating point of one artifact. Stateless between calls."""

    def __init__(
        self, artifact: Artifact, point: str, policy: ExactPolicy | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """Raises ConfigError if the artifact has no such operating point, ArtifactFormatError if its tensors lie."""
        self.artifact = artifact
        self.shape = artifact.shape
        self.point = artifact.point_index(point)
        self.policy = policy or ExactPolicy()
        self.device = torch.device(device)
        self.profile = PROFILES[artifact.manifest.profile](artifact, self.point, self.device)

    def encode_block(self, k: Tensor, v: Tensor, positions: Tensor, exact: Tensor | None = None) -> EncodedBlock:
        """One block's record. Arguments and errors as in ``encode_blocks``."""
        return self.encode_blocks(k, v, positions, exact, block_tokens=k.shape[2] if k.dim() == 4 else None)[0]

    def encode_blocks(
        self, k: Tensor, v: Tensor, positions: Tensor, exact: Tensor | None = None, block_tokens: int | None = None
    ) -> list[EncodedBlock]:
        """Consecutive blocks of one sequence; a record's bytes do not depend on what is encoded with it.

        k, v: [L, H, T, D] after RoPE, in the artifact's cache dtype; positions: int64 [T], each token's own (gaps are
        fine: a cache may have lost tokens); exact: bool [T], tokens to store bit-exact (default: the policy's sinks);
        block_tokens: tokens per record (default: the artifact's), the last block may be shorter.
        Raises ConfigError if shapes or dtypes are not the artifact's.
        """
        self._check_input(k, v, positions, exact)
        size = self.artifact.manifest.block_tokens if block_tokens is None else block_tokens
        if not 1 <= size <= MAX_BLOCK_TOKENS:
            raise ConfigError(f"block_tokens is {size}; a record holds 1 to {MAX_BLOCK_TOKENS} tokens")
        asked = positions < self.policy.sinks if exact is None else exact
        asked = asked.cpu()

        symbols, error = self._quantise(k, v, positions)
        finite = torch.stack([x.isfinite().all(dim=3).all(dim=1).all(dim=0) for x in (k, v)]).all(dim=0).cpu()
        # An infinite error cannot be coded at all, even where the bound is off.
        too_far = ~((error <= self.policy.max_error) & error.isfinite())
        keep = asked | ~finite | too_far

        blocks = [slice(i, min(i + size, len(keep))) for i in range(0, len(keep), size)]
        coded_per_block = [int((~keep[b]).sum()) for b in blocks]
        payloads = [self.profile.pack(g, s[~keep.to(s.device)], coded_per_block) for g, s in enumerate(symbols)]
        kv = torch.stack([k, v], dim=2)  # [L, H, 2, T, D]: one copy, so exact bytes are cut out of it a block at a time
        out = []
        for i, b in enumerate(blocks):
            raw = kv[:, :, :, b][:, :, :, keep[b].to(kv.device)].cpu()
            header = RecordHeader(
                profile=PROFILE_IDS[self.artifact.manifest.profile],
                point=self.point,
                artifact=self.artifact.fingerprint,
                rank=self.artifact.rank,
                positions=positions[b].cpu().numpy(),
                exact=keep[b].numpy(),
            )
            sections = [_exact_bytes(raw[start:end]) + payloads[g][i] for g, (start, end) in enumerate(self._groups)]
            counts = ExactCounts.of(asked[b], ~finite[b], too_far[b])
            out.append(EncodedBlock(build_record(header, sections), counts))
        return out

    def decode_block(self, record: bytes | memoryview) -> tuple[Tensor, Tensor, Tensor]:
        """k, v [L, H, T, D] after RoPE in the cache's dtype, and positions int64 [T]. Raises RecordError."""
        return self.decode_blocks([record])

    def decode_blocks(self, records: Sequence[bytes | memoryview]) -> tuple[Tensor, Tensor, Tensor]:
        """Consecutive blocks at once, T the tokens of all of them. Raises RecordError, ConfigError for no records."""
        if not records:
            raise ConfigError("decode_blocks needs at least one record")
        parsed = [self.parse(record) for record in records]
        parts = [self.decode_group(parsed, g) for g in range(len(self._groups))]
        positions = torch.from_numpy(np.concatenate([r.header.positions for r in parsed]))
        return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts]), positions

    def parse(self, record: bytes | memoryview) -> Record:
        """Header verified, and for this artifact, rank and operating point. Raises RecordError."""
        parsed = parse_record(record)
        ours = (
            PROFILE_IDS[self.artifact.manifest.profile], self.artifact.fingerprint, self.artifact.rank, self.point,
            len(self._groups),
        )  # fmt: skip
        header = parsed.header
        theirs = (header.profile, header.artifact, header.rank, header.point, parsed.groups)
        for name, mine, other in zip(
            ("profile", "artifact", "rank", "point", "layer groups"), ours, theirs, strict=True
        ):
            if mine != other:
                raise RecordMismatchError(f"the record's {name} is {other:#x}; this codec's is {mine:#x}")
        return parsed

    def decode_group(self, records: Sequence[Record], group: int) -> tuple[Tensor, Tensor]:
        """One layer group of consecutive blocks: k, v [Lg, H, T, D] after RoPE in the cache's dtype.

        Needs only this group's sections. Raises RecordCorruptError or RecordFormatError, having returned nothing.
        """
        start, end = self._groups[group]
        raw, payloads = [], []
        for record in records:
            exact, payload = self._split_section(record, group, end - start)
            raw.append(exact)
            payloads.append(payload)
        coded_per_block = [record.header.coded_tokens for record in records]
        symbols = self.profile.unpack(group, payloads, coded_per_block)
        keep = torch.from_numpy(np.concatenate([record.header.exact for record in records]))
        positions = torch.from_numpy(np.concatenate([record.header.positions for record in records]))

        shape = (end - start, self.shape.kv_heads, len(keep), self.shape.head_dim)
        k = torch.empty(shape, dtype=self.shape.torch_dtype, device=self.device)
        v = torch.empty_like(k)
        coded, exact_tokens = torch.nonzero(~keep)[:, 0], torch.nonzero(keep)[:, 0].to(self.device)
        # A value next to the dtype's largest must not come back as infinity: only finite tokens are ever coded.
        top = torch.finfo(k.dtype).max
        for first in range(0, len(coded), _TILE_TOKENS):
            tile = coded[first : first + _TILE_TOKENS]
            k_coded, v_coded = self.profile.dequantise(group, symbols[first : first + _TILE_TOKENS])
            k_coded = apply_rope(k_coded, positions[tile], self.artifact.manifest.rope)
            at = tile.to(self.device)
            k[:, :, at], v[:, :, at] = k_coded.clamp(-top, top).to(k.dtype), v_coded.clamp(-top, top).to(v.dtype)
        kv_exact = torch.cat(raw, dim=3).to(self.device)
        k[:, :, exact_tokens], v[:, :, exact_tokens] = kv_exact[:, :, 0], kv_exact[:, :, 1]
        return k, v

    @property
    def _groups(self) -> tuple[tuple[int, int], ...]:
        return self.artifact.manifest.groups

    def _quantise(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[list[Tensor], Tensor]:
        """Per layer group symbols [T, W], and each token's worst error over the groups, float64 [T] on the CPU."""
        chunks: list[list[Tensor]] = [[] for _ in self._groups]
        errors = []
        for first in range(0, k.shape[2], _CHUNK_TOKENS):
            tokens = slice(first, first + _CHUNK_TOKENS)
            worst = torch.zeros(k[:, :, tokens].shape[2], dtype=torch.float64, device=self.device)
            for g, (start, end) in enumerate(self._groups):
                kg = k[start:end, :, tokens].to(self.device, torch.float32)
                vg = v[start:end, :, tokens].to(self.device, torch.float32)
                kg = remove_rope(kg, positions[tokens].to(self.device), self.artifact.manifest.rope)
                symbols, error = self.profile.quantise(g, kg, vg)
                chunks[g].append(symbols)
                worst = torch.maximum(worst, error)
            errors.append(worst)
        return [torch.cat(parts) for parts in chunks], torch.cat(errors).cpu()

    def _split_section(self, record: Record, group: int, layers: int) -> tuple[Tensor, memoryview]:
        """Exact K and V [Lg, H, 2, E, D] and the coded payload of one layer group."""
        section = record.section(group)
        count = record.header.tokens - record.header.coded_tokens
        size = count * layers * self.shape.bytes_per_layer_token
        if size > len(section):
            raise RecordFormatError(f"layer group {group}: {count} exact tokens need {size} bytes of {len(section)}")
        shape = (layers, self.shape.kv_heads, 2, count, self.shape.head_dim)
        if not count:
            return torch.empty(shape, dtype=self.shape.torch_dtype), section
        raw = torch.frombuffer(bytearray(section[:size]), dtype=self.shape.torch_dtype).reshape(shape)
        return raw, section[size:]

    def _check_input(self, k: Tensor, v: Tensor, positions: Tensor, exact: Tensor | None) -> None:
        s = self.shape
        tokens = k.shape[2] if k.dim() == 4 else 0
        want = (s.layers, s.kv_heads, tokens, s.head_dim)
        for name, x in (("k", k), ("v", v)):
            if tuple(x.shape) != want or x.dtype != s.torch_dtype or tokens == 0:
                raise ConfigError(
                    f"{name} is {x.dtype} {tuple(x.shape)}; the artifact codes {s.dtype} [{s.layers}, {s.kv_heads}, "
                    f"T >= 1, {s.head_dim}] (tensor-parallel rank {self.artifact.rank})"
                )
        if positions.dtype != torch.int64 or positions.shape != (tokens,):
            raise ConfigError(f"positions must be int64 [{tokens}]; got {positions.dtype} {tuple(positions.shape)}")
        if exact is not None and (exact.dtype != torch.bool or exact.shape != (tokens,)):
            raise ConfigError(f"exact must be bool [{tokens}]; got {exact.dtype} {tuple(exact.shape)}")


def _exact_bytes(raw: Tensor) -> bytes:
    """[Lg, H, 2, E, D] as bytes, in that order."""
    return raw.contiguous().view(torch.uint8).numpy().tobytes() if raw.numel() else b""
