"""Rate against quality as a picture. The one door to matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dynamo_kvtc.errors import ConfigError, MissingDependencyError

Row = dict[str, Any]

SUFFIXES = (".png", ".svg", ".pdf")
_PANEL_INCHES = (5.6, 4.6)
# Okabe & Ito's palette, told apart by colour-blind readers; a shape per series for print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")


def check_plot(path: Path) -> None:
    """Raises what ``plot`` would, before there is anything to draw: ConfigError (ending), MissingDependencyError."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {path}: the ending must be one of {', '.join(SUFFIXES)}")
    _matplotlib("figure")


def plot(rows: Sequence[Row], path: Path) -> None:
    """A panel per text: KL over ratio_coded, both logarithmic; a line per family of operating points, a mark per peer.

    rows: as ``report.row`` makes them. A row without a positive KL (raw) has no place on a logarithmic axis and is
    left out. Raises ConfigError if nothing is left or the file cannot be written, MissingDependencyError.
    """
    check_plot(path)
    drawable = [r for r in rows if (r["kl"] or 0) > 0 and (r["ratio_coded"] or 0) > 0]
    if not drawable:
        raise ConfigError("--plot: no codec has a KL above 0, so there is nothing to draw; add one beside raw")
    sources = list(dict.fromkeys(r["data"] for r in drawable))
    families = list(dict.fromkeys(family(r["codec"]) for r in drawable))
    ticker = _matplotlib("ticker")
    width, height = _PANEL_INCHES
    figure = _matplotlib("figure").Figure(figsize=(width * len(sources), height), layout="constrained")
    panels = figure.subplots(1, len(sources), sharex=True, sharey=True, squeeze=False)[0]
    for panel, source in zip(panels, sources, strict=True):
        for i, name in enumerate(families):
            points = sorted(
                (r["ratio_coded"], r["kl"], label(r["codec"]))
                for r in drawable
                if r["data"] == source and family(r["codec"]) == name
            )
            if not points:
                continue
            colour, mark = _COLOURS[i % len(_COLOURS)], _MARKS[i % len(_MARKS)]
            panel.plot([p[0] for p in points], [p[1] for p in points], color=colour, marker=mark, label=name)
            for ratio, kl, text in points:
                where = {"textcoords": "offset points", "xytext": (6, -10)}
                panel.annotate(text, (ratio, kl), fontsize=8, color=colour, **where)
        panel.set(xscale="log", yscale="log", title=Path(source).name)
        panel.set_xlabel("compression of coded tokens, against 16-bit storage")
        # Ratios are read as plain numbers, and 10**1 says less than 20.
        panel.xaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}x"))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.margins(x=0.12, y=0.1)
        panel.grid(True, which="both", alpha=0.25)
    panels[0].set_ylabel("KL to the uncompressed model (nats per token)")
    panels[0].legend(loc="best", frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as exc:
        raise ConfigError(f"--plot {path} cannot be written: {exc.strerror}") from exc


def family(codec: str) -> str:
    """What a codec's points are joined under: its name up to the operating point."""
    return codec.split(":", 1)[0]


def label(codec: str) -> str:
    """A point's label: the operating point, or the peer's name."""
    return codec.rpartition(":")[2]


def _matplotlib(module: str) -> ModuleType:
    try:
        # figure.Figure, not pyplot: nothing global is left behind, and no display is looked for.
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as exc:
        raise MissingDependencyError(
            f"--plot needs the package matplotlib ({exc}); install it with: pip install dynamo-kvtc[model]"
        ) from exc
