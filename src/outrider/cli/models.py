"""``outrider models``: what is embedded, what is known, and what works on this machine."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from outrider.cli.common import JsonFile, command, human, write_json

__all__ = ["models"]


@command
def models(json: JsonFile = None) -> None:
    """List the embedded models, and every kind of target, drafter, policy and backend with what is missing for it.

    [bold]Examples[/bold]

    [cyan]outrider models[/cyan]

    [cyan]outrider models --json - | jq .embedded[/cyan]
    """
    embedded, instruction_sets = _embedded(), _instruction_sets()
    catalogues = _catalogues()
    if instruction_sets is None:
        catalogues["backend"]["native"] = "the native core is not built"
    console = human(json)
    console.print(_embedded_table(embedded))
    console.print(_catalogue_table(catalogues))
    console.print(f"native core: {', '.join(instruction_sets or ()) or 'not built, plain PyTorch runs'}")
    native = {"built": instruction_sets is not None, "instruction_sets": instruction_sets or []}
    write_json(json, {"embedded": embedded, "catalogues": catalogues, "native": native})


def _embedded() -> list[dict[str, Any]]:
    """Facts of the packaged models, from the card that their recipe wrote."""
    from outrider.files import read_json
    from outrider.models.locations import EMBEDDED, resolve_model

    rows = []
    for name, part in EMBEDDED.items():
        folder = resolve_model(name)
        card = read_json(folder.parent / "facts.json")
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
