"""A plan as one HTML page: the answer, the figures, and diagrams where matplotlib is there."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from io import BytesIO

from outrider.planning.advice import Plan
from outrider.planning.forecast import Forecast

__all__ = ["figures_of", "plan_page", "row_of_forecast"]

STYLE = (
    "body{max-width:62em;margin:2em auto;font-family:sans-serif;line-height:1.45}table{border-collapse:collapse}"
    "td,th{padding:.15em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}.answer{font-size:1.3em}"
)
COLUMNS = (
    "drafter", "drafts", "tokens a round", "break-even", "draft ms", "verify ms", "tokens/s", "between ms", "answer s",
    "speed-up", "95 %",
)  # fmt: skip


def row_of_forecast(one: Forecast) -> tuple[str, ...]:
    """One setting in the columns of the table."""
    return (
        one.drafter,
        str(one.drafts),
        f"{one.acceptance_length:.2f}",
        f"{one.break_even:.2f}",
        f"{1e3 * one.draft:.2f}",
        f"{1e3 * one.verify:.2f}",
        f"{one.tokens_per_second:.0f}" if one.tokens_per_second >= 100 else f"{one.tokens_per_second:.1f}",
        f"{1e3 * one.between_tokens:.2f}",
        f"{one.latency:.2f}",
        f"{one.speedup:.2f}",
        f"{one.low:.2f} to {one.high:.2f}" if one.drafts else "-",
    )


def figures_of(plan: Plan) -> list[tuple[str, str]]:
    """Name and value of what is not a setting."""
    rows = [("policy in Outrider", plan.policy)]
    work = plan.workload
    asked = f"{work.rate:g} requests a second" if work.rate else f"{work.concurrency} together"
    rows.append(("workload", f"prompts of {work.prompt} tokens, answers of {work.answer}, {asked}"))
    if plan.memory is not None:
        m = plan.memory
        gb = ", ".join(
            f"{name} {value / 1e9:.2f}"
            for name, value in (
                ("target", m.target),
                ("its cache", m.target_cache),
                ("drafter", m.drafter),
                ("its cache", m.drafter_cache),
                ("auxiliary hidden states", m.auxiliary),
            )
        )
        there = f" of {m.available / 1e9:.0f}" if m.available else ""
        rows.append(("memory, GB", f"{m.total / 1e9:.2f}{there}: {gb}"))
    if plan.cost_per_million is not None:
        plain, advised = plan.cost_per_million
        rows.append(("cost of a million tokens", f"{advised:.3f} (plain decoding: {plain:.3f})"))
    rows.append(("by rows", _series(plan.by_rows)))
    rows.append(("by context", _series(plan.by_context)))
    return rows


def _series(points: Sequence[tuple[int, Forecast]]) -> str:
    return ", ".join(
        f"{n}: {f'{f.drafter} {f.drafts} ({f.speedup:.2f} x)' if f.drafts else 'plain'}" for n, f in points
    )


def plan_page(plan: Plan) -> str:
    """The whole page; it needs no other file."""
    title = f"Plan: {plan.target} on {plan.machine}"
    forecasts = _table(COLUMNS, [row_of_forecast(f) for f in (plan.plain, *plan.forecasts)])
    figures = _table(("", ""), figures_of(plan))
    changed = _table(
        ("if", "speed-up", "best", "speed-up", "other answer"),
        [
            (s.what, f"{s.speedup:.2f}", s.best, f"{s.best_speedup:.2f}", "yes" if s.changes else "")
            for s in plan.sensitivities
        ],
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in plan.notes)
    diagrams = "".join(f'<img alt="diagram" src="data:image/png;base64,{png}">' for png in _diagrams(plan))
    return (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p class='answer'>{html.escape(plan.answer)}</p><ul>{notes}</ul>"
        f"<h2>Settings</h2>{forecasts}<h2>Figures</h2>{figures}<h2>What would change it</h2>{changed}{diagrams}\n"
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _diagrams(plan: Plan) -> list[str]:
    if find_spec("matplotlib") is None:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in plan.curves.items():
        drafts = [f.drafts for f in curve]
        left.plot(drafts, [f.speedup for f in curve], marker="o", markersize=3, label=name)
        left.fill_between(drafts, [f.low for f in curve], [f.high for f in curve], alpha=0.15, linewidth=0)
    left.set(xlabel="drafts a round", ylabel="speed-up", title="by drafts")
    right.plot([n for n, _ in plan.by_rows], [f.speedup for _, f in plan.by_rows], marker="o", markersize=3)
    for n, f in plan.by_rows:
        right.annotate(str(f.drafts) if f.drafts else "plain", (n, f.speedup), fontsize=7, va="bottom")
    right.set(xlabel="rows", ylabel="speed-up", title="best number of drafts by rows", xscale="log")
    for axis in (left, right):
        axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    if plan.curves:
        left.legend(fontsize=7)
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return [base64.b64encode(buffer.getvalue()).decode()]
