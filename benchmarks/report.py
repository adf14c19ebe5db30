"""Write the tables of ``docs/benchmarks.md`` from the JSON files of the benchmark scripts.

    python benchmarks/report.py benchmarks/results/*.json --into docs/benchmarks.md

Everything after the marker line of that page is replaced; without ``--into`` the tables are printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import interval_text, table

MARKER = "<!-- Below: written by benchmarks/report.py from benchmarks/results. -->"
Result = dict[str, Any]


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def profile(result: Result) -> tuple[str, str, str]:
    ratios = {key(row): row for row in result["ratio_to_one"]}
    rows = [
        [
            row["dtype"],
            row["context"],
            row["rows"],
            row["new_tokens"],
            f"{row['milliseconds']:.2f}",
            f"{ratios[key(row)]['ratio']:.2f}",
            percent(row["bandwidth_share"]),
        ]
        for row in result["rows"]
    ]
    header = ["dtype", "context", "rows", "new tokens each", "ms", "over one token", "bandwidth"]
    pairs = result["ratio_to_one"][0]["pairs"]
    text = f"Read bandwidth {result['bandwidth_gb_s']} GB/s in the same rounds; medians of {pairs} interleaved rounds."
    contexts = ", ".join(str(context) for context in dict.fromkeys(row["context"] for row in result["rows"]))
    return f"`outrider profile`, {result['model']}, context {contexts}", text, table(header, rows)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("dtype", "new_tokens", "rows", "context"))


def passes(result: Result) -> tuple[str, str, str]:
    rows = [
        [
            row["contender"],
            row["new_tokens"],
            f"{row['milliseconds']:.2f}",
            f"{row['ratio_to_one']:.2f}",
            percent(row["bandwidth_share"]),
            f"{row['outrider_is_faster_by']:.2f}",
        ]
        for row in result["rows"]
    ]
    header = ["contender", "new tokens", "ms", "over one token", "bandwidth", "times Outrider's"]
    title = f"One pass: {result['shape']}, {result['dtype']}, context {result['context']}"
    return title, f"Read bandwidth {result['bandwidth_gb_s']} GB/s in the same rounds.", table(header, rows)


def peers(result: Result) -> tuple[str, str, str]:
    bases = {name: f"over_{name}_plain" for name in ("llama_cpp", "transformers", "vllm")}
    bases = {name: key for name, key in bases.items() if any(key in row for row in result["rows"])}
    rows = [
        [
            row["contender"],
            f"{row['tokens_per_second']:.0f}",
            *(f"{row[key]:.2f} ({interval_text(row[f'{key}_ci95'])})" if key in row else "" for key in bases.values()),
            percent(row["same_text_as_outrider_plain"]),
            percent(row.get("repeated_8grams")),
        ]
        for row in result["rows"]
    ]
    header = ["contender", "tokens/s", *(f"over {name.replace('_', '.')} plain (95 %)" for name in bases)]
    header += ["same text", "repeats"]
    prompts = ", ".join(f"{count} {name}" for name, count in result["prompts"].items())
    text = f"Prompts: {prompts}. Best settings: {', '.join(result['best'].values())}."
    if "best_over_best_llama_cpp" in result:
        best = result["best_over_best_llama_cpp"]
        text += f" Outrider's best over llama.cpp's best: {best['ratio']:.2f} (95 %: {interval_text(best['ci95'])})."
    others = [family for family in result["best"] if family != "outrider"]
    against = others[0] if len(others) == 1 else "peers"
    return f"Whole answers against {against}, {result['rows'][0]['dtype']}", text, table(header, rows)


def kernels(result: Result) -> tuple[str, str, str]:
    rows = []
    for row in result["rows"]:
        times = dict(row["microseconds"])
        own, speedup = times.pop("native"), row["speedup_over_best_peer"]
        others = ", ".join(f"{name} {value:.0f}" for name, value in times.items())
        rows.append(
            [row["kernel"], row["dtype"], row["rows"], f"{own:.0f}", row["gb_s"], others]
            + ["" if speedup is None else f"{speedup:.2f}"]
        )
    header = ["kernel", "dtype", "M", "native us", "GB/s", "peers us", "speed-up over the best"]
    counts = ", ".join(str(count) for count in dict.fromkeys(row["rows"] for row in result["rows"]))
    return f"Kernels against PyTorch and oneDNN, M = {counts}", "", table(header, rows)


def lossless(result: Result) -> tuple[str, str, str]:
    keys = ["dtype", "temperature", "drafter", "prompts", "tokens", "different", "acceptance_length"]
    header = ["dtype", "temperature", "drafter", "prompts", "tokens", "different answers", "acceptance length"]
    rows = ([f"{row[name]:g}" if name == "temperature" else row[name] for name in keys] for row in result["rows"])
    return "Differences from plain decoding", "", table(header, rows)


def bench(result: Result) -> tuple[str, str, str]:
    rows = [
        [
            row["drafter"],
            row["prompts"],
            f"{row['temperature']:g}",
            f"{row['baseline_tokens_per_second']:.0f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}",
            interval_text(row["speedup_ci95"]),
            f"{row['acceptance_length']:.2f}",
            percent(row.get("repeated_8grams")),
        ]
        for row in result["rows"]
    ]
    header = ["drafter", "prompts", "temp", "plain tok/s", "tok/s", "speed-up", "95 %", "acceptance length", "repeats"]
    return f"`outrider bench`, {result['model']}", "", table(header, rows)


def perplexity(result: Result) -> tuple[str, str, str]:
    rows = [
        [row["domain"], row["tokens"], row["dtype"], f"{row['perplexity']:.2f}", f"{row['bits_per_token']:.4f}"]
        + [f"{100 * row['change']:+.2f}", " to ".join(f"{100 * bound:+.2f}" for bound in row["change_ci95"])]
        for row in result["rows"]
    ]
    header = ["domain", "tokens", "dtype", "perplexity", "bits a token", "change, %", "95 %"]
    text = f"Held-out text in pieces of at most {result['window']} tokens."
    return f"Perplexity by dtype, {result['model']}", text, table(header, rows)


def rounds(result: Result) -> tuple[str, str, str]:
    rows = [[*list(row.values())[:-1], percent(row["share"])] for row in result["rows"]]
    header = ["target", "sampling", "drafts", "pass, us", "outside both models, us", "share"]
    return "Outside the models: rounds", "", table(header, rows)


def verification(result: Result) -> tuple[str, str, str]:
    header = ["logits", "sampling", "process, ms", "verify, ms", "both, ms"]
    title = f"Outside the models: verifying 7 drafts, vocabulary {result['vocabulary']:,}"
    return title, "", table(header, (list(row.values()) for row in result["rows"]))


def perplexity_peers(result: Result) -> tuple[str, str, str]:
    header = ["engine", "perplexity", "against llama.cpp", "standard error"]
    rows = (
        [row["engine"], f"{row['perplexity']:.2f}", *(f"{row[name]:+.2%}" if name in row else "" for name in PEER)]
        for row in result["rows"]
    )
    title = f"Perplexity of {result['model']}'s file against llama.cpp's, {result['scored_tokens']:,} tokens"
    return title, "", table(header, rows)


PEER = ("against_llama_cpp", "standard_error")
KINDS: list[tuple[set[str], Callable[[Result], tuple[str, str, str]]]] = [
    ({"milliseconds", "bandwidth_share", "rows"}, profile),
    ({"contender", "new_tokens"}, passes),
    ({"contender", "tokens_per_second"}, peers),
    ({"kernel", "microseconds"}, kernels),
    ({"different", "drafter"}, lossless),
    ({"speedup", "drafter"}, bench),
    ({"perplexity", "dtype"}, perplexity),
    ({"perplexity", "engine"}, perplexity_peers),
    ({"outside_us", "share"}, rounds),
    ({"process_ms", "verify_ms"}, verification),
]
"""Keys of a result's rows, and the function that formats such a result."""


def section(path: Path) -> str:
    result = json.loads(path.read_text())
    names = set(result["rows"][0])
    show = next((show for needed, show in KINDS if needed <= names), None)
    if show is None:
        raise SystemExit(f"{path}: these are no figures of a script here")
    title, text, figures = show(result)
    lines = [f"## {title}", text, where(result), figures]
    return "\n\n".join(line for line in lines if line) + "\n"


def where(result: Result) -> str:
    """Machine, versions and command, as far as the file has them."""
    machine = result["machine"]
    threads = machine.get("threads") or result.get("threads")
    parts = [f"{machine['cpu']}, {machine['cores']} cores" + (f", {threads} threads" if threads else "")]
    parts += [f"{name} {number}" for name, number in result.get("versions", {}).items()]
    command = f"\n\n    {result['command']}" if "command" in result else ""
    return "; ".join(parts) + "." + command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, help="a page with the marker line")
    options = parser.parse_args()
    text = "\n".join(section(path) for path in options.results)
    if options.into is None:
        print(text)
        return
    page, marker, _ = options.into.read_text().partition(MARKER)
    if not marker:
        raise SystemExit(f"{options.into} has no line {MARKER!r}")
    options.into.write_text(f"{page}{MARKER}\n\n{text}")


if __name__ == "__main__":
    main()
