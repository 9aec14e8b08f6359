"""``kvtc calibrate``."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from dynamo_kvtc.calibrate.collect import default_groups
from dynamo_kvtc.calibrate.estimate import Estimate, Job, check_memory, estimate, free_bytes, gib, probe
from dynamo_kvtc.calibrate.run import CalibrationConfig, calibrate
from dynamo_kvtc.calibrate.texts import check_tokens, draw_texts, fit_tokens, held_out_sequences, kl_measure
from dynamo_kvtc.cli.phases import PhaseBars
from dynamo_kvtc.codec.artifact import Manifest, save_artifact
from dynamo_kvtc.codec.record import MAX_BLOCK_TOKENS, MAX_GROUPS, MAX_RANKS
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.hf.model import Model, load_model
from dynamo_kvtc.hf.text import text_source
from dynamo_kvtc.types import DTYPES

PAPER_RANK = 10_000
"""Components at most, as the paper keeps them."""
ASK_ABOVE_SECONDS = 600.0
"""An estimate above this is confirmed at a terminal."""


class Numbers(click.ParamType):
    """Comma-separated positive numbers; a recipe may give a list."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
        try:
            return tuple(float(part) for part in parts if str(part).strip())
        except (TypeError, ValueError):
            raise ConfigError(
                f"{param.opts[0] if param else 'list'} {value!r} is not a list of numbers like 16,30,60"
            ) from None


def read_recipe(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Makes a YAML file's values the defaults of the command's options. Raises ConfigError."""
    if value is None:
        return None
    try:
        content = yaml.safe_load(value.read_text(encoding="utf-8")) or {}
    except OSError as exc:
        raise ConfigError(f"recipe {value} cannot be read: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"recipe {value} is not YAML: {exc}") from exc
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {value} is a {type(content).__name__}; it must map option names to values")
    options = {p.opts[0].lstrip("-"): p for p in ctx.command.params if p.name not in ("recipe", "yes", "help")}
    given = {str(name).replace("_", "-"): item for name, item in content.items()}
    if unknown := sorted(set(given) - set(options)):
        raise ConfigError(f"recipe {value}: unknown {', '.join(unknown)}; known are {', '.join(sorted(options))}")
    defaults = {}
    for name, item in given.items():
        many = options[name].multiple if isinstance(options[name], click.Option) else False
        defaults[str(options[name].name)] = [item] if many and not isinstance(item, list) else item
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return value


@click.command("calibrate")
@click.option("--model", required=True, help="'smollm2', a Hugging Face model folder, or a name on the hub.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The artifact to write.")
@click.option("--profile", type=click.Choice(["kvtc", "paper"]), default="kvtc", show_default=True)
@click.option("--groups", type=int,
              help="Layer groups, a transform and a stream each.  [default: paper 1; kvtc 2, or more so that none has "
              "over 16,384 channels]")  # fmt: skip
@click.option("--tokens", default=200_000, show_default=True, help="Calibration tokens.")
@click.option("--ratios", type=Numbers(), default="16,30,60", show_default=True, help="Target ratios of coded tokens.")
@click.option("--kls", type=Numbers(), default="", help="Target KLs, nats per token, e.g. 0.005 (kvtc only).")
@click.option("--data", multiple=True, default=("python",), show_default=True, metavar="SOURCE",
              help="Text: a file, .jsonl, folder, python, datasets:NAME; may be repeated.")  # fmt: skip
@click.option("--tp-size", default=1, show_default=True, help="Tensor-parallel ranks of the engine, a basis each.")
@click.option("--block-tokens", default=16, show_default=True, help="Tokens of an engine block.")
@click.option("--context", default=2048, show_default=True, help="Tokens of a calibration sequence.")
@click.option("--fisher-sequences", type=int, help="Sequences for the Fisher weights.  [default: 64]")
@click.option(
    "--max-rank", type=int, help="Components kept per layer group at most.  [default: kvtc 6144, paper 10000]"
)
@click.option("--kl-sequences", default=8, show_default=True,
              help="Held-out sequences for the expected KL; 0 leaves it out.")  # fmt: skip
@click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE.yaml", is_eager=True, callback=read_recipe,
              help="Defaults for any of these options.")  # fmt: skip
@click.option("--device", help="cpu, cuda, cuda:N.  [default: cuda if there is one]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the cache.  [default: the model's own]")
@click.option("--compute-dtype", type=click.Choice(list(DTYPES)),
              help="Of the arithmetic.  [default: float32 on a CPU, else the cache's]")  # fmt: skip
@click.option("--seed", default=0, show_default=True)
@click.option("--yes", is_flag=True, help="Do not ask before a long run.")
def command(
    model: str, out: Path, profile: str, groups: int | None, tokens: int, ratios: tuple[float, ...],
    kls: tuple[float, ...], data: tuple[str, ...], tp_size: int, block_tokens: int, context: int,
    fisher_sequences: int | None, max_rank: int | None, kl_sequences: int, recipe: Path | None, device: str | None,
    dtype: str | None, compute_dtype: str | None, seed: int, yes: bool,
) -> None:  # fmt: skip
    """Fit the codec to a model: transform, steps and tables, in one artifact file.

    Tells time and memory before it starts. Interrupted, it leaves no file.
    """
    if max_rank is None and profile == "paper":
        max_rank = PAPER_RANK
    optional = {"fisher_sequences": fisher_sequences, "max_rank": max_rank}
    config = CalibrationConfig(
        profile=profile, groups=1 if groups is None else groups, ratios=ratios, kls=kls, tp_size=tp_size,
        block_tokens=block_tokens, seed=seed,
        **{name: value for name, value in optional.items() if value is not None},
    )  # fmt: skip
    check_config(config, kl_sequences)
    check_out(out)
    for source in data:
        text_source(source)

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(model, device, dtype, compute_dtype)
    if groups is None and profile == "kvtc":
        config = replace(config, groups=default_groups(loaded.shape, tp_size))
    texts = draw_texts(loaded, data, tokens, context, max(held_out_sequences(tokens, context), kl_sequences))
    console = Console(stderr=True)
    for warning in check_tokens(fit_tokens(texts), tokens, loaded.shape, config):
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    measured = texts.held_out[:kl_sequences]
    expected = _estimated(loaded, config, context, fit_tokens(texts), len(texts.held_out), len(measured), console)
    if expected.total_seconds > ASK_ABOVE_SECONDS and not yes and sys.stdin.isatty():
        click.confirm("Start?", abort=True, err=True)

    started = time.perf_counter()
    with PhaseBars() as bars:
        manifest, tensors = calibrate(loaded, texts, config, bars, kl_measure(loaded, measured) if measured else None)
        manifest = save_artifact(out, manifest, tensors)
    # Profile paper's bases are named so, kvtc's by their bits.
    bases = (".basis", ".wide", ".narrow")
    basis = sum(t.nbytes for name, t in tensors.items() if name.endswith(bases) and ".point" not in name)
    Console().print(_summary(manifest, out, basis, time.perf_counter() - started))


def check_config(config: CalibrationConfig, kl_sequences: int) -> None:
    """What can be refused before a model is loaded. Raises ConfigError."""
    for name in ("groups", "tp_size", "block_tokens", "fisher_sequences", "max_rank"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be at least 1")
    for name, most in (("groups", MAX_GROUPS), ("tp_size", MAX_RANKS), ("block_tokens", MAX_BLOCK_TOKENS)):
        if getattr(config, name) > most:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(config, name)}; a record holds at most {most}")
    if kl_sequences < 0:
        raise ConfigError(f"--kl-sequences is {kl_sequences}; it must be 0 or more")
    if config.kls and not kl_sequences:
        raise ConfigError("--kls needs held-out text to measure on; give --kl-sequences 1 or more")


def check_out(path: Path) -> None:
    """Raises ConfigError if the artifact could not be written."""
    if path.is_dir():
        raise ConfigError(f"--out {path} is a folder; name a file, e.g. {path / 'model.kvtc.safetensors'}")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"--out {path}: the folder {parent} does not exist; make it first")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"--out {path}: the folder {parent} cannot be written; name another, or mount it writable")


def _estimated(
    model: Model, config: CalibrationConfig, length: int, tokens: int, held_out: int, measured: int, console: Console
) -> Estimate:
    """Prints time and memory. Raises CalibrationError if the memory cannot suffice."""
    job = Job(
        model.shape, config, sum(p.numel() for p in model.module.parameters()), model.module.config.vocab_size, length,
        tokens, held_out * length, measured,
    )  # fmt: skip
    device = model.device
    expected = estimate(job, probe(device, model.module.dtype), device.type)
    free = free_bytes(device)
    channels = ", ".join(dict.fromkeys(str(part.channels) for part in job.parts))
    console.print(
        f"{model.identity.model_id}: {config.groups} layer groups of {channels} channels"
        f"{f' on each of {config.tp_size} ranks' if config.tp_size > 1 else ''}, {tokens} tokens and "
        f"{held_out * length} held out, on {device}\n"
        f"estimate: {duration(expected.total_seconds)} "
        f"({', '.join(f'{name} {duration(seconds)}' for name, seconds in expected.seconds.items())}); "
        f"{gib(expected.peak_bytes)} of memory{'' if free is None else f', {gib(free)} free'}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    check_memory(job, expected, free, device.type)
    return expected


def duration(seconds: float) -> str:
    """Two figures at most: it is an estimate."""
    if seconds < 1:
        return "<1 s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _summary(manifest: Manifest, out: Path, basis_bytes: int, seconds: float) -> Table:
    table = Table(
        title=f"{out}: {manifest.model.model_id}, profile {manifest.profile}, {len(manifest.groups)} layer groups",
        caption=f"{out.stat().st_size / 1e6:.1f} MB, {basis_bytes / 1e6:.1f} MB of it basis; digest "
        f"{manifest.digest[:16]}; {duration(seconds)}. ratio: of coded tokens, on text kept out of the fit"
        + ("; before DEFLATE" if manifest.profile == "paper" else "; KL: nats per token"),
        title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    table.add_column("operating point")
    for heading in ("step", "expected ratio", "expected KL"):
        table.add_column(heading, justify="right")
    for point in manifest.points:
        table.add_row(
            point.name, _show(point.step or None, ".4g"), _show(point.expected_ratio, ".1f"),
            _show(point.expected_kl, ".5f"),
        )  # fmt: skip
    return table


def _show(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
