"""Where the manifest's volumes are on this machine: folders that were given, or the demo's model and an artifact of it.

A claim's path that was not given gets a folder of this run: with a link to SmolLM2 where the manifest's ``--model`` is,
and one to a small artifact, calibrated on first use and kept, where its connector's ``artifact`` is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from dynamo_kvtc.calibrate.run import CalibrationConfig
from dynamo_kvtc.codec.artifact import load_artifact
from dynamo_kvtc.demo.setting import artifact_for
from dynamo_kvtc.errors import ArtifactError, ConfigError
from dynamo_kvtc.hf.model import load_model
from dynamo_kvtc.hf.smollm2 import cache_root, smollm2_dir
from dynamo_kvtc.up.manifest import Manifest
from dynamo_kvtc.up.place import CPU_FLAGS, get_flag
from dynamo_kvtc.up.settings import EXTRA, FLAG, artifact_of, read_settings

TOKENS, LENGTH, GROUPS, FISHER = 4_000, 512, 10, 2
"""A small calibration: it shows that the graph works, not what quality is."""

Progress = Callable[[str, float], None]


def supply(
    manifest: Manifest, folder: Path, given: Mapping[str, Path], progress: Progress, say: Callable[[str], None]
) -> dict[str, Path]:
    """path in the container -> folder here. Raises ConfigError and ArtifactError, naming what is missing and where."""
    mounts = dict(given)
    for component in manifest.components:
        for number, mount in enumerate(component.mounts):
            # What starts empty is each replica's own (place.py).
            if mount.path in mounts or (mount.files is None and mount.claim is None):
                continue
            local = folder / "mounts" / (mount.claim or f"{component.name}-{number}")
            local.mkdir(parents=True, exist_ok=True)
            for name, text in (mount.files or {}).items():
                (local / PurePosixPath(name).name).write_text(text)
            mounts[mount.path] = local
    unused = sorted(set(given) - {m.path for c in manifest.components for m in c.mounts})
    if unused:
        known = sorted({m.path for c in manifest.components for m in c.mounts})
        raise ConfigError(f"--mount {', '.join(unused)}: the manifest mounts nothing there; it has {', '.join(known)}")
    own_model = False
    for model in {path for c in manifest.components if (path := get_flag(c.command, "--model"))}:
        place = inside(model, mounts)
        if place is not None and place[1] != ".":
            own_model |= place[0] in given
            _model(mounts[place[0]], place[1], place[0] in given, model)
    for who, artifact, points in _artifacts(manifest):
        place = inside(artifact, mounts)
        if place is None:
            raise ArtifactError(f"{who}: artifact {artifact} is on none of the mounted volumes: mount one there")
        where, name = place
        if where in given:
            if not (mounts[where] / name).is_file():
                raise ArtifactError(
                    f"{who}: there is no artifact {mounts[where] / name} (--mount {where}): `kvtc calibrate --model "
                    f"FOLDER --out {mounts[where] / name}` makes it"
                )
        elif own_model:
            raise ArtifactError(
                f"{who}: {artifact} is not here, and an artifact of your own model takes a calibration of your own: "
                f"`kvtc calibrate`, then --mount {where}=FOLDER"
            )
        else:
            _link(mounts[where] / name, _small_artifact(points, progress, say))
    return mounts


def inside(path: str, mounts: Mapping[str, Path]) -> tuple[str, str] | None:
    """The mount that a path is in, and the rest."""
    for mount in sorted(mounts, key=len, reverse=True):
        if PurePosixPath(path).is_relative_to(mount):
            return mount, str(PurePosixPath(path).relative_to(mount))
    return None


def _model(folder: Path, name: str, given: bool, asked: str) -> None:
    if not given:
        _link(folder / name, smollm2_dir())
    elif not (folder / name / "config.json").is_file():
        raise ConfigError(f"--model {asked}: there is no model in {folder / name}; put its folder there")


def _artifacts(manifest: Manifest) -> Iterator[tuple[str, str, set[str]]]:
    """(component, artifact's path, the points that are asked of it)."""
    found: dict[str, tuple[str, set[str]]] = {}
    for component in manifest.components:
        text = get_flag(component.command, FLAG)
        settings = read_settings(text, component.name) if text is not None else {}
        path = artifact_of(settings)
        if path is not None:
            name, points = found.setdefault(path, (component.name, set()))
            points.add(str(settings[EXTRA].get("point") or "16"))
    for path, (name, points) in found.items():
        yield name, path, points


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    path.symlink_to(target)


def _small_artifact(points: set[str], progress: Progress, say: Callable[[str], None]) -> Path:
    try:
        ratios = tuple(sorted(float(point) for point in points))
    except ValueError as exc:
        raise ConfigError(
            f"point {', '.join(sorted(points))}: the demo's artifact has ratios as points, as '16'; give an artifact "
            "of yours with --mount"
        ) from exc
    name = "-".join(f"{ratio:g}" for ratio in ratios)
    path = cache_root() / "up" / f"smollm2-{CPU_FLAGS['--dtype']}-{TOKENS}t-{GROUPS}g-{name}x.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        try:
            load_artifact(path)
            return path
        except ArtifactError as exc:
            say(f"{path.name} is made again: {exc}")
    say(f"calibrating SmolLM2 on {TOKENS:,} tokens, once (kept as {path})")
    model = load_model("smollm2", dtype=CPU_FLAGS["--dtype"] or "float32")
    config = CalibrationConfig(groups=GROUPS, ratios=ratios, fisher_sequences=FISHER)
    artifact_for(model, path, config, TOKENS, LENGTH, "", progress, say)
    return path
