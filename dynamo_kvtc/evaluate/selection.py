"""Codecs by name. What a list of names asks for is checked before any model is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dynamo_kvtc.codec.artifact import Artifact, load_artifact
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.codec.profile import PROFILE_IDS
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.evaluate.codecs import CacheCodec, RawCodec, RecordCodec
from dynamo_kvtc.evaluate.peers import PEERS

_RECORD_NAME = re.compile(r"(?P<profile>[a-z0-9]+)(?:@(?P<stem>[^:]+))?:(?P<point>[^:]+)")


@dataclass(frozen=True)
class CodecName:
    """A codec's name, taken apart. profile is None for raw and the peers.

    stem: the artifact file's stem where the name chooses one ("kvtc@FILESTEM:30").
    """

    text: str
    profile: str | None = None
    stem: str | None = None
    point: str = ""


@dataclass(frozen=True)
class OpenArtifact:
    """An artifact file and what each tensor-parallel rank sees of it."""

    path: Path
    ranks: tuple[Artifact, ...]

    @property
    def artifact(self) -> Artifact:
        return self.ranks[0]


@dataclass(frozen=True)
class Selected:
    """A codec that exists: its name and, for a record codec, its artifact and the point as the artifact names it."""

    name: CodecName
    source: OpenArtifact | None = None
    point: str = ""

    def build(self, policy: ExactPolicy, device: torch.device | str) -> CacheCodec:
        """Puts the codec's tensors on the device. Raises ArtifactFormatError if the artifact's tensors lie."""
        if self.source is None:
            return RawCodec() if self.name.text == RawCodec.name else PEERS[self.name.text]
        ranks = self.source.ranks
        return RecordCodec(self.name.text, ranks[0], self.point, policy, device, ranks[1:])


def parse_codecs(text: str) -> list[CodecName]:
    """Comma-separated names: raw, a peer, or PROFILE:POINT, PROFILE@FILESTEM:POINT. Raises ConfigError."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise ConfigError(f"--codecs {text!r} names no codec; {_known()}")
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ConfigError(f"--codecs names {', '.join(sorted(repeated))} twice")
    return [_parse(name) for name in names]


def _parse(name: str) -> CodecName:
    if name == RawCodec.name or name in PEERS:
        return CodecName(name)
    match = _RECORD_NAME.fullmatch(name)
    if match is None or match["profile"] not in PROFILE_IDS:
        raise ConfigError(f"codec {name!r} is unknown; {_known()}")
    if point_value(match["point"]) is None:
        raise ConfigError(f"codec {name!r}: operating point {match['point']!r} is neither a ratio nor kl=NUMBER")
    return CodecName(name, match["profile"], match["stem"], match["point"])


def point_value(name: str) -> tuple[str, float] | None:
    """An operating point's name as (kind, number), so that "16" and "16.0" are one; None if it is not of that form."""
    kind, _, number = name.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        return None
    return (kind, value) if kind in ("", "kl") and math.isfinite(value) and value > 0 else None


def open_artifacts(paths: Sequence[Path | str]) -> list[OpenArtifact]:
    """Opens and verifies artifacts, in order. Raises ArtifactError."""
    opened = []
    for path in paths:
        first = load_artifact(path)
        others = [load_artifact(path, rank) for rank in range(1, first.manifest.tp_size)]
        opened.append(OpenArtifact(Path(path), (first, *others)))
    return opened


def select(names: Sequence[CodecName], artifacts: Sequence[OpenArtifact]) -> list[Selected]:
    """Finds each name's artifact and operating point: the first artifact of its profile that has the point.

    Raises ConfigError, naming the points there are.
    """
    return [Selected(name) if name.profile is None else _find(name, artifacts) for name in names]


def _find(name: CodecName, artifacts: Sequence[OpenArtifact]) -> Selected:
    of_profile = [a for a in artifacts if a.artifact.manifest.profile == name.profile]
    candidates = [a for a in of_profile if name.stem is None or a.path.stem == name.stem]
    if name.stem is not None and len(candidates) > 1:
        raise ConfigError(f"codec {name.text!r}: {len(candidates)} artifacts have file stem {name.stem!r}; rename one")
    for candidate in candidates:
        for point in candidate.artifact.manifest.points:
            if point_value(point.name) == point_value(name.point):
                return Selected(name, candidate, point.name)
    if not candidates:
        given = ", ".join(f"{a.path.stem} ({a.artifact.manifest.profile})" for a in artifacts) or "none"
        asked = f"{name.profile} artifact" + (f" of file stem {name.stem!r}" if name.stem else "")
        raise ConfigError(f"codec {name.text!r} needs a {asked}; artifacts given: {given}. Add --artifact FILE")
    there = "; ".join(
        f"{a.path.name} has {', '.join(point.name for point in a.artifact.manifest.points)}" for a in candidates
    )
    raise ConfigError(
        f"codec {name.text!r}: no artifact has operating point {name.point!r}; {there}. "
        f"Choose one of them or calibrate the point"
    )


def _known() -> str:
    records = ", ".join(f"{profile}:POINT" for profile in PROFILE_IDS)
    return f"known are {RawCodec.name}, {', '.join(PEERS)}, {records} (POINT a ratio like 16, or kl=0.005)"
