"""``kvtc inspect``: what a file says of itself. Needs no model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import torch

from dynamo_kvtc.codec.artifact import Artifact, parse_artifact
from dynamo_kvtc.codec.profile import PROFILE_NAMES
from dynamo_kvtc.codec.record import MAGIC, VERSION, parse_record
from dynamo_kvtc.errors import ConfigError

Facts = dict[str, Any]


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(file: Path, as_json: bool) -> None:
    """Verify a calibration artifact or a coded block (record) and show what it says of itself.

    A damaged file is refused: every checksum is looked at.
    """
    facts = inspect_file(file)
    if as_json:
        click.echo(json.dumps(facts, indent=1, allow_nan=False, ensure_ascii=False))
    else:
        click.echo("\n".join(_lines(facts)))


def inspect_file(path: Path) -> Facts:
    """What ``kvtc inspect --json`` prints.

    Raises ConfigError if the file cannot be read or is neither kind, ArtifactError or RecordError if it is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}") from exc
    if data[: len(MAGIC)] == MAGIC:
        return record_facts(data)
    # safetensors: a length in 8 bytes, then a JSON object.
    if data[8:9] == b"{":
        return artifact_facts(parse_artifact(data, str(path)), len(data))
    raise ConfigError(
        f"{path} is neither a record (it would start with {MAGIC!r}) nor a calibration artifact (a safetensors file); "
        f"it starts with {data[:4]!r}"
    )


def record_facts(data: bytes) -> Facts:
    """A record's header and sections, every checksum verified. Raises RecordError."""
    record = parse_record(data)
    header = record.header
    for group in range(record.groups):
        record.section(group)
    return {
        "kind": "record",
        "format_version": VERSION,
        "profile": PROFILE_NAMES[header.profile],
        "point": header.point,
        "artifact": f"{header.artifact:016x}",
        "rank": header.rank,
        "tokens": header.tokens,
        "coded_tokens": header.coded_tokens,
        "exact_tokens": header.tokens - header.coded_tokens,
        "exact_positions": header.positions[header.exact].tolist(),
        "first_position": int(header.positions[0]),
        "last_position": int(header.positions[-1]),
        "position_gaps": bool((np.diff(header.positions) != 1).any()),
        "bytes": len(data),
        "header_bytes": len(data) - sum(record.sizes),
        "sections": [
            {"layer_group": group, "bytes": size, "crc32": f"{crc:08x}"}
            for group, (size, crc) in enumerate(zip(record.sizes, record.checksums, strict=True))
        ],
    }


def artifact_facts(artifact: Artifact, file_bytes: int) -> Facts:
    """An artifact's manifest, and what its operating points need. Raises ArtifactFormatError."""
    manifest = artifact.manifest
    rope = manifest.rope
    channels_per_layer = 2 * artifact.shape.kv_heads * artifact.shape.head_dim
    return {
        "kind": "artifact",
        "format_version": manifest.format_version,
        "profile": manifest.profile,
        "digest": manifest.digest,
        "fingerprint": f"{artifact.fingerprint:016x}",
        "bytes": file_bytes,
        "bytes_on_device": artifact.bytes_on_device(),
        "model": msgspec.to_builtins(manifest.model),
        "shape": msgspec.to_builtins(manifest.shape),
        "raw_bytes_per_token": manifest.shape.bytes_per_token,
        "rope": {
            "style": rope.style,
            "rotary_dim": rope.rotary_dim,
            "attention_scaling": rope.attention_scaling,
            "slowest_inv_freq": min(rope.inv_freq),
        },
        "tp_size": manifest.tp_size,
        "block_tokens": manifest.block_tokens,
        "groups": [
            {"layers": f"{start}-{end - 1}", "channels_per_rank": (end - start) * channels_per_layer}
            for start, end in manifest.groups
        ],
        "points": [
            {
                "name": point.name,
                "step": point.step,
                "expected_ratio": point.expected_ratio,
                "expected_kl": point.expected_kl,
                "lanes": point.lanes,
                "components": _components(artifact, index),
                "wide_components": _wide(artifact, index),
            }
            for index, point in enumerate(manifest.points)
        ],
        "calibration": manifest.calibration,
    }


def _components(artifact: Artifact, point: int) -> list[int] | None:
    """Live components per layer group; None where they are not one list (profile paper allocates K and V apart)."""
    if artifact.manifest.profile != "kvtc":
        return None
    return [
        artifact.tensor(f"group{g}.point{point}.classes", torch.uint8, -1).shape[0]
        for g in range(len(artifact.manifest.groups))
    ]


def _wide(artifact: Artifact, point: int) -> list[int] | None:
    """How many of the live components per layer group have a 16-bit basis; None for profile paper."""
    if artifact.manifest.profile != "kvtc":
        return None
    return [
        int(artifact.tensor(f"group{g}.point{point}.wide", torch.int32, 1))
        for g in range(len(artifact.manifest.groups))
    ]


def _lines(facts: Facts, indent: str = "") -> Iterator[str]:
    """Facts as indented ``name: value`` lines, a list of objects as one line each."""
    width = max((len(name) for name in facts), default=0) + 1
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{indent}{name}:"
            yield from (f"{indent}  " + "  ".join(f"{key} {_text(item)}" for key, item in row.items()) for row in value)
        else:
            yield f"{indent}{name + ':':<{width}} {_text(value)}"


def _text(value: Any) -> str:
    if value is None or value in ([], {}, ""):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return str(value)
