"""``outrider doctor``: what a drafter's checkpoint is, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from outrider.cli.common import Backend, Dtype, JsonFile, command, human, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.evaluation.diagnosis import Report

__all__ = ["doctor"]


@command
def doctor(
    checkpoint: Annotated[str, typer.Argument(help="A trained drafter: a directory or a hub id.")],
    target: Annotated[
        str | None, typer.Option("--target", help="Its target: drafts are measured on the target's own text.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="JSON Lines with `turns` (text) or `ids`. Default: packaged ones.")
    ] = None,
    target_layer: Annotated[
        list[int] | None,
        typer.Option(
            "--target-layer",
            help="An auxiliary layer of the target, from 0, of a file that names none. Repeat it for each.",
        ),
    ] = None,
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    json: JsonFile = None,
) -> None:
    """Say what a drafter's checkpoint is, what it expects, and what is missing or suspicious in it.

    With a target, every reading of the file that people confuse (layers off by one, both anchor layouts, other mask
    tokens, the target's rotary positions) drafts along the target's text, and the one that works is named. Exit code 1
    where something is wrong.

    [bold]Examples[/bold]

    [cyan]outrider doctor deepseek-ai/dspark_qwen3_4b_block7[/cyan]

    [cyan]outrider doctor my-drafter --target Qwen/Qwen3-4B --json -[/cyan]
    """
    from outrider.engine.loader import suggesting
    from outrider.evaluation.diagnosis import examine
    from outrider.evaluation.replay import sample_prompts
    from outrider.models.loading import load_backend, load_target, model_config
    from outrider.models.locations import EMBEDDED, SMOLLM2, drafter_location, resolve_model

    console = human(json)
    checkpoint = drafter_location(checkpoint, target)
    layers = tuple(target_layer) if target_layer else None
    with suggesting(checkpoint, "drafter", EMBEDDED):
        resolve_model(checkpoint)
    if target is None:
        report = examine(checkpoint, target_layers=layers)
    else:
        with suggesting(target, "model", (*EMBEDDED, SMOLLM2)):
            folder = resolve_model(target)
        report = examine(
            checkpoint,
            load_target(target, dtype=dtype, backend=backend),
            target_config=model_config(target),
            prompts=sample_prompts(folder, prompts),
            target_layers=layers,
            backend=load_backend(backend, "float32" if dtype == "auto" else dtype),
        )
    _show(console, checkpoint, report)
    write_json(json, {"checkpoint": checkpoint, **report.to_json()})
    if not report.healthy:
        raise typer.Exit(1)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not said" if value is None else str(value)


def _show(console: Console, name: str, report: Report) -> None:
    facts = report.to_json()
    for title, values in (("is", facts["is"]), ("expects", facts["expects"])):
        if values:
            table = Table(title=f"{name} {title}", show_header=False)
            for key, value in values.items():
                table.add_row(key, _words(value))
            console.print(table)
    if facts["measured"]:
        table = Table(title=f"tokens a round on {report.prompts}")
        for column in ("reading", "greedy", "temperature 1"):
            table.add_column(column, justify="left" if column == "reading" else "right")
        for row in facts["measured"]:
            style = "bold green" if row["reading"] == facts["works"] else None
            lengths = (f"{row[key]:.2f}" for key in ("greedy_acceptance_length", "expected_acceptance_length"))
            table.add_row(row["reading"], *lengths, style=style)
        console.print(table)
    for finding in report.findings:
        colour = "red" if finding.level == "fault" else "yellow"
        console.print(
            f"{finding.level} ({finding.about}): {finding.message}", style=colour, markup=False, soft_wrap=True
        )
    if report.healthy:
        console.print("healthy" + (f": works {report.best.reading}" if report.best else ""), style="green")
