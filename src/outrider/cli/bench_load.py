"""``outrider bench --load`` and ``--url``: many clients at once, on this server under each policy, or on any other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from outrider.cli.common import add_columns, asks_as_chat, check_writable, human, note, write_json
from outrider.errors import InvalidRequest

__all__ = ["DURATION", "POLICIES", "LoadOptions", "bench_load"]

POLICIES, DURATION = "none,auto", 30.0  # where nothing else is said
GUARDED = ("auto", "throughput")  # others are measured as they are: a guard would turn fixed drafts off where they lose


@dataclass(frozen=True)
class LoadOptions:
    """The options of ``bench`` that a load reads."""

    loop: str
    url: str | None
    model: str
    drafter: str
    policies: str
    concurrency: str
    rate: str
    duration: float
    prompts: Sequence[Path]
    limit: int
    draft_tokens: int | None
    seed: int
    chat: bool | None
    temperature: float
    max_tokens: int
    dtype: str
    backend: str
    json: str | None
    plot: Path | None


def bench_load(options: LoadOptions) -> None:
    """Measure, print, write. Raises InvalidRequest, OutriderError."""
    from outrider.evaluation.load import Load, run_load, summary
    from outrider.evaluation.load_client import LoadClient
    from outrider.evaluation.plots import check_plot, draw_load
    from outrider.evaluation.speedup import machine

    if options.loop not in ("closed", "open"):
        raise InvalidRequest(f"--load: expected closed or open, got {options.loop!r}")
    if options.loop == "closed" and options.rate:
        raise InvalidRequest("--rate is of an open load: give --load open, or leave it out")
    clients = _clients(options.concurrency)
    rates: list[float | None] = [*_numbers("--rate", options.rate)] if options.loop == "open" else [None]
    if options.loop == "open" and not options.rate:
        raise InvalidRequest("--load open needs --rate, the requests a second; several separated by commas")
    if options.plot is not None:
        check_writable("--plot", options.plot)
        check_plot(options.plot)
    policies = _policies(options)
    prompts, chat = _prompts(options)
    console = human(options.json)
    rows: list[dict[str, Any]] = []
    asked = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    for policy in policies:
        with _server(options, policy, max(clients)) as url, console.status(policy) as status:
            for count in clients if options.loop == "closed" else [1]:
                for rate in rates:
                    load = Load(prompts, chat, options.duration, count, rate, asked, options.seed)
                    shown = f"{count} clients" if rate is None else f"{rate:g} requests a second"
                    status.update(f"{policy}: {shown}, {options.duration:g} s")
                    client = LoadClient(url, options.model if options.url and options.model != "embedded" else None)
                    rows.append(asdict(summary(policy, load, *asyncio.run(run_load(client, load)))))
    console.print(_table(rows))
    for row in rows:
        if row["errors"]:
            note(f"{row['policy']}, {row['concurrency']:g} users: {row['errors']} failed, first {row['first_error']}")
    result = {"model": options.model, "machine": machine(), "load": options.loop, "duration": options.duration}
    write_json(options.json, {**result, "url": options.url, "chat": chat, "asked": asked, "rows": rows})
    if options.plot is not None:
        draw_load(rows, options.plot)


def _clients(given: str) -> list[int]:
    found = _numbers("--concurrency", given)
    if not found or any(one != int(one) for one in found):
        raise InvalidRequest(f"--concurrency: expected whole numbers above 0 like 1,4,16, got {given!r}")
    return [int(one) for one in found]


def _policies(options: LoadOptions) -> list[str]:
    """Names of the runs: each policy, or the server that is there already."""
    if options.url:
        settled = {"--policies": options.policies != POLICIES, "--drafter": options.drafter != "auto"}
        settled["--draft-tokens"] = options.draft_tokens is not None
        for option, given in settled.items():
            if given:
                raise InvalidRequest(f"{option} cannot be set for a server that runs already: leave it out with --url")
        return ["server"]
    policies = [one.strip() for one in options.policies.split(",") if one.strip()]
    if not policies:
        raise InvalidRequest(f"--policies names none; expected some like {POLICIES}")
    return policies


def _numbers(name: str, given: str) -> list[float]:
    try:
        found = [float(part) for part in given.split(",") if part.strip()]
    except ValueError:
        found = []
    if any(not 0 < one < 1e6 for one in found) or (not found and given):
        raise InvalidRequest(f"{name}: expected numbers above 0 like 1,4,16, got {given!r}")
    return found


def _prompts(options: LoadOptions) -> tuple[list[str], bool]:
    """Texts to ask, and whether as chat."""
    from outrider.evaluation.recording import read_prompts
    from outrider.evaluation.speedup import default_prompt_files

    if options.url is not None:
        chat = options.chat is not False
    elif options.chat is None:
        from outrider.models.loading import load_tokenizer

        chat = asks_as_chat(None, options.model, load_tokenizer(options.model))
    else:
        chat = options.chat
    files = options.prompts or default_prompt_files(chat)
    sets = [
        [one.prompt for one in read_prompts(file)[: options.limit] if isinstance(one.prompt, str)] for file in files
    ]
    mixed = [texts[i] for i in range(max(map(len, sets), default=0)) for texts in sets if i < len(texts)]
    if not mixed:
        raise InvalidRequest("the prompt sets hold no text; a load needs prompts of text")
    return mixed, chat


@contextmanager
def _server(options: LoadOptions, policy: str, rows: int) -> Iterator[str]:
    """The address that is asked."""
    from outrider.evaluation.served_process import served

    if options.url is not None:
        with nullcontext():
            yield options.url
        return
    drafting = ["--drafter", "none"] if policy == "none" else ["--drafter", options.drafter, "--policy", policy]
    if policy.partition(":")[0] not in ("none", *GUARDED):
        drafting.append("--no-guard")
    if options.draft_tokens is not None:
        drafting += ["--draft-tokens", str(options.draft_tokens)]
    kind = ["--dtype", options.dtype, "--backend", options.backend, "--max-rows", str(rows)]
    with served([options.model, *drafting, *kind]) as url:
        yield url


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0)  # nine columns in eighty characters
    add_columns(table, ("policy",), ("users", "tokens/s", "each/s", "first ms", "p50 ms", "p99 ms", "accept", "failed"))
    for row in rows:
        length = row["acceptance_length"]
        table.add_row(
            row["policy"],
            f"{row['concurrency']:g}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['per_user_tokens_per_second']:.1f}",
            f"{row['ttft_ms']:.0f}",
            f"{row['itl_p50_ms']:.1f}",
            f"{row['itl_p99_ms']:.1f}",
            "" if length is None else f"{length:.2f}",
            f"{row['errors']}",
        )
    return table
