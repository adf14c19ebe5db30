"""Regret of the default policy on recorded costs: its tokens per second over those of the best fixed draft length.

    python benchmarks/regret.py record --target smollm2 --drafter dspark --out FILE [--concurrency 1 4 16 64]
    python benchmarks/regret.py replay FILE... [--seconds 60] [--json FILE]

record: as in ``simulated.py``, arms take turns on this machine; what is kept is the cost table, the costs observed at
each concurrency, the drafter's rounds with all drafts verified, sizes of requests, and how much slower than its mean
the machine was in which second. replay: plain decoding, every fixed length and the default policy (guarded, with its
own bookkeeping) meet the same requests, rounds and seconds in the simulation. Nothing is measured, and the same file
gives the same figures everywhere.
"""

from __future__ import annotations

import argparse
import json
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from live import DRAFTS, Setting, Window, set_up
from simulated import (
    Observed,
    feature_share_of,
    observed,
    pass_of,
    policy_for,
    sizes_of,
    warm_arms,
    whole_rounds,
    without_features,
)
from support import add_json, facts, say, table, write_json

from outrider.planning.simulated_drafts import Recorded
from outrider.planning.simulation import Traffic, simulate
from outrider.scheduling.costs import CostTable

ARMS = ("none", *(f"fixed:{k}" for k in range(1, DRAFTS + 1)), "auto")
GOAL = 0.98
SEEDS = 3


# ------------------------------------------------------------------------------------------------ recording


@dataclass(frozen=True)
class Recording:
    """One concurrency."""

    concurrency: int
    costs: Mapping[str, Observed]
    """Of fixed drafts and of the default policy, which differ in bookkeeping."""
    rounds: list[list[tuple[list[float], int]]]
    """[requests, rounds]: confidences of all drafts, and how many were accepted."""
    sizes: list[tuple[int, int, int]]
    """Tokens of prompt and answer, and of the prompt those that the cache held."""
    slowness: list[tuple[float, float]]
    """(seconds, factor), in order: for so long steps took so many times their mean."""


def recorded(setting: Setting, concurrency: int, options: argparse.Namespace) -> Recording:
    """Arms in short turns on this machine."""
    clients, seen, measured = warm_arms(ARMS, setting, concurrency)
    for watch in seen.values():
        watch.on = True
    windows: dict[str, list[Window]] = {name: [] for name in ARMS}
    order, turns = random.Random(concurrency), []
    for _ in range(round(options.duration / options.seconds / len(ARMS))):
        for name in order.sample(ARMS, len(ARMS)):
            before = len(seen[name].steps)
            windows[name].append(clients[name].run(options.seconds, concurrency))
            turns.append((name, before, len(seen[name].steps)))
    features = feature_share_of(setting, clients)
    arms = (f"fixed:{DRAFTS}", "auto")
    costs = {name: observed(name, setting, measured, clients, seen, windows, features) for name in arms}
    known, took, expected = costs["auto"], [], []
    for name, start, end in turns:
        watch = seen[name]
        for (cost, limit, _), prompts in zip(watch.steps[start:end], watch.prompts[start:end], strict=True):
            took.append(without_features(cost, features).verify + cost.draft)
            expected.append(known.read(prompts, *pass_of(cost)) + known.draft(cost.rows, limit))
    mean = sum(took) / sum(expected)
    return Recording(
        concurrency,
        costs,
        [[(list(said), n) for said, n in some] for some in whole_rounds(seen[f"fixed:{DRAFTS}"])],
        sizes_of(clients),
        [(round(a, 6), round(a / b / mean, 3)) for a, b in zip(took, expected, strict=True)],
    )


def to_json(recording: Recording) -> dict[str, Any]:
    found = asdict(recording)
    for name, costs in recording.costs.items():
        found["costs"][name]["table"] = costs.table.to_json()
    found["rounds"] = [[([round(value, 3) for value in said], n) for said, n in some] for some in recording.rounds]
    return found


def from_json(found: Mapping[str, Any]) -> Recording:
    costs = {}
    for name, one in found["costs"].items():
        points = {key: {int(k): v for k, v in one[key].items()} for key in ("factors", "drafts")}
        costs[name] = Observed(**{**one, **points, "table": CostTable.from_json(one["table"])})
    sizes = [tuple(size) for size in found["sizes"]]
    return Recording(found["concurrency"], costs, found["rounds"], sizes, found["slowness"])  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ replaying


def replay(name: str, recording: Recording, seconds: float, seed: int) -> float:
    """Tokens per second of an arm."""
    costs = recording.costs["auto" if name == "auto" else f"fixed:{DRAFTS}"]
    policy = policy_for(name, costs)
    many = recording.concurrency
    traffic = Traffic(many, sizes=tuple(recording.sizes), temperature=1.0)
    rounds = Recorded(recording.rounds)
    slowness = by_second(recording.slowness)
    return simulate(
        policy, costs, rounds, traffic, seconds=seconds, max_rows=many, seed=seed, slowness=slowness
    ).tokens_per_second


def by_second(turns: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """The factor at a time of the simulation; after its end the recording begins again."""
    ends = list(accumulate(seconds for seconds, _ in turns))
    return lambda now: turns[min(len(turns) - 1, bisect_right(ends, now % ends[-1]))][1]


def compare(recording: Recording, seconds: float) -> dict[str, Any]:
    """All arms, over the same seeds."""
    speeds = {name: fmean(replay(name, recording, seconds, seed) for seed in range(SEEDS)) for name in ARMS}
    best = max((name for name in ARMS if name != "auto"), key=speeds.__getitem__)
    return {
        "concurrency": recording.concurrency,
        "tokens_per_second": {name: round(speed, 2) for name, speed in speeds.items()},
        "best": best,
        "over_best": round(speeds["auto"] / speeds[best], 4),
        "over_none": round(speeds["auto"] / speeds["none"], 4),
    }


# ------------------------------------------------------------------------------------------------ command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    record, again = commands.add_parser("record"), commands.add_parser("replay")
    record.add_argument("--target", default="embedded")
    record.add_argument("--drafter", default="draft_model", help="any, or synthetic")
    record.add_argument("--dtype", default="auto")
    record.add_argument("--prompts", nargs="*", type=Path)
    record.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    record.add_argument("--duration", type=float, default=40.0, help="seconds of a concurrency, over all arms")
    record.add_argument("--seconds", type=float, default=0.5, help="of a turn")
    record.add_argument("--out", type=Path, required=True)
    again.add_argument("files", type=Path, nargs="+")
    again.add_argument("--seconds", type=float, default=60.0, help="of virtual time")
    add_json(again)
    options = parser.parse_args()
    if options.command == "record":
        setting = set_up(options, max(options.concurrency))
        recordings = []
        for many in options.concurrency:
            say(f"{many} requests")
            recordings.append(to_json(recorded(setting, many, options)))
            options.out.write_text(json.dumps({**setting.about, **facts(), "recordings": recordings}) + "\n")
        return
    rows = []
    for file in options.files:
        found = json.loads(file.read_text())
        for one in found["recordings"]:
            row = {"target": found["target"], "drafter": found["drafter"]} | compare(from_json(one), options.seconds)
            say(str(row))
            rows.append(row)
    print(shown(rows))
    write_json(options.json, {**facts(), "regret": rows})


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["target", "drafter", "requests", "none", "best", "its", "auto", "auto / best", "auto / none"]
    lines = []
    for row in rows:
        speeds = row["tokens_per_second"]
        ratio = f"{row['over_best']:.3f}"
        lines.append(
            [
                row["target"],
                row["drafter"],
                row["concurrency"],
                f"{speeds['none']:.0f}",
                row["best"],
                f"{speeds[row['best']]:.0f}",
                f"{speeds['auto']:.0f}",
                ratio if row["over_best"] >= GOAL else f"**{ratio}**",
                f"{row['over_none']:.3f}",
            ]
        )
    return table(header, lines)


if __name__ == "__main__":
    main()
