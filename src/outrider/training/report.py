"""The report of a training run: curves as a picture, and an HTML page with the main figures."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outrider.evaluation import plots
from outrider.files import read_json_lines

__all__ = ["read_log", "write_report"]

CURVES = ("loss", "total_variation", "cross_entropy", "soft_cross_entropy", "confidence")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a trainer's log."""
    return [line for _, line in read_json_lines(path)]


def write_report(
    lines: Sequence[Mapping[str, Any]], out: Path, config: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write ``report.html``, and ``report.png`` where matplotlib is installed. ``lines``: see ``read_log``."""
    picture = out / "report.png"
    if plots.available():
        _plot(lines, picture)
    seconds, tokens = sum(line["seconds"] for line in lines), sum(line["tokens"] for line in lines)
    evaluated = [line for line in lines if "acceptance_length" in line]
    last: Mapping[str, Any] = evaluated[-1] if evaluated else {}
    rows = {
        "steps": len(lines),
        "texts": facts.get("texts"),
        "tokens seen": f"{tokens:,}",
        "time": f"{seconds / 60:.1f} minutes, {tokens / max(seconds, 1e-9):,.0f} tokens/s",
        "last loss": f"{lines[-1]['loss']:.4f}",
        "acceptance length on held-out prompts": last.get("acceptance_length", "not measured"),
        "by domain": ", ".join(f"{k} {v}" for k, v in last.get("acceptance_lengths", {}).items()),
        "options": json.dumps(config),
    }
    table = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    image = ""
    if picture.exists():
        encoded = base64.b64encode(picture.read_bytes()).decode()
        image = f'<img alt="curves" style="max-width:100%" src="data:image/png;base64,{encoded}">'
    (out / "report.html").write_text(
        "<!doctype html><meta charset=utf-8><title>Training report</title>"
        "<style>body{font:15px sans-serif;max-width:60em;margin:2em auto}th{text-align:left;vertical-align:top;"
        f"padding-right:1em}}</style><h1>Training report</h1><table>{table}</table>{image}\n",
        encoding="utf-8",
    )


def _plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = np.array([line["step"] for line in lines])
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for name in CURVES:
        if name in lines[0]:
            values = np.array([line[name] for line in lines])
            width = min(20, len(values))
            left.plot(steps[width - 1 :], np.convolve(values, np.ones(width) / width, "valid"), label=name)
    left.set(xlabel="step", ylabel="mean over drafts", yscale="log", title="loss")
    left.legend(fontsize="small")
    middle.plot(steps, [line["acceptance"] for line in lines], linewidth=0.6)
    middle.set(xlabel="step", ylabel="1 - TV", title="acceptance per draft, training texts")
    evaluated = [line for line in lines if "acceptance_length" in line]
    at = [line["step"] for line in evaluated]
    right.plot(at, [line["acceptance_length"] for line in evaluated], "k.-", label="mean")
    for domain in evaluated[-1]["acceptance_lengths"] if evaluated else ():
        right.plot(at, [line["acceptance_lengths"][domain] for line in evaluated], ".-", alpha=0.6, label=domain)
    right.set(xlabel="step", ylabel="tokens per round", title="acceptance length, held-out prompts")
    if evaluated:
        right.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
