"""What an operator may set, and what is refused."""

from __future__ import annotations

import pytest

from dynamo_kvtc.errors import ArtifactMismatchError, ConfigError
from dynamo_kvtc.tier.options import TierOptions, check_memory, parse_options
from dynamo_kvtc.types import KVShape, ModelIdentity, RopeSpec
from tests.builders import case_seed, make_artifact
from tests.tier.parts import BLOCK_TOKENS, Engine

GOOD = {"artifact": "a.safetensors", "host_gib": 1}


def test_defaults():
    options = parse_options({**GOOD, "disk_gib": 0.5, "disk_path": "/x"}, "here")
    assert options.host_bytes == 1 << 30
    assert options.disk_bytes == 1 << 29
    assert options.exact == "sinks"
    assert options.sinks == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host_gb": 1}, "here has unknown options host_gb; known are artifact"),
        ({"host_gib": 0}, "host_gib and disk_gib are both 0"),
        ({"host_gib": -1}, "host_gib is -1.0; it must be 0 to"),
        ({"host_gib": "8"}, "host_gib is '8'; it must be a number"),
        ({"host_gib": float("nan")}, "host_gib is nan; it must be a number"),
        ({"host_gib": True}, "host_gib is True; it must be a number"),
        ({"disk_gib": 1}, "a disk tier needs both"),
        ({"disk_path": "/x"}, "a disk tier needs both"),
        ({"exact": "none"}, "exact is 'none'; it must be one of 'sinks', 'all'"),
        ({"sinks": 2.0}, "sinks is 2.0; it must be a whole number"),
        ({"sinks": -1}, "sinks is -1; it must be 0 to 1024 tokens"),
        ({"promote_on": 3}, "promote_on is 3; it must be 1 to 2"),
        ({"write_through": 1}, "write_through is 1; it must be true or false"),
        ({"weights": "trust"}, "weights is 'trust'; it must be 'verify' or a sha256"),
        ({"point": 16}, "point is 16; it must be a text"),
        ({"prefill_tokens_per_second": 0}, "prefill_tokens_per_second is 0"),
        ({"close_seconds": 0}, "close_seconds is 0"),
        ({"window": -1}, "window is -1; it must be 0 to 65536 tokens"),
        ({"window": 1.5}, "window is 1.5; it must be a whole number"),
        ({"window": 8, "exact": "all"}, "or set window to 0"),
    ],
)
def test_what_is_refused(change, words):
    with pytest.raises(ConfigError, match=r"^here") as caught:
        parse_options({**GOOD, **change}, "here")
    assert words in str(caught.value)


def test_an_artifact_is_needed():
    with pytest.raises(ConfigError, match="here lacks artifact"):
        parse_options({"host_gib": 1}, "here")


def test_more_memory_than_there_is():
    options = TierOptions("a", host_gib=2, queue_mib=64)
    check_memory(options, 3 << 30)
    with pytest.raises(ConfigError, match=r"host_gib 2 and queue_mib 64 are 2048 \+ 64 MiB; this machine has 2048 MiB"):
        check_memory(options, 2 << 30)


def test_a_cache_the_artifact_is_not_for(folder):
    engine = Engine(case_seed())
    m = engine.artifact.manifest
    changes = {
        "weights_digest": {"model": ModelIdentity("m", "r1", "11" * 32, m.model.architecture)},
        "revision": {"model": ModelIdentity("m", "r2", m.model.weights_digest, m.model.architecture)},
        "dtype": {"shape": KVShape(3, 2, 16, "float16")},
        "layers": {"shape": KVShape(4, 2, 16, "bfloat16")},
        "inv_freq": {"rope": RopeSpec(tuple(2 * f for f in m.rope.inv_freq))},
        "rank 0 of 2": {"tp_size": 2},
    }
    for words, change in changes.items():
        with pytest.raises(ArtifactMismatchError, match=words):
            engine.tier(engine=change)
    with pytest.raises(ConfigError, match="2048 tokens; a record holds 1 to 1024"):
        engine.tier(engine={"block_tokens": 2048})
    with pytest.raises(ConfigError, match=f"blocks of {BLOCK_TOKENS} tokens, the engine 16"):
        engine.tier(engine={"block_tokens": 16})
    with pytest.raises(ConfigError, match="operating point '16' is not in the artifact; it has fine, coarse"):
        engine.tier(point="16")
    with pytest.raises(ConfigError, match="point is not set, and the artifact has several: set one of fine, coarse"):
        engine.tier(point=None)
    with pytest.raises(ConfigError, match="lower the budget"):
        engine.tier(folder / "tier", disk_gib=1 << 19)
    with pytest.raises(ConfigError, match="name a folder that can be written"):
        engine.tier("/proc/tier")
    (folder / "theirs" / "rank0").mkdir(parents=True)
    (folder / "theirs" / "rank0" / "diary").write_text("dear")
    with pytest.raises(ConfigError, match="files of others in it"):
        engine.tier(folder / "theirs")


def test_blocks_too_large_for_exact_records():
    shape = KVShape(8, 8, 128, "float32")
    artifact = make_artifact(shape, seed=1, components=8)[2]
    engine = Engine.__new__(Engine)
    engine.artifact, engine.shape, engine.blocks = artifact, shape, 1
    engine.pages = None
    with pytest.raises(ConfigError, match="set the engine's block size to 63 tokens or fewer"):
        engine.tier(exact="all", engine={"block_tokens": 64})
    with pytest.raises(ConfigError, match="exact is 'sinks', window 32 and a block of 64 tokens"):
        engine.tier(window=32, engine={"block_tokens": 64})
