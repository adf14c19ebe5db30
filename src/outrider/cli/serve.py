"""``outrider serve``: an HTTP server for the clients of OpenAI's and Anthropic's interfaces."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.common import MODELS, command, load_target_model, note, said_when_slow, say_loaded

if TYPE_CHECKING:
    from socket import socket

    from outrider.serving.service import Service
    from outrider.serving.settings import ServerSettings

__all__ = ["serve"]


@command
def serve(
    model: Annotated[str | None, typer.Argument(help=f"{MODELS} Default: embedded.", show_default=False)] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Default: 127.0.0.1, this machine alone.", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Default: 8000; 0 takes any free one.", show_default=False)
    ] = None,
    drafter: Annotated[str | None, typer.Option("--drafter", help="As of `generate`. Default: auto.")] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="How much is drafted: auto, NAME or NAME:DRAFTS. Default: auto.")
    ] = None,
    guard: Annotated[
        bool | None,
        typer.Option("--guard/--no-guard", help="Stop drafting where it slows decoding down. Default: --guard."),
    ] = None,
    draft_tokens: Annotated[
        int | None, typer.Option("--draft-tokens", help="The most tokens to draft in a round; 0 drafts none.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="As of `generate`. Default: auto.")] = None,
    backend: Annotated[str | None, typer.Option("--backend", help="native, reference, or auto. Default: auto.")] = None,
    max_rows: Annotated[int | None, typer.Option("--max-rows", help="Requests that run together. Default: 8.")] = None,
    kv_memory: Annotated[
        str | None,
        typer.Option("--kv-memory", help="Memory for keys and values, as 2G. Default: half of what is available."),
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option("--kv-dtype", help="Of keys and values: auto, or int8, in half of the memory or less.")
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            "--prefill-chunk",
            help="The most prompt tokens of a step; a quarter of it beside rows that decode. Default: 512.",
        ),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option("--model-name", help="What clients call the model. Default: MODEL.")
    ] = None,
    api_key_file: Annotated[
        str | None, typer.Option("--api-key-file", help="A file with one key a line. Default: no key is asked for.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A TOML file with these and further settings.", show_default=False)
    ] = None,
) -> None:
    """Serve a model over HTTP to the clients of OpenAI's and Anthropic's interfaces.

    Paths: /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models, /v1/tokenize, /metrics,
    /health, /ready, and a page to try it at /. Speculation never changes an answer; the field `outrider` of a request
    controls it. Every setting is also a variable OUTRIDER_SERVE_NAME and a key of the TOML file; flags win, then
    variables. SIGTERM or Ctrl-C lets answers finish, a second one ends them.

    [bold]Examples[/bold]

    [cyan]outrider serve smollm2[/cyan]

    [cyan]outrider serve ./my-model --drafter ./my-drafter --port 8080 --api-key-file keys.txt[/cyan]
    """
    from outrider.serving.settings import read_settings

    flags = {
        "model": model,
        "host": host,
        "port": port,
        "drafter": drafter,
        "policy": policy,
        "guard": guard,
        "draft_tokens": draft_tokens,
        "dtype": dtype,
        "backend": backend,
        "max_rows": max_rows,
        "kv_memory": kv_memory,
        "kv_dtype": kv_dtype,
        "prefill_chunk": prefill_chunk,
        "model_name": model_name,
        "api_key_file": api_key_file,
    }
    settings = read_settings(flags, os.environ, config)
    with _collecting_later():
        taken = _checked(settings)
    with taken:
        with _collecting_later():
            service = _load(settings)
        from outrider.serving.launch import serve_until_stopped

        serve_until_stopped(service, taken, lambda address: note(f"ready: {address}"))


@contextmanager
def _collecting_later() -> Iterator[None]:
    """Imports and loading make objects that stay; looking for garbage among them takes a tenth of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _checked(settings: ServerSettings) -> socket:
    """The socket of the server's address. What needs no model is refused before one is loaded, which may take
    minutes."""
    from outrider.serving.launch import take_address
    from outrider.serving.logs import set_up_logs
    from outrider.serving.telemetry import check_packages

    set_up_logs(settings)
    settings.api_keys()
    if settings.telemetry:
        check_packages()
    return take_address(settings)


def _load(settings: ServerSettings) -> Service:
    from outrider.engine.llm import LLM
    from outrider.serving.launch import make_service

    policy_name, policy_options = settings.policy_parts
    loaded = load_target_model(settings.model, settings.dtype, settings.backend)
    with said_when_slow(f"loading the drafter {settings.drafter}"):
        llm = LLM(
            loaded,
            settings.drafter,
            draft_tokens=settings.draft_tokens,
            policy=policy_name,
            policy_options=policy_options,
            guard=settings.guard,
            max_rows=settings.max_rows,
            capacity=settings.capacity,
            kv_memory=settings.kv_memory,
            kv_dtype=settings.kv_dtype,
            prefill_chunk=settings.prefill_chunk,
            measure=False,  # before the server is ready; see serving.idle_measurements
        )
    say_loaded(llm)
    return make_service(llm, settings)
