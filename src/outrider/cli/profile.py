"""``outrider profile``: what a pass costs on this machine, and whether verifying is nearly free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from outrider.cli.common import Backend, JsonFile, Model, command, human, write_json

if TYPE_CHECKING:
    from outrider.evaluation.pass_times import Profile, Timing

__all__ = ["profile"]

CONTEXTS, NEW_TOKENS, ROWS = (256, 1024), (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32)
BAR = 40  # characters


@command
def profile(
    model: Model = "embedded",
    shape: Annotated[
        str | None,
        typer.Option("--shape", help="Random weights instead of a model: llama-110m or llama-1b."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", help="float32, bfloat16, int8, int4. May be repeated. Default: all that can run here."),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option("--context", min=0, help="Cached tokens of each row. May be repeated. Default: 256 and 1024."),
    ] = None,
    new_tokens: Annotated[
        list[int] | None,
        typer.Option("--new-tokens", min=1, help="New tokens of a single row. May be repeated. Default: 1 to 64."),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option("--rows", min=1, help="Rows with one new token each. May be repeated. Default: 1 to 32."),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds; each times every kind of pass once.")] = 20,
    greedy: Annotated[
        bool,
        typer.Option("--greedy", help="Passes that find the largest logits and write none, as for greedy text."),
    ] = False,
    backend: Backend = "auto",
    json: JsonFile = None,
) -> None:
    """Measure passes over new tokens, rows and contexts, and keep the cost table for the scheduler.

    A pass over a few tokens has to read the weights and the cache once: the share is how much of the memory bandwidth,
    probed in the same rounds, that reading used. The ratio is the time over that of one row with one new token, the
    median of pairs; speculation pays where it stays near 1. A model that fits the processor's caches can show a share
    above 100 %.

    [bold]Examples[/bold]

    [cyan]outrider profile[/cyan]

    [cyan]outrider profile --shape llama-110m --dtype float32 --dtype int8 --context 256 --json costs.json[/cyan]
    """
    from outrider.engine.cost_tables import keep_costs, machine
    from outrider.evaluation.pass_times import grid, run_profile
    from outrider.models.loading import load_backend

    console = human(json)
    native = load_backend(backend).name == "native"
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("loading", total=1.0)
        result = run_profile(
            model,
            shape=shape,
            dtypes=dtype or (["float32", "bfloat16", "int8", "int4"] if native else ["float32", "bfloat16"]),
            cells=grid(context or CONTEXTS, new_tokens or NEW_TOKENS, rows or ROWS),
            repeats=repeats,
            backend=backend,
            machine=machine(),
            greedy=greedy,
            progress=lambda text, done: shown.update(task, description=text, completed=done),
        )
    figures = result.to_json()
    console.print(_table(result, f"{result.model} on {figures['machine']['cpu']}, {result.backend} backend"))
    console.print(_plot(result.timings), markup=False)
    threads = f"{figures['threads']} {'thread' if figures['threads'] == 1 else 'threads'}"
    console.print(f"\nread bandwidth {figures['bandwidth_gb_s']:.1f} GB/s, {threads}")
    if result.skipped:
        console.print(f"left out, their caches would not fit: {len(result.skipped)} kinds of pass", style="yellow")
    for table in result.tables:
        try:
            path = keep_costs(table)
            kept = f"kept for the scheduler: {path}" if path else "not kept: the scheduler has a table of more passes"
        except OSError as error:
            where = f"{error.filename}: {error.strerror}"
            kept = f"not kept for the scheduler: {where}; XDG_CACHE_HOME may name another folder"
        console.print(kept, style="dim", markup=False, soft_wrap=True)
    write_json(json, figures)


def _table(result: Profile, title: str) -> Table:
    table = Table(title=Text(title))
    for name in ("dtype", "context", "rows", "new tokens", "milliseconds", "ratio", "bandwidth"):
        table.add_column(name, justify="left" if name == "dtype" else "right")
    for before, timing in zip([None, *result.timings], result.timings, strict=False):
        cell = timing.cell
        if before is not None and (before.dtype, before.cell.context) != (timing.dtype, cell.context):
            table.add_section()
        share = "" if timing.bandwidth_share is None else f"{timing.bandwidth_share:.0%}"
        figures = (f"{1e3 * timing.seconds:.2f}", f"{timing.ratio_to_one:.2f}", share)
        table.add_row(timing.dtype, str(cell.context), str(cell.rows), str(cell.new_tokens), *figures)
    return table


def _plot(timings: list[Timing]) -> str:
    """Bars of what checking several tokens costs, over the cost of one, for one row."""
    single = [timing for timing in timings if timing.cell.rows == 1]
    longest = max(timing.ratio_to_one for timing in single)
    lines = ["", "verifying M tokens over decoding one (one row)"]
    for dtype, context in dict.fromkeys((t.dtype, t.cell.context) for t in single):
        lines.append(f"\n{dtype}, context {context}")
        for timing in single:
            if (timing.dtype, timing.cell.context) == (dtype, context):
                bar = "█" * max(1, round(BAR * timing.ratio_to_one / longest))
                lines.append(f"{timing.cell.new_tokens:>5} {bar} {timing.ratio_to_one:.2f}")
    return "\n".join(lines)
