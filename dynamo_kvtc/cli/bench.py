"""`kvtc bench`: speed, measured after the result was proven right."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
import torch
from rich.console import Console

from dynamo_kvtc.bench.shapes import SHAPES, shape_of
from dynamo_kvtc.calibrate.collect import default_groups


@click.group("bench")
def command() -> None:
    """Measure speed on this machine; every case first proves its result."""


@command.command("calibrate")
@click.option("--shape", default="mistral-nemo-12b", show_default=True, help=f"One of {', '.join(SHAPES)}.")
@click.option("--tokens", default=200_000, show_default=True, help="Calibration tokens.")
@click.option("--ratios", default="8,16,32,64", show_default=True, help="Operating points.")
@click.option("--groups", type=int, help="Layer groups.  [default: as `kvtc calibrate` has it]")
@click.option("--device", help="cpu, cuda, cuda:N.  [default: cuda if there is one]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures as JSON.")
def calibrate_command(
    shape: str, tokens: int, ratios: str, groups: int | None, device: str | None, json_path: Path | None
) -> None:
    """Time calibrating a model of this shape on synthetic activations, its forward passes left out."""
    from dynamo_kvtc.bench.calibration import time_calibration

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    result = {"shape": shape} | time_calibration(
        shape_of(shape),
        tokens,
        tuple(float(r) for r in ratios.split(",")),
        groups or default_groups(shape_of(shape), 1),
        where,
    )
    Console().print_json(data=result)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@command.command("codec")
@click.option("--shape", "shapes", multiple=True, default=["llama-3.1-8b"], show_default=True,
              help=f"One of {', '.join(SHAPES)}; may be repeated.")  # fmt: skip
@click.option("--ratio", "ratios", multiple=True, type=float, default=[20.0, 60.0], show_default=True,
              help="Of coded tokens (paper: before DEFLATE); may be repeated.")  # fmt: skip
@click.option("--profile", type=click.Choice(["kvtc", "paper"]), default="kvtc", show_default=True)
@click.option("--tokens", default=8192, show_default=True, help="Tokens of a request.")
@click.option("--requests", default=1, show_default=True, help="Requests coded in one call.")
@click.option("--groups", type=int, help="Layer groups.  [default: kvtc as `kvtc calibrate` has it, paper as few "
              "as nvCOMP can take]")  # fmt: skip
@click.option(
    "--max-rank", type=int, help="Components kept per layer group at most.  [default: kvtc 6144, paper 10000]"
)
@click.option("--lanes", type=int, help="rANS lanes a token.  [default: by their cost]")
@click.option("--chunk", default=None, type=int, metavar="TOKENS", help="Tokens the GPU works on at once.")
@click.option("--prefill/--no-prefill", default=True, show_default=True, help="Time a random-weight model, too.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the rows as JSON.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), metavar="FILE", help="Draw the stages (.png).")
def codec_command(
    shapes: tuple[str, ...], ratios: tuple[float, ...], profile: str, tokens: int, requests: int, groups: int | None,
    max_rank: int | None, lanes: int | None, chunk: int | None, prefill: bool, json_path: Path | None,
    plot_path: Path | None,
) -> None:  # fmt: skip
    """Encode and restore a synthetic cache on this GPU, against moving its raw bytes and computing it again."""
    from dynamo_kvtc.bench.codec import CodecCase, run
    from dynamo_kvtc.bench.report import plot, stage_table, table
    from dynamo_kvtc.codec.paged import PagedLimits

    limits = None if chunk is None else PagedLimits(encode_tokens=chunk, decode_tokens=chunk)
    rows = []
    for shape in shapes:
        case = CodecCase(
            shape, ratios, tokens, requests, profile, groups, max_rank, lanes, prefill=prefill, limits=limits,
        )  # fmt: skip
        rows += run(case, lambda told: click.echo(told, err=True))
    console = Console()
    console.print(table(rows))
    for row in rows:
        console.print(stage_table(row))
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if plot_path is not None:
        plot(rows, plot_path)


@command.command("entropy")
@click.option("--coder", "coders", multiple=True, metavar="NAME",
              help="zlib, deflate, gdeflate or ans; may be repeated.  [default: all on a GPU, else zlib]")  # fmt: skip
@click.option("--shape", default="smollm2-135m", show_default=True, help=f"One of {', '.join(SHAPES)}.")
@click.option("--ratio", default=16.0, show_default=True, help="Of coded tokens, before the coder.")
@click.option("--tokens", default=1024, show_default=True, help="Coded tokens.")
@click.option("--groups", default=10, show_default=True, help="Layer groups; the first one's bytes are coded.")
@click.option("--device", help="cpu, cuda, cuda:N.  [default: cuda if there is one]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures as JSON.")
def entropy_command(
    coders: tuple[str, ...], shape: str, ratio: float, tokens: int, groups: int, device: str | None,
    json_path: Path | None,
) -> None:  # fmt: skip
    """Coders that profile paper's bytes could go through, and what one would save on exact tokens (on a GPU)."""
    from dynamo_kvtc.bench.entropy import CODERS, EntropyCase, run

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = coders or (tuple(CODERS) if where.startswith("cuda") else ("zlib",))
    result = run(EntropyCase(given, shape, ratio, tokens, groups, where), lambda told: click.echo(told, err=True))
    Console().print_json(data=result)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@command.command("events")
@click.option("--server", metavar="URL", help="nats://host:4222.  [default: a nats-server started for this]")
@click.option("--events", default=100_000, show_default=True, type=click.IntRange(1, 5_000_000))
@click.option("--blocks", default=1_000_000, show_default=True, help="In the index.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures as JSON.")
def events_command(server: str | None, events: int, blocks: int, json_path: Path | None) -> None:
    """Events a second and until they are seen, between two processes; the index against a dict of sets."""
    from contextlib import ExitStack

    from dynamo_kvtc.bench.events import measure_events, measure_index
    from dynamo_kvtc.events.server import LocalServer

    with ExitStack() as stack:
        url = server or stack.enter_context(LocalServer()).url
        told = {"events": measure_events(url, events)}
    told["index"] = measure_index(blocks)
    Console().print_json(data=told)
    if json_path is not None:
        json_path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


@command.command("store")
@click.option("--engine", "engines", multiple=True, metavar="NAME",
              help="kvtc (the disk tier), sqlite, lmdb, rocksdict or diskcache.  [default: kvtc]")  # fmt: skip
@click.option("--gigabytes", default=1.0, show_default=True, help="Live records; disk needed: 4 times as much.")
@click.option("--folder", default=".", show_default=True, type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="On the disk to be measured.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the rows as JSON.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the README's table.")
def store_command(
    engines: tuple[str, ...], gigabytes: float, folder: Path, json_path: Path | None, as_markdown: bool
) -> None:
    """The stores: host tier against copying, disk tier and its rivals against a plain file (rates over its rates)."""
    from dynamo_kvtc.bench import store, store_report

    host = store.measure_host(256 << 20)
    rows = []
    for engine in engines or ("kvtc",):
        click.echo(f"{engine} ...", err=True)
        rows.append(store.measure(engine, int(gigabytes * 1e9), folder))
    told = {"host": host, "rows": [asdict(row) for row in rows]}
    if as_markdown:
        click.echo(store_report.markdown(rows), nl=False)
    else:
        Console().print(store_report.table(rows))
        Console().print_json(data=told)
    if json_path is not None:
        json_path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


@command.command("pull")
@click.option("--plane", "planes", multiple=True, metavar="NAME", help="tcp, nats or nixl.  [default: tcp and nats]")
@click.option("--record-kb", "sizes", multiple=True, type=float, default=[5.0, 20.0, 100.0], show_default=True,
              help="Of a record (16 tokens at 20x have 5 to 100); may be repeated.")  # fmt: skip
@click.option("--megabytes", default=32, show_default=True, help="Of records pulled at once.")
@click.option("--groups", default=4, show_default=True, help="Layer groups of a record.")
@click.option("--rounds", default=5, show_default=True, help="Of which the median counts.")
@click.option("--nats-url", metavar="URL", help="A server that runs.  [default: one of its own]")
@click.option("--shaped-gbit", type=float, help="Put the holder behind a link of this rate (Linux, root).")
@click.option("--link-gbit", "gbits", multiple=True, type=float, default=[1.0, 10.0, 100.0], show_default=True,
              help="Links to do the sums for; may be repeated.")  # fmt: skip
@click.option("--delay-ms", default=1.0, show_default=True, help="Of those links, one way.")
@click.option("--codec", "codec_path", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
              help="What `bench codec --json` wrote: the bytes and the decoder's stages of those sums.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures as JSON.")
def pull_command(
    planes: tuple[str, ...], sizes: tuple[float, ...], megabytes: int, groups: int, rounds: int, nats_url: str | None,
    shaped_gbit: float | None, gbits: tuple[float, ...], delay_ms: float, codec_path: Path | None,
    json_path: Path | None,
) -> None:  # fmt: skip
    """Pull records from another process over each plane, against a plain TCP copy of the same bytes."""
    from dynamo_kvtc.bench import pull, pull_report

    console, rows, linked = Console(), [], []
    for size in sizes:
        case = pull.PullCase(
            planes or ("tcp", "nats"), int(1000 * size), megabytes, groups, rounds, nats_url, shaped_gbit
        )
        rows += pull.measure(case, lambda told: click.echo(told, err=True))
    console.print(pull_report.table(rows))
    if codec_path is not None:
        apart = [row for row in rows if not row.whole]
        best = {row.plane: max(r.mb_s for r in apart if r.plane == row.plane) for row in apart}
        most = {"the link alone": None, **{f"{name}, as measured here": 1e6 * rate for name, rate in best.items()}}
        for codec in json.loads(codec_path.read_text(encoding="utf-8")):
            some = pull.links(codec, gbits, delay_ms, most)
            linked += [{"shape": codec["shape"], "tokens": codec["tokens"], "ratio": codec["ratio"]} | s for s in some]
            title = (
                f"{codec['shape']}, {codec['tokens']} tokens at {codec['ratio']:g}x, {delay_ms:g} ms away: ms, by sums"
            )
            console.print(pull_report.link_table(some, title))
    if json_path is not None:
        json_path.write_text(json.dumps(pull.as_json(rows, linked), indent=1) + "\n", encoding="utf-8")


@command.command("table")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def table_command(files: tuple[Path, ...]) -> None:
    """Markdown of what `bench codec --json` wrote: the README's performance table."""
    from dynamo_kvtc.bench.report import markdown

    click.echo(markdown([row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]), nl=False)
