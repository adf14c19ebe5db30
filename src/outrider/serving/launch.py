"""A server from its settings: its address is taken, the model is loaded, then it listens; SIGTERM lets answers
finish."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from outrider.engine.cost_tables import cost_key, load_costs
from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest
from outrider.scheduling.cost_model import CostModel
from outrider.serving.app import make_app
from outrider.serving.service import Service
from outrider.serving.settings import ServerSettings
from outrider.serving.telemetry import Telemetry

__all__ = ["make_server", "make_service", "serve_until_stopped", "take_address"]

LAST_SECONDS = 2.0  # in which clients are told why their answers ended

log = logging.getLogger("outrider.serving")


def make_service(llm: LLM, settings: ServerSettings) -> Service:
    """Raises InvalidRequest for settings that do not fit the model, or a file of keys that cannot be read."""
    most, context = settings.max_prompt_tokens, llm.target.spec.max_positions
    if most is not None and most >= context:
        raise InvalidRequest(f"max_prompt_tokens must be below the model's context of {context} tokens, got {most}")
    telemetry = Telemetry(settings.served_name) if settings.telemetry else None
    costs = getattr(llm.policy, "costs", None)
    if not isinstance(costs, CostModel):  # a policy that asks for none: measured at another start, perhaps
        table = load_costs(cost_key(llm.target, llm.loaded.dtype))
        costs = None if table is None else CostModel(table)
    return Service(llm, settings, costs=costs, keys=settings.api_keys(), telemetry=telemetry)


def serve_until_stopped(service: Service, taken: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve on a socket of ``take_address`` until a signal. ``ready`` is told the address once requests are answered.
    Raises InvalidRequest where another server began to listen there since."""
    make_server(service, taken, ready).run(sockets=[taken])


def make_server(service: Service, taken: socket.socket, ready: Callable[[str], None]) -> uvicorn.Server:
    """A server that listens already; see ``serve_until_stopped``."""
    settings = service.settings
    with _said(settings):
        taken.listen(2048)
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(settings.drain_seconds + LAST_SECONDS) + 1,
        h11_max_incomplete_event_size=64 << 10,
        server_header=False,
    )
    host, port = taken.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return _Server(config, service, lambda: ready(f"http://{shown}:{port}"))


def take_address(settings: ServerSettings) -> socket.socket:
    """A socket with the server's address, which refuses connections until it listens, so that an address in use is
    known before a model is loaded. Raises InvalidRequest for one that cannot be used."""
    with _said(settings):
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, socket.SOCK_STREAM)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
        except OSError:
            taken.close()
            raise
        return taken


@contextmanager
def _said(settings: ServerSettings) -> Iterator[None]:
    """Errors of the system as InvalidRequest."""
    try:
        yield
    except OSError as error:
        raise InvalidRequest(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; choose another --port"
        ) from None


class _Server(uvicorn.Server):
    """The first signal stops new requests and lets the others finish; the second one ends them."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._service.draining:
            self._service.draining = True
            self.should_exit = True
            log.info("signal %d: %d answers are finished, no new ones begin", sig, len(self._service.thread.answers()))
            self._later(self._service.settings.drain_seconds, self._end)
            return
        log.info("signal %d again: every answer ends now", sig)
        self._end()

    def _end(self) -> None:
        """End what runs, and tell its clients."""
        self._service.thread.cancel_all("shutdown")
        self._later(LAST_SECONDS, self._force)

    def _force(self) -> None:
        self.force_exit = True

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, act)
