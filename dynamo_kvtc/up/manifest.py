"""A manifest's file, resolved: components with the commands, arguments and environment that Kubernetes would give them.

ConfigMaps are found in the file and in the YAML files beside it. References to variables, ``$(NAME)``, are replaced as
Kubernetes does it. What cannot be known on one machine (a Secret, a field of the pod) is an error, unless it is
optional or given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.up import kubernetes as k8s
from dynamo_kvtc.up.schema import MAIN, Document, Graph, parse
from dynamo_kvtc.up.schema import Component as ComponentSpec

DEFAULT_NAMESPACE = "default"


@dataclass(frozen=True)
class Mount:
    """path: in the container. claim: of the PersistentVolumeClaim it is; files: content of a ConfigMap's keys; neither:
    a folder that starts empty."""

    path: str
    claim: str | None = None
    files: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Component:
    """command: command and args in one, as the container would run it."""

    name: str
    type: str
    replicas: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    mounts: tuple[Mount, ...]


@dataclass(frozen=True)
class Manifest:
    path: Path
    name: str
    namespace: str
    """Of Kubernetes."""
    components: tuple[Component, ...]

    @property
    def dynamo_namespace(self) -> str:
        """As the operator names it."""
        return f"{self.namespace}-{self.name}"


def read_manifest(path: Path, given: Mapping[str, str] | None = None) -> Manifest:
    """given: variables that are set on this machine, whatever the manifest says of them. Raises ConfigError."""
    given = given or {}
    documents = parse(_read(path), path.name)
    graphs = [d for d in documents if isinstance(d.value, Graph)]
    if len(graphs) != 1:
        raise ConfigError(f"{path} has {len(graphs)} DynamoGraphDeployments; `kvtc up` runs one")
    graph: Graph = graphs[0].value
    maps = config_maps([*documents, *_beside(path)])
    components = tuple(
        _component(spec, graph, maps, given, f"{graphs[0].where}, component {spec.name}")
        for spec in graph.spec.components
    )
    if not any(c.type == "frontend" for c in components):
        raise ConfigError(f"{graphs[0].where} has no component of type frontend: there is nobody to ask")
    return Manifest(path, graph.metadata.name, graph.metadata.namespace or DEFAULT_NAMESPACE, components)


def config_maps(documents: Sequence[Document]) -> dict[str, Mapping[str, str]]:
    """name -> data; the first of a name counts."""
    found: dict[str, Mapping[str, str]] = {}
    for document in documents:
        if isinstance(document.value, k8s.ConfigMap):
            found.setdefault(document.value.metadata.name, document.value.data)
    return found


def expand(text: str, environment: Mapping[str, str]) -> str:
    """``$(NAME)`` replaced, ``$$`` made ``$``, unknown names left as they are: Kubernetes' rules."""

    def one(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else environment.get(match["name"], match[0])

    return re.sub(r"\$\$|\$\((?P<name>[^)]*)\)", one, text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"manifest {path} cannot be read: {exc}; name a YAML file with a graph") from exc


def _beside(path: Path) -> list[Document]:
    """Documents of the folder's other files; those that are none of ours are none of this manifest's either."""
    found: list[Document] = []
    for other in sorted(path.parent.glob("*.yaml")):
        if other.name != path.name and "kind: ConfigMap" in (text := _read(other)):
            found += parse(text, other.name)
    return found


def _component(
    spec: ComponentSpec, graph: Graph, maps: Mapping[str, Mapping[str, str]], given: Mapping[str, str], where: str
) -> Component:
    assert spec.pod_template is not None
    pod = spec.pod_template.spec
    main = next(c for c in pod.containers if c.name == MAIN)
    others = [c.name for c in (*pod.containers, *pod.init_containers) if c is not main]
    if others or spec.multinode or spec.type in ("planner", "epp"):
        what = (
            f"containers {', '.join(others)}" if others else "several nodes" if spec.multinode else f"type {spec.type}"
        )
        raise ConfigError(f"{where} has {what}, which one machine cannot stand for: `kvtc up` runs main containers")
    environment = _environment([*graph.spec.env, *main.env], main.env_from, maps, given, where)
    command = tuple(expand(part, environment) for part in (*main.command, *main.args))
    if not main.command and spec.type == "frontend":
        # What the operator fills in.
        command = ("python3", "-m", "dynamo.frontend", *command)
    elif not main.command:
        raise ConfigError(f"{where} has no command; write what its container runs, as [python3, -m, dynamo.vllm]")
    volumes = {v.name: v for v in pod.volumes}
    mounts = tuple(_mount(m, volumes[m.name], maps, where) for m in main.volume_mounts)
    return Component(spec.name, spec.type or "worker", spec.replicas, command, environment, mounts)


def _environment(
    variables: Sequence[k8s.EnvVar], sources: Sequence[k8s.EnvFromSource], maps: Mapping[str, Mapping[str, str]],
    given: Mapping[str, str], where: str,
) -> dict[str, str]:  # fmt: skip
    made: dict[str, str] = {}
    for source in sources:
        if source.config_map_ref is not None:
            data = _data(source.config_map_ref.name, source.config_map_ref.optional, maps, where)
            made |= {source.prefix + key: value for key, value in data.items()}
        elif source.secret_ref is not None and not source.secret_ref.optional:
            raise ConfigError(
                f"{where} takes its environment from the Secret {source.secret_ref.name}, which only a cluster has: "
                "make it optional, or name its variables one by one and give them with --env"
            )
    for variable in variables:
        if variable.name in given:
            continue
        value = _value(variable, maps, where)
        if value is not None:
            made[variable.name] = expand(value, made)
    return made | dict(given)


def _value(variable: k8s.EnvVar, maps: Mapping[str, Mapping[str, str]], where: str) -> str | None:
    source = variable.value_from
    if source is None:
        return variable.value
    if source.config_map_key_ref is not None:
        ref = source.config_map_key_ref
        data = _data(ref.name, ref.optional, maps, where)
        if ref.key not in data and not ref.optional:
            raise ConfigError(
                f"{where}: {variable.name} is key {ref.key!r} of ConfigMap {ref.name}, which has "
                f"{', '.join(sorted(data)) or 'none'}"
            )
        return data.get(ref.key)
    if source.secret_key_ref is not None and source.secret_key_ref.optional:
        return None
    raise ConfigError(
        f"{where}: only a cluster knows the value of {variable.name}; give it with --env {variable.name}=VALUE"
    )


def _data(name: str, optional: bool, maps: Mapping[str, Mapping[str, str]], where: str) -> Mapping[str, str]:
    if name not in maps and not optional:
        raise ConfigError(
            f"{where} names ConfigMap {name}, which is neither in this file nor in those beside it; there are "
            f"{', '.join(sorted(maps)) or 'none'}"
        )
    return maps.get(name, {})


def _mount(mount: k8s.VolumeMount, volume: k8s.Volume, maps: Mapping[str, Mapping[str, str]], where: str) -> Mount:
    if volume.persistent_volume_claim is not None:
        return Mount(mount.mount_path, claim=volume.persistent_volume_claim.claim_name)
    if volume.config_map is not None:
        return Mount(mount.mount_path, files=_data(volume.config_map.name, volume.config_map.optional, maps, where))
    if volume.empty_dir is not None or volume.ephemeral is not None:
        return Mount(mount.mount_path)
    raise ConfigError(
        f"{where}: volume {volume.name} is neither a claim, a ConfigMap, an emptyDir nor ephemeral: `kvtc up` has no "
        "folder for it"
    )
