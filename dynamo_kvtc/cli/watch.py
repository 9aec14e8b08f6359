"""``kvtc watch``: workers, what they hold and how they do, from their heartbeats on NATS."""

from __future__ import annotations

import json
import time
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from dynamo_kvtc.events.board import Board, Line
from dynamo_kvtc.events.nats import open_nats
from dynamo_kvtc.events.options import parse_nats

_COLUMNS = ("worker", "model", "artifact", "host", "disk", "hits", "ratio", "pulled", "served", "events", "lost", "age")
_LEFT = ("worker", "model", "artifact")


@click.command("watch")
@click.option("--server", metavar="URL", help="nats://host:4222; commas between several.  [default: NATS_SERVER]")
@click.option("--namespace", help="Of the workers.  [default: DYN_NAMESPACE, or dynamo]")
@click.option("--nkey-seed", metavar="FILE", help="Who is watching, by nkey ...")
@click.option("--credentials", metavar="FILE", help="... or by a credentials file.")
@click.option("--tls-ca", metavar="FILE", help="The authority that signed the server's certificate.")
@click.option("--inbox-prefix", help="Where answers may arrive, if permissions say so.")
@click.option("--seconds", type=click.FloatRange(0.1, 60), default=1.0, show_default=True, help="Between two looks.")
@click.option("--once", is_flag=True, help="Print what there is now, and end.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each look, instead of a table.")
def command(seconds: float, once: bool, as_json: bool, server: str | None, **more: str | None) -> None:
    """Show who serves a namespace: tiers, hit rates, ratio, traffic. Ends with Ctrl-C."""
    given = {name: value for name, value in {"servers": server, **more}.items() if value is not None}
    nats = open_nats(parse_nats(given, "kvtc watch"), "kvtc-watch")
    board = Board(nats)
    try:
        if once:
            board.read()
        else:
            board.follow()
        if as_json:
            _print_json(board, seconds, once)
        elif once:
            Console(width=max(Console().width, 132)).print(table(board.lines()))
        else:
            with Live(table([]), refresh_per_second=4) as live:
                while True:
                    time.sleep(seconds)
                    live.update(table(board.lines(), nats.connected))
    finally:
        board.close()
        nats.close(1.0)


def table(lines: list[Line], connected: bool = True) -> Table:
    title = f"{len(lines)} workers" if connected else "the NATS server is gone; looking for it"
    out = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in _COLUMNS:
        out.add_column(column, justify="left" if column in _LEFT else "right", no_wrap=column not in _LEFT)
    for line in lines:
        up, stats = line.beat.up, line.beat.stats
        out.add_row(
            escape(up.worker), escape(up.model_name), escape(up.artifact[:8]), _tier(line, "host"), _tier(line, "disk"),
            "" if line.hit_rate is None else f"{100 * line.hit_rate:.0f}%",
            "" if line.ratio is None else f"{line.ratio:.1f}x",
            _traffic(line, "pulled_bytes"), _traffic(line, "served_bytes"),
            f"{line.rates['events']:,.0f}/s" if line.rates else f"{stats.events:,}",
            f"{stats.events_dropped:,}" if stats.events_dropped else "", f"{time.monotonic() - line.heard:.1f} s",
        )  # fmt: skip
    return out


def _print_json(board: Board, seconds: float, once: bool) -> None:
    while True:
        told: dict[str, Any] = {"workers": [line.told() for line in board.lines()], "bad": dict(board.bad)}
        click.echo(json.dumps(told))
        if once:
            return
        time.sleep(seconds)


def _tier(line: Line, tier: str) -> str:
    stats = line.beat.stats
    return f"{stats.entries[tier]:,} ({_bytes(stats.bytes.get(tier, 0))})" if tier in stats.entries else ""


def _traffic(line: Line, name: str) -> str:
    return f"{_bytes(line.rates[name])}/s" if line.rates else _bytes(getattr(line.beat.stats, name))


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
