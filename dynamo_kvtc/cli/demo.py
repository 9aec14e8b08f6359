"""``kvtc demo``, and ``kvtc demo --engine vllm``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.text import Text

from dynamo_kvtc.cli.phases import PhaseBars
from dynamo_kvtc.demo import engine as engines
from dynamo_kvtc.demo import engine_report
from dynamo_kvtc.demo.engine import EngineDemoConfig
from dynamo_kvtc.demo.report import check_picture, picture, tables, to_json
from dynamo_kvtc.demo.run import DemoConfig, run, settings
from dynamo_kvtc.errors import ConfigError

_SHARED = {"out", "model", "tokens", "length", "groups", "ratio", "answer_tokens", "seed"}
_ALONE = {"turns", "document_tokens", "device"}
_ENGINE = {
    "engine_python", "dtype", "sessions", "session_tokens", "returns", "device_sessions", "host_sessions",
    "disk_sessions",
}  # fmt: skip


@click.command("demo")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True, metavar="FOLDER",
              help="Where artifact, demo.json and demo.png go.")  # fmt: skip
@click.option("--model", default=DemoConfig.model, show_default=True, help="As in `kvtc calibrate`; a chat model.")
@click.option("--tokens", default=DemoConfig.tokens, show_default=True,
              help=f"Calibration tokens ({EngineDemoConfig.tokens} with --engine).")  # fmt: skip
@click.option("--context", "length", default=DemoConfig.length, show_default=True,
              help=f"Tokens of a calibration sequence ({EngineDemoConfig.length} with --engine).")  # fmt: skip
@click.option("--groups", default=DemoConfig.groups, show_default=True,
              help=f"Layer groups ({EngineDemoConfig.groups} with --engine).")  # fmt: skip
@click.option("--ratio", default=DemoConfig.ratio, show_default=True,
              help=f"Target ratio of coded tokens ({EngineDemoConfig.ratio:g} with --engine).")  # fmt: skip
@click.option("--turns", default=DemoConfig.turns, show_default=True, help="Questions asked.")
@click.option("--document-tokens", default=DemoConfig.document_tokens, show_default=True)
@click.option("--answer-tokens", default=DemoConfig.answer_tokens, show_default=True,
              help=f"Per answer at most ({EngineDemoConfig.answer_tokens} with --engine).")  # fmt: skip
@click.option("--device", default=DemoConfig.device, show_default=True)
@click.option("--seed", default=DemoConfig.seed, show_default=True)
@click.option("--engine", type=click.Choice(["vllm"]), help="Show the tier behind a real engine instead.")
@click.option("--engine-python", metavar="PATH", help="With --engine: an interpreter that has it [default: this one].")
@click.option("--dtype", default=EngineDemoConfig.dtype, show_default=True, help="With --engine: of model and cache.")
@click.option("--sessions", default=EngineDemoConfig.sessions, show_default=True, help="With --engine: conversations.")
@click.option("--session-tokens", default=EngineDemoConfig.session_tokens, show_default=True,
              help="With --engine: of a first visit at most.")  # fmt: skip
@click.option("--returns", default=EngineDemoConfig.returns, show_default=True,
              help="With --engine: sessions of each age (new, middle, old) that come back.")  # fmt: skip
@click.option("--device-sessions", default=EngineDemoConfig.device_sessions, show_default=True,
              help="With --engine: sessions that its own cache has room for.")  # fmt: skip
@click.option("--host-sessions", default=EngineDemoConfig.host_sessions, show_default=True,
              help="With --engine: raw sessions that the tier's memory has room for.")  # fmt: skip
@click.option("--disk-sessions", default=EngineDemoConfig.disk_sessions, show_default=True,
              help="With --engine: raw sessions that the tier's disk has room for.")  # fmt: skip
@click.pass_context
def command(ctx: click.Context, engine: str | None, **options: Any) -> None:
    """Calibrate on a small model, then hold a conversation three ways: recompute, raw cache, KVTC.

    With --engine vllm: more conversations than a real engine's cache holds, come back to without a tier, with one of
    raw blocks, and with one of coded blocks in the same bytes. An artifact that is already in the folder is used again.
    """
    check_picture()
    given = {n: x for n, x in options.items() if ctx.get_parameter_source(n) is not ParameterSource.DEFAULT}
    wrong = sorted(set(given) & (_ALONE if engine else _ENGINE))
    if wrong:
        names = ", ".join("--" + name.replace("_", "-") for name in wrong)
        raise ConfigError(f"{names}: {'not' if engine else 'only'} with --engine; see kvtc demo --help")
    if engine:
        _engine(EngineDemoConfig(**{"out": options["out"], **given}))
    else:
        _alone(DemoConfig(**{name: options[name] for name in _SHARED | _ALONE}))


def _alone(config: DemoConfig) -> None:
    with PhaseBars() as bars:
        result = run(config, bars, bars.say)
    facts = settings(result)
    console = Console()
    for table in tables(result.turns, facts):
        console.print(table)
    artifact = facts["artifact"]
    console.print(
        Text(
            f"artifact: {artifact['bytes'] / 1e6:.1f} MB, once per model whatever the number of conversations; "
            f"{artifact['calibration_tokens']} calibration tokens, few on purpose\n" + _times(result.seconds)
        )
    )
    # JSON first: the numbers must not be lost to a picture that cannot be drawn.
    json_path, png_path = _write(config.out, to_json(result.turns, facts), "demo")
    picture(result.turns, png_path)
    console.print(Text(f"written: {json_path}, {png_path}"))


def _engine(config: EngineDemoConfig) -> None:
    with PhaseBars() as bars:
        result = engines.run(config, bars, bars.say)
    console = Console()
    console.print(engine_report.table(result))
    console.print(Text(_times(result.seconds)))
    json_path, png_path = _write(config.out, engine_report.to_json(result), "engine")
    engine_report.picture(result, png_path)
    console.print(Text(f"written: {json_path}, {png_path}"))


def _times(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {time:.0f} s" for name, time in seconds.items())


def _write(out: Path, text: str, name: str) -> tuple[Path, Path]:
    """The JSON written, and where the picture goes."""
    json_path, png_path = out / f"{name}.json", out / f"{name}.png"
    try:
        json_path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"{json_path} cannot be written: {exc.strerror}") from exc
    return json_path, png_path
