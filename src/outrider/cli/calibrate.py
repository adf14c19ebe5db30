"""``outrider calibrate``: fit a drafter's confidences to the acceptance that is measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from outrider.cli.common import (
    Backend,
    Chat,
    Dtype,
    JsonFile,
    MeasuredDrafts,
    asks_as_chat,
    check_folder,
    check_measurement,
    command,
    human,
    progress_bar,
    say_asked,
    write_json,
)
from outrider.errors import InvalidRequest

if TYPE_CHECKING:
    from outrider.scheduling.calibration import Quality
    from outrider.training.fit_calibration import Bucket

__all__ = ["calibrate"]


@command
def calibrate(
    drafter: Annotated[
        str, typer.Argument(help="A trained drafter's directory or hub id, or ngram, suffix or draft_model.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write; it must not exist.")],
    target: Annotated[str, typer.Option("--target", help="The drafter's target.")] = "embedded",
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompts", help="Held-out prompts or answers, JSON Lines. May be repeated. Default: packaged ones."
        ),
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option("--rule", help="rejection, block, coupled. May be repeated. Default: all.")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option("--temperature", help="May be repeated. Default: 0, 0.7 and 1.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=60, help="Rounds for each rule and temperature.")] = 10_000,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=2, help="New tokens of each answer.")] = 128,
    shift: Annotated[
        bool | None,
        typer.Option(
            "--shift/--no-shift",
            help="Fit a shift beside each temperature. Default: where temperatures alone do not suffice.",
        ),
    ] = None,
    chat: Chat = None,
    draft_tokens: MeasuredDrafts = None,
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    json: JsonFile = None,
) -> None:
    """Fit sequential temperature scaling on held-out prompts, and measure it on others.

    OUT/drafter is the drafter with its calibration.json, which schedulers then use by themselves. The table is about
    the survival at each position (are all drafts up to it accepted?): its expected calibration error over 15 bins of
    equal mass, what chance alone would make of it over as many rounds, Brier score, and area under the curve, before
    and after.

    [bold]Examples[/bold]

    [cyan]outrider calibrate runs/dspark/drafter runs/calibrated --target ./my-model --prompts held_out.jsonl[/cyan]
    """
    from outrider.config import RULES
    from outrider.evaluation.plots import available
    from outrider.evaluation.speedup import default_prompt_files
    from outrider.models.loading import load_tokenizer
    from outrider.training.fit_calibration import Config
    from outrider.training.fit_calibration import calibrate as run

    console = human(json)
    check_folder("OUT", out)
    chosen = [known for known in RULES if known in (rule or RULES)]
    if rule and len(chosen) < len(set(rule)):
        raise InvalidRequest(f"--rule must be one of {', '.join(RULES)}, got {', '.join(rule)}")
    check_measurement(draft_tokens, temperature)
    as_chat = asks_as_chat(chat, target, load_tokenizer(target))
    config = Config(
        rules=tuple(chosen),
        temperatures=tuple(temperature or (0.0, 0.7, 1.0)),
        rounds=rounds,
        max_tokens=max_tokens,
        draft_tokens=draft_tokens,
        shift=shift,
        chat=as_chat,
    )
    with progress_bar(console) as progress:
        report = run(
            config,
            drafter,
            prompts or default_prompt_files(as_chat),
            out,
            target,
            dtype=dtype,
            backend=backend,
            progress=progress,
        )
    say_asked(chat, as_chat)
    for bucket in report.buckets:
        console.print(_table(bucket))
    console.print(f"{out / 'drafter'}: calibrated", style="green", markup=False)
    if not available():
        console.print("no diagram was drawn: that needs matplotlib", style="dim")
    write_json(json, report.to_json())


def _table(bucket: Bucket) -> Table:
    table = Table(title=f"{bucket.title} (held and ECE in %)", box=SIMPLE_HEAD, padding=0)
    for name in ("at", "rounds", "held", "ECE", "after", "chance", "Brier", "after", "AUC", "after", "T", "b"):
        table.add_column(name, justify="right", no_wrap=True)
    scaling = bucket.scaling
    for j, (before, after) in enumerate(zip(bucket.before, bucket.after, strict=True)):
        fitted = f"{scaling.temperatures[j]:.2f}", f"{scaling.shifts[j]:.2f}"
        table.add_row(str(j + 1), *_row(before, after), *fitted)
    table.add_section()
    table.add_row("all", *_row(bucket.pooled_before, bucket.pooled_after))
    return table


def _row(before: Quality, after: Quality) -> list[str]:
    area = ["-" if q.auc is None else f"{q.auc:.2f}" for q in (before, after)]
    shares = [f"{100 * share:.1f}" for share in (after.observed, before.ece, after.ece, after.ece_of_chance)]
    return [str(after.rounds), *shares, f"{before.brier:.3f}", f"{after.brier:.3f}", *area]
