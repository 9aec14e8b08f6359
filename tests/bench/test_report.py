"""What is said of a measurement: the README's table is the JSON's, and a picture can be drawn of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dynamo_kvtc.bench import codec
from dynamo_kvtc.bench.report import markdown, plot, stages
from dynamo_kvtc.bench.stages import floors
from dynamo_kvtc.bench.synthetic import MEASURED_CHANNELS, Synthetic, rows_of, spectrum
from dynamo_kvtc.cli.main import main
from dynamo_kvtc.codec.paged import PagedLimits
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.errors import CalibrationError, ConfigError
from dynamo_kvtc.types import KVShape

ROOT = Path(__file__).parents[2]
FILES = [
    ROOT / f"calibration/results/2026-11-23-h200/codec-{n}.json"
    for n in ("llama-20x", "llama-60x", "nemo-20x", "nemo-paper-16x")
]


def rows():
    return [row for file in FILES for row in json.loads(file.read_text())]


def test_the_readme_shows_what_was_measured():
    readme = (ROOT / "README.md").read_text()
    section = readme.split("<!-- bench table -->\n")[1].split("<!-- /bench table -->")[0]
    assert section == markdown(rows())
    told = CliRunner().invoke(main, ["bench", "table", *map(str, FILES)])
    assert told.exit_code == 0
    assert told.output == section


def test_a_row_is_consistent():
    for row in rows():
        assert row["record_bytes"] * 10 < row["raw_bytes"]
        spent = sum(seconds for direction, _, seconds, _ in stages(row) if direction == "decode")
        assert spent <= row["decode_s"] * 1.1
        assert row["first_group_s"] < row["all_groups_s"]


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot(rows(), tmp_path / "stages.png")
    assert (tmp_path / "stages.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"\.png"):
        plot(rows(), tmp_path / "stages.gif")


@pytest.mark.parametrize(("group", "groups"), [(0, 1), (1, 2), (0, 4), (2, 5)])
def test_spectrum_is_the_measured_curve_stretched(group, groups):
    small, large = spectrum(MEASURED_CHANNELS, group, groups), spectrum(4 * MEASURED_CHANNELS, group, groups)
    assert bool((small[1:] <= small[:-1]).all())
    torch.testing.assert_close(large[::4], small, rtol=1e-3, atol=1e-5)


def test_groups_take_the_curve_of_their_place_in_the_model():
    firsts = [float(spectrum(MEASURED_CHANNELS, g, 4)[0]) for g in range(4)]
    assert len(set(firsts)) == 4
    assert [float(spectrum(MEASURED_CHANNELS, g, 8)[0]) for g in (0, 7)] == [firsts[0], firsts[3]]
    assert float(spectrum(MEASURED_CHANNELS, 1, 2)[0]) not in firsts


def test_a_synthetic_cache_reaches_the_ratio_it_was_made_for():
    made = Synthetic(KVShape(4, 2, 64, "bfloat16"), (20.0,), 2, 400, 16, torch.device("cpu"))
    cache, slots = made.cache(64)
    positions = torch.arange(64)
    made.fill(cache, slots, positions)
    k, v = rows_of(cache, slots)
    blocks = BlockCodec(made.artifact, "20").encode_blocks(k, v, positions)
    exact = sum(b.exact.total for b in blocks)
    coded = sum(len(b.record) for b in blocks) - exact * made.shape.bytes_per_token
    assert (64 - exact) * made.shape.bytes_per_token / coded == pytest.approx(20, rel=0.15)


@pytest.mark.parametrize(("profile", "ratio"), [("kvtc", 32.0), ("paper", 16.0)])
def test_a_case_is_proven(kernel_device, profile, ratio):
    case = codec.CodecCase(
        "small", (ratio,), 18, profile=profile, groups=1, max_rank=48, limits=PagedLimits(32, 32, 1 << 20)
    )
    made = codec.synthesise(case, KVShape(2, 1, 64, "float32"), torch.device(kernel_device))
    cache, slots = made.cache(18)
    positions = torch.arange(18)
    made.fill(cache, slots, positions)
    coded = codec.code(case, made, cache, slots, positions, f"{ratio:g}", deflate="zlib")
    assert 0 < codec.verify(case, coded, f"{ratio:g}") < 0.5
    rates = {"int8_ops_s": 2e15, "bf16_ops_s": 1e15, "device_bytes_s": 4e12}
    raw, sizes = 18 * made.shape.bytes_per_token, coded.encoded.sizes
    least = floors(coded.codec.point, 18, raw, int(sizes.sum()), rates)
    assert all(seconds > 0 for seconds in least.values())
    assert {"encode project", "decode project"} < set(least)
    coded.decoder.cache.k[0].mul_(1.1)
    with pytest.raises(CalibrationError, match=r"block 1: the GPU's cache is .* from the CPU's"):
        codec.verify(case, coded, f"{ratio:g}")
    cache.k[0].add_(1)
    with pytest.raises(CalibrationError, match="block 1: the GPU's record is not the CPU's"):
        codec.verify(case, coded, f"{ratio:g}")


def test_without_a_gpu_the_bench_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    told = CliRunner().invoke(main, ["bench", "codec"])
    assert told.exit_code == 2
    assert "NVIDIA GPU" in told.output
