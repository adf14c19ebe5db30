"""``outrider audit``: prove that speculative decoding changes nothing, or show what it changes."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from outrider.cli.common import (
    MODELS,
    Backend,
    Dtype,
    JsonFile,
    check_writable,
    command,
    drafters_named,
    human,
    is_chat_model,
    load_target_model,
    note,
    write_json,
    write_text,
)
from outrider.errors import InvalidRequest, OutriderError, closest

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.engine.loader import LoadedModel
    from outrider.evaluation.recording import EvalPrompt
    from outrider.proof.certificate import Certificate
    from outrider.types import TargetModel

__all__ = ["audit"]

CHOICES = ("exact", "contracts", "equality", "statistical", "quick", "all")
LARGEST_SEED = 2**31 - 1  # requests' seeds are numbered from it, in 63 bits
SHOWN = 400  # checks of a tier in the terminal
SERVER_PROMPTS = 24  # of a server
REFERENCE_TOKENS = 6000  # several times what tells a copy in 4 bits


@command
def audit(
    model: Annotated[str, typer.Option("--model", help=MODELS)] = "embedded",
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter",
            help="A name or a directory, or several with commas. May be repeated. Default: all the model comes with.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", help="A name, or several with commas. May be repeated. Default: all of the catalogue."
        ),
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            "--tier", help="exact, contracts, equality, statistical or all; quick does a little. May be repeated."
        ),
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option("--prompts", help="JSON Lines with `text`, `turns` or `prompt`. Default: packaged ones."),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Requests in a batch.")] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Of worlds, texts and tests.")] = 0,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Run broken variants, each of which must be caught, and sound ones.")
    ] = False,
    repetitions: Annotated[int, typer.Option("--repetitions", min=0, help="Sound repetitions of --self-test.")] = 20,
    url: Annotated[
        str | None, typer.Option("--url", help="Audit an OpenAI-compatible server instead of a model.")
    ] = None,
    baseline_url: Annotated[
        str | None, typer.Option("--baseline-url", help="The same server without speculation, to compare with.")
    ] = None,
    server_model: Annotated[
        str | None, typer.Option("--server-model", help="The model's name on the server. Default: the first it lists.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Is the server's model this one? A directory or another model.")
    ] = None,
    shared_seeds: Annotated[
        bool, typer.Option("--shared-seeds", help="The server is Outrider: its seeds tell what it must draw.")
    ] = False,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Most tokens of a server to test by their log-probabilities.")
    ] = 20_000,
    answers: Annotated[
        int, typer.Option("--answers", min=2, help="To each prompt, where a server is compared with a baseline.")
    ] = 10,
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the certificate for people.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the certificate as a page.")] = None,
    json: JsonFile = None,
) -> None:
    """Certify that the text is the target's own, with stated error rates. Exit code 1 where something is wrong.

    exact: the distribution of whole texts, enumerated through the engine on toy targets. contracts: drafters, policies,
    caches, backends and random numbers, by perturbation. equality: greedy and seeded text against plain decoding.
    statistical: sampled text, by sequential tests. With --url another server is audited: its greedy text, and its
    sampled tokens against its own log-probabilities, a baseline, or a local reference model.

    [bold]Examples[/bold]

    [cyan]outrider audit --tier quick[/cyan]

    [cyan]outrider audit --model ./my-model --drafter runs/dspark/drafter --json certificate.json[/cyan]

    [cyan]outrider audit --self-test[/cyan]

    [cyan]outrider audit --url http://localhost:8000 --baseline-url http://localhost:8001 --html certificate.html[/cyan]
    """
    from outrider.proof.certify import TIERS, Audit

    console = human(json)
    _check_files(markdown, html, None if json in (None, "-") else Path(json))
    if self_test:
        _self_test(console, repetitions, json)
        return
    if url is not None:
        certificate = _audit_server(
            url, baseline_url, server_model, reference, shared_seeds, prompts, tokens, answers, seed, dtype, backend
        )
        _show(console, certificate)
        _write(certificate, markdown, html, json)
        return
    if baseline_url or reference or shared_seeds or server_model:
        raise InvalidRequest("--baseline-url, --server-model, --reference and --shared-seeds need --url")
    chosen = tier or ["all"]
    for name in chosen:
        if name not in CHOICES:
            raise InvalidRequest(f"--tier must be one of {', '.join(CHOICES)}, got {name!r}{closest(name, CHOICES)}")
    loaded = load_target_model(model, dtype, backend)
    named = set(chosen) - {"all", "quick"}
    plan = Audit(
        loaded,
        tuple(chain.from_iterable(map(drafters_named, drafter or _drafters_of(loaded)))),
        tuple(name.strip() for one in policy or () for name in one.split(",")),
        _prompts(loaded, prompts),
        tuple(name for name in TIERS if name in named or not named),
        quick="quick" in chosen,
        seed=seed,
        max_rows=rows,
        progress=note,
    )
    certificate = plan.run()
    _show(console, certificate)
    _write(certificate, markdown, html, json)


def _check_files(markdown: Path | None, html: Path | None, json: Path | None) -> None:
    """Raises InvalidRequest for files that cannot be written, and for one that two results would be written to."""
    taken: dict[Path, str] = {}
    for option, path in (("--json", json), ("--markdown", markdown), ("--html", html)):
        if path is None:
            continue
        check_writable(option, path)
        first = taken.setdefault(path.resolve(), option)
        if first != option and (path.is_file() or not path.exists()):  # a device takes any number
            raise InvalidRequest(f"{first} and {option} both name {path}; give each a file of its own")


def _audit_server(
    url: str,
    baseline_url: str | None,
    server_model: str | None,
    reference: str | None,
    shared_seeds: bool,
    files: list[Path] | None,
    tokens: int,
    answers: int,
    seed: int,
    dtype: str,
    backend: str,
) -> Certificate:
    from outrider.proof import reference_check, server_checks
    from outrider.proof.certificate import Certificate, run_tier
    from outrider.proof.completion_server import CompletionServer

    if shared_seeds and reference is None:
        raise InvalidRequest("--shared-seeds needs --reference: a model that draws what the server must draw")
    prompts = tuple(one for one in _texts(files) if isinstance(one, str))[:SERVER_PROMPTS]
    if not prompts:
        raise InvalidRequest("--prompts: a server is asked with texts, got token ids alone; give `text` or `turns`")
    server = CompletionServer(url, model=server_model)
    baseline = CompletionServer(baseline_url, model=server_model) if baseline_url else None
    audit = server_checks.ServerAudit(
        server, baseline, prompts, tokens=tokens, answers=answers, tied_answers=2 * answers, seed=seed
    )
    tiers = [run_tier("server", server_checks.METHOD, audit.checks(), note)]
    subject = {"server": server.url, "model": server.model}
    if baseline is not None:
        subject["baseline"] = baseline.url
    if reference is not None:
        loaded = load_target_model(reference, dtype, backend)
        copies = _copies(loaded)
        check = reference_check.ReferenceAudit(
            server,
            loaded.target,
            loaded.tokenizer,
            copies,
            prompts,
            tokens=min(tokens, REFERENCE_TOKENS),
            shared_seeds=shared_seeds,
            seed=seed,
        )
        tiers.append(run_tier("reference", reference_check.METHOD, check.checks(), note))
        subject |= {"reference": loaded.name, "copies": ", ".join(copies) or "none"}
    return Certificate(subject, tuple(tiers))


def _copies(loaded: LoadedModel) -> dict[str, TargetModel]:
    """The model in fewer bits, where a backend can: what a server may run in its stead."""
    from outrider.models.loading import load_target

    found = {}
    for dtype in ("int8", "int4"):
        if loaded.dtype != dtype:
            with suppress(OutriderError):
                found[dtype] = load_target(loaded.name, dtype=dtype, backend=loaded.backend)
    return found


def _write(certificate: Certificate, markdown: Path | None, html: Path | None, json: str | None) -> None:
    """Every form that was asked for; ends the command with code 1 where something failed."""
    if markdown is not None:
        write_text(markdown, certificate.to_markdown())
    if html is not None:
        write_text(html, certificate.to_html())
    write_json(json, certificate.to_json())
    if not certificate.passed:
        raise typer.Exit(1)


def _drafters_of(loaded: LoadedModel) -> list[str]:
    """Drafters that need no files, and those that a model comes with."""
    from outrider.models.locations import PACKAGED_DRAFTERS

    return ["ngram", "suffix", *PACKAGED_DRAFTERS.get(loaded.name, ())]


def _prompts(loaded: LoadedModel, files: list[Path] | None) -> tuple[tuple[int, ...], ...]:
    """Token ids of all prompts; a chat model is asked questions in its template."""
    chat = is_chat_model(loaded.name, loaded.tokenizer)
    encoded = []
    for one in _read(files, chat):
        if not isinstance(one.prompt, str):
            encoded.append(one.prompt)
        elif chat and one.asked:
            encoded.append(loaded.tokenizer.encode_chat([{"role": "user", "content": one.prompt}]))
        else:
            encoded.append(loaded.tokenizer.encode(one.prompt))
    return tuple(tuple(ids) for ids in encoded if ids)


def _texts(files: list[Path] | None) -> list[str | list[int]]:
    """All prompts, as they are."""
    return [one.prompt for one in _read(files, chat=False)]


def _read(files: list[Path] | None, chat: bool) -> list[EvalPrompt]:
    """All prompts, the files taking turns."""
    from outrider.evaluation.recording import read_prompts
    from outrider.evaluation.speedup import default_prompt_files

    sets = [read_prompts(path) for path in files or default_prompt_files(chat)]
    return [one for one in chain.from_iterable(zip_longest(*sets)) if one is not None]


def _self_test(console: Console, repetitions: int, json: str | None) -> None:
    from outrider.proof.controls import self_test

    result: dict[str, Any] = self_test(repetitions, note)
    table = Table(title="broken variants")
    for name in ("variant", "tier", "result", "found"):
        table.add_column(name, overflow="fold")
    for one in result["controls"]:
        table.add_row(
            one["name"],
            one["tier"],
            "caught" if one["caught"] else "MISSED",
            one["found"],
            style=None if one["caught"] else "bold red",
        )
    console.print(table)
    alarms = result["sound"]["alarms"]
    console.print(f"sound configuration: {len(alarms)} false alarms in {repetitions} repetitions", markup=False)
    for alarm in alarms:
        console.print(alarm, style="red", markup=False)
    write_json(json, result)
    if alarms or not all(one["caught"] for one in result["controls"]):
        raise typer.Exit(1)


def _show(console: Console, certificate: Certificate) -> None:
    table = Table(title="losslessness")
    for name in ("tier", "result", "checks", "failed", "seconds"):
        table.add_column(name, justify="left" if name in ("tier", "result") else "right")
    for tier in certificate.tiers:
        failed = sum(not check.passed for check in tier.checks)
        style = None if tier.passed else "bold red"
        word = "pass" if tier.passed else "fail"
        table.add_row(tier.name, word, str(len(tier.checks)), str(failed), f"{tier.seconds:.1f}", style=style)
    console.print(table)
    for tier in certificate.tiers:
        for check in [check for check in tier.checks if not check.passed][:SHOWN]:
            console.print(f"{tier.name}: {check.name}: {check.found}", style="red", markup=False, soft_wrap=True)
    console.print("pass" if certificate.passed else "fail", style="green" if certificate.passed else "bold red")
