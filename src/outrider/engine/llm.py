"""What users hold: ``LLM(...).generate / stream / stats``."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import ref

import numpy as np
from torch import Tensor

from outrider.config import SamplingParams, whole_number
from outrider.engine.auto import fastest
from outrider.engine.cost_tables import (
    AT_FIRST,
    cost_key,
    feature_share,
    kept_costs,
    measured_costs,
    quick_costs,
    start_costs,
    tune_core,
)
from outrider.engine.engine import Engine
from outrider.engine.loader import EMBEDDED, LoadedModel, check_draft_tokens, load_drafter, load_model, load_policy
from outrider.engine.memory import check_kv_dtype, default_memory
from outrider.engine.request import Request
from outrider.engine.stream import EventStream, Hold
from outrider.engine.turns import Alone, at_once
from outrider.errors import InvalidRequest
from outrider.files import read_json_lines
from outrider.models.loading import load_backend
from outrider.models.locations import EMBEDDED_PROMPTS, PACKAGED_DRAFTERS, QUESTIONS
from outrider.scheduling.cost_model import CostModel
from outrider.tokenization.tokenizer import Tokenizer
from outrider.types import Drafter, Event, Output, SchedulerPolicy, StepObserver, TargetModel

__all__ = ["LLM", "Run"]

Prompt = str | Sequence[int]
BESIDE = 4  # the part of a chunk of prompts that is read beside rows that decode
NO_LISTS = (bytes, bytearray, memoryview, Mapping, Set)  # of tokens or prompts, though they can be iterated over
MOST_ROWS = 65_536  # tables of rows are laid out whole
CONTEXT = 8192  # tokens of a sequence that memory is laid out for at first; longer requests make it grow


class LLM:
    """A target with its drafter, ready to generate. Any number of threads may use one.

    ``model``: a local Hugging Face directory, a hub id, ``"embedded"``, or a loaded target (then pass ``tokenizer``).
    ``drafter``: ``none``, ``ngram``, ``suffix``, another name of the drafters' catalogue, a directory with a
    draft model or a trained drafter, a ready ``Drafter``, or ``auto`` (see ``outrider.engine.auto``). Of a list, each
    row takes, round by round, the drafter that gives most tokens per second for it.
    ``policy``: ``auto``, which drafts where that raises tokens per second, or a name of the policies' catalogue
    (``fixed`` drafts the same number in every round). ``guard``: decoding is never slower than without the drafter,
    because drafting stops where it does not pay, whatever the policy says.
    ``drafter_options`` are the fields of the chosen kind's ``Config``, and ``calibration``: a directory with the
    calibration.json of a drafter that has no checkpoint to keep it in. Of several drafters each has its own, by name.

    ``kv_memory``: bytes for the target's keys and values, those kept for requests that begin alike included; None: what
    ``max_rows`` sequences of ``capacity`` tokens need, at most half of the memory that is available. ``kv_dtype``:
    ``int8`` keeps them in 8 bits, which changes the text a little (native backend only). ``prefill_chunk``: the most
    prompt tokens of a step; beside rows that decode a quarter of it, so that a long prompt does not hold them up.

    ``measure``: what is not known of this machine is measured first, for some seconds: the core's tuning, what passes
    cost, and which drafter ``auto`` is. Without it, a short table of costs and the usual drafter are taken, and
    ``measure()`` does the rest when there is time.

    Raises InvalidRequest for options out of range, CheckpointError for files that cannot be used, IncompatibleDrafter
    for a drafter of another target.
    """

    def __init__(
        self,
        model: str | Path | TargetModel | LoadedModel = EMBEDDED,
        drafter: str | Path | Drafter | Sequence[str | Path | Drafter] = "auto",
        *,
        dtype: str = "auto",
        backend: str = "auto",
        draft_tokens: int | None = None,
        drafter_options: Mapping[str, Any] | None = None,
        policy: str = "auto",
        policy_options: Mapping[str, Any] | None = None,
        guard: bool = True,
        max_rows: int = 8,
        capacity: int | None = None,
        kv_memory: int | None = None,
        kv_dtype: str = "auto",
        prefill_chunk: int = 512,
        tokenizer: Tokenizer | None = None,
        measure: bool = True,
    ) -> None:
        for name, value in (("backend", backend), ("policy", policy), ("kv_dtype", kv_dtype)):
            if not isinstance(value, str):
                raise InvalidRequest(f"{name} must be a name such as 'auto', got {value!r}")
        for name, given in (("drafter_options", drafter_options), ("policy_options", policy_options)):
            if given is not None and not isinstance(given, Mapping):
                raise InvalidRequest(f"{name} must be a mapping of names to values, got {given!r}")
        for name, switch in (("guard", guard), ("measure", measure)):
            if not isinstance(switch, bool):
                raise InvalidRequest(f"{name} must be True or False, got {switch!r}")
        max_rows = whole_number("max_rows", max_rows, 1)
        if max_rows > MOST_ROWS:
            raise InvalidRequest(f"max_rows must be at most {MOST_ROWS} requests that run together, got {max_rows}")
        draft_tokens = None if draft_tokens is None else whole_number("draft_tokens", draft_tokens, 0)
        capacity = None if capacity is None else whole_number("capacity", capacity, 1)
        self.kv_memory = None if kv_memory is None else whole_number("kv_memory", kv_memory, 1)
        self.kv_dtype = kv_dtype
        self.prefill_chunk = whole_number("prefill_chunk", prefill_chunk, 1)
        loaded = (
            model
            if isinstance(model, LoadedModel)
            else load_model(model, dtype=dtype, backend=backend, tokenizer=tokenizer)
        )
        self.loaded, self.target, self.tokenizer, self.model = loaded, loaded.target, loaded.tokenizer, loaded.name
        check_kv_dtype(self.target, kv_dtype)
        self.max_rows = max_rows
        for most in (draft_tokens, (policy_options or {}).get("draft_tokens")):
            check_draft_tokens(most, self.target)
        self.capacity = capacity or min(self.target.spec.max_positions, CONTEXT)
        if self.capacity > self.target.spec.max_positions:
            raise InvalidRequest(
                f"capacity must be between 1 and the model's {self.target.spec.max_positions} positions, got {capacity}"
            )
        self._measures = at_once if measure else None
        self._auto = drafter == "auto"
        if measure:
            tune_core(self.target)
        if drafter == "auto":
            drafter = _resolve_auto(loaded, self._measures)
        options = dict(drafter_options or {})
        if draft_tokens is not None:
            options["draft_tokens"] = draft_tokens
        self.drafter_name, self.drafter = load_drafter(drafter, loaded, options, max_rows=max_rows)
        self._first_costs: CostModel | None = None  # what ``measure`` completes
        self._lacks_table = False
        self.policy = self._load_policy(policy, policy_options or {}, guard=guard)
        self.observers: list[StepObserver] = []
        """See every step of the engine."""
        self._engine: Engine | None = None
        self._making = Lock()

    # ------------------------------------------------------------------------------------------------ generation

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """Answer all prompts, several rows together. Raises InvalidRequest before anything runs."""
        many = _as_list(prompts)
        ids, wanted = [self.encode(prompt) for prompt in many], _params_of(params, len(many))
        for tokens, one in zip(ids, wanted, strict=True):
            self.engine.check(tokens, one)
        requests: list[Request] = []
        try:
            for i, (tokens, one) in enumerate(zip(ids, wanted, strict=True)):
                requests.append(self._submit(i, tokens, one))
            self.engine.wait(requests)
        finally:
            for request in requests:
                self.engine.cancel(request)
        return [self._output(prompt, request) for prompt, request in zip(many, requests, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Event]:
        """Events of one request as its text becomes certain. It is queued at once, and runs while any request is waited
        for. Closing the iterator, or dropping it, cancels the request."""
        return self.run(prompt, params).events()

    def run(self, prompt: Prompt, params: SamplingParams | None = None) -> Run:
        """A request whose events and finished output are both wanted: ``run.events()``, then ``run.output()``."""
        (one,) = _params_of(params, 1)
        return Run(self, prompt, self._submit(0, self.encode(prompt), one))

    def check(self, prompt: Prompt, params: SamplingParams | None = None) -> None:
        """Raise InvalidRequest for a request that ``generate`` would refuse; nothing runs."""
        (one,) = _params_of(params, 1)
        self.engine.check(self.encode(prompt), one)

    def stats(self) -> dict[str, Any]:
        """Totals since the start: counts as Prometheus names them, acceptance length and rate."""
        requests, total = self.engine.totals
        return {
            "requests": requests,
            "rounds": total.rounds,
            "drafted": total.drafted,
            "accepted": total.accepted,
            "generated": total.generated,
            "accepted_per_position": list(total.accepted_per_position),
            "acceptance_length": 1 + total.accepted / total.rounds if total.rounds else 1.0,
            "acceptance_rate": total.accepted / total.drafted if total.drafted else 0.0,
            "cached_tokens": total.cached_tokens,
            "drafter": self.drafter_name,
        }

    def with_drafter(
        self,
        drafter: str | Path | Drafter | Sequence[str | Path | Drafter],
        *,
        draft_tokens: int | None = None,
        policy: str = "fixed",
        policy_options: Mapping[str, Any] | None = None,
        guard: bool = False,
        **options: Any,
    ) -> LLM:
        """The same loaded target with another drafter, as an engine of its own: what a fair comparison needs. It always
        drafts, unless another policy or the guard is asked for."""
        return LLM(
            self.loaded,
            drafter,
            draft_tokens=draft_tokens,
            drafter_options=options,
            policy=policy,
            policy_options=policy_options,
            guard=guard,
            max_rows=self.max_rows,
            capacity=self.capacity,
            kv_memory=self.kv_memory,
            kv_dtype=self.kv_dtype,
            prefill_chunk=self.prefill_chunk,
        )

    def measure(self, alone: Alone) -> None:
        """Measure and keep what ``LLM(measure=False)`` left out. ``alone`` calls each piece while no request runs.

        The drafter stays; another one that measured faster is what ``auto`` is at the next start."""
        if self._measures is not None:
            return
        alone(lambda: tune_core(self.target))
        costs, self._first_costs = self._first_costs, None
        if costs is not None:
            costs.features = alone(lambda: feature_share(self.target, self.drafter.aux_layers))
            if self._lacks_table:
                rows, tokens = self._largest_pass()
                table = measured_costs(self.target, self.loaded.dtype, rows=rows, tokens=tokens, alone=alone)
                alone(lambda: costs.use(table))
        if self._auto:
            _resolve_auto(self.loaded, alone)

    def forget(self) -> None:
        """Drop what earlier requests have left in the cache and in the drafter: every measurement starts cold."""
        self.engine.forget()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text; ids are taken as they are. Raises InvalidRequest for anything else."""
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else _token_ids(prompt)

    @property
    def engine(self) -> Engine:
        """Made when it is first needed."""
        if self._engine is not None:  # an interrupt at the end of a ``with`` may leave its lock taken
            return self._engine
        with self._making:
            if self._engine is None:
                self._engine = Engine(
                    self.target,
                    self.drafter,
                    self.policy,
                    max_rows=self.max_rows,
                    capacity=self.capacity,
                    chunk=self.prefill_chunk,
                    beside=max(1, self.prefill_chunk // BESIDE),
                    memory=default_memory() if self.kv_memory is None else self.kv_memory,
                    kv_dtype=self.kv_dtype,
                    tokenizer=self.tokenizer,
                    observers=self.observers,
                )
            return self._engine

    # ------------------------------------------------------------------------------------------------ parts

    def _load_policy(self, name: str, options: Mapping[str, Any], *, guard: bool) -> SchedulerPolicy:
        """The policy; what passes cost is measured, or was before, where it matters."""
        costs: CostModel | None = None
        if self.drafter.block and (guard or name in ("auto", "throughput")):
            target, dtype = self.target, self.loaded.dtype
            rows, tokens = self._largest_pass()
            if self._measures is not None:
                measured = start_costs(target, dtype, rows=rows, tokens=tokens)
                costs = CostModel(measured, feature_share(target, self.drafter.aux_layers))
            else:
                table = kept_costs(target, dtype, rows=rows, tokens=tokens)
                self._lacks_table = table is None
                if table is None:
                    table = quick_costs(target, cost_key(target, dtype), rows=rows, tokens=tokens, seconds=AT_FIRST)
                costs = self._first_costs = CostModel(table)
        return load_policy(name, options, self.drafter, costs, guard=guard)

    def _largest_pass(self) -> tuple[int, int]:
        """The most rows and tokens that a decoding step has."""
        return self.max_rows, self.max_rows * (self.drafter.block + 1)

    def _submit(self, index: int, tokens: list[int], params: SamplingParams) -> Request:
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        return self.engine.submit(tokens, params, seed, index)

    def _output(self, prompt: Prompt, request: Request) -> Output:
        ids = request.history[: request.prompt_length]
        return Output(
            prompt=prompt if isinstance(prompt, str) else self.tokenizer.decode(ids),
            prompt_token_ids=ids,
            text=request.text,
            token_ids=request.output,
            finish_reason=request.finish_reason or "cancelled",
            stats=request.stats,
        )


class Run:
    """One request in flight. Dropping it without having asked for its events cancels it."""

    def __init__(self, llm: LLM, prompt: Prompt, request: Request) -> None:
        self._llm, self._prompt, self._request = llm, prompt, request
        self._unread: Hold | None = Hold(llm.engine, request)
        self._hold = ref(self._unread)

    def events(self) -> EventStream:
        """Its events from the first one on. Once all such iterators are dropped, the request is cancelled."""
        hold = self._hold()
        if hold is None:
            hold = Hold(self._llm.engine, self._request)
            self._hold = ref(hold)
        self._unread = None
        return EventStream(hold)

    def output(self) -> Output:
        """The finished request, which is run to its end first; as it stands where it was cancelled. Raises its error
        where it failed."""
        request = self._request
        self._llm.engine.advance(lambda: request.finish_reason is not None or request.cancelled is not None)
        if request.error is not None:
            raise request.error
        return self._llm._output(self._prompt, request)


def _resolve_auto(loaded: LoadedModel, alone: Alone | None) -> str:
    """The drafter that ``auto`` means for a target: what measures fastest of those it comes with, under the policy
    that runs it, else ``suffix``. One alone: with ``suffix`` beside it the packaged drafter of SmolLM2
    gains 3 % greedily and loses as much when sampled (docs/smollm2.md). ``alone``: see ``fastest``."""
    if loaded.name not in PACKAGED_DRAFTERS:
        return "suffix"
    files = sorted((EMBEDDED_PROMPTS if loaded.name == EMBEDDED else QUESTIONS).glob("*.jsonl"))
    prompts: list[Any] = [next(read_json_lines(file))[1]["turns"][0] for file in files]
    if loaded.name != EMBEDDED:
        prompts = [loaded.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in prompts]
    backend = load_backend(loaded.backend, loaded.dtype).name

    def load(name: str) -> LLM:
        return LLM(loaded, name, guard=False)

    return fastest(loaded.name, prompts, load, loaded.dtype, backend, alone=alone)


def _as_list(prompts: Any) -> list[Prompt]:
    """One prompt or many, as texts or token ids; arrays of one dimension are a prompt, of two are rows of ids."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        if isinstance(prompts, NO_LISTS):
            raise TypeError
        flat = isinstance(prompts, (np.ndarray, Tensor)) and prompts.ndim == 1
        many = prompts.tolist() if flat else list(prompts)
    except (TypeError, RuntimeError):  # RuntimeError: tensors that are sparse or hold no data
        raise InvalidRequest(f"prompts must be texts or lists of token ids, got {type(prompts).__name__}") from None
    one = bool(many) and (not isinstance(many[0], Iterable) or getattr(many[0], "ndim", 1) == 0)
    return [many] if one else many


def _token_ids(prompt: Any) -> list[int]:
    try:
        values = prompt.tolist() if isinstance(prompt, (np.ndarray, Tensor)) else prompt
        if isinstance(values, NO_LISTS):
            raise TypeError
        values = list(values)  # an iterator is read once
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        ids = [value.__index__() for value in values]
    except (TypeError, AttributeError, RuntimeError):
        raise InvalidRequest(
            f"a prompt must be a text or a list of token ids (whole numbers), got {str(prompt)[:60]!r}"
        ) from None
    return ids


def _params_of(params: Any, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    many = list(params) if isinstance(params, Sequence) else [params]
    wrong = [one for one in many if not isinstance(one, SamplingParams)]
    if wrong:
        raise InvalidRequest(f"sampling params must be SamplingParams, got {type(wrong[0]).__name__}")
    if len(many) != count:
        raise InvalidRequest(f"got {len(many)} sampling params for {count} prompts, expected one each or one for all")
    return many
