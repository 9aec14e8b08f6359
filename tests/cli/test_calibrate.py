"""``kvtc calibrate``: the whole way on a tiny model, recipes, estimates, refusals, and no file when interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from click.testing import CliRunner

from dynamo_kvtc.calibrate.estimate import (
    Job,
    Speed,
    _cgroup_bytes,
    check_memory,
    estimate,
    free_bytes,
    probe,
)
from dynamo_kvtc.calibrate.run import CalibrationConfig
from dynamo_kvtc.calibrate.texts import check_tokens, draw_texts, fit_tokens
from dynamo_kvtc.cli.main import main
from dynamo_kvtc.codec.artifact import load_artifact
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.errors import CalibrationError, TooFewTokensError
from dynamo_kvtc.types import KVShape
from tests.evaluate.tiny import Tiny

RECIPES = sorted((Path(__file__).parents[2] / "calibration").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "--tokens": 2000, "--context": 128, "--ratios": "4,8", "--kl-sequences": 2, "--fisher-sequences": 4,
    "--device": "cpu",
}  # fmt: skip


def calibrate(options: dict[str, Any]) -> tuple[int, str, str]:
    arguments = ["calibrate"]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            arguments += [name, str(one)]
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


def options(tiny: Tiny, file: Path, **changes: Any) -> dict[str, Any]:
    base = {"--model": tiny.folder, "--data": tiny.text, "--out": file, **SMALL}
    return base | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}


def test_kvtc_from_model_to_records(tiny_bf16: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    code, text, err = calibrate(options(tiny_bf16, out))
    assert code == 0, err
    artifact = load_artifact(out)
    manifest = artifact.manifest
    assert (manifest.profile, manifest.groups, manifest.block_tokens) == ("kvtc", ((0, 2), (2, 3)), 16)
    assert [point.name for point in manifest.points] == ["4", "8"]
    assert [point.expected_ratio for point in manifest.points] == pytest.approx([4, 8], rel=0.05)
    kls = [point.expected_kl for point in manifest.points]
    assert all(kl is not None for kl in kls)
    assert 0 < kls[0] < kls[1]  # type: ignore[operator]
    assert manifest.calibration["sources"] == {str(tiny_bf16.text): 17 * 128}
    artifact.check_model(tiny_bf16.model.identity, tiny_bf16.model.shape, tiny_bf16.model.rope)
    k, v = tiny_bf16.model.prefill(tiny_bf16.sequences(1, 64)[0])
    codec = BlockCodec(artifact, "8")
    back = codec.decode_block(codec.encode_block(k, v, torch.arange(64)).record)
    assert back[0].shape == k.shape
    assert "estimate:" in err
    assert "free" in err
    for word in ("expected ratio", "MB of it basis", manifest.digest[:16]):
        assert word in text.replace("\n", " ")


def test_a_target_kl_is_met(tiny_bf16: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    # Long blocks: in short ones the headers alone keep such a small cache from the ratio the search begins at.
    changes = {"ratios": "4", "kls": "0.02", "block_tokens": 128, "groups": 1}
    code, text, err = calibrate(options(tiny_bf16, out, **changes))
    assert code == 0, err
    point = load_artifact(out).manifest.points[1]
    assert point.name == "kl=0.02"
    assert point.expected_kl == pytest.approx(0.02, rel=0.2)
    assert "kl=0.02" in text


def test_paper_and_a_basis_per_rank(tiny_bf16: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    code, text, err = calibrate(options(tiny_bf16, out, profile="paper", tp_size=2))
    assert code == 0, err
    manifest = load_artifact(out).manifest
    assert (manifest.profile, manifest.tp_size, manifest.groups) == ("paper", 2, ((0, 3),))
    assert all(point.expected_kl is not None and point.expected_kl > 0 for point in manifest.points)
    assert "before DEFLATE" in text.replace("\n", " ")


def test_tensor_parallel_ranks_see_their_own_heads(tiny_bf16: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "tp.safetensors"
    code, _, err = calibrate(options(tiny_bf16, out, tp_size=2, groups=1))
    assert code == 0, err
    ranks = [load_artifact(out, rank) for rank in (0, 1)]
    assert [a.shape.kv_heads for a in ranks] == [1, 1]
    means = [a.tensor("group0.mean", torch.float32, 48) for a in ranks]
    assert not torch.equal(*means)
    assert ranks[0].manifest.points[0].expected_kl is not None


def test_kl_is_left_out_when_asked(tiny_bf16: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    code, _, err = calibrate(options(tiny_bf16, out, kl_sequences=0))
    assert code == 0, err
    assert [point.expected_kl for point in load_artifact(out).manifest.points] == [None, None]


def test_a_recipe_gives_defaults_and_the_command_line_wins(tiny_bf16: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {tiny_bf16.folder}\ndata: {tiny_bf16.text}\ntokens: 2000\ncontext: 128\nratios: [4, 6]\n"
        "kl_sequences: 0\nfisher-sequences: 4\ngroups: 3\n"
    )
    out = tmp_path / "a.safetensors"
    code, _, err = calibrate({"--recipe": recipe, "--out": out, "--groups": 1, "--device": "cpu"})
    assert code == 0, err
    manifest = load_artifact(out).manifest
    assert (len(manifest.groups), [point.name for point in manifest.points]) == (1, ["4", "6"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tokns: 5\nratioz: 3\n", "unknown ratioz, tokns; known are block-tokens,"),
        ("- 1\n", "is a list; it must map"),
        ("a: [\n", "is not YAML"),
        ("yes: true\n", "unknown"),
        (None, "cannot be read"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    recipe = tmp_path / "r.yaml"
    if content is not None:
        recipe.write_text(content)
    code, _, err = calibrate({"--recipe": recipe, "--model": "smollm2", "--out": tmp_path / "a"})
    assert code == 2
    assert message in err


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_recipes_here_are_read(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadError(Exception):
        pass

    def load(*arguments: object) -> NoReturn:
        raise ReadError

    monkeypatch.setattr("dynamo_kvtc.cli.calibrate.load_model", load)
    result = CliRunner().invoke(main, ["calibrate", "--recipe", str(recipe), "--out", str(tmp_path / "a.safetensors")])
    assert isinstance(result.exception, ReadError), result.output


@pytest.mark.parametrize("phase", ["Fisher weights", "step sizes and tables", "expected KL"])
def test_an_interruption_leaves_no_file(
    tiny_bf16: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    seen = []

    def interrupt(self: object, name: str, share: float) -> None:
        seen.append(name)
        if name == phase:
            raise KeyboardInterrupt

    monkeypatch.setattr("dynamo_kvtc.cli.phases.PhaseBars.__call__", interrupt)
    code, _, err = calibrate(options(tiny_bf16, tmp_path / "a.safetensors"))
    assert code == 130
    assert err.rstrip().endswith("interrupted")
    assert phase in seen
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_while_writing_keeps_the_old_file(
    tiny_bf16: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"old")

    def interrupt(handle: int) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("dynamo_kvtc.codec.artifact.os.fsync", interrupt)
    code, _, _ = calibrate(options(tiny_bf16, out, kl_sequences=0))
    assert code == 130
    assert out.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"profile": "paper", "kls": "0.01"}, "a target KL needs profile kvtc"),
    ({"kls": "0.01", "kl_sequences": 0}, "--kls needs held-out text"),
    ({"ratios": "4,x"}, "--ratios '4,x' is not a list of numbers"),
    ({"ratios": ""}, "no operating point"),
    ({"ratios": "0"}, "target 0.0 is not a positive number"),
    ({"groups": 0}, "--groups is 0"),
    ({"tp_size": 0}, "--tp-size is 0"),
    ({"block_tokens": 5000}, "--block-tokens is 5000; a record holds at most 1024"),
    ({"data": "no.txt"}, "text source 'no.txt'"),
    ({"out": "no/a.safetensors"}, "does not exist; make it first"),
    ({"out": "."}, "is a folder"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[m[1][:24] for m in MISTAKES])
def test_mistakes_are_found_before_the_model_is_loaded(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    def load(*arguments: object) -> NoReturn:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("dynamo_kvtc.cli.calibrate.load_model", load)
    monkeypatch.chdir(tmp_path)
    code, _, err = calibrate(options(tiny, tmp_path / "a.safetensors", **change))
    assert code == 2
    assert message in err


def test_mistakes_that_need_the_model_are_found_before_it_runs(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prefill(*arguments: object) -> NoReturn:
        raise AssertionError("the model was run")

    monkeypatch.setattr(type(tiny.model), "prefill", prefill)
    little = tmp_path / "little.txt"
    little.write_text("x" * 300)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"groups": 4}, "4 layer groups asked of a model with 3 layers"),
        ({"tp_size": 3}, "tp_size 3 does not divide 2 KV heads"),
        ({"context": 600}, "give 16 to 512"),
        ({"tokens": 0}, "0 calibration tokens asked"),
        ({"data": little, "context": 16, "tokens": 12, "groups": 1}, "cannot give a basis of rank 96"),
    ]
    for change, message in changes:
        code, _, err = calibrate(options(tiny, tmp_path / "a.safetensors", **change))
        assert code == 2, err
        assert message in err


def test_few_tokens_warn_and_too_few_refuse() -> None:
    shape = KVShape(layers=4, kv_heads=2, head_dim=8, dtype="bfloat16")
    config = CalibrationConfig(groups=2)
    channels = 64
    assert check_tokens(2 * channels, 2 * channels, shape, config) == []
    (warning,) = check_tokens(2 * channels - 1, 100, shape, config)
    assert "127 calibration tokens are few for 64 channels" in warning
    assert "7% (at 60x) to 11% (at 16x) less ratio; 640 tokens" in warning
    assert "36%" in check_tokens(40, 40, shape, config)[0]
    (short,) = check_tokens(500, 1000, shape, config)
    assert "holds 500 tokens for calibration; 1000 were asked" in short
    check_tokens(32, 32, shape, config)
    with pytest.raises(TooFewTokensError, match=r"rank 64 .* at least 32 are needed and 128 or more"):
        check_tokens(31, 31, shape, config)
    check_tokens(10, 10, shape, CalibrationConfig(groups=2, max_rank=20))
    # K and V apart: half the channels.
    assert check_tokens(channels, channels, shape, CalibrationConfig(profile="paper", groups=2)) == []


def test_warnings_reach_the_user(tiny_bf16: Tiny, tmp_path: Path) -> None:
    code, _, err = calibrate(options(tiny_bf16, tmp_path / "a.safetensors", tokens=120, kl_sequences=0))
    assert code == 0, err
    assert "warning: 124 calibration tokens are few for 64 channels" in err


def test_texts_are_apart_and_counted(tiny: Tiny) -> None:
    texts = draw_texts(tiny.model, [str(tiny.text)], 1000, 128, 3)
    assert len(texts.fit) == 9
    assert fit_tokens(texts) == 9 * 124 >= 1000
    assert len(texts.held_out) == 3
    fitted = {tuple(ids.tolist()) for ids in texts.fit}
    assert not fitted & {tuple(ids.tolist()) for ids in texts.held_out}


def job(groups: int = 2, **changes: Any) -> Job:
    shape = KVShape(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16")
    values = {
        "shape": shape, "config": CalibrationConfig(groups=groups), "parameters": 8_000_000_000, "vocabulary": 128_000,
        "length": 2048, "fit_tokens": 200_000, "held_out_tokens": 16_384, "kl_sequences": 8,
    }  # fmt: skip
    return Job(**{**values, **changes})


SPEED = Speed(50e12, 500e12)


def test_estimate_follows_the_work() -> None:
    base = estimate(job(), SPEED, "cuda")
    # Two accumulators of 32,768 channels and the solver's copies.
    assert base.peak_bytes > 6 * 4 * 32768**2
    more_groups = estimate(job(groups=8), SPEED, "cuda")
    some_groups = estimate(job(groups=4), SPEED, "cuda")
    # Eigenvectors take a quarter of the time with twice the groups; rounding them takes as long as there are rows.
    pca = [x.seconds["PCA"] for x in (base, some_groups, more_groups)]
    assert pca[0] - pca[1] == pytest.approx(4 * (pca[1] - pca[2]), rel=0.01)
    assert pca[2] < 0.15 * pca[0]
    assert more_groups.peak_bytes < base.peak_bytes / 2
    more_tokens = estimate(job(fit_tokens=400_000), SPEED, "cuda")
    assert more_tokens.seconds["covariance"] == pytest.approx(2 * base.seconds["covariance"])
    assert more_tokens.peak_bytes == base.peak_bytes
    faster = estimate(job(), Speed(100e12, 1000e12), "cuda")
    assert faster.total_seconds == pytest.approx(base.total_seconds / 2)
    assert "expected KL" not in estimate(job(kl_sequences=0), SPEED, "cuda").seconds
    paper = estimate(job(config=CalibrationConfig(profile="paper", groups=2)), SPEED, "cuda")
    assert "Fisher weights" not in paper.seconds


def test_memory_that_cannot_suffice_is_refused_with_a_way_out() -> None:
    small = 12 * 2**30
    wanted = job()
    expected = estimate(wanted, SPEED, "cuda")
    check_memory(wanted, expected, expected.peak_bytes, "cuda")
    check_memory(wanted, expected, None, "cuda")
    with pytest.raises(CalibrationError, match=r"GiB of GPU memory; 12\.0 GiB is free") as caught:
        check_memory(wanted, expected, small, "cuda")
    groups = int(str(caught.value).split("--groups ")[1].split()[0])
    assert estimate(job(groups=groups), SPEED, "cuda").peak_bytes <= small
    assert estimate(job(groups=groups - 1), SPEED, "cuda").peak_bytes > small
    with pytest.raises(CalibrationError, match=r"of main memory; 0\.0 GiB is free") as caught:
        check_memory(wanted, expected, 1000, "cpu")
    assert "--groups" not in str(caught.value)


def test_memory_is_checked_before_the_model_runs(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prefill(*arguments: object) -> NoReturn:
        raise AssertionError("the model was run")

    monkeypatch.setattr(type(tiny.model), "prefill", prefill)
    monkeypatch.setattr("dynamo_kvtc.cli.calibrate.free_bytes", lambda device: 1000)
    code, _, err = calibrate(options(tiny, tmp_path / "a.safetensors"))
    assert code == 2
    assert "0.0 GiB is free. Ways out:" in err


def test_free_memory_and_the_probe_are_real(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    free = free_bytes(cpu)
    assert free is None or 2**24 < free < 2**50
    speed = probe(cpu, torch.float32)
    assert 1e8 < speed.linear_ops_per_second < 1e15
    assert speed.linear_ops_per_second == speed.model_ops_per_second
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert _cgroup_bytes(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_bytes(tmp_path) is None
    assert _cgroup_bytes(tmp_path / "none") is None


def test_inspect_reads_what_calibrate_wrote(tiny_bf16: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    assert calibrate(options(tiny_bf16, out, kl_sequences=0))[0] == 0
    result = CliRunner().invoke(main, ["inspect", str(out), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["model"]["model_id"] == "tiny-model"
