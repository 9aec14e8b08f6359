"""The command ``kvtc`` itself: lazy commands, one-line errors, exit codes."""

from __future__ import annotations

import subprocess
import sys
from typing import NoReturn

import click
import pytest
from click.testing import CliRunner

from dynamo_kvtc.cli import main as cli
from dynamo_kvtc.errors import ConfigError


def test_every_listed_command_is_there() -> None:
    context = click.Context(cli.main)
    for name in cli.COMMANDS:
        command = cli.main.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert command.help


def test_help_lists_the_commands_and_version_is_the_packages() -> None:
    result = CliRunner().invoke(cli.main, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output and text[:30] in result.output for name, (_, text) in cli.COMMANDS.items())
    assert "0.1.0" in CliRunner().invoke(cli.main, ["--version"]).output


def test_help_imports_no_torch_and_inspect_no_transformers() -> None:
    script = (
        "import sys\n"
        "from dynamo_kvtc.cli.main import main\n"
        "for arguments, module in ((['--help'], 'torch'), (['inspect', '--help'], 'transformers')):\n"
        "    main(arguments, standalone_mode=False)\n"
        "    assert module not in sys.modules, module\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(cli.main, ["zip"])
    assert result.exit_code == 2
    assert "No such command 'zip'" in result.stderr


def run_raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    @click.command("inspect")
    def command() -> NoReturn:
        raise error

    monkeypatch.setattr("dynamo_kvtc.cli.inspect.command", command)
    result = CliRunner().invoke(cli.main, ["inspect"])
    return result.exit_code, result.stdout, result.stderr


def test_a_deliberate_error_is_one_line_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run_raising(ConfigError("the value 3\nis wrong;  use 4"), monkeypatch)
    assert (code, out, err) == (2, "", "error: the value 3 is wrong; use 4\n")


def test_control_c_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run_raising(KeyboardInterrupt(), monkeypatch)
    assert (code, err) == (130, "interrupted\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("inspect")
    def command() -> NoReturn:
        raise ZeroDivisionError

    monkeypatch.setattr("dynamo_kvtc.cli.inspect.command", command)
    assert isinstance(CliRunner().invoke(cli.main, ["inspect"]).exception, ZeroDivisionError)
