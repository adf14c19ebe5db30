"""``outrider bench``: is it faster here? Paired with plain decoding, in turns."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from outrider.cli.bench_load import DURATION, POLICIES, LoadOptions, bench_load
from outrider.cli.common import (
    Backend,
    Chat,
    DraftTokens,
    Dtype,
    FailFast,
    JsonFile,
    Model,
    add_columns,
    asks_as_chat,
    command,
    human,
    load_target_model,
    report_failed,
    say_asked,
    say_loaded,
    write_json,
)
from outrider.config import SamplingParams
from outrider.errors import InvalidRequest

__all__ = ["bench"]


@command
def bench(
    model: Model = "embedded",
    drafter: Annotated[
        list[str] | None,
        typer.Option("--drafter", help="May be repeated. Without it: every drafter that can run with this model."),
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompts",
            help="A prompt set: JSON Lines with `text`, `turns` or `prompt` (ids). May be repeated. "
            "Default: packaged questions for a chat model, else packaged beginnings of documents.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts of each set.")] = 8,
    temperature: Annotated[
        list[float] | None, typer.Option("--temperature", help="May be repeated. Default: 0 and 1.")
    ] = None,
    concurrency: Annotated[
        str, typer.Option("--concurrency", help="Prompts answered together; of a load, clients: 1,4,16.")
    ] = "1",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=2, help="New tokens of each answer.")] = 96,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Times each pair is measured.")] = 3,
    chat: Chat = None,
    fail_fast: FailFast = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampled texts; both sides write the same.")] = 1,
    draft_tokens: DraftTokens = None,
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    load: Annotated[
        str | None,
        typer.Option("--load", help="closed or open: clients over HTTP instead; each policy has a server of its own."),
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="The load goes to this OpenAI-compatible server, whatever it is.")
    ] = None,
    policies: Annotated[
        str,
        typer.Option(
            "--policies",
            help="Of a load: none, auto, NAME or NAME:DRAFTS, separated by commas; auto and throughput with the guard.",
        ),
    ] = POLICIES,
    rate: Annotated[str, typer.Option("--rate", help="Requests a second of an open load, separated by commas.")] = "",
    duration: Annotated[float, typer.Option("--duration", min=0.1, help="Seconds of each load.")] = DURATION,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw a load's figures into this file.")] = None,
    json: JsonFile = None,
) -> None:
    """Measure drafters against plain decoding, in turns (A B A B), in one process.

    The speed-up is the ratio of the two sides' summed seconds, each prompt the median of its repeats, with a
    bootstrap 95 % interval over prompts. Answers to chat questions end by themselves; continued text goes on past its
    end, so that both sides write the same number of tokens. `accept` is the acceptance length, `same` the share of
    prompts whose text equals plain decoding's, `rep.` the share of 8-grams that occurred before. Prompts that cannot be
    answered are left out and listed under `errors` in the JSON, and the exit code is then 3.

    [bold]Examples[/bold]

    [cyan]outrider bench[/cyan]

    [cyan]outrider bench --load closed --concurrency 1,4,16 --policies none,fixed:3 --model smollm2[/cyan]

    [cyan]outrider bench --url http://localhost:8080 --concurrency 8 --duration 60[/cyan]

    [cyan]outrider bench --drafter ngram --drafter suffix --prompts gsm8k.jsonl --temperature 0 --json out.json[/cyan]
    """
    if load is not None or url is not None:
        bench_load(
            LoadOptions(
                loop=load or "closed",
                url=url,
                model=model,
                drafter=_only_one("--drafter", drafter, "auto"),
                policies=policies,
                concurrency=concurrency,
                rate=rate,
                duration=duration,
                prompts=prompts or [],
                limit=limit,
                draft_tokens=draft_tokens,
                seed=seed,
                chat=chat,
                temperature=_only_one("--temperature", temperature, 0.0),
                max_tokens=max_tokens,
                dtype=dtype,
                backend=backend,
                json=json,
                plot=plot,
            )
        )
        return
    of_a_load = {
        "--rate": rate != "",
        "--plot": plot is not None,
        "--policies": policies != POLICIES,
        "--duration": duration != DURATION,
    }
    for option, given in of_a_load.items():
        if given:
            raise InvalidRequest(f"{option} belongs to a load: give --load or --url too")
    together = _prompts_together(concurrency)
    from outrider.engine.llm import LLM
    from outrider.evaluation.recording import FailedPrompt, read_prompts, runnable
    from outrider.evaluation.speedup import default_prompt_files, run_bench

    sets_given = {path.stem: read_prompts(path) for path in prompts or []}
    plain = LLM(load_target_model(model, dtype, backend), "none", max_rows=together)
    as_chat = asks_as_chat(chat, model, plain.tokenizer)
    read = sets_given or {path.stem: read_prompts(path) for path in default_prompt_files(as_chat)}
    known = ["ngram", "suffix", *(["draft_model"] if model == "embedded" else [])]
    console = human(json)
    loaded: dict[str, LLM] = {}
    for name in drafter or known:
        if name in loaded:
            raise InvalidRequest(f"--drafter {name} was given twice")
        loaded[name] = plain.with_drafter(name, draft_tokens=draft_tokens)
    say_loaded(plain, loaded)
    params = SamplingParams(max_tokens=max_tokens)
    failed: list[FailedPrompt] = []
    sets = {}
    for name, some in read.items():
        good, bad = runnable(plain, some[:limit], params, chat=as_chat, fail_fast=fail_fast)
        failed += bad
        if good:
            sets[name] = [prompt.prompt for prompt in good]
    if not sets:
        raise InvalidRequest(f"no prompt can be answered; {failed[0].file} line {failed[0].line}: {failed[0].error}")
    with console.status("warming up") as status:
        result = run_bench(
            model,
            loaded,
            plain,
            sets,
            temperatures=temperature or [0.0, 1.0],
            concurrency=together,
            max_tokens=max_tokens,
            repeats=repeats,
            seed=seed,
            ignore_eos=not as_chat,
            progress=status.update,
        )
    console.print(_table(result))
    say_asked(chat, as_chat)
    write_json(json, {**result, "chat": as_chat, "errors": [asdict(one) for one in failed]})
    report_failed(failed, sum(len(some[:limit]) for some in read.values()))


def _only_one(name: str, given: list[Any] | None, default: Any) -> Any:
    if given and len(given) > 1:
        raise InvalidRequest(f"a load takes one {name}, got {len(given)}")
    return given[0] if given else default


def _prompts_together(given: str) -> int:
    if not (given.isascii() and given.isdigit() and int(given) >= 1):
        raise InvalidRequest(
            f"--concurrency: expected a whole number of at least 1 (several with --load), got {given!r}"
        )
    return int(given)


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['model']} on {result['machine']['cpu']}, {result['machine']['cores']} cores"
    table = Table(title=Text(title), box=SIMPLE_HEAD, padding=0)  # ten columns in eighty characters
    numbers = ("temp", "plain/s", "tokens/s", "x", "95 %", "accept", "same", "rep.")
    add_columns(table, ("drafter", "prompts"), numbers)
    for row in result["rows"]:
        low, high = row["speedup_ci95"] or (0.0, math.inf)
        colour = "green" if low > 1 else "red" if high < 1 else "yellow"
        table.add_row(
            row["drafter"],
            row["prompts"],
            f"{row['temperature']:g}",
            f"{row['baseline_tokens_per_second']:.1f}",
            f"{row['tokens_per_second']:.1f}",
            f"[{colour}]{row['speedup']:.2f}[/{colour}]",
            f"{low:.2f}-{high:.2f}" if row["speedup_ci95"] else "-",
            f"{row['acceptance_length']:.2f}",
            f"{row['identical']:.0%}",
            f"{row['repeated_8grams']:.0%}",
        )
    return table
