"""Entry point of ``kvtc``.

To add a command: a module here with a ``click.Command`` named ``command``, and a line in ``COMMANDS``.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from dynamo_kvtc import __version__
from dynamo_kvtc.errors import KvtcError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

# name -> (module of dynamo_kvtc.cli, one line for `kvtc --help`): help needs no command's imports.
COMMANDS = {
    "bench": ("bench", "Measure speed on this machine; every case first proves its result."),
    "calibrate": ("calibrate", "Fit the codec to a model and write its artifact."),
    "demo": ("demo", "Calibrate on a small model and hold a conversation three ways."),
    "doctor": ("doctor", "Say what this machine and environment can run, and what is missing."),
    "eval": ("evaluate", "Measure quality and size against the uncompressed model and peers."),
    "inspect": ("inspect", "Show what a calibration artifact or a coded block says of itself."),
    "watch": ("watch", "Show who serves a namespace, what they hold and how they do, from NATS."),
}


class LazyGroup(click.Group):
    """Imports a command when it is called, and ends deliberate errors with one line instead of a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"dynamo_kvtc.cli.{COMMANDS[cmd_name][0]}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KvtcError as exc:
            click.echo(f"error: {' '.join(str(exc).split())}", err=True)
            ctx.exit(EXIT_ERROR)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvtc")
def main() -> None:
    """KV-cache transform coding: calibrate, inspect and measure."""


if __name__ == "__main__":
    main()
