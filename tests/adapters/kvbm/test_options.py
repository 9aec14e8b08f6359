"""Options, versions and endpoints: each refusal names the value and what is allowed."""

from __future__ import annotations

import importlib.metadata

import pytest

from dynamo_kvtc.adapters.kvbm import _compat
from dynamo_kvtc.adapters.kvbm.mover import find_factory
from dynamo_kvtc.adapters.kvbm.options import parse_options
from dynamo_kvtc.errors import ConfigError, EngineVersionError, MissingDependencyError


def test_options_have_defaults():
    options = parse_options({"mover": "a.b:c", "mover_options": {"x": 1}, "half_seconds": 5})
    assert (options.mover, options.mover_options, options.half_seconds) == ("a.b:c", {"x": 1}, 5.0)
    assert options.transfer_seconds > 0


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({}, "mover is None"),
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
