"""Manifests that are wrong: each is refused with the field, the document and what was meant."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.up.schema import Graph, parse

GRAPH = {
    "apiVersion": "nvidia.com/v1beta1",
    "kind": "DynamoGraphDeployment",
    "metadata": {"name": "g"},
    "spec": {
        "backendFramework": "vllm",
        "components": [
            {
                "name": "Worker",
                "type": "worker",
                "podTemplate": {
                    "spec": {
                        "containers": [
                            {
                                "name": "main",
                                "image": "i:1.6.1",
                                "env": [{"name": "A", "value": "1"}],
                                "volumeMounts": [{"name": "v", "mountPath": "/v"}],
                            }
                        ],
                        "volumes": [{"name": "v", "emptyDir": {}}],
                    }
                },
            }
        ],
    },
}
COMPONENT = ("spec", "components", 0)
CONTAINER = (*COMPONENT, "podTemplate", "spec", "containers", 0)


def changed(place, value, graph=GRAPH):
    made = copy.deepcopy(graph)
    at = made
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    return yaml.safe_dump(made)


def test_what_is_right_is_taken():
    (document,) = parse(yaml.safe_dump(GRAPH), "g.yaml")
    assert isinstance(document.value, Graph)
    assert document.value.spec.components[0].replicas == 1
    assert document.where == "g.yaml, document 1 (DynamoGraphDeployment g)"


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("spec", "services"), {}, r"unknown field 'services' in spec; known are .*components"),
        ((*COMPONENT, "replica"), 2, r"'replica' in spec.components\[.*\]; did you mean replicas\?"),
        ((*COMPONENT, "componentType"), "worker", "unknown field 'componentType'.*known are .*type"),
        ((*COMPONENT, "extraPodSpec"), {}, "unknown field 'extraPodSpec'"),
        ((*CONTAINER, "volumeMount"), [], "did you mean volumeMounts"),
        ((*CONTAINER, "env", 0, "value"), 1, "Expected `str`, got `int`"),
        ((*CONTAINER, "env", 0, "valuefrom"), {}, "did you mean valueFrom"),
        ((*COMPONENT, "type"), "router", "Invalid enum value 'router'"),
        ((*COMPONENT, "replicas"), -1, ">= 0"),
        ((*COMPONENT, "name"), "a b", "matching regex"),
        ((*COMPONENT, "multinode"), {"nodeCount": 1}, ">= 2"),
        ((*COMPONENT, "eppConfig"), {"config": {}}, "has an eppConfig, but is of type worker"),
        ((*COMPONENT, "minAvailable"), 2, "minAvailable is 2 with 1 replicas"),
        ((*COMPONENT, "frontendSidecar"), "x", "frontendSidecar is 'x'"),
        ((*COMPONENT, "runtimeVersionOverride"), "1.6", "matching regex"),
        ((*CONTAINER, "name"), "worker", "no container 'main'"),
        ((*CONTAINER, "image"), "", "no container 'main'"),
        ((*CONTAINER, "volumeMounts", 0, "name"), "w", "mounts 'w', which is none of its volumes"),
        (("metadata", "naem"), "x", "did you mean name"),
        (("apiVersion",), "nvidia.com/v1alpha1", "known are nvidia.com/v1beta1 DynamoGraphDeployment"),
        (("kind",), "DynamoGraph", "is a DynamoGraph of nvidia.com/v1beta1; known are"),
    ],
)
def test_what_is_wrong_is_named(place, value, told):
    with pytest.raises(ConfigError, match=told) as caught:
        parse(changed(place, value), "g.yaml")
    assert "g.yaml" in str(caught.value)


def test_components_are_named_once():
    twice = copy.deepcopy(GRAPH)
    twice["spec"]["components"].append({**copy.deepcopy(GRAPH["spec"]["components"][0]), "name": "WORKER"})
    with pytest.raises(ConfigError, match="components worker are there twice"):
        parse(yaml.safe_dump(twice), "g.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("a: [", "is no YAML"),
        ("- a", "is a list"),
        ("kind: a\nkind: b", "'kind' is there twice"),
        ("a: {b: 1, b: 2}", "'b' is there twice"),
    ],
)
def test_what_is_no_manifest(text, told):
    with pytest.raises(ConfigError, match=told):
        parse(text, Path("g.yaml").name)
