"""Stage ``prompts``: the user messages of any data sets; filtered, deduplicated and split by document.

Only what users and system messages say is taken from a data set: a drafter is trained on answers of its own target
(``regenerate``). Each source is JSON Lines, plain or gzipped, and each line one of

    {"text": "..."}  {"prompt": "..."}                          text to continue, as it is
    {"turns": ["...", "..."]}                                   what a user asks, turn after turn
    {"messages": [{"role": "user", "content": "..."}, ...]}     OpenAI's form; "prompt" may hold such a list too
    {"conversations": [{"from": "human", "value": "..."}]}      ShareGPT's form

Roles may be written in any case; ``developer`` counts as ``system``, and a role that is not known is refused. Lines may
have ``document`` and ``domain`` too. What is written is ``train.jsonl`` and ``held_out.jsonl``,
lines ``{"id", "domain", "text"}`` or ``{"id", "domain", "turns"}`` (and ``system``), in an order that only the seed
decides.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from rich.console import Console

from outrider.errors import InvalidRequest, nearest
from outrider.files import read_json_lines
from outrider.training.artefact import Artefact, begin, file_hash, write_lines
from outrider.training.progress import Progress

__all__ = [
    "Config",
    "Source",
    "Split",
    "collect",
    "count_turns",
    "expected_turns",
    "from_files",
    "make_prompts",
    "read_source",
    "sources",
]

Split = Literal["train", "held_out"]
EXPECTED = "an object with `text`, `prompt`, `turns`, `messages` or `conversations`"
# Names of roles in public data sets, in any case. A developer's message is what OpenAI calls a system message today.
USERS = frozenset({"user", "human", "prompter"})
SYSTEMS = frozenset({"system", "developer"})
ASSISTANTS = frozenset({"assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "bard", "bing", "claude"})
TOOLS = frozenset(
    {"tool", "function", "ipython", "observation", "function_call", "function_response", "tool_call", "tool_response"}
)
ROLES = USERS | SYSTEMS | ASSISTANTS | TOOLS


class Source(BaseModel):
    """One file of prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: Path | None = None
    """A .jsonl or .jsonl.gz file; a relative path counts from the recipe's folder."""
    self_written: int | None = Field(None, alias="self", ge=1)
    """Instead of a file: so many prompts that the target writes itself (`self = 20000`)."""
    openings: tuple[str, ...] = ("",)
    """How self-written prompts begin, taken in turns; "" leaves it to the target."""
    temperature: float = Field(1.0, gt=0, le=2)
    """Of self-written prompts: lower ones are more sober and more alike."""
    script: str | None = None
    """The writing system of self-written prompts, such as LATIN or CYRILLIC; None: any."""
    domain: str | None = None
    """What its prompts are about, for results by domain. Default: each line's own, else the file's name."""
    form: Literal["auto", "chat", "text"] = "auto"
    """auto: `text` and `prompt` are continued as they are, the rest are chats; chat and text: all of them are that."""
    split: Literal["auto", "train", "held_out"] = "auto"
    """auto splits by document; train and held_out put the whole file there."""
    field: str | None = None
    """The key of the text where it has another name, such as `question`."""

    @field_validator("path")
    @classmethod
    def _from_the_recipe(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if path is None:
            return None
        path = path.expanduser()
        return path if info.context is None else Path(info.context["folder"]) / path

    @model_validator(mode="after")
    def _one_of_both(self) -> Source:
        if (self.path is None) == (self.self_written is None):
            raise ValueError("a source needs either `path` or `self`")
        if not self.openings:
            raise ValueError("openings needs one opening at least")
        return self

    @property
    def name(self) -> str:
        if self.path is None:
            return "self"
        return self.path.name.removesuffix(".gz").removesuffix(".jsonl")


class Config(BaseModel):
    """Which prompts the drafter is trained on, and which it is evaluated on."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    free: ClassVar[frozenset[str]] = frozenset({"sources", "rows"})  # the files' content is hashed, not their paths

    sources: tuple[Source, ...] = Field(min_length=1)
    """The files, each with its `path`, and `domain`, `form`, `split` and `field` where the defaults do not fit."""
    held_out: float = Field(0.02, ge=0, lt=1)
    """Share of the documents that are never trained on, chosen by a hash of the document."""
    min_characters: int = Field(1, ge=1)
    """Shorter prompts are left out."""
    max_characters: int = Field(20_000, ge=1)
    """Longer prompts are left out."""
    turns: int = Field(2, ge=1)
    """The most turns kept of a conversation; the target answers each of them."""
    limit: int | None = Field(None, ge=1)
    """The most training prompts of each domain."""
    held_out_limit: int | None = Field(None, ge=1)
    """The most held-out prompts of each domain."""
    seed: int = 0
    """Order of the prompts, and which ones a limit keeps."""
    device: str = "cpu"
    """cuda writes the target's own prompts on an accelerator."""
    rows: int = Field(32, ge=1)
    """Self-written prompts at a time."""
    prompt_tokens: int = Field(256, ge=2)
    """The most tokens of a self-written prompt."""


def make_prompts(config: Config, out: Path, target: str = "", *, console: Console | None = None) -> Artefact:
    """Write the artefact; ``target`` writes the prompts of sources without a file.

    Raises InvalidRequest naming file and line for anything that cannot be read as a prompt, and where nothing is left
    to train on; ArtefactError; OutriderError where the target writes no usable prompt."""
    writes = any(source.path is None for source in config.sources)
    if writes and not target:
        raise InvalidRequest("prompts that the target writes itself need the target: --target")
    with begin(out, "prompts", config, sources=sources(config), target=target if writes else None) as work:
        if not work.finished:
            files = tuple(_written(s, i, config, out, target, console) for i, s in enumerate(config.sources, 1))
            split, dropped = collect(config.model_copy(update={"sources": files}))
            if not split["train"]:
                reasons = ", ".join(f"{count} {why}" for why, count in dropped.items()) or "all of them are held out"
                raise InvalidRequest(f"no training prompts are left of {len(config.sources)} sources ({reasons})")
            facts: dict[str, Any] = {"dropped": dict(dropped)}
            for name, prompts in split.items():
                write_lines(out / f"{name}.jsonl", prompts)
                facts[name] = dict(sorted(Counter(prompt["domain"] for prompt in prompts).items()))
            work.finish(["train.jsonl", "held_out.jsonl"], facts)
    return Artefact(out, "prompts", work.record["sha256"], work.record["target"], work.record)


def _written(source: Source, number: int, config: Config, out: Path, target: str, console: Console | None) -> Source:
    """The source with a file: the target's own prompts are written to one in ``out``."""
    if source.self_written is None:
        return source
    from outrider.models.loading import load_tokenizer
    from outrider.training.regenerate import answerer
    from outrider.training.self_prompts import write_self_prompts

    path, heat = out / f"self-{number}.jsonl", source.temperature
    if not path.exists():
        with Progress(console, "prompts of the target's own", source.self_written) as progress:
            dropped = write_self_prompts(
                source.self_written,
                source.openings,
                source.script,
                load_tokenizer(target),
                lambda ends: answerer(
                    target, ends, config.prompt_tokens, heat, config.seed, config.device, config.rows
                ),
                path,
                progress,
                (max(8, config.min_characters), config.max_characters),
            )
        if console is not None:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
            console.print(f"left out of the target's own prompts: {reasons}", style="dim", markup=False)
    return source.model_copy(update={"path": path, "domain": source.domain or "self"})


def sources(config: Config) -> dict[str, str]:
    """Hashes of what the prompts are taken from. Raises InvalidRequest for a file that is not there."""
    return {f"source {i}: {s.name}": _source_hash(s) for i, s in enumerate(config.sources, 1)}


def _source_hash(source: Source) -> str:
    """Hash of the file's bytes and of the options it is read with."""
    if source.path is None:
        return hashlib.sha256(source.model_dump_json().encode()).hexdigest()
    if not source.path.is_file():
        raise InvalidRequest(f"no such file of prompts: {source.path}; expected JSON Lines, .jsonl or .jsonl.gz")
    options = source.model_dump_json(exclude={"path"})
    return hashlib.sha256(f"{file_hash(source.path)} {options}".encode()).hexdigest()


def collect(config: Config) -> tuple[dict[Split, list[dict[str, Any]]], Counter[str]]:
    """The prompts of a config, filtered, deduplicated and split; and how many were dropped, why.

    Raises InvalidRequest naming file and line.
    """
    split: dict[Split, list[dict[str, Any]]] = {"train": [], "held_out": []}
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    kept_out: set[str] = set()  # documents of files that are held out as a whole
    for source in sorted(config.sources, key=lambda s: s.split != "held_out"):  # texts of both sides are held out
        for prompt, document in read_source(source):
            texts = [prompt["text"]] if "text" in prompt else prompt["turns"][: config.turns]
            length = sum(map(len, texts))
            if not any(text.strip() for text in texts):
                dropped["empty"] += 1
            elif not config.min_characters <= length <= config.max_characters:
                dropped["too short or too long"] += 1
            elif (key := _key(texts, prompt.get("system", ""))) in seen:
                dropped["duplicates"] += 1
            else:
                seen.add(key)
                document = key if document is None else _digest(document)
                if source.split == "held_out":
                    kept_out.add(document)
                chosen: Split = source.split if source.split != "auto" else _split_of(document, config.held_out)
                if document in kept_out:
                    chosen = "held_out"
                if "turns" in prompt:
                    prompt = {**prompt, "turns": texts}
                split[chosen].append({"id": key[:16], **prompt})
    limits: dict[Split, int | None] = {"train": config.limit, "held_out": config.held_out_limit}
    return {name: _draw(split[name], config.seed, limit, dropped) for name, limit in limits.items()}, dropped


def from_files(config: Config) -> dict[Split, list[dict[str, Any]]]:
    """The prompts of a config's files alone, without those that the target is to write. Raises InvalidRequest."""
    return collect(config.model_copy(update={"sources": tuple(s for s in config.sources if s.path is not None)}))[0]


def count_turns(prompts: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Domain -> answers that the target will give to its prompts: one for each turn of a user."""
    return Counter(prompt["domain"] for prompt in prompts for _ in prompt.get("turns", "1"))


def expected_turns(config: Config, split: Mapping[Split, Sequence[Mapping[str, Any]]]) -> dict[Split, Counter[str]]:
    """``count_turns`` of the files' prompts, ``split``, with the target's own as many as shares and limits let there
    be."""
    counts: dict[Split, Counter[str]] = {}
    for part, found in split.items():
        limit = config.limit if part == "train" else config.held_out_limit
        share = config.held_out if part == "held_out" else 1 - config.held_out
        given = Counter(prompt["domain"] for prompt in found)
        counts[part] = count_turns(found)
        for source in config.sources:
            domain, share_of_it = source.domain or "self", share if source.split == "auto" else source.split == part
            written = round(share_of_it * (source.self_written or 0))
            written = written if limit is None else min(written, limit - given[domain])
            given[domain] += written
            counts[part][domain] += written  # of one turn each
    return counts


def _key(texts: list[str], system: str) -> str:
    """A hash that is equal for texts which differ only in case and white space."""
    return _digest("\0".join(" ".join(text.split()).casefold() for text in (system, *texts)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _split_of(document: str, share: float) -> Split:
    return "held_out" if int(document[:13], 16) < share * 16**13 else "train"


def _draw(prompts: list[dict[str, Any]], seed: int, limit: int | None, dropped: Counter[str]) -> list[dict[str, Any]]:
    """Shuffled by a hash, so that the order depends on seed and prompts alone; at most ``limit`` of a domain."""
    counts: Counter[str] = Counter()
    drawn = []
    for prompt in sorted(prompts, key=lambda p: _digest(f"{seed} {p['id']}")):
        counts[prompt["domain"]] += 1
        if limit is None or counts[prompt["domain"]] <= limit:
            drawn.append(prompt)
        else:
            dropped["over the limit"] += 1
    return drawn


# ------------------------------------------------------------------------------------------------ reading


def read_source(source: Source) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each line's prompt (``domain`` and ``text``, or ``turns`` and perhaps ``system``) and its document.

    Raises InvalidRequest naming the line, and for a file without any.
    """
    assert source.path is not None
    found = False
    for number, record in read_json_lines(source.path, EXPECTED, "prompts"):
        found = True
        yield _prompt(record, source, f"{source.path} line {number}")
    if not found:
        raise InvalidRequest(f"{source.path} holds no prompts: expected JSON Lines, each {EXPECTED}")


def _prompt(record: Any, source: Source, where: str) -> tuple[dict[str, Any], str | None]:
    if not isinstance(record, dict):
        raise InvalidRequest(f"{where}: got a JSON {type(record).__name__}, expected {EXPECTED}")
    text, turns, system = _fields(record, source, where)
    if source.form == "chat" and text is not None:
        turns, text = [text], None
    elif source.form == "text" and text is None:
        text = turns[0] if turns else ""
    prompt: dict[str, Any] = {"domain": str(source.domain or record.get("domain") or source.name)}
    prompt |= {"turns": turns} if text is None else {"text": text}
    if system and text is None:
        prompt["system"] = system
    document = record.get("document")
    return prompt, None if document is None else str(document)


def _fields(record: Mapping[str, Any], source: Source, where: str) -> tuple[str | None, list[str], str]:
    """(text to continue, or None; a user's turns; the system's instructions) of one line."""
    if source.field is not None:
        if not isinstance(record.get(source.field), str):
            raise InvalidRequest(f"{where} has no text under {source.field!r}; its keys are {_keys(record)}")
        return record[source.field], [], ""
    for name in ("text", "prompt"):
        if isinstance(record.get(name), str):
            return record[name], [], ""
    system = record.get("system")
    system = system if isinstance(system, str) else ""
    turns = record.get("turns")
    if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):
        return None, turns, system
    for name in ("messages", "prompt", "conversations"):
        if isinstance(record.get(name), list):
            turns, told = _chat(record[name], f"{where}: {name}")
            return None, turns, "\n\n".join(filter(None, (system, told)))
    for name in ("text", "prompt", "turns", "messages", "conversations"):
        if name in record:
            wanted = {"text": "a text", "prompt": "a text or a list of messages", "turns": "a list of texts"}
            raise InvalidRequest(
                f"{where}: {name} is {_got(record[name])}, expected {wanted.get(name, 'a list of messages')}"
            )
    raise InvalidRequest(f"{where}: got the keys {_keys(record)}, expected {EXPECTED}")


def _got(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _keys(record: Mapping[str, Any]) -> str:
    names = list(record)
    return ", ".join(map(repr, names[:6])) + (", ..." if len(names) > 6 else "") if names else "(none)"


def _chat(messages: list[Any], where: str) -> tuple[list[str], str]:
    """What users say, and the system's instructions together; what assistants and tools say is left out.

    Messages have ``role`` and ``content``, or ShareGPT's ``from`` and ``value``. Raises InvalidRequest for roles that
    are not known: whether their text belongs to the prompt cannot be guessed.
    """
    turns: list[str] = []
    system: list[str] = []
    for number, message in enumerate(messages, 1):
        given = message if isinstance(message, dict) else {}
        role = given.get("role", given.get("from"))
        if not isinstance(role, str):
            raise InvalidRequest(
                f"{where}: message {number} needs 'role' and 'content' (or 'from' and 'value'), "
                f"got {str(message)[:60]!r}"
            )
        name = role.strip().casefold()
        if name not in ROLES:
            raise InvalidRequest(f"{where}: message {number} has the role {role!r}; {nearest(name, ROLES)}")
        if name in USERS | SYSTEMS:
            (turns if name in USERS else system).append(_text(given, f"{where}: message {number}"))
    return turns, "\n\n".join(filter(None, system))


def _text(message: Mapping[str, Any], where: str) -> str:
    """The text of a message; of OpenAI's content parts, the text parts."""
    text = message.get("content", message.get("value"))
    if isinstance(text, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in text]
        text = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(text, str):
        raise InvalidRequest(f"{where} has no text under 'content' or 'value': {str(message)[:60]!r}")
    return text
