"""``outrider generate``: continue a prompt, or many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.common import (
    JsonFile,
    ModelOptions,
    SamplingOptions,
    command,
    describe,
    figures,
    human,
    output_record,
    read_stdin,
    write_json,
)
from outrider.config import SamplingParams
from outrider.errors import InvalidRequest

if TYPE_CHECKING:
    from outrider.engine.llm import LLM

__all__ = ["generate"]

GROUP = 32  # prompts answered before they are shown: several rows run together, and an interruption loses few


@command
def generate(
    model: ModelOptions,
    sampling: SamplingOptions,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; '-' reads standard input.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Many prompts: JSON Lines, the first of each line's `turns`.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a user would, by the model's chat template.")] = False,
    json: JsonFile = None,
) -> None:
    """Continue a prompt. The text goes to stdout as it is written, its figures to stderr.

    [bold]Examples[/bold]

    [cyan]outrider generate "def quicksort(" --max-tokens 64[/cyan]

    [cyan]outrider generate "It was" --temperature 0.8 --seed 7 --drafter suffix[/cyan]

    [cyan]cat page.txt | outrider generate - --model ./my-model --stop $'\\n\\n'[/cyan]

    [cyan]outrider generate --prompts questions.jsonl --chat --json answers.json[/cyan]
    """
    if (prompt is None) == (prompts is None):
        raise InvalidRequest("expected a PROMPT ('-' reads standard input) or --prompts FILE, and not both")
    params = sampling.params()
    if prompts is not None:
        _many(model, params, prompts, chat, json)
    else:
        _one(model, params, read_stdin() if prompt == "-" else str(prompt), chat, json)


def _ask(llm: LLM, prompt: str, chat: bool) -> str | list[int]:
    return llm.tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else prompt


def _one(model: ModelOptions, params: SamplingParams, prompt: str, chat: bool, json: str | None) -> None:
    text = human(json).file
    llm = model.load()
    run = llm.run(_ask(llm, prompt, chat), params)
    written = 0

    def finish() -> None:
        output = run.output()
        text.write(output.text[written:] + "\n")  # an interruption may come between a piece and its writing
        text.flush()
        figures(output)
        write_json(json, output_record(output))

    try:
        for event in run.events():
            written += len(event.text)
            text.write(event.text)
            text.flush()
    except KeyboardInterrupt:  # what is there is there
        finish()
        raise
    finish()


def _many(model: ModelOptions, params: SamplingParams, file: Path, chat: bool, json: str | None) -> None:
    from outrider.evaluation.speedup import read_prompts

    console = human(json)
    prompts = read_prompts(file)
    llm = model.load()
    records = []
    try:
        for start in range(0, len(prompts), GROUP):
            group = prompts[start : start + GROUP]
            outputs = llm.generate([_ask(llm, prompt, chat) for prompt in group], params)
            for index, (prompt, output) in enumerate(zip(group, outputs, strict=True), start + 1):
                records.append({"prompt": prompt, **output_record(output)})
                console.print(f"[{index}/{len(prompts)}] {describe(output)}", style="bold", markup=False)
                console.file.write(output.text + "\n\n")
    except KeyboardInterrupt:
        write_json(json, records)
        raise
    write_json(json, records)
