"""Which caches are the same: a record's key covers everything that makes two of them differ."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.codec.record import MAX_BLOCK_TOKENS
from dynamo_kvtc.errors import ArtifactMismatchError, ConfigError
from dynamo_kvtc.types import KVShape, ModelIdentity, RopeSpec

KEY_BYTES = 32
ALL_TOKENS = 2**31
"""Sinks that leave no token coded: positions end below."""


@dataclass(frozen=True)
class EngineCache:
    """The cache at hand, as the engine has it. shape: the whole model's; block_tokens: of one block of its pages."""

    model: ModelIdentity
    shape: KVShape
    rope: RopeSpec
    tp_rank: int
    tp_size: int
    block_tokens: int

    def check(self, artifact: Artifact) -> None:
        """Raises ArtifactMismatchError or ConfigError, naming both sides, unless the artifact is for this cache."""
        artifact.check_model(self.model, self.shape, self.rope)
        if artifact.manifest.tp_size != self.tp_size or artifact.rank != self.tp_rank:
            raise ArtifactMismatchError(
                f"the artifact is seen by rank {artifact.rank} of {artifact.manifest.tp_size}, the engine is rank "
                f"{self.tp_rank} of {self.tp_size}; calibrate with --tp-size {self.tp_size}"
            )
        if not 1 <= self.block_tokens <= MAX_BLOCK_TOKENS:
            raise ConfigError(
                f"the engine's blocks have {self.block_tokens} tokens; a record holds 1 to {MAX_BLOCK_TOKENS}: set "
                "the engine's block size"
            )


class KeySpace:
    """Keys of one cache at one operating point and policy: 32 bytes over all of that and the engine's block hash,
    which is chained over the tokens before."""

    def __init__(self, cache: EngineCache, artifact: Artifact, point: str, policy: ExactPolicy) -> None:
        told = {
            "cache": asdict(cache), "rank_shape": asdict(artifact.shape), "artifact": artifact.digest, "point": point,
            "exact": asdict(policy),
        }  # fmt: skip
        text = json.dumps(told, sort_keys=True, separators=(",", ":"))
        self._seed = hashlib.sha256(text.encode()).digest()
        self._keyed = hashlib.blake2b(key=self._seed, digest_size=KEY_BYTES)

    @property
    def identity(self) -> str:
        """What all of these keys have in common, in 32 hex digits: workers that say the same can use each other's
        records. It gives no key away."""
        return hashlib.sha256(b"identity" + self._seed).digest()[:16].hex()

    def key(self, block_hash: bytes) -> bytes:
        keyed = self._keyed.copy()
        keyed.update(block_hash)
        return keyed.digest()


def point_of(artifact: Artifact, name: str | None) -> str:
    """The operating point of this name, or the only one. Raises ConfigError naming those there are."""
    names = [point.name for point in artifact.manifest.points]
    if name is None:
        if len(names) > 1:
            raise ConfigError(f"point is not set, and the artifact has several: set one of {', '.join(names)}")
        return names[0]
    artifact.point_index(name)
    return name


def policy_of(exact: str, sinks: int) -> ExactPolicy:
    return ExactPolicy(sinks=ALL_TOKENS if exact == "all" else sinks)
