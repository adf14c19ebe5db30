"""The command line: one file for each command, imported when the command is used."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from outrider.cli.command import CutHelp, flowing, make_command
from outrider.version import __version__

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = {  # in the order of the help
    "demo": "outrider.cli.demo:demo",
    "generate": "outrider.cli.generate:generate",
    "chat": "outrider.cli.chat:chat",
    "serve": "outrider.cli.serve:serve",
    "bench": "outrider.cli.bench:bench",
    "profile": "outrider.cli.profile:profile",
    "simulate": "outrider.cli.simulate:simulate",
    "plan": "outrider.cli.plan:plan",
    "models": "outrider.cli.models:models",
    "doctor": "outrider.cli.doctor:doctor",
    "convert": "outrider.cli.convert:convert",
    "export": "outrider.cli.export:export",
    "train": "outrider.cli.train:app",
    "calibrate": "outrider.cli.calibrate:calibrate",
    "eval": "outrider.cli.eval:evaluate",
    "audit": "outrider.cli.audit:audit",
}


class _OnUse(Mapping[str, Any]):
    """``COMMANDS`` with each command made when it is looked up, so that none waits for the imports of another."""

    def __getitem__(self, name: str) -> Any:
        module, _, function = COMMANDS[name].partition(":")
        found = getattr(import_module(module), function)
        if isinstance(found, typer.Typer):  # a group of its own
            return typer.main.get_group(found)
        return make_command(name, found)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Catalogue(CutHelp, TyperGroup):
    """The group of all commands."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.help = flowing(self.help)
        self.commands = _OnUse()  # type: ignore[assignment]  # it is only ever read


app = typer.Typer(
    cls=_Catalogue,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"outrider {__version__}")
        raise typer.Exit


@app.callback()
def outrider(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Lossless speculative decoding: the text the target model alone would have written, sooner.

    Begin with [bold]outrider demo[/bold]; it needs no model and no network. Every command explains itself with
    [bold]--help[/bold].
    """


def main() -> None:
    """The ``outrider`` command."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed: what is read is empty, what is written is lost
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # as long as the process
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character gets its number, not a crash
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, TextIOWrapper):  # bytes that are not UTF-8 are text too, as in prompts read from files
        sys.stdin.reconfigure(errors="surrogateescape")
    app()
