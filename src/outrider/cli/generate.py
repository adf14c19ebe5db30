"""``outrider generate``: continue a prompt, or many."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli.common import (
    FailFast,
    JsonFile,
    SamplingOptions,
    ScheduledModel,
    command,
    describe,
    figures,
    human,
    output_record,
    read_stdin,
    report_failed,
    write_json,
)
from outrider.config import Grammar, SamplingParams
from outrider.errors import InvalidRequest, OutriderError

__all__ = ["generate"]

GROUP = 32  # prompts that are answered together, then shown: an interruption loses at most these


@command
def generate(
    model: ScheduledModel,
    sampling: SamplingOptions,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; '-' reads standard input.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="Many prompts: JSON Lines with `text`, `turns` (the first one) or `prompt` (ids)."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send each prompt as a user's message, in the model's chat template.")
    ] = False,
    json_schema: Annotated[
        Path | None,
        typer.Option("--json-schema", metavar="FILE", help="The text is JSON that is valid under this schema."),
    ] = None,
    regex: Annotated[
        str | None, typer.Option("--regex", help="The whole text matches this regular expression (Rust's syntax).")
    ] = None,
    fail_fast: FailFast = False,
    json: JsonFile = None,
) -> None:
    """Continue a prompt. The text goes to stdout as it is generated, its statistics to stderr.

    With --prompts, a prompt that cannot be answered (too long, empty, refused by the chat template) is reported and the
    others are answered: in the JSON it has `error` beside its `index` (from 0) and `line` (from 1), and the exit code
    is 3. --fail-fast stops at the first one instead, with code 2.

    [bold]Examples[/bold]

    [cyan]outrider generate "def quicksort(" --max-tokens 64[/cyan]

    [cyan]outrider generate "It was" --temperature 0.8 --seed 7 --drafter suffix[/cyan]

    [cyan]cat page.txt | outrider generate - --model ./my-model --stop $'\\n\\n'[/cyan]

    [cyan]outrider generate "A date: " --regex '[0-9]{4}-[0-9]{2}-[0-9]{2}'[/cyan]

    [cyan]outrider generate --prompts questions.jsonl --chat --json answers.json[/cyan]
    """
    if (prompt is None) == (prompts is None):
        raise InvalidRequest("expected a PROMPT ('-' reads standard input) or --prompts FILE, and not both")
    params = replace(sampling.params(), grammar=_grammar(json_schema, regex))
    if prompts is not None:
        _many(model, params, prompts, chat, fail_fast, json)
    else:
        _one(model, params, read_stdin() if prompt == "-" else str(prompt), chat, json)


def _grammar(schema: Path | None, regex: str | None) -> Grammar | None:
    if schema is not None and regex is not None:
        raise InvalidRequest("expected --json-schema or --regex, and not both")
    if regex is not None:
        return Grammar("regex", regex)
    if schema is None:
        return None
    try:
        return Grammar("json_schema", schema.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidRequest(f"{schema} cannot be read: {reason}; expected a file with a JSON schema") from None


def _one(model: ScheduledModel, params: SamplingParams, prompt: str, chat: bool, json: str | None) -> None:
    text = human(json).file
    llm = model.load()
    run = llm.run(llm.tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else prompt, params)
    written = 0

    def finish() -> None:
        output = run.output()
        text.write(output.text[written:] + "\n")  # an interruption may come between a piece and its writing
        text.flush()
        figures(output)
        write_json(json, output_record(output))

    events = run.events()
    try:
        for event in events:
            written += len(event.text)
            text.write(event.text)
            text.flush()
    except KeyboardInterrupt:  # show and write what was generated so far
        events.close()
        finish()
        raise
    finish()


def _many(
    model: ScheduledModel, params: SamplingParams, file: Path, chat: bool, fail_fast: bool, json: str | None
) -> None:
    from outrider.evaluation.recording import FailedPrompt, read_prompts, runnable

    console = human(json)
    prompts = [replace(prompt, asked=isinstance(prompt.prompt, str)) for prompt in read_prompts(file)]
    llm = model.load()
    good, failed = runnable(llm, prompts, params, chat=chat, fail_fast=fail_fast)
    records: dict[int, dict[str, Any]] = {}

    def keep(index: int, line: int, result: dict[str, Any]) -> None:
        records[index] = {"prompt": prompts[index].prompt, "index": index, "line": line, **result}

    for one in failed:
        keep(one.index, one.line, {"error": one.error})
    try:
        for start in range(0, len(good), GROUP):
            group = good[start : start + GROUP]
            for prompt, run in [(prompt, llm.run(prompt.prompt, params)) for prompt in group]:
                try:
                    list(run.events())
                except OutriderError as error:  # known only while it runs: sampling options that overflow, say
                    if fail_fast:
                        raise InvalidRequest(f"{prompt.where}: {error}") from error
                    failed.append(FailedPrompt.of(prompt, error))
                    keep(prompt.index, prompt.line, {"error": str(error)})
                    continue
                output = run.output()
                keep(prompt.index, prompt.line, output_record(output))
                console.print(f"[{prompt.index + 1}/{len(prompts)}] {describe(output)}", style="bold", markup=False)
                console.file.write(output.text + "\n\n")
    finally:  # after an interruption too: what was generated so far
        write_json(json, [records[index] for index in sorted(records)])
    report_failed(failed, len(prompts))
