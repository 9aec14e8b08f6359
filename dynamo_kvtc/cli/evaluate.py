"""``kvtc eval``."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.evaluate.plot import plot
from dynamo_kvtc.evaluate.report import Row, tables, to_json
from dynamo_kvtc.evaluate.run import EvalConfig, run
from dynamo_kvtc.types import DTYPES

CODECS = "raw,fp8,nvfp4,kivi2"


@click.command("eval")
@click.option("--model", required=True, help="'smollm2', a Hugging Face model folder, or a name on the hub.")
@click.option("--artifact", "artifacts", multiple=True, metavar="FILE", help="Calibration artifact; may be repeated.")
@click.option("--data", multiple=True, required=True, metavar="SOURCE", help="Held-out text; may be repeated.")
@click.option(
    "--codecs", default=CODECS, show_default=True, metavar="LIST",
    help="raw, fp8, nvfp4, kivi2, paper:RATIO, kvtc:RATIO, kvtc:kl=NATS; kvtc@FILESTEM:... chooses an artifact.",
)  # fmt: skip
@click.option("--sequences", default=16, show_default=True, help="Sequences per text.")
@click.option("--context", default=2048, show_default=True, help="Tokens cached and coded.")
@click.option("--continuation", default=512, show_default=True, help="Tokens teacher-forced after them.")
@click.option("--sinks", default=4, show_default=True, help="First tokens that stay exact.")
@click.option("--window", default=128, show_default=True, help="Last tokens of the context that stay exact.")
@click.option("--tasks", default="", metavar="LIST", help="lambada:FILE (JSON lines), passkey. Sinks exact, no window.")
@click.option("--task-examples", type=int, help="Examples per task.  [default: all of lambada, 27 pass keys]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the rows as JSON.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), metavar="FILE", help="Draw KL over ratio (.png).")
@click.option("--device", help="cpu, cuda, cuda:N.  [default: cuda if there is one]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of model and cache.  [default: the model's own]")
@click.option(
    "--compute-dtype", type=click.Choice(list(DTYPES)),
    help="Of the arithmetic. float32 shows differences below 16-bit arithmetic's own noise (about 1e-3 in KL).  "
    "[default: float32 on a CPU, else the model's own]",
)  # fmt: skip
def command(
    model: str, artifacts: tuple[str, ...], data: tuple[str, ...], codecs: str, sequences: int, context: int,
    continuation: int, sinks: int, window: int, tasks: str, task_examples: int | None, json_path: Path | None,
    plot_path: Path | None, device: str | None, dtype: str | None, compute_dtype: str | None,
) -> None:  # fmt: skip
    """Measure what coding a context's cache does to the tokens after it, and the bytes it saves.

    Per text: a context is cached, coded and decoded by each codec, and the continuation is teacher-forced after it.
    KL, perplexity and top-1 agreement are against the uncompressed cache; ratios are against 16 bits a value.
    """
    config = EvalConfig(
        model=model, data=data, codecs=codecs, artifacts=artifacts, sequences=sequences, context=context,
        continuation=continuation, sinks=sinks, window=window, tasks=tasks, task_examples=task_examples,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype=dtype,
        compute_dtype=compute_dtype, json=json_path, plot=plot_path,
    )  # fmt: skip
    rows = _run(config)
    console = Console()
    for table in tables(rows):
        console.print(table)
    # JSON first: the numbers must not be lost to a picture that cannot be drawn.
    if json_path is not None:
        _write(json_path, to_json(rows))
    if plot_path is not None:
        plot(rows, plot_path)


def _run(config: EvalConfig) -> list[Row]:
    columns = (BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking", total=1.0)
        return run(config, lambda what, share: bar.update(task, description=what, completed=share))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"--json {path} cannot be written: {exc.strerror}") from exc
