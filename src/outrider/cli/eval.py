"""``outrider eval``: how good drafters are, side by side on the same prompts."""

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
    FailFast,
    JsonFile,
    MeasuredDrafts,
    add_columns,
    asks_as_chat,
    check_folder,
    check_measurement,
    command,
    human,
    progress_bar,
    report_failed,
    say_asked,
    write_json,
)
from outrider.errors import InvalidRequest

if TYPE_CHECKING:
    from outrider.evaluation.comparison import Evaluation
    from outrider.evaluation.intervals import Estimate

__all__ = ["evaluate"]

THRESHOLDS = (0.2, 0.4, 0.6, 0.8)
MACRO = "macro average"
POSITIONS = 9  # columns that fit beside the words in a terminal of 80


@command
def evaluate(
    drafter: Annotated[
        list[str], typer.Option("--drafter", help="A name or a directory. May be repeated, to compare them.")
    ],
    target: Annotated[
        str, typer.Option("--target", help="A model directory, a GGUF file, a hub id, or 'embedded'.")
    ] = "embedded",
    prompts: Annotated[
        list[Path] | None,
        typer.Option("--prompts", help="A prompt set: JSON Lines. May be repeated. Default: packaged sets."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Prompts of each set. Default: all.")] = None,
    temperature: Annotated[
        list[float] | None, typer.Option("--temperature", help="May be repeated. Default: 0 and 1.")
    ] = None,
    rule: Annotated[str, typer.Option("--rule", help="rejection, block or coupled.")] = "rejection",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=2, help="New tokens of each answer.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Answers to each prompt, by other seeds.")] = 1,
    threshold: Annotated[
        list[float] | None,
        typer.Option("--threshold", help="Cut drafts under this confidence. May be repeated. Default: 0.2 to 0.8."),
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep/--no-sweep", help="Try the thresholds.")] = True,
    chat: Chat = None,
    fail_fast: FailFast = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampled texts.")] = 1,
    draft_tokens: MeasuredDrafts = None,
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A directory for results and diagrams; an interrupted run goes on from there."),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Compare drafters: acceptance length, acceptance at each position, and tokens a second against plain decoding.

    Prompts are answered plainly and with each drafter in turns, every time from a cold start; a text ends at its
    end-of-text token. `accept` counts the bonus or recovered token of each round, `drafts` does not; `rate` is accepted
    over verified drafts. `all` is the average over prompt sets. Intervals are 95 %, by resampling prompts; differences
    are between drafters on the same prompts. With --out: evaluation.json and diagrams. Prompts that cannot be answered
    are left out and listed under `errors` in the JSON, and the exit code is then 3.

    [bold]Examples[/bold]

    [cyan]outrider eval --drafter ngram --drafter suffix --limit 8[/cyan]

    [cyan]outrider eval --target ./my-model --drafter runs/dspark/drafter --drafter runs/dflash/drafter --temperature 1
    --draft-tokens 7 --prompts gsm8k.jsonl --prompts humaneval.jsonl --out study[/cyan]
    """
    from outrider.config import RULES
    from outrider.engine.cost_tables import machine
    from outrider.errors import closest
    from outrider.evaluation.drafter_quality import Config
    from outrider.evaluation.drafter_quality import evaluate as run
    from outrider.evaluation.plots import available
    from outrider.evaluation.recording import FailedPrompt
    from outrider.evaluation.speedup import default_prompt_files
    from outrider.models.loading import load_tokenizer

    console = human(json)
    if out is not None:
        check_folder("--out", out)
    if rule not in RULES:
        raise InvalidRequest(f"--rule must be one of {', '.join(RULES)}, got {rule!r}{closest(rule, RULES)}")
    check_measurement(draft_tokens, temperature)
    wrong = [value for value in threshold or () if not 0 <= value <= 1]
    if wrong:
        raise InvalidRequest(f"--threshold must be between 0 and 1, got {wrong[0]:g}")
    as_chat = asks_as_chat(chat, target, load_tokenizer(target))
    config = Config(
        temperatures=tuple(dict.fromkeys(temperature or (0.0, 1.0))),
        rule=rule,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        draft_tokens=draft_tokens,
        limit=limit,
        repeats=repeats,
        thresholds=tuple(sorted(set(threshold or THRESHOLDS))) if sweep else (),
        chat=as_chat,
        seed=seed,
    )
    with progress_bar(console) as progress:
        found = run(
            config,
            drafter,
            prompts or default_prompt_files(as_chat),
            target,
            out,
            dtype=dtype,
            backend=backend,
            machine=machine(),
            fail_fast=fail_fast,
            progress=progress,
        )
    say_asked(chat, as_chat)
    console.print(_acceptance(found))
    console.print(*_positions(found), sep="\n")
    if found.differences:
        console.print(_differences(found))
    if found.sweep:
        console.print(_sweep(found))
    if found.confidences:
        console.print(_confidences(found))
    if out is not None:
        what = "evaluation.json and diagrams" if available() else "evaluation.json; diagrams need matplotlib"
        console.print(f"{out}: {what}", style="dim", markup=False)
    write_json(json, found.to_json())
    report_failed([FailedPrompt(**error) for error in found.errors], found.facts["prompts"])


def _table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, title_justify="left")
    add_columns(table, words, numbers)
    return table


def _domain(name: str) -> str:
    return "all" if name == MACRO else name


def _range(one: Estimate) -> str:
    return "-" if one.low is None or one.high is None else f"{one.low:.2f}-{one.high:.2f}"


def _acceptance(found: Evaluation) -> Table:
    numbers = ("temp", "accept", "95 %", "drafts", "rate", "tok/s", "x", "95 %")
    table = _table("Acceptance and speed", ("drafter", "prompts"), numbers)
    for row in found.rows:
        speed = row.tokens_per_second.value
        table.add_row(
            row.drafter,
            _domain(row.domain),
            f"{row.temperature:g}",
            str(row.acceptance_length),
            _range(row.acceptance_length),
            str(row.without_bonus),
            str(row.acceptance_rate),
            "-" if speed is None else f"{speed:.0f}",
            str(row.speedup),
            _range(row.speedup),
        )
    return table


def _positions(found: Evaluation) -> list[Table]:
    """Acceptance at each position, in tables of at most ``POSITIONS`` columns."""
    depth = max(len(row.conditional) for row in found.rows)
    tables = []
    for start in range(0, depth, POSITIONS):
        shown = range(start, min(start + POSITIONS, depth))
        table = _table(
            "Drafts accepted at each position in %, where those before were (and all up to it)",
            ("drafter", "prompts"),
            ("temp", *(str(j + 1) for j in shown)),
        )
        for row in found.rows:
            for name, shares in ((row.drafter, row.conditional), ("  all", row.cumulative)):
                values = [shares[j].value if j < len(shares) else None for j in shown]
                percent = ["-" if value is None else f"{100 * value:.0f}" for value in values]
                table.add_row(name, _domain(row.domain), f"{row.temperature:g}", *percent)
        tables.append(table)
    return tables


def _differences(found: Evaluation) -> Table:
    table = _table("Differences of acceptance length", ("drafter", "less", "prompts"), ("temp", "difference", "95 %"))
    for one in found.differences:
        length = one.acceptance_length
        interval = "-" if length.low is None else f"{length.low:+.2f} to {length.high:+.2f}"
        style = "bold" if length.excludes_zero else "dim"
        value = "-" if length.value is None else f"{length.value:+.2f}"
        table.add_row(one.drafter, one.other, _domain(one.domain), f"{one.temperature:g}", value, interval, style=style)
    return table


def _sweep(found: Evaluation) -> Table:
    numbers = ("temp", "threshold", "accept", "rate", "verified", "x", "95 %")
    table = _table("Drafts cut at the first confidence under a threshold", ("drafter",), numbers)
    for one in found.sweep:
        rates = str(one.acceptance_rate), str(one.verify_rate)
        figures = f"{one.threshold:g}", str(one.acceptance_length), *rates, str(one.speedup), _range(one.speedup)
        table.add_row(one.drafter, f"{one.temperature:g}", *figures)
    return table


def _confidences(found: Evaluation) -> Table:
    numbers = ("temp", "survivals", "ECE %", "by chance", "Brier", "AUC")
    table = _table("Confidence: predicted against measured survival", ("drafter",), numbers)
    for one in found.confidences:
        quality = one.pooled
        errors = f"{100 * quality.ece:.1f}", f"{100 * quality.ece_of_chance:.1f}"
        area = "-" if quality.auc is None else f"{quality.auc:.3f}"
        table.add_row(one.drafter, f"{one.temperature:g}", str(quality.rounds), *errors, f"{quality.brier:.3f}", area)
    return table
