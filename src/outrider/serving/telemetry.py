"""OpenTelemetry spans: one of every HTTP request, and inside it one of every answer, with its times and counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter, time_ns
from typing import TYPE_CHECKING, Any

from outrider.errors import InvalidRequest

if TYPE_CHECKING:
    from outrider.serving.engine_thread import Answer

__all__ = ["Telemetry", "check_packages"]


class Telemetry:
    """Needs the extra ``telemetry``. Where spans go is OpenTelemetry's own configuration (``OTEL_*``).

    Raises InvalidRequest where the packages are not installed.
    """

    def __init__(self, model: str, provider: Any = None) -> None:
        """``provider``: a TracerProvider; None: one that exports by OTLP over HTTP."""
        provider = provider or _exporting()
        from opentelemetry import context, propagate, trace

        self._context, self._propagate, self._trace = context, propagate, trace
        self._provider = provider
        self._tracer = provider.get_tracer("outrider")
        self._model = model

    @contextmanager
    def request(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Iterator[Any]:
        """The span of an HTTP request, a child of the caller's where its headers name one."""
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        with self._tracer.start_as_current_span(
            f"{method} {path}",
            context=self._propagate.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes={"http.request.method": method, "url.path": path},
        ) as span:
            yield span

    def here(self) -> Any:
        """The context that an answer's span belongs to."""
        return self._context.get_current()

    def finished(self, answer: Answer, parent: Any) -> None:
        """Write the span of an answer that has ended."""
        request, stats = answer.request, answer.request.stats
        clock = time_ns() - int(perf_counter() * 1e9)  # from perf_counter to the time of day

        def at(seconds: float) -> int:
            return clock + int(seconds * 1e9)

        span = self._tracer.start_span(
            f"generate {self._model}",
            context=parent,
            start_time=at(answer.submitted),
            attributes={
                "gen_ai.operation.name": "text_completion",
                "gen_ai.request.model": self._model,
                "gen_ai.request.max_tokens": request.params.max_tokens,
                "gen_ai.request.temperature": request.params.temperature,
                "gen_ai.usage.input_tokens": request.prompt_length,
                "gen_ai.usage.output_tokens": stats.generated,
                "gen_ai.response.finish_reasons": [request.finish_reason or "error"],
                "outrider.rounds": stats.rounds,
                "outrider.drafted": stats.drafted,
                "outrider.accepted": stats.accepted,
            },
        )
        if request.started:
            span.add_event("row", timestamp=at(request.started))
        if answer.first_token:
            span.add_event("first token", timestamp=at(answer.first_token))
        if request.error is not None:
            span.set_status(self._trace.StatusCode.ERROR, str(request.error))
        span.end()

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def check_packages() -> None:
    """Raise InvalidRequest where packages of the extra ``telemetry`` are not installed."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace.export  # noqa: F401
    except ImportError as error:
        raise InvalidRequest(
            f"telemetry needs packages that are not installed ({error.name}): pip install 'outrider[telemetry]'"
        ) from None


def _exporting() -> Any:
    check_packages()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "outrider"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
