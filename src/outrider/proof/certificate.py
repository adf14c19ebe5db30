"""What an audit found: checks in tiers, written as JSON, Markdown and HTML."""

from __future__ import annotations

import html
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import Any

from outrider.evaluation.speedup import machine
from outrider.version import __version__

__all__ = ["Certificate", "Check", "Tier", "run_tier", "versions"]


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    passed: bool
    found: str
    """What was found, in a few words."""
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "passed": self.passed, "found": self.found, **self.figures}


@dataclass(frozen=True)
class Tier:
    """Checks of one method."""

    name: str
    method: str
    """How it is checked, with error rates and tolerances."""
    checks: tuple[Check, ...]
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "tier": self.name,
            "verdict": _word(self.passed),
            "method": self.method,
            "seconds": round(self.seconds, 2),
            **self.figures,
            "checks": [check.to_json() for check in self.checks],
        }


def run_tier(
    name: str,
    method: str,
    checks: Iterable[Check],
    progress: Callable[[str], None] = lambda text: None,
    figures: dict[str, Any] | None = None,
) -> Tier:
    """Run checks that are made one after the other."""
    began, done = perf_counter(), []
    for check in checks:
        done.append(check)
        if not check.passed:
            progress(f"{name}: {check.name}: FAILED, {check.found}")
    tier = Tier(name, method, tuple(done), perf_counter() - began, figures or {})
    progress(f"{name}: {len(done)} checks, {_word(tier.passed)}, {tier.seconds:.1f} s")
    return tier


@dataclass(frozen=True)
class Certificate:
    """The result of an audit."""

    subject: dict[str, Any]
    """What was audited: model, drafters, policies, or a server's address."""
    tiers: tuple[Tier, ...]
    made: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def passed(self) -> bool:
        return bool(self.tiers) and all(tier.passed for tier in self.tiers)

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": _word(self.passed),
            "subject": self.subject,
            "made": self.made,
            "versions": versions(),
            "machine": machine(),
            "tiers": [tier.to_json() for tier in self.tiers],
        }

    def to_markdown(self) -> str:
        """A page for people: a summary, then each tier with its checks."""
        facts = self.to_json()
        lines = [f"# Losslessness certificate: {facts['verdict']}", ""]
        lines += _table(["", ""], [[name, _text(value)] for name, value in self._facts()])
        lines += _table(
            ["tier", "result", "checks", "failed", "seconds"],
            [
                [t.name, _word(t.passed), len(t.checks), sum(not c.passed for c in t.checks), f"{t.seconds:.1f}"]
                for t in self.tiers
            ],
        )
        for tier in self.tiers:
            lines += [f"## {tier.name}", "", tier.method, ""]
            rows = [[c.name, "pass" if c.passed else "**fail**", c.found] for c in tier.checks]
            lines += _table(["check", "result", "found"], rows)
        return "\n".join(lines)

    def to_html(self) -> str:
        """The same as one page without references to anything else."""
        parts = [_row("th", ["", ""]), *(_row("td", [name, _text(value)]) for name, value in self._facts())]
        body = [f"<h1>Losslessness certificate: {_word(self.passed)}</h1><table>{''.join(parts)}</table>"]
        for tier in self.tiers:
            rows = [_row("td", [c.name, _word(c.passed), c.found], _word(c.passed)) for c in tier.checks]
            body.append(
                f"<h2>{html.escape(tier.name)}: {_word(tier.passed)}</h2><p>{html.escape(tier.method)}</p>"
                f"<table>{_row('th', ['check', 'result', 'found'])}{''.join(rows)}</table>"
            )
        return (
            "<!doctype html><meta charset=utf-8><title>Losslessness certificate</title><style>body{font:15px/1.5 "
            "sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}td,th{"
            "border:1px solid #ccc;padding:.2rem .6rem;text-align:left}tr.fail{background:#fdd}</style>"
            + "".join(body)
            + "\n"
        )

    def _facts(self) -> list[tuple[str, Any]]:
        computer = machine()
        return [
            *self.subject.items(),
            ("made", self.made),
            ("versions", versions()),
            ("machine", f"{computer['cpu']}, {computer['cores']} cores"),
        ]


def versions() -> dict[str, str]:
    """Of Outrider and what its results depend on."""
    found = {"outrider": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _word(passed: bool) -> str:
    return "pass" if passed else "fail"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *map(line, rows), ""]


def _row(tag: str, cells: Iterable[Any], css: str = "") -> str:
    inner = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
    return f"<tr class={css}>{inner}</tr>" if css else f"<tr>{inner}</tr>"
