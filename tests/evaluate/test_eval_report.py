"""Rows, strict JSON, tables and the picture."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dynamo_kvtc.codec.policy import ExactCounts
from dynamo_kvtc.errors import ConfigError, MissingDependencyError
from dynamo_kvtc.evaluate import plot, report
from dynamo_kvtc.evaluate.codecs import CodedBytes
from dynamo_kvtc.evaluate.quality import Quality
from dynamo_kvtc.evaluate.selection import CodecName, Selected
from dynamo_kvtc.evaluate.tasks import TaskResult

SETTINGS: dict[str, Any] = {"context": 64, "continuation": 8, "sinks": 4, "window": 0, "model": "m"}


def a_row(codec: str, kl: float, ratio: int = 8, data: str = "some/text.txt", **changes: Any) -> report.Row:
    coded = CodedBytes(100, 40, 100 * ratio, 60, ExactCounts(4, 0, 2), 640.0)
    fields = {"kl_stderr": None, "ppl_ratio": 1.01, "top1": 0.9, "scored_tokens": 14, "sequences": 2, **changes}
    quality = Quality(codec=codec, kl=kl, coded=coded, **fields)
    task = TaskResult("passkey", 1, 2, 0.5, coded, {"0.5": (1, 1), "0.1": (0, 1)})
    return report.row(data, Selected(CodecName(codec)), quality, [task], SETTINGS)


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} in the JSON")


def test_json_is_strict_even_if_the_model_broke() -> None:
    rows = [a_row("kvtc:8", math.nan, ppl_ratio=math.inf), a_row("raw", 0.0)]
    read = json.loads(report.to_json(rows), parse_constant=refuse)
    assert read == rows
    assert read[0]["kl"] is None
    assert read[0]["ppl_ratio"] is None
    assert read[1]["kl"] == 0.0


def test_a_row_says_what_it_measured() -> None:
    row = a_row("kvtc:8", 0.01)
    assert (row["ratio_coded"], row["ratio_total"], row["bytes_over_entropy"]) == (8.0, 6.0, 1.25)
    assert row["exact_by_reason"] == {"policy": 4, "nonfinite": 0, "error_bound": 2}
    assert row["n_sequences"] == 2
    assert row["window"] == 0
    assert row["model"] == "m"
    assert row["tasks"]["passkey"]["accuracy"] == 0.5
    assert list(row["tasks"]["passkey"]["by_depth"]) == ["0.1", "0.5"]
    assert row["tasks"]["passkey"]["interval"] == pytest.approx([0.0945, 0.9055], abs=1e-4)


def test_tables_fit_a_plain_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [a_row(codec, 0.0123, data=data) for data in ("one.txt", "two.txt") for codec in ("raw", "kvtc:kl=0.005")]
    tables = report.tables(rows)
    assert len(tables) == 3
    console = Console(width=80)
    for table in tables:
        console.print(table)
    out = capsys.readouterr().out
    for text in ("kvtc:kl=0.005", "0.01230", "1.250", "9.1%", "one.txt", "two.txt", "0.095-0.905"):
        assert text in out
    assert "…" not in out


def test_the_picture_has_a_panel_per_text(tmp_path: Path) -> None:
    rows = [
        a_row(codec, kl, ratio, data)
        for data in ("one.txt", "two.txt")
        for codec, kl, ratio in (("raw", 0.0, 1), ("fp8", 0.001, 2), ("kvtc:8", 0.002, 8), ("kvtc:30", 0.02, 30))
    ]
    for name in ("out.svg", "out.png"):
        plot.plot(rows, tmp_path / name)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out.svg").read_text()
    for label in ("one.txt", "two.txt", "fp8", "kvtc"):
        assert f"<!-- {label} -->" in text
    assert "<!-- raw -->" not in text


def test_a_picture_that_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"must be one of \.png"):
        plot.check_plot(tmp_path / "out.gif")
    with pytest.raises(ConfigError, match="no codec has a KL above 0"):
        plot.plot([a_row("raw", 0.0)], tmp_path / "out.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install dynamo-kvtc\[model\]"):
        plot.check_plot(tmp_path / "out.png")
