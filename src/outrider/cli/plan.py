"""``outrider plan``: does speculation pay, with which drafter and how many drafts; and where a run's time went."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from outrider.cli.common import (
    MODELS,
    Backend,
    Chat,
    Dtype,
    JsonFile,
    add_columns,
    asks_as_chat,
    check_writable,
    command,
    human,
    load_target_model,
    say_loaded,
    write_json,
    write_text,
)
from outrider.config import SamplingParams
from outrider.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from outrider.engine.llm import LLM
    from outrider.planning.advice import Plan
    from outrider.planning.forecast import Workload
    from outrider.planning.run_split import Split

__all__ = ["plan"]


@command
def plan(
    target: Annotated[
        str | None, typer.Option("--target", help=f"Measured on this machine. {MODELS} Default: embedded.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            help="Instead of a target: qwen3-8b, or layers=36,width=4096,vocabulary=151936,parameters=8.2e9,bytes=2, "
            "or a .toml file with these.",
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine",
            help="With --shape: h100, or bandwidth=3350,tflops=989,memory=80,price=2.5 (GB/s, TFLOP/s, GB, an hour), "
            "curve=1:31/8:68.7 (tokens:ms of a target pass), or a .toml file.",
        ),
    ] = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter",
            help="May be repeated. With --target: ngram, suffix, or a drafter's directory. With --shape: "
            "dspark,length=2.33 or eagle3,profile=0.8/0.7/0.6,drafts=5.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="With --target: a sample of your prompts. Default: packaged ones.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts that are answered for measuring.")] = 6,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Mean length of prompts.")] = 128,
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", min=1, help="Mean length of answers.")] = 256,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Users at once; with --rate at most.")] = 1,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Requests a second, instead of users at once.")] = 0.0,
    latency: Annotated[float, typer.Option("--latency", min=0, help="Objective for an answer, in seconds.")] = 0.0,
    token_latency: Annotated[
        float, typer.Option("--token-latency", min=0, help="Objective between tokens, in milliseconds.")
    ] = 0.0,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="With --target.")] = 0.0,
    explain: Annotated[
        Path | None,
        typer.Option(
            "--explain",
            help="Instead: where the time of a run went. JSON of bench, eval or a load; a vLLM /metrics page; a "
            "llama.cpp server log or its timings.",
        ),
    ] = None,
    plain: Annotated[
        Path | None,
        typer.Option("--plain", help="With --explain: a vLLM page or llama.cpp log of the server without speculation."),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the page into this file.")] = None,
    chat: Chat = None,
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    json: JsonFile = None,
) -> None:
    """Answer whether speculation pays, for a target, drafters, a machine and a workload.

    With --target everything is measured here on a sample of prompts; with --shape and --machine times follow from
    reading weights at the memory's bandwidth and multiplying at the processor's rate. What is advised is the fastest
    setting whose whole 95 % interval is above plain decoding, else plain decoding. `even` (break-even) is the
    acceptance length at which a setting is as fast as plain decoding.

    [bold]Examples[/bold]

    [cyan]outrider plan --target smollm2 --drafter suffix --prompts mine.jsonl[/cyan]

    [cyan]outrider plan --shape qwen3-8b --machine h100,price=2.5 --drafter dspark,length=2.33 --concurrency 32[/cyan]

    [cyan]outrider plan --explain bench.json --json[/cyan]
    """
    console = human(json)
    if html is not None:
        check_writable("--html", html)
    if explain is not None:
        from outrider.planning.run_split import read_run, split_page

        splits = read_run(explain, plain)
        for split in splits:
            _print_split(console, split)
        if html is not None:
            write_text(html, split_page(splits))
        write_json(json, [split.to_json() for split in splits])
        return
    if plain is not None:
        raise InvalidRequest("--plain belongs to --explain: it tells what a plain step takes")
    from outrider.planning.forecast import Workload
    from outrider.planning.page import plan_page

    work = Workload(prompt_tokens, answer_tokens, concurrency, rate, latency, token_latency / 1e3)
    if shape is not None:
        if target is not None:
            raise InvalidRequest("--target is measured and --shape is described: give one of them")
        made = _described(shape, machine, drafter or [], work)
    else:
        if machine is not None:
            raise InvalidRequest("--machine describes another machine, where nothing can be measured: give --shape too")
        made = _measured(
            console, target or "embedded", drafter, prompts, limit, temperature, work, chat, dtype, backend
        )
    _print_plan(console, made)
    if html is not None:
        write_text(html, plan_page(made))
    write_json(json, made.to_json())


def _described(shape: str, machine: str | None, drafters: list[str], work: Workload) -> Plan:
    from outrider.planning.advice import described_candidates, make_plan
    from outrider.planning.described import DrafterShape, Machine, TargetShape
    from outrider.planning.roofline import Roofline

    if machine is None or not drafters:
        raise InvalidRequest("--shape needs --machine, and at least one --drafter such as dspark,length=2.33")
    target, where = TargetShape.read(shape), Machine.read(machine)
    candidates = described_candidates(where, target, [DrafterShape.read(text) for text in drafters])
    names = [c.name for c in candidates]
    if len(set(names)) < len(names):
        raise InvalidRequest(f"two drafters are called {max(names, key=names.count)}: give them name=...")
    return make_plan(
        candidates,
        Roofline(where, target),
        work,
        target=target,
        machine=where,
        notes=["nothing was measured: times follow from the machine's figures, acceptance was given"],
    )


def _measured(
    console: Console,
    model: str,
    drafters: list[str] | None,
    prompts: Path | None,
    limit: int,
    temperature: float,
    work: Workload,
    chat: bool | None,
    dtype: str,
    backend: str,
) -> Plan:
    from outrider.engine.cost_tables import describe, machine
    from outrider.engine.llm import LLM
    from outrider.evaluation.recording import read_prompts, runnable
    from outrider.evaluation.speedup import default_prompt_files
    from outrider.planning.advice import make_plan
    from outrider.planning.measuring import measure, measured_shape, this_machine

    loaded = load_target_model(model, dtype, backend)
    context = loaded.target.spec.max_positions
    if work.prompt + work.answer > context:
        raise InvalidRequest(
            f"prompts of {work.prompt} and answers of {work.answer} tokens pass the target's context of {context} "
            "tokens; lower --prompt-tokens or --answer-tokens"
        )
    plain = LLM(loaded, "none", max_rows=work.concurrency)
    as_chat = asks_as_chat(chat, model, plain.tokenizer)
    files = [prompts] if prompts else default_prompt_files(as_chat)
    count = max(limit, 2 * work.concurrency)  # rows that end are to be followed by others
    read = [prompt for path in files for prompt in read_prompts(path)[: -(-count // len(files))]]
    params = SamplingParams(
        max_tokens=min(work.answer, 96),
        temperature=temperature,
        seed=1 if temperature else None,
        ignore_eos=not as_chat,
    )
    good, _ = runnable(plain, read, params, chat=as_chat)
    sample = [prompt.prompt for prompt in good]
    if not sample:
        raise InvalidRequest("no prompt of the sample can be answered by this target")
    sample = [sample[i % len(sample)] for i in range(max(work.concurrency, min(count, len(sample))))]
    names = list(dict.fromkeys(drafters or ["ngram", "suffix"]))
    for name in names:  # one that is not there is an error before anything is said to be loaded
        plain.with_drafter(name)
    say_loaded(plain, names)

    def maker(name: str) -> Callable[[int | None], LLM]:
        return lambda drafts: plain.with_drafter(name, draft_tokens=drafts)

    with console.status("plain decoding and drafters in turns"):
        costs, candidates = measure(plain, {name: maker(name) for name in names}, sample, params, work)
    return make_plan(
        candidates,
        costs,
        work,
        target=measured_shape(plain),
        machine=this_machine(describe(machine())),
        target_name=model,
        longest=plain.target.spec.max_positions,
        notes=[f"measured here on {len(sample)} prompts; rows and contexts beyond those measured are extrapolated"],
    )


# ------------------------------------------------------------------------------------------------ output


def _table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(title=Text(title), box=SIMPLE_HEAD, padding=0, title_justify="left")
    add_columns(table, words, numbers)
    return table


def _print_plan(console: Console, made: Plan) -> None:
    from outrider.planning.page import figures_of, row_of_forecast

    console.print(made.answer, style="bold green" if made.pays else "bold yellow", markup=False)
    numbers = ("k", "accept", "even", "draft", "verify", "tok/s", "ms/tok", "s", "x", "95 %")
    table = _table(f"{made.target} on {made.machine}; the best k of each", ("drafter",), numbers)
    for one in (made.plain, *made.forecasts):
        table.add_row(*row_of_forecast(one))
    console.print(table)
    for name, value in figures_of(made):
        console.print(f"{name}: {value}", markup=False)
    changed = _table("What would change it", ("if",), ("x", "best", "x"))
    for s in made.sensitivities:
        changed.add_row(s.what, f"{s.speedup:.2f}", s.best, f"{s.best_speedup:.2f}", style="bold" if s.changes else "")
    console.print(changed)
    for text in made.notes:
        console.print(f"note: {text}", style="dim", markup=False)


def _print_split(console: Console, split: Split) -> None:
    console.print(f"{split.title}: {split.answer}", style="bold", markup=False)
    table = _table("", ("part",), ("ms a round", "share"))
    for name, seconds in split.parts.items():
        table.add_row(name, f"{1e3 * seconds:.3f}", f"{seconds / split.round_seconds:.0%}")
    console.print(table)
    levers: Any = _table("What is worth most", ("lever",), ("x",))
    for lever in split.levers:
        levers.add_row(lever.what, f"{lever.gain:.2f}")
    console.print(levers)
    for text in split.notes:
        console.print(f"note: {text}", style="dim", markup=False)
