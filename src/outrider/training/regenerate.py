"""Stage ``regenerate``: the target answers every prompt, with its own sampling settings.

A drafter predicts its target, so it is trained on the target's own answers, not on those of a data set. Each answer
depends on target, prompt, settings and seed alone: random numbers are keyed by the prompt's id, so order, batching and
interruptions change no token (bit for bit on the native core).

Written are ``train.jsonl`` and ``held_out.jsonl``, lines ``{"id", "domain", "prompt": [token ids], "answer": [token
ids]}``; an answer that the target ended includes the end token. A conversation gives one line for each turn, with the
target's earlier answers in the prompt. While the stage runs, lines are written as they are finished; at the end they
are sorted in the order of the prompts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from rich.console import Console

from outrider import registry
from outrider.config import SamplingParams
from outrider.engine.engine import Engine
from outrider.engine.llm import LLM
from outrider.engine.request import Request
from outrider.errors import ArtefactError, InvalidRequest
from outrider.models.decoder import end_tokens, sampling_defaults
from outrider.models.loading import load_tokenizer, model_config
from outrider.models.locations import beside, resolve_model
from outrider.tokenization.tokenizer import Tokenizer
from outrider.training.artefact import Artefact, Journal, begin, file_hash, open_artefact, read_lines, write_lines
from outrider.training.conversations import Answerer, ChatTurn, Conversations, Settings
from outrider.training.device_target import DeviceTarget, check_device, device_answers
from outrider.training.progress import Progress
from outrider.training.server import Server

__all__ = ["Config", "answerer", "engine", "on_device", "regenerate", "sampling"]

PARTS = ("train", "held_out")


class Config(BaseModel):
    """How the target answers. Sampling values that are not given are the target's own (generation_config.json)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    free: ClassVar[frozenset[str]] = frozenset({"rows", "requests", "retries", "timeout", "server", "drafter"})

    max_tokens: int = Field(1024, ge=1)
    """The most tokens of an answer. Prompts with fewer tokens left in the context are left out."""
    temperature: float | None = None
    """0 is greedy. Default: the target's own, 1.0 where it names none."""
    temperatures: tuple[float, ...] = ()
    """Several, shared out evenly over the prompts, for a drafter that is used at all of them; replaces
    `temperature`."""
    answers_per_prompt: int = Field(1, ge=1)
    """Answers to each training prompt, every one with random numbers of its own: more to learn from where prompts are
    few. Held-out prompts are answered once."""
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
    """float32 (auto), bfloat16, int8 or int4: the dtype that the target will be served in."""
    rows: int = Field(32, ge=1)
    """Prompts answered at a time; more are faster until the processor is busy."""
    device: str = "cpu"
    """cuda answers on an accelerator, in bfloat16 and `rows` together (some hundreds), by temperature alone."""
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

    @field_validator("drafter")
    @classmethod
    def _from_the_recipe(cls, name: str, info: ValidationInfo) -> str:
        if info.context is None or name in registry.names("drafter"):
            return name
        return beside(name, Path(info.context["folder"]))


def sampling(config: Config, target: str) -> Settings:
    """The config's sampling over the target's own. Raises CheckpointError, InvalidRequest."""
    files = model_config(target)
    text = files.get("text_config") or files
    values: dict[str, Any] = {"temperature": 1.0, **sampling_defaults(files)}
    given = config.model_dump(include={"temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
    values |= {name: value for name, value in given.items() if value is not None}
    params = SamplingParams(max_tokens=config.max_tokens, ignore_eos=config.ignore_eos, **values)
    context = min(config.context, text.get("max_position_embeddings") or config.context)
    if config.max_tokens >= context:
        raise InvalidRequest(
            f"max_tokens = {config.max_tokens} new tokens leave no room for a prompt in a context of {context}; give "
            f"fewer, as regenerate.max_tokens={context // 2} in a recipe (prompts that the target writes itself: "
            "prompts.prompt_tokens)"
        )
    for temperature in config.temperatures:
        replace(params, temperature=temperature)  # refuses what is no temperature
    if config.answers_per_prompt > 1 and not max(config.temperatures, default=params.temperature):
        raise InvalidRequest(
            f"answers_per_prompt = {config.answers_per_prompt} at temperature 0 gives the same answer again and again; "
            "set a temperature above 0, or temperatures"
        )
    return Settings(params, end_tokens(files), context, config.seed, config.temperatures)


def regenerate(config: Config, prompts: Path, out: Path, target: str, *, console: Console | None = None) -> Artefact:
    """Answer the prompts of an artefact, from where an earlier run stopped.

    Raises ArtefactError for prompts that do not fit, or none that can be answered; CheckpointError for the target;
    InvalidRequest naming prompt and line for messages that the chat template refuses; OutriderError where the server
    does not answer.
    """
    parent = open_artefact(prompts, "prompts")
    note = cache(lambda text: None if console is None else console.print(text, style="dim", markup=False))
    asked = {part: list(read_lines(prompts / f"{part}.jsonl")) for part in PARTS}
    asked["train"] = [again for prompt in asked["train"] for again in _repeated(prompt, config.answers_per_prompt)]
    templates = _templates(resolve_model(target)) if any("turns" in p for part in asked.values() for p in part) else {}
    with begin(out, "regenerate", config, parents={"prompts": parent}, sources=templates, target=target) as work:
        if not work.finished:
            settings = sampling(config, target)
            tokenizer = load_tokenizer(target)
            load = cache(lambda: LLM(target, config.drafter, dtype=config.dtype, max_rows=config.rows))
            answer = engine(config, load, settings)
            if config.server:
                answer = _server(config, tokenizer, settings)
            elif config.device != "cpu":
                answer = on_device(config, target, settings)
            facts: dict[str, Any] = {"sampling": _facts_of(settings)}
            for part, some in asked.items():
                source = prompts / f"{part}.jsonl"
                conversations = Conversations(some, tokenizer, settings, source=source, note=note)
                facts[part] = _answer(some, conversations, answer, out / f"{part}.jsonl", console)
            if not facts["train"]["answers"]:
                raise ArtefactError(
                    f"none of the training prompts in {prompts} has at most {settings.context - config.max_tokens} "
                    f"tokens, which max_tokens = {config.max_tokens} leaves of a context of {settings.context}; "
                    "give a smaller max_tokens, or shorter prompts"
                )
            work.finish([f"{part}.jsonl" for part in PARTS], facts)
    return Artefact(out, "regenerate", work.record["sha256"], work.record["target"], work.record)


def _repeated(prompt: dict[str, Any], times: int) -> Iterator[dict[str, Any]]:
    """The prompt, and copies with names of their own, from which their random numbers follow."""
    yield prompt
    for number in range(2, times + 1):
        yield {**prompt, "id": f"{prompt['id']}~{number}"}


def _templates(folder: Path) -> dict[str, str]:
    """Hashes of the files that may hold a chat template: conversations depend on it."""
    files = (folder / name for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"))
    return {file.name: file_hash(file) for file in files if file.is_file()}


def _answer(
    prompts: list[dict[str, Any]], conversations: Conversations, answer: Answerer, path: Path, console: Console | None
) -> dict[str, int]:
    """Answer one part into ``path``, as the answers finish and then in order; returns its counts."""
    with Journal(path) as journal:
        conversations.resume(journal.records)
        with Progress(console, f"answers, {path.stem}", len(prompts), conversations.finished) as progress:
            for answers in answer(conversations.todo):
                before = conversations.finished
                journal.append([conversations.take(turn, tokens) for turn, tokens in answers])
                progress.advance(conversations.finished - before, sum(len(tokens) for _, tokens in answers))
    lines = conversations.ordered()
    write_lines(path, lines)
    tokens = sum(len(line["answer"]) for line in lines)
    return {"answers": len(lines), "tokens": tokens, "too_long": conversations.too_long}


def _facts_of(settings: Settings) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    facts = {name: getattr(settings.params, name) for name in names}
    return facts | ({"temperature": list(settings.temperatures)} if settings.temperatures else {})


# ------------------------------------------------------------------------------------------------ answering


def engine(config: Config, load: Callable[[], LLM], settings: Settings) -> Answerer:
    """Answer on this machine, ``config.rows`` rows together; a row that ends is replaced by the next turn.

    ``load`` is called once there is something to be answered.
    """

    def answer(todo: deque[ChatTurn]) -> Iterator[list[tuple[ChatTurn, list[int]]]]:
        if not todo:
            return
        longest = max(len(turn.tokens) for turn in todo) + config.max_tokens
        if any(turn.later for turn in todo):  # the length of later turns is not known yet
            longest = settings.context
        llm = load()
        engine = Engine(llm.target, llm.drafter, llm.policy, max_rows=config.rows, capacity=longest)
        asked: dict[Request, ChatTurn] = {}
        while todo or asked:
            while todo and len(asked) < 2 * config.rows:
                turn = todo.popleft()
                params = settings.of(turn)
                assert params.seed is not None
                asked[engine.submit(turn.tokens, params, params.seed)] = turn
            done = [commit.request for commit in engine.step() if commit.request.finish_reason is not None]
            if done:
                yield [(asked.pop(request), request.output) for request in done]

    return answer


def answerer(
    target: str, ends: Sequence[int], tokens: int, temperature: float, seed: int, device: str, rows: int
) -> Answerer:
    """What continues prompts by the target's own distribution, up to one of ``ends`` or ``tokens`` tokens."""
    plain = {"temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    config = Config.model_validate({"max_tokens": tokens, "seed": seed, "device": device, "rows": rows, **plain})
    settings = replace(sampling(config, target), end_tokens=tuple(ends))
    if device != "cpu":
        return on_device(config, target, settings)
    return engine(config, cache(lambda: LLM(target, "none", max_rows=rows)), settings)


def on_device(config: Config, target: str, settings: Settings) -> Answerer:
    """Answer on an accelerator. Raises InvalidRequest."""
    device = check_device(config.device)
    return device_answers(cache(lambda: DeviceTarget(target, device)), config.rows, settings)


def _server(config: Config, tokenizer: Tokenizer, settings: Settings) -> Answerer:
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
    ).answer
