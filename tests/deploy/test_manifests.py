"""What deploy/ names exists, and what it sets is accepted by those it is for."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from dynamo_kvtc.cli import calibrate
from dynamo_kvtc.up import kubernetes as k8s
from dynamo_kvtc.up.manifest import config_maps, read_manifest
from dynamo_kvtc.up.place import FRONTEND, WORKER, get_flag
from dynamo_kvtc.up.schema import Graph, parse
from dynamo_kvtc.up.settings import CONNECTOR, EXTRA, FLAG, artifact_of, module_of, read_settings
from tests.engines import ROOT, python_of, require

DEPLOY = ROOT / "deploy"
FILES = sorted(DEPLOY.glob("*.yaml"))
DOCUMENTS = {path.name: parse(path.read_text(), path.name) for path in FILES}
EVERY = [document for documents in DOCUMENTS.values() for document in documents]
GRAPHS = [path for path in FILES if any(isinstance(d.value, Graph) for d in DOCUMENTS[path.name])]
IMAGE = "registry.example/kvtc-vllm-runtime:1.6.1"


def pods():
    for document in EVERY:
        value = document.value
        if isinstance(value, Graph):
            yield from ((document.where, c.pod_template.spec) for c in value.spec.components)
        elif isinstance(value, k8s.Job | k8s.StatefulSet):
            yield document.where, value.spec.template.spec


def test_there_is_a_graph_of_each_kind():
    assert {path.stem for path in GRAPHS} == {"agg-kvbm", "agg-offloading", "disagg"}


def test_what_a_pod_mounts_exists():
    claims = {d.value.metadata.name for d in EVERY if isinstance(d.value, k8s.PersistentVolumeClaim)}
    maps = config_maps(EVERY)
    for where, pod in pods():
        for volume in pod.volumes:
            if volume.persistent_volume_claim is not None:
                assert volume.persistent_volume_claim.claim_name in claims, where
            elif volume.config_map is not None:
                assert volume.config_map.name in maps, where
            else:
                assert volume.empty_dir is not None, where


def test_names_are_used_once():
    named = [(type(d.value), d.value.metadata.name) for d in EVERY]
    assert len(set(named)) == len(named)


def test_every_component_takes_the_dockerfiles_image():
    """One image, whose tag is the version of the runtime in it: Dynamo's operator reads it."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    base = re.search(r"^ARG DYNAMO_IMAGE=nvcr.io/nvidia/ai-dynamo/vllm-runtime:(\S+)$", dockerfile, re.M)
    assert base is not None
    assert IMAGE.endswith(f":{base[1]}")
    assert f"-t {IMAGE} " in dockerfile
    for where, pod in pods():
        assert pod.containers[0].image == IMAGE or "StatefulSet" in where


def test_what_the_dockerfile_copies_exists():
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            for source in [part for part in line.split()[1:-1] if not part.startswith("--")]:
                assert (ROOT / source).exists(), source


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"[\w-]+(?:\.yaml|/README\.md)|Dockerfile", (DEPLOY / "README.md").read_text()):
        assert (DEPLOY / name).exists(), name


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_a_graph_resolves_and_its_options_are_accepted(path):
    manifest = read_manifest(path)
    frontend, *workers = manifest.components
    assert frontend.type == "frontend"
    for worker in workers:
        assert "$(" not in " ".join(worker.command)
        assert get_flag(worker.command, "--block-size") == get_flag(frontend.command, "--kv-cache-block-size")
        mounted = [mount.path for mount in worker.mounts]
        assert Path(get_flag(worker.command, "--model")).parent == Path("/models")
        text = get_flag(worker.command, FLAG)
        if CONNECTOR in text and not (ROOT / "dynamo_kvtc/adapters/connector").exists():
            pytest.skip("KvtcConnector is not in this release")
        settings = read_settings(text, worker.name)
        assert (ROOT / module_of(settings).replace(".", "/")).is_dir()
        assert artifact_of(settings) == "/artifacts/model.safetensors"
        assert {"/models", "/artifacts"} <= set(mounted)
        for named in (settings[EXTRA].get("disk_path"), worker.environment.get("DYN_KVBM_DISK_CACHE_DIR")):
            assert named is None or any(named.startswith(folder) for folder in mounted)


def test_who_takes_part_in_events_has_a_server():
    """The address that the graphs use is the service's of nats.yaml."""
    service = next(d.value for d in DOCUMENTS["nats.yaml"] if isinstance(d.value, k8s.Service))
    url = f"nats://{service.metadata.name}:{service.spec.ports[0].port}"
    for path in GRAPHS:
        assert {c.environment["NATS_SERVER"] for c in read_manifest(path).components} == {url}


def test_the_jobs_recipe_is_accepted(tmp_path):
    job = next(d.value for d in DOCUMENTS["calibrate-job.yaml"] if isinstance(d.value, k8s.Job))
    (container,) = job.spec.template.spec.containers
    assert container.command == ["kvtc"]
    assert container.args[:2] == ["calibrate", "--recipe"]
    recipe = tmp_path / Path(container.args[2]).name
    data = config_maps(EVERY)["kvtc-recipe"]
    assert list(data) == [recipe.name]
    recipe.write_text(data[recipe.name])
    context = calibrate.command.make_context("calibrate", ["--recipe", str(recipe), *container.args[3:]])
    assert context.params["model"] == "/models/model"
    assert str(context.params["out"]) == "/artifacts/model.safetensors"
    points = {f"{ratio:g}" for ratio in context.params["ratios"]}
    for path in GRAPHS:
        for component in read_manifest(path).components:
            if (text := get_flag(component.command, FLAG)) is not None:
                assert json.loads(text)[EXTRA]["point"] in points


PARSE = """
import json, sys
module, commands = json.loads(sys.argv[1])
if module == "dynamo.vllm":
    # Parsing alone: a model is not looked for.
    from dynamo.vllm.args import _parse_cli_args

    def parse(arguments):
        own, engine = _parse_cli_args(arguments)
        transfer = engine.kv_transfer_config
        return [transfer.kv_connector, transfer.kv_load_failure_policy, engine.kv_events_config.endpoint]
else:
    from dynamo.frontend.main import parse_args

    def parse(arguments):
        sys.argv = ["dynamo.frontend", *arguments]
        config = parse_args()[0]
        return [config.router_mode, config.kv_cache_block_size]
told = []
for arguments in commands:
    try:
        told.append(parse(arguments))
    except SystemExit as exc:
        told.append(str(exc))
print(json.dumps(told))
"""


@pytest.mark.engine
@pytest.mark.parametrize("module", [FRONTEND, WORKER])
def test_real_parsers_accept_every_argument(module):
    """And refuse one that they do not know: they do look."""
    require("dynamo")
    components = [c for path in GRAPHS for c in read_manifest(path).components if c.command[2] == module]
    commands = [list(c.command[3:]) for c in components]
    assert len(commands) >= len(GRAPHS)
    done = subprocess.run(
        [str(python_of("dynamo")), "-c", PARSE, json.dumps([module, [*commands, [*commands[0], "--no-such-flag"]]])],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    *told, refused = json.loads(done.stdout.splitlines()[-1])
    if module == WORKER:
        connectors = [json.loads(get_flag(command, FLAG))["kv_connector"] for command in commands]
        assert told == [[connector, "recompute", "tcp://*:20080"] for connector in connectors]
    else:
        assert told == [["kv", 16]] * len(commands)
    assert refused in ("1", "2")


@pytest.mark.engine
def test_the_schema_takes_dynamos_own_manifests():
    """Those that its wheel carries, of every backend."""
    site = require("dynamo") / "dynamo"
    taken = 0
    for path in site.glob("lib/python*/site-packages/dynamo/**/*.yaml"):
        text = path.read_text(encoding="utf-8", errors="replace")
        if "apiVersion: nvidia.com/v1beta1" in text and "kind: DynamoGraphDeployment\n" in text:
            taken += sum(isinstance(document.value, Graph) for document in parse(text, path.name))
    assert taken >= 5
