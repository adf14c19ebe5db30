"""``outrider models``: what is embedded, what is known, and what works on this machine."""

from __future__ import annotations

from pathlib import Path
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
    found = {"embedded": _embedded(), "catalogues": _catalogues(), "native": _native()}
    console = human(json)
    table = Table(title="embedded models")
    for name in ("name", "parameters", "MB", "tokens seen", "licence"):
        table.add_column(name)
    table.add_column("held-out loss, nats a token")
    for model in found["embedded"]:
        losses = ", ".join(f"{domain} {loss:.2f}" for domain, loss in model["held_out_loss"].items())
        table.add_row(
            model["name"],
            f"{model['parameters']:,}",
            f"{model['bytes'] / 1e6:.1f}",
            f"{model['tokens_seen']:,}",
            model["licence"],
            losses,
        )
    console.print(table)
    kinds = Table(title="catalogues")
    for name in ("kind", "name", "here"):
        kinds.add_column(name)
    for catalogue, entries in found["catalogues"].items():
        for name, missing in entries.items():
            kinds.add_row(catalogue, name, "yes" if missing is None else f"no: {missing}")
    console.print(kinds)
    native = found["native"]
    console.print(
        f"native core: {native['instruction_set']}" if native["built"] else "native core: not built, plain PyTorch runs"
    )
    write_json(json, found)


def _embedded() -> list[dict[str, Any]]:
    """Facts of the packaged models, from the card that their recipe wrote."""
    from outrider.weights import EMBEDDED, read_json, resolve_model

    folder = Path(str(resolve_model("embedded"))).parent
    card = read_json(folder / "facts.json") if (folder / "facts.json").is_file() else {}
    rows = []
    for name, part in EMBEDDED.items():
        files = [file for file in (folder / part).iterdir() if file.suffix == ".safetensors"]
        facts = card.get(part, {})
        rows.append(
            {
                "name": name,
                "parameters": facts.get("parameters", 0),
                "bytes": sum(file.stat().st_size for file in files),
                "tokens_seen": facts.get("tokens_seen", 0),
                "licence": card.get("licence", "see MODEL_CARD.md"),
                "domains": sorted(facts.get("held_out_loss", {})),
                "held_out_loss": facts.get("held_out_loss", {}),
            }
        )
    return rows


def _catalogues() -> dict[str, dict[str, str | None]]:
    """Catalogue -> name -> why it cannot be used here, None where it can."""
    from outrider import registry

    found: dict[str, dict[str, str | None]] = {}
    for catalogue in ("target", "drafter", "policy", "backend"):
        found[catalogue] = {}
        for name in registry.names(catalogue):
            try:
                registry.find(catalogue, name)
                missing = None
            except Exception as error:  # an outside package may fail in any way of its own
                missing = str(error)
            found[catalogue][name] = missing
    if not _native()["built"] and "native" in found["backend"]:
        found["backend"]["native"] = "the native core is not built"
    return found


def _native() -> dict[str, Any]:
    """Whether the compiled core is there, and the instruction set it chose."""
    try:
        from outrider import _native  # type: ignore[attr-defined]
    except ImportError:
        return {"built": False, "instruction_set": None}
    return {"built": True, "instruction_set": _native.isa()}
