"""Kubernetes' own objects as far as manifests use them: every field by name, so that a slip is found.

Parts that nothing here reads keep their content as it is (Any); their names are checked all the same.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Strict(msgspec.Struct, forbid_unknown_fields=True, rename="camel", kw_only=True):
    """A field that is not listed is refused."""


class ObjectMeta(Strict):
    name: str
    namespace: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    finalizers: list[str] = []


class KeyRef(Strict):
    """Of a ConfigMap or a Secret."""

    key: str
    name: str
    optional: bool = False


class EnvVarSource(Strict):
    config_map_key_ref: KeyRef | None = None
    secret_key_ref: KeyRef | None = None
    field_ref: dict[str, str] | None = None
    resource_field_ref: dict[str, Any] | None = None
    file_key_ref: dict[str, Any] | None = None


class EnvVar(Strict):
    name: str
    value: str = ""
    value_from: EnvVarSource | None = None


class ObjectRef(Strict):
    name: str
    optional: bool = False


class EnvFromSource(Strict):
    prefix: str = ""
    config_map_ref: ObjectRef | None = None
    secret_ref: ObjectRef | None = None


class VolumeMount(Strict):
    name: str
    mount_path: str
    sub_path: str = ""
    sub_path_expr: str = ""
    read_only: bool = False
    recursive_read_only: str | None = None
    mount_propagation: str | None = None


class Resources(Strict):
    limits: dict[str, str | int | float] = {}
    requests: dict[str, str | int | float] = {}
    claims: list[dict[str, str]] = []


class ContainerPort(Strict):
    container_port: int
    name: str = ""
    protocol: str = "TCP"
    host_port: int | None = None
    host_ip: str | None = msgspec.field(default=None, name="hostIP")


class Container(Strict):
    name: str
    image: str = ""
    command: list[str] = []
    args: list[str] = []
    env: list[EnvVar] = []
    env_from: list[EnvFromSource] = []
    working_dir: str = ""
    ports: list[ContainerPort] = []
    volume_mounts: list[VolumeMount] = []
    resources: Resources | None = None
    restart_policy: str | None = None
    image_pull_policy: str | None = None
    liveness_probe: dict[str, Any] | None = None
    readiness_probe: dict[str, Any] | None = None
    startup_probe: dict[str, Any] | None = None
    lifecycle: dict[str, Any] | None = None
    security_context: dict[str, Any] | None = None
    resize_policy: list[Any] = []
    volume_devices: list[Any] = []
    termination_message_path: str | None = None
    termination_message_policy: str | None = None
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False


class ConfigMapVolume(Strict):
    name: str
    items: list[dict[str, Any]] = []
    default_mode: int | None = None
    optional: bool = False


class SecretVolume(Strict):
    secret_name: str
    items: list[dict[str, Any]] = []
    default_mode: int | None = None
    optional: bool = False


class ClaimVolume(Strict):
    claim_name: str
    read_only: bool = False


class EmptyDir(Strict):
    medium: str = ""
    size_limit: str | int | None = None


class Volume(Strict):
    name: str
    config_map: ConfigMapVolume | None = None
    secret: SecretVolume | None = None
    persistent_volume_claim: ClaimVolume | None = None
    empty_dir: EmptyDir | None = None
    host_path: dict[str, str] | None = None
    projected: dict[str, Any] | None = None
    ephemeral: dict[str, Any] | None = None
    downward_api: dict[str, Any] | None = msgspec.field(default=None, name="downwardAPI")
    csi: dict[str, Any] | None = None
    nfs: dict[str, Any] | None = None
    image: dict[str, Any] | None = None


class PodSpec(Strict):
    containers: list[Container] = []
    init_containers: list[Container] = []
    volumes: list[Volume] = []
    restart_policy: str | None = None
    termination_grace_period_seconds: int | None = None
    active_deadline_seconds: int | None = None
    node_selector: dict[str, str] = {}
    node_name: str | None = None
    affinity: dict[str, Any] | None = None
    tolerations: list[Any] = []
    topology_spread_constraints: list[Any] = []
    service_account_name: str | None = None
    automount_service_account_token: bool | None = None
    image_pull_secrets: list[ObjectRef] = []
    security_context: dict[str, Any] | None = None
    priority_class_name: str | None = None
    priority: int | None = None
    preemption_policy: str | None = None
    runtime_class_name: str | None = None
    scheduler_name: str | None = None
    scheduling_gates: list[Any] = []
    resource_claims: list[Any] = []
    resources: Resources | None = None
    hostname: str | None = None
    subdomain: str | None = None
    host_network: bool = False
    host_pid: bool = msgspec.field(default=False, name="hostPID")
    host_ipc: bool = msgspec.field(default=False, name="hostIPC")
    host_users: bool | None = None
    host_aliases: list[Any] = []
    share_process_namespace: bool | None = None
    dns_policy: str | None = None
    dns_config: dict[str, Any] | None = None
    readiness_gates: list[Any] = []
    enable_service_links: bool | None = None
    overhead: dict[str, Any] | None = None
    os: dict[str, str] | None = None


class PodMeta(Strict):
    name: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class PodTemplate(Strict):
    metadata: PodMeta | None = None
    spec: PodSpec = msgspec.field(default_factory=PodSpec)


class ConfigMap(Strict):
    api_version: str
    kind: str
    metadata: ObjectMeta
    data: dict[str, str] = {}
    binary_data: dict[str, str] = {}
    immutable: bool = False


class ClaimSpec(Strict):
    access_modes: list[str]
    resources: Resources
    storage_class_name: str | None = None
    volume_mode: str | None = None
    volume_name: str | None = None
    selector: dict[str, Any] | None = None
    data_source: dict[str, Any] | None = None
    data_source_ref: dict[str, Any] | None = None
    volume_attributes_class_name: str | None = None


class PersistentVolumeClaim(Strict):
    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: ClaimSpec


class ClaimTemplate(Strict):
    metadata: ObjectMeta
    spec: ClaimSpec


class JobSpec(Strict):
    template: PodTemplate
    backoff_limit: int | None = None
    active_deadline_seconds: int | None = None
    ttl_seconds_after_finished: int | None = None
    parallelism: int | None = None
    completions: int | None = None
    completion_mode: str | None = None
    suspend: bool | None = None
    pod_failure_policy: dict[str, Any] | None = None


class Job(Strict):
    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: JobSpec


class ServicePort(Strict):
    port: int
    name: str = ""
    protocol: str = "TCP"
    target_port: int | str | None = None


class ServiceSpec(Strict):
    selector: dict[str, str]
    ports: list[ServicePort]
    cluster_ip: str | None = msgspec.field(default=None, name="clusterIP")
    type: str | None = None


class Service(Strict):
    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: ServiceSpec


class StatefulSetSpec(Strict):
    service_name: str
    selector: dict[str, Any]
    template: PodTemplate
    replicas: int = 1
    volume_claim_templates: list[ClaimTemplate] = []
    pod_management_policy: str | None = None
    update_strategy: dict[str, Any] | None = None


class StatefulSet(Strict):
    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: StatefulSetSpec
