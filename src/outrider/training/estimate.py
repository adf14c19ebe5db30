"""Estimate time, memory and disk of a recipe before it runs: count prompts, time target and drafter for some seconds.

Time assumes that every answer has ``max_tokens`` tokens, and is based on a short trial, so other programs disturb it.
Memory is the peak of this process in the trial plus the size of the KV cache.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, deque
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from statistics import mean
from time import perf_counter
from typing import Any

import torch

from outrider.engine.llm import LLM
from outrider.models.loading import model_config
from outrider.training import dataset, prompts, regenerate
from outrider.training.artefact import is_finished, open_artefact
from outrider.training.conversations import ChatTurn, Conversations
from outrider.training.recipe import Recipe
from outrider.training.stages import STAGES
from outrider.training.target_runner import TargetRunner

__all__ = ["Estimate", "estimate"]

LINE = 6.0  # bytes of a token id in JSON
STATE = 4 * 4  # bytes on disk per trained parameter: weight, two moments, and the finished checkpoint
TRIAL_TOKENS = 16  # tokens of an answer in the trial
ROUND = 1.5  # assumed time of a round of drafting and verifying, in plain steps
SANITY_STEPS = 90  # assumed steps of the sanity check
SELF_LENGTH = 90.0  # assumed tokens of such a prompt with its chat template
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
        recipe = self.recipe
        folder, config, parents = recipe.path(name), recipe.configs[name], recipe.folders(name)
        return is_finished(folder, name, config, target=recipe.target, parents=parents)

    # -------------------------------------------------------------------------------------------- stages

    def prompts(self) -> Estimate:
        sources = self.configs["prompts"].sources  # type: ignore[attr-defined]
        size = sum(source.path.stat().st_size for source in sources if source.path is not None)
        began = perf_counter()
        counts, lengths = self._prompts
        text = sum(sum(part.values()) for part in counts.values()) * (mean(lengths) * 4 + 60)
        seconds, note = perf_counter() - began, ""
        if self._self_written:
            tokens = self._self_written * SELF_TOKENS
            _, token_seconds = self._pace(self.configs["prompts"].rows)  # type: ignore[attr-defined]
            seconds, note = seconds + tokens * token_seconds, f"{self._self_written:,} of the target's own"
        return Estimate("prompts", seconds, _peak(), max(size, text), note)

    def regenerate(self) -> Estimate:
        config: Any = self.configs["regenerate"]
        count = sum(self._count(part) for part in ("train", "held_out"))
        disk = count * (self._length("prompt") + config.max_tokens) * LINE * 2  # the finished file is a copy
        if config.server:
            return Estimate("regenerate", 0.0, _peak(), disk, "time depends on the server")
        prompt_seconds, token_seconds = self._pace(config.rows)
        context = config.rows * (self._length("prompt") + config.max_tokens)
        memory = _peak() + context * self._key_value_bytes
        seconds = count * (prompt_seconds + config.max_tokens * token_seconds)
        speed = count * config.max_tokens / seconds
        return Estimate("regenerate", seconds, memory, disk, f"{count:,} answers at {speed:,.0f} tokens/s")

    def features(self) -> Estimate:
        config: Any = self.configs["features"]
        tokens = self._count("train") * min(config.length, self._length("text"))
        width = (1 + len(config.layers)) * self._llm.target.spec.hidden_size
        disk = tokens * width * (4 if config.keep == "float32" else 2)
        return Estimate("features", tokens / self._training_speed[0], _peak(), disk, "at most one epoch of `run`")

    def run(self) -> Estimate:
        config: Any = self.configs["run"]
        texts = self._count("train")
        steps = config.steps or math.ceil(config.epochs * texts / config.batch)
        tokens = steps * config.batch * min(config.length, self._length("text"))
        speed, parameters, memory = self._training_speed
        note = f"{steps:,} steps at {speed:,.0f} tokens/s, {parameters / 1e6:,.1f} M parameters"
        seconds = tokens / speed + self._evaluations(config, steps)
        if config.sanity:
            seconds += SANITY_STEPS * self._sanity_seconds
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
        return self._rounds("calibrate", sampled + min(greedy, config.rounds))

    def eval(self) -> Estimate:
        config: Any = self.configs["eval"]
        questions = self._count("held_out")
        if self.recipe.eval_prompts:
            questions = sum(path.read_bytes().count(b"\n") for path in self.recipe.eval_prompts)
        tokens = questions * config.repeats * len(config.temperatures) * config.max_tokens
        sides = 1 + len(config.thresholds) / max(1, config.repeats)
        return self._rounds("eval", tokens / ROUND + tokens / LENGTH * sides)

    def export(self) -> Estimate:
        return Estimate("export", 5.0, _peak(), self._training_speed[1] * 4)

    def _rounds(self, stage: str, rounds: float) -> Estimate:
        speed = 1 / self._pace(1)[1]
        size = self._training_speed[1] * 4
        return Estimate(stage, rounds * ROUND / speed, _peak(), size, f"{speed:,.0f} plain tokens/s, one at a time")

    # -------------------------------------------------------------------------------------------- counts

    @cached_property
    def _prompts(self) -> tuple[dict[str, Counter[str]], list[float]]:
        """Number of prompts by part and domain, and the lengths of up to 200 prompts in tokens, as the target gets
        them."""
        config: Any = self.configs["prompts"]
        files = tuple(source for source in config.sources if source.path is not None)
        split, _ = prompts.collect(config.model_copy(update={"sources": files}))
        some = (split["train"] + split["held_out"])[:200]
        settings = regenerate.sampling(self.configs["regenerate"], self.recipe.target)  # type: ignore[arg-type]
        conversations = Conversations(some, self._llm.tokenizer, settings)
        conversations.resume([])
        lengths = [float(len(turn.tokens)) for turn in conversations.todo] or [SELF_LENGTH]
        counts = {str(part): Counter(prompt["domain"] for prompt in found) for part, found in split.items()}
        for part, share in (("train", 1 - config.held_out), ("held_out", config.held_out)):
            counts[part]["self"] = round(share * self._self_written)
        return counts, lengths

    @property
    def _self_written(self) -> int:
        """Prompts that the target is to write itself."""
        sources: Any = self.configs["prompts"].sources  # type: ignore[attr-defined]
        return sum(source.self_written or 0 for source in sources)

    def _count(self, part: str) -> int:
        """Texts of a part: answers if they exist, else those that its prompts will get."""
        if self.finished("regenerate"):
            return int(open_artefact(self.recipe.path("regenerate")).provenance["facts"][part]["answers"])
        each: int = self.configs["regenerate"].answers_per_prompt if part == "train" else 1  # type: ignore[attr-defined]
        return each * sum(self._prompts[0][part].values())

    def _length(self, what: str) -> float:
        """Mean tokens of a prompt, or of a whole text."""
        prompt = mean(self._prompts[1])
        if what == "prompt":
            return prompt
        if self.finished("regenerate"):
            facts = open_artefact(self.recipe.path("regenerate")).provenance["facts"]["train"]
            return prompt + float(facts["tokens"]) / max(1, facts["answers"])
        return prompt + self.configs["regenerate"].max_tokens  # type: ignore[attr-defined,no-any-return]

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
            self._answer(1, 1)  # warm-up
            prompts, both = self._answer(rows, 1), self._answer(rows, 1 + TRIAL_TOKENS)
            self._paces[rows] = prompts / rows, max(both - prompts, both / 10) / (rows * TRIAL_TOKENS)
        return self._paces[rows]

    def _answer(self, rows: int, tokens: int) -> float:
        """Seconds of ``rows`` answers of ``tokens`` tokens by plain decoding."""
        options = {"max_tokens": tokens, "rows": rows, "ignore_eos": True, "drafter": "none", "server": None}
        options["device"] = "cpu"
        config = self.configs["regenerate"].model_copy(update=options)
        assert isinstance(config, regenerate.Config)
        ask = regenerate.engine(config, lambda: self._llm, regenerate.sampling(config, self.recipe.target))
        spec = self._llm.target.spec
        length = max(1, min(round(self._length("prompt")), spec.max_positions - tokens))
        asked = deque(
            ChatTurn(f"{rows} {n}", "", [1 + (i + n) % (spec.vocab_size - 1) for i in range(length)], (), ())
            for n in range(rows)
        )
        began = perf_counter()
        for _ in ask(asked):
            pass
        return perf_counter() - began

    @cached_property
    def _training_speed(self) -> tuple[float, int, float]:
        """Training tokens per second, number of trained parameters, and bytes of memory."""
        config: Any = self.configs["run"]
        spec = self._llm.target.spec
        length = max(8, min(config.length, round(self._length("text")), spec.max_positions))
        prompt = max(1, min(round(self._length("prompt")), length // 2))
        texts = []
        for number in range(max(1, config.pack_tokens // length)):
            tokens = tuple(1 + (i * 7 + number) % (spec.vocab_size - 1) for i in range(length))
            texts.append(dataset.Text(str(number), "", tokens, prompt))
        stage = import_module(STAGES["run"].reference.partition(":")[0])
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


def _peak() -> float:
    """Peak memory of this process in bytes; 0 where the system does not report it."""
    try:
        import resource
    except ImportError:  # not Unix
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most * 1024)
