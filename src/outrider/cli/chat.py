"""``outrider chat``: talk to a model in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.common import SamplingOptions, ScheduledModel, command, complain, figures, note
from outrider.errors import CheckpointError, InvalidRequest
from outrider.tokenization.chat_template import with_system_in_user

if TYPE_CHECKING:
    from outrider.config import SamplingParams
    from outrider.engine.llm import LLM

__all__ = ["chat"]

HELP = "/exit ends, /reset starts a new conversation, Ctrl-C stops an answer"


@command
def chat(
    model: ScheduledModel,
    sampling: SamplingOptions,
    system: Annotated[str, typer.Option("--system", help="An instruction that precedes the conversation.")] = "",
) -> None:
    """Talk to a model. Answers stream as they are generated, their statistics follow.

    /exit ends, /reset starts a new conversation, Ctrl-C stops an answer and keeps the text so far.

    [bold]Examples[/bold]

    [cyan]outrider chat[/cyan]

    [cyan]outrider chat --model ./my-model --temperature 0.7 --system "Answer in one sentence."[/cyan]
    """
    params = sampling.params()
    llm = model.load()
    if not llm.tokenizer.has_chat_template:
        raise CheckpointError(f"{model.model} has no chat template; `outrider generate` takes plain prompts")
    beginning = [{"role": "system", "content": system}] if system else []
    if system and not llm.tokenizer.takes_system:
        note("the chat template takes no system messages: the instruction goes before your first message")
    messages = list(beginning)
    note(HELP)
    while (line := _listen()) is not None and line != "/exit":
        if line == "/reset":
            messages = list(beginning)
            note("forgotten")
        elif line.startswith("/"):
            note(f"unknown command {line}: {HELP}")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": _answer(llm, messages, params)})
            except InvalidRequest as error:  # the conversation has grown past the context
                messages.pop()
                complain(f"{error}; /reset begins anew")


def _listen() -> str | None:
    """One line from the user; None at the end of the input."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Stream the assistant's answer. Ctrl-C ends it early; the text so far stays in the conversation."""
    tokenizer = llm.tokenizer
    shown = messages if tokenizer.takes_system else with_system_in_user(messages)
    run = llm.run(tokenizer.encode_chat(shown), params)
    try:
        for event in run.events():
            sys.stdout.write(event.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass  # the run is cancelled, the conversation goes on
    print()
    output = run.output()
    figures(output)
    return output.text
