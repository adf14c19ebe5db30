"""Estimate time, memory and disk of a recipe before it runs: count prompts, time target and drafter for some seconds.

How long answers are is seen from some of them. Times are based on short trials, so other programs disturb them. Memory
is the peak of this process in the trials plus the size of the KV cache.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch

from outrider.engine.llm import LLM
from outrider.evaluation.recording import read_prompts
from outrider.models.loading import model_config
from outrider.models.locations import QUESTIONS
from outrider.training import dataset, prompts, regenerate
from outrider.training.artefact import open_artefact
from outrider.training.conversations import ChatTurn, Conversations
from outrider.training.prompts import Split
from outrider.training.recipe import Recipe, check_held_out, check_target
from outrider.training.stages import STAGES
from outrider.training.target_runner import TargetRunner
from outrider.types import RaggedBatch

__all__ = ["Estimate", "estimate", "expected_length"]

LINE = 6.0  # bytes of a token id in JSON
STATE = 4 * 4  # bytes on disk per trained parameter: weight, two moments, and the finished checkpoint
TRIAL_TOKENS = 32  # tokens of an answer whose time is taken
ANSWERS = 32  # answers whose length is looked at ...
ANSWER_SECONDS = 5.0  # ... for about so long
ROUND = 1.8  # assumed time of a round of drafting and verifying, in plain steps
SANITY_STEPS = 90  # assumed steps of the sanity check
SELF_TOKENS = 80  # assumed tokens of a prompt that the target writes, with those that are dropped
LENGTH = 1.6  # assumed tokens per round


@dataclass(frozen=True, slots=True)
class Estimate:
    """Cost of one stage: seconds, bytes of memory, bytes on disk."""

    stage: str
    seconds: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def estimate(recipe: Recipe, until: str | None = None) -> list[Estimate]:
    """One entry per stage, in order; finished stages cost nothing.

    Raises ArtefactError for a stage that was begun or finished with other settings, as running the recipe would, and
    the errors of reading the prompts and loading the target.
    """
    check_target(recipe)
    check_held_out(recipe, recipe.stages(until))
    trial = _Trial(recipe)
    return [
        Estimate(name, note="finished") if trial.finished(name) else getattr(trial, name)()
        for name in recipe.stages(until)
    ]


class _Trial:
    """Counts and measurements, each made on first use. A method per stage, with the stage's name."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.configs = recipe, recipe.configs
        self._sanity_seconds = 0.0  # of a step of the sanity check; known once `_training_speed` is

    def finished(self, name: str) -> bool:
        return self.recipe.finished(name)

    # -------------------------------------------------------------------------------------------- stages

    def prompts(self) -> Estimate:
        sources = self.configs["prompts"].sources  # type: ignore[attr-defined]
        size = sum(source.path.stat().st_size for source in sources if source.path is not None)
        began = perf_counter()
        text = sum(sum(part.values()) for part in self._prompts[0].values()) * (self._prompt_length * 4 + 60)
        seconds, note = perf_counter() - began, ""
        if self._self_written:
            tokens = self._self_written * SELF_TOKENS
            _, token_seconds = self._pace(self.configs["prompts"].rows)  # type: ignore[attr-defined]
            seconds, note = seconds + tokens * token_seconds, f"{self._self_written:,} of the target's own"
        return Estimate("prompts", seconds, _peak(), max(size, text), note)

    def regenerate(self) -> Estimate:
        config: Any = self.configs["regenerate"]
        count, length = sum(self._count(part) for part in ("train", "held_out")), self._answer_length
        disk = count * (self._prompt_length + length) * LINE * 2  # the finished file is a copy
        if config.server:
            return Estimate("regenerate", 0.0, _peak(), disk, "time depends on the server")
        prompt_seconds, token_seconds = self._pace(config.rows)
        context = config.rows * (self._prompt_length + config.max_tokens)
        memory = _peak() + context * self._key_value_bytes
        seconds = count * (prompt_seconds + length * token_seconds)
        speed = count * length / seconds
        note = f"{count:,} answers of {length:,.0f} tokens, {speed:,.0f} a second"
        return Estimate("regenerate", seconds, memory, disk, note)

    def features(self) -> Estimate:
        config: Any = self.configs["features"]
        tokens = self._count("train") * min(config.length, self._text_length)
        width = (1 + len(config.layers)) * self._llm.target.spec.hidden_size
        disk = tokens * width * (4 if config.keep == "float32" else 2)
        speed = self._reading_speed
        return Estimate("features", tokens / speed, _peak(), disk, f"{tokens:,.0f} tokens, {speed:,.0f} a second")

    def run(self) -> Estimate:
        config: Any = self.configs["run"]
        texts = self._count("train")
        steps = config.steps or math.ceil(config.epochs * texts / config.batch)
        tokens = steps * config.batch * min(config.length, self._text_length)
        speed, parameters, memory = self._training_speed
        note = f"{steps:,} steps at {speed:,.0f} tokens/s, {parameters / 1e6:,.1f} M parameters"
        seconds = tokens / speed + self._evaluations(config, steps)
        if config.sanity:
            seconds += SANITY_STEPS * self._sanity_seconds
        if config.four_bits:  # some texts pass through target and drafter once more, forwards
            seconds += min(self._run_stage.ROUNDED_FOR, texts) * min(config.length, self._text_length) / (2 * speed)
        return Estimate("run", seconds, memory, parameters * STATE, note)

    def _evaluations(self, config: Any, steps: int) -> float:
        """Seconds of a run's evaluations on held-out prompts."""
        every = max(1, steps // 8) if config.eval_every is None else config.eval_every
        prompts = min(config.eval_prompts, self._count("held_out"))
        if not every or not prompts:
            return 0.0
        return math.ceil(steps / every) * prompts * config.eval_tokens / LENGTH * ROUND * self._pace(1)[1]

    def calibrate(self) -> Estimate:
        config: Any = self.configs["calibrate"]
        sampled = sum(temperature > 0 for temperature in config.temperatures) * len(config.rules) * config.rounds
        greedy = (0.0 in config.temperatures) * self._count("held_out") * config.max_tokens / LENGTH
        rounds = sampled + min(greedy, config.rounds)
        return self._rounds("calibrate", rounds, rounds * LENGTH / config.max_tokens)

    def eval(self) -> Estimate:
        config: Any = self.configs["eval"]
        answers = self._questions(config) * config.repeats * len(config.temperatures)
        sides = 1 + len(config.thresholds) / max(1, config.repeats)
        rounds = answers * config.max_tokens * (1 / ROUND + sides / LENGTH)
        return self._rounds("eval", rounds, answers * (1 + sides))

    def _questions(self, config: Any) -> int:
        """Prompts that ``eval`` answers."""
        files: Sequence[Path] = self.recipe.eval_prompts
        if not files and self.finished("regenerate"):
            files = (self.recipe.path("regenerate") / "held_out.jsonl",)
        domains = self._prompts[0]["held_out"]
        if files:
            domains = Counter(prompt.domain for path in files for prompt in read_prompts(path))
        return sum(min(count, config.limit or count) for count in domains.values())

    def export(self) -> Estimate:
        return Estimate("export", 5.0, _peak(), self._training_speed[1] * 4)

    def _rounds(self, stage: str, rounds: float, answers: float) -> Estimate:
        """Of so many answers, each behind its prompt."""
        prompt_seconds, token_seconds = self._pace(1)
        seconds = rounds * ROUND * token_seconds + answers * prompt_seconds
        note = f"{1 / token_seconds:,.0f} plain tokens/s, one at a time"
        return Estimate(stage, seconds, _peak(), self._training_speed[1] * 4, note)

    # -------------------------------------------------------------------------------------------- counts

    @cached_property
    def _prompts(self) -> tuple[Mapping[Split, Counter[str]], list[ChatTurn]]:
        """Number of turns that the target answers, by part and domain, and up to 200 prompts as the target gets them.
        Questions of the package stand for prompts that the target is to write."""
        config: Any = self.configs["prompts"]
        split = prompts.from_files(config)
        some = (split["train"] + split["held_out"])[:200]
        if not some:
            questions = [{"path": str(path)} for path in sorted(QUESTIONS.glob("*.jsonl"))]
            some = prompts.collect(prompts.Config.model_validate({"sources": questions, "held_out": 0}))[0]["train"]
        settings = regenerate.sampling(self.configs["regenerate"], self.recipe.target)  # type: ignore[arg-type]
        conversations = Conversations(some, self._llm.tokenizer, settings)
        conversations.resume([])
        return prompts.expected_turns(config, split), list(conversations.todo)

    @property
    def _run_stage(self) -> Any:
        """The module of the stage ``run``."""
        return import_module(STAGES["run"].reference.partition(":")[0])

    @property
    def _self_written(self) -> int:
        """Prompts that the target is to write itself."""
        sources: Any = self.configs["prompts"].sources  # type: ignore[attr-defined]
        return sum(source.self_written or 0 for source in sources)

    def _count(self, part: Split) -> int:
        """Texts of a part: answers if they exist, else those that its prompts' turns will get."""
        if self.finished("regenerate"):
            return int(open_artefact(self.recipe.path("regenerate")).provenance["facts"][part]["answers"])
        each: int = self.configs["regenerate"].answers_per_prompt if part == "train" else 1  # type: ignore[attr-defined]
        return each * sum(self._prompts[0][part].values())

    @cached_property
    def _prompt_length(self) -> float:
        """Mean tokens of a prompt."""
        return mean(len(turn.tokens) for turn in self._prompts[1]) if self._prompts[1] else 1.0

    @cached_property
    def _answer_length(self) -> float:
        """Mean tokens of an answer, where it is not known yet by some that are written for a few seconds."""
        config: Any = self.configs["regenerate"]
        if self.finished("regenerate"):
            facts = open_artefact(self.recipe.path("regenerate")).provenance["facts"]["train"]
            return float(facts["tokens"]) / max(1, facts["answers"])
        turns = self._prompts[1][:ANSWERS]
        if config.server or config.ignore_eos or not turns:
            return float(config.max_tokens)
        prompt_seconds, token_seconds = self._pace(config.rows)
        left = ANSWER_SECONDS / len(turns) - prompt_seconds
        most = int(min(max(left / token_seconds, TRIAL_TOKENS), config.max_tokens))
        lengths = self._answer(turns, config.rows, most, ends=True)[1]
        return expected_length(lengths, most, config.max_tokens)

    @property
    def _text_length(self) -> float:
        """Mean tokens of a prompt with its answer."""
        return self._prompt_length + self._answer_length

    # -------------------------------------------------------------------------------------------- measurements

    @cached_property
    def _llm(self) -> LLM:
        return LLM(self.recipe.target, "none", dtype=self.configs["regenerate"].dtype)  # type: ignore[attr-defined]

    @cached_property
    def _paces(self) -> dict[int, tuple[float, float]]:
        return {}

    def _pace(self, rows: int) -> tuple[float, float]:
        """Seconds that a prompt takes, and each token of its answer, where ``rows`` are answered together.

        The two are told apart by trials with and without an answer: a trial's answers are shorter than those of a run.
        """
        if rows not in self._paces:
            spec = self._llm.target.spec
            length = max(1, min(round(self._prompt_length), spec.max_positions - TRIAL_TOKENS - 1))
            tokens = [[1 + (i + n) % (spec.vocab_size - 1) for i in range(length)] for n in range(rows)]
            turns = [ChatTurn(f"{rows} {n}", "", some, (), ()) for n, some in enumerate(tokens)]
            self._answer(turns, rows, 1)  # warm-up
            prompts = self._answer(turns, rows, 1)[0]
            both = self._answer(turns, rows, 1 + TRIAL_TOKENS)[0]
            self._paces[rows] = prompts / rows, max(both - prompts, both / 10) / (rows * TRIAL_TOKENS)
        return self._paces[rows]

    def _answer(self, turns: Sequence[ChatTurn], rows: int, tokens: int, ends: bool = False) -> tuple[float, list[int]]:
        """Seconds of answers of up to ``tokens`` tokens by plain decoding, and their lengths. Without ``ends`` they go
        on after the end of the text."""
        options = {"max_tokens": tokens, "rows": rows, "ignore_eos": not ends, "drafter": "none", "server": None}
        options["device"] = "cpu"
        config = self.configs["regenerate"].model_copy(update=options)
        assert isinstance(config, regenerate.Config)
        ask = regenerate.engine(config, lambda: self._llm, regenerate.sampling(config, self.recipe.target))
        began = perf_counter()
        lengths = [len(answer) for some in ask(deque(turns)) for _, answer in some]
        return perf_counter() - began, lengths

    @cached_property
    def _reading_speed(self) -> float:
        """Tokens per second of the target's pass over a text, with features and logits of all of them."""
        config: Any = self.configs["features"]
        target = self._llm.target
        length = max(1, min(config.length, round(self._text_length), target.spec.max_positions))
        cache = target.new_cache(1, length)
        tokens = [1 + i % (target.spec.vocab_size - 1) for i in range(length)]
        batch = RaggedBatch.pack([tokens], [0], [cache.open()])
        for _ in range(2):  # the first pass is a warm-up
            began = perf_counter()
            target.forward(batch, cache, config.layers)
            seconds = perf_counter() - began
            cache.rewind(batch.slots[:1], torch.tensor([0]))
        return length / seconds

    @cached_property
    def _training_speed(self) -> tuple[float, int, float]:
        """Training tokens per second, number of trained parameters, and bytes of memory. Where features are cached,
        the target's part is its head."""
        config: Any = self.configs["run"]
        spec = self._llm.target.spec
        length = max(8, min(config.length, round(self._text_length), spec.max_positions))
        prompt = max(1, min(round(self._prompt_length), length // 2))
        texts = []
        for number in range(max(1, min(config.batch, config.pack_tokens // length))):
            tokens = tuple(1 + (i * 7 + number) % (spec.vocab_size - 1) for i in range(length))
            texts.append(dataset.Text(str(number), "", tokens, prompt))
        stage = self._run_stage
        module, plan = stage.trainable(config, self._llm, texts), stage.plan_of(config, 1, torch.device("cpu"))
        target_runner = TargetRunner(self._llm.target, length)
        short = dataset.Text("short", "", texts[0].tokens[: prompt + stage.SANITY_TOKENS], prompt)
        batch = target_runner.batch([short], module, 0)
        began = perf_counter()
        module(batch).total.backward()
        self._sanity_seconds = perf_counter() - began
        for _ in range(2):  # the first pass is a warm-up
            began = perf_counter()
            batch = target_runner.batch(texts, module, 0)
            if "features" in self.recipe.stages() and batch.hidden is not None:
                began = perf_counter()
                self._llm.target.unembed(batch.hidden)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=plan.bfloat16):
                loss = module(batch)
            (loss.total / loss.weight).backward()
            seconds = perf_counter() - began
        parameters = sum(parameter.numel() for parameter in module.parameters())
        return length * len(texts) / seconds, parameters, _peak() + 2 * 4 * parameters  # two optimiser moments

    @cached_property
    def _key_value_bytes(self) -> float:
        """Bytes of a token's keys and values in float32, by the target's configuration."""
        files = model_config(self.recipe.target)
        text = files.get("text_config") or files
        heads = text.get("num_key_value_heads") or text.get("num_attention_heads", 1)
        width = text.get("head_dim") or text.get("hidden_size", 0) / max(1, text.get("num_attention_heads", 1))
        return 2 * 4 * float(text.get("num_hidden_layers", 1)) * heads * width


def expected_length(lengths: Sequence[int], most: int, limit: int) -> float:
    """Mean tokens of answers of up to ``limit`` tokens, given the lengths of some that were stopped at ``most``. Those
    are taken to go on ending at the rate that was seen."""
    seen = sum(lengths)
    running = sum(length >= most for length in lengths)
    rate = (len(lengths) - running) / seen
    rest = limit - most
    further = -math.expm1(-rate * rest) / rate if rate else rest
    return (seen + running * further) / len(lengths)


def _peak() -> float:
    """Peak memory of this process in bytes; 0 where the system does not report it."""
    try:
        import resource
    except ImportError:  # not Unix
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most * 1024)
