"""`outrider simulate` against real runs: throughput and the 95th percentile of the time between tokens.

    python benchmarks/simulated.py --target embedded --drafter draft_model --json FILE

Pairs, so that a machine that is busier at times is so for both sides: in every round each arm runs twice, one short
window right after the other, arms in a new random order. The first windows give what the simulation is made of: the
cost table brought to the passes observed (by tokens), what a token of a prompt adds to a pass, drafting by number of
drafts, bookkeeping by policy, what showing the drafter committed tokens takes, time outside steps, the drafter's rounds
with all drafts verified, sizes of requests (prompts without what the cache held of them: the same prompts come again
while earlier requests still run), and how much slower or quicker than its mean the arm was from step to step. The
second windows are what it has to predict; "before" in the table is the first windows, and how far they differ from the
second is what no simulation can know.

What a policy learns depends on how it began, so the arms that learn begin anew several times. Each simulated run is as
old as theirs: as many seconds to warm up, as many that count.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from statistics import fmean
from typing import Any, cast

import numpy as np
from live import DRAFTS, Asked, Client, Setting, Window, make_arm, set_up
from support import add_json, facts, say, table, write_json

from outrider.engine.cost_tables import feature_share, start_costs
from outrider.engine.llm import LLM
from outrider.engine.loader import load_policy
from outrider.planning.simulated_drafts import Recorded
from outrider.planning.simulation import Traffic, simulate
from outrider.planning.sweep import NoDrafter
from outrider.scheduling.cost_model import CostModel
from outrider.scheduling.costs import CostTable
from outrider.types import Drafter, ReadsHidden, SchedulerPolicy, StepCost, StepRecord

KNOWN = (1, 3, 7)  # drafts whose cost is measured
FEWEST = 5  # steps of about as many tokens from which a factor is taken
DRAFTED = 50  # steps that drafted, from which their bookkeeping is taken
SEEDS = 8  # simulated runs, each as long as a real engine lives
WARM = 2.0  # seconds that engines run before anything counts


@dataclass
class Watch:
    """A ``StepObserver``: every step, and rounds by request. ``on``: only then."""

    on: bool = False
    steps: list[tuple[StepCost, int, int]] = field(default_factory=list)  # with drafts asked for, tokens to be shown
    prompts: list[int] = field(default_factory=list)  # tokens of them that were read, by step
    rounds: dict[int, list[tuple[tuple[float, ...], int]]] = field(default_factory=dict)

    def step(self, record: StepRecord) -> None:
        if not self.on:
            return
        rows = [row for row in record.rows if not row.first]
        prompts = record.cost.tokens - sum(1 + row.verified for row in rows)
        shown = prompts + sum(len(row.committed) for row in rows)
        self.steps.append((record.cost, max((row.limit for row in rows), default=0), shown))
        self.prompts.append(prompts)
        for row in rows:
            if row.drafted == row.verified == DRAFTS:
                self.rounds.setdefault(row.request, []).append((row.confidence or (0.5,) * DRAFTS, row.accepted))


class Sized(Client):
    """A client that keeps tokens of prompt and answer of the requests that ended, and those of the prompt that were not
    read, because the cache held them from another request."""

    def __init__(self, llm: LLM, asked: Sequence[Asked]) -> None:
        super().__init__(llm, asked)
        self.sizes: list[tuple[int, int, int]] = []
        llm.observers.append(self)

    def step(self, record: StepRecord) -> None:
        for request in self.llm.engine.admission.running:  # those that end in this step are still among them
            if request.finish_reason is not None:
                self.sizes.append((request.prompt_length, len(request.output), request.stats.cached_tokens))


@dataclass(frozen=True)
class Observed:
    """``StepCosts`` and ``FollowCosts`` at one concurrency, for one policy."""

    table: CostTable
    factors: Mapping[int, float]  # observed over the table's, by the logarithm of tokens in quarters of an octave
    drafts: Mapping[int, float]  # seconds of a proposal for all rows, by drafts
    book: tuple[float, float]  # plain, drafting; without following
    each: float  # seconds of showing a token
    features: float
    takes_up: bool
    rows: int
    prompt: float | None = None  # seconds that a token of a prompt adds to a pass; None: as much as any other token

    def verify(self, tokens: int, rows: int, context: int) -> float:
        factor = np.interp(4 * math.log2(tokens), list(self.factors), list(self.factors.values()))
        return float(factor) * self.table.seconds(tokens, rows, context)

    def read(self, prompts: int, tokens: int, rows: int, context: int) -> float:
        if self.prompt is None:
            return self.verify(tokens, rows, context)
        return self.verify(max(tokens - prompts, 1), rows, context) + self.prompt * prompts

    def draft(self, rows: int, drafts: int) -> float:
        if not rows or not drafts:
            return 0.0
        share = 0.5 * (1 + rows / self.rows)  # a proposal for some rows was hardly ever seen
        return share * float(np.interp(drafts, list(self.drafts), list(self.drafts.values())))

    def bookkeeping(self, rows: int, drafting: bool) -> float:
        return self.book[drafting]

    def follow(self, tokens: int) -> float:
        return self.each * tokens


def factors_of(steps: Iterable[StepCost], costs: CostTable) -> dict[int, float]:
    """Seconds observed over the table's, by quarters of an octave of tokens; means, since throughput is one."""
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for cost in steps:
        at = round(4 * math.log2(cost.tokens))
        found[at].append((cost.verify, costs.seconds(cost.tokens, cost.rows, cost.context)))
    enough = {at: some for at, some in found.items() if len(some) >= FEWEST} or found
    return {at: sum(a for a, _ in some) / sum(b for _, b in some) for at, some in sorted(enough.items())}


def observed(
    name: str,
    setting: Setting,
    costs: CostTable,
    clients: Mapping[str, Client],
    seen: Mapping[str, Watch],
    first: Mapping[str, list[Window]],
    features: float,
) -> Observed:
    """The costs of an arm. ``features``: the share that passes take longer which give them, the same for all arms. An
    arm that hardly drafted says little of what its steps would take that draft: then those of fixed drafts stand for
    them."""
    drafter = clients[f"fixed:{DRAFTS}"].llm.drafter
    book: dict[bool, list[float]] = {False: [], True: []}
    drafting = sum(limit > 0 for _, limit, _ in seen[name].steps)
    for arm in ("none", name if drafting >= DRAFTED else f"fixed:{DRAFTS}"):
        inside = sum(c.draft + c.verify + c.bookkeeping for c, _, _ in seen[arm].steps)
        outside = sum(map(seconds_of, first[arm])) - inside
        for cost, limit, _ in seen[arm].steps:
            if (arm == "none") == (limit == 0):
                book[limit > 0].append(cost.bookkeeping - cost.follow + outside / len(seen[arm].steps))
    shown = seen[f"fixed:{DRAFTS}"].steps
    passes = [
        (without_features(cost, features), n)
        for watch in seen.values()
        for (cost, _, _), n in zip(watch.steps, watch.prompts, strict=True)
    ]
    drafts = {k: fmean(c.draft for c, limit, _ in seen[f"fixed:{k}"].steps if limit == k) for k in KNOWN}
    found = Observed(
        costs,
        factors_of((cost for cost, prompts in passes if not prompts), costs),
        drafts,
        (fmean(book[False]), fmean(book[True])),
        sum(cost.follow for cost, _, _ in shown) / sum(n for _, _, n in shown),
        features,
        not drafter.aux_layers and not isinstance(drafter, ReadsHidden),
        max(cost.rows for cost, limit, _ in shown if limit),
    )
    more = sum(c.verify - found.verify(max(c.tokens - n, 1), c.rows, c.context) for c, n in passes if n)
    return replace(found, prompt=max(more, 0.0) / max(sum(n for _, n in passes), 1))


def without_features(cost: StepCost, share: float) -> StepCost:
    """The step as if its pass had given no features."""
    return replace(cost, verify=cost.verify / (1 + share)) if cost.follow > 0 else cost


def feature_share_of(setting: Setting, clients: Mapping[str, Client]) -> float:
    """Measured once for all arms: one that is charged what others are not cannot be compared with them."""
    return feature_share(setting.loaded.target, clients[f"fixed:{DRAFTS}"].llm.drafter.aux_layers)


def slowness_of(watch: Watch, costs: Observed, seed: int) -> Callable[[float], float]:
    """How much slower than its mean an arm was: steps observed over those expected, in their order, from a random one
    on. Of that arm alone: what holds up a short step by half is little to a long one."""
    steps = [(cost, limit, prompts) for (cost, limit, _), prompts in zip(watch.steps, watch.prompts, strict=True)]
    expected = np.array(
        [
            costs.read(prompts, *pass_of(cost))
            + costs.draft(cost.rows, limit)
            + costs.bookkeeping(cost.rows, limit > 0)
            for cost, limit, prompts in steps
        ]
    )
    ratios = np.array([cost.draft + cost.verify + cost.bookkeeping - cost.follow for cost, _, _ in steps]) / expected
    ratios /= (ratios * expected).sum() / expected.sum()
    turns = cycle(np.roll(ratios, random.Random(seed).randrange(len(ratios))).tolist())
    return lambda now: next(turns)


def pass_of(cost: StepCost) -> tuple[int, int, int]:
    """Tokens, rows and context of a step's pass."""
    return cost.tokens, cost.rows, cost.context


@dataclass(frozen=True)
class StandIn:
    """What ``load_policy`` asks of a drafter."""

    aux_layers: tuple[int, ...]
    block: int = DRAFTS


def policy_for(name: str, costs: Observed) -> SchedulerPolicy:
    """The policy that a live arm of this name has, in its first state."""
    kind, _, drafts = name.partition(":")
    drafter = cast(Drafter, StandIn(() if costs.takes_up else (0,)))
    if kind == "none":
        return NoDrafter()
    if kind == "fixed":
        return load_policy("fixed", {"draft_tokens": int(drafts)}, drafter)
    return load_policy("auto", {}, drafter, CostModel(costs.table, costs.features), guard=True)


def warm_arm(name: str, setting: Setting, concurrency: int, watch: Watch) -> Sized:
    """An engine that has run for WARM seconds, and is watched from now on."""
    client = Sized(make_arm(name, setting, concurrency), setting.asked)
    client.run(WARM, concurrency)
    client.seen.__init__()  # type: ignore[misc]
    client.llm.observers.append(watch)
    client.sizes.clear()
    return client


def warm_arms(
    arms: Iterable[str], setting: Setting, concurrency: int
) -> tuple[dict[str, Sized], dict[str, Watch], CostTable]:
    """Engines that have warmed up, what watches each of them, and the target's cost table."""
    seen = {name: Watch() for name in arms}
    clients = {name: warm_arm(name, setting, concurrency, watch) for name, watch in seen.items()}
    target, dtype = setting.loaded.target, setting.loaded.dtype
    return clients, seen, start_costs(target, dtype, rows=concurrency, tokens=concurrency * (DRAFTS + 1))


def whole_rounds(watch: Watch) -> list[list[tuple[tuple[float, ...], int]]]:
    """By request, rounds in which all drafts were verified."""
    return [some for some in watch.rounds.values() if some]


def sizes_of(clients: Mapping[str, Sized]) -> list[tuple[int, int, int]]:
    """Tokens of prompt and answer of all requests that ended, and of the prompt those that the cache held."""
    return [size for client in clients.values() for size in client.sizes]


def both(setting: Setting, concurrency: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every policy, run and simulated."""
    arms = list(dict.fromkeys(["none", *(f"fixed:{k}" for k in KNOWN), *options.policies]))
    clients, seen, measured = warm_arms(arms, setting, concurrency)
    first: dict[str, list[Window]] = {name: [] for name in arms}
    second: dict[str, list[Window]] = {name: [] for name in arms}
    engines = {name: [client] for name, client in clients.items()}
    order = random.Random(concurrency)
    for turn in range(options.rounds):
        if turn and turn % (options.rounds // options.starts) == 0:
            for name in arms:
                if not name.startswith(("none", "fixed")):
                    engines[name].append(warm_arm(name, setting, concurrency, seen[name]))
        for name in order.sample(arms, len(arms)):
            client = engines[name][-1]
            seen[name].on = True
            first[name].append(client.run(options.seconds, concurrency))
            seen[name].on = False
            second[name].append(client.run(options.seconds, concurrency))
    sizes = tuple(size for some in engines.values() for client in some for size in client.sizes)
    rounds = Recorded(whole_rounds(seen[f"fixed:{DRAFTS}"]))
    rows = []
    features = feature_share_of(setting, clients)
    for name in options.policies:
        costs = observed(name, setting, measured, clients, seen, first, features)
        told = [
            simulate(
                policy_for(name, costs),
                costs,
                rounds,
                Traffic(concurrency, sizes=sizes, temperature=1.0),
                seconds=2 * options.seconds * options.rounds / options.starts,
                warm=WARM,
                max_rows=concurrency,
                seed=seed,
                slowness=slowness_of(seen[name], costs, seed),
            )
            for seed in range(SEEDS)
        ]
        some, counts = second[name], [client.seen for client in engines[name]]
        row: dict[str, Any] = {
            "policy": name,
            "concurrency": concurrency,
            "tokens_per_second": [speed(some), round(sum(t.tokens for t in told) / sum(t.seconds for t in told), 2)],
            "first_windows_tokens_per_second": speed(first[name]),
            "first_windows_itl_p95_ms": percentile(first[name]),
            "itl_p95_ms": [
                percentile(some),
                round(1e3 * float(np.quantile(np.concatenate([t.gaps for t in told]), 0.95)), 4),
            ],
            "acceptance_length": [
                round(1 + sum(c.accepted for c in counts) / max(1, sum(c.rounds for c in counts)), 3),
                round(1 + sum(t.accepted for t in told) / max(1, sum(t.rounds for t in told)), 3),
            ],
            "prefix_share": round(sum(held for _, _, held in sizes) / sum(prompt for prompt, _, _ in sizes), 3),
        }
        rows.append(row)
        say(str(row))
    return rows


def seconds_of(window: Window) -> float:
    """All of them: steps in which the process was stopped are among those that costs were taken from."""
    return window.seconds + window.held_up


def speed(windows: Sequence[Window]) -> float:
    """Tokens per second."""
    return round(sum(w.tokens for w in windows) / sum(map(seconds_of, windows)), 2)


def percentile(windows: Sequence[Window]) -> float:
    """Of milliseconds between tokens, the 95th percentile over tokens."""
    gaps = [gap for window in windows for gap in window.gaps]
    return round(1e3 * float(np.quantile(np.repeat([g for g, _ in gaps], [n for _, n in gaps]), 0.95)), 4)


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Real, simulated, and by how much the latter is off."""
    lines = []
    for row in rows:
        line = [row["concurrency"], row["policy"], f"{row['first_windows_tokens_per_second']:.4g}"]
        for name in ("tokens_per_second", "itl_p95_ms"):
            real, told = row[name]
            line += [f"{real:.4g}", f"{told:.4g}", f"{told / real - 1:+.1%}"]
        lines.append([*line, *(f"{value:.2f}" for value in row["acceptance_length"])])
    header = [
        "requests",
        "policy",
        "tokens/s before",
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
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a window")
    parser.add_argument("--starts", type=int, default=4, help="times that arms that learn begin anew; divides --rounds")
    add_json(parser)
    options = parser.parse_args()
    if options.rounds % options.starts:
        parser.error(f"--rounds must be a multiple of --starts, got {options.rounds} and {options.starts}")
    setting = set_up(options, max(options.concurrency))
    rows = [row for many in options.concurrency for row in both(setting, many, options)]
    print(show(rows))
    write_json(options.json, {**setting.about, **facts(), "simulated": rows})


if __name__ == "__main__":
    main()
