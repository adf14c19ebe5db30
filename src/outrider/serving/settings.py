"""What a server is told: by flags, by the environment (``OUTRIDER_SERVE_*``), by a TOML file, in this order."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from outrider.config import memory_bytes
from outrider.errors import InvalidRequest, nearest

__all__ = ["ServerSettings", "read_settings"]

PREFIX = "OUTRIDER_SERVE_"
LONGEST_WAIT = 86_400.0  # seconds
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^A-Z/?#@*\s]+")  # as browsers send it


class ServerSettings(BaseModel):
    """Every setting of ``outrider serve``; each is a key of the TOML file and, in capitals, of the environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "embedded"
    """As ``--model`` of the other commands takes it."""
    model_name: str = ""
    """What clients call it; empty: ``model``."""
    drafter: str = "auto"
    policy: str = "auto"
    """``auto``, or a policy of the catalogue, as NAME or NAME:DRAFTS."""
    guard: bool = True
    """Stop drafting where it makes decoding slower."""
    draft_tokens: int | None = Field(default=None, ge=0)
    dtype: str = "auto"
    backend: str = "auto"
    max_rows: int = Field(8, ge=1, le=4096)
    """Requests that run together."""
    capacity: int | None = Field(default=None, ge=1)
    """Tokens of a sequence that memory is laid out for; None: at most 8192. Longer requests make it grow."""
    kv_memory: int | None = Field(default=None, ge=1)
    """Bytes for keys and values, also as 512M or 2G, those kept for prompts that begin alike included; None: see
    ``LLM``."""
    kv_dtype: str = "auto"
    prefill_chunk: int = Field(512, ge=1)
    """The most prompt tokens of a step; a quarter of it beside rows that decode."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0: any free port, which is printed."""
    api_key_file: str = ""
    """A file with one key a line; empty: no key is asked for."""
    cors_origins: list[str] = Field(default_factory=list)
    """Origins whose pages may call the server; ``*`` for all. Empty: none."""
    max_body_bytes: int = Field(4 << 20, ge=1)
    body_seconds: float = Field(30.0, gt=0, le=LONGEST_WAIT)
    """Within which a body must have arrived."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """None: what the model's context holds."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """The most that a request may ask for; None: what the context leaves."""
    max_n: int = Field(16, ge=1)
    """Answers of one request."""
    max_requests: int = Field(256, ge=1)
    """Running and waiting together; one more is refused with 429."""
    queue_seconds: float = Field(60.0, gt=0, le=LONGEST_WAIT)
    """A request none of whose answers has a row by then is refused with 429."""
    drain_seconds: float = Field(120.0, ge=0, le=LONGEST_WAIT)
    """After SIGTERM, for the answers that have begun."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    telemetry: bool = False
    """OpenTelemetry spans; needs the extra ``telemetry``."""

    @field_validator("kv_memory", mode="before")
    @classmethod
    def _with_unit(cls, given: Any) -> Any:
        return memory_bytes("kv_memory", given) if isinstance(given, str) else given

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("expected no truth value")
        return given

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, given: list[str]) -> list[str]:
        """Origins of another form match no page."""
        for one in given:
            if not ORIGIN.fullmatch(one):
                raise ValueError("expected SCHEME://HOST[:PORT] in lower case, as http://localhost:3000, or '*'")
        return given

    @property
    def served_name(self) -> str:
        return self.model_name or self.model

    @property
    def policy_parts(self) -> tuple[str, dict[str, Any]]:
        """The policy's name and options. Raises InvalidRequest for drafts that are no number."""
        name, separator, drafts = self.policy.partition(":")
        if not separator:
            return name, {}
        if not (drafts.isascii() and drafts.isdigit()):
            raise InvalidRequest(f"policy must be NAME or NAME:DRAFTS like fixed:3, got {self.policy!r}")
        return name, {"draft_tokens": int(drafts)}

    def api_keys(self) -> tuple[bytes, ...]:
        """Raises InvalidRequest for a file that holds no key, or a line that is none."""
        if not self.api_key_file:
            return ()
        try:
            lines = Path(self.api_key_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"--api-key-file {self.api_key_file} cannot be read: {error}") from None
        keys = []
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line or line.startswith("#"):
                continue
            if not re.fullmatch("[!-~]+", line):  # not quoted: it may be a key all the same
                raise InvalidRequest(
                    f"--api-key-file {self.api_key_file}, line {number}: expected a key of ASCII characters without "
                    "spaces, since clients can send no other; a comment needs a line of its own"
                )
            keys.append(line.encode())
        if not keys:
            raise InvalidRequest(f"--api-key-file {self.api_key_file} holds no key: expected one a line")
        return tuple(keys)


def read_settings(flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None) -> ServerSettings:
    """Flags that are None were not given. Raises InvalidRequest, naming the setting and where it came from."""
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    named = environment.get(f"{PREFIX}CONFIG")
    path = file or (Path(named) if named else None)
    sources = [
        (_toml(path, "--config" if file else f"{PREFIX}CONFIG") if path else {}, str(path)),
        *(({name: value}, PREFIX + name.upper()) for name, value in _variables(environment).items()),
        ({name: value for name, value in flags.items() if value is not None}, "the command line"),
    ]
    for given, where in sources:
        for name, value in given.items():
            if name not in ServerSettings.model_fields:
                raise InvalidRequest(f"{where}: unknown setting {name!r}; {nearest(name, ServerSettings.model_fields)}")
            values[name], origin[name] = value, where
    try:
        return ServerSettings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        got = str(first["input"])[:80]
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidRequest(f"{origin.get(name, 'settings')}: {name}: {message}, got {got!r}") from None


def _toml(path: Path, named: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(f"{named} {path} cannot be read: expected a TOML file: {error}") from None


def _variables(environment: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in environment.items():
        key = name.removeprefix(PREFIX).lower()
        if name.startswith(PREFIX) and key != "config":
            found[key] = [part.strip() for part in value.split(",") if part.strip()] if key == "cors_origins" else value
    return found
