"""`outrider simulate` against real runs: throughput and the 95th percentile of the time between tokens.

    python benchmarks/simulated.py --target embedded --drafter draft_model --json FILE

For each concurrency of a closed loop: a first run gives the costs of steps (the cost table that the scheduler starts
with, brought to the plain passes observed; drafting and bookkeeping as observed, and how far single passes differ) and
the drafter's rounds, all drafts verified. With these the simulation predicts each policy, which is then run.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import numpy as np
from live import DRAFTS, Client, Setting, Window, make_arm, set_up
from support import add_json, facts, say, table, write_json

from outrider.engine.cost_tables import start_costs
from outrider.engine.loader import load_policy
from outrider.planning.simulation import Recorded, Traffic, simulate
from outrider.scheduling.cost_model import CostModel
from outrider.scheduling.costs import CostTable
from outrider.types import Drafter, SchedulerPolicy, StepRecord

KNOWN = (1, 3, 7)  # drafts whose cost is measured
CALIBRATED = 4.0  # seconds of each arm of the first run


@dataclass
class Watch:
    """A ``StepObserver``: costs of steps without prompts, and rounds by request."""

    draft: list[float] = field(default_factory=list)
    bookkeeping: list[float] = field(default_factory=list)
    passes: list[tuple[float, int, int, int]] = field(default_factory=list)  # seconds, tokens, rows, context
    rounds: dict[int, list[tuple[tuple[float, ...], int]]] = field(default_factory=dict)

    def step(self, record: StepRecord) -> None:
        cost = record.cost
        rows = [row for row in record.rows if not row.first]
        if cost.tokens == sum(1 + row.verified for row in rows):
            self.draft.append(cost.draft)
            self.bookkeeping.append(cost.bookkeeping)
            self.passes.append((cost.verify, cost.tokens, cost.rows, cost.context))
        for row in rows:
            if row.drafted == row.verified == DRAFTS:
                said = row.confidence or (0.5,) * DRAFTS
                self.rounds.setdefault(row.request, []).append((said, row.accepted))


@dataclass(frozen=True)
class Observed:
    """``StepCosts`` at one concurrency."""

    table: CostTable
    factor: float
    drafts: dict[int, float]  # seconds of a proposal, by drafts
    book: tuple[float, float]  # plain, drafting

    def verify(self, tokens: int, rows: int, context: int) -> float:
        return self.factor * self.table.seconds(tokens, rows, context)

    def draft(self, rows: int, drafts: int) -> float:
        if not rows or not drafts:
            return 0.0
        return float(np.interp(drafts, list(self.drafts), list(self.drafts.values())))

    def bookkeeping(self, rows: int, drafting: bool) -> float:
        return self.book[drafting]


def calibrate(setting: Setting, concurrency: int) -> tuple[Observed, Recorded, float, tuple[tuple[int, int], ...]]:
    """Costs, rounds, the spread of passes (of the logarithm), and the sizes of requests."""
    cost = start_costs(setting.loaded.target, setting.loaded.dtype, rows=concurrency, tokens=concurrency * (DRAFTS + 1))
    watches: dict[int, Watch] = {}
    sizes: list[tuple[int, int]] = []
    for drafts in (0, *KNOWN):
        client = Client(make_arm(f"fixed:{drafts}" if drafts else "none", setting, concurrency), setting.asked)
        client.run(0.5, concurrency)
        watches[drafts] = Watch()
        client.llm.observers.append(watches[drafts])
        client.run(CALIBRATED, concurrency)
        sizes += client.finished
    plain, full = watches[0], watches[DRAFTS]
    ratios = [seconds / cost.seconds(tokens, rows, context) for seconds, tokens, rows, context in plain.passes]
    factor = fmean(ratios)
    spread = float(np.std(np.log(ratios)))
    observed = Observed(
        cost,
        factor,
        {drafts: fmean(watches[drafts].draft) for drafts in KNOWN},
        (fmean(plain.bookkeeping), fmean(full.bookkeeping)),
    )
    recorded = Recorded([rounds for rounds in full.rounds.values() if rounds])
    say(
        f"{concurrency}: table times {factor:.3f} (median {median(ratios):.3f}), spread {spread:.3f}, drafts "
        f"{observed.drafts}, bookkeeping {observed.book}, {len(recorded.requests)} requests"
    )
    return observed, recorded, spread, tuple(sizes)


def policy_for(name: str, costs: Observed, drafter: Drafter) -> SchedulerPolicy:
    """The policy that a live arm of this name has, in its first state."""
    kind, _, drafts = name.partition(":")
    if kind in ("none", "fixed"):
        return load_policy("fixed", {"draft_tokens": int(drafts or 0)}, drafter)
    return load_policy("auto", {}, drafter, CostModel(costs.table), guard=True)


def both(setting: Setting, concurrency: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every policy, run and simulated."""
    costs, acceptance, spread, sizes = calibrate(setting, concurrency)
    clients = {name: Client(make_arm(name, setting, concurrency), setting.asked) for name in options.policies}
    windows: dict[str, list[Window]] = {name: [] for name in clients}
    for client in clients.values():
        client.run(2.0, concurrency)
    order = random.Random(concurrency)
    for _ in range(options.rounds):
        for name in order.sample(list(clients), len(clients)):
            windows[name].append(clients[name].run(options.seconds, concurrency))
    rows = []
    for name, some in windows.items():
        speed = sum(w.tokens for w in some) / sum(w.seconds for w in some)
        result = simulate(
            policy_for(name, costs, clients[name].llm.drafter),
            costs,
            acceptance,
            Traffic(concurrency, sizes=sizes, temperature=1.0),
            seconds=60.0,
            max_rows=concurrency,
            noise=spread,
        )
        found = result.to_json()
        rows.append(
            {
                "policy": name,
                "concurrency": concurrency,
                "tokens_per_second": [round(speed, 2), found["tokens_per_second"]],
                "itl_p95_ms": [percentile(some), found["itl_p95_ms"]],
                "acceptance_length": [
                    round(1 + clients[name].seen.accepted / max(1, clients[name].seen.rounds), 3),
                    found["acceptance_length"],
                ],
            }
        )
        say(str(rows[-1]))
    return rows


def percentile(windows: Sequence[Window]) -> float:
    """Of milliseconds between tokens, the 95th percentile over tokens."""
    gaps = [gap for window in windows for gap in window.gaps]
    return round(1e3 * float(np.quantile(np.repeat([g for g, _ in gaps], [n for _, n in gaps]), 0.95)), 4)


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Real, simulated, and by how much the latter is off."""
    lines = []
    for row in rows:
        line = [row["concurrency"], row["policy"]]
        for name in ("tokens_per_second", "itl_p95_ms"):
            real, told = row[name]
            line += [f"{real:.4g}", f"{told:.4g}", f"{told / real - 1:+.1%}"]
        lines.append([*line, *(f"{value:.2f}" for value in row["acceptance_length"])])
    header = [
        "requests",
        "policy",
        "tokens/s",
        "simulated",
        "error",
        "p95 ms",
        "simulated",
        "error",
        "accept",
        "simulated",
    ]
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--drafter", default="draft_model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", nargs="*")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--policies", nargs="+", default=["none", "fixed:3", "auto"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0)
    add_json(parser)
    options = parser.parse_args()
    setting = set_up(options, max(options.concurrency))
    rows = [row for many in options.concurrency for row in both(setting, many, options)]
    print(show(rows))
    write_json(options.json, {**setting.about, **facts(), "simulated": rows})


if __name__ == "__main__":
    main()
