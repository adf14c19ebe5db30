"""``outrider audit``: prove that speculative decoding changes nothing, or show what it changes."""

from __future__ import annotations

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
    human,
    load_target_model,
    note,
    write_json,
)
from outrider.errors import InvalidRequest, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.engine.loader import LoadedModel
    from outrider.proof.certificate import Certificate

__all__ = ["audit"]

CHOICES = ("exact", "contracts", "equality", "statistical", "quick", "all")
SHOWN = 400  # checks of a tier in the terminal


@command
def audit(
    model: Annotated[str, typer.Option("--model", help=MODELS)] = "embedded",
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter", help="A name or a directory. May be repeated. Default: all that the model comes with."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option("--policy", help="May be repeated. Default: all of the catalogue.")
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
    seed: Annotated[int, typer.Option("--seed", help="Of worlds, texts and tests.")] = 0,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Run broken variants, each of which must be caught, and sound ones.")
    ] = False,
    repetitions: Annotated[int, typer.Option("--repetitions", min=0, help="Sound repetitions of --self-test.")] = 20,
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the certificate for people.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the certificate as a page.")] = None,
    json: JsonFile = None,
) -> None:
    """Certify that the text is the target's own, with stated error rates. Exit code 1 where something is wrong.

    exact: the distribution of whole texts, enumerated through the engine on toy targets. contracts: drafters, policies,
    caches, backends and random numbers, by perturbation. equality: greedy and seeded text against plain decoding.
    statistical: sampled text, by sequential tests.

    [bold]Examples[/bold]

    [cyan]outrider audit --tier quick[/cyan]

    [cyan]outrider audit --model ./my-model --drafter runs/dspark/drafter --json certificate.json[/cyan]

    [cyan]outrider audit --self-test[/cyan]
    """
    from outrider.proof.certify import TIERS, Audit

    console = human(json)
    for option, path in (("--markdown", markdown), ("--html", html)):
        if path is not None:
            check_writable(option, path)
    if self_test:
        _self_test(console, repetitions, json)
        return
    chosen = tier or ["all"]
    for name in chosen:
        if name not in CHOICES:
            raise InvalidRequest(f"--tier must be one of {', '.join(CHOICES)}, got {name!r}; {nearest(name, CHOICES)}")
    loaded = load_target_model(model, dtype, backend)
    named = set(chosen) - {"all", "quick"}
    plan = Audit(
        loaded,
        tuple(drafter or _drafters_of(loaded)),
        tuple(policy or ()),
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


def _write(certificate: Certificate, markdown: Path | None, html: Path | None, json: str | None) -> None:
    """Every form that was asked for; ends the command with code 1 where something failed."""
    if markdown is not None:
        markdown.write_text(certificate.to_markdown())
    if html is not None:
        html.write_text(certificate.to_html())
    write_json(json, certificate.to_json())
    if not certificate.passed:
        raise typer.Exit(1)


def _drafters_of(loaded: LoadedModel) -> list[str]:
    """Drafters that need no files, and those that a model comes with."""
    from outrider.engine.auto import EMBEDDED_DRAFTERS
    from outrider.engine.loader import EMBEDDED

    return ["ngram", "suffix", *(EMBEDDED_DRAFTERS if loaded.name == EMBEDDED else ())]


def _prompts(loaded: LoadedModel, files: list[Path] | None) -> tuple[tuple[int, ...], ...]:
    """Token ids of all prompts, the files taking turns."""
    from outrider.evaluation.recording import read_prompts
    from outrider.evaluation.speedup import default_prompt_files

    sets = [read_prompts(path) for path in files or default_prompt_files(chat=False)]
    mixed = [one.prompt for one in chain.from_iterable(zip_longest(*sets)) if one is not None]
    encoded = [loaded.tokenizer.encode(text) if isinstance(text, str) else text for text in mixed]
    return tuple(tuple(ids) for ids in encoded if ids)


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
