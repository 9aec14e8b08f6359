"""The pulls' bench proves before it times; its sums are what they say."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from dynamo_kvtc.bench.pull import PullCase, links
from dynamo_kvtc.bench.pull_holder import records_of
from dynamo_kvtc.cli.bench import command
from dynamo_kvtc.codec.record import parse_record
from dynamo_kvtc.errors import ConfigError

CODEC = {
    "shape": "small", "tokens": 128, "ratio": 10, "raw_bytes": 100_000_000, "record_bytes": 10_000_000, "groups": 2,
    "raw_h2d_s": 0.010, "decode_s": 0.008, "first_group_s": 0.005,
}  # fmt: skip


def test_it_measures_every_plane_beside_the_plain_copy(tmp_path):
    pytest.importorskip("nats")
    told, codec = tmp_path / "out.json", tmp_path / "codec.json"
    codec.write_text(json.dumps([CODEC]))
    done = CliRunner().invoke(
        command,
        ["pull", "--record-kb", "4", "--megabytes", "1", "--rounds", "2", "--json", str(told), "--codec", str(codec),
         "--link-gbit", "1"],
    )  # fmt: skip
    if done.exception is not None and "nats-server" in str(done.exception):
        pytest.skip("no nats-server")
    assert done.exit_code == 0, done.output
    made = json.loads(told.read_text())
    assert [(row["plane"], row["whole"]) for row in made["rows"]] == [
        ("plain", True), ("tcp", False), ("tcp", True), ("nats", False), ("nats", True)
    ]  # fmt: skip
    assert all(row["mb_s"] > 0 for row in made["rows"])
    assert made["rows"][0]["over_plain"] == 1
    assert all(row["first_group"] is None if row["whole"] else 0 < row["first_group"] <= 1 for row in made["rows"])
    assert [row["over"] for row in made["links"]] == [
        "the link alone",
        "tcp, as measured here",
        "nats, as measured here",
    ]
    assert "over plain TCP" in done.output


def test_the_sums():
    """8 Gbit/s is 1 GB/s. Coded: 5 MB a group, 5 ms. Raw: 50 ms a group."""
    alone, slow = links(CODEC, [8.0], 1.0, {"the link alone": None, "slow": 100e6})
    assert alone["coded_first_s"] == pytest.approx(0.001 + 0.005 + 0.005)
    # Group 1 is here as group 0 is decoded; it takes the other 3 ms.
    assert alone["coded_s"] == pytest.approx(0.011 + 0.003)
    assert alone["raw_first_s"] == pytest.approx(0.001 + 0.050 + 0.005)
    assert alone["raw_s"] == pytest.approx(0.001 + 0.100 + 0.005)
    assert alone["faster"] == pytest.approx(0.106 / 0.014)
    assert slow["coded_s"] == pytest.approx(0.001 + 0.100 + 0.003)


def test_its_records_are_sound_and_of_the_size_that_was_asked():
    records = records_of(3, 5, 20_000, 4)
    assert len(records) == 5
    for record in records.values():
        parsed = parse_record(record)
        assert parsed.groups == 4
        assert abs(len(record) - 20_000) < 8
        assert all(len(parsed.section(g)) for g in range(4))


def test_what_cannot_be_measured_is_refused():
    for wrong in ({"record_bytes": 10}, {"groups": 0}, {"megabytes": 0}, {"rounds": 0}):
        with pytest.raises(ConfigError):
            PullCase(**wrong)
