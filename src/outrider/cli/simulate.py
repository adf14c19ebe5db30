"""``outrider simulate``: the scheduler under any load and cost curve, without the machine."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from outrider.cli.common import JsonFile, add_columns, check_writable, command, human, progress_bar, write_json
from outrider.errors import InvalidRequest

__all__ = ["simulate"]


@command
def simulate(
    costs: Annotated[
        str,
        typer.Option(
            "--costs",
            help="accelerator, cpu-110m, tiles, or a JSON file: a cost table, or points of tokens and seconds.",
        ),
    ] = "accelerator",
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            help="chat, code, maths, hostile, or the probabilities that drafts 1, 2, ... are accepted: 0.8,0.75. "
            "May be repeated: requests are mixed. Default: chat, code and maths.",
        ),
    ] = None,
    confidence: Annotated[
        str, typer.Option("--confidence", help="truth, nothing, or sure: what the drafter says of its drafts.")
    ] = "truth",
    policies: Annotated[
        str,
        typer.Option(
            "--policies",
            help="none, fixed:N, threshold:N (drafts), threshold:0.5 (confidence), throughput, auto; with commas.",
        ),
    ] = "none,fixed:1,fixed:3,fixed:7,throughput",
    concurrency: Annotated[
        str | None, typer.Option("--concurrency", help="Users of closed loops. Default: 1,4,16,64,256.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option("--rate", help="Requests a second of open loops, instead of users: 2,8,32.")
    ] = None,
    burst: Annotated[float, typer.Option("--burst", help="Of an open loop: so many times more, half of the time.")] = 1,
    draft_tokens: Annotated[int, typer.Option("--draft-tokens", min=1, max=64, help="The most drafts of a round.")] = 7,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Mean length of a prompt.")] = 128,
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", min=1, help="Mean length of an answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0: greedy, which leaves the search free.")] = 1.0,
    duration: Annotated[float, typer.Option("--duration", min=1, help="Seconds of virtual time.")] = 60.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")] = 0,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the figures into this file.")] = None,
    json: JsonFile = None,
) -> None:
    """Simulate policies under a load: the scheduler's own code, on a virtual clock.

    Passes take what a cost curve says, drafts are accepted as a profile says. Per policy and load: tokens per second of
    all and of each user, latencies, the acceptance length, and how many drafts were verified per row.

    [bold]Examples[/bold]

    [cyan]outrider simulate[/cyan]

    [cyan]outrider simulate --costs tiles --profile code --policies none,fixed:3,throughput --plot tiles.png[/cyan]

    [cyan]outrider simulate --rate 2,8,32 --burst 4 --duration 600 --json -[/cyan]
    """
    from outrider.evaluation.plots import check_plot, draw_frontier
    from outrider.planning.simulation import Traffic
    from outrider.planning.sweep import read_costs, read_profile, sweep

    console = human(json)
    if plot is not None:
        check_writable("--plot", plot)
        check_plot(plot)
    if rate is not None and concurrency is not None:
        raise InvalidRequest("--rate is an open loop and --concurrency a closed one: give one of them")
    asked = Traffic(1, 0.0, burst, prompt=prompt_tokens, answer=answer_tokens, temperature=temperature)
    if rate is not None:
        rates = _numbers("--rate", rate)
        loads = {f"{value:g}/s": replace(asked, concurrency=0, rate=value) for value in rates}
    else:
        users = _numbers("--concurrency", "1,4,16,64,256" if concurrency is None else concurrency)
        loads = {f"{value:g}": replace(asked, concurrency=int(value)) for value in users}
    with progress_bar(console) as progress:
        rows = sweep(
            read_costs(costs),
            [read_profile(one, draft_tokens) for one in profile or ["chat", "code", "maths"]],
            loads,
            [name.strip() for name in policies.split(",") if name.strip()],
            seconds=duration,
            says=confidence,
            seed=seed,
            progress=progress,
        )
    table = Table(box=SIMPLE_HEAD, padding=0)
    shown = ("tokens_per_second", "per_user_tokens_per_second", "ttft_ms", "itl_p50_ms", "itl_p99_ms")
    counts = ("acceptance_length", "verified_per_row")
    figures = ["tokens/s", "each/s", "first ms", "p50 ms", "p99 ms", "accept", "verified"]
    add_columns(table, [], ["load", "policy", *figures])
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before["traffic"] != row["traffic"]:
            table.add_section()
        values = [f"{row[name]:.1f}" for name in shown] + [f"{row[name]:.2f}" for name in counts]
        table.add_row(row["traffic"], row["policy"], *values)
    console.print(table)
    write_json(json, {"costs": costs, "profiles": profile or ["chat", "code", "maths"], "seed": seed, "rows": rows})
    if plot is not None:
        draw_frontier(rows, plot)
        console.print(f"wrote {plot}", style="dim", markup=False)


def _numbers(option: str, given: str) -> list[float]:
    try:
        values = [float(part) for part in given.split(",")]
        if not all(0 < v < math.inf and (option == "--rate" or v.is_integer()) for v in values):
            raise ValueError
    except ValueError:
        kind = "whole numbers above 0" if option == "--concurrency" else "numbers above 0"
        raise InvalidRequest(f"{option}: expected {kind} separated by commas, got {given!r}") from None
    return values
