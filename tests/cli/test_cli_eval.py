"""``kvtc eval``: the whole way on a tiny model, and every mistake found before the model works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner

from dynamo_kvtc.cli.main import main
from tests.evaluate.tiny import Tiny, passages, words

SMALL = {"--sequences": 2, "--context": 80, "--continuation": 16, "--window": 16, "--device": "cpu"}


def kvtc_eval(options: dict[str, Any]) -> tuple[int, str, str]:
    arguments = ["eval"]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            arguments += [name, str(one)]
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} in the JSON")


def test_the_whole_way(tiny_bf16: Tiny, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(words(500, seed=8))
    codecs = ["raw", "fp8", "nvfp4", "kivi2", "kvtc:8.0", "kvtc:kl=0.005", "kvtc:30"]
    code, out, err = kvtc_eval(
        {
            **SMALL, "--model": tiny_bf16.folder, "--artifact": tiny_bf16.artifact, "--data": [tiny_bf16.text, other],
            "--codecs": ",".join(codecs), "--tasks": f"lambada:{passages(tmp_path / 'p.jsonl', 3)},passkey",
            "--task-examples": 2, "--json": tmp_path / "out.json", "--plot": tmp_path / "out.png",
        }
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads((tmp_path / "out.json").read_text(), parse_constant=refuse)
    assert [(r["data"], r["codec"]) for r in rows] == [(str(d), c) for d in (tiny_bf16.text, other) for c in codecs]
    for r in rows:
        assert (r["n_sequences"], r["context"], r["continuation"], r["sinks"], r["window"]) == (2, 80, 16, 4, 16)
        assert r["scored_tokens"] == 30
        assert r["exact_by_reason"]["policy"] == 2 * 20
        assert r["model"] == "tiny-model"
        assert r["dtype"] == "bfloat16"
        assert r["versions"]["torch"]
        assert r["tasks"]["lambada"]["n"] == r["tasks"]["passkey"]["n"] == 2
        is_record = r["codec"].startswith("kvtc")
        assert (r["bytes_over_entropy"] is not None) == is_record == (r["artifact"] is not None)
    raw, fine, coarse = rows[0], rows[4], rows[6]
    assert (raw["kl"], raw["ratio_coded"], raw["ppl_ratio"], raw["top1"]) == (0.0, 1.0, 1.0, 1.0)
    assert 0 < fine["kl"] < coarse["kl"]
    assert fine["ratio_coded"] < coarse["ratio_coded"]
    assert fine["artifact"]["point"] == "8"
    assert fine["artifact"]["file"] == "tiny.safetensors"
    assert (tmp_path / "out.png").stat().st_size > 1000
    for text in ("kvtc:kl=0.005", "nvfp4", "passkey", "other.txt"):
        assert text in out


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"--codecs": "raw,zip9"}, "codec 'zip9' is unknown"),
    ({"--codecs": "kvtc:31"}, "operating point '31'"),
    ({"--codecs": "paper:16"}, "codec 'paper:16' needs a paper artifact"),
    ({"--artifact": "no.safetensors"}, "cannot read artifact no.safetensors"),
    ({"--data": "no.txt"}, "text source 'no.txt'"),
    ({"--data": ["python", "python"]}, "names a text twice"),
    ({"--tasks": "lambada:no.jsonl"}, "no.jsonl is not a file"),
    ({"--tasks": "gsm"}, "task 'gsm' is unknown"),
    ({"--context": 20, "--sinks": 4, "--window": 16}, "a context of 20 tokens with 4 sinks and a window of 16"),
    ({"--continuation": 1}, "a continuation of 1 tokens"),
    ({"--sequences": 0}, "--sequences is 0"),
    ({"--sinks": -1}, "sinks is -1"),
    ({"--task-examples": 0}, "--task-examples is 0"),
    ({"--plot": "out.gif"}, "out.gif"),
    ({"--plot": "no/out.png"}, "--plot no/out.png cannot be written"),
    ({"--json": "no/out.json"}, "--json no/out.json cannot be written"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[m[1][:24] for m in MISTAKES])
def test_mistakes_are_found_before_the_model_is_loaded(
    tiny: Tiny, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(*arguments: object) -> NoReturn:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("dynamo_kvtc.evaluate.run.load_model", load)
    monkeypatch.chdir(tmp_path)
    options = {"--model": tiny.folder, "--artifact": tiny.artifact, "--data": tiny.text, "--codecs": "raw"}
    code, _, err = kvtc_eval({**SMALL, **options, **change})
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert message in err


def test_mistakes_that_need_the_model_are_found_before_it_runs(
    tiny: Tiny, tiny_bf16: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def prefill(*arguments: object) -> NoReturn:
        raise AssertionError("the model was run")

    monkeypatch.setattr(type(tiny.model), "prefill", prefill)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    little = tmp_path / "little.txt"
    little.write_text("x" * 100)
    options = {"--model": tiny.folder, "--artifact": tiny.artifact, "--data": tiny.text, "--codecs": "raw,kvtc:8"}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"--artifact": tiny_bf16.artifact}, "calibrated for model.weights_digest"),
        ({"--data": short}, "gives no full sequence of 96 tokens"),
        ({"--data": little}, "gives 1 sequences of 96 tokens; 2 were asked"),
        ({"--context": 500}, "make 516 tokens; tiny-model has 512 positions"),
    ]
    for change, message in changes:
        code, _, err = kvtc_eval({**SMALL, **options, **change})
        assert code == 2, err
        assert message in err
