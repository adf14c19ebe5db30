"""``outrider models``: what is on this machine, what is known, and what works here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from outrider.cli.common import JsonFile, command, human, write_json

if TYPE_CHECKING:
    from outrider.models.locations import LocalModel

__all__ = ["models"]


@command
def models(
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove the packed weights that are kept for faster loading, and end.")
    ] = False,
    json: JsonFile = None,
) -> None:
    """List the models on this machine, and every kind of target, drafter, policy and backend with what is missing.

    Models: SmolLM2, the embedded ones, and the GGUF files that Ollama and LM Studio keep here; `--model` takes their
    names. Quantised weights are kept packed, within OUTRIDER_CACHE_LIMIT (8G by default; 0 keeps none).

    [bold]Examples[/bold]

    [cyan]outrider models[/cyan]

    [cyan]outrider models --json - | jq .models[/cyan]

    [cyan]outrider models --prune[/cyan]
    """
    from outrider.backends import packed_weights
    from outrider.models.locations import list_local_models

    console = human(json)
    if prune:
        freed = packed_weights.prune()
        console.print(f"{_size(freed)} of packed weights removed")
        write_json(json, {"freed_bytes": freed})
        return
    local = list_local_models()
    embedded, instruction_sets = _embedded(), _instruction_sets()
    catalogues = _catalogues()
    if instruction_sets is None:
        catalogues["backend"]["native"] = "the native core is not built"
    files, size = packed_weights.stored()
    limit = packed_weights.cache_limit()
    console.print(_local_table(local))
    console.print(_embedded_table(embedded))
    console.print(_catalogue_table(catalogues))
    console.print(f"native core: {', '.join(instruction_sets or ()) or 'not built, plain PyTorch runs'}")
    console.print(
        f"packed weights kept: {_size(size)} of at most {_size(limit)} in {files} files (--prune removes them)"
    )
    native = {"built": instruction_sets is not None, "instruction_sets": instruction_sets or []}
    packed = {"files": files, "bytes": size, "limit_bytes": limit}
    found = {"models": [_record(one) for one in local], "embedded": embedded, "catalogues": catalogues}
    write_json(json, {**found, "native": native, "packed_weights": packed})


def _record(model: LocalModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "path": None if model.path is None else str(model.path),
        "bytes": model.bytes,
        "architecture": model.architecture,
        "quantisation": model.quantisation,
        "runs": model.runs,
        "problem": model.problem,
    }


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _local_table(models: list[LocalModel]) -> Table:
    table = Table(title="models on this machine")
    table.add_column("name", overflow="fold")
    for name in ("size", "type", "architecture"):
        table.add_column(name, no_wrap=True)
    table.add_column("runs", overflow="fold")
    for model in models:
        size = _size(model.bytes) if model.bytes else "-"
        runs = "yes" if model.runs else f"no: {model.problem}"
        table.add_row(*map(Text, (model.name, size, model.quantisation or "-", model.architecture or "-", runs)))
    return table


def _embedded() -> list[dict[str, Any]]:
    """Facts of the packaged models, from the card that their recipe wrote."""
    from outrider.files import read_json
    from outrider.models.locations import EMBEDDED, resolve_model

    rows = []
    for name, part in EMBEDDED.items():
        folder = resolve_model(name)
        card = read_json(folder.parent / "facts.json")
        if part not in card:  # a drafter for another target, of which the card says nothing
            continue
        facts = card[part]
        measured = {key: facts[key] for key in ("held_out_loss", "acceptance_length") if key in facts}
        rows.append(
            {
                "name": name,
                "parameters": facts["parameters"],
                "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
                "tokens_seen": facts["tokens_seen"],
                "licence": card.get("licence", "Apache-2.0"),
                "domains": sorted({domain for figures in measured.values() for domain in figures}),
                **measured,
            }
        )
    return rows


def _catalogues() -> dict[str, dict[str, str | None]]:
    """Catalogue -> name -> why it cannot be used here, None where it can."""
    from outrider import registry

    def missing(catalogue: str, name: str) -> str | None:
        try:
            registry.find(catalogue, name)
        except Exception as error:  # an outside package may fail in any way of its own
            return str(error)
        return None

    kinds = ("target", "drafter", "policy", "backend", "kv_cache")
    return {kind: {name: missing(kind, name) for name in registry.names(kind)} for kind in kinds}


def _instruction_sets() -> list[str] | None:
    """Those the compiled core can use here, best first; None where it was not built."""
    from importlib import import_module

    try:
        return list(import_module("outrider._native").instruction_sets())
    except ImportError:
        return None


def _embedded_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="embedded models")
    for name in ("name", "parameters", "MB", "tokens seen"):
        table.add_column(name, no_wrap=True)
    for name in ("licence", "on held-out text"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['tokens_seen']:,}",
            row["licence"],
            _told(row),
        )
    return table


def _told(row: dict[str, Any]) -> str:
    loss = "held_out_loss" in row
    figures = row["held_out_loss"] if loss else row["acceptance_length"]
    what = "nats a token" if loss else "tokens a round"
    return ", ".join(f"{domain} {value:.2f}" for domain, value in figures.items()) + f" ({what})"


def _catalogue_table(catalogues: dict[str, dict[str, str | None]]) -> Table:
    table = Table(title="catalogues")
    for name in ("kind", "name", "here"):
        table.add_column(name)
    for kind, entries in catalogues.items():
        for name, missing in entries.items():
            table.add_row(kind, name, "yes" if missing is None else f"no: {missing}")
    return table
