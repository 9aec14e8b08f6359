"""`kvtc bench`: speed, measured after the result was proven right."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from rich.console import Console

from dynamo_kvtc.bench.shapes import SHAPES, shape_of


@click.group("bench")
def command() -> None:
    """Measure speed on this machine; every case first proves its result."""


@command.command("calibrate")
@click.option("--shape", default="mistral-nemo-12b", show_default=True, help=f"One of {', '.join(SHAPES)}.")
@click.option("--tokens", default=200_000, show_default=True, help="Calibration tokens.")
@click.option("--ratios", default="8,16,32,64", show_default=True, help="Operating points.")
@click.option("--groups", default=2, show_default=True, help="Layer groups.")
@click.option("--device", help="cpu, cuda, cuda:N.  [default: cuda if there is one]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures as JSON.")
def calibrate_command(
    shape: str, tokens: int, ratios: str, groups: int, device: str | None, json_path: Path | None
) -> None:
    """Time calibrating a model of this shape on synthetic activations, its forward passes left out."""
    from dynamo_kvtc.bench.calibration import time_calibration

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    result = {"shape": shape} | time_calibration(
        shape_of(shape), tokens, tuple(float(r) for r in ratios.split(",")), groups, where
    )
    Console().print_json(data=result)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
