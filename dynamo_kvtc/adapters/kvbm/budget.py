"""How many bytes a rank may use, and what a block is expected to take of them.

KVBM's leader (1.4.2 to 1.6.1) reads DYN_KVBM_CPU_CACHE_GB and DYN_KVBM_DISK_CACHE_GB as numbers of 10**9 bytes for all
ranks together, and divides them by the sum of the ranks' bytes per block. ..._OVERRIDE_NUM_BLOCKS above 0 is the number
of blocks instead. What it cannot read it takes for 0; here that is refused. A rank's share of those bytes is its hard
budget.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.record import header_bytes
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store import disk_file
from dynamo_kvtc.store.disk import INDEX_SHARE, LOG_SHARE
from dynamo_kvtc.store.host import COMPACT_FROM, UNIT_BYTES

GB = 10**9
CONTENT_MARGIN = 1.25
"""Texts differ: what a coded block may take over what calibration expected before the arena is too small for the blocks
that the leader counts on. SmolLM2, 18x and 34x, calibrated on Python's sources: 1.07 on its reference, 1.2 on English.
Beyond it the least recently used records go, and their loads fail: set block_bytes, or calibrate on what is served."""
SEQUENCE_TOKENS = 1024
"""Of a short sequence: its first, exact tokens are shared out over so many."""
_DISK_OVERHEAD = 1 / INDEX_SHARE + 1 / LOG_SHARE
"""Of a disk budget."""
_DISK_FIXED_BYTES = 3 << 20


@dataclass(frozen=True)
class Pool:
    """One of the leader's: gb of 10**9 bytes for all ranks, or blocks."""

    gb: float
    blocks: int

    def __bool__(self) -> bool:
        return self.gb > 0 or self.blocks > 0


@dataclass(frozen=True)
class Budget:
    host: Pool
    disk: Pool
    world_size: int

    def host_bytes(self, block_bytes: int) -> int:
        if self.host.blocks:
            return self.host.blocks * _up(block_bytes, UNIT_BYTES) + UNIT_BYTES
        return int(self.host.gb * GB) // self.world_size

    def disk_bytes(self, block_bytes: int) -> int:
        if self.disk.blocks:
            records = self.disk.blocks * _up(block_bytes, disk_file.UNIT_BYTES)
            return max(disk_file.MIN_BUDGET_BYTES, int(records / (1 - _DISK_OVERHEAD)) + _DISK_FIXED_BYTES)
        return int(self.disk.gb * GB) // self.world_size


def read_budget(world_size: int) -> Budget:
    """From the environment that the leader has, too. Raises ConfigError."""
    budget = Budget(_pool("CPU"), _pool("DISK"), world_size)
    if not budget.host and not budget.disk:
        raise ConfigError(
            "DYN_KVBM_CPU_CACHE_GB and DYN_KVBM_DISK_CACHE_GB are both 0 or not set: give KVBM memory, disk or both, "
            "in the environment of the leader and of every worker"
        )
    return budget


def disk_root(publish: str) -> str:
    """The folder for scratch files; engines of one machine have different ports. publish: the leader's endpoint."""
    port = publish.rpartition(":")[2]
    return os.path.join(os.environ.get("DYN_KVBM_DISK_CACHE_DIR") or "/tmp", f"kvtc-kvbm-{port}")


def block_bytes(artifact: Artifact, point: str, exact: str, sinks: int, block_tokens: int, disk: bool) -> int:
    """What a block of this rank takes on average, so that as many as the leader counts on fit the budgets.

    Host: the record, half a unit of rounding, the sixteenth that fragmentation may take. Disk: the record, half a page,
    index and log; the larger of both.
    """
    token = artifact.shape.bytes_per_token
    header = header_bytes(len(artifact.manifest.groups))
    if exact == "all":
        record = header + block_tokens / 8 + 8 + block_tokens * token
        host = _up(math.ceil(record), UNIT_BYTES)
        return max(host, math.ceil(_up(host, disk_file.UNIT_BYTES) / (1 - _DISK_OVERHEAD))) if disk else host
    ratio = artifact.manifest.points[artifact.point_index(point)].expected_ratio
    coded = CONTENT_MARGIN * token / ratio
    # A first block's exact tokens are not coded; a sequence shorter than a block has fewer.
    share = min(sinks, SEQUENCE_TOKENS) / SEQUENCE_TOKENS
    record = header + block_tokens * (share * token + (1 - share) * coded)
    sizes = [(record + UNIT_BYTES / 2) / (1 - 1 / COMPACT_FROM)]
    if disk:
        sizes.append((record + disk_file.UNIT_BYTES / 2) / (1 - _DISK_OVERHEAD))
    return math.ceil(max(sizes))


def _pool(name: str) -> Pool:
    size, override = f"DYN_KVBM_{name}_CACHE_GB", f"DYN_KVBM_{name}_CACHE_OVERRIDE_NUM_BLOCKS"
    gb, blocks = os.environ.get(size, ""), os.environ.get(override, "").strip()
    if gb and not re.fullmatch(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", gb, re.ASCII):
        raise ConfigError(f"{size} is {gb!r}; it must be a number of GB (10**9 bytes), 0 or more")
    if blocks and not re.fullmatch(r"\d+", blocks, re.ASCII):
        raise ConfigError(f"{override} is {blocks!r}; it must be a whole number of blocks, or not be set")
    return Pool(float(gb or 0), int(blocks or 0))


def _up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
