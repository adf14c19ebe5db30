"""Prometheus metrics: counts of speculation under the names that peers use, latencies, queue, cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from outrider.engine.engine import Engine
from outrider.scheduling.guard import GuardedPolicy
from outrider.serving.engine_thread import Answer, EngineThread
from outrider.types import StepRecord

__all__ = ["Metrics"]

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10)
LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
RECENT = 32  # finished requests whose mean time a refused client is told


class Metrics:
    """One server's. Counts of drafts grow with every step, latencies are observed as tokens and requests come."""

    def __init__(self, engine: Engine) -> None:
        disable_created_metrics()  # a gauge beside every counter that says when it was made
        self.registry = CollectorRegistry()
        self._engine = engine
        self.thread: EngineThread | None = None
        """Whose queue is shown."""
        self._drafts = _Drafts()
        engine.observers.append(self._drafts)
        self._seconds: deque[float] = deque(maxlen=RECENT)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"outrider_{name}", text, buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"outrider_{name}", text, labels, registry=self.registry)

        self._first = histogram("time_to_first_token_seconds", "From submission to the first token.", LONG)
        self._next = histogram(
            "inter_token_latency_seconds", "Between tokens; those of one round share its time.", SHORT
        )
        self._queue = histogram("request_queue_time_seconds", "From submission to a row.", LONG)
        self._whole = histogram("e2e_request_latency_seconds", "From submission to the last token.", LONG)
        self._http = histogram("http_request_duration_seconds", "Of every HTTP request, streams included.", LONG)
        self._prompt = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._cached = counter("prompt_tokens_cached", "Prompt tokens whose keys and values were there already.")
        self._generated = counter("generation_tokens", "Committed tokens.")
        self._ended = counter("request_success", "Finished requests.", ("finished_reason",))
        self._refused = counter("requests_refused", "Requests refused for lack of room.")
        self._responses = counter("http_responses", "HTTP responses.", ("path", "status"))
        self.registry.register(self)  # type: ignore[arg-type]  # a collector: it has ``collect``

    # ------------------------------------------------------------------------------------------ observations

    def tokens(self, answer: Answer, count: int, seconds: float) -> None:
        """New tokens of one answer, ``seconds`` after those before them or after its submission."""
        first = answer.first_token == answer.latest_token
        if first:
            self._first.observe(seconds)
        else:
            for _ in range(count):
                self._next.observe(seconds / count)
        self._generated.inc(count)

    def finished(self, answer: Answer) -> None:
        request, now = answer.request, perf_counter()
        if request.started:
            self._queue.observe(max(0.0, request.started - answer.submitted))
        self._whole.observe(now - answer.submitted)
        self._seconds.append(now - answer.submitted)
        self._prompt.inc(request.prompt_length)
        self._cached.inc(request.stats.cached_tokens)
        self._ended.labels(request.finish_reason or "error").inc()

    def refused(self) -> None:
        self._refused.inc()

    def response(self, path: str, status: int, seconds: float) -> None:
        self._responses.labels(path, str(status)).inc()
        self._http.observe(seconds)

    @property
    def mean_seconds(self) -> float:
        """What requests took lately; 1 before the first."""
        recent = list(self._seconds)
        return sum(recent) / len(recent) if recent else 1.0

    # ------------------------------------------------------------------------------------------ what is shown

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are known when they are collected."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        drafts, engine = self._drafts, self._engine

        def count(name: str, text: str, value: float) -> Metric:
            return CounterMetricFamily(name, text, value)

        def gauge(name: str, text: str, value: float) -> Metric:
            return GaugeMetricFamily(name, text, value)

        yield count("spec_decode_num_drafts", "Rounds that verified at least one draft.", drafts.drafts)
        yield count("spec_decode_num_draft_tokens", "Drafts that were verified.", drafts.verified)
        yield count("spec_decode_num_accepted_tokens", "Drafts that were accepted.", drafts.accepted)
        positions = CounterMetricFamily(
            "spec_decode_num_accepted_tokens_per_pos", "Rounds that accepted a draft there.", labels=["position"]
        )
        for position, accepted in enumerate(list(drafts.per_position)):
            positions.add_metric([str(position)], accepted)
        yield positions
        rounds = drafts.rounds
        yield gauge(
            "spec_decode_accept_length",
            "Mean tokens of a round, the bonus token included.",
            1 + drafts.accepted / rounds if rounds else 1.0,
        )
        yield gauge(
            "spec_decode_accept_rate",
            "Accepted drafts of those verified.",
            drafts.accepted / drafts.verified if drafts.verified else 0.0,
        )
        running = list(engine.admission.running)
        outstanding = self.thread.unfinished if self.thread else 0
        yield gauge("outrider_num_requests_running", "Requests with a row.", len(running))
        yield gauge("outrider_num_requests_waiting", "Requests without a row.", max(0, outstanding - len(running)))
        yield gauge(
            "outrider_kv_cache_usage_perc", "Share of the KV cache that running requests hold.", engine.cache_usage
        )
        yield gauge("outrider_verify_tokens_per_step", "Tokens of the latest target pass.", drafts.latest_tokens)
        yield count("outrider_step_seconds", "Seconds in steps: draft, verify and bookkeeping.", drafts.seconds)
        for part, seconds in zip(("draft", "verify", "bookkeeping"), drafts.drafting_seconds, strict=True):
            yield count(f"outrider_drafting_step_{part}_seconds", f"Of steps with drafts alone: {part}.", seconds)
        yield count("outrider_drafting_steps", "Steps that verified drafts and read no prompts.", drafts.drafting_steps)
        yield count("outrider_plain_step_seconds", "Seconds in steps of one token a row.", drafts.plain_seconds)
        yield count("outrider_plain_steps", "Steps of one token a row, without prompts.", drafts.plain_steps)
        yield gauge("outrider_draft_budget", "Drafts that the policy allowed in the latest step.", drafts.latest_budget)
        policy = engine.policy
        if isinstance(policy, GuardedPolicy):
            yield gauge("outrider_guard_drafts", "1 while the guard lets the drafter run.", float(policy.follows))
            yield gauge(
                "outrider_guard_advantage",
                "Tokens per second over plain decoding's, of the latest steps that drafted.",
                policy.advantage,
            )
        yield count("outrider_steps", "Steps that committed tokens or read prompts.", drafts.steps)
        yield gauge(
            "outrider_healthy", "1 while the engine runs.", float(self.thread is not None and self.thread.healthy)
        )


class _Drafts:
    """Counts of rounds, from every step."""

    def __init__(self) -> None:
        self.steps = self.rounds = self.drafts = self.verified = self.accepted = self.latest_tokens = (
            self.latest_budget
        ) = 0
        self.seconds = 0.0
        self.drafting_steps = self.plain_steps = 0
        self.drafting_seconds = [0.0, 0.0, 0.0]
        """Of drafting, verifying and bookkeeping."""
        self.plain_seconds = 0.0
        self.per_position: list[int] = []

    def step(self, record: StepRecord) -> None:
        """Called by the engine, which has one thread."""
        self.steps += 1
        cost = record.cost
        self.seconds += cost.draft + cost.verify + cost.bookkeeping
        self._time(record)
        self.latest_tokens = cost.tokens
        self.latest_budget = sum(row.limit for row in record.rows)
        for row in record.rows:
            self.rounds += not row.first
            self.drafts += row.verified > 0
            self.verified += row.verified
            self.accepted += row.accepted
            while len(self.per_position) < row.accepted:
                self.per_position.append(0)
            for position in range(row.accepted):
                self.per_position[position] += 1

    def _time(self, record: StepRecord) -> None:
        """Steps without prompts, by whether they verified drafts: what speculation costs, and what a plain step."""
        cost, verified = record.cost, sum(row.verified for row in record.rows)
        if cost.tokens != len(record.rows) + verified or any(row.first for row in record.rows):
            return
        if verified:
            self.drafting_steps += 1
            for i, seconds in enumerate((cost.draft, cost.verify, cost.bookkeeping)):
                self.drafting_seconds[i] += seconds
        else:
            self.plain_steps += 1
            self.plain_seconds += cost.draft + cost.verify + cost.bookkeeping
