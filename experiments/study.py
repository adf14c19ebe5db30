"""Study of drafters on the embedded target: one command per table, results as JSON, tables and diagrams in a page.

    python experiments/study.py table1 --answers runs/embedded-answers/regenerate [--out runs/study]
    python experiments/study.py all --answers runs/embedded-answers/regenerate
    python experiments/study.py report --into docs/study.md

Tables: table1, depth, blocks, heads, thresholds, reliability, efficiency, signals. ``--answers`` is an artefact of
``outrider train regenerate``; everything is measured on its held-out prompts. Every drafter is trained once, in a
folder of its own under ``--out``/runs, with the settings of its recipe and the table's changes; an interrupted run
resumes, and tables share drafters. ``--trained NAME=DIR`` copies a run made elsewhere with the same settings
(``dspark``, ``dspark-seed1``, ...: see ``plan``).

``plan`` lists the drafters that a table needs and those that exist. ``train`` trains the missing ones and measures
nothing; two processes with ``--threads 1`` share that work, which is faster on two cores. ``--features``, an artefact
of ``outrider train features``, saves the target's passes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any

import numpy as np
import signals as measured_signals
import study_report
import torch
from shared import facts, say
from signals import Costs, Recording, clocked
from study_drafters import DSPARK, LAYERS, TRAINED, Trained, Workshop, needed

from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest, OutriderError
from outrider.evaluation import drafter_quality as evaluation
from outrider.evaluation.comparison import MACRO, Evaluation
from outrider.evaluation.intervals import Estimate
from outrider.evaluation.recording import EvalPrompt, answer, read_prompts
from outrider.files import read_json, write_json
from outrider.scheduling.calibration import Scaling
from outrider.training import fit_calibration

RESULTS = Path(__file__).parent / "results"
PACKAGED = "draft_model"
WITHOUT_WEIGHTS = ("ngram", "suffix")
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
EXAMPLE = "--answers runs/embedded-answers/regenerate"


# ------------------------------------------------------------------------------------------------ the study


@dataclass(frozen=True)
class Study(Workshop):
    """Directories, and the size of the measurements."""

    results: Path = RESULTS
    seeds: int = 3
    kinds: tuple[str, ...] = TRAINED  # of table1
    limit: int | None = None  # held-out prompts of each domain
    max_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 1.0)
    rounds: int = 10_000  # of calibration, for each temperature
    realised: int | None = None  # prompts of real scheduling by signals
    draws: int = measured_signals.DRAWS  # resamples of the signals' intervals

    def questions(self) -> list[EvalPrompt]:
        """Held-out prompts, alternating between domains, at most ``limit`` of each."""
        domains: dict[str, list[EvalPrompt]] = {}
        for question in read_prompts(self.held_out):
            own = domains.setdefault(question.domain, [])
            if self.limit is None or len(own) < self.limit:
                own.append(question)
        longest = max(len(own) for own in domains.values())
        return [own[i] for i in range(longest) for own in domains.values() if i < len(own)]

    def needed(self, tables: Iterable[str]) -> list[Trained]:
        """The trained drafters of some tables."""
        return [drafter for table in tables for drafter in needed(table, self.seeds, self.kinds)]

    def compare(
        self, table: str, drafters: Sequence[str], temperatures: Sequence[float], thresholds: Sequence[float] = ()
    ) -> Evaluation:
        """Drafters and plain decoding in turns on the held-out prompts; finished measurements are reused."""
        config = evaluation.Config(
            temperatures=tuple(temperatures), max_tokens=self.max_tokens, limit=self.limit, thresholds=tuple(thresholds)
        )
        machine = facts()["machine"]
        return evaluation.evaluate(
            config,
            drafters,
            [self.held_out],
            self.target,
            self.out / "eval" / table,
            machine=machine,
            progress=_progress(table),
        )

    def write(self, table: str, rows: list[dict[str, Any]], **more: Any) -> None:
        """Write one table's figures, with machine, versions and settings."""
        settings = {
            "steps": DSPARK.config(self.steps).steps,
            "limit": self.limit,
            "max_tokens": self.max_tokens,
            "target": self.target,
        }
        write_json(self.results / f"{table}.json", {**facts(), "settings": settings, "rows": rows, **more})
        say(f"{table}: {len(rows)} rows in {self.results / table}.json")


def _progress(table: str) -> Callable[[str, float], None]:
    printed = perf_counter()

    def tell(text: str, done: float) -> None:
        nonlocal printed
        if perf_counter() - printed > 20:
            printed = perf_counter()
            say(f"  {table}: {text}, {done:.0%}")

    return tell


# ------------------------------------------------------------------------------------------------ tables


def table1(study: Study) -> None:
    """DSpark, DFlash, EAGLE-3, a draft model, n-gram and suffix: acceptance length and speed-up (paper: table 1)."""
    drafters = needed("table1", study.seeds, study.kinds)
    paths = [str(study.checkpoint(drafter)) for drafter in drafters]
    packaged = [PACKAGED] if study.target == "embedded" else []
    found = study.compare("table1", [*paths, *packaged, *WITHOUT_WEIGHTS], study.temperatures)
    kinds = {drafter.name: (drafter.recipe, drafter.seed) for drafter in drafters}
    kinds |= {PACKAGED: ("packaged draft model", 0)}
    rows = [
        {"kind": kinds.get(row.drafter, (row.drafter, 0))[0], "seed": kinds.get(row.drafter, ("", 0))[1], **_row(row)}
        for row in found.rows
    ]
    pairs = [
        {**asdict(one), "acceptance_length": _estimate(one.acceptance_length)}
        for one in found.differences
        if one.domain == MACRO and _same_seed(kinds.get(one.drafter, ("", 0)), kinds.get(one.other, ("", 0)))
    ]
    study.write("table1", rows, differences=pairs, over_seeds=_over_seeds(rows))


def _same_seed(one: tuple[str, int], other: tuple[str, int]) -> bool:
    return one[0] == "dspark" and (other[1] == one[1] or (other[0] not in TRAINED and one[1] == 0))


def _over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean acceptance length and its standard deviation over seeds, by kind, temperature and domain."""
    groups: dict[tuple[str, float, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["temperature"], row["domain"]), []).append(row)
    found = []
    for (kind, temperature, domain), own in groups.items():
        line: dict[str, Any] = {"kind": kind, "temperature": temperature, "domain": domain, "seeds": len(own)}
        for name in ("acceptance_length", "speedup"):
            values = [row[name][0] for row in own if row[name][0] is not None]
            line[name] = [mean(values), stdev(values) if len(values) > 1 else None] if values else [None, None]
        found.append(line)
    return found


def _row(row: Any) -> dict[str, Any]:
    names = ("acceptance_length", "acceptance_rate", "speedup")
    facts = {name: getattr(row, name) for name in ("drafter", "temperature", "domain", "prompts", "rounds")}
    return {
        **facts,
        **{name: _estimate(getattr(row, name)) for name in names},
        "conditional": [one.value for one in row.conditional],
    }


def _estimate(one: Estimate) -> list[float | None]:
    return [one.value, one.low, one.high]


def family(table: str, label: Callable[[Trained], dict[str, Any]]) -> Callable[[Study], None]:
    """A table of DSpark's variants at temperature 1: acceptance, and the time of a round."""

    def make(study: Study) -> None:
        drafters = needed(table, study.seeds)
        paths = {drafter.name: study.checkpoint(drafter) for drafter in drafters}
        found = study.compare(table, [str(path) for path in paths.values()], (1.0,))
        costs = latency(study, paths)
        by_name = {drafter.name: label(drafter) for drafter in drafters}
        rows = [{**by_name[row.drafter], **_row(row), "milliseconds": costs[row.drafter]} for row in found.rows]
        study.write(table, rows)

    make.__doc__ = {
        "depth": "DSpark of 1, 2 and 5 layers (paper: figure 3).",
        "blocks": "Blocks of 4, 8, 12 and 16 (paper: figure 4).",
        "heads": "Markov head, recurrent head, none: acceptance and time of a draft (paper: figure 4).",
    }[table]
    return make


def latency(study: Study, paths: Mapping[str, Path], prompts: int = 6) -> dict[str, dict[str, float]]:
    """Median milliseconds of the parts of a round, all drafters in turns on the same prompts."""
    plain = LLM(study.target, "none", max_rows=1)
    sides = {name: plain.with_drafter(str(path)) for name, path in paths.items()}
    clocks = {name: clocked(llm) for name, llm in sides.items()}
    params = SamplingParams(max_tokens=study.max_tokens, temperature=1.0, rule="rejection", seed=3)
    for name, llm in sides.items():
        answer(llm, clocks[name], study.questions()[0].prompt, params)
        clocks[name].costs.clear()
    for question in study.questions()[:prompts]:
        for name, llm in sides.items():
            answer(llm, clocks[name], question.prompt, params)
    parts = ("draft", "verify", "bookkeeping")
    return {
        name: {part: 1e3 * median(getattr(cost, part) for cost in clock.costs if cost.draft > 0) for part in parts}
        for name, clock in clocks.items()
    }


depth = family("depth", lambda drafter: {"layers": drafter.changes.get("layers", LAYERS)})
blocks = family("blocks", lambda drafter: {"block": drafter.changes["block_size"]})
heads = family("heads", lambda drafter: {"head": {"rnn": "RNN", "none": "none"}.get(drafter.suffix, "Markov")})


def thresholds(study: Study) -> None:
    """DSpark truncated at the first confidence under a threshold (paper: figure 5)."""
    found = study.compare("thresholds", [str(study.checkpoint(DSPARK))], (1.0,), THRESHOLDS)
    rows = [
        {name: _estimate(value) if isinstance(value := getattr(point, name), Estimate) else value for name in _SWEPT}
        for point in found.sweep
    ]
    full = [_row(row) for row in found.rows if row.domain == MACRO or len(found.rows) == 1]
    study.write("thresholds", rows, full=full)


_SWEPT = ("drafter", "temperature", "threshold", "acceptance_length", "acceptance_rate", "verify_rate", "speedup")


def reliability(study: Study) -> None:
    """Calibration of DSpark's confidences, raw and scaled (paper: figure 6)."""
    checkpoint, out = study.checkpoint(DSPARK), study.out / "reliability"
    config = fit_calibration.Config(
        rules=("rejection",), temperatures=study.temperatures, rounds=study.rounds, max_tokens=study.max_tokens
    )
    if not out.exists():
        fit_calibration.calibrate(
            config, checkpoint, [study.held_out], out, study.target, progress=_progress("reliability")
        )
    elif read_json(out / "provenance.json")["arguments"]["rounds"] != study.rounds:
        raise InvalidRequest(f"{out} was made with another --rounds; delete it or give another --out")
    rows = read_json(out / "report.json")["buckets"]
    study.write("reliability", rows)


def efficiency(study: Study) -> None:
    """How acceptance grows with the texts seen: along the runs, and from fewer texts at the same number of steps."""
    drafters = needed("efficiency", study.seeds)
    paths = {drafter.name: study.checkpoint(drafter) for drafter in drafters}
    found = study.compare("efficiency", [str(path) for path in paths.values()], (1.0,))
    texts = {drafter.name: drafter.texts for drafter in drafters}
    rows = [{"texts": texts[row.drafter] or _count(study.answers / "train.jsonl"), **_row(row)} for row in found.rows]
    growth = {}
    for log in sorted((study.out / "runs").glob("*/state/log.jsonl")):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        evaluated = [[line["step"], line["acceptance_length"]] for line in lines if "acceptance_length" in line]
        if evaluated:
            growth[log.parent.parent.name] = evaluated
    study.write("efficiency", rows, growth=growth, batch=DSPARK.config(study.steps).batch)


def _count(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def signals(study: Study) -> None:
    """Trained head, top-2 margin, entropy, n-gram statistics, oracle: AUC, ECE and throughput, raw and corrected."""
    checkpoint = str(study.checkpoint(DSPARK))
    folder = study.out / "signals"
    folder.mkdir(parents=True, exist_ok=True)
    plain = LLM(study.target, "none", max_rows=1)
    params = SamplingParams(max_tokens=study.max_tokens, temperature=1.0, rule="rejection", seed=1)
    seen: dict[str, int] = {}
    questions = []
    for question in study.questions():
        seen[question.domain] = seen.get(question.domain, 0) + 1
        questions.append((question, seen[question.domain] % 2 == 1))
    key = repr((params, questions))
    recording = _kept(
        folder / "recorded.pt",
        key,
        lambda: asdict(measured_signals.record(plain.with_drafter(checkpoint), questions, params, _share("recorded"))),
    )
    recording = Recording(**recording)
    fitting, others = [q for q, fit in questions if fit], recording.only(~recording.fitting)

    def measure_costs() -> dict[str, Any]:
        sides = plain.with_drafter("none"), plain.with_drafter(checkpoint)
        return asdict(measured_signals.measure_costs(*sides, fitting[:6], params))

    costs = Costs(**_kept(folder / "costs.pt", key, measure_costs))
    simulated: list[dict[str, Any]] = []
    choices: dict[str, tuple[str, Scaling | None, bool, float] | None] = {"all drafts verified": None}
    for name in recording.signals:
        for treatment in measured_signals.TREATMENTS:
            confidence, scaling = measured_signals.treated(recording, name, treatment)
            survival = np.cumprod(confidence, 1)
            cuts = {
                "best": (confidence, measured_signals.best_threshold(recording, confidence, costs)),
                "half": (confidence, measured_signals.threshold_for(recording, confidence, 0.5)),
                "half by survival": (survival, measured_signals.threshold_for(recording, survival, 0.5)),
            }
            for chosen, (values, threshold) in cuts.items():
                found = measured_signals.simulate(others, values[~recording.fitting], threshold, costs)
                simulated.append({"signal": name, "treatment": treatment, "chosen": chosen, **found})
            if name in measured_signals.REALISED:
                choices[f"{name}, {treatment}"] = (name, scaling, treatment == "online", cuts["half"][1])
    blind = measured_signals.simulate_blind(others, costs)
    measure = [question for question, fit in questions if not fit][: study.realised]

    def realise() -> list[dict[str, Any]]:
        drafter = plain.with_drafter(checkpoint).drafter
        return measured_signals.realise(plain, drafter, choices, measure, params, _share("realised"), 10 * study.draws)

    realised = _kept(folder / "realised.pt", key + repr((measure, choices)), realise)
    say("signals: quality")
    study.write(
        "signals",
        measured_signals.qualities(recording, study.draws),
        differences=measured_signals.differences(recording, draws=study.draws),
        simulated=simulated,
        blind=blind,
        realised=realised,
        costs=asdict(costs),
        rounds={"fitting": int(recording.fitting.sum()), "measured": int((~recording.fitting).sum())},
        places=int(measured_signals.reached(others).sum()),
        prompts=len(questions),
    )


def _kept(file: Path, key: str, make: Callable[[], Any]) -> Any:
    """The stored value of the same ``key``; makes and stores it first if there is none."""
    if file.exists():
        kept = torch.load(file, weights_only=False)  # written by this script
        if kept["key"] == key:
            return kept["value"]
    value = make()
    torch.save({"key": key, "value": value}, file)
    return value


def _share(what: str) -> Callable[[float], None]:
    """Print progress at every tenth."""
    printed = 0.0

    def tell(share: float) -> None:
        nonlocal printed
        if share - printed >= 0.1:
            printed = share
            say(f"  signals: {what} {share:.0%}")

    return tell


TABLES: dict[str, Callable[[Study], None]] = {
    "table1": table1,
    "depth": depth,
    "blocks": blocks,
    "heads": heads,
    "thresholds": thresholds,
    "reliability": reliability,
    "efficiency": efficiency,
    "signals": signals,
}


def plan(study: Study) -> None:
    """Print the trained drafters that each table needs, and how many exist."""
    for table in TABLES:
        names = [drafter.name for drafter in study.needed([table])]
        existing = [name for name in names if (study.out / "runs" / name / "drafter").exists()]
        print(f"{table}: {len(existing)} of {len(names)} trained; {', '.join(names)}")


# ------------------------------------------------------------------------------------------------ command line


def _pair(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, got {text!r}")
    return name, Path(path)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "all", "train", "plan", "report"])
    parser.add_argument("--answers", type=Path, help="an artefact of `outrider train regenerate`")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="runs and measurements (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where figures are written (%(default)s)")
    parser.add_argument("--into", type=Path, help="report: the page to write tables into; without it they are printed")
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--trained", type=_pair, action="append", default=[], metavar="NAME=DIR", help="a finished run")
    parser.add_argument("--seeds", type=int, default=3, help="of table1 (%(default)s)")
    parser.add_argument("--kind", action="append", choices=TRAINED, help="of table1; may be repeated (all)")
    parser.add_argument("--steps", type=int, help="of DSpark; other kinds in proportion (the recipes' numbers)")
    parser.add_argument("--features", type=Path, help="an artefact of `outrider train features`")
    parser.add_argument("--limit", type=int, help="held-out prompts of each domain (all)")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10_000, help="reliability: of each temperature (%(default)s)")
    parser.add_argument("--realised", type=int, help="signals: prompts of real scheduling (all prompts for measuring)")
    parser.add_argument(
        "--temperature", type=float, action="append", help="table1, reliability: may be repeated (0, 1)"
    )
    parser.add_argument("--threads", type=int, help="of torch and the native core")
    options = parser.parse_args(words)
    if options.table == "report":
        study_report.report(options.results, options.into)
        return
    if options.answers is None:
        parser.error(f"{options.table} needs {EXAMPLE}")
    if options.threads:
        os.environ["OUTRIDER_THREADS"] = str(options.threads)
        torch.set_num_threads(options.threads)
    study = Study(
        answers=options.answers,
        out=options.out,
        results=options.results,
        target=options.target,
        steps=options.steps,
        seeds=options.seeds,
        kinds=tuple(dict.fromkeys(options.kind or TRAINED)),
        limit=options.limit,
        max_tokens=options.max_tokens,
        temperatures=tuple(options.temperature or (0.0, 1.0)),
        rounds=options.rounds,
        realised=options.realised,
        trained=dict(options.trained),
        features=options.features,
    )
    try:
        if not study.held_out.exists():
            raise InvalidRequest(f"--answers: {study.held_out} does not exist; expected {EXAMPLE}")
        if options.table in ("plan", "train"):
            plan(study) if options.table == "plan" else study.train(study.needed(TABLES))
        else:
            for name in TABLES if options.table == "all" else [options.table]:
                TABLES[name](study)
    except OutriderError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
