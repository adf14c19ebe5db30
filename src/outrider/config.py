"""Frozen configurations: what a request asks for, and what a decoder stack is made of."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from outrider.errors import InvalidRequest, closest, nearest

__all__ = [
    "Grammar",
    "GrammarKind",
    "LayerConfig",
    "RopeConfig",
    "Rule",
    "SamplingParams",
    "StackConfig",
    "build",
    "memory_bytes",
    "required",
    "whole_number",
]

Rule = Literal["rejection", "block", "coupled"]
RULES: tuple[Rule, ...] = ("rejection", "block", "coupled")
SMALLEST_TEMPERATURE = 1e-37
"""Below it a temperature is 0, or not a normal number, in float32: greedy."""
MOST_LAYERS = 10_000
"""More decoder layers than this are a mistake in a config."""
MOST_LOGPROBS = 100
"""Likeliest tokens whose log-probabilities a request may ask for at each position."""
LARGEST_TOP_K = 1 << 31
"""Far beyond any vocabulary, and a number that the samplers' int64 holds."""
GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]
GRAMMARS: tuple[GrammarKind, ...] = ("json_object", "json_schema", "regex", "lark")
LONGEST_GRAMMAR = 100_000
"""Characters of a schema, an expression or a grammar."""
LARGEST_BIAS = 1e30
"""Of a logit bias: far beyond any logit, and far from the end of float32."""
LARGEST_MEMORY = 2.0**63
"""Sizes in bytes stay below it: an int64 holds them."""

T = TypeVar("T")


def build(kind: type[T], options: Mapping[str, Any], what: str) -> T:
    """Make a config dataclass from options; an unknown key is refused with the nearest known one.

    Raises InvalidRequest, also for a missing option, or one of another type."""
    known = [f.name for f in fields(kind) if f.init]  # type: ignore[arg-type]
    for key in options:
        if key not in known:
            raise InvalidRequest(f"{what}: unknown option {key!r}; {nearest(key, known)}")
    missing = [name for name in required(kind) if name not in options]
    if missing:
        raise InvalidRequest(f"{what}: expected a value for {', '.join(map(repr, missing))}, got none")
    for f in fields(kind):  # type: ignore[arg-type]
        if f.name in options and not _fits(options[f.name], str(f.type)):
            raise InvalidRequest(f"{what}: {f.name} must be of type {f.type}, got {options[f.name]!r}")
    return kind(**options)


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value is of the annotated type, where that is made of plain types; others are not checked."""
    checks: dict[str, Callable[[Any], bool]] = {
        "None": lambda v: v is None,
        "bool": lambda v: isinstance(v, bool),
        "int": lambda v: _whole(v) is not None,
        "float": lambda v: _number(v) is not None,
        "str": lambda v: isinstance(v, (str, Path)),
        "tuple[int, ...]": lambda v: isinstance(v, (list, tuple)) and all(_whole(one) is not None for one in v),
    }
    kinds = annotation.split(" | ")
    return not all(kind in checks for kind in kinds) or any(checks[kind](value) for kind in kinds)


def required(kind: type) -> list[str]:
    """Fields of a config dataclass that have no default."""
    return [f.name for f in fields(kind) if f.init and f.default is MISSING and f.default_factory is MISSING]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a text must be: the tokens that would break it are never sampled, and its end ends the text.

    ``json_object``: any JSON object. ``json_schema``: JSON that is valid under the schema in ``text``. ``regex``: text
    that the whole expression matches, in the syntax of Rust's regex crate. ``lark``: a context-free grammar in
    llguidance's form of Lark. Raises InvalidRequest; whether llguidance accepts it is known when it is submitted.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in GRAMMARS:
            raise InvalidRequest(
                f"a grammar's kind must be one of {', '.join(GRAMMARS)}, got {self.kind!r}"
                f"{closest(str(self.kind), GRAMMARS)}"
            )
        if not isinstance(self.text, str):
            raise InvalidRequest(f"a grammar's text must be a string, got {type(self.text).__name__}")
        if len(self.text) > LONGEST_GRAMMAR:
            raise InvalidRequest(
                f"a grammar may have {LONGEST_GRAMMAR} characters, got {len(self.text)}; use a simpler one"
            )
        if self.kind == "json_object":
            if self.text:
                raise InvalidRequest("a json_object grammar takes no text; for a schema use the kind json_schema")
        elif not self.text:
            raise InvalidRequest(f"a {self.kind} grammar needs its text, got an empty one")
        elif self.kind == "json_schema":
            _check_schema(self.text)


def _check_schema(text: str) -> None:
    """Raise InvalidRequest for what is not a JSON object."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:  # a schema may be nested deeper than Python reads
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(f"a json_schema grammar's text must be JSON: {what}") from None
    if not isinstance(schema, dict):
        raise InvalidRequest(f"a JSON schema must be an object, got {type(schema).__name__}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling options. Raises InvalidRequest for values out of range."""

    max_tokens: int = 128
    """Most new tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose mass reaches p."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest."""
    repetition_penalty: float = 1.0
    """Divide positive logits of seen tokens (prompt and output) by this, multiply negative ones (CTRL, section 4.1)."""
    presence_penalty: float = 0.0
    """Subtract from the logit of every token already in the output."""
    frequency_penalty: float = 0.0
    """Subtract this times a token's count in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit)."""
    seed: int | None = None
    """Makes the text reproducible; implies the coupled rule unless ``rule`` says otherwise."""
    rule: Rule | None = None
    """Verification rule; None: coupled with a seed, block without."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    ignore_eos: bool = False
    """Go on after the end-of-text token."""
    priority: int = 0
    """Of requests that wait, those of the smallest number get a row first; -100 to 100."""
    logprobs: int | None = None
    """Report each new token's log-probability and those of this many likeliest tokens, of the target's logits before
    bias, penalties, temperature and truncation. None: not computed."""
    draft_tokens: int | None = None
    """The most drafts of a round, within what drafter and policy allow; 0 decodes plainly. None: no own limit."""
    grammar: Grammar | None = None
    """What the text must be; its end ends the text, whatever ``ignore_eos`` says."""

    def __post_init__(self) -> None:
        def refuse(name: str, expected: str) -> NoReturn:
            raise InvalidRequest(f"{name} must be {expected}, got {getattr(self, name)!r}")

        def number(name: str, low: float, high: float, expected: str, above: bool = False) -> None:
            value = _number(getattr(self, name))
            if value is None or math.isnan(value):
                refuse(name, f"a number, {expected}")
            if value < low or value > high or (above and value == low):
                refuse(name, expected)
            object.__setattr__(self, name, value)

        def whole(name: str, low: int) -> None:
            object.__setattr__(self, name, whole_number(name, getattr(self, name), low))

        whole("max_tokens", 1)
        whole("top_k", 0)
        if self.top_k > LARGEST_TOP_K:
            refuse("top_k", f"a whole number from 0 to {LARGEST_TOP_K}")
        whole("priority", -100)
        if self.priority > 100:
            refuse("priority", "between -100 and 100")
        number("temperature", 0, 100, "between 0 (greedy) and 100")
        number("top_p", 0, 1, "above 0 and at most 1", above=True)
        number("min_p", 0, 1, "between 0 and 1")
        number("repetition_penalty", 0, 100, "above 0 and at most 100", above=True)
        number("presence_penalty", -2, 2, "between -2 and 2")
        number("frequency_penalty", -2, 2, "between -2 and 2")
        if self.temperature < SMALLEST_TEMPERATURE:  # 0 in float32, in which it would divide
            object.__setattr__(self, "temperature", 0.0)
        if self.seed is not None:
            seed = _whole(self.seed)
            if seed is None:
                refuse("seed", "a whole number or None")
            object.__setattr__(self, "seed", seed)
        if not isinstance(self.ignore_eos, bool):
            refuse("ignore_eos", "True or False")
        for name, most in (("logprobs", MOST_LOGPROBS), ("draft_tokens", None)):
            given = getattr(self, name)
            value = None if given is None else _whole(given)
            if given is not None and (value is None or value < 0 or (most is not None and value > most)):
                refuse(name, f"None or a whole number from 0{'' if most is None else f' to {most}'}")
            object.__setattr__(self, name, value)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            refuse("grammar", "a Grammar or None")
        if self.rule is not None and self.rule not in RULES:
            raise InvalidRequest(
                f"rule must be one of {', '.join(RULES)}, got {self.rule!r}{closest(str(self.rule), RULES)}"
            )
        stop: tuple[Any, ...] = () if self.stop is None else (self.stop,)
        if not isinstance(self.stop, str):
            with suppress(TypeError):  # no iterable, or an array without dimensions, which looks like one
                stop = tuple(self.stop)
        if any(not isinstance(s, str) or not s for s in stop):
            refuse("stop", "a non-empty string, several of them, or None")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))

    @property
    def effective_rule(self) -> Rule:
        return self.rule or ("coupled" if self.seed is not None else "block")

    @property
    def penalised(self) -> bool:
        """Whether the distribution depends on the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def whole_number(name: str, value: Any, least: int) -> int:
    """The Python int of an option. Raises InvalidRequest for what is no whole number of at least ``least``."""
    number = _whole(value)
    if number is None or number < least:
        raise InvalidRequest(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def _whole(value: Any) -> int | None:
    """A Python int of anything that is one (numpy's integers, 0-dimensional tensors of integers); None for the rest."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _number(value: Any) -> float | None:
    """The float of anything that is a number, numpy's included, infinite where it is too large; None for the rest."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def _logit_bias(given: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of a token id and a finite number, or -inf to forbid it. Ids may be written as 7.0 or "7"."""
    if given is None:
        return ()
    pairs = given.items() if isinstance(given, Mapping) else given
    total: dict[int, float] = {}
    try:
        for key, value in pairs:
            token = int(key) if isinstance(key, str) or (isinstance(key, float) and key.is_integer()) else _whole(key)
            amount = _number(value)
            if token is None or token < 0 or amount is None or math.isnan(amount):
                raise ValueError(key, value)
            total[token] = total.get(token, 0.0) + amount
            if total[token] > LARGEST_BIAS:
                raise ValueError(key, value)
    except (TypeError, ValueError, OverflowError) as error:
        pair = f"{error.args[0]!r}: {error.args[1]!r}" if len(error.args) == 2 else repr(given)
        raise InvalidRequest(
            f"logit_bias must hold token ids with a number below {LARGEST_BIAS:g} or -inf each, got {pair[:80]}"
        ) from None
    return tuple(total.items())


def memory_bytes(name: str, given: int | str, least: int = 1) -> int:
    """A number of bytes, also as 512M, 1.5G or 2GiB (powers of 1024). Raises InvalidRequest."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(?:i?B)?", str(given).strip(), re.IGNORECASE)
    number = -1.0 if found is None else float(found[1]) * 1024.0 ** " KMGT".index(found[2].upper() or " ")
    size = int(number) if number < LARGEST_MEMORY else -1
    if size < least:
        raise InvalidRequest(
            f"{name} must be a size like 8G or 500M, of at least {least} bytes and below 2^63, got {str(given)[:40]!r}"
        )
    return size


# ------------------------------------------------------------------------------------------------ stacks


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions, already reduced to numbers: every variant is a list of frequencies and a scale."""

    inverse_frequencies: tuple[float, ...]
    """Dh / 2 values, float64; zeros where a dimension is not rotated (partial rotary)."""
    scale: float = 1.0
    """Multiplies sin and cos (YaRN's attention factor)."""


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One decoder layer. Layers of a stack may differ (Gemma alternates two kinds)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope: RopeConfig
    window: int | None = None
    """Sliding window: a token attends to itself and the window - 1 before it. None = all."""
    attention_scale: float = 0.0
    """Multiplies q.k; 0 means head_dim ** -0.5."""
    qk_norm: bool = False
    """RMS norm of every query and key head before rope (weights q_norm, k_norm)."""
    v_norm: bool = False
    """Unscaled RMS norm of every value head (Gemma 4)."""
    value_is_key: bool = False
    """The value is the raw key projection (Gemma 4's global layers); no v_proj."""
    layer_scalar: float = 1.0
    """Multiplies the layer's output (Gemma 4)."""

    @property
    def scale(self) -> float:
        return self.attention_scale or self.head_dim**-0.5


@dataclass(frozen=True, slots=True)
class StackConfig:
    """A decoder stack: embedding, pre-norm layers with gated MLPs, final norm, head."""

    vocab_size: int
    """Rows of the head (0: no head)."""
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    """Gain is (offset + w): 1.0 for Gemma 3, 0.0 elsewhere."""
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    sandwich_norms: bool = False
    """Norms after attention and MLP too, before the residual is added (Gemma)."""
    embedding_scale: float = 1.0
    logit_softcap: float = 0.0
    """cap * tanh(logits / cap); 0 = none."""
    input_width: int = 0
    """Width of layer 0's attention input, 0 = hidden_size. EAGLE-3: 2 x hidden_size."""
    max_positions: int = 2048
