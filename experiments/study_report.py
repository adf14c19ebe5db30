"""Tables and diagrams of the study, as ``study.py report`` writes them into a page.

A page has a pair of lines for each table, ``<!-- study: NAME -->`` and ``<!-- end: NAME -->``; the text between them is
replaced. Diagrams go into a folder beside the page with the page's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared import table

from outrider.evaluation import plots
from outrider.files import read_json

__all__ = ["report"]

Result = dict[str, Any]
MACRO = "macro average"


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def ranged(estimate: Sequence[float | None], digits: int = 2) -> str:
    """A figure with its interval."""
    value, low, high = estimate
    return number(value, digits) + ("" if low is None else f" ({number(low, digits)} to {number(high, digits)})")


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def domains_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in dict.fromkeys(row["domain"] for row in rows) if name != MACRO]


def overall(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows over all domains."""
    several = len(domains_of(rows)) > 1
    return [row for row in rows if not several or row["domain"] == MACRO]


# ------------------------------------------------------------------------------------------------ tables


def table1(result: Result) -> str:
    rows, parts = result["rows"], []
    domains = domains_of(rows)
    for temperature in dict.fromkeys(row["temperature"] for row in rows):
        own = [one for one in result["over_seeds"] if one["temperature"] == temperature]
        lines = []
        for kind in dict.fromkeys(one["kind"] for one in own):
            of_kind = {one["domain"]: one for one in own if one["kind"] == kind}
            total = of_kind.get(MACRO) or of_kind[domains[0]]
            lengths = [number(of_kind[domain]["acceptance_length"][0]) for domain in domains]
            average, spread = total["acceptance_length"]
            lines.append(
                [kind, str(total["seeds"]), *lengths]
                + [number(average) + ("" if spread is None else f" ± {spread:.2f}"), number(total["speedup"][0])]
            )
        header = ["drafter", "seeds", *domains, "all", "speed-up"]
        parts.append(f"Acceptance length at temperature {temperature:g}:\n\n{table(header, lines)}")
    lines = [
        [one["drafter"], one["other"], f"{one['temperature']:g}", ranged(one["acceptance_length"])]
        for one in result["differences"]
    ]
    if lines:
        header = ["drafter", "less that of", "temperature", "difference (95 %)"]
        parts.append(f"Differences on the same prompts, all domains:\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def variants(*columns: str) -> Callable[[Result], str]:
    """A table of DSpark's variants, distinguished by ``columns``."""

    def make(result: Result) -> str:
        domains, lines = domains_of(result["rows"]), []
        for row in overall(result["rows"]):
            own = {one["domain"]: one for one in result["rows"] if one["drafter"] == row["drafter"]}
            cost = row["milliseconds"]
            lines.append(
                [str(row[name]) for name in columns]
                + [number(own[domain]["acceptance_length"][0]) for domain in domains]
                + [ranged(row["acceptance_length"]), number(row["speedup"][0])]
                + [number(cost["draft"]), number(cost["verify"])]
            )
        header = [*columns, *domains, "all (95 %)", "speed-up", "draft ms", "verify ms"]
        return "Acceptance length at temperature 1, and a round's time:\n\n" + table(header, lines)

    return make


def thresholds(result: Result) -> str:
    lines = [
        [f"{one['threshold']:g}", ranged(one["acceptance_length"])]
        + [percent(one["acceptance_rate"][0]), percent(one["verify_rate"][0]), ranged(one["speedup"])]
        for one in result["rows"]
    ]
    lines = [
        ["none", ranged(one["acceptance_length"]), percent(one["acceptance_rate"][0]), "100%", ranged(one["speedup"])]
        for one in result["full"]
    ] + lines
    header = ["threshold", "acceptance length", "accepted / verified", "verified / drafted", "speed-up"]
    prompts = result["full"][0]["prompts"] if result["full"] else 0
    return f"{prompts} prompts, temperature 1; in brackets 95 %.\n\n{table(header, lines)}"


def reliability(result: Result) -> str:
    lines = []
    for one in result["rows"]:
        before, after = one["pooled_before"], one["pooled_after"]
        lines.append(
            [f"{one['temperature']:g}", str(one["fitted_on"]), str(before["rounds"])]
            + [f"{x['ece']:.1%}" for x in (before, after)]
            + [f"{after['ece_of_chance']:.1%}", number(before["auc"], 3), number(before["brier"], 3)]
            + [number(after["brier"], 3)]
        )
    header = ["temperature", "rounds fitted on", "survivals measured", "ECE raw", "ECE with STS", "by chance"]
    parts = [table([*header, "AUC", "Brier raw", "with STS"], lines)]
    lines = [
        [f"{one['temperature']:g}", when, *(f"{position['ece']:.1%}" for position in one[key])]
        for one in result["rows"]
        for when, key in (("raw", "before"), ("with STS", "after"))
    ]
    width = max(len(line) for line in lines) - 2
    lines = [line + [""] * (width + 2 - len(line)) for line in lines]
    header = ["temperature", "", *(f"position {j + 1}" for j in range(width))]
    parts.append(f"ECE of the survival at each position:\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def efficiency(result: Result) -> str:
    domains, lines = domains_of(result["rows"]), []
    for row in overall(result["rows"]):
        own = {one["domain"]: one for one in result["rows"] if one["drafter"] == row["drafter"]}
        lengths = [number(own[domain]["acceptance_length"][0]) for domain in domains]
        lines.append([str(row["texts"]), *lengths, ranged(row["acceptance_length"])])
    steps = result["settings"]["steps"]
    parts = [f"{steps} steps each:\n\n{table(['different texts', *domains, 'all (95 %)'], lines)}"]
    lines = [
        [name, ", ".join(f"{step * result['batch']:,}: {length:.2f}" for step, length in points)]
        for name, points in result["growth"].items()
    ]
    if lines:
        parts.append(f"Along the runs, few prompts:\n\n{table(['run', 'texts seen: acceptance length'], lines)}")
    return "\n\n".join(parts)


def signals(result: Result) -> str:
    rounds, rows = result["rounds"], result["rows"]
    counts = (
        f"{result['prompts']} prompts; {rounds['fitting']:,} rounds fitted on, {rounds['measured']:,} measured "
        f"({result['places']:,} drafts were reached). In brackets 95 %, from drawing prompts again."
    )
    parts = [counts]
    lines = [
        [one["signal"], *(ranged(one[name], 3) for name in ("auc", "auc_first", "auc_within", "survival_auc"))]
        for one in rows
        if one["treatment"] == "raw"
    ]
    header = ["signal (raw)", "AUC where reached", "first position", "within positions", "survivals"]
    parts.append(f"How well it ranks:\n\n{table(header, lines)}")
    lines = [[one["signal"], ranged(one["auc"], 3)] for one in result["differences"]]
    parts.append(f"AUC where reached, less the head's:\n\n{table(['signal', 'difference (95 %)'], lines)}")
    treatments = list(dict.fromkeys(one["treatment"] for one in rows))
    by = {(one["signal"], one["treatment"]): one for one in rows}
    names = dict.fromkeys(one["signal"] for one in rows)
    for name, title in (("ece", "confidences where reached"), ("survival_ece", "survivals")):
        lines = [
            [signal, *(" / ".join(f"{x:.1%}" for x in by[signal, t][name]) for t in treatments)] for signal in names
        ]
        parts.append(
            f"Calibration error of {title} / what chance explains of it:\n\n{table(['signal', *treatments], lines)}"
        )
    blind = [[f"none, {one['drafts']} drafts", "", "", *_simulated(one)] for one in result["blind"]]
    header = ["signal", "", "threshold", "acceptance length", "accepted / verified", "verified / drafted", "speed-up"]
    titles = {
        "half": "cut at the first confidence under the threshold that verifies half of the drafts",
        "half by survival": "cut at the first survival under the threshold that verifies half of the drafts",
        "best": "cut at the first confidence under the threshold of the largest speed-up",
    }
    for chosen, title in titles.items():
        lines = blind + [
            [one["signal"], one["treatment"], f"{one['threshold']:.3g}", *_simulated(one)]
            for one in result["simulated"]
            if one["chosen"] == chosen
        ]
        parts.append(
            f"Simulated from the recorded rounds, {title} (found on the other half):\n\n{table(header, lines)}"
        )
    costs = result["costs"]
    verify = ", ".join(f"{1e3 * x:.2f}" for x in costs["verify"])
    parts.append(
        f"Milliseconds that it counts with, measured: a plain step {1e3 * costs['plain']:.2f}, a draft "
        f"{1e3 * costs['draft']:.2f}, the rest of a round {1e3 * costs['bookkeeping']:.2f}, verifying 1, 2, ... tokens "
        f"{verify}."
    )
    lines = [
        [one["label"], "" if one["threshold"] is None else f"{one['threshold']:.3g}", ranged(one["acceptance_length"])]
        + [percent(one["acceptance_rate"][0]), percent(one["verify_rate"][0]), ranged(one["speedup"])]
        for one in result["realised"]
    ]
    header = ["signal", *header[2:]]
    text = f"Really decoded under the `threshold` policy, {result['realised'][0]['prompts']} prompts:"
    parts.append(f"{text}\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def _simulated(one: Mapping[str, Any]) -> list[str]:
    return [
        number(one["acceptance_length"]),
        percent(one["acceptance_rate"]),
        percent(one["verify_rate"]),
        number(one["speedup"]),
    ]


TABLES: dict[str, Callable[[Result], str]] = {
    "table1": table1,
    "depth": variants("layers"),
    "blocks": variants("block"),
    "heads": variants("head"),
    "thresholds": thresholds,
    "reliability": reliability,
    "efficiency": efficiency,
    "signals": signals,
}


# ------------------------------------------------------------------------------------------------ diagrams


def draw(name: str, result: Result, folder: Path) -> Path | None:
    """The diagram of a table that has one; None without matplotlib."""
    if not plots.available():
        return None
    path, rows = folder / f"{name}.png", result["rows"]
    if name in ("table1", "depth", "blocks", "heads", "efficiency"):
        panels: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            if not row.get("seed"):
                title = f"{row['domain']}, temperature {row['temperature']:g}"
                reached = [(share, share, share) for share in row["conditional"] if share is not None]
                panels.setdefault(title, {})[row["drafter"]] = reached
        plots.draw_positions({k: v for k, v in panels.items() if MACRO in k or len(panels) == 1}, path)
    elif name == "thresholds":
        points = [{k: v[0] if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        keys = ("threshold", "acceptance_length", "acceptance_rate", "verify_rate", "speedup")
        plots.draw_sweep({"temperature 1": {"dspark": {k: [p[k] for p in points] for k in keys}}}, path)
    elif name == "reliability":
        plots.draw_reliability({f"temperature {row['temperature']:g}": row["curves"] for row in rows}, path)
    else:
        return None
    return path


# ------------------------------------------------------------------------------------------------ the page


def where(result: Result) -> str:
    """Machine, versions and command."""
    machine, versions = result["machine"], result["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "outrider") if name in versions)
    return f"{machine['cpu']}, {machine['threads']} threads; {shown}.\n\n    {result['command']}"


def section(name: str, results: Path, pictures: Path, beside: Path) -> str:
    file = results / f"{name}.json"
    if not file.exists():
        return f"Not measured yet: `python experiments/study.py {name} --answers runs/embedded-answers/regenerate`."
    result = read_json(file)
    parts = [TABLES[name](result), where(result)]
    picture = draw(name, result, pictures)
    if picture is not None:
        parts.insert(1, f"![{name}]({picture.relative_to(beside).as_posix()})")
    return "\n\n".join(parts)


def report(results: Path, into: Path | None) -> None:
    """Print every table, or write them between their lines in a page. Raises SystemExit where the page lacks one."""
    if into is None:
        for name in TABLES:
            if (results / f"{name}.json").exists():
                print(f"## {name}\n\n{TABLES[name](read_json(results / f'{name}.json'))}\n")
        return
    page = into.read_text(encoding="utf-8")
    for name in TABLES:
        text = section(name, results, into.with_suffix(""), into.parent)
        begin, end = f"<!-- study: {name} -->", f"<!-- end: {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(page):
            raise SystemExit(f"{into} has no lines {begin} and {end}")
        page = pattern.sub(lambda _, own=f"{begin}\n\n{text}\n\n{end}": own, page)  # type: ignore[misc]
    into.write_text(page, encoding="utf-8")
