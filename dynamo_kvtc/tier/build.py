"""A tier out of its options: opened at start, all that can be refused refused then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dynamo_kvtc.codec.artifact import Artifact, load_artifact
from dynamo_kvtc.codec.paged import PagedCodec, PagedLimits
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.pages import PagedCache
from dynamo_kvtc.store import MAX_RECORD_BYTES
from dynamo_kvtc.store.disk import DiskStore
from dynamo_kvtc.store.host import HostStore, make_arena
from dynamo_kvtc.store.placed import Place, PlacedStore
from dynamo_kvtc.store.tiered import TieredStore
from dynamo_kvtc.tier.admission import Admission
from dynamo_kvtc.tier.announce import Announcer
from dynamo_kvtc.tier.cpu import CpuTranscoder
from dynamo_kvtc.tier.cuda import CudaTranscoder
from dynamo_kvtc.tier.estimate import Estimate
from dynamo_kvtc.tier.identity import EngineCache, KeySpace, point_of, policy_of
from dynamo_kvtc.tier.metrics import TierMetrics
from dynamo_kvtc.tier.options import TierOptions, check_memory, disk_folder
from dynamo_kvtc.tier.overlay import WINDOW_TOKENS, Overlay
from dynamo_kvtc.tier.pages import Pages
from dynamo_kvtc.tier.tier import Tier
from dynamo_kvtc.tier.transcode import Transcoder

_HEADER_BYTES = 4096
"""More than the header of any record."""


def open_tier(
    options: TierOptions, engine: EngineCache, pages: Pages | PagedCache, artifact: Artifact | None = None,
    metrics: TierMetrics | None = None, on_moved: Callable[[bytes, str], None] | None = None,
    on_removed: Callable[[bytes], None] | None = None, limits: PagedLimits | None = None, place: Place | None = None,
    queue_bytes: int | None = None, announcer: Announcer | None = None, engine_first: bool = True,
) -> Tier:  # fmt: skip
    """pages: the door to a CPU's pages, or the views of a GPU's. on_moved, on_removed: as ``TieredStore`` tells them.
    place: for an engine that decides itself what lies on host and disk (``PlacedStore``); its disk begins empty.
    queue_bytes: of raw blocks that wait, instead of the options'. announcer: tells other workers, once it is started.
    engine_first: stores let the engine's next step go first (False: another worker waits for what is stored).

    Raises ConfigError, ArtifactError or MissingDependencyError: options that cannot be used together, budgets larger
    than memory or disk, a folder that cannot be written, an artifact of another model or cache.
    """
    artifact = artifact or load_artifact(options.artifact, engine.tp_rank)
    engine.check(artifact)
    point, policy = point_of(artifact, options.point), policy_of(options.exact, options.sinks)
    raw = engine.block_tokens * artifact.shape.bytes_per_token
    fits = raw + _HEADER_BYTES <= MAX_RECORD_BYTES
    if not fits and (options.exact == "all" or options.window):
        most = (MAX_RECORD_BYTES - _HEADER_BYTES) // artifact.shape.bytes_per_token
        raise ConfigError(
            f"exact is {options.exact!r}, window {options.window or 0} and a block of {engine.block_tokens} tokens has "
            f"{raw} bytes; a record holds {MAX_RECORD_BYTES}: set the engine's block size to {most} tokens or fewer"
        )
    check_memory(options)
    cpu_codec = BlockCodec(artifact, point, policy)
    metrics = metrics or TierMetrics()
    arena = make_arena(options.host_bytes) if options.host_bytes else None
    host = None if arena is None else HostStore(arena)
    transcoder: Transcoder
    if isinstance(pages, PagedCache):
        codec = PagedCodec(artifact, point, pages, policy, limits)
        transcoder = CudaTranscoder(
            codec, cpu_codec, None if arena is None else pinned(arena, pages.device), engine_first=engine_first
        )
        if pages.device.type == "cuda":
            transcoder.warm()
    else:
        transcoder = CpuTranscoder(cpu_codec, pages)
    if transcoder.block_tokens != engine.block_tokens:
        raise ConfigError(
            f"the pages have blocks of {transcoder.block_tokens} tokens, the engine {engine.block_tokens}"
        )
    announcer = announcer or Announcer()
    on_moved, on_removed = announcer.also_moved(on_moved), announcer.also_removed(on_removed)
    disk = None
    if options.disk_bytes:
        disk = DiskStore(
            disk_folder(options, engine.tp_rank), options.disk_bytes, read_seconds=options.read_seconds,
            fresh=place is not None,
        )  # fmt: skip
    window = 0 if options.exact == "all" or not fits else WINDOW_TOKENS if options.window is None else options.window
    if place is None:
        store = TieredStore(host, disk, options.write_through, options.promote_on, on_moved, on_removed)
    else:
        # Who places blocks itself does not say which of them end a sequence.
        store, window = PlacedStore(host, disk, place, on_moved, on_removed), 0
    exact_keys = KeySpace(engine, artifact, point, policy_of("all", options.sinks))
    return Tier(
        KeySpace(engine, artifact, point, policy), store, transcoder, metrics,
        Admission(options.min_tokens, options.store_on_use), Estimate(options.prefill_tokens_per_second),
        options.queue_bytes if queue_bytes is None else queue_bytes,
        Overlay(host, exact_keys, metrics, window, raw + _HEADER_BYTES), announcer,
    )  # fmt: skip


def pinned(arena: Any, device: torch.device) -> torch.Tensor:
    """The arena as a tensor, pinned if the device is a GPU. Raises ConfigError if that is refused."""
    view = torch.frombuffer(arena, dtype=torch.uint8)
    if device.type == "cuda":
        # Bit 0: usable from every context.
        code = torch.cuda.cudart().cudaHostRegister(view.data_ptr(), view.nbytes, 1)
        if int(code):
            raise ConfigError(
                f"{view.nbytes} bytes of host memory cannot be pinned (CUDA error {int(code)}): lower host_gib, or "
                "raise the limit on locked memory (ulimit -l)"
            )
    return view
