"""What users hold: ``LLM(...).generate / stream / stats``."""

from __future__ import annotations

import json
import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from outrider import registry
from outrider.checkpoints import load_calibration
from outrider.config import SamplingParams, build
from outrider.drafters.base import CalibratedDrafter
from outrider.engine.auto import EMBEDDED_DRAFTERS, fastest
from outrider.engine.engine import Commit, Engine, check_prompt
from outrider.engine.rows import Request
from outrider.errors import CheckpointError, IncompatibleDrafter, InvalidRequest
from outrider.files import resolve_model
from outrider.scheduling.calibration import Calibration
from outrider.tokenization.tokenizer import Detokenizer, StopMatcher, Tokenizer
from outrider.types import Backend, Drafter, Event, Output, Piece, RequestStats, TargetModel

__all__ = ["LLM"]

EMBEDDED = "embedded"
Prompt = str | Sequence[int]


class LLM:
    """A target with its drafter, ready to generate.

    ``model``: a local Hugging Face directory, a hub id, ``"embedded"``, or a loaded target (then pass ``tokenizer``).
    ``drafter``: ``none``, ``ngram``, ``suffix``, another name of the drafters' catalogue, a directory with a
    draft model or a trained drafter, a ready ``Drafter``, or ``auto`` (see ``outrider.engine.auto``). ``drafter_options``
    are the fields of the chosen kind's ``Config``, and ``calibration``: a directory with the calibration.json of a
    drafter that has no checkpoint to keep it in.

    Raises CheckpointError for files that cannot be used, IncompatibleDrafter for a drafter of another target.
    """

    def __init__(
        self,
        model: str | Path | TargetModel = EMBEDDED,
        drafter: str | Path | Drafter = "auto",
        *,
        dtype: str = "auto",
        backend: str = "auto",
        draft_tokens: int | None = None,
        drafter_options: Mapping[str, Any] | None = None,
        policy: str = "fixed",
        policy_options: Mapping[str, Any] | None = None,
        max_rows: int = 8,
        capacity: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._dtype, self._backend = dtype, backend
        self.model = str(model) if isinstance(model, (str, Path)) else ""
        if isinstance(model, (str, Path)):
            self.target = self._load_target(str(model))
            self.tokenizer = tokenizer or Tokenizer(resolve_model(str(model)))
        elif tokenizer is None:
            raise InvalidRequest("a loaded target needs its tokenizer: LLM(target, tokenizer=...)")
        else:
            self.target, self.tokenizer = model, tokenizer
        if max_rows < 1:
            raise InvalidRequest(f"max_rows must be at least 1, got {max_rows}")
        self.max_rows = max_rows
        self.capacity = capacity or min(self.target.spec.max_positions, 8192)
        if not 1 <= self.capacity <= self.target.spec.max_positions:
            raise InvalidRequest(
                f"capacity must be between 1 and the model's {self.target.spec.max_positions} positions, got {capacity}"
            )
        self._policy_kind, self._policy_options = policy, dict(policy_options or {})
        self._use_drafter(drafter, draft_tokens, dict(drafter_options or {}))
        self._engine: Engine | None = None
        self._runs: dict[Request, _Run] = {}
        self._total = RequestStats()
        self._requests = 0

    # ------------------------------------------------------------------------------------------------ generation

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """Answer all prompts, several rows together. Raises InvalidRequest before anything runs."""
        many = self._as_list(prompts)
        run = _Run(self, many, self._params_of(params, len(many)))
        for _ in run.events():
            pass
        return run.outputs()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Event]:
        """Events of one request as its text becomes certain. Closing the iterator cancels the request."""
        run = _Run(self, [prompt], self._params_of(params, 1))
        return run.events()

    def stream_many(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Event]:
        """Events of several requests, each named by the index of its prompt."""
        return _Run(self, list(prompts), self._params_of(params, len(prompts))).events()

    def run(self, prompt: Prompt, params: SamplingParams | None = None) -> _Run:
        """A request whose events and finished output are both wanted: ``run.events()``, then ``run.outputs()``."""
        return _Run(self, [prompt], self._params_of(params, 1))

    def check(self, prompt: Prompt, params: SamplingParams | None = None) -> None:
        """Raises InvalidRequest for a prompt that ``generate`` would refuse: empty, not in the vocabulary, too long."""
        spec = self.target.spec
        wanted = params or SamplingParams()
        check_prompt(self.encode(prompt), wanted, vocab_size=spec.vocab_size, capacity=spec.max_positions)

    def stats(self) -> dict[str, Any]:
        """Totals since the start: counts as Prometheus names them, acceptance length and rate."""
        total = self._total
        return {
            "requests": self._requests,
            "rounds": total.rounds,
            "drafted": total.drafted,
            "accepted": total.accepted,
            "generated": total.generated,
            "accepted_per_position": list(total.accepted_per_position),
            "acceptance_length": 1 + total.accepted / total.rounds if total.rounds else 1.0,
            "acceptance_rate": total.accepted / total.drafted if total.drafted else 0.0,
            "drafter": self.drafter_name,
        }

    def with_drafter(
        self,
        drafter: str | Path | Drafter,
        *,
        draft_tokens: int | None = None,
        policy: str = "fixed",
        policy_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> LLM:
        """The same loaded target with another drafter, as an engine of its own: what a fair comparison needs."""
        other = LLM(
            self.target,
            "none",
            dtype=self._dtype,
            backend=self._backend,
            policy=policy,
            policy_options=policy_options,
            max_rows=self.max_rows,
            capacity=self.capacity,
            tokenizer=self.tokenizer,
        )
        other.model = self.model
        other._use_drafter(drafter, draft_tokens, options)
        return other

    def forget(self) -> None:
        """Drop what the drafter learnt from earlier requests: every measurement starts cold."""
        forget = getattr(self.drafter, "forget", None)
        if forget is not None:
            forget()

    # ------------------------------------------------------------------------------------------------ parts

    def encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]

    @staticmethod
    def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            return [prompts]  # type: ignore[list-item]
        return list(prompts)  # type: ignore[arg-type]

    @staticmethod
    def _params_of(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * count
        if len(params) != count:
            raise InvalidRequest(
                f"got {len(params)} sampling params for {count} prompts, expected one each or one for all"
            )
        return list(params)

    def _engine_for(self, tokens: int) -> Engine:
        """The engine; a longer context than it was made for replaces it, unless it is busy."""
        wanted = min(max(self.capacity, tokens), self.target.spec.max_positions)
        engine = self._engine
        if engine is None or (engine.capacity < wanted and not len(engine.admission)):
            self._engine = engine = Engine(
                self.target, self.drafter, self.policy, max_rows=self.max_rows, capacity=wanted
            )
        return engine

    def _step(self, engine: Engine) -> None:
        """One step for everybody: streams that are read in turns share it, each finds its own commits."""
        for commit in engine.step():
            self._runs[commit.request].inbox.append(commit)

    def _account(self, stats: RequestStats) -> None:
        self._requests += 1
        total = self._total
        for name in ("rounds", "drafted", "accepted", "generated", "seconds"):
            setattr(total, name, getattr(total, name) + getattr(stats, name))
        counts, new = total.accepted_per_position, stats.accepted_per_position
        counts.extend([0] * (len(new) - len(counts)))
        for position, count in enumerate(new):
            counts[position] += count

    def _use_drafter(self, drafter: str | Path | Drafter, draft_tokens: int | None, options: dict[str, Any]) -> None:
        if draft_tokens is not None:
            if draft_tokens < 0:
                raise InvalidRequest(f"draft_tokens must be at least 0, got {draft_tokens}")
            options["draft_tokens"] = draft_tokens
        self.drafter_name, self.drafter = self._load_drafter(drafter, options)
        kind = registry.find("policy", self._policy_kind)
        limits = {"draft_tokens": self.drafter.block, **self._policy_options}
        self.policy = kind.from_config(build(kind.Config, limits, f"policy {self._policy_kind!r}"))

    def _load_target(self, model: str) -> TargetModel:
        from outrider.models.loading import load_target

        return load_target(model, dtype=self._dtype, backend=self._backend)

    def _draft_backend(self) -> Backend:
        from outrider.models.loading import load_backend

        return load_backend(self._backend, self._dtype)

    def _load_draft_model(self, model: str, dtype: str) -> TargetModel:
        from outrider.models.loading import load_target

        if dtype == "auto":
            dtype = "int8" if self._draft_backend().name == "native" else self._dtype
        return load_target(model, dtype=dtype, backend=self._backend)

    def _load_drafter(self, drafter: str | Path | Drafter, options: dict[str, Any]) -> tuple[str, Drafter]:
        if isinstance(drafter, Drafter):
            return type(drafter).__name__, drafter
        if "calibration" in options:
            name, plain = self._load_drafter(drafter, {k: v for k, v in options.items() if k != "calibration"})
            return name, CalibratedDrafter(plain, self._calibration(Path(options["calibration"])))
        name = str(drafter)
        if name == "auto":
            name = fastest(self, self._dtype, self._draft_backend().name) if self.model == EMBEDDED else "suffix"
        if name in EMBEDDED_DRAFTERS and self.model == EMBEDDED:
            options.setdefault("model", EMBEDDED_DRAFTERS[name])
        if name not in registry.names("drafter"):
            name, options = self._recognise(name, options)
        if options.get("draft_tokens") == 0:
            name, options = "none", {}
        kind = registry.find("drafter", name)
        if name == "none":
            options.pop("draft_tokens", None)
        if "model" in options:
            self._check_vocabulary(str(options["model"]))
        config = build(kind.Config, options, f"drafter {name!r}")
        services = {"load_target": self._load_draft_model, "backend": self._draft_backend(), "max_rows": self.max_rows}
        return name, kind.from_config(config, self.target, **services)

    @staticmethod
    def _calibration(folder: Path) -> Calibration:
        found = load_calibration(folder)
        if found is None:
            raise CheckpointError(f"{folder} holds no calibration.json; `outrider calibrate` makes one")
        return found

    def _check_vocabulary(self, model: str) -> None:
        """A draft model brings its tokenizer, which must be the target's; trained drafters have none of their own."""
        folder = resolve_model(model)
        if (folder / "tokenizer.json").exists() and not Tokenizer(folder).same_as(self.tokenizer):
            raise IncompatibleDrafter(
                f"{model} has another vocabulary than the target; a draft model must share its tokenizer"
            )

    @staticmethod
    def _recognise(path: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Which kind of drafter a directory holds, told by the content of its config.json."""
        folder = resolve_model(path)
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: expected a drafter's name or a directory with config.json: {error}"
            ) from error
        for name in registry.names("drafter"):
            recognises = getattr(registry.find("drafter", name), "recognises", None)
            if recognises is not None and recognises(config):
                return name, {**options, "model": path}
        raise CheckpointError(f"{path}: config.json describes no drafter this version knows; see `outrider models`")


class _Run:
    """Some requests in flight: token ids from the engine become pieces of text, and stop strings end them."""

    def __init__(self, llm: LLM, prompts: Sequence[Prompt], params: list[SamplingParams]) -> None:
        self.llm = llm
        self.prompts = prompts
        ids = [llm.encode(prompt) for prompt in prompts]
        longest = max((len(i) + p.max_tokens for i, p in zip(ids, params, strict=True)), default=0)
        self.engine = llm._engine_for(longest)
        self.requests = []
        try:
            for index, (tokens, wanted) in enumerate(zip(ids, params, strict=True)):
                seed = wanted.seed if wanted.seed is not None else secrets.randbits(63)
                self.requests.append(self.engine.add(index, tokens, wanted, seed))
        except InvalidRequest:
            self._cancel_all()
            raise
        self._texts = [_Text(llm.tokenizer, i, p.stop) for i, p in zip(ids, params, strict=True)]
        self.inbox: deque[Commit] = deque()
        llm._runs.update(dict.fromkeys(self.requests, self))

    def events(self) -> Iterator[Event]:
        """Step the engine until all requests are done."""
        left = len(self.requests)
        try:
            while left:
                if not self.inbox:
                    self.llm._step(self.engine)
                while self.inbox:
                    event = self._event(self.inbox.popleft())
                    if event.finish_reason is not None:
                        left -= 1
                        self.llm._account(self.requests[event.request].stats)
                    yield event
        finally:
            self._cancel_all()

    def outputs(self) -> list[Output]:
        """The requests as they stand: finished, or cut off where they were cancelled."""
        return [
            Output(
                prompt=prompt
                if isinstance(prompt, str)
                else self.llm.tokenizer.decode(request.history[: request.prompt_length]),
                prompt_token_ids=request.history[: request.prompt_length],
                text="".join(text.released),
                token_ids=request.output,
                finish_reason=request.finish_reason or "cancelled",
                stats=request.stats,
            )
            for prompt, request, text in zip(self.prompts, self.requests, self._texts, strict=True)
        ]

    def _event(self, commit: Commit) -> Event:
        request, index = commit.request, commit.request.index
        text = self._texts[index]
        pieces: list[Piece] = []
        for i, token in enumerate(commit.tokens):
            released = text.push(token, hidden=token in request.stop_ids)
            pieces.append(Piece(token, released, drafted=i < commit.accepted))
            if text.stopped:
                self._cut(commit, i + 1)
                break
        if request.finish_reason is not None and not text.stopped:
            tail = text.flush()
            if tail:
                pieces[-1] = Piece(pieces[-1].token_id, pieces[-1].text + tail, pieces[-1].drafted)
        return Event(index, tuple(pieces), request.finish_reason)

    def _cut(self, commit: Commit, kept: int) -> None:
        """A stop string ended the text after ``kept`` tokens of this commit: what came after was never said."""
        request, extra = commit.request, len(commit.tokens) - kept
        if extra:
            del request.history[len(request.history) - extra :]
            request.stats.generated -= extra
            dropped = max(0, commit.accepted - kept)
            request.stats.accepted -= dropped
            for position in range(commit.accepted - dropped, commit.accepted):
                request.stats.accepted_per_position[position] -= 1
        if request.slot >= 0:
            self.engine.cancel(request, "stop")
        request.finish_reason = "stop"

    def _cancel_all(self) -> None:
        for request in self.requests:
            self.engine.cancel(request)
            self.llm._runs.pop(request, None)


class _Text:
    """Token ids of one request to released text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._matcher = StopMatcher(stop)
        self.released: list[str] = []

    @property
    def stopped(self) -> bool:
        return self._matcher.stopped

    def push(self, token: int, hidden: bool) -> str:
        """Text that ``token`` makes certain; an end-of-text token has none."""
        return self._release("" if hidden else self._detokenizer.push(token))

    def flush(self) -> str:
        rest = self._release(self._detokenizer.flush())
        if not self.stopped:
            held = self._matcher.flush()
            self.released.append(held)
            rest += held
        return rest

    def _release(self, text: str) -> str:
        certain = self._matcher.push(text) if text else ""
        self.released.append(certain)
        return certain
