"""Policies on a running engine: whether drafting as the scheduler decides is as fast as the best fixed draft length.

    python benchmarks/live.py run --target embedded --drafter draft_model --json FILE [--concurrency 1 4 16 64]
    python benchmarks/live.py run --target llama-110m --drafter synthetic --json FILE
    python benchmarks/live.py adversarial --target llama-110m --duration 200 --json FILE
    python benchmarks/live.py report FILE... [--plots FOLDER]

The same ``run`` again goes on where it was interrupted, one concurrency at a time.

run: a closed loop, C requests always in flight, the next one joins as one ends; chat (or prose), code and maths in
turn, every other one greedy, the others at temperature 1. All arms share the target's weights. In each round each arm
runs for some seconds, in several short turns, each in a new random order, so that a clock that changes every few
seconds changes for all of them; an arm's requests stay where they are between turns; generated tokens are counted when
they are committed. The best fixed arm (plain decoding is one of them) is chosen on the even rounds and compared on the
odd ones, and the other way round; the ratio is the geometric mean over rounds with its interval.

``synthetic`` drafters have the acceptance of a profile (chat, code and maths, by request) and the time of a sixth of
the target's layers. adversarial: the product's default against plain decoding in alternating windows, the concurrency
changing from window to window. ``hostile``: random tokens with confidences of 0.99; ``slow``: good drafts, each of
which takes as long as a pass of the target.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
from support import add_json, facts, prompt_sets, say, table, write_json

from outrider.config import SamplingParams
from outrider.engine.cost_tables import start_costs
from outrider.engine.llm import LLM
from outrider.engine.loader import LoadedModel, load_model
from outrider.engine.request import Request
from outrider.evaluation.intervals import estimate
from outrider.evaluation.speedup import default_prompt_files
from outrider.evaluation.synthetic_drafter import SyntheticDrafter
from outrider.models.loading import load_backend
from outrider.models.random import SHAPES, random_target
from outrider.planning.simulated_drafts import PROFILES
from outrider.scheduling.costs import CostTable
from outrider.types import Drafter, StepCost, StepRecord

DRAFTS = 7
ARMS = ("none", "fixed:1", "fixed:3", "fixed:5", "fixed:7", "auto")
ANSWERS = (64, 128, 96, 160, 80)  # most new tokens of an answer, in turn: requests do not end together
LENGTHS = (32, 96, 64)  # tokens of random prompts, in turn
KNOWN_TEXTS = 96  # requests whose text is recorded for a synthetic drafter
CAPACITY = 512
PROCESSOR_TIME = os.environ.get("OUTRIDER_THREADS") == "1" and os.environ.get("LIVE_CLOCK") == "processor"
# With one thread and LIVE_CLOCK=processor, seconds are those of the thread: for machines that are not quiet.
HELD_UP = 0.05  # seconds of a step in which the thread did not run: something else has stopped the process
SHARE = 1 / 6  # of the target's time, what a synthetic drafter takes for as many tokens
CHANGES = (1, 4, 16, 2, 8)  # requests in flight of mixed traffic, by window
INTERACTIVE = ("chat", "code", "maths")


# ------------------------------------------------------------------------------------------------ requests and clients


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    tokens: tuple[int, ...]
    params: SamplingParams


@dataclass(slots=True)
class Window:
    """What an arm did in one of its turns."""

    tokens: int = 0
    seconds: float = 0.0
    held_up: float = 0.0  # of steps in which the process was stopped; not part of ``seconds``
    gaps: list[tuple[float, int]] = field(default_factory=list)  # seconds a token, of so many tokens

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds

    def add(self, more: Window) -> None:
        self.tokens += more.tokens
        self.seconds += more.seconds
        self.held_up += more.held_up
        self.gaps += more.gaps


class Rounds:
    """A ``StepObserver``: drafts and what became of them, and where the time of steps went."""

    def __init__(self) -> None:
        self.rounds = self.drafted = self.verified = self.accepted = 0
        self.costs: list[StepCost] = []

    def step(self, record: StepRecord) -> None:
        self.costs.append(record.cost)
        for row in record.rows:
            if not row.first:
                self.rounds += 1
                self.drafted += row.drafted
                self.verified += row.verified
                self.accepted += row.accepted


class Client:
    """An engine with a number of requests in flight."""

    def __init__(self, llm: LLM, asked: Sequence[Asked]) -> None:
        self.llm, self._asked = llm, cycle(asked)
        self._flying: list[Request] = []
        self._submitted = 0
        self.finished: list[tuple[int, int]] = []  # tokens of prompt and answer
        self.seen = Rounds()
        llm.observers.append(self.seen)

    def run(self, seconds: float, concurrency: int) -> Window:
        """Go on for so many seconds; the step under way then is finished."""
        engine, window, clock = self.llm.engine, Window(), thread_time if PROCESSOR_TIME else perf_counter
        last: dict[int, float] = {}
        began = now = clock()
        while now - began - window.held_up < seconds:
            worked = thread_time()
            ended = [request for request in self._flying if request.finish_reason is not None]
            if ended:
                self.finished += [(request.prompt_length, len(request.output)) for request in ended]
                self._flying = [request for request in self._flying if request.finish_reason is None]
            while len(self._flying) < concurrency:
                asked = next(self._asked)
                self.llm.forget()  # prompts come again here, as they would not elsewhere
                self._submitted += 1
                seed = self._submitted if asked.params.seed is None else asked.params.seed
                self._flying.append(engine.submit(list(asked.tokens), asked.params, seed))
            commits = engine.step()
            before, now = now, clock()
            idle = now - before - (thread_time() - worked)
            if idle > HELD_UP:
                window.held_up += idle
                last.clear()
            for commit in commits:
                number, new = commit.request.number, len(commit.tokens)
                window.tokens += new
                if number in last and new:
                    window.gaps.append(((now - last[number]) / new, new))
                last[number] = now
        window.seconds = now - began - window.held_up
        return window


def requests_of(sets: Mapping[str, Sequence[Sequence[int]]]) -> list[Asked]:
    """The sets in turn, greedy and sampled in turn within each."""
    most = max(len(prompts) for prompts in sets.values())
    asked: list[Asked] = []
    for i in range(2 * most):
        for j, prompts in enumerate(sets.values()):
            params = SamplingParams(max_tokens=ANSWERS[len(asked) % len(ANSWERS)], temperature=float((i + j) % 2))
            asked.append(Asked(tuple(prompts[i // 2 % len(prompts)]), params))
    return asked


def real_requests(loaded: LoadedModel, files: Sequence[Path] | None) -> list[Asked]:
    """Of a model with a tokenizer; chat models are asked in their template."""
    chat = loaded.tokenizer.has_chat_template and loaded.name != "embedded"
    texts = prompt_sets(files or default_prompt_files(chat), limit=32)
    encode: Callable[[str], list[int]] = loaded.tokenizer.encode
    if chat:
        encode = lambda text: loaded.tokenizer.encode_chat([{"role": "user", "content": text}])  # noqa: E731
    sets = {name: [encode(text)[: CAPACITY - max(ANSWERS)] for text in some] for name, some in texts.items()}
    return requests_of(sets)


def random_requests(vocabulary: int) -> list[Asked]:
    """Random prompts, each of which comes once in a cycle; texts that depend on the seed alone."""
    picks = random.Random(0)
    asked = []
    for i in range(KNOWN_TEXTS):
        tokens = tuple(picks.randrange(vocabulary) for _ in range(LENGTHS[i % len(LENGTHS)]))
        params = SamplingParams(max_tokens=ANSWERS[i % len(ANSWERS)], temperature=i // 3 % 2, ignore_eos=True, seed=i)
        asked.append(Asked(tokens, params))
    return asked


# ------------------------------------------------------------------------------------------------ targets and arms


@dataclass(frozen=True)
class Setting:
    """A target, what it is asked, and how a drafter for it is made."""

    loaded: LoadedModel
    asked: list[Asked]
    make: Callable[[], str | Drafter]
    about: dict[str, Any]


def load(name: str, dtype: str) -> LoadedModel:
    """A model, or a shape with random weights, which has no tokenizer."""
    if name not in SHAPES:
        return load_model(name, dtype=dtype)
    dtype = "int8" if dtype == "auto" else dtype
    backend = load_backend("auto", dtype)
    target = random_target(name, dtype, backend)
    return LoadedModel(target, None, name, dtype, backend.name)  # type: ignore[arg-type]


def set_up(options: argparse.Namespace, rows: int) -> Setting:
    """Load the target; where the drafter is synthetic, record the texts that it replays."""
    loaded = load(options.target, options.dtype)
    about = {"target": options.target, "dtype": loaded.dtype, "drafter": options.drafter}
    if options.drafter != "synthetic":
        return Setting(loaded, real_requests(loaded, options.prompts), lambda: str(options.drafter), about)
    asked = random_requests(loaded.target.spec.vocab_size)
    known = record(loaded, asked, rows)
    make, more = synthetic(options.drafter, loaded, asked, known)
    return Setting(loaded, asked, make, about | more)


def record(loaded: LoadedModel, asked: Sequence[Asked], rows: int) -> dict[tuple[int, ...], Sequence[int]]:
    """The texts, which do not depend on the drafter."""
    say(f"recording {len(asked)} texts")
    llm = LLM(loaded, "none", policy="fixed", guard=False, max_rows=max(rows, 16), capacity=CAPACITY)
    requests = [llm.engine.submit(list(one.tokens), one.params, one.params.seed or 0) for one in asked]
    llm.engine.wait(requests)  # by the engine: random weights have no tokenizer
    return {one.tokens: request.output for one, request in zip(asked, requests, strict=True)}


def synthetic(
    kind: str, loaded: LoadedModel, asked: Sequence[Asked], known: Mapping[tuple[int, ...], Sequence[int]]
) -> tuple[Callable[[], Drafter], dict[str, Any]]:
    """A drafter with set acceptance and cost, and what was set."""
    costs = start_costs(loaded.target, loaded.dtype, rows=64, tokens=256)
    one, each = pass_and_token(costs)
    if kind == "hostile":
        set_to = {"seconds": SHARE * one, "seconds_each": SHARE * each}
        known = {}
        profiles: dict[tuple[int, ...], Sequence[float]] = {}
        profile, says = [0.0] * DRAFTS, "sure"
    else:
        profiles = {one.tokens: PROFILES[INTERACTIVE[i % 3]] for i, one in enumerate(asked)}
        profile, says = list(PROFILES["chat"]), "truth"
        if kind == "slow":
            set_to = {"seconds_per_draft": one, "seconds_each": each}
        else:
            set_to = {"seconds": SHARE * one, "seconds_each": SHARE * each}

    def make() -> Drafter:
        return SyntheticDrafter(
            known,
            profile,
            profiles=profiles,
            vocab_size=loaded.target.spec.vocab_size,
            says=says,  # type: ignore[arg-type]
            spread=0.1 if kind == "synthetic" else 0.0,
            **set_to,  # type: ignore[arg-type]
        )

    return make, {"pass_ms": 1e3 * one, "drafter_ms": {name: 1e3 * value for name, value in set_to.items()}}


def pass_and_token(costs: CostTable) -> tuple[float, float]:
    """Seconds of a pass over one token, and what each of 64 adds."""
    one = costs.seconds(1, 1, 64)
    return one, (costs.seconds(64, 1, 64) - one) / 63


def make_arm(name: str, setting: Setting, rows: int) -> LLM:
    """An engine of its own with the shared target. ``auto`` is what the product does when nothing is asked for."""
    common: dict[str, Any] = {"max_rows": rows, "capacity": CAPACITY}
    if name == "none":
        return LLM(setting.loaded, "none", policy="fixed", guard=False, **common)
    drafter = setting.make()
    if isinstance(drafter, str):
        common["draft_tokens"] = DRAFTS
    kind, _, drafts = name.partition(":")
    if kind == "fixed":
        options = {"draft_tokens": int(drafts)}
        return LLM(setting.loaded, drafter, policy="fixed", policy_options=options, guard=False, **common)
    return LLM(setting.loaded, drafter, policy="auto" if kind == "auto" else kind, guard=kind == "auto", **common)


# ------------------------------------------------------------------------------------------------ closed loop


def closed_loop(setting: Setting, concurrency: int, options: argparse.Namespace) -> dict[str, Any]:
    """All arms at one concurrency: rows, and ratios of ``auto``."""
    clients = {name: Client(make_arm(name, setting, concurrency), setting.asked) for name in options.arms}
    for name, client in clients.items():  # policies that learn get longer
        client.run(options.warm if name.startswith(("none", "fixed")) else 3 * options.warm, concurrency)
        client.seen.__init__()  # type: ignore[misc]
    order = random.Random(concurrency)
    windows: dict[str, list[Window]] = {name: [] for name in clients}
    for turn in range(options.rounds):
        for mine in windows.values():
            mine.append(Window())
        for _ in range(options.turns):
            for name in order.sample(list(clients), len(clients)):
                windows[name][-1].add(clients[name].run(options.seconds / options.turns, concurrency))
        say(f"{concurrency}: round {turn + 1}: " + ", ".join(f"{n} {w[-1].speed:.0f}" for n, w in windows.items()))
    rows = [describe(name, concurrency, windows[name], clients[name].seen) for name in clients]
    speeds = {name: [window.speed for window in some] for name, some in windows.items()}
    ratios = [ratios_of(arm, concurrency, speeds) for arm in speeds if not arm.startswith(("none", "fixed"))]
    return {"rows": rows, "ratios": ratios}


def describe(name: str, concurrency: int, windows: Sequence[Window], seen: Rounds) -> dict[str, Any]:
    """One arm's figures."""
    gaps = [gap for window in windows for gap in window.gaps]
    each = np.repeat([g for g, _ in gaps], [n for _, n in gaps]) if gaps else np.zeros(1)
    speed = total(windows)
    costs = (
        np.array([(cost.draft, cost.verify, cost.bookkeeping) for cost in seen.costs])
        if seen.costs
        else np.zeros((1, 3))
    )
    return {
        "policy": name,
        "concurrency": concurrency,
        "tokens_per_second": round(speed, 2),
        "per_user_tokens_per_second": round(speed / concurrency, 2),
        "rounds": [round(window.speed, 2) for window in windows],
        "held_up_seconds": round(sum(window.held_up for window in windows), 2),
        "acceptance_length": round(1 + seen.accepted / max(1, seen.rounds), 4),
        "drafted_per_row": round(seen.drafted / max(1, seen.rounds), 4),
        "verified_per_row": round(seen.verified / max(1, seen.rounds), 4),
        "itl_p50_ms": round(1e3 * float(np.quantile(each, 0.5)), 4),
        "itl_p95_ms": round(1e3 * float(np.quantile(each, 0.95)), 4),
        "step_ms": dict(zip(("draft", "verify", "bookkeeping"), (1e3 * costs.mean(0)).round(4).tolist(), strict=True)),
    }


def ratios_of(arm: str, concurrency: int, speeds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """An arm over the best fixed one, chosen on the rounds it is not compared on, and over plain decoding."""
    fixed = [name for name in speeds if name.startswith(("none", "fixed"))]
    rounds = len(speeds[arm])
    chosen = {}
    for half in (0, 1):
        known = range(half, rounds, 2)
        chosen[1 - half] = max(fixed, key=lambda name: sum(speeds[name][i] for i in known))
    best = [speeds[chosen[i % 2]][i] for i in range(rounds)]
    return {
        "policy": arm,
        "concurrency": concurrency,
        "best_fixed": [chosen[0], chosen[1]],
        "over_best": ratio(speeds[arm], best),
        "over_none": ratio(speeds[arm], speeds["none"]),
        "best_over_none": ratio(best, speeds["none"]),
    }


def ratio(above: Sequence[float], below: Sequence[float]) -> list[float | None]:
    """The geometric mean over rounds and its 95 % interval."""
    logs = np.array([math.log(a / b) for a, b in zip(above, below, strict=True)])
    found = estimate([len(logs)], lambda picks: np.exp(logs[picks[0]].mean(-1)), draws=10_000)
    return [None if value is None else round(value, 4) for value in (found.value, found.low, found.high)]


# ------------------------------------------------------------------------------------------------ adversarial


def adversarial(loaded: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """The default against plain decoding: ``duration`` seconds of each, in alternating windows of mixed traffic."""
    rows = max(CHANGES)
    asked = random_requests(loaded.target.spec.vocab_size)
    known = record(loaded, asked, rows)
    clients, about = {"none": Client(make_arm("none", Setting(loaded, asked, lambda: "none", {}), rows), asked)}, {}
    for kind in ("hostile", "slow"):
        make, about[kind] = synthetic(kind, loaded, asked, known)
        clients[kind] = Client(make_arm("auto", Setting(loaded, asked, make, {}), rows), asked)
    clients["none"].run(options.warm, 4)  # the start of the others counts
    windows: dict[str, list[Window]] = {name: [] for name in clients}
    order = random.Random(0)
    for turn in range(round(options.duration / options.seconds)):
        for name in order.sample(list(clients), len(clients)):
            windows[name].append(clients[name].run(options.seconds, CHANGES[turn % len(CHANGES)]))
        say(f"window {turn + 1}: " + ", ".join(f"{n} {w[-1].speed:.0f}" for n, w in windows.items()))
    speeds = {name: [window.speed for window in some] for name, some in windows.items()}
    found: dict[str, Any] = {"windows": {name: [round(value, 2) for value in some] for name, some in speeds.items()}}
    for kind in ("hostile", "slow"):
        mine, none = speeds[kind], speeds["none"]
        found[kind] = {
            **about[kind],
            "seconds": round(sum(w.seconds for w in windows[kind]), 1),
            "over_none": ratio(mine, none),
            "tokens_per_second_over_none": round(total(windows[kind]) / total(windows["none"]), 4),
            "over_none_first_window": round(mine[0] / none[0], 4),
            "over_none_by_requests": {
                many: ratio(mine[i :: len(CHANGES)], none[i :: len(CHANGES)]) for i, many in enumerate(CHANGES)
            },
            "drafted_per_row": round(clients[kind].seen.drafted / max(1, clients[kind].seen.rounds), 4),
        }
    return found


def total(windows: Sequence[Window]) -> float:
    """Tokens a second."""
    return sum(w.tokens for w in windows) / sum(w.seconds for w in windows)


# ------------------------------------------------------------------------------------------------ tables and plots


def report(options: argparse.Namespace) -> None:
    """Tables and plots of files that ``run`` and ``adversarial`` have written; rows of one setting go together."""
    groups: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for file in options.files:
        found = json.loads(file.read_text())
        group = groups.setdefault((found["target"], found["drafter"]), {"rows": [], "ratios": []})
        if "rows" in found:
            group["rows"] += found["rows"]
            group["ratios"] += found["ratios"]
        else:
            for kind in ("hostile", "slow"):
                one = found["adversarial"][kind]
                print(f"\n{found['target']}, {kind}: {one['over_none']} of plain decoding, {one['seconds']} s")
                print(f"by requests: {one['over_none_by_requests']}, first window {one['over_none_first_window']}")
    groups = {key: value for key, value in groups.items() if value["rows"]}
    for (target, drafter), group in groups.items():
        arms = list(dict.fromkeys(row["policy"] for row in group["rows"]))
        header = ["requests", *arms, "best fixed", "auto / best", "95 %", "auto / none", "95 %"]
        lines = []
        for one in sorted(group["ratios"], key=lambda one: one["concurrency"]):
            here = {r["policy"]: r for r in group["rows"] if r["concurrency"] == one["concurrency"]}
            best, none = one["over_best"], one["over_none"]
            names = " or ".join(dict.fromkeys(one["best_fixed"]))
            shown = [
                f"{best[0]:.3f}",
                f"{best[1]:.3f} to {best[2]:.3f}",
                f"{none[0]:.3f}",
                f"{none[1]:.3f} to {none[2]:.3f}",
            ]
            lines.append([one["concurrency"], *(f"{here[a]['tokens_per_second']:.0f}" for a in arms), names, *shown])
        print(f"\n{target}, {drafter}\n\n" + table(header, lines))
    if options.plots is not None:
        draw(groups, options.plots)


def draw(groups: Mapping[tuple[str, str], Mapping[str, Sequence[Any]]], folder: Path) -> None:
    """Throughput by concurrency and arm (as the DSpark paper's figure 8), and ``auto`` over the best fixed arm."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(4.2 * len(groups), 3.8), layout="constrained")
    for axis, ((target, drafter), group) in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
    ):
        for arm in dict.fromkeys(row["policy"] for row in group["rows"]):
            mine = sorted((r["concurrency"], r["tokens_per_second"]) for r in group["rows"] if r["policy"] == arm)
            width = 2.0 if arm == "auto" else 1.0
            axis.plot(*zip(*mine, strict=True), marker="o", markersize=3, linewidth=width, label=arm)
        axis.set(
            title=f"{target}, {drafter}", xlabel="requests in flight", ylabel="tokens/s", xscale="log", yscale="log"
        )
        ticks = sorted({row["concurrency"] for row in group["rows"]})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    figure.savefig(folder / "throughput.png", dpi=150)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    ticks = sorted({one["concurrency"] for group in groups.values() for one in group["ratios"]})
    for i, ((target, drafter), group) in enumerate(groups.items()):
        for kind, marker in (("over_best", "o"), ("over_none", "^")):
            ones = sorted(group["ratios"], key=lambda one: one["concurrency"])
            x = [ticks.index(one["concurrency"]) + 0.08 * (i - len(groups) / 2) for one in ones]
            y = [one[kind][0] for one in ones]
            errors = [[one[kind][0] - one[kind][1] for one in ones], [one[kind][2] - one[kind][0] for one in ones]]
            label = f"{target}, {drafter}: over {'the best fixed' if kind == 'over_best' else 'none'}"
            axis.errorbar(x, y, yerr=errors, fmt=marker, color=f"C{i}", markersize=4, capsize=2, label=label)
    axis.axhline(1.0, color="grey", linewidth=0.8)
    axis.axhline(0.98, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="requests in flight", ylabel="auto's tokens/s as a ratio")
    axis.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
    axis.legend(fontsize=7)
    figure.savefig(folder / "ratio.png", dpi=150)


# ------------------------------------------------------------------------------------------------ command line


def earlier(options: argparse.Namespace) -> dict[str, list[Any]]:
    """What an interrupted run of the same command has left in its file. Raises SystemExit where it is of another."""
    path = Path(options.json or "-")
    if not path.is_file():
        return {"rows": [], "ratios": []}
    found = json.loads(path.read_text())
    command = facts()["command"]
    if found.get("command") != command:
        raise SystemExit(f"{path} is of {found.get('command')!r}, not of {command!r}; give another --json or remove it")
    return {"rows": found["rows"], "ratios": found["ratios"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "adversarial"):
        one = commands.add_parser(name)
        one.add_argument("--target", default="embedded", help=f"a model, or random weights: {', '.join(SHAPES)}")
        one.add_argument("--dtype", default="auto", help="default of random weights: int8")
        one.add_argument("--prompts", type=Path, nargs="*", help="files of prompts, one a domain")
        one.add_argument("--warm", type=float, default=2.0, help="seconds of a fixed arm before counting")
        add_json(one)
    run, hostile, shown = commands.choices["run"], commands.choices["adversarial"], commands.add_parser("report")
    run.add_argument("--drafter", default="draft_model", help="any, or synthetic")
    run.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    run.add_argument("--arms", nargs="+", default=list(ARMS))
    run.add_argument("--rounds", type=int, default=10)
    run.add_argument("--seconds", type=float, default=2.5, help="of an arm in a round")
    run.add_argument("--turns", type=int, default=12, help="of an arm in a round")
    hostile.add_argument("--duration", type=float, default=200.0, help="seconds of each side")
    hostile.add_argument("--seconds", type=float, default=2.0, help="of a window")
    shown.add_argument("files", type=Path, nargs="+")
    shown.add_argument("--plots", type=Path, help="a folder for the two plots")
    options = parser.parse_args()
    if options.command == "report":
        report(options)
        return
    if options.command == "run":
        kept = earlier(options)
        done = {one["concurrency"] for one in kept["ratios"]}
        if done >= set(options.concurrency):
            say(f"{options.json} has all of it; remove the file to measure again")
            return
        setting = set_up(options, max(options.concurrency))
        result: dict[str, Any] = {**setting.about, **facts(), **kept}
        for many in (many for many in options.concurrency if many not in done):
            found = closed_loop(setting, many, options)
            result["rows"] += found["rows"]
            result["ratios"] += found["ratios"]
            if options.json != "-":
                write_json(options.json, result)  # the same command goes on from here after an interruption
    else:
        loaded = load(options.target, options.dtype)
        result = {"target": options.target, "dtype": loaded.dtype, "drafter": "adversarial", **facts()}
        result["adversarial"] = adversarial(loaded, options)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
