"""Structured logs: a line a request, as text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from datetime import UTC, datetime

from outrider.serving.settings import ServerSettings

__all__ = ["set_up_logs"]

log = logging.getLogger("outrider.serving")

FIELDS = ("request_id", "path", "status", "seconds")


def set_up_logs(settings: ServerSettings) -> None:
    """Send the server's logs, and warnings as lines among them, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if settings.log_format == "json" else _Text())
    levels = {"outrider": settings.log_level.upper(), "uvicorn": "WARNING"}
    levels["asyncio"] = "ERROR"  # it warns of every client that leaves a stream
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
    warnings.showwarning = lambda message, *_, **__: log.warning("%s", message)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        request = getattr(record, "request_id", "")
        line = " ".join(f"{when} {record.levelname.lower()} {request} {record.getMessage()}".split())
        line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in line)  # paths are the clients'
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: getattr(record, name) for name in FIELDS if hasattr(record, name)},
        }
        if record.exc_info is not None:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False)
