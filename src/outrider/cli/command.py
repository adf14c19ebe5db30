"""Typer commands from plain functions, made when they are looked up."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperCommand

__all__ = ["CutHelp", "flowing", "make_command"]


SAME = {"--model": "--target", "--target": "--model"}
"""The target by its name in other commands."""


class CutHelp:
    """A command or group whose help may be read in part, as by ``head``: no error."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        try:
            super().format_help(ctx, formatter)  # type: ignore[misc]
        except SystemExit:  # rich's, as the pipe is closed
            raise SystemExit(0) from None


class _Command(CutHelp, TyperCommand):
    """A command whose ``--json`` may stand alone, last or before another option: it then prints, as ``--json -``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        filled: list[str] = []
        for arg, following in pairwise([*args[:end], "--"]):
            alone = arg == "--json" and following.startswith("-") and following != "-"
            filled += [arg, "-"] if alone else [arg]
        try:
            return super().parse_args(ctx, filled + args[end:])
        except Exception as error:
            same = SAME.get(getattr(error, "option_name", ""))
            if hasattr(error, "possibilities") and any(same in parameter.opts for parameter in self.params):
                error.possibilities = [same]  # of an unknown option; typer names those that are spelt alike
            raise


def flowing(text: str | None) -> str:
    """A docstring with each paragraph in one line, so that the terminal's width alone decides where lines break."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text or "").split("\n\n"))


def make_command(name: str, function: Callable[..., Any]) -> Any:
    single = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    single.command(name, cls=_Command, help=flowing(function.__doc__))(function)
    return typer.main.get_command(single)
