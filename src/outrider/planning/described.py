"""What a plan is made of when nothing is measured: shapes of targets and drafters, and machines, described in figures.

Each is a frozen dataclass that is written as ``key=value,key=value``, as a TOML file, as a known name, or as a known
name with some values changed: ``h100,price=2.5``.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from outrider.errors import InvalidRequest, nearest

__all__ = ["Described", "DrafterShape", "Machine", "TargetShape", "conditional_of"]

BLOCK, LOOP, LOOKUP = "block", "loop", "lookup"
SMALLEST, LARGEST = 1e-6, 1e15  # of figures: with others no time could be computed from them
LONGEST = 64  # drafts of a round
FALLS = 0.9  # of an earlier time: what a measured pass over more tokens may take by noise


class Described:
    """A dataclass of numbers and words that can be written in one line."""

    KNOWN: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Values by name."""
    WHAT: ClassVar[str] = ""

    @classmethod
    def read(cls, text: str) -> Self:
        """``text``: a known name, ``key=value`` pairs, or a TOML file. Raises InvalidRequest."""
        values: dict[str, Any] = {}
        for part in (part.strip() for part in text.split(",") if part.strip()):
            key, equals, value = part.partition("=")
            if equals:
                values[key.strip().replace("-", "_")] = value.strip()
            elif part.lower() in cls.KNOWN:
                values |= {"name": part.lower(), **cls.KNOWN[part.lower()]}
            elif part.endswith(".toml"):
                values |= _toml(Path(part))
            else:
                raise InvalidRequest(
                    f"{cls.WHAT} {part!r} is neither a known one, a .toml file nor KEY=VALUE; "
                    f"{nearest(part, cls.KNOWN)}"
                )
        return cls.of(values)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From plain values; numbers may be texts. Raises InvalidRequest for unknown or missing keys."""
        known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]  # every subclass is a dataclass
        for key in values:
            if key not in known:
                raise InvalidRequest(f"{cls.WHAT} has no {key!r}; {nearest(key, known)}")
        missing = [n for n, f in known.items() if f.default is MISSING and n not in values]
        if missing:
            raise InvalidRequest(f"{cls.WHAT} needs {', '.join(missing)}: for example {missing[0]}=...")
        return cls(**{key: _value(cls.WHAT, key, str(known[key].type), value) for key, value in values.items()})


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read as TOML: {error}") from None


def _value(what: str, key: str, kind: str, value: Any) -> Any:
    try:
        if kind == "str":
            return str(value)
        if kind == "bool":
            return value if isinstance(value, bool) else {"yes": True, "true": True, "no": False, "false": False}[value]
        if kind == "int":
            return _whole(value)
        if kind == "float":
            return _finite(value)
        if "tuple[float" in kind:
            return tuple(_finite(v) for v in (value.split("/") if isinstance(value, str) else value))
        pairs = [p.split(":") for p in value.split("/")] if isinstance(value, str) else value
        return tuple((_whole(tokens), _finite(ms)) for tokens, ms in pairs)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InvalidRequest(f"{what}: {key} must be {_expected(kind)}, got {value!r}") from None


def _finite(value: Any) -> float:
    number = float(value)
    if not abs(number) <= LARGEST:
        raise ValueError(value)
    return number


def _whole(value: Any) -> int:
    number = _finite(value)
    if number != int(number):
        raise ValueError(value)
    return int(number)


def _expected(kind: str) -> str:
    if kind.startswith("tuple"):
        return "numbers like 0.8/0.7/0.6" if "tuple[float" in kind else "points like 1:31/8:68.7/9:106.9"
    return {
        "bool": "yes or no",
        "int": f"a whole number up to {LARGEST:g}",
        "float": f"a number up to {LARGEST:g}",
    }.get(kind, kind)


def _positive(what: str, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not value >= SMALLEST:
            raise InvalidRequest(f"{what}: {name} must be above 0, at least {SMALLEST:g}, got {value:g}")


def _not_below_0(what: str, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if value < 0:
            raise InvalidRequest(f"{what}: {name} must be 0 or more, got {value:g}")


def _at_most_1(what: str, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if value > 1:
            raise InvalidRequest(f"{what}: {name} is a share, at most 1, got {value:g}")


# ------------------------------------------------------------------------------------------------ target


@dataclass(frozen=True)
class TargetShape(Described):
    """What a target's passes cost follows from."""

    layers: int
    width: int
    vocabulary: int
    parameters: float
    """All of them, the embedding included."""
    bytes: float = 2.0
    """Of a weight."""
    kv_heads: int = 8
    head_dim: int = 128
    heads: int = 0
    """0: as many as fit the width."""
    kv_bytes: float = 2.0
    """Of a cached number."""
    tied: bool = False
    """The head is the embedding."""
    experts: int = 0
    """Of a layer; 0: dense."""
    experts_used: int = 0
    """Of a layer, by one token."""
    expert_parameters: float = 0.0
    """Of all experts of all layers."""
    name: str = "target"

    WHAT: ClassVar[str] = "a target's shape"
    KNOWN: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "qwen3-4b": {
            "layers": 36, "width": 2560, "vocabulary": 151936, "parameters": 4.02e9, "heads": 32, "tied": True,
        },
        "qwen3-8b": {"layers": 36, "width": 4096, "vocabulary": 151936, "parameters": 8.19e9, "heads": 32},
        "qwen3-14b": {"layers": 40, "width": 5120, "vocabulary": 151936, "parameters": 14.77e9, "heads": 40},
        "qwen3-30b-a3b": {
            "layers": 48, "width": 2048, "vocabulary": 151936, "parameters": 30.5e9, "heads": 32, "kv_heads": 4,
            "experts": 128, "experts_used": 8, "expert_parameters": 29.0e9,
        },
        "llama-3.1-8b": {"layers": 32, "width": 4096, "vocabulary": 128256, "parameters": 8.03e9, "heads": 32},
        "smollm2-135m": {
            "layers": 30, "width": 576, "vocabulary": 49152, "parameters": 134.5e6, "heads": 9, "kv_heads": 3,
            "head_dim": 64, "tied": True,
        },
    }  # fmt: skip

    def __post_init__(self) -> None:
        numbers = ("layers", "width", "vocabulary", "parameters", "bytes", "kv_heads", "head_dim", "kv_bytes")
        _positive(self.WHAT, {name: getattr(self, name) for name in numbers})
        if min(self.heads, self.experts, self.experts_used, self.expert_parameters) < 0:
            raise InvalidRequest(f"{self.WHAT}: heads and experts must be at least 0")
        if self.experts and not (0 < self.experts_used <= self.experts and self.expert_parameters > 0):
            raise InvalidRequest(f"{self.WHAT}: experts={self.experts} needs experts_used and expert_parameters")
        if self.matrix_parameters <= self.expert_parameters:
            raise InvalidRequest(
                f"{self.WHAT}: {self.parameters:g} parameters are fewer than its embedding and experts alone"
            )

    @property
    def embedding(self) -> float:
        return float(self.vocabulary * self.width)

    @property
    def matrix_parameters(self) -> float:
        """Those that multiply: without an embedding that is looked up only."""
        return self.parameters - (0.0 if self.tied else self.embedding)

    @property
    def layer_parameters(self) -> float:
        """Of one layer; of a mixture of experts those that one token uses."""
        return (self.active(1) - self.embedding) / self.layers

    def touched(self, tokens: float) -> float:
        """Parameters that a pass over ``tokens`` reads: of the experts those that at least one token uses, choosing
        evenly."""
        if not self.experts:
            return self.matrix_parameters
        share = 1 - (1 - self.experts_used / self.experts) ** tokens
        return self.matrix_parameters - self.expert_parameters * (1 - share)

    def active(self, tokens: float) -> float:
        """Parameters that multiply, summed over tokens."""
        unused = self.expert_parameters * (1 - self.experts_used / self.experts) if self.experts else 0.0
        return (self.matrix_parameters - unused) * tokens

    @property
    def attention_width(self) -> int:
        return (self.heads or max(1, self.width // self.head_dim)) * self.head_dim

    @property
    def cache_bytes(self) -> float:
        """Bytes of one cached token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes


# ------------------------------------------------------------------------------------------------ drafter


@dataclass(frozen=True)
class DrafterShape(Described):
    """A drafter's cost and acceptance. What is left at 0 follows from its kind and the target."""

    kind: str
    drafts: int = 7
    """The most a round proposes."""
    length: float = 0.0
    """Acceptance length with all its drafts, the bonus token included."""
    profile: tuple[float, ...] = ()
    """P(draft j accepted | those before it were): 0.8/0.7/0.6."""
    uncertainty: float = 0.1
    """How wrong the acceptance may be: half a 95 % interval, as a share of accepted drafts."""
    parameters: float = 0.0
    """Those that a pass multiplies with, its head included."""
    bytes: float = 0.0
    """Of a weight; 0: as the target's."""
    layers: int = 0
    aux_layers: int = -1
    markov_rank: int = 0
    draft_ms: float = 0.0
    """Measured milliseconds of drafting for one row, instead of what the parameters say."""
    draft_each_ms: float = 0.0
    """More of them for each draft."""
    name: str = ""

    WHAT: ClassVar[str] = "a drafter"
    KINDS: ClassVar[Mapping[str, tuple[str, int, int, int]]] = {  # way of drafting, layers, auxiliary layers, rank
        "dspark": (BLOCK, 5, 5, 256),
        "dflash": (BLOCK, 5, 5, 0),
        "eagle3": (LOOP, 1, 3, 0),
        "mtp": (LOOP, 1, 0, 0),
        "draft_model": (LOOP, 0, 0, 0),
        "ngram": (LOOKUP, 0, 0, 0),
        "suffix": (LOOKUP, 0, 0, 0),
    }
    KNOWN: ClassVar[Mapping[str, Mapping[str, Any]]] = {kind: {"kind": kind} for kind in KINDS}

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise InvalidRequest(f"{self.WHAT}: unknown kind {self.kind!r}; {nearest(self.kind, self.KINDS)}")
        if not 1 <= self.drafts <= LONGEST:
            raise InvalidRequest(f"{self.WHAT}: drafts must be 1 to {LONGEST}, got {self.drafts}")
        if bool(self.length) == bool(self.profile):
            raise InvalidRequest(f"{self.WHAT} {self.kind}: give either length=2.3 or profile=0.8/0.7")
        if self.length and not 1 <= self.length <= self.drafts + 1:
            raise InvalidRequest(
                f"{self.WHAT}: an acceptance length with {self.drafts} drafts is 1 to {self.drafts + 1}, "
                f"got {self.length:g}"
            )
        if any(not 0 <= p <= 1 for p in self.profile):
            raise InvalidRequest(f"{self.WHAT}: a profile holds probabilities from 0 to 1, got {self.profile}")
        if self.kind == "draft_model" and not (self.parameters or self.draft_ms or self.draft_each_ms):
            raise InvalidRequest(f"{self.WHAT} draft_model needs parameters, draft_ms or draft_each_ms")
        names = ("uncertainty", "parameters", "bytes", "layers", "markov_rank", "draft_ms", "draft_each_ms")
        _not_below_0(f"{self.WHAT} {self.kind}", {name: getattr(self, name) for name in names})
        _at_most_1(f"{self.WHAT} {self.kind}", {"uncertainty": self.uncertainty})
        if self.aux_layers < -1:
            raise InvalidRequest(
                f"{self.WHAT} {self.kind}: aux_layers must be 0 or more, or -1 for what its kind has, "
                f"got {self.aux_layers}"
            )

    @property
    def title(self) -> str:
        return self.name if self.name and self.name not in self.KNOWN else self.kind

    @property
    def way(self) -> str:
        """block: one pass for all drafts; loop: a pass for each; lookup: no pass."""
        return self.KINDS[self.kind][0]

    @property
    def conditional(self) -> tuple[float, ...]:
        """P(draft j accepted | those before it were), by position."""
        if self.profile:
            return (*self.profile, *[self.profile[-1]] * self.drafts)[: self.drafts]
        return conditional_of(self.length, self.drafts)

    def num_layers(self) -> int:
        return self.layers or self.KINDS[self.kind][1]

    def num_aux_layers(self) -> int:
        return self.aux_layers if self.aux_layers >= 0 else self.KINDS[self.kind][2]

    def rank(self) -> int:
        return self.markov_rank or self.KINDS[self.kind][3]

    def cache_bytes(self, target: TargetShape) -> float:
        """Bytes of one token in its own cache, with heads like the target's."""
        layers = self.num_layers()
        if self.kind == "draft_model" and not self.layers:  # unknown: as its share of the parameters
            layers = math.ceil(target.layers * min(1.0, self.parameters / target.parameters))
        return target.cache_bytes * layers / target.layers

    def multiplied(self, target: TargetShape) -> float:
        """Parameters of one of its passes, the head included, the Markov head left out."""
        if self.parameters or self.way == LOOKUP:
            return self.parameters
        return self.num_layers() * target.layer_parameters + target.embedding + self._fusing(target)

    def prompt_parameters(self, target: TargetShape) -> float:
        """Parameters that each token of a prompt is multiplied with, to fill its cache; 0 where nothing tells its
        size."""
        if self.way == BLOCK:  # the target's features become keys and values of all layers at once
            projections = self.num_layers() * 2 * target.width * target.kv_heads * target.head_dim
            return projections + self._fusing(target)
        if self.parameters or self.kind == "draft_model" or self.way == LOOKUP:
            return self.parameters
        return self.num_layers() * target.layer_parameters + self._fusing(target)

    def _fusing(self, target: TargetShape) -> float:
        """Of auxiliary layers; mtp: of state and embedding."""
        return float((self.num_aux_layers() or 2) * target.width**2)


def conditional_of(length: float, drafts: int) -> tuple[float, ...]:
    """The same probability at every position that gives an acceptance length with ``drafts`` drafts."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 + sum(middle**j for j in range(1, drafts + 1)) < length else (low, middle)
    return (high,) * drafts


# ------------------------------------------------------------------------------------------------ machine


@dataclass(frozen=True)
class Machine(Described):
    """A machine in figures; ``curve`` replaces what they say of target passes."""

    bandwidth: float
    """GB/s of memory."""
    tflops: float
    """10^12 floating-point operations a second in the dtype of the weights."""
    memory: float = 0.0
    """GB; 0: enough."""
    tile: int = 1
    """Tokens are computed in groups of so many."""
    bandwidth_share: float = 0.85
    """Of the bandwidth, what a pass reaches."""
    flops_share: float = 0.65
    """Of the operations, what a large pass reaches."""
    pass_ms: float = 0.05
    """Of starting a pass, beside its work."""
    step_ms: float = 0.3
    """Of a step outside passes: scheduling, sampling."""
    drafting_ms: float = 0.3
    """More of it in a step that drafts: verifying, rewinding."""
    uncertainty: float = 0.15
    """How wrong the ratio of two times may be: half a 95 % interval, as a share."""
    price: float = 0.0
    """Of an hour, in any currency; 0: unknown."""
    curve: tuple[tuple[int, float], ...] = ()
    """Milliseconds of a target pass by tokens: 1:31/8:68.7/9:106.9."""
    name: str = "machine"

    WHAT: ClassVar[str] = "a machine"
    KNOWN: ClassVar[Mapping[str, Mapping[str, Any]]] = {  # dense bf16, as their makers state it
        "h100": {"bandwidth": 3350, "tflops": 989, "memory": 80},
        "h200": {"bandwidth": 4800, "tflops": 989, "memory": 141},
        "a100": {"bandwidth": 2039, "tflops": 312, "memory": 80},
        "l40s": {"bandwidth": 864, "tflops": 362, "memory": 48},
        "rtx4090": {"bandwidth": 1008, "tflops": 165, "memory": 24},
    }

    def __post_init__(self) -> None:
        numbers = ("bandwidth", "tflops", "tile", "bandwidth_share", "flops_share")
        _positive(self.WHAT, {name: getattr(self, name) for name in numbers})
        names = ("memory", "price", "pass_ms", "step_ms", "drafting_ms", "uncertainty")
        _not_below_0(self.WHAT, {name: getattr(self, name) for name in names})
        shares = ("bandwidth_share", "flops_share", "uncertainty")
        _at_most_1(self.WHAT, {name: getattr(self, name) for name in shares})
        tokens, times = [m for m, _ in self.curve], [ms for _, ms in self.curve]
        rising = tokens == sorted(set(tokens))
        rising &= all(ms >= FALLS * max(times[:i]) for i, ms in enumerate(times) if i)
        if self.curve and not (len(tokens) > 1 and tokens[0] == 1 and rising and min(times) > 0):
            raise InvalidRequest(
                f"{self.WHAT}: curve needs at least two points, tokens rising from 1 on and milliseconds above 0 that "
                f"fall by noise at most, got {self.curve[:6]}"
            )
