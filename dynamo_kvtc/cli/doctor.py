"""``kvtc doctor``: what this machine and environment can run."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dynamo_kvtc.doctor.run import NEEDS, Asked, Report, examine

EXIT_UNABLE = 1
_COLOURS = {"ok": "green", "missing": "yellow", "problem": "red"}


@click.command("doctor")
@click.option("--for", "purposes", multiple=True, type=click.Choice(list(NEEDS)),
              help="What is to run: its lines must be ok. May be repeated (--for vllm --for gpu).")  # fmt: skip
@click.option("--host-gib", type=click.FloatRange(min=0), default=0.0, help="Budget of the host tier to check.")
@click.option("--disk-gib", type=click.FloatRange(min=0), default=0.0, help="Budget of the disk tier to check.")
@click.option("--disk-path", metavar="FOLDER", help="The disk tier's folder; nothing is left in it.")
@click.option("--artifact", metavar="FILE", help="A calibration artifact to verify.")
@click.option("--model", metavar="FOLDER", help="The model that the artifact must fit; its weights are read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
def command(
    ctx: click.Context, purposes: tuple[str, ...], host_gib: float, disk_gib: float, disk_path: str | None,
    artifact: str | None, model: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Say what can run here: GPU, engines, memory, disk; what is missing, and the remedy.

    Exit code 0: all that was asked for can run; 1: it cannot.
    """
    report = examine(Asked(purposes, host_gib, disk_gib, disk_path, artifact, model))
    if as_json:
        told = [{**asdict(line), "needed": line.name in report.needed} for line in report.lines]
        click.echo(json.dumps({"able": report.able, "for": list(purposes), "lines": told}, indent=1))
    else:
        _print(report, purposes)
    if not report.able:
        ctx.exit(EXIT_UNABLE)


def _print(report: Report, purposes: tuple[str, ...]) -> None:
    # Wide enough for a whole command where nobody reads along: a line that is cut cannot be pasted.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "needed", "", "found", "remedy"):
        table.add_column(column)
    for line in report.lines:
        state = f"[{_COLOURS[line.status]}]{line.status}[/]"
        needed = "yes" if line.name in report.needed else ""
        table.add_row(line.name, needed, state, escape(line.found), escape(line.remedy))
    console.print(table)
    wrong = [line.name for line in report.lines if line.name in report.needed and line.status != "ok"]
    what = ", ".join(purposes) or "coding and what was asked for"
    click.echo(f"{what}: " + (f"cannot run: {', '.join(wrong)}" if wrong else "can run"))
