"""What the commands share: groups of options, output as text and as JSON, and errors in one line."""

from __future__ import annotations

import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from importlib.util import find_spec
from inspect import Parameter
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from outrider.config import SamplingParams, memory_bytes
from outrider.errors import InvalidRequest, OutriderError
from outrider.files import write_result

if TYPE_CHECKING:
    from outrider.engine.llm import LLM
    from outrider.engine.loader import LoadedModel
    from outrider.evaluation.recording import FailedPrompt
    from outrider.tokenization.tokenizer import Tokenizer
    from outrider.types import Output

__all__ = [
    "MODELS",
    "PATIENCE",
    "SOME_FAILED",
    "Backend",
    "Chat",
    "DraftTokens",
    "Drafter",
    "Dtype",
    "FailFast",
    "JsonFile",
    "MaxTokens",
    "MeasuredDrafts",
    "Model",
    "ModelOptions",
    "SamplingOptions",
    "ScheduledModel",
    "Seed",
    "Temperature",
    "add_columns",
    "asks_as_chat",
    "check_folder",
    "check_writable",
    "command",
    "complain",
    "describe",
    "drafters_named",
    "figures",
    "human",
    "is_chat_model",
    "load_target_model",
    "note",
    "output_record",
    "read_stdin",
    "report_failed",
    "said_when_slow",
    "say_asked",
    "say_loaded",
    "write_json",
    "write_text",
]

SOME_FAILED = 3
"""Exit code: some prompts could not be answered, the others were."""
_MODEL, _SAMPLING, _OUTPUT = "Model", "Sampling", "Output"


def _option(panel: str, *names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=True)


MODELS = "A model directory, a GGUF file, a hub id, 'smollm2', 'ollama:NAME', 'lmstudio:NAME', or 'embedded'."
PATIENCE = 2.0
"""Seconds of loading without a word."""
Model = Annotated[str, _option(_MODEL, "--model", help=MODELS)]
Drafter = Annotated[
    str,
    _option(
        _MODEL,
        "--drafter",
        help="none, ngram, suffix, a directory or hub id of a draft model or trained drafter, or 'auto'. Of several, "
        "separated by commas, each round has what promises most.",
    ),
]
DraftTokens = Annotated[
    int | None, _option(_MODEL, "--draft-tokens", help="The most tokens to draft in a round; 0 drafts none.")
]
MeasuredDrafts = Annotated[
    int | None, _option(_MODEL, "--draft-tokens", help="The most tokens to draft in a round, at least 1.")
]
Dtype = Annotated[
    str,
    _option(
        _MODEL,
        "--dtype",
        help="float32, bfloat16, float64, int8, int4, file (as a GGUF file stores it), or 'auto': file for GGUF files, "
        "else float32.",
    ),
]
Backend = Annotated[str, _option(_MODEL, "--backend", help="native, reference, or 'auto'.")]
MaxTokens = Annotated[int, _option(_SAMPLING, "--max-tokens", help="The most new tokens of an answer.")]
Temperature = Annotated[
    float, _option(_SAMPLING, "--temperature", help="0 is greedy; 1 samples from the model's own distribution.")
]
Seed = Annotated[
    int | None,
    _option(_SAMPLING, "--seed", help="Makes the text reproducible: the same text with any drafter, or none."),
]
FailFast = Annotated[
    bool,
    typer.Option(
        "--fail-fast", help="Stop at the first prompt that cannot be answered, instead of going on without it."
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Ask `turns` through the model's chat template. Default: where it has one, except 'embedded'.",
    ),
]
JsonFile = Annotated[
    str | None,
    _option(
        _OUTPUT, "--json", metavar="FILE", help="Write the result as JSON; '-', or no FILE, prints only that on stdout."
    ),
]


# ------------------------------------------------------------------------------------------------ option groups


@dataclass(frozen=True)
class ModelOptions:
    """The target, its drafter, and how they run."""

    model: Model = "embedded"
    drafter: Drafter = "auto"
    draft_tokens: DraftTokens = None
    dtype: Dtype = "auto"
    backend: Backend = "auto"

    def load(self) -> LLM:
        """Raises CheckpointError and its kin for what cannot be loaded."""
        from outrider.engine.llm import LLM

        loaded = load_target_model(self.model, self.dtype, self.backend)
        with said_when_slow(f"loading the drafter {self.drafter}{_measuring(self.model, self.drafter)}"):
            llm = LLM(loaded, self.drafters, draft_tokens=self.draft_tokens, **self.running())
        say_loaded(llm)
        return llm

    @property
    def drafters(self) -> str | list[str]:
        """One drafter, or several that were separated by commas."""
        names = drafters_named(self.drafter)
        return self.drafter if len(names) == 1 else names

    def running(self) -> dict[str, Any]:
        """How much is drafted, and the memory, as ``LLM`` takes them."""
        return {}


@dataclass(frozen=True)
class ScheduledModel(ModelOptions):
    """The same, how much is drafted, and the memory of a run."""

    policy: Annotated[
        str, _option(_MODEL, "--policy", help="How much is drafted: auto, NAME or NAME:DRAFTS, as fixed:3.")
    ] = "auto"
    guard: Annotated[
        bool,
        _option(_MODEL, "--guard/--no-guard", help="Stop drafting where it slows decoding down, whatever the policy."),
    ] = True
    kv_memory: Annotated[
        str | None,
        _option(
            _MODEL, "--kv-memory", help="Memory for keys and values, as 512M or 2G. Default: half of what is available."
        ),
    ] = None
    kv_dtype: Annotated[
        str, _option(_MODEL, "--kv-dtype", help="Of keys and values: auto, or int8, in half of the memory or less.")
    ] = "auto"
    prefill_chunk: Annotated[
        int,
        _option(
            _MODEL,
            "--prefill-chunk",
            help="The most prompt tokens of a step; a quarter of it beside rows that decode.",
        ),
    ] = 512

    def running(self) -> dict[str, Any]:
        """Raises InvalidRequest for drafts or memory that are no number."""
        name, separator, drafts = self.policy.partition(":")
        if separator and not (drafts.isascii() and drafts.isdigit()):
            raise InvalidRequest(f"--policy must be NAME or NAME:DRAFTS like fixed:3, got {self.policy!r}")
        options = {"draft_tokens": int(drafts)} if separator else {}
        return {
            "policy": name,
            "policy_options": options,
            "guard": self.guard,
            "kv_memory": None if self.kv_memory is None else memory_bytes("--kv-memory", self.kv_memory),
            "kv_dtype": self.kv_dtype,
            "prefill_chunk": self.prefill_chunk,
        }


def load_target_model(model: str, dtype: str, backend: str) -> LoadedModel:
    """A target and its tokenizer; says what it does where that takes long. Raises CheckpointError and its kin."""
    if backend == "auto" and find_spec("outrider._native") is None:
        note("the native core is not built here: the slower PyTorch backend runs (`make native` builds the core)")
    with said_when_slow(f"loading {model}: reading its weights"):
        from outrider.engine.loader import load_model

        return load_model(model, dtype=dtype, backend=backend)


def say_loaded(llm: LLM, drafters: Iterable[str] = ()) -> None:
    """One line on stderr about what was loaded, and a second one where another dtype should be faster."""
    from outrider.cli.loaded import describe_loaded, dtype_hint

    note(describe_loaded(llm, drafters))
    for text in llm.tokenizer.notes if llm.tokenizer is not None else ():
        note(text)
    hint = dtype_hint(llm)
    if hint is not None:
        note(hint)


def is_chat_model(model: str, tokenizer: Tokenizer) -> bool:
    """Whether it has a chat template. The embedded model's is for tests: it was trained on plain text."""
    return tokenizer.has_chat_template and model != "embedded"


def asks_as_chat(chosen: bool | None, model: str, tokenizer: Tokenizer) -> bool:
    """Whether prompts go through the chat template: as ``--chat`` or ``--no-chat`` chose, else for a chat model."""
    return is_chat_model(model, tokenizer) if chosen is None else chosen


def say_asked(chosen: bool | None, as_chat: bool) -> None:
    """How prompts were asked, where that was not chosen and is not as they are."""
    if chosen is None and as_chat:
        note("prompts with `turns` were asked through the model's chat template; --no-chat gives them as they are")


@contextmanager
def said_when_slow(text: str) -> Iterator[None]:
    """Print ``text`` on stderr once what is inside has taken ``PATIENCE`` seconds."""
    timer = Timer(PATIENCE, note, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _measuring(model: str, drafter: str) -> str:
    slow = model == "embedded" and drafter == "auto"
    return ", and measuring which one is fastest on this machine where that is not remembered" if slow else ""


@dataclass(frozen=True)
class SamplingOptions:
    """A request's sampling, as ``SamplingParams`` takes it."""

    max_tokens: MaxTokens = 128
    temperature: Temperature = 0.0
    top_p: Annotated[
        float, _option(_SAMPLING, "--top-p", help="Keep the likeliest tokens whose probabilities add up to this.")
    ] = 1.0
    top_k: Annotated[int, _option(_SAMPLING, "--top-k", help="Keep the k likeliest tokens; 0 keeps all.")] = 0
    min_p: Annotated[
        float, _option(_SAMPLING, "--min-p", help="Drop tokens less likely than this times the likeliest.")
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        _option(_SAMPLING, "--repetition-penalty", help="Above 1: tokens of prompt and output become less likely."),
    ] = 1.0
    presence_penalty: Annotated[
        float,
        _option(
            _SAMPLING, "--presence-penalty", help="Subtracted from the logit of every token already in the output."
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float, _option(_SAMPLING, "--frequency-penalty", help="Subtracted once for each time a token is in the output.")
    ] = 0.0
    logit_bias: Annotated[
        list[str] | None,
        _option(_SAMPLING, "--logit-bias", metavar="ID=VALUE", help="Add to a token's logit. May be repeated."),
    ] = None
    seed: Seed = None
    rule: Annotated[
        str | None,
        _option(
            _SAMPLING,
            "--rule",
            help="How drafts are verified: rejection, block or coupled. Default: coupled with --seed, else block.",
        ),
    ] = None
    stop: Annotated[
        list[str] | None, _option(_SAMPLING, "--stop", help="A string that ends the text. May be repeated.")
    ] = None
    ignore_eos: Annotated[bool, _option(_SAMPLING, "--ignore-eos", help="Go on after the end-of-text token.")] = False

    def params(self) -> SamplingParams:
        """Raises InvalidRequest for values out of range."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["logit_bias"] = tuple(_bias(entry) for entry in self.logit_bias or ())
        values["stop"] = tuple(self.stop or ())
        return SamplingParams(**values)


def _bias(entry: str) -> tuple[int, float]:
    token, separator, value = entry.partition("=")
    try:
        if not separator:
            raise ValueError
        return int(token), float(value)
    except ValueError:
        raise InvalidRequest(f"--logit-bias: expected ID=VALUE like 42=-1.5, got {entry!r}") from None


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command: its parameters that are option groups become their options, errors and warnings one line each.

    Exit codes: 2 for the user's input (``OutriderError``), 3 where some prompts of many could not be answered, 1 for
    anything unforeseen, 130 for Ctrl-C.
    """
    groups: dict[str, type] = {}
    flat: list[Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind = parameter.annotation
        if is_dataclass(kind) and isinstance(kind, type):
            groups[parameter.name] = kind
            hints = get_type_hints(kind, include_extras=True)
            flat += [
                Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
                for f in fields(kind)
            ]
        else:
            flat.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    @wraps(function)
    def run(**values: Any) -> None:
        filled = {name: kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        with _errors_in_one_line(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say("warning", str(message), "yellow")
            function(**filled, **values)

    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return run


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does: no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except (OutriderError, OSError) as error:
        if os.environ.get("OUTRIDER_DEBUG"):
            raise
        where = getattr(error, "filename", None) or "a file or standard output"
        complain(f"{where}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error))
        raise typer.Exit(2) from None
    except typer.Exit:
        raise
    except Exception as error:
        if os.environ.get("OUTRIDER_DEBUG"):
            raise
        complain(f"unexpected {type(error).__name__}: {error}; OUTRIDER_DEBUG=1 shows where")
        raise typer.Exit(1) from None


def complain(message: str) -> None:
    """An error in one line, on stderr."""
    _say("error", message, "bold red")


def _say(kind: str, message: str, style: str) -> None:
    line = f"{kind}: {' '.join(message.split())}"
    Console(stderr=True, soft_wrap=True, highlight=False).print(line, style=style, markup=False, emoji=False)


def report_failed(failed: Sequence[FailedPrompt], prompts: int) -> None:
    """Name the prompts that could not be answered, and end the command with ``SOME_FAILED`` if there are any."""
    for one in failed:
        complain(f"prompt {one.index + 1} ({one.file} line {one.line}): {one.error}")
    if failed:
        complain(f"{len(failed)} of {prompts} prompts could not be answered")
        raise typer.Exit(SOME_FAILED)


# ------------------------------------------------------------------------------------------------ input and output


def read_stdin() -> str:
    """Standard input to its end, exactly as it is; bytes that are not UTF-8 survive as surrogates."""
    return sys.stdin.buffer.read().decode("utf-8", "surrogateescape")


NARROWEST, WIDEST = 8, 1000  # characters of a column that folds, and of a table


class _Output(Console):
    """A console whose closed pipe is an exception, not rich's exit with code 1, and whose tables lose no column."""

    def print(self, *objects: Any, **options: Any) -> None:
        """The same; a table that is wider than the terminal is left for the terminal to wrap."""
        for table in objects:
            if isinstance(table, Table):
                folding = [column for column in table.columns if not column.no_wrap]
                for column in folding:
                    column.max_width, column.overflow = NARROWEST, "fold"
                needed = self.measure(table, options=self.options.update(width=WIDEST)).maximum
                for column in folding:
                    column.max_width = None
                if needed > self.width:
                    table.width, options["crop"] = needed, False
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError


def human(json_file: str | None) -> Console:
    """The console for text: stdout, or stderr when stdout is for JSON alone.

    Raises InvalidRequest where the JSON file could not be written, before any work is done.
    """
    if json_file is not None and json_file != "-":
        check_writable("--json", Path(json_file), ", or '-'")
    return _Output(stderr=json_file == "-", highlight=False, emoji=False)  # names may hold ":a:"


def drafters_named(text: str) -> list[str]:
    """Names that are separated by commas, unless they are one path."""
    return [text] if Path(text).exists() else [name.strip() for name in text.split(",")]


def check_writable(option: str, path: Path, other: str = "") -> None:
    """Raises InvalidRequest where no file can be written there."""
    if path.is_dir() or not os.access(path if path.exists() else f"{path.parent}/", os.W_OK):
        raise InvalidRequest(f"{option}: cannot write {path}; expected a file in a directory that exists{other}")


def check_folder(option: str, path: Path) -> None:
    """Raises InvalidRequest where there is no directory and none can be made."""
    nearest = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InvalidRequest(f"{option}: {path} cannot be made, as {nearest} is no directory that can be written to")


def write_json(json_file: str | None, value: Any) -> None:
    """Write ``value`` to the file of ``--json``, or to stdout for ``-``; nothing without ``--json``."""
    if json_file is None:
        return
    text = json.dumps(value, indent=2) + "\n"  # ASCII: even a prompt that was not UTF-8 can be written
    if json_file == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_text(Path(json_file), text)


def write_text(path: Path, text: str) -> None:
    """Write a result as UTF-8. Raises InvalidRequest where that fails; an earlier file then stays as it was."""
    write_result(path, text.encode())


def add_columns(table: Table, words: Sequence[str], numbers: Sequence[str]) -> None:
    """Columns of words on the left, which fold where the terminal is narrow, then columns of numbers, which do not."""
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))


def check_measurement(draft_tokens: int | None, temperatures: Sequence[float] | None) -> None:
    """Raises InvalidRequest for options with which nothing can be measured."""
    if draft_tokens == 0:
        raise InvalidRequest("--draft-tokens must be at least 1, got 0: without drafts there is nothing to measure")
    wrong = [value for value in temperatures or () if not 0 <= value <= 100]
    if wrong:
        raise InvalidRequest(f"--temperature must be between 0 (greedy) and 100, got {wrong[0]:g}")


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str, float], None]]:
    """A progress bar: call the yielded function with a description and the share that is done (0 to 1)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("loading", total=1.0)
        yield lambda text, done: shown.update(task, description=text, completed=done)


def output_record(output: Output) -> dict[str, Any]:
    """One answer as a JSON object."""
    stats = output.stats
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stats": {
            "rounds": stats.rounds,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "acceptance_length": round(stats.acceptance_length, 4),
            "tokens_per_second": round(stats.tokens_per_second, 2),
        },
    }


def describe(output: Output) -> str:
    """One answer's statistics in a line."""
    stats = output.stats
    return (
        f"{stats.generated} tokens, {stats.tokens_per_second:.1f} tokens/s, "
        f"acceptance length {stats.acceptance_length:.2f}, finished: {output.finish_reason}"
    )


def figures(output: Output) -> None:
    """Print an answer's statistics on stderr, apart from its text."""
    note(describe(output))


def note(text: str) -> None:
    """Print a remark on stderr, dim."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="dim", markup=False, emoji=False)
