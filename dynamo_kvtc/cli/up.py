"""``kvtc up``: a deployment's manifest, run on this machine."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console

from dynamo_kvtc.cli.phases import PhaseBars
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.up.run import UpConfig, run

_COLOURS = {"starts": "yellow", "runs": "green", "ready": "green"}


@click.command("up")
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option("--ask", metavar="TEXT", help="Send one chat completion when all is ready, and print the answer.")
@click.option("--exit", "leave", is_flag=True, help="End everything when it is ready (after --ask's answer).")
@click.option("--python", metavar="PATH", help="An interpreter that has Dynamo [default: this one].")
@click.option("--port", default=UpConfig.port, show_default=True, help="Of the frontend, on the loopback interface.")
@click.option("--mount", "mounts", multiple=True, metavar="PATH=FOLDER",
              help="A folder here for a volume that the manifest mounts at PATH. Without it: the demo's model and a "
              "small artifact. May be repeated.")  # fmt: skip
@click.option("--tier", multiple=True, metavar="NAME=VALUE",
              help="Sets an option of kv_connector_extra_config, as exact=all. May be repeated.")  # fmt: skip
@click.option("--env", "environment", multiple=True, metavar="NAME=VALUE",
              help="Sets a variable for every component, whatever the manifest says. May be repeated.")  # fmt: skip
@click.option("--logs", type=click.Path(path_type=Path), default=UpConfig.logs, show_default=True, metavar="FOLDER",
              help="A log of each component goes there.")  # fmt: skip
@click.option("--answer-tokens", default=UpConfig.answer_tokens, show_default=True, help="Of the answer at most.")
@click.option("--ready-seconds", default=UpConfig.ready_seconds, show_default=True, help="What the start may take.")
def command(
    manifest: Path, ask: str | None, leave: bool, mounts: tuple[str, ...], tier: tuple[str, ...],
    environment: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Run a manifest's components on this machine: no cluster, no GPU.

    Commands, arguments and environment are the manifest's; what must be another here (paths, ports, what a CPU needs)
    is printed. NATS is started where the manifest names it. Ctrl-C ends everything.
    """
    config = UpConfig(
        manifest,
        mounts={path: Path(folder) for path, folder in _pairs("--mount", mounts)},
        tier={name: _value(text) for name, text in _pairs("--tier", tier)},
        environment=dict(_pairs("--env", environment)),
        **options,
    )
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _interrupt)
    console = Console(stderr=True)
    with PhaseBars(console) as bars, run(config, bars, bars.say, _Watch(console, bars)) as up:
        console.print(f"ready after {up.seconds:.0f} s: {up.plan.url}/v1/chat/completions, model {up.model}")
        if ask is not None:
            answer = up.ask(ask)
            cached = "not told" if answer.cached_tokens is None else f"{answer.cached_tokens:,}"
            click.echo(answer.text)
            click.echo(
                f"first token after {answer.ttft_seconds:.2f} s, all after {answer.seconds:.2f} s; prompt "
                f"{answer.prompt_tokens:,} tokens, cached {cached}"
            )
            for worker, counted in up.counters().items():
                told = [f"{name.removeprefix('kvtc_').replace('_', ' ')} {n:,.0f}" for name, n in counted.items()]
                if told:
                    click.echo(f"{worker}: {', '.join(told)}")
        if not leave:
            console.print(f"logs are in {config.logs}; Ctrl-C ends everything")
            up.wait()
    console.print("all ended")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Once: the end of everything, which has deadlines of its own, is not interrupted again."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


class _Watch:
    """A line when a component's state changes."""

    def __init__(self, console: Console, bars: PhaseBars) -> None:
        self._bars = bars
        self._before: dict[str, str] = {}
        self._began = time.monotonic()

    def __call__(self, states: Mapping[str, str]) -> None:
        for name, state in states.items():
            if self._before.get(name) != state:
                self._bars.say(f"[{time.monotonic() - self._began:.0f} s] {name} {state}")
        self._before = dict(states)


def _pairs(option: str, given: tuple[str, ...]) -> list[tuple[str, str]]:
    for text in given:
        if "=" not in text or text.startswith("="):
            raise ConfigError(f"{option} {text!r} is no NAME=VALUE")
    return [(text.partition("=")[0], text.partition("=")[2]) for text in given]


def _value(text: str) -> Any:
    """A number, true or false as JSON has it; else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
