"""Progress of long work."""

from __future__ import annotations

import io

from rich.console import Console

from dynamo_kvtc.cli.phases import PhaseBars


def shown(terminal: bool) -> str:
    file = io.StringIO()
    with PhaseBars(Console(file=file, force_terminal=terminal, width=80)) as bars:
        bars("covariance", 0.0)
        bars("covariance", 1.0)
        bars.say("a [line]")
        bars("PCA", 0.5)
    return file.getvalue()


def test_a_file_gets_a_line_per_phase() -> None:
    assert shown(False) == "[0 s] covariance\na [line]\n[0 s] PCA\n"


def test_a_terminal_gets_a_bar_per_phase() -> None:
    text = shown(True)
    assert "a [line]" in text
    last = text.rstrip().splitlines()
    assert any("covariance" in line and "100%" in line for line in last)
    assert any("PCA" in line and "50%" in line for line in last)
