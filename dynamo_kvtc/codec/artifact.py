"""The calibration artifact: a safetensors file whose metadata holds a versioned JSON manifest.

Written whole or not at all; every tensor a profile will read is listed with its shape in the safetensors header, and
the manifest's digest covers manifest and tensors, so a damaged artifact is refused when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from dynamo_kvtc.codec.profile import PROFILE_IDS
from dynamo_kvtc.codec.record import MAX_BLOCK_TOKENS, MAX_GROUPS, MAX_RANKS
from dynamo_kvtc.errors import (
    ArtifactError,
    ArtifactFormatError,
    ArtifactMismatchError,
    ArtifactVersionError,
    ConfigError,
)
from dynamo_kvtc.types import KVShape, ModelIdentity, RopeSpec

FORMAT_VERSION = 2
METADATA_KEY = "kvtc"


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One operating point. ``name`` is what the user asked for: "16" (a ratio) or "kl=0.005".

    step: quantiser step in the scaled domain (profile kvtc; 0 for paper, whose scales travel in the records).
    expected_ratio: coded tokens against the engine's dtype, from calibration text kept out of the PCA.
    expected_kl: mean KL per token of a continuation on the same text, None if it was not measured.
    lanes: rANS lanes a token and layer group has (profile kvtc).
    """

    name: str
    step: float
    expected_ratio: float
    expected_kl: float | None = None
    lanes: int = 1


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that must agree before a byte is coded, and where the artifact came from."""

    format_version: int
    profile: str
    model: ModelIdentity
    shape: KVShape
    rope: RopeSpec
    tp_size: int
    block_tokens: int
    groups: tuple[tuple[int, int], ...]
    points: tuple[Point, ...]
    calibration: dict[str, Any]
    digest: str = ""


class Artifact:
    """An opened artifact, seen by one tensor-parallel rank.

    ``shape`` is that rank's cache: ``manifest.shape`` is the whole model's, a rank holds kv_heads / tp_size of it.
    """

    def __init__(self, manifest: Manifest, tensors: Mapping[str, Tensor], rank: int = 0) -> None:
        if not 0 <= rank < manifest.tp_size:
            raise ArtifactMismatchError(
                f"tensor-parallel rank {rank} asked of an artifact calibrated for {manifest.tp_size} rank(s); "
                f"calibrate with --tp-size equal to the engine's"
            )
        self.manifest = manifest
        self.rank = rank
        self.shape = rank_shape(manifest.shape, manifest.tp_size)
        self._tensors = tensors

    def for_rank(self, rank: int) -> Artifact:
        """The same artifact seen by another rank. Raises ArtifactMismatchError if it has no such rank."""
        return Artifact(self.manifest, self._tensors, rank)

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def fingerprint(self) -> int:
        """First 8 bytes of the digest: what records carry."""
        return int.from_bytes(bytes.fromhex(self.digest)[:8], "little")

    def tensor(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """This rank's tensor ``name``; -1 in ``shape`` takes any size. Raises ArtifactFormatError."""
        full = f"rank{self.rank}.{name}"
        found = self._tensors.get(full)
        if found is None:
            raise ArtifactFormatError(f"the artifact has no tensor {full!r}")
        fits = len(found.shape) == len(shape) and all(
            want in (-1, have) for want, have in zip(shape, found.shape, strict=True)
        )
        if found.dtype != dtype or not fits:
            raise ArtifactFormatError(
                f"tensor {full!r} is {found.dtype} {tuple(found.shape)}; expected {dtype} {shape}"
            )
        return found

    def point_index(self, name: str) -> int:
        """Index of the operating point of this name. Raises ConfigError naming those there are."""
        names = [point.name for point in self.manifest.points]
        if name not in names:
            raise ConfigError(f"operating point {name!r} is not in the artifact; it has {', '.join(names)}")
        return names.index(name)

    def bytes_on_device(self) -> int:
        """Bytes of this rank's tensors."""
        return sum(t.nbytes for name, t in self._tensors.items() if name.startswith(f"rank{self.rank}."))

    def check_model(self, model: ModelIdentity, shape: KVShape, rope: RopeSpec) -> None:
        """Raises ArtifactMismatchError, naming both sides, unless the artifact was made for this very model."""
        ours = self.manifest
        theirs: dict[str, ModelIdentity | KVShape | RopeSpec] = {"model": model, "shape": shape, "rope": rope}
        for name, other in theirs.items():
            mine = getattr(ours, name)
            for field in (f.name for f in fields(other)):
                if getattr(mine, field) != getattr(other, field) and field != "model_id":
                    raise ArtifactMismatchError(
                        f"the artifact was calibrated for {name}.{field} = {_short(getattr(mine, field))} "
                        f"({ours.model.model_id}), the model here has {_short(getattr(other, field))} "
                        f"({model.model_id}): calibrate again for this model"
                    )


def rank_shape(shape: KVShape, tp_size: int) -> KVShape:
    """One rank's part of a model's cache. Raises ConfigError if the heads do not divide."""
    if tp_size < 1 or shape.kv_heads % tp_size:
        raise ConfigError(f"tp_size {tp_size} does not divide {shape.kv_heads} KV heads")
    return KVShape(shape.layers, shape.kv_heads // tp_size, shape.head_dim, shape.dtype)


def seal(manifest: Manifest, tensors: Mapping[str, Tensor]) -> tuple[Manifest, dict[str, Tensor]]:
    """The manifest with the digest over itself and the tensors, and the tensors as a file would give them back."""
    tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return msgspec.structs.replace(manifest, digest=_digest(manifest, tensors)), tensors


def save_artifact(path: Path | str, manifest: Manifest, tensors: Mapping[str, Tensor]) -> Manifest:
    """Writes the artifact beside its place, then moves it there: a reader sees the old file or the new one, whole.

    Returns the manifest with its digest filled in. Raises ArtifactError where it cannot be written, as on a full disk;
    nothing is left then.
    """
    path = Path(path)
    manifest, tensors = seal(manifest, tensors)
    payload = save_tensors(tensors, metadata={METADATA_KEY: msgspec.json.encode(manifest).decode()})
    try:
        _write_whole(path, payload)
    except OSError as exc:
        raise ArtifactError(
            f"cannot write artifact {path}, {len(payload):,} bytes: {exc.strerror or exc}; make room, or name another "
            "folder"
        ) from exc
    return manifest


def _write_whole(path: Path, payload: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_artifact(path: Path | str, rank: int = 0) -> Artifact:
    """Opens and verifies an artifact.

    Raises ArtifactFormatError (damaged, truncated, forged), ArtifactVersionError or ArtifactMismatchError (rank).
    """
    try:
        data = Path(path).read_bytes()
    except OSError as exc:
        raise ArtifactError(f"cannot read artifact {path}: {exc.strerror}; make one with `kvtc calibrate`") from exc
    return parse_artifact(data, str(path), rank)


def parse_artifact(data: bytes, name: str = "artifact", rank: int = 0) -> Artifact:
    """``load_artifact`` for bytes already read."""
    manifest = _read_manifest(data, name)
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as exc:
        raise ArtifactFormatError(f"{name}: not a readable safetensors file: {exc}") from exc
    found = _digest(manifest, tensors)
    if found != manifest.digest:
        raise ArtifactFormatError(
            f"{name}: digest {found[:16]}..., the manifest says {manifest.digest[:16]}...: damaged, calibrate again"
        )
    _check_manifest(manifest, name)
    return Artifact(manifest, tensors, rank)


def _read_manifest(data: bytes, name: str) -> Manifest:
    """The manifest alone, out of the safetensors header: its version is judged before any tensor is read."""
    if len(data) < 8:
        raise ArtifactFormatError(f"{name}: {len(data)} bytes are no safetensors file")
    (size,) = struct.unpack_from("<Q", data)
    if size > len(data) - 8:
        raise ArtifactFormatError(f"{name}: the header says {size} bytes, the file has {len(data)}: truncated?")
    try:
        header = json.loads(data[8 : 8 + size])
        text = header["__metadata__"][METADATA_KEY]
        version = json.loads(text)["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise ArtifactFormatError(f"{name}: no KVTC manifest in the safetensors header ({exc!r})") from exc
    if version != FORMAT_VERSION:
        raise ArtifactVersionError(f"{name}: artifact format version {version!r}; this release reads {FORMAT_VERSION}")
    try:
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise ArtifactFormatError(f"{name}: manifest: {exc}") from exc


def _check_manifest(manifest: Manifest, name: str) -> None:
    bounds = [edge for group in manifest.groups for edge in group]
    contiguous = bounds[:1] == [0] and bounds[-1:] == [manifest.shape.layers] and bounds[1:-1:2] == bounds[2::2]
    if not contiguous or any(start >= end for start, end in manifest.groups):
        raise ArtifactFormatError(f"{name}: layer groups {manifest.groups} do not cover {manifest.shape.layers} layers")
    if manifest.profile not in PROFILE_IDS:
        raise ArtifactFormatError(f"{name}: profile {manifest.profile!r} is unknown; known: {', '.join(PROFILE_IDS)}")
    if len(manifest.groups) > MAX_GROUPS or manifest.tp_size > MAX_RANKS:
        raise ArtifactFormatError(
            f"{name}: {len(manifest.groups)} layer groups, tp_size {manifest.tp_size}; records hold at most "
            f"{MAX_GROUPS} and {MAX_RANKS}"
        )
    if not 1 <= len(manifest.points) <= 255 or not 1 <= manifest.block_tokens <= MAX_BLOCK_TOKENS:
        raise ArtifactFormatError(f"{name}: {len(manifest.points)} points, {manifest.block_tokens} tokens a block")
    names = [point.name for point in manifest.points]
    if len(set(names)) != len(names):
        raise ArtifactFormatError(f"{name}: two operating points of one name in {', '.join(names)}")
    rope = manifest.rope
    if rope.rotary_dim > manifest.shape.head_dim:
        raise ArtifactFormatError(f"{name}: RoPE rotates {rope.rotary_dim} dims of {manifest.shape.head_dim}")
    # At 2**31 positions such an angle is still an exact-enough float64, and no key can leave float32's range.
    if max(map(abs, rope.inv_freq)) > 1e3 or not 1e-3 <= rope.attention_scaling <= 1e3:
        raise ArtifactFormatError(
            f"{name}: RoPE frequencies up to {max(map(abs, rope.inv_freq))}, scaling {rope.attention_scaling}: absurd"
        )
    try:
        rank_shape(manifest.shape, manifest.tp_size)
    except ConfigError as exc:
        raise ArtifactFormatError(f"{name}: {exc}") from exc


def _digest(manifest: Manifest, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the manifest without its digest, then every tensor by name, dtype, shape and bytes."""
    sha = hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(manifest, digest="")))
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
