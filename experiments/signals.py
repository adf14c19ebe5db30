"""Which signal predicts acceptance best? Signals recorded in real rounds, their quality, and the speed they would give.

    head          the trained confidence head
    margin        q1 / (q1 + q2) of the drafter's two likeliest tokens: the sigmoid of their logits' difference
    entropy       exp(-H) of the drafter's distribution: 1 / its effective number of tokens
    ngram         statistics of the text: share of the most frequent token after the longest earlier occurrence of the
                  text's end, times Laplace's (m + 1) / (m + 2) for an occurrence of m tokens
    ngram-token   the same for the drafted token. It depends on that token, so no scheduler may use it under rejection
                  sampling (likely tokens would be kept more often); it shows what this restriction costs
    oracle        sum_x min(p(x), q(x)): the exact probability of acceptance, which needs the target's distribution

A confidence at position j is conditional on the acceptance of the drafts before j. So confidences are measured over the
rounds that reached position j, and their products (survivals) over all rounds that verified it.

n rounds, K positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.evaluation.comparison import MACRO, Counts, Sample, row_of
from outrider.evaluation.recording import EvalPrompt, Recorder, answer, recorded
from outrider.scheduling import calibration
from outrider.scheduling.calibration import Scaling
from outrider.scheduling.online_correction import OnlineCorrection
from outrider.types import (
    Context,
    Drafter,
    Proposal,
    RaggedBatch,
    Rng,
    SchedulerPolicy,
    StepCost,
    StepRecord,
    StepView,
    TargetOutput,
    Values,
)

__all__ = [
    "REALISED",
    "SIGNALS",
    "TREATMENTS",
    "Clock",
    "Costs",
    "Recording",
    "best_threshold",
    "clocked",
    "differences",
    "measure_costs",
    "overlap",
    "qualities",
    "realise",
    "record",
    "signals_of",
    "simulate",
    "simulate_blind",
    "threshold_for",
    "treated",
]

SIGNALS = ("head", "margin", "entropy", "ngram", "ngram-token", "oracle")
REALISED = ("head", "margin", "entropy", "ngram")
"""Signals that a scheduler may use: none depends on the drafted token or the target's distribution."""
TREATMENTS = ("raw", "STS", "online")
LONGEST = 32  # longest occurrence that is searched, in tokens
THRESHOLDS = tuple(k / 20 for k in range(20))
DRAWS = 200  # of the bootstrap
Floats = NDArray[np.float64]


# ------------------------------------------------------------------------------------------------ signals


def continuations(tokens: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
    """Length of the longest suffix of the text that occurred before (at most LONGEST; 0: its last token is new), and
    the token after each of those occurrences. int64 [n], n > 1"""
    last = len(tokens) - 1
    ends, length = np.arange(last), 0
    while length < LONGEST:
        longer = ends[ends >= length]
        longer = longer[tokens[longer - length] == tokens[last - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    return length, tokens[ends + 1]


def ngram_signals(history: Sequence[int], drafts: Sequence[int]) -> tuple[list[float], list[float]]:
    """``ngram`` and ``ngram-token`` of each draft."""
    text = np.array([*history, *drafts], dtype=np.int64)
    likeliest, drafted = [], []
    for j, token in enumerate(drafts):
        length, followers = continuations(text[: len(history) + j])
        trust = (length + 1) / (length + 2) / len(followers)
        likeliest.append(float(trust * np.unique(followers, return_counts=True)[1].max()))
        drafted.append(float(trust * (followers == token).sum()))
    return likeliest, drafted


def margin_signal(distribution: Tensor) -> list[float]:
    """Probabilities [K, S] -> K"""
    best = distribution.topk(2, -1).values
    found: list[float] = (best[:, 0] / best.sum(-1)).tolist()
    return found


def entropy_signal(distribution: Tensor) -> list[float]:
    """Probabilities [K, S] -> K"""
    found: list[float] = torch.special.entr(distribution).sum(-1).neg().exp().tolist()
    return found


def overlap(p: Tensor, q: Tensor) -> list[float]:
    """``oracle``: the distributions of target and drafter, [K, V] each -> K"""
    found: list[float] = torch.minimum(p, q).sum(-1).clamp(max=1).tolist()
    return found


def probabilities_of(proposal: Proposal) -> Tensor:
    """Probabilities of the first row's drafts over their stored columns, [K, S]."""
    assert proposal.distribution is not None, "only sampled drafts have a distribution"
    positions = torch.arange(proposal.tokens.shape[1])
    return proposal.distribution.columns(positions)[0].float()  # type: ignore[attr-defined]


def signals_of(
    proposal: Proposal, history: Sequence[int], names: Sequence[str] = SIGNALS[:-1]
) -> dict[str, list[float]]:
    """All signals but the oracle, for the first row's drafts."""
    drafts = proposal.tokens[0, : int(proposal.lengths[0])].tolist()
    found: dict[str, list[float]] = {}
    if "head" in names and proposal.confidence is not None:
        found["head"] = proposal.confidence[0, : len(drafts)].tolist()
    if "margin" in names:
        found["margin"] = margin_signal(probabilities_of(proposal))[: len(drafts)]
    if "entropy" in names:
        found["entropy"] = entropy_signal(probabilities_of(proposal))[: len(drafts)]
    if "ngram" in names or "ngram-token" in names:
        found["ngram"], found["ngram-token"] = ngram_signals(history, drafts)
    return {name: found[name] for name in names if name in found}


# ------------------------------------------------------------------------------------------------ recording


class Wrapped:
    """A drafter that forwards to another one."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.aux_layers, self.block = drafter, drafter.aux_layers, drafter.block

    def open(self, slot: int, capacity: int) -> None:
        self.drafter.open(slot, capacity)

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        return self.drafter.propose(slots, last, context, limit, rng)

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        self.drafter.observe(batch, features)

    def close(self, slot: int) -> None:
        self.drafter.close(slot)


class SignalRecorder(Wrapped):
    """Keeps the last proposal and its signals."""

    last: tuple[Proposal, dict[str, list[float]]] | None = None

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        proposal = super().propose(slots, last, context, limit, rng)
        self.last = (proposal, signals_of(proposal, context.history[0])) if int(proposal.lengths[0]) else None
        return proposal


class Signalled(Wrapped):
    """Returns one signal as its confidence, raw or scaled."""

    def __init__(self, drafter: Drafter, signal: str, scaling: Scaling | None) -> None:
        super().__init__(drafter)
        self._signal, self._scaling = signal, scaling

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        proposal = super().propose(slots, last, context, limit, rng)
        if not int(proposal.lengths[0]):
            return proposal
        (values,) = signals_of(proposal, context.history[0], [self._signal]).values()
        if self._scaling is not None:
            values = self._scaling.adjust(values)
        rest = proposal.tokens.shape[1] - len(values)
        confidence = torch.tensor([values + [0.0] * rest])
        return Proposal(proposal.tokens, proposal.lengths, proposal.distribution, confidence)


def has_round(record: StepRecord) -> bool:
    """Whether a step has a row that is past its prompt."""
    return any(not row.first for row in record.rows)


class LogitsRecorder:
    """A target that keeps its last logits."""

    logits: Tensor

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def forward(self, *args: Any) -> TargetOutput:
        output: TargetOutput = self._target.forward(*args)
        self.logits = output.logits.clone()
        return output


class RoundRecorder(Recorder):
    """Keeps the signals of every round, in order."""

    def __init__(self, signal_recorder: SignalRecorder, target: LogitsRecorder) -> None:
        super().__init__()
        self._signal_recorder, self._target = signal_recorder, target
        self.signals: list[dict[str, list[float]]] = []

    def step(self, record: StepRecord) -> None:
        last, self._signal_recorder.last = self._signal_recorder.last, None
        if has_round(record):
            self.signals.append({} if last is None else self._complete(*last))
        super().step(record)

    def _complete(self, proposal: Proposal, signals: dict[str, list[float]]) -> dict[str, list[float]]:
        count = int(proposal.lengths[0])
        assert proposal.distribution is not None
        q = proposal.distribution.dense(torch.arange(count)).float()
        return signals | {"oracle": overlap(self._target.logits[:count].float().softmax(-1), q)}


@dataclass(frozen=True, slots=True)
class Recording:
    """Rounds at temperature 1 with all drafts verified, in the order of decoding."""

    signals: dict[str, Floats]  # [n, K] each; NaN past a round's drafts
    verified: NDArray[np.int64]  # [n]
    accepted: NDArray[np.int64]  # [n]
    committed: NDArray[np.int64]  # [n]
    prompt: NDArray[np.int64]  # [n]   number of the prompt
    domain: NDArray[np.int64]  # [n]
    fitting: NDArray[np.bool_]  # [n]  whether the prompt is for fitting; the others are for measuring

    def only(self, rows: NDArray[Any]) -> Recording:
        """A subset of the rounds, by mask or index."""
        signals = {name: values[rows] for name, values in self.signals.items()}
        rest = (self.verified, self.accepted, self.committed, self.prompt, self.domain, self.fitting)
        return Recording(signals, *(values[rows] for values in rest))


def record(
    llm: LLM,
    questions: Sequence[tuple[EvalPrompt, bool]],
    params: SamplingParams,
    tell: Callable[[float], None] = lambda share: None,
) -> Recording:
    """Answer each question (with whether it is for fitting) under ``params``, each with its own seed. ``llm`` must be
    new, and its drafter must sample its drafts; the checkpoint's calibration is not applied."""
    drop_calibration(llm.drafter)
    llm.drafter = signal_recorder = SignalRecorder(llm.drafter)
    llm.target = logits_recorder = LogitsRecorder(llm.target)  # type: ignore[assignment]
    round_recorder = RoundRecorder(signal_recorder, logits_recorder)
    llm.observers.append(round_recorder)
    domains = {domain: number for number, domain in enumerate(dict.fromkeys(q.domain for q, _ in questions))}
    rows: list[tuple[dict[str, list[float]], tuple[int, ...], bool]] = []
    for number, (question, fitting) in enumerate(questions):
        round_recorder.signals.clear()
        found = answer(llm, round_recorder, question.prompt, with_seed(params, number))
        for signals, one in zip(round_recorder.signals, found.rounds, strict=False):  # counted rounds come first
            if one.verified:
                facts = one.verified, one.accepted, one.committed, number, domains[question.domain]
                rows.append((signals, facts, fitting))
        tell((number + 1) / len(questions))
    width = max((facts[0] for _, facts, _ in rows), default=0)
    names = [name for name in SIGNALS if rows and name in rows[0][0]]
    table = np.array([facts for _, facts, _ in rows], dtype=np.int64).reshape(-1, 5)
    found = {name: np.array([padded(signals[name][:width], width) for signals, _, _ in rows]) for name in names}
    for values in found.values():
        values[np.arange(width) >= table[:, :1]] = np.nan
    return Recording(found, *table.T, np.array([fitting for _, _, fitting in rows]))


def padded(values: Sequence[float], width: int) -> list[float]:
    return [*values, *[float("nan")] * (width - len(values))]


def with_seed(params: SamplingParams, number: int) -> SamplingParams:
    return replace(params, seed=((params.seed or 0) << 40) + number)


def drop_calibration(drafter: Any) -> None:
    """Remove a checkpoint's calibration, so that raw confidences are measured."""
    if hasattr(drafter, "calibration"):
        drafter.calibration = None


# ------------------------------------------------------------------------------------------------ treatments


def treated(recording: Recording, name: str, treatment: str) -> tuple[Floats, Scaling | None]:
    """A signal as probabilities [n, K], and the scaling that made them so.

    ``STS`` is fitted on the prompts for fitting (with a shift where a temperature alone leaves more than 1 % of error);
    ``online`` processes all rounds in order, and predicts each before it is updated with it.
    """
    values = recording.signals[name]
    if treatment == "raw":
        return values, None
    if treatment == "STS":
        own = recording.only(recording.fitting)
        logits = calibration.logits_of(torch.from_numpy(own.signals[name]))
        scaling = calibration.fit(logits, torch.from_numpy(own.verified), torch.from_numpy(own.accepted), shift=None)
        return scaling.apply(calibration.logits_of(torch.from_numpy(values))).numpy(), scaling
    correction, found = OnlineCorrection(), np.full_like(values, np.nan)
    for row, (verified, accepted) in enumerate(zip(recording.verified, recording.accepted, strict=True)):
        predicted = values[row, :verified].tolist()
        found[row, :verified] = correction.adjust(predicted)
        correction = correction.update(predicted, int(verified), int(accepted))
    return found, None


# ------------------------------------------------------------------------------------------------ quality


def reached(recording: Recording) -> NDArray[np.bool_]:
    """Positions whose draft was verified and whose earlier drafts were all accepted, [n, K]."""
    width = next(iter(recording.signals.values())).shape[1]
    place = np.arange(width)
    found: NDArray[np.bool_] = (place < recording.verified[:, None]) & (place <= recording.accepted[:, None])
    return found


def _areas(confidence: Floats, verified: NDArray[Any], accepted: NDArray[Any]) -> dict[str, float]:
    """Areas under the curve, of some rounds."""
    place = np.arange(confidence.shape[1])
    outcome = accepted[:, None] > place
    offered = verified[:, None] > place
    came = offered & (accepted[:, None] >= place)
    survival = np.cumprod(confidence, 1)
    areas = [_auc(confidence[came[:, j], j], outcome[came[:, j], j]) for j in place]
    weights = [int(came[:, j].sum()) for j in place]
    known = [(area, weight) for area, weight in zip(areas, weights, strict=True) if not np.isnan(area)]
    return {
        "auc": _auc(confidence[came], outcome[came]),
        "auc_first": areas[0],
        "auc_within": sum(a * w for a, w in known) / max(1, sum(w for _, w in known)),
        "survival_auc": _auc(survival[offered], outcome[offered]),
    }


def _errors(confidence: Floats, verified: NDArray[Any], accepted: NDArray[Any]) -> dict[str, list[float]]:
    """Calibration errors, each with the error that exact probabilities would show over as many outcomes."""
    place = np.arange(confidence.shape[1])
    outcome = accepted[:, None] > place
    offered = verified[:, None] > place
    came = offered & (accepted[:, None] >= place)
    found = {}
    for name, values, where in (("ece", confidence, came), ("survival_ece", np.cumprod(confidence, 1), offered)):
        predicted, outcomes = torch.from_numpy(values[where]), torch.from_numpy(outcome[where])
        found[name] = [calibration.calibration_error(predicted, outcomes), calibration.error_of_chance(predicted)]
    return found


def _auc(values: Floats, outcomes: NDArray[np.bool_]) -> float:
    return calibration.area_under_curve(torch.from_numpy(values), torch.from_numpy(outcomes))


def qualities(recording: Recording, draws: int = DRAWS) -> list[dict[str, Any]]:
    """Each signal under each treatment on the prompts for measuring.

    ``auc`` of confidences where they were reached (``auc_first``: at the first position, which every round reaches;
    ``auc_within``: the mean over positions of the area at each) and ``survival_auc``, with 95 % intervals from
    resampling prompts; ``ece`` and ``survival_ece`` over 15 bins of equal mass, with the error that chance explains.
    """
    measured = recording.only(~recording.fitting)
    picks = resamples(measured, draws)
    rows = []
    for name in recording.signals:
        for treatment in TREATMENTS:
            confidence = treated(recording, name, treatment)[0][~recording.fitting]
            value = _areas(confidence, measured.verified, measured.accepted)
            drawn = [_areas(confidence[p], measured.verified[p], measured.accepted[p]) for p in picks]
            areas = {k: [v, *interval([one[k] for one in drawn])] for k, v in value.items()}
            errors = _errors(confidence, measured.verified, measured.accepted)
            rows.append({"signal": name, "treatment": treatment, **areas, **errors})
    return rows


def differences(recording: Recording, against: str = "head", draws: int = DRAWS) -> list[dict[str, Any]]:
    """Area under the curve of each raw signal minus that of ``against``, on the same prompts."""
    measured = recording.only(~recording.fitting)
    if against not in measured.signals:
        return []
    came = reached(measured)

    def area(name: str, rows: NDArray[np.int64]) -> float:
        some = came[rows]
        outcome = measured.accepted[rows][:, None] > np.arange(came.shape[1])
        return _auc(measured.signals[name][rows][some], outcome[some])

    everything, picks = np.arange(len(measured.verified)), resamples(measured, draws)
    base, drawn = area(against, everything), [area(against, p) for p in picks]
    return [
        {
            "signal": name,
            "against": against,
            "auc": [
                area(name, everything) - base,
                *interval([area(name, p) - one for p, one in zip(picks, drawn, strict=True)]),
            ],
        }
        for name in measured.signals
        if name != against
    ]


def resamples(recording: Recording, draws: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """Resamples of prompts within their domain, as round indices; a prompt's rounds stay together."""
    generator = np.random.default_rng(seed)
    of_prompt = {int(p): np.flatnonzero(recording.prompt == p) for p in np.unique(recording.prompt)}
    domains = [np.unique(recording.prompt[recording.domain == d]) for d in np.unique(recording.domain)]
    return [
        np.concatenate([of_prompt[int(p)] for prompts in domains for p in generator.choice(prompts, len(prompts))])
        for _ in range(draws)
    ]


def interval(values: Sequence[float]) -> list[float]:
    return [float(x) for x in np.nanquantile(values, [0.025, 0.975])]


# ------------------------------------------------------------------------------------------------ scheduling


@dataclass(frozen=True, slots=True)
class Costs:
    """Median seconds of the parts of a round, and of a plain step."""

    draft: float
    bookkeeping: float
    verify: tuple[float, ...]  # of 1, 2, ... tokens: the last token and its drafts
    plain: float


class Clock(Recorder):
    """Keeps the cost of rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[StepCost] = []

    def step(self, record: StepRecord) -> None:
        if has_round(record):
            self.costs.append(record.cost)
        super().step(record)


def clocked(llm: LLM) -> Clock:
    """Add a clock to an LLM that has not answered yet."""
    clock = Clock()
    llm.observers.append(clock)
    return clock


class VaryingPolicy:
    """Verifies 0, 1, ..., K drafts in turns, whatever their confidences."""

    def __init__(self, policy: SchedulerPolicy) -> None:
        self._policy, self._turn = policy, 0

    def plan(self, step: StepView) -> Sequence[int]:
        return self._policy.plan(step)

    def choose(self, confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        self._turn += 1
        most = self._turn % (max(lengths) + 1)
        return [min(n, most) for n in lengths]

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        self._policy.observe(cost, accepted)


def measure_costs(plain: LLM, llm: LLM, questions: Sequence[EvalPrompt], params: SamplingParams) -> Costs:
    """Of two new LLMs, one without a drafter, in turns on the same prompts."""
    llm.policy = VaryingPolicy(llm.policy)
    clocks = clocked(plain), clocked(llm)
    for turn in range(2):  # the first only warms up
        for clock in clocks:
            clock.costs.clear()
        for number, question in enumerate(questions if turn else questions[:1]):
            for one, clock in zip((plain, llm), clocks, strict=True):
                answer(one, clock, question.prompt, with_seed(params, number))
    steps, rounds = clocks[0].costs, [cost for cost in clocks[1].costs if cost.draft > 0]
    by_tokens: dict[int, list[float]] = {}
    for cost in rounds:
        by_tokens.setdefault(cost.tokens, []).append(cost.verify)
    medians = [median(by_tokens[tokens]) for tokens in sorted(by_tokens) if tokens <= llm.drafter.block + 1]
    return Costs(
        median(cost.draft for cost in rounds),
        median(cost.bookkeeping for cost in rounds),
        tuple(np.maximum.accumulate(medians).tolist()),
        median(cost.draft + cost.verify + cost.bookkeeping for cost in steps),
    )


def simulate(recording: Recording, confidence: Floats, threshold: float, costs: Costs) -> dict[str, float]:
    """The recorded rounds, truncated at the first confidence under a threshold, with measured costs.

    An approximation: truncated rounds would have continued at other positions than the recorded ones. A round's end
    by the end of its text is kept where it is not cut off.
    """
    place = np.arange(confidence.shape[1])
    offered = place < recording.verified[:, None]
    verified = np.logical_and.accumulate(offered & (confidence >= threshold), 1).sum(1)
    cut = verified < recording.verified
    accepted = np.minimum(recording.accepted, verified)
    committed = np.where(cut, accepted + 1, recording.committed)
    seconds = len(verified) * (costs.draft + costs.bookkeeping) + np.array(costs.verify)[verified].sum()
    return {
        "threshold": threshold,
        "acceptance_length": float(committed.mean()),
        "acceptance_rate": float(accepted.sum() / max(1, verified.sum())),
        "verify_rate": float(verified.sum() / recording.verified.sum()),
        "speedup": float(committed.sum() * costs.plain / seconds),
    }


def simulate_blind(recording: Recording, costs: Costs) -> list[dict[str, Any]]:
    """Without any signal: the first k drafts of every round are verified, k = 1, 2, ..."""
    width = next(iter(recording.signals.values())).shape[1]
    sure = np.arange(width) < np.arange(1, width + 1)[:, None]
    shape = recording.verified.shape[0], width
    return [
        {"drafts": k + 1, **simulate(recording, np.broadcast_to(sure[k].astype(float), shape), 0.5, costs)}
        for k in range(width)
    ]


def best_threshold(recording: Recording, confidence: Floats, costs: Costs) -> float:
    """That of the largest simulated speed-up on the prompts to fit on; of equals the smallest."""
    own = recording.only(recording.fitting)
    speed = [simulate(own, confidence[recording.fitting], t, costs)["speedup"] for t in THRESHOLDS]
    return THRESHOLDS[int(np.argmax(speed))]


def threshold_for(recording: Recording, confidence: Floats, share: float) -> float:
    """The threshold that verifies nearest to ``share`` of the drafts, on the prompts for fitting."""
    own, values = recording.only(recording.fitting), confidence[recording.fitting]
    place = np.arange(values.shape[1])
    offered = place < own.verified[:, None]
    tried = np.unique(np.quantile(values[offered], np.linspace(0, 1, 201)))
    kept = [np.logical_and.accumulate(offered & (values >= t), 1).sum() / offered.sum() for t in tried]
    return float(tried[int(np.argmin(np.abs(np.array(kept) - share)))])


def realise(
    plain: LLM,
    drafter: Drafter,
    choices: Mapping[str, tuple[str, Scaling | None, bool, float] | None],
    questions: Sequence[EvalPrompt],
    params: SamplingParams,
    tell: Callable[[float], None] = lambda share: None,
    draws: int = 2000,
) -> list[dict[str, Any]]:
    """Decode under the ``threshold`` policy, all choices and plain decoding in turns on the same prompts.

    ``choices`` by label: signal, scaling, whether to correct online, threshold; None: all drafts verified.
    """
    sides = {"plain": plain.with_drafter("none")}
    drop_calibration(drafter)
    for label, choice in choices.items():
        if choice is None:
            sides[label] = plain.with_drafter(Wrapped(drafter))
            continue
        signal, scaling, follow, threshold = choice
        options = {"threshold": threshold, "follow_drift": follow}
        wrapped = Signalled(drafter, signal, scaling)
        sides[label] = plain.with_drafter(wrapped, policy="threshold", policy_options=options)
    recorders = {label: recorded(llm) for label, llm in sides.items()}
    samples: dict[str, dict[str, list[Sample]]] = {}
    for label, llm in sides.items():
        answer(llm, recorders[label], questions[0].prompt, params)  # warm up; the first call is not timed
    for number, question in enumerate(questions):
        of_domain = samples.setdefault(question.domain, {label: [] for label in sides})
        for label, llm in sides.items():
            found = answer(llm, recorders[label], question.prompt, with_seed(params, number))
            of_domain[label].append(Sample(len(found.token_ids), found.seconds, found.rounds))
        tell((number + 1) / len(questions))
    rows = []
    for label, choice in choices.items():
        depth = max((r.verified for own in samples.values() for s in own[label] for r in s.rounds), default=0)
        counts = [Counts.of(own[label], own["plain"], depth) for own in samples.values()]
        row = row_of(label, params.temperature, MACRO, counts, draws)
        rows.append(
            {
                "label": label,
                "threshold": None if choice is None else choice[3],
                "prompts": row.prompts,
                "rounds": row.rounds,
                **{
                    name: [one.value, one.low, one.high]
                    for name in ("acceptance_length", "acceptance_rate", "verify_rate", "speedup")
                    for one in [getattr(row, name)]
                },
            }
        )
    return rows
