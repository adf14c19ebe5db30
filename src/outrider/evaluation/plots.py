"""Diagrams, drawn with matplotlib. Without matplotlib there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.errors import InvalidRequest
from outrider.files import write_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Band",
    "Curve",
    "available",
    "check_plot",
    "draw_frontier",
    "draw_load",
    "draw_positions",
    "draw_reliability",
    "draw_sweep",
]

Curve = tuple[Sequence[float], Sequence[float]]
"""x and y"""
Band = tuple[float, float, float]
"""A value, and the ends of its interval; NaN if missing."""
COLUMNS, PANEL = 3, 3.6  # panels side by side, inches of one


def available() -> bool:
    """Whether diagrams can be drawn."""
    return find_spec("matplotlib") is not None


def draw_reliability(panels: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Panels by title, curves by label: predicted against observed survival; the diagonal is perfect calibration."""
    figure, axes = _panels(len(panels))
    for (title, curves), axis in zip(panels.items(), axes, strict=True):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
        for label, (predicted, observed) in curves.items():
            axis.plot(predicted, observed, marker="o", markersize=3, linewidth=1, label=label)
        axis.set(title=title, xlim=(0, 1), ylim=(0, 1), xlabel="predicted", ylabel="observed", aspect="equal")
        axis.legend(fontsize=7)
    _save(figure, path)


def draw_positions(panels: Mapping[str, Mapping[str, Sequence[Band]]], path: Path) -> None:
    """Panels by title, drafters by name: P(accepted | those before were) at positions 1, 2, ..."""
    figure, axes = _panels(len(panels))
    for (title, curves), axis in zip(panels.items(), axes, strict=True):
        for label, shares in curves.items():
            positions = range(1, len(shares) + 1)
            middle, low, high = (list(values) for values in zip(*shares, strict=True)) if shares else ([], [], [])
            axis.plot(positions, middle, marker="o", markersize=3, linewidth=1, label=label)
            axis.fill_between(positions, low, high, alpha=0.15, linewidth=0)
        axis.set(title=title, ylim=(0, 1), xlabel="position", ylabel="conditional acceptance")
        axis.legend(fontsize=7)
    _save(figure, path)


def draw_sweep(panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], path: Path) -> None:
    """A row of panels by title, drafters by name: over the ``threshold`` their ``acceptance_length``, their
    ``acceptance_rate`` and ``verify_rate`` (dashed), and their ``speedup``."""
    figure, axes = _panels(3 * len(panels))
    for row, (title, drafters) in enumerate(panels.items()):
        lengths, rates, speeds = axes[3 * row : 3 * row + 3]
        for label, points in drafters.items():
            thresholds = points["threshold"]
            (line,) = lengths.plot(thresholds, points["acceptance_length"], marker="o", markersize=3, label=label)
            rates.plot(thresholds, points["acceptance_rate"], color=line.get_color(), label=label)
            rates.plot(thresholds, points["verify_rate"], "--", color=line.get_color())
            speeds.plot(thresholds, points["speedup"], marker="o", markersize=3, label=label)
        lengths.set(title=title, xlabel="threshold", ylabel="acceptance length")
        rates.set(title=title, ylim=(0, 1), xlabel="threshold", ylabel="accepted / verified, -- verified / drafted")
        speeds.set(title=title, xlabel="threshold", ylabel="speed-up over plain decoding")
        for axis in (lengths, rates, speeds):
            axis.legend(fontsize=7)
    _save(figure, path)


def draw_load(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Policies by name over the number of clients: tokens a second of all, of each, and the time to the first token."""
    figure, axes = _panels(3)
    shown = (
        ("tokens_per_second", "tokens/s, all clients"),
        ("per_user_tokens_per_second", "tokens/s of a client"),
        ("ttft_ms", "ms to the first token"),
    )
    for axis, (name, label) in zip(axes, shown, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            mine = sorted((row["concurrency"], row[name]) for row in rows if row["policy"] == policy)
            axis.plot([x for x, _ in mine], [y for _, y in mine], marker="o", markersize=3, label=policy)
        axis.set(xlabel="clients", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    _save(figure, path)


def draw_frontier(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Policies by name: tokens a second of all over those of each user (DSpark's figure 7), and over the load the
    tokens a second and the drafts verified for each row (figure 8)."""
    figure, axes = _panels(3)
    loads = list(dict.fromkeys(row["traffic"] for row in rows))
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == policy]
        total = [row["tokens_per_second"] for row in mine]
        at = [loads.index(row["traffic"]) for row in mine]
        style = {"marker": "o", "markersize": 3, "label": policy}
        axes[0].plot([row["per_user_tokens_per_second"] for row in mine], total, **style)
        axes[1].plot(at, total, **style)
        axes[2].plot(at, [row["verified_per_row"] for row in mine], **style)
    axes[0].set(xlabel="tokens/s of each user", ylabel="tokens/s of all", xscale="log", yscale="log")
    axes[1].set(xlabel="load", ylabel="tokens/s of all", yscale="log")
    axes[2].set(xlabel="load", ylabel="drafts verified per row")
    for axis in axes[1:]:
        axis.set_xticks(range(len(loads)), loads)
    for axis in axes:
        axis.legend(fontsize=7)
    _save(figure, path)


def _panels(count: int, columns: int = COLUMNS) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(PANEL * columns, PANEL * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def check_plot(path: Path) -> None:
    """Raises InvalidRequest where matplotlib is missing or does not write files of this ending."""
    if not available():
        raise InvalidRequest("--plot needs matplotlib; pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:  # without an ending it is a PNG
        raise InvalidRequest(
            f"--plot: files ending in {path.suffix} cannot be drawn; expected {', '.join(sorted(known))}"
        )


def _save(figure: Figure, path: Path) -> None:
    """Raises InvalidRequest where the file cannot be written; an earlier one then stays as it was."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=150, format=path.suffix[1:] or "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_result(path, drawn.getvalue())
