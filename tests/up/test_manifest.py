"""A manifest's components, as Kubernetes would run them."""

from __future__ import annotations

import pytest
import yaml

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.up.manifest import Mount, expand, read_manifest

MAP = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"policy": '{"a": 1}', "B": "b"}}


def write(folder, container, components=(), beside=(), env=(), volumes=(), name="g", **frontend):
    """A graph with a frontend and a worker whose main container is given."""

    def component(what, kind, main, more=()):
        main = {"name": "main", "image": "i:1", **main}
        return {"name": what, "type": kind,
                "podTemplate": {"spec": {"containers": [main, *more], "volumes": list(volumes)}}}  # fmt: skip

    graph = {
        "apiVersion": "nvidia.com/v1beta1", "kind": "DynamoGraphDeployment", "metadata": {"name": name},
        "spec": {"env": list(env), "components": [
            component("Front", "frontend", frontend),
            component("Worker", "worker", {"command": ["python3", "-m", "dynamo.vllm"], **container}, components),
        ]},
    }  # fmt: skip
    path = folder / "graph.yaml"
    path.write_text(yaml.safe_dump_all([*beside, graph]))
    return path


def value(name, **source):
    return {"name": name, "valueFrom": source}


def test_variables_and_references(tmp_path):
    env = [{"name": "A", "value": "graph"}, {"name": "SHARED", "value": "s"}]
    own = [
        {"name": "A", "value": "own"},
        value("P", configMapKeyRef={"name": "m", "key": "policy"}),
        {"name": "Q", "value": "$(A)-$(SHARED)-$$(A)-$(NO)"},
        value("NONE", configMapKeyRef={"name": "m", "key": "absent", "optional": True}),
        value("SECRET", secretKeyRef={"name": "s", "key": "k", "optional": True}),
    ]
    container = {
        "args": ["--x", "$(P)", "$(Q)"],
        "env": own,
        "envFrom": [{"prefix": "M_", "configMapRef": {"name": "m"}}],
    }
    manifest = read_manifest(write(tmp_path, container, beside=[MAP], env=env))
    front, worker = manifest.components
    assert worker.command == ("python3", "-m", "dynamo.vllm", "--x", '{"a": 1}', "own-s-$(A)-$(NO)")
    assert worker.environment == {
        "A": "own", "SHARED": "s", "P": '{"a": 1}', "Q": "own-s-$(A)-$(NO)", "M_policy": '{"a": 1}', "M_B": "b",
    }  # fmt: skip
    assert front.command == ("python3", "-m", "dynamo.frontend")
    assert front.environment == {"A": "graph", "SHARED": "s"}
    assert manifest.dynamo_namespace == "default-g"


def test_a_config_map_beside_the_file(tmp_path):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(MAP))
    (tmp_path / "unread.yaml").write_text("no: manifest\n")
    path = write(tmp_path, {"env": [value("B", configMapKeyRef={"name": "m", "key": "B"})]})
    assert read_manifest(path).components[1].environment == {"B": "b"}


def test_mounts(tmp_path):
    volumes = [
        {"name": "c", "persistentVolumeClaim": {"claimName": "claim"}},
        {"name": "m", "configMap": {"name": "m"}},
        {"name": "e", "emptyDir": {}},
    ]
    mounts = [{"name": n, "mountPath": f"/{n}"} for n in "cme"]
    manifest = read_manifest(write(tmp_path, {"volumeMounts": mounts}, beside=[MAP], volumes=volumes))
    assert manifest.components[1].mounts == (Mount("/c", claim="claim"), Mount("/m", files=MAP["data"]), Mount("/e"))


SECRET = value("S", secretKeyRef={"name": "s", "key": "k"})


@pytest.mark.parametrize(
    ("container", "more", "told"),
    [
        ({"env": [SECRET]}, {}, "give it with --env S=VALUE"),
        ({"env": [value("S", fieldRef={"fieldPath": "status.podIP"})]}, {}, "give it with --env S=VALUE"),
        ({"envFrom": [{"secretRef": {"name": "s"}}]}, {}, "the Secret s, which only a cluster has"),
        ({"env": [value("P", configMapKeyRef={"name": "n", "key": "k"})]}, {}, "ConfigMap n, which.*there are m"),
        ({"env": [value("P", configMapKeyRef={"name": "m", "key": "k"})]}, {}, "'k' of ConfigMap m.*has B, policy"),
        ({"command": []}, {}, "has no command"),
        ({}, {"components": [{"name": "side", "image": "i"}]}, "has containers side"),
        ({"volumeMounts": [{"name": "h", "mountPath": "/h"}]}, {"volumes": [{"name": "h", "hostPath": {"path": "/"}}]},
         "volume h is neither"),
    ],
)  # fmt: skip
def test_what_one_machine_cannot_stand_for(tmp_path, container, more, told):
    with pytest.raises(ConfigError, match=told):
        read_manifest(write(tmp_path, container, beside=[MAP], **more))


def test_what_is_given_is_not_looked_for(tmp_path):
    manifest = read_manifest(write(tmp_path, {"env": [SECRET], "args": ["$(S)"]}), {"S": "here"})
    assert manifest.components[1].environment["S"] == "here"
    assert manifest.components[1].command[-1] == "here"


def test_a_file_needs_a_graph(tmp_path):
    (tmp_path / "graph.yaml").write_text(yaml.safe_dump(MAP))
    with pytest.raises(ConfigError, match="has 0 DynamoGraphDeployments"):
        read_manifest(tmp_path / "graph.yaml")
    with pytest.raises(ConfigError, match=r"manifest .*absent.yaml cannot be read"):
        read_manifest(tmp_path / "absent.yaml")


def test_expansion_is_kubernetes():
    assert expand("$(A) $$(A) $(B) $A $()", {"A": "1"}) == "1 $(A) $(B) $A $()"
    assert expand("a$$b $$$(A) $(A", {"A": "1"}) == "a$b $1 $(A"
