"""Options, versions and endpoints: each refusal names the value and what is allowed."""

from __future__ import annotations

import importlib.metadata

import pytest

from dynamo_kvtc.adapters.kvbm import _compat
from dynamo_kvtc.adapters.kvbm.mover import find_factory
from dynamo_kvtc.adapters.kvbm.options import TIER_MOVER, parse_coding, parse_options
from dynamo_kvtc.errors import ConfigError, EngineVersionError, MissingDependencyError

CODING = {"artifact": "model.safetensors", "point": "16"}


def test_the_coding_mover_is_the_default():
    options = parse_options({**CODING, "disk_path": "/x", "queue_mib": 64, "block_bytes": 9000, "half_seconds": 5})
    assert options.mover == TIER_MOVER
    assert options.half_seconds == 5.0
    coding = parse_coding(options.mover_options)
    assert coding.block_bytes == 9000
    tier = coding.tier(10**9, 3 * 10**9, "/tmp/own")
    assert (tier.artifact, tier.point, tier.queue_mib, tier.disk_path) == ("model.safetensors", "16", 64, "/x")
    assert 0 <= 10**9 - tier.host_bytes <= 1
    assert 0 <= 3 * 10**9 - tier.disk_bytes <= 1
    assert parse_coding(CODING).tier(1 << 30, 1 << 30, "/tmp/own").disk_path == "/tmp/own"
    assert coding.tier(1 << 30, 0, None).disk_path is None


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({}, "lacks artifact"),
        ({**CODING, "host_gib": 4}, "host_gib is set by DYN_KVBM_CPU_CACHE_GB"),
        ({**CODING, "disk_gib": 4}, "disk_gib is set by DYN_KVBM_DISK_CACHE_GB"),
        ({**CODING, "min_tokens": 4, "write_through": True}, "min_tokens, write_through: KVBM's leader decides"),
        ({**CODING, "compress": 1}, "unknown options compress; known are artifact, block_bytes, disk_path"),
        ({**CODING, "mover_options": {}}, "unknown options mover_options"),
        ({**CODING, "mover": "a:b"}, "unknown options artifact, point"),
        ({**CODING, "exact": "some"}, "exact is 'some'"),
        ({**CODING, "queue_mib": 0}, "queue_mib is 0"),
        ({**CODING, "block_bytes": 0}, "block_bytes is 0"),
        ({**CODING, "block_bytes": 1.5}, "block_bytes is 1.5"),
        ({**CODING, "block_bytes": True}, "block_bytes is True"),
        ({**CODING, "disk_path": 7}, "disk_path is 7"),
    ],
)
def test_bad_options_of_the_coding_mover(extra, words):
    with pytest.raises(ConfigError, match=words):
        parse_options(extra)


def test_options_have_defaults():
    options = parse_options({"mover": "a.b:c", "mover_options": {"x": 1}, "half_seconds": 5})
    assert (options.mover, options.mover_options, options.half_seconds) == ("a.b:c", {"x": 1}, 5.0)
    assert options.transfer_seconds > 0


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"mover": ""}, "mover is ''"),
        ({"mover": 3}, "mover is 3"),
        ({"mover": "a:b", "host_gb": 4}, "unknown options host_gb; known are half_seconds"),
        ({"mover": "a:b", "mover_options": 3}, "mover_options is a int"),
        ({"mover": "a:b", "half_seconds": 0}, "half_seconds is 0"),
        ({"mover": "a:b", "half_seconds": True}, "half_seconds is True"),
        ({"mover": "a:b", "transfer_seconds": "9"}, "transfer_seconds is '9'"),
        ({"mover": "a:b", "transfer_seconds": 1e9}, "up to 86400"),
        ({"mover": "a:b", "handshake_seconds": float("nan")}, "handshake_seconds is nan"),
    ],
)
def test_bad_options(extra, words):
    with pytest.raises(ConfigError, match=words):
        parse_options(extra)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("tests", "must be 'package.module:function'"),
        ("no_such_module_here:f", "cannot be imported"),
        ("tests.adapters.kvbm.raw_mover:missing", "cannot be imported"),
        ("tests.adapters.kvbm.raw_mover:json.x", "cannot be imported"),
        ("dynamo_kvtc:__version__", "must be callable"),
    ],
)
def test_bad_factories(path, words):
    with pytest.raises(ConfigError, match=words):
        find_factory(path)


@pytest.mark.parametrize("version", _compat.SUPPORTED)
def test_known_releases(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert _compat.require_kvbm() == version


@pytest.mark.parametrize("version", ["1.3.1", "1.6.2", "1.6.1rc1", "2.0.0"])
def test_other_releases_are_refused(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(EngineVersionError, match=f"kvbm {version} is installed.*1.4.2, 1.5.1, 1.6.1"):
        _compat.require_kvbm()


def test_no_kvbm(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install kvbm==1\.6\.1"):
        _compat.require_kvbm()


def test_endpoints(monkeypatch):
    for name in ("HOST", "PUB_PORT", "ACK_PORT"):
        monkeypatch.delenv(f"DYN_KVBM_LEADER_ZMQ_{name}", raising=False)
    assert _compat.endpoints() == _compat.Endpoints("tcp://127.0.0.1:56001", "tcp://127.0.0.1:56002")
    monkeypatch.setenv("DYN_KVBM_LEADER_ZMQ_HOST", "10.0.0.1")
    monkeypatch.setenv("DYN_KVBM_LEADER_ZMQ_PUB_PORT", "7")
    assert _compat.endpoints().publish == "tcp://10.0.0.1:7"
    monkeypatch.setenv("DYN_KVBM_LEADER_ZMQ_ACK_PORT", "7")
    with pytest.raises(ConfigError, match="both 7"):
        _compat.endpoints()
    monkeypatch.setenv("DYN_KVBM_LEADER_ZMQ_ACK_PORT", "70000")
    with pytest.raises(ConfigError, match="'70000'"):
        _compat.endpoints()
