"""What a DynamoGraphDeployment may contain, from the Go types of Dynamo's operator (deploy/operator/api/v1beta1).

Strict: a field that the types do not have is an error that names it. ``parse`` takes a file of several documents.
The API server checks the same when a manifest is applied; here it is known before.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import yaml

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.up import kubernetes as k8s
from dynamo_kvtc.up.kubernetes import EnvVar, ObjectMeta, PodTemplate, Strict

API_VERSION = "nvidia.com/v1beta1"
GRAPH = "DynamoGraphDeployment"
MAIN = "main"
"""The container that Dynamo's operator completes; all others are sidecars."""

ComponentName = Annotated[str, msgspec.Meta(max_length=63, pattern=r"^[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?$")]
Version = Annotated[str, msgspec.Meta(pattern=r"^(0|[1-9]\d{0,3})\.(0|[1-9]\d{0,3})\.(0|[1-9]\d{0,3})$")]
Domain = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Mode = Literal["IntraPod", "InterPod"]


class ProviderOverride(Strict):
    api_version: str
    value: dict[str, Any]
    target: str = ""


class Multinode(Strict):
    node_count: Annotated[int, msgspec.Meta(ge=2)] = 2


class ComponentRole(Strict):
    name: Text
    replicas: Positive | None = None
    provider_override: ProviderOverride | None = None


class ModelReference(Strict):
    name: Text
    revision: str = ""


class ScalingAdapter(Strict):
    pass


class EppConfig(Strict):
    config_map_ref: k8s.KeyRef | None = None
    config: dict[str, Any] | None = None


class CompilationCache(Strict):
    pvc_name: Text
    mount_path: str = ""


class TopologyConstraint(Strict):
    pack_domain: Domain


class SpecTopologyConstraint(Strict):
    cluster_topology_name: Text
    pack_domain: Domain | None = None


class GpuMemoryService(Strict):
    mode: Mode = "IntraPod"
    device_class_name: str = "gpu.nvidia.com"
    extra_client_containers: list[str] = []
    extra_client_pods: list[Any] = []


class Failover(Strict):
    mode: Mode = "IntraPod"
    num_shadows: Literal[1] = 1


class CheckpointJob(Strict):
    gms_client_containers: list[str] = []
    pod_template: dict[str, Any] | None = None


class Checkpoint(Strict):
    enabled: bool
    mode: Literal["Auto", "Manual"] | None = None
    startup_policy: Literal["Immediate", "WaitForCheckpoint"] = "Immediate"
    deletion_policy: Literal["Delete", "Retain"] = "Delete"
    checkpoint_ref: str | None = None
    identity: dict[str, Any] | None = None
    target_container_name: str = MAIN
    job: CheckpointJob | None = None


class ComponentExperimental(Strict):
    gpu_memory_service: GpuMemoryService | None = None
    failover: Failover | None = None
    checkpoint: Checkpoint | None = None


class Component(Strict):
    """DynamoComponentDeploymentSharedSpec."""

    name: ComponentName
    type: Literal["frontend", "worker", "prefill", "decode", "planner", "epp"] | None = None
    pod_template: PodTemplate | None = None
    replicas: Annotated[int, msgspec.Meta(ge=0)] = 1
    min_available: Positive | None = None
    runtime_version_override: Version | None = None
    global_dynamo_namespace: bool = False
    multinode: Multinode | None = None
    roles: list[ComponentRole] = []
    shared_memory_size: str | int | None = None
    model_ref: ModelReference | None = None
    scaling_adapter: ScalingAdapter | None = None
    epp_config: EppConfig | None = None
    frontend_sidecar: str | None = None
    dynamo_sidecar: str | None = None
    compilation_cache: CompilationCache | None = None
    topology_constraint: TopologyConstraint | None = None
    provider_override: ProviderOverride | None = None
    experimental: ComponentExperimental | None = None


class RestartStrategy(Strict):
    type: Literal["Sequential", "Parallel"] = "Sequential"
    order: list[str] = []


class Restart(Strict):
    id: Text
    strategy: RestartStrategy | None = None


class KvTransferPolicy(Strict):
    domain: Domain
    cluster_topology_name: str = ""
    label_key: str = ""
    enforcement: Literal["required", "preferred"] = "required"
    preferred_weight: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None


class NamedComponent(Strict):
    name: Text


class ComponentGroup(Strict):
    name: ComponentName
    replicas: Positive
    components: Annotated[list[NamedComponent], msgspec.Meta(min_length=1, max_length=16)]
    scaling_adapter: ScalingAdapter | None = None


class GraphExperimental(Strict):
    kv_transfer_policy: KvTransferPolicy | None = None
    component_groups: Annotated[list[ComponentGroup], msgspec.Meta(max_length=16)] = []


class GraphSpec(Strict):
    """DynamoGraphDeploymentSpec."""

    components: Annotated[list[Component], msgspec.Meta(max_length=25)] = []
    backend_framework: Literal["vllm", "sglang", "trtllm"] | None = None
    env: list[EnvVar] = []
    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}
    priority_class_name: str | None = None
    restart: Restart | None = None
    topology_constraint: SpecTopologyConstraint | None = None
    provider_override: ProviderOverride | None = None
    experimental: GraphExperimental | None = None


class Graph(Strict):
    api_version: Literal["nvidia.com/v1beta1"]
    kind: Literal["DynamoGraphDeployment"]
    metadata: ObjectMeta
    spec: GraphSpec


KINDS: dict[tuple[str, str], type[Any]] = {
    (API_VERSION, GRAPH): Graph,
    ("v1", "ConfigMap"): k8s.ConfigMap,
    ("v1", "PersistentVolumeClaim"): k8s.PersistentVolumeClaim,
    ("v1", "Service"): k8s.Service,
    ("batch/v1", "Job"): k8s.Job,
    ("apps/v1", "StatefulSet"): k8s.StatefulSet,
}


@dataclass(frozen=True)
class Document:
    """where: "agg.yaml, document 2 (ConfigMap kvtc-agg)", for messages."""

    where: str
    value: Any


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        # YAML's own library takes the last of two equal keys; Kubernetes refuses.
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(text: str, name: str) -> list[Document]:
    """All documents of a file. Raises ConfigError naming the file, the document, the field and what is allowed."""
    try:
        raw = [item for item in yaml.load_all(text, Loader=_Loader) if item is not None]
    except yaml.YAMLError as exc:
        raise ConfigError(f"{name} is no YAML: {exc}") from exc
    if not raw:
        raise ConfigError(f"{name} is empty; it must have a {GRAPH}")
    return [_document(item, f"{name}, document {number}") for number, item in enumerate(raw, 1)]


def _document(item: Any, where: str) -> Document:
    if not isinstance(item, dict):
        raise ConfigError(f"{where} is a {type(item).__name__}; it must be an object with apiVersion and kind")
    version, kind = str(item.get("apiVersion")), str(item.get("kind"))
    shape = KINDS.get((version, kind))
    if shape is None:
        known = ", ".join(f"{v} {k}" for v, k in KINDS)
        raise ConfigError(f"{where} is a {kind} of {version}; known are {known}")
    meta = item.get("metadata")
    where = f"{where} ({kind} {meta.get('name') if isinstance(meta, dict) else ''})"
    try:
        value = msgspec.convert(item, shape)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{where}: {_told(str(exc), shape)}") from exc
    if isinstance(value, Graph):
        _check_graph(value, where)
    return Document(where, value)


def _check_graph(graph: Graph, where: str) -> None:
    """What the operator's admission checks beyond types."""
    names = [c.name.lower() for c in graph.spec.components]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(f"{where}: components {', '.join(twice)} are there twice; names must be unique")
    if sum(c.type == "epp" for c in graph.spec.components) > 1:
        raise ConfigError(f"{where}: more than one component is of type epp; there may be one")
    for component in graph.spec.components:
        place = f"{where}, component {component.name}"
        containers = component.pod_template.spec.containers if component.pod_template else []
        if not any(c.name == MAIN and c.image for c in containers):
            raise ConfigError(f"{place} has no container {MAIN!r} with an image in its podTemplate; it must have one")
        sidecar = component.frontend_sidecar
        if sidecar is not None and sidecar not in {c.name for c in containers}:
            raise ConfigError(f"{place}: frontendSidecar is {sidecar!r}, which is none of its containers")
        if component.epp_config is not None and component.type != "epp":
            raise ConfigError(f"{place} has an eppConfig, but is of type {component.type}: leave it out")
        if component.min_available is not None and 0 < component.replicas < component.min_available:
            raise ConfigError(
                f"{place}: minAvailable is {component.min_available} with {component.replicas} replicas; it may be at "
                "most as many"
            )
        volumes = {v.name for v in component.pod_template.spec.volumes} if component.pod_template else set()
        for container in containers:
            for mount in container.volume_mounts:
                if mount.name not in volumes:
                    raise ConfigError(f"{place} mounts {mount.name!r}, which is none of its volumes")


_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>[^`]*)`(?: - at `(?P<path>[^`]*)`)?")


def _told(message: str, shape: type[Any]) -> str:
    """msgspec's message; for an unknown field with what was meant, or what there is."""
    found = _UNKNOWN.match(message)
    if found is None:
        return message
    path = found["path"] or "$"
    known = sorted(_fields_at(shape, path))
    close = difflib.get_close_matches(found["field"], known, 1)
    remedy = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
    return f"unknown field {found['field']!r} in {path.removeprefix('$').lstrip('.') or 'the document'}; {remedy}"


def _fields_at(shape: type[Any], path: str) -> set[str]:
    step: Any = shape
    # Places in lists are of no concern: a list's struct is found through it.
    for name in re.findall(r"\.(\w+)", path):
        step = next((f.type for s in _structs(step) for f in msgspec.structs.fields(s) if f.encode_name == name), None)
    return {f.encode_name for s in _structs(step) for f in msgspec.structs.fields(s)}


def _structs(kind: Any) -> Iterator[Any]:
    """The structs in a type, inside unions, lists and annotations."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    elif typing.get_origin(kind) in (typing.Union, types.UnionType, Annotated, list):
        for part in typing.get_args(kind):
            yield from _structs(part)
