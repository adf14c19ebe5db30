"""``outrider demo``: the same text twice, plain and speculative, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from outrider.cli.common import JsonFile, MaxTokens, ModelOptions, Seed, Temperature, command, human, write_json
from outrider.config import SamplingParams
from outrider.errors import InvalidRequest

if TYPE_CHECKING:
    from outrider.engine.llm import LLM
    from outrider.types import Output, Piece

__all__ = ["demo"]

ACCEPTED = "bold green"
FRAME = 1 / 30  # seconds between frames of the replay
WARM_UP = "Warm up; the first call is not timed."


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
    tokens: int


@command
def demo(
    model: ModelOptions,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    seed: Seed = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Answers of each side; the table shows medians.")
    ] = 3,
    json: JsonFile = None,
) -> None:
    """See one text generated plainly and speculatively, side by side, with the time of each.

    Three prompts, one for each domain. Green tokens were drafted, verified by the target, and accepted. Both sides
    answer several times, in turns; then the last pair is replayed in real time.

    [bold]Examples[/bold]

    [cyan]outrider demo[/cyan]

    [cyan]outrider demo --temperature 0 --drafter suffix --json demo.json[/cyan]
    """
    from outrider.evaluation.speedup import embedded_prompt_sets

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    console = human(json)
    llm = model.load()
    rows = []
    _pair(llm, model, WARM_UP, SamplingParams(max_tokens=8, temperature=temperature, seed=seed))
    for domain, prompts in embedded_prompt_sets().items():
        with console.status(f"{domain}: measuring"):
            pairs = [_pair(llm, model, prompts[0], params) for _ in range(repeats)]
        _show(console, domain, prompts[0], *pairs[-1])
        rows.append(_row(domain, pairs))
    if not rows:
        raise InvalidRequest("this installation has no embedded prompts; install the package again")
    console.print(_table(rows, llm.drafter_name, temperature))
    write_json(
        json,
        {
            "model": model.model,
            "drafter": llm.drafter_name,
            "temperature": temperature,
            "seed": seed,
            "rows": [asdict(row) for row in rows],
        },
    )


# ------------------------------------------------------------------------------------------------ measuring


def _pair(llm: LLM, model: ModelOptions, prompt: str, params: SamplingParams) -> tuple[Run, Run]:
    """Plain, then speculative, each with a new drafter, which has learnt nothing from earlier answers."""
    plain, fast = llm.with_drafter("none"), llm.with_drafter(model.drafter, draft_tokens=model.draft_tokens)
    return _run(plain, prompt, params), _run(fast, prompt, params)


def _run(llm: LLM, prompt: str, params: SamplingParams) -> Run:
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
        tokens=len(output.token_ids),
    )


# ------------------------------------------------------------------------------------------------ showing


def _show(console: Console, domain: str, prompt: str, plain: Run, fast: Run) -> None:
    if not console.is_terminal:
        console.print(f"== {domain} ==")
        console.file.write(f"{prompt}{fast.output.text}\n\n")
        return
    last = max(run.moments[-1][0] for run in (plain, fast))
    with Live(console=console, auto_refresh=False) as live:
        began = perf_counter()
        now = 0.0
        while now < last:
            now = perf_counter() - began
            live.update(_picture(domain, plain, fast, now), refresh=True)
            sleep(FRAME)


def _picture(domain: str, plain: Run, fast: Run, now: float) -> RenderableType:
    """Both sides ``now`` seconds after their start."""
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    sides = []
    for name, run in (("plain", plain), ("speculative", fast)):
        pieces = [piece for at, some in run.moments if at <= now for piece in some]
        clock = min(now, run.moments[-1][0])
        sides.append(Panel(_coloured(pieces), title=f"{domain}, {name}: {len(pieces)} tokens, {clock:.2f} s"))
    grid.add_row(*sides)
    return grid


def _coloured(pieces: Iterable[Piece]) -> Text:
    text = Text()
    for piece in pieces:
        text.append(piece.text, style=ACCEPTED if piece.drafted else "")
    return text


def _table(rows: list[Row], drafter: str, temperature: float) -> Table:
    table = Table(
        title=f"drafter {drafter}, temperature {temperature:g}: medians of turns A B A B",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    table.add_column("\ndomain")
    for first, second in (
        ("plain", "tokens/s"),
        ("speculative", "tokens/s"),
        ("", "speed-up"),
        ("acceptance", "length"),
        ("repeated", "8-grams"),
        ("identical", "text"),
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
        ]
        table.add_row(*cells)
    return table
