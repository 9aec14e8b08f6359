"""READ FIRST on the GPU path: blocks between an engine's paged cache and records in host memory.

    encode: per chunk of blocks, per layer group: gather + fixed point -> int8 product -> quantise -> which tokens stay
            exact -> entropy code -> sizes to the host -> payloads side by side -> checksum and copy into the arena ->
            headers
    decode: records to the GPU, headers on the host meanwhile; per layer group, per chunk: checksum -> entropy decode to
            levels -> product that undoes scale and mean, applies RoPE and writes the pages -> an event per layer group.
            A call whose levels fit the workspace has all layer groups' decoded at once, products one by one

``paged_encode`` and ``paged_decode`` hold what the profiles share; ``paged_kvtc`` (rANS in lanes) and ``paged_paper``
(DEFLATE by nvCOMP, K and V apart) the rest. Records are those of ``codec.pipeline``, to the byte but for how DEFLATE
streams spell theirs. Everything is asynchronous on the codec's streams; the host waits once per chunk while encoding,
to learn the records' sizes, and never while decoding. Workspace is taken once; lists of a call's blocks and tokens, and
their rotations, come from PyTorch's caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.headers import Identity
from dynamo_kvtc.codec.paged_groups import PagedPoint, pages_of
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.codec.profile import PROFILE_IDS
from dynamo_kvtc.codec.record import MAX_BLOCK_TOKENS
from dynamo_kvtc.errors import ConfigError, MissingDependencyError
from dynamo_kvtc.ops.pages import PagedCache, check_slots
from dynamo_kvtc.ops.rope import rotations_of

if TYPE_CHECKING:
    from dynamo_kvtc.codec.paged_decode import Decoder, Restore
    from dynamo_kvtc.codec.paged_encode import Encoded, Encoder
    from dynamo_kvtc.codec.paged_paper_point import PaperPoint

CODERS = ("deflate", "zlib")
"""Who may code payloads of profile paper. nvCOMP's own formats are not its records: ``bench.entropy`` times them."""


@dataclass(frozen=True)
class PagedLimits:
    """How much a codec works on at once; its memory follows from it.

    encode_tokens, decode_tokens: tokens of a chunk; record_bytes: largest run of records staged at once, in bytes;
    block_tokens: tokens of the largest block that profile paper encodes (its DEFLATE needs room for each).
    """

    encode_tokens: int = 4096
    decode_tokens: int = 8192
    record_bytes: int = 64 << 20
    block_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("encode_tokens", "decode_tokens", "record_bytes", "block_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"PagedLimits.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Blocks:
    """B blocks of tokens, T in all, in order, of one sequence or of many. All on the CPU.

    counts: int32 [B], tokens of each block; slots: int64 [T], where they are (or go) in the paged cache; positions:
    int64 [T]; exact: bool [T], tokens to store bit-exact (encoding only; default: the policy's sinks).
    """

    counts: NDArray[np.int32]
    slots: Tensor
    positions: Tensor | None = None
    exact: Tensor | None = None

    def __post_init__(self) -> None:
        tokens = int(self.counts.sum()) if len(self.counts) else 0
        if self.counts.dtype != np.int32 or not len(self.counts) or self.counts.min() < 1:
            raise ConfigError("Blocks.counts must be int32 [B >= 1], each at least 1")
        if self.counts.max() > MAX_BLOCK_TOKENS:
            raise ConfigError(f"a block of {self.counts.max()} tokens; a record holds at most {MAX_BLOCK_TOKENS}")
        wanted = [("slots", self.slots, torch.int64), ("positions", self.positions, torch.int64),
                  ("exact", self.exact, torch.bool)]  # fmt: skip
        for name, x, dtype in wanted:
            if x is not None and (x.dtype != dtype or x.shape != (tokens,) or x.device.type != "cpu"):
                raise ConfigError(
                    f"Blocks.{name} must be {dtype} [{tokens}] on the CPU; got {x.dtype} {tuple(x.shape)} on {x.device}"
                )

    @classmethod
    def uniform(cls, slots: Tensor, positions: Tensor | None, block_tokens: int, exact: Tensor | None = None) -> Blocks:
        """Blocks of ``block_tokens`` tokens each; the last may be shorter."""
        if block_tokens < 1:
            raise ConfigError(f"block_tokens is {block_tokens}; it must be at least 1")
        full, rest = divmod(len(slots), block_tokens)
        counts = np.array([block_tokens] * full + ([rest] if rest else []), dtype=np.int32)
        return cls(counts, slots, positions, exact)


class PagedCodec:
    """Encodes and decodes blocks of one paged cache at one operating point of an artifact, of either profile.

    One codec works on one ``encode`` and one ``decode`` at a time, which share nothing that either writes; its streams
    let it run beside the engine.
    """

    def __init__(
        self, artifact: Artifact, point: str, cache: PagedCache, policy: ExactPolicy | None = None,
        limits: PagedLimits | None = None, deflate: str = "deflate", effort: int = 0,
    ) -> None:  # fmt: skip
        """Profile paper alone looks at deflate and effort. deflate: "deflate" is nvCOMP's, "zlib" the host's, for
        machines without nvCOMP and blocks too large for it: slow, waiting for the GPU. effort: of nvCOMP's encoder, 0
        (entropy coding alone) to 5; on an H200, 0 gave a ratio of 1.375 at 8.1 GB/s, 1 1.371 at 1.7 GB/s.

        Raises ConfigError (operating point, cache of another shape, coder), ArtifactFormatError, MissingDependencyError
        without triton or the nvCOMP that is asked for, and ConfigError naming the bytes if the GPU has no room for
        bases and workspace."""
        _check_cache(artifact, cache)
        if deflate not in CODERS:
            raise ConfigError(f"deflate is {deflate!r}; records are coded by one of {', '.join(CODERS)}")
        if find_spec("triton") is None:
            raise MissingDependencyError("the GPU path needs triton: pip install dynamo-kvtc[gpu]")
        self.artifact = artifact
        self.cache = cache
        self.policy = policy or ExactPolicy()
        self.limits = limits or PagedLimits()
        index = artifact.point_index(point)
        self.marks: list[tuple[str, torch.cuda.Event]] | None = None
        self.identity = Identity(
            PROFILE_IDS[artifact.manifest.profile], index, artifact.fingerprint, artifact.rank,
            len(artifact.manifest.groups),
        )  # fmt: skip
        try:
            self.rotations = rotations_of(artifact.manifest.rope, cache.device)
            self.pages = pages_of(cache)
            self.point, self._encoder, self._decoder = self._profile(index, deflate, effort)
            self.basis_bytes = self.point.nbytes
        except torch.OutOfMemoryError as exc:
            free, total = torch.cuda.mem_get_info(cache.device)
            raise ConfigError(
                f"{cache.device} has {free >> 20} of {total >> 20} MiB free, too little for the codec's bases and "
                f"workspace: lower PagedLimits ({self.limits}) or the artifact's rank, or leave the engine less memory"
            ) from exc

    def mark(self, stage: str) -> None:
        """Where the current stream is, for whoever measures stages: sets ``marks`` to a list to collect them."""
        if self.marks is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((stage, event))

    def _profile(self, index: int, deflate: str, effort: int) -> tuple[PagedPoint | PaperPoint, Encoder, Decoder]:
        """The artifact's profile: the operating point on the device, and the codec's halves."""
        if self.artifact.manifest.profile == "kvtc":
            from dynamo_kvtc.codec.paged_kvtc import KvtcDecoder, KvtcEncoder

            kvtc = PagedPoint.load(self.artifact, index, self.cache.device)
            return kvtc, KvtcEncoder(self, kvtc), KvtcDecoder(self, kvtc)
        from dynamo_kvtc.codec.paged_paper import PaperDecoder, PaperEncoder
        from dynamo_kvtc.codec.paged_paper_point import PaperPoint

        paper = PaperPoint.load(self.artifact, index, self.cache.device)
        return paper, PaperEncoder(self, paper, deflate, effort), PaperDecoder(self, paper, deflate)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace on the device, for encoding and decoding."""
        return self._encoder.nbytes + self._decoder.nbytes

    @property
    def restore_workspace_bytes(self) -> int:
        """Bytes of workspace on the device, for decoding alone."""
        return self._decoder.nbytes

    def encode(self, blocks: Blocks, arena: Tensor, at: int = 0) -> Encoded:
        """Records of blocks into ``arena`` from byte ``at`` on: ``paged_encode.Encoded``.

        arena: uint8 [bytes], pinned host memory (any memory on a CPU). Raises ConfigError if positions are missing or
        out of range, a slot is not the cache's, or the records do not fit; then no record counts as written.
        """
        if blocks.positions is None:
            raise ConfigError("encoding needs Blocks.positions")
        if len(blocks.positions) and (int(blocks.positions.min()) < 0 or int(blocks.positions.max()) >= 2**31):
            raise ConfigError(
                f"positions run from {int(blocks.positions.min())} to {int(blocks.positions.max())}; allowed is 0 to "
                "2**31 - 1"
            )
        self._check(blocks, arena, written=False)
        return self._encoder.encode(blocks, arena, at)

    def decode(
        self, arena: Tensor, offsets: NDArray[np.int64], sizes: NDArray[np.int64], blocks: Blocks, by_group: bool = True
    ) -> Restore:
        """Records back into the pages at ``blocks.slots``: ``paged_decode.Restore``, with an event per layer group.

        by_group: the first layers of all blocks come first, so that attention may start; False if they are waited for
            as a whole, which takes fewer launches.
        offsets, sizes: int64 [B], the records' bytes in the arena. A record that is damaged, or another codec's, is
        reported in ``Restore.finish()``: none of its blocks counts as restored. Raises ConfigError as ``encode`` does.
        """
        if offsets.dtype != np.int64 or sizes.dtype != np.int64 or not len(offsets) == len(sizes) == len(blocks.counts):
            raise ConfigError(f"offsets and sizes must be int64 [{len(blocks.counts)}], one per block")
        self._check(blocks, arena, written=True)
        return self._decoder.decode(arena, offsets, sizes, blocks, by_group)

    def _check(self, blocks: Blocks, arena: Tensor, written: bool) -> None:
        check_slots(self.cache, blocks.slots, written)
        if arena.dtype != torch.uint8 or arena.dim() != 1 or not arena.is_contiguous() or arena.device.type != "cpu":
            raise ConfigError(f"the arena must be uint8 [bytes] in host memory; got {arena.dtype} {tuple(arena.shape)}")
        if self.cache.device.type == "cuda" and not arena.is_pinned():
            raise ConfigError("the arena is not pinned; the GPU reads and writes it directly: use pin_memory=True")


def _check_cache(artifact: Artifact, cache: PagedCache) -> None:
    s = artifact.shape
    theirs = (cache.layers, cache.heads, cache.head_dim, cache.dtype)
    if theirs != (s.layers, s.kv_heads, s.head_dim, s.torch_dtype):
        raise ConfigError(
            f"the cache has {theirs[0]} layers, {theirs[1]} KV heads, head dim {theirs[2]}, {theirs[3]}; the artifact "
            f"codes {s.layers}, {s.kv_heads}, {s.head_dim}, {s.dtype} (tensor-parallel rank {artifact.rank})"
        )
