"""``kvtc demo``."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from dynamo_kvtc.cli.phases import PhaseBars
from dynamo_kvtc.demo.report import check_picture, picture, tables, to_json
from dynamo_kvtc.demo.run import DemoConfig, run, settings
from dynamo_kvtc.errors import ConfigError


@click.command("demo")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True, metavar="FOLDER",
              help="Where artifact, demo.json and demo.png go.")  # fmt: skip
@click.option("--model", default=DemoConfig.model, show_default=True, help="As in `kvtc calibrate`; a chat model.")
@click.option("--tokens", default=DemoConfig.tokens, show_default=True, help="Calibration tokens.")
@click.option("--context", default=DemoConfig.length, show_default=True, help="Tokens of a calibration sequence.")
@click.option("--groups", default=DemoConfig.groups, show_default=True, help="Layer groups.")
@click.option("--ratio", default=DemoConfig.ratio, show_default=True, help="Target ratio of coded tokens.")
@click.option("--turns", default=DemoConfig.turns, show_default=True, help="Questions asked.")
@click.option("--document-tokens", default=DemoConfig.document_tokens, show_default=True)
@click.option("--answer-tokens", default=DemoConfig.answer_tokens, show_default=True, help="Per answer at most.")
@click.option("--device", default=DemoConfig.device, show_default=True)
@click.option("--seed", default=DemoConfig.seed, show_default=True)
def command(
    out: Path, model: str, tokens: int, context: int, groups: int, ratio: float, turns: int, document_tokens: int,
    answer_tokens: int, device: str, seed: int,
) -> None:  # fmt: skip
    """Calibrate on a small model, then hold a conversation three ways: recompute, raw cache, KVTC.

    An artifact that is already in the folder is used again.
    """
    check_picture()
    config = DemoConfig(
        out=out, model=model, tokens=tokens, length=context, groups=groups, ratio=ratio, turns=turns,
        document_tokens=document_tokens, answer_tokens=answer_tokens, seed=seed, device=device,
    )  # fmt: skip
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
            f"{artifact['calibration_tokens']} calibration tokens, few on purpose\n"
            + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
        )
    )
    # JSON first: the numbers must not be lost to a picture that cannot be drawn.
    json_path, png_path = out / "demo.json", out / "demo.png"
    try:
        json_path.write_text(to_json(result.turns, facts), encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"{json_path} cannot be written: {exc.strerror}") from exc
    picture(result.turns, png_path)
    console.print(Text(f"written: {json_path}, {png_path}"))
