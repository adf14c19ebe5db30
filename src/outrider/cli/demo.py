"""``outrider demo``: the same text twice, plain and speculative, side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from outrider.cli.common import (
    MODELS,
    JsonFile,
    ModelOptions,
    Seed,
    check_writable,
    command,
    human,
    is_chat_model,
    note,
    write_json,
    write_text,
)
from outrider.config import SamplingParams
from outrider.errors import CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from outrider.engine.llm import LLM, Prompt
    from outrider.types import Output, Piece

__all__ = ["demo"]

ACCEPTED = "bold green"
FRAME = 1 / 30  # seconds between frames of the replay
WARM_UP = "Warm up; the first call is not timed."
WIDTH = 96  # characters of the picture
MAX_TOKENS, CHAT_MAX_TOKENS = 128, 384  # SmolLM2's answers end by themselves before


@dataclass(frozen=True)
class DemoModel(ModelOptions):
    """The target, which may be left to what is installed."""

    model: Annotated[  # type: ignore[assignment]
        str,
        typer.Option(
            "--model",
            help=f"{MODELS} Default: smollm2 where it is installed, else embedded.",
            rich_help_panel="Model",
            show_default=False,
        ),
    ] = ""


@dataclass(frozen=True)
class Asked:
    """A question of one domain: as it is shown, and as it is given to the target."""

    domain: str
    text: str
    prompt: Prompt


@dataclass(frozen=True)
class Run:
    """One answer, and the time of each part: seconds since its start, and the pieces."""

    output: Output
    moments: list[tuple[float, tuple[Piece, ...]]]

    @property
    def tokens_per_second(self) -> float:
        return self.output.stats.tokens_per_second


@dataclass(frozen=True)
class Row:
    """One domain's line of the closing table; rates are medians over the repeats."""

    domain: str
    plain_tokens_per_second: float
    tokens_per_second: float
    speedup: float
    acceptance_length: float
    repeated_8grams: float
    identical: bool
    finished: bool
    """Whether the answer ended by itself, before ``--max-tokens``."""
    tokens: int


@command
def demo(
    model: DemoModel,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="The most new tokens of an answer. Default: 384 for a chat model, else 128."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="0 is greedy, 1 samples. Default: 0 for a chat model, else 1."),
    ] = None,
    seed: Seed = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Answers of each side; the table shows medians.")
    ] = 3,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write a picture: the first answer and the table.")
    ] = None,
    json: JsonFile = None,
) -> None:
    """See one text generated plainly and speculatively, side by side, with the time of each.

    One prompt for each domain: questions for a chat model, beginnings of documents for another one. Green tokens were
    drafted, verified by the target, and accepted. Both sides answer several times, in turns; then the last pair is
    replayed in real time.

    [bold]Examples[/bold]

    [cyan]outrider demo[/cyan]

    [cyan]outrider demo --model embedded --temperature 0 --drafter suffix --json demo.json[/cyan]
    """
    console = human(json)
    if svg is not None:
        check_writable("--svg", svg)
    model = replace(model, model=model.model or _default_model())
    llm = model.load()
    chat = is_chat_model(model.model, llm.tokenizer)
    temperature = (0.0 if chat else 1.0) if temperature is None else temperature
    limit = (CHAT_MAX_TOKENS if chat else MAX_TOKENS) if max_tokens is None else max_tokens
    params = SamplingParams(max_tokens=limit, temperature=temperature, seed=seed)
    questions = _questions(llm, chat)
    rows, last = [], []
    sides = (
        llm.with_drafter("none"),
        llm.with_drafter(model.drafter, draft_tokens=model.draft_tokens, policy="auto", guard=True),
    )
    _pair(sides, WARM_UP, SamplingParams(max_tokens=8, temperature=temperature, seed=seed))
    for asked in questions:
        with console.status(f"{asked.domain}: measuring"):
            pairs = [_pair(sides, asked.prompt, params) for _ in range(repeats)]
        _show(console, asked, chat, *pairs[-1])
        rows.append(_row(asked.domain, pairs))
        last.append(pairs[-1])
    table = _table(rows, model.model, llm.drafter_name, temperature)
    console.print(table)
    if svg is not None:
        _write_svg(svg, _picture(questions[0], chat, *last[0]), table)
        console.print(f"{svg}: written", style="dim", markup=False)
    write_json(
        json,
        {
            "model": model.model,
            "chat": chat,
            "drafter": llm.drafter_name,
            "temperature": temperature,
            "seed": seed,
            "rows": [asdict(row) for row in rows],
        },
    )


def _default_model() -> str:
    """SmolLM2 where it is installed, else the embedded model; says which, and why."""
    from outrider.models.locations import SMOLLM2, SMOLLM2_HINT, resolve_model

    try:
        resolve_model(SMOLLM2)
    except CheckpointError:
        note(f"SmolLM2 is not installed, so the small embedded model writes. For real answers: {SMOLLM2_HINT}")
        return "embedded"
    note("SmolLM2-135M-Instruct is installed and answers; --model embedded shows the embedded model")
    return SMOLLM2


def _questions(llm: LLM, chat: bool) -> list[Asked]:
    """The first packaged prompt of each domain. Raises InvalidRequest where there is none."""
    from outrider.evaluation.speedup import embedded_prompt_sets

    questions = []
    for domain, prompts in embedded_prompt_sets(chat).items():
        text = prompts[0]
        questions.append(
            Asked(domain, text, llm.tokenizer.encode_chat([{"role": "user", "content": text}]) if chat else text)
        )
    if not questions:
        raise InvalidRequest("this installation has no packaged prompts; install the package again")
    return questions


# ------------------------------------------------------------------------------------------------ measuring


def _pair(sides: tuple[LLM, LLM], prompt: Prompt, params: SamplingParams) -> tuple[Run, Run]:
    """Plain, then speculative, neither of which remembers the text of earlier answers."""
    for side in sides:
        side.forget()
    plain, fast = (_run(side, prompt, params) for side in sides)
    return plain, fast


def _run(llm: LLM, prompt: Prompt, params: SamplingParams) -> Run:
    run = llm.run(prompt, params)
    moments = []
    began = perf_counter()
    for event in run.events():
        moments.append((perf_counter() - began, event.pieces))
    return Run(run.output(), moments)


def _row(domain: str, pairs: list[tuple[Run, Run]]) -> Row:
    from outrider.evaluation.speedup import repeated_ngrams

    plain = median(p.tokens_per_second for p, _ in pairs)
    fast = median(s.tokens_per_second for _, s in pairs)
    output = pairs[-1][1].output
    return Row(
        domain=domain,
        plain_tokens_per_second=round(plain, 1),
        tokens_per_second=round(fast, 1),
        speedup=round(fast / plain, 2),
        acceptance_length=round(output.stats.acceptance_length, 2),
        repeated_8grams=round(repeated_ngrams(output.token_ids), 3),
        identical=all(p.output.token_ids == s.output.token_ids for p, s in pairs),
        finished=output.finish_reason == "stop",
        tokens=len(output.token_ids),
    )


# ------------------------------------------------------------------------------------------------ showing


def _show(console: Console, asked: Asked, chat: bool, plain: Run, fast: Run) -> None:
    if not console.is_terminal:
        console.print(f"== {asked.domain} ==")
        console.file.write(f"{asked.text}{2 * chr(10) if chat else ''}{fast.output.text}\n\n")
        return
    last = max(run.moments[-1][0] for run in (plain, fast))
    with Live(console=console, auto_refresh=False) as live:
        began = perf_counter()
        now = 0.0
        while now < last:
            now = perf_counter() - began
            live.update(_picture(asked, chat, plain, fast, now), refresh=True)
            sleep(FRAME)


def _picture(asked: Asked, chat: bool, plain: Run, fast: Run, now: float = float("inf")) -> RenderableType:
    """Both sides ``now`` seconds after their start, a chat's question above them."""
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    sides = []
    for name, run in (("plain", plain), ("speculative", fast)):
        pieces = [piece for at, some in run.moments if at <= now for piece in some]
        clock = min(now, run.moments[-1][0])
        sides.append(Panel(_coloured(pieces), title=f"{asked.domain}, {name}: {len(pieces)} tokens, {clock:.2f} s"))
    grid.add_row(*sides)
    return Group(Text(asked.text, style="bold"), grid) if chat else grid


def _coloured(pieces: Iterable[Piece]) -> Text:
    text = Text()
    for piece in pieces:
        text.append(piece.text, style=ACCEPTED if piece.drafted else "")
    return text


def _table(rows: list[Row], model: str, drafter: str, temperature: float) -> Table:
    table = Table(
        title=f"{model}, drafter {drafter}, temperature {temperature:g}: medians of turns A B A B",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    table.add_column("\ndomain", no_wrap=True)
    for first, second in (
        ("plain", "tokens/s"),
        ("speculative", "tokens/s"),
        ("", "speed-up"),
        ("accept", "length"),
        ("rep.", "8-grams"),
        ("same", "text"),
        ("ended by", "itself"),
    ):
        table.add_column(f"{first}\n{second}", justify="right", no_wrap=True)
    for row in rows:
        cells: list[Any] = [
            row.domain,
            f"{row.plain_tokens_per_second:.1f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.speedup:.2f} x",
            f"{row.acceptance_length:.2f}",
            f"{row.repeated_8grams:.1%}",
            "yes" if row.identical else "no",
            "yes" if row.finished else "no",
        ]
        table.add_row(*cells)
    return table


def _write_svg(path: Path, picture: RenderableType, table: Table) -> None:
    """Both as a terminal shows them. The picture loads nothing: rich's own names fonts on a server."""
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(picture)
    console.print(table)
    drawn = console.export_svg(title="outrider demo", unique_id="demo")
    write_text(path, re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))
