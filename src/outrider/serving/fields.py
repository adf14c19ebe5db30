"""Fields that several endpoints take, and what they mean for the engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from outrider.config import SamplingParams
from outrider.serving.web import ApiError

__all__ = ["OutriderOptions", "SamplingFields", "StreamFields", "Strict", "stop_strings"]

MOST_STOPS, LONGEST_STOP, MOST_BIASES = 16, 1000, 2048
Number = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """Unknown fields are refused and values are not converted: a wrong type is the client's mistake."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class OutriderOptions(Strict):
    """The field ``outrider``: speculation of this request. Nothing here changes the distribution of the text."""

    off: bool = False
    """Decode plainly."""
    drafter: str | None = None
    """The server's own drafter, or ``none``."""
    policy: str | None = None
    """The server's own policy, or ``none``."""
    rule: Literal["rejection", "block", "coupled"] | None = None
    draft_tokens: int | None = Field(default=None, ge=0, le=1024)
    """The most drafts of a round."""
    pieces: bool = False
    """Report each token, its probability, and whether it was drafted (chat completions and completions)."""


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: Literal[False] | None = None


class StreamFields(Strict):
    """Whether an answer comes in parts, and whether its usage follows them."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def tells_usage(self) -> bool:
        """At the end of a stream."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check_stream(self) -> None:
        """Raises ApiError for options of a stream that is not asked for."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")


class SamplingFields(Strict):
    """How tokens are chosen; None: the model's own default, else the API's."""

    temperature: Number | None = Field(default=None, ge=0, le=100)
    top_p: Number | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=1 << 31)
    min_p: Number | None = Field(default=None, ge=0, le=1)
    repetition_penalty: Number | None = Field(default=None, gt=0, le=100)
    presence_penalty: Number | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Number] | None = Field(default=None, max_length=MOST_BIASES)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    priority: int = Field(default=0, ge=-100, le=100)
    """Requests of a lower number get a row, memory and prompt tokens first."""
    outrider: OutriderOptions | None = None

    @property
    def wants_pieces(self) -> bool:
        return self.outrider is not None and self.outrider.pieces

    def sampling(self, defaults: dict[str, float], max_tokens: int, **more: Any) -> SamplingParams:
        """``defaults``: of the model's generation_config.json. Raises InvalidRequest."""
        options = self.outrider or OutriderOptions()
        values: dict[str, Any] = {"temperature": 1.0} | {
            name: defaults[name] for name in ("temperature", "top_p", "top_k", "min_p") if name in defaults
        }
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
        for name in (*names, "frequency_penalty", "seed"):
            if (value := getattr(self, name, None)) is not None:
                values[name] = value
        values["top_k"] = max(0, int(values.get("top_k", 0)))
        if self.logit_bias:
            values["logit_bias"] = tuple((_token_id(key), bias) for key, bias in self.logit_bias.items())
        if options.pieces and more.get("logprobs") is None:
            more["logprobs"] = 0
        plain = options.off or "none" in (options.drafter, options.policy)
        return SamplingParams(
            max_tokens=max_tokens,
            stop=stop_strings("stop", self.stop),
            ignore_eos=self.ignore_eos,
            priority=self.priority,
            rule=options.rule,
            draft_tokens=0 if plain else options.draft_tokens,
            **values,
            **more,
        )


def stop_strings(name: str, given: str | list[str] | None) -> tuple[str, ...]:
    """Raises ApiError for too many, or one too long or empty."""
    strings = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    if len(strings) > MOST_STOPS:
        raise ApiError(400, f"{name}: got {len(strings)} strings, expected at most {MOST_STOPS}", param=name)
    wrong = [one for one in strings if not 0 < len(one) <= LONGEST_STOP]
    if wrong:
        length = len(wrong[0])
        raise ApiError(400, f"{name}: got a string of {length} characters, expected 1 to {LONGEST_STOP}", param=name)
    return strings


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 19):
        raise ApiError(400, f"logit_bias: {key[:40]!r} is no token id; expected a whole number", param="logit_bias")
    return int(key)
