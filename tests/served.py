"""A server in a thread, for tests that speak to it as clients do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

from outrider.engine.llm import LLM
from outrider.serving.launch import make_server, make_service, take_address
from outrider.serving.service import Service
from outrider.serving.settings import ServerSettings

__all__ = ["drafting", "eventually", "serving"]


def drafting(model: str | Path = "embedded", drafter: str = "suffix") -> LLM:
    """One that drafts in every round, whether or not that pays on a busy machine."""
    return LLM(model, drafter, policy="fixed", guard=False)


@contextmanager
def serving(llm: LLM, **settings: Any) -> Iterator[tuple[str, Service]]:
    """The address and the service of a running server."""
    service = make_service(llm, ServerSettings(port=0, policy="fixed", **settings))
    ready, address = Event(), []

    def announce(url: str) -> None:
        address.append(url)
        ready.set()

    taken = take_address(service.settings)
    server = make_server(service, taken, announce)
    thread = Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    assert ready.wait(20), "the server did not start"
    try:
        yield address[0], service
    finally:
        server.should_exit = True
        thread.join(20)
        taken.close()


def choosing_tools() -> Any:
    """A service as far as choices of tools ask for one: its model's template takes tools."""
    tokenizer = SimpleNamespace(
        chat_template_text=lambda tools: "tools <tool_call>" if tools else "", vocabulary={}, special_ids=frozenset()
    )
    return SimpleNamespace(llm=SimpleNamespace(tokenizer=tokenizer))


def check_choice(found: Any, forced: bool, most: int | None) -> None:
    """What a choice of tools comes to: whether a call is forced, and the most calls of an answer."""
    assert found is not None and (found.grammar is not None, found._most) == (forced, most)
    assert found.grammar is None or '"lenient": false' in found.grammar.text
    assert "strict" not in found.for_template[0]["function"], "templates would show it to the model"


def eventually(what: Any, seconds: float = 5.0) -> bool:
    """Whether ``what()`` becomes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.01)
    return bool(what())
