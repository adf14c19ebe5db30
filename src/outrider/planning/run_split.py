"""Where the time of a real run went, and what would be worth most.

A round is one target pass that verifies drafts of a row. Its time is split into

    the pass that plain decoding needs too     one row's token
    drafting
    verifying drafts that were accepted        what the pass takes longer, by tokens
    rejected work                              the same, for those that were rejected
    bookkeeping

as far as the file says. Runs of this package record the parts (``outrider bench``, and the page of ``outrider serve``).
llama.cpp's log has the time of drafting where it is verbose. vLLM's page has only counts: with a page of the same
server without speculation, what a round takes longer is drafting and verifying together; without one its passes are
split by their tokens, as a GPU's, whose reading of weights hides the first ``FREE`` tokens of a pass.

Levers are compared at sizes that can be had: half the drafting time, half of what verifying adds, half the bookkeeping,
a tenth more accepted drafts, and the best smaller number of drafts.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from outrider.errors import InvalidRequest

__all__ = [
    "BOOKKEEPING",
    "DRAFTING",
    "KEPT",
    "PLAIN",
    "REJECTED",
    "Lever",
    "Round",
    "Split",
    "read_run",
    "split",
    "split_page",
]

PLAIN = "target pass that plain decoding needs too"
DRAFTING = "drafting"
KEPT = "verifying accepted drafts"
REJECTED = "rejected work"
BOOKKEEPING = "bookkeeping"
UNKNOWN = "target pass, drafting and bookkeeping (no times of them in the file)"
WHOLE = "target pass, verifying included (no plain step in the file)"
FREE = 128.0  # tokens of a pass on a GPU that hide behind reading the weights
CORNER = 4.0
HALF, TENTH = 0.5, 1.1
LEAST = 0.02  # a gain below this is none


@dataclass(frozen=True)
class Round:
    """A mean round, as a file tells it. Seconds; None: not told."""

    title: str
    seconds: float
    drafted: float
    """Drafts that were verified."""
    accepted: float
    draft: float | None = None
    bookkeeping: float | None = None
    plain: float | None = None
    """A plain step: the target pass of one token a row, and its bookkeeping."""
    survivals: tuple[float, ...] = ()
    """Share of rounds that accepted draft j and all before it."""
    pass_tokens: float | None = None
    rows: float | None = None
    block: bool = False
    """Drafting takes the same time for any number of drafts."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lever:
    """Something to change, and how many times as fast the run would be."""

    what: str
    gain: float


@dataclass(frozen=True)
class Split:
    """The parts of a mean round, which sum to its time, and levers, the best first."""

    title: str
    parts: dict[str, float]
    bottleneck: str
    """The largest part that is not the pass that must be paid; where the file does not tell that, perhaps the pass."""
    levers: list[Lever]
    acceptance_length: float
    drafted: float
    speedup: float | None
    """Over plain decoding, where that is known."""
    notes: list[str] = field(default_factory=list)

    @property
    def round_seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def answer(self) -> str:
        """One sentence."""
        speed = "" if self.speedup is None else f"{self.speedup:.2f} x plain decoding; "
        share = self.parts[self.bottleneck] / self.round_seconds
        most = f"most is lost to {self.bottleneck} ({share:.0%})"
        if self.bottleneck == UNKNOWN:
            most = "where the time goes is not in the file"
        if self.bottleneck == WHOLE:
            most = f"most goes into the target pass ({share:.0%}), and what a plain one takes is not in the file"
        best = self.levers[0] if self.levers else None
        if best is None or best.gain < 1 + LEAST:
            return f"{speed}{most}; no single change is worth more than {LEAST:.0%}"
        return f"{speed}{most}; worth most: {best.what} ({best.gain:.2f} x)"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"round_seconds": self.round_seconds, "answer": self.answer}


def split(one: Round) -> Split:
    """Split a mean round. Raises InvalidRequest for counts that cannot be."""
    if not (one.seconds > 0 and 0 <= one.accepted <= one.drafted):
        raise InvalidRequest(
            f"{one.title}: {one.accepted:g} accepted of {one.drafted:g} drafts in {one.seconds:g} s a round cannot be"
        )
    draft, book = one.draft or 0.0, one.bookkeeping or 0.0
    passes = max(0.0, one.seconds - draft - book)
    plain = passes * _plain_share(one) if one.plain is None else min(one.plain, passes)
    extra = passes - plain
    rejected = 0.0 if not one.drafted else extra * (one.drafted - one.accepted) / one.drafted
    told = one.draft is not None
    whole = UNKNOWN if not told else WHOLE
    if one.plain is not None:
        whole = PLAIN
    parts = {whole: plain, DRAFTING: draft, KEPT: extra - rejected, REJECTED: rejected, BOOKKEEPING: book}
    parts = {name: seconds for name, seconds in parts.items() if seconds > 0 or name == REJECTED}
    losses = {name: s for name, s in parts.items() if name not in (PLAIN, UNKNOWN, WHOLE)}
    bottleneck = max(losses, key=lambda name: losses[name])
    length = 1 + one.accepted
    notes = list(one.notes)
    if not told:
        part = "what a round takes longer than a plain step" if one.plain is not None else "the target passes"
        notes.append(f"the file has no time of drafting: it is part of {part} here")
    if whole != PLAIN and losses[bottleneck] < (LEAST * one.seconds if whole == UNKNOWN else plain):
        bottleneck = whole
        notes.append("with --plain FILE, of the same server without speculation, more can be told")
    return Split(
        one.title,
        parts,
        bottleneck,
        _levers(one, plain, extra, draft, book),
        length,
        one.drafted,
        None if one.plain is None else one.plain * length / one.seconds,
        notes,
    )


def _plain_share(one: Round, drafts: float = 0.0) -> float:
    """Of a pass, the share that one with ``drafts`` a row would take, by tokens."""
    if one.pass_tokens is None or one.rows is None:
        return 1.0

    def cost(tokens: float) -> float:
        return (FREE**CORNER + tokens**CORNER) ** (1 / CORNER)

    return cost(one.rows * (1 + drafts)) / cost(max(one.pass_tokens, one.rows * (1 + drafts)))


def _levers(one: Round, plain: float, extra: float, draft: float, book: float) -> list[Lever]:
    seconds, length = one.seconds, 1 + one.accepted

    def speed(new_seconds: float, new_length: float = length) -> float:
        return (new_length / new_seconds) / (length / seconds)

    levers = [
        Lever("accept a tenth more drafts (train or calibrate the drafter on these prompts)",
              speed(seconds, 1 + min(TENTH * one.accepted, one.drafted))),
    ]  # fmt: skip
    if draft:
        levers.append(Lever("draft in half the time (a smaller drafter or dtype)", speed(seconds - HALF * draft)))
    if book:
        levers.append(Lever("half the bookkeeping (sampling, scheduling)", speed(seconds - HALF * book)))
    if extra > 0:
        levers.append(
            Lever("halve what verifying adds to a plain pass (kernels, tiles)", speed(seconds - HALF * extra))
        )
    most = round(one.drafted)
    for k in range(1, most if one.survivals else 0):
        verify = plain + extra * k / one.drafted
        if one.plain is None and one.rows is not None:
            verify = (plain + extra) * _plain_share(one, k)
        drafting = draft if one.block else draft * k / one.drafted
        new = verify + drafting + book
        what = f"draft at most {k} token" + ("s" if k > 1 else "")
        levers.append(Lever(what, speed(new, 1 + sum(one.survivals[:k]))))
    if one.plain is not None:
        levers.append(Lever("decode plainly", speed(one.plain, 1.0)))
    fewer = [lever for lever in levers if lever.what.startswith("draft at most")]
    kept = [lever for lever in levers if lever not in fewer] + sorted(fewer, key=lambda x: -x.gain)[:1]
    return sorted((lever for lever in kept if lever.gain > 1), key=lambda lever: -lever.gain)


# ------------------------------------------------------------------------------------------------ files


def read_run(path: Path, plain: Path | None = None) -> list[Split]:
    """A file of a run, told by its content. ``plain``: a vLLM page or llama.cpp log of the same server and load without
    speculation.

    Raises InvalidRequest for what is none, or holds no rounds with drafts.
    """
    try:
        rounds = _rounds(_text(path, "--explain"), path)
        step = None if plain is None else _plain_step(_text(plain, "--plain"), plain)
    except InvalidRequest:
        raise
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"--explain: {path} holds a number that is none: {error}") from None
    if not rounds:
        raise InvalidRequest(f"--explain: {path} holds no rounds with drafts; was speculation on?")
    return [split(one if step is None else replace(one, plain=step)) for one in rounds]


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InvalidRequest(f"{option}: {path} cannot be read: {error.strerror}") from None


def _rounds(text: str, path: Path) -> list[Round]:
    if "spec_decode_num_drafts" in text:
        return [_metrics_page(text, path.name)]
    if text.lstrip()[:1] in "{[" and text.strip():
        return _json(text, path)
    if "eval time" in text:
        return _llama_log(text, path.name)
    raise InvalidRequest(
        f"--explain: {path} is not a known run: expected JSON of `outrider bench` or `eval`, a vLLM /metrics page "
        "with spec_decode counters, or a llama.cpp server log or timings"
    )


SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+([-+.\deE]+|NaN|[-+]?Inf)(?:\s+\d+)?$")


def _samples(text: str) -> tuple[dict[str, float], dict[int, float]]:
    """(values by name, accepted drafts by position) of a Prometheus page. Those of all models on it are summed."""
    total: dict[str, float] = {}
    positions: dict[int, float] = {}
    for line in text.splitlines():
        found = SAMPLE.match(line.strip())
        if found is None or found[3] in ("NaN", "Inf", "+Inf", "-Inf"):
            continue
        name, labels, value = found[1].split(":")[-1], found[2] or "", float(found[3])
        name = name.removeprefix("outrider_")
        total[name] = total.get(name, 0.0) + value
        position = re.search(r'position="(\d+)"', labels)
        if position and name == "spec_decode_num_accepted_tokens_per_pos_total":
            positions[int(position[1])] = positions.get(int(position[1]), 0.0) + value
    return total, positions


def _decoding(total: Mapping[str, float], drafts: float) -> tuple[float, float]:
    """(row-seconds of decoding, steps of rows in it) of vLLM's page. An n-gram drafter drafts in some steps only."""
    steps = max(drafts, total.get("inter_token_latency_seconds_count", 0.0))
    if seconds := total.get("request_decode_time_seconds_sum", 0.0):
        return seconds, steps
    for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
        if total.get(f"{name}_count"):
            return total[f"{name}_sum"] / total[f"{name}_count"] * steps, steps
    return 0.0, steps


def _plain_step(text: str, path: Path) -> float:
    """Seconds of a step of a row, in the page or log of a server without speculation."""
    if "eval time" in text:
        answers = _answers(text)
        plain = [one.milliseconds / one.rounds for one in answers if one.tokens > 1]
        if not plain or any(one.drafted for one in answers):
            raise InvalidRequest(f"--plain: {path} holds drafts; expected a log of the server without speculation")
        return median(plain) / 1e3
    total, _ = _samples(text)
    if total.get("spec_decode_num_drafts_total"):
        raise InvalidRequest(f"--plain: {path} counts drafts; expected a page of the server without speculation")
    seconds, steps = _decoding(total, 0.0)
    if not seconds or not steps:
        raise InvalidRequest(f"--plain: {path} has no decode times (request_decode_time_seconds or the like)")
    return seconds / steps


def _metrics_page(text: str, title: str) -> Round:
    """A Prometheus page of vLLM, or of ``outrider serve``."""
    total, positions = _samples(text)

    def counter(name: str) -> float:
        return total.get(f"{name}_total", 0.0)

    drafts, drafted = counter("spec_decode_num_drafts"), counter("spec_decode_num_draft_tokens")
    accepted = counter("spec_decode_num_accepted_tokens")
    if not drafts:
        raise InvalidRequest(f"--explain: {title} counts no drafts; was speculation on?")
    notes = ["counts are since the server's start: compare two pages for a stretch of time"]
    survivals = [positions[j] for j in sorted(positions)]
    if counter("drafting_steps"):  # this package's server
        steps, plain = counter("drafting_steps"), counter("plain_steps")
        draft, verify, book = (
            counter(f"drafting_step_{name}_seconds") / steps for name in ("draft", "verify", "bookkeeping")
        )
        return Round(
            title,
            draft + verify + book,
            drafted / drafts,
            accepted / drafts,
            draft,
            book,
            counter("plain_step_seconds") / plain if plain else None,
            tuple(one / drafts for one in survivals),
            notes=tuple(notes),
        )
    decoding, rounds = _decoding(total, drafts)
    if not decoding:
        raise InvalidRequest(f"--explain: {title} has no decode times (request_decode_time_seconds or the like)")
    if rounds > 1.05 * drafts:
        notes.append(f"{1 - drafts / rounds:.0%} of the rounds had no drafts; they are part of the mean")
    steps = total.get("iteration_tokens_total_count", 0.0)
    return Round(
        title,
        decoding / rounds,
        drafted / rounds,
        accepted / rounds,
        survivals=tuple(one / rounds for one in survivals),
        pass_tokens=total["iteration_tokens_total_sum"] / steps if steps else None,
        rows=rounds / steps if steps else None,
        notes=tuple(notes),
    )


EVAL = re.compile(r"(?<!prompt )\beval time\s*=\s*([\d.]+) ms /\s*(\d+) (?:tokens|runs)")
ACCEPTANCE = re.compile(r"draft acceptance(?: rate)?\s*=\s*[\d.]+ \(\s*(\d+) accepted /\s*(\d+) generated\)")
BLOCK_DRAFTERS = ("draft-dspark", "draft-dflash")
STATISTICS = re.compile(r"statistics\s+([\w-]+):.*?dur\(b,g,a\)\s*=\s*([\d.]+), ([\d.]+), ([\d.]+) ms")  # noqa: E501


@dataclass
class _Answer:
    """One request of a llama.cpp server."""

    milliseconds: float
    tokens: int
    """The first one included, which the prompt's pass gave before the time began."""
    drafted: int = 0
    accepted: int = 0

    @property
    def rounds(self) -> int:
        return max(1, self.tokens - 1 - self.accepted)


def _answers(text: str) -> list[_Answer]:
    answers: list[_Answer] = []
    for line in text.splitlines():
        if found := EVAL.search(line):
            answers.append(_Answer(float(found[1]), int(found[2])))
        elif (found := ACCEPTANCE.search(line)) and answers:
            answers[-1].accepted, answers[-1].drafted = int(found[1]), int(found[2])
    return answers


def _llama_log(text: str, title: str) -> list[Round]:
    answers = _answers(text)
    durations: dict[str, tuple[float, float, float]] = {}  # by implementation: what its latest line says, in all
    rates: tuple[float, ...] = ()
    for found in STATISTICS.finditer(text):
        durations[found[1]] = float(found[2]), float(found[3]), float(found[4])
        if shares := re.search(r"#acc rate/pos = \(([\d., ]+)\)", found[0]):
            rates = tuple(float(share) for share in shares[1].split(","))
    drafting = [one for one in answers if one.drafted]
    begin, generate, accept = (
        (sum(parts) for parts in zip(*durations.values(), strict=True)) if durations else (0, 0, 0)
    )
    block = bool(durations) and all(name in BLOCK_DRAFTERS for name in durations)
    return _llama_round(title, answers, drafting, generate if durations else None, begin + accept, rates, block)


def _llama_round(
    title: str,
    answers: Sequence[_Answer],
    drafting: Sequence[_Answer],
    draft: float | None,
    other: float,
    survivals: tuple[float, ...],
    block: bool = False,
) -> list[Round]:
    """Milliseconds over all answers -> a mean round. Answers without drafts show what a plain step takes."""
    if not drafting:
        return []
    rounds = sum(one.rounds for one in drafting)
    plain = [one.milliseconds / one.rounds for one in answers if not one.drafted and one.tokens > 1]
    drafted, accepted = (sum(getattr(one, n) for one in drafting) / rounds for n in ("drafted", "accepted"))
    return [
        Round(
            title,
            sum(one.milliseconds for one in drafting) / rounds / 1e3,
            drafted,
            accepted,
            None if draft is None else draft / rounds / 1e3,
            other / rounds / 1e3 if draft is not None else None,
            median(plain) / 1e3 if plain else None,
            survivals or _even(drafted, accepted),
            block=block,
        )
    ]


def _even(drafted: float, accepted: float) -> tuple[float, ...]:
    """Survivals at one probability a position that give ``accepted`` drafts, where the file has only that."""
    low, high, count = 0.0, 1.0, max(1, math.ceil(drafted))
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle ** (j + 1) for j in range(count)) < accepted else (low, middle)
    return tuple(high ** (j + 1) for j in range(count))


# ------------------------------------------------------------------------------------------------ JSON


def _json(text: str, path: Path) -> list[Round]:
    try:
        value = json.loads(text)
    except ValueError:
        try:  # one object a line
            value = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise InvalidRequest(f"--explain: {path} is no JSON: {error}") from None
    try:
        if isinstance(value, Mapping) and "rows" in value:
            return [one for row in value["rows"] if (one := _row(row, value["rows"])) is not None]
        return _timings(value if isinstance(value, list) else [value], path.name)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise InvalidRequest(f"--explain: {path} lacks {error}; expected JSON of bench, eval or llama.cpp") from None


def _timings(values: Iterable[Any], title: str) -> list[Round]:
    """Answers of a llama.cpp server, or their ``timings``."""
    answers = []
    for value in values:
        one = value.get("timings", value)
        answers.append(
            _Answer(one["predicted_ms"], one["predicted_n"], one.get("draft_n", 0), one.get("draft_n_accepted", 0))
        )
    return _llama_round(title, answers, [one for one in answers if one.drafted], None, 0.0, ())


def _row(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Round | None:
    """A row of ``bench``, ``bench --load`` or ``eval``; None: no drafts."""
    if "policy" in row:
        return _load_row(row, rows)
    if "domain" in row:  # eval
        length, rate = row["acceptance_length"]["value"], row["acceptance_rate"]["value"]
        accepted, together = row["without_bonus"]["value"] or 0.0, 1
        fast, plain = row["tokens_per_second"]["value"], row["plain_tokens_per_second"]["value"]
        drafted = accepted / rate if rate else 0.0
        survivals = tuple(one["value"] or 0.0 for one in row["cumulative"])
        title = f"{row['drafter']}, {row['domain']}, temperature {row['temperature']:g}"
    else:
        length, together = row["acceptance_length"], row["concurrency"]
        accepted, fast, plain = length - 1, row["tokens_per_second"], row["baseline_tokens_per_second"]
        survivals = tuple(row["accepted_per_position"])
        drafted = row.get("drafted_per_round") or float(len(survivals))
        title = f"{row['drafter']}, {row['prompts']}, temperature {row['temperature']:g}"
    if not drafted or not accepted <= drafted:
        return None
    seconds, alone = together * length / fast, together / plain if plain else None
    steps = row.get("step_ms") if row.get("plain_step_ms") is not None else None
    parts: dict[str, float] = {}
    if steps:  # of steps without prompts, on both sides
        parts = {name: steps[name] / 1e3 for name in ("draft", "verify", "bookkeeping")}
        seconds, alone = sum(parts.values()), row["plain_step_ms"] / 1e3
        title += ", prompts left out"
    return Round(
        title,
        seconds,
        drafted,
        accepted,
        parts.get("draft"),
        parts.get("bookkeeping"),
        alone,
        survivals,
        block="dspark" in row["drafter"] or "dflash" in row["drafter"],
    )


def _load_row(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Round | None:
    length, drafted, users = row["acceptance_length"], row["verified_per_row"], row["concurrency"]
    if not length or not drafted:
        return None
    plain = [r for r in rows if r["policy"] == "none" and (r["concurrency"], r["rate"]) == (users, row["rate"])]
    return Round(
        f"{row['policy']}, {users:g} users",
        length / row["per_user_tokens_per_second"],
        drafted,
        length - 1,
        plain=1 / plain[0]["per_user_tokens_per_second"] if plain else None,
        survivals=_even(drafted, length - 1),
        notes=("prompts of other users are part of the times",),
    )


def split_page(splits: Sequence[Split]) -> str:
    """An HTML page of bars; it needs no other file."""
    parts = ["<!doctype html><meta charset='utf-8'><title>Where the time went</title>"]
    parts.append(
        "<style>body{max-width:60em;margin:2em auto;font-family:sans-serif}div.b{background:#48c;height:1em}</style>"
    )
    for one in splits:
        parts.append(f"<h2>{html.escape(one.title)}</h2><p>{html.escape(one.answer)}</p>")
        for name, seconds in one.parts.items():
            share = seconds / one.round_seconds
            parts.append(
                f"<p>{html.escape(name)}: {1e3 * seconds:.3f} ms</p><div class='b' style='width:{share:.1%}'></div>"
            )
        levers = "".join(f"<li>{html.escape(lever.what)}: {lever.gain:.2f} x</li>" for lever in one.levers)
        parts.append(f"<ol>{levers}</ol>")
    return "".join(parts) + "\n"
