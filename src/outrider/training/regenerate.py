"""Stage ``regenerate``: the target answers every prompt, with its own sampling settings.

A drafter has to foresee what its target says, so it learns from the target's own answers; those of a data set would
teach it somebody else's. Each answer is a function of target, prompt, settings and seed alone: rng is keyed by the
prompt's id, so neither order nor batching nor a killed process changes a token (bit for bit on the native core).

Written are ``train.jsonl`` and ``held_out.jsonl``, lines ``{"id", "domain", "prompt": [token ids], "answer": [token
ids]}``; an answer that the target ended has its end token. A conversation gives one line a turn, the target's earlier
answers within the prompt. While the stage runs the lines come as they are finished; then they are put in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from outrider.config import SamplingParams
from outrider.engine.engine import Engine
from outrider.engine.llm import LLM
from outrider.engine.request import Request
from outrider.errors import ArtefactError
from outrider.models.decoder import end_tokens, sampling_defaults
from outrider.models.loading import load_tokenizer, model_config
from outrider.models.locations import resolve_model
from outrider.tokenization.tokenizer import Tokenizer
from outrider.training.artefact import Artefact, Journal, begin, file_hash, open_artefact, read_lines, write_lines
from outrider.training.conversations import Ask, Question, Settings, Talks
from outrider.training.progress import Progress
from outrider.training.server import Server

__all__ = ["Config", "engine", "regenerate", "sampling"]

PARTS = ("train", "held_out")


class Config(BaseModel):
    """How the target answers. Sampling values that are not given are the target's own (generation_config.json)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    free: ClassVar[frozenset[str]] = frozenset({"rows", "requests", "retries", "timeout", "server", "drafter"})

    max_tokens: int = Field(1024, ge=1)
    """The most tokens of an answer. Prompts that leave less room for it in the context are left out."""
    temperature: float | None = None
    """0 is greedy. Default: the target's own, 1.0 where it names none."""
    top_p: float | None = None
    """Keep the smallest set of likeliest tokens of this mass. Default: the target's own."""
    top_k: int | None = None
    """Keep the k likeliest tokens, 0 all. Default: the target's own."""
    min_p: float | None = None
    """Drop tokens less likely than this times the likeliest. Default: the target's own."""
    repetition_penalty: float | None = None
    """Above 1 makes seen tokens less likely. Default: the target's own."""
    ignore_eos: bool = False
    """Go on after the end-of-text token, up to `max_tokens`."""
    context: int = Field(8192, ge=2)
    """The most tokens of prompt and answer together, where the target's own context is not smaller."""
    seed: int = 0
    """Another seed gives other answers to the same prompts."""
    dtype: str = "auto"
    """float32 (auto), bfloat16, int8 or int4: what the target will be served in."""
    rows: int = Field(32, ge=1)
    """Prompts answered at a time; more are faster until the processor is busy."""
    drafter: str = "none"
    """A drafter speeds up small batches and changes no token."""
    server: str | None = None
    """Ask this OpenAI-compatible server (http://host:port) instead, for targets too large for this machine."""
    server_model: str | None = None
    """The model's name there. Default: the first one that it lists."""
    endpoint: Literal["completions", "chat"] = "completions"
    """completions sends the prompt's token ids; chat sends messages, for servers that take nothing else."""
    requests: int = Field(8, ge=1)
    """Requests at the server at a time."""
    retries: int = Field(5, ge=0)
    """Times a request is sent again when the server is busy, fails or is away, after 1, 2, 4 ... seconds."""
    timeout: float = Field(600, gt=0)
    """Seconds to wait for one answer."""


def sampling(config: Config, target: str) -> Settings:
    """The config's sampling over the target's own. Raises CheckpointError, InvalidRequest."""
    files = model_config(target)
    text = files.get("text_config") or files
    values: dict[str, Any] = {"temperature": 1.0, **sampling_defaults(files)}
    given = config.model_dump(include={"temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
    values |= {name: value for name, value in given.items() if value is not None}
    params = SamplingParams(max_tokens=config.max_tokens, ignore_eos=config.ignore_eos, **values)
    context = min(config.context, text.get("max_position_embeddings") or config.context)
    return Settings(params, end_tokens(files), context, config.seed)


def regenerate(config: Config, prompts: Path, out: Path, target: str, *, console: Console | None = None) -> Artefact:
    """Answer the prompts of an artefact, from where an earlier run stopped.

    Raises ArtefactError for prompts that do not fit, or none that can be answered; CheckpointError for the target;
    InvalidRequest; OutriderError where the server does not answer.
    """
    parent = open_artefact(prompts, "prompts")
    asked = {part: list(read_lines(prompts / f"{part}.jsonl")) for part in PARTS}
    templates = _templates(resolve_model(target)) if any("turns" in p for part in asked.values() for p in part) else {}
    with begin(out, "regenerate", config, parents={"prompts": parent}, sources=templates, target=target) as work:
        if not work.finished:
            settings = sampling(config, target)
            tokenizer = load_tokenizer(target)
            load = cache(lambda: LLM(target, config.drafter, dtype=config.dtype, max_rows=config.rows))
            ask = _server(config, tokenizer, settings) if config.server else engine(config, load, settings)
            facts: dict[str, Any] = {"sampling": _told(settings.params)}
            for part, some in asked.items():
                facts[part] = _answer(some, Talks(some, tokenizer, settings), ask, out / f"{part}.jsonl", console)
            if not facts["train"]["answers"]:
                raise ArtefactError(f"none of the training prompts in {prompts} fits a context of {settings.context}")
            work.finish([f"{part}.jsonl" for part in PARTS], facts)
    return Artefact(out, "regenerate", work.record["sha256"], work.record["target"], work.record)


def _templates(folder: Path) -> dict[str, str]:
    """Hashes of the files that a chat template may lie in: conversations depend on it."""
    files = (folder / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    return {file.name: file_hash(file) for file in files if file.is_file()}


def _answer(
    prompts: list[dict[str, Any]], talks: Talks, ask: Ask, path: Path, console: Console | None
) -> dict[str, int]:
    """Answer one part into ``path``, as the answers come and then in order; returns its counts."""
    with Journal(path) as journal:
        talks.resume(journal.records)
        with Progress(console, f"answers, {path.stem}", len(prompts), talks.finished) as progress:
            for answers in ask(talks.todo):
                before = talks.finished
                journal.append([talks.take(question, answer) for question, answer in answers])
                progress.advance(talks.finished - before, sum(len(answer) for _, answer in answers))
    lines = talks.ordered()
    write_lines(path, lines)
    return {"answers": len(lines), "tokens": sum(len(line["answer"]) for line in lines), "too_long": talks.too_long}


def _told(params: SamplingParams) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: getattr(params, name) for name in names}


# ------------------------------------------------------------------------------------------------ who answers


def engine(config: Config, load: Callable[[], LLM], settings: Settings) -> Ask:
    """Answer on this machine, ``config.rows`` rows together; a row that ends makes room for the next question.

    ``load`` is called once there is something to be answered.
    """

    def ask(todo: deque[Question]) -> Iterator[list[tuple[Question, list[int]]]]:
        if not todo:
            return
        longest = max(len(question.tokens) for question in todo) + config.max_tokens
        if any(question.later for question in todo):  # how long a conversation becomes is not known before
            longest = settings.context
        llm = load()
        engine = Engine(llm.target, llm.drafter, llm.policy, max_rows=config.rows, capacity=longest)
        asked: dict[Request, Question] = {}
        while todo or asked:
            while todo and len(asked) < 2 * config.rows:
                question = todo.popleft()
                params = settings.of(question)
                assert params.seed is not None
                asked[engine.submit(question.tokens, params, params.seed)] = question
            done = [commit.request for commit in engine.step() if commit.request.finish_reason is not None]
            if done:
                yield [(asked.pop(request), request.output) for request in done]

    return ask


def _server(config: Config, tokenizer: Tokenizer, settings: Settings) -> Ask:
    assert config.server is not None
    return Server(
        config.server,
        tokenizer,
        settings,
        model=config.server_model,
        chat=config.endpoint == "chat",
        requests=config.requests,
        retries=config.retries,
        timeout=config.timeout,
    ).ask
