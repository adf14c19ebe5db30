"""The drafters of the study: which table needs which, and training them, in one process or several.

A drafter is a recipe with a table's changes. Each is trained once, in a folder of its own. An interrupted run resumes;
a run that another process works on is skipped.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import say

from outrider.errors import InvalidRequest
from outrider.files import read_json, write_json
from outrider.training import run

RECIPES = Path(__file__).parent.parent / "recipes"
TRAINED = ("dspark", "dflash", "eagle3", "draft-model")
DEPTHS, BLOCKS, TEXTS = (1, 2, 5), (4, 8, 12, 16), (375, 1500)
NO_EFFECT = {"eval_every", "eval_prompts", "eval_tokens", "dtype"}  # settings that do not change what is trained


@dataclass(frozen=True)
class Trained:
    """A drafter to be trained: a recipe and changes to it."""

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the drafter's options
    suffix: str = ""
    seed: int = 0
    texts: int | None = None  # number of answers, evenly from all domains; None: all

    @property
    def name(self) -> str:
        parts = [self.recipe, self.suffix, f"seed{self.seed}" if self.seed else ""]
        return "-".join(part for part in [*parts, f"texts{self.texts}" if self.texts else ""] if part)

    def config(self, steps: int | None) -> run.Config:
        """The recipe's settings. ``steps`` replaces the steps of DSpark's recipe; other kinds are scaled in proportion.
        The draft model has no recipe of its own and uses DSpark's settings."""
        if self.recipe == "draft-model":
            base = _recipe("dspark") | {"kind": "draft_model", "drafter": {"layers": 1}}
        else:
            base = _recipe(self.recipe)
        options = {**base["drafter"], **self.changes}
        steps = base["steps"] if steps is None else max(1, round(base["steps"] * steps / _recipe("dspark")["steps"]))
        # Only one run of a kind is evaluated during training: evaluations take a fifth of the time.
        every = max(1, round(base["eval_every"] * steps / base["steps"])) if self.name == self.recipe else 0
        return run.Config(**{**base, "drafter": options, "steps": steps, "seed": self.seed, "eval_every": every})


def _recipe(name: str) -> dict[str, Any]:
    """A recipe's ``run`` section. The recipes' numbers of steps take equal time."""
    settings: dict[str, Any] = tomllib.loads((RECIPES / f"embedded-{name}.toml").read_text())["run"]
    return settings


def seeded(seeds: int, kinds: Sequence[str] = TRAINED) -> list[Trained]:
    return [Trained(recipe, seed=seed) for recipe in kinds for seed in range(seeds)]


DSPARK = Trained("dspark")
NO_MARKOV = {"markov_rank": 0}
LAYERS = _recipe("dspark")["drafter"]["layers"]
BY_DEPTH = [DSPARK if n == LAYERS else Trained("dspark", {"layers": n}, f"layers{n}") for n in DEPTHS]


def _of_block(size: int) -> dict[str, Any]:
    """Options of a block size, with as many drafts per text for every size, so that runs take equal time."""
    loss: dict[str, Any] = _recipe("dspark")["drafter"]["loss"]
    drafts = _recipe("dspark")["drafter"]["block_size"] * loss["anchors"]
    return {"block_size": size, "loss": {**loss, "anchors": drafts // size}}


BY_BLOCK = [Trained("dspark", _of_block(n), f"block{n}") for n in BLOCKS]
BY_HEAD = [DSPARK, Trained("dspark", {"markov_head": "rnn"}, "rnn"), Trained("dspark", NO_MARKOV, "none")]
BY_TEXTS = [*(Trained("dspark", texts=n) for n in TEXTS), DSPARK]


def needed(table: str, seeds: int, kinds: Sequence[str] = TRAINED) -> list[Trained]:
    """The trained drafters of a table."""
    return {"table1": seeded(seeds, kinds), "depth": BY_DEPTH, "blocks": BY_BLOCK, "heads": BY_HEAD}.get(
        table, BY_TEXTS if table == "efficiency" else [DSPARK]
    )


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Workshop:
    """Data and directories of the training runs."""

    answers: Path
    out: Path
    target: str = "embedded"
    steps: int | None = None  # of DSpark; other kinds in proportion. None: the recipes' numbers
    trained: Mapping[str, Path] = field(default_factory=dict)
    features: Path | None = None  # an artefact of `outrider train features`; None: the target runs during training

    @property
    def held_out(self) -> Path:
        return self.answers / "held_out.jsonl"

    def train(self, drafters: Sequence[Trained]) -> None:
        """Train the missing ones. Several processes may do this at the same time and share the drafters."""
        for drafter in {drafter.name: drafter for drafter in drafters}.values():
            with alone(self.out / "runs" / drafter.name) as mine:
                if mine:
                    self.checkpoint(drafter)

    def checkpoint(self, drafter: Trained) -> Path:
        """The checkpoint of a trained drafter; trains it first if it is missing or unfinished."""
        folder, config = self.out / "runs" / drafter.name, drafter.config(self.steps)
        if drafter.name in self.trained and not (folder / "drafter").exists():
            _copy_run(self.trained[drafter.name], folder, config)
        if not (folder / "drafter").exists():
            _begin(folder, config)
            say(f"training {drafter.name}: {config.steps} steps of {config.batch} texts")
            features = None if drafter.recipe == "draft-model" else self.features  # a draft model reads no features
            texts, watch = self._texts(drafter.texts), _watch(drafter.name)
            run.learn(config, texts, folder, self.target, features=features, watch=watch, say=say)
        _check(folder / "drafter", config)
        return folder / "drafter"

    def _texts(self, count: int | None) -> Path:
        """The answers, or a folder with the first ``count`` of them, alternating between domains."""
        if count is None:
            return self.answers
        folder = self.out / f"answers-{count}"
        if not (folder / "held_out.jsonl").exists():
            folder.mkdir(parents=True, exist_ok=True)
            domains: dict[str, list[str]] = {}
            for line in (self.answers / "train.jsonl").read_text().split("\n"):
                if line:
                    domains.setdefault(json.loads(line).get("domain", ""), []).append(line)
            longest = max(map(len, domains.values()))
            lines = [own[i] for i in range(longest) for own in domains.values() if i < len(own)]
            (folder / "train.jsonl").write_text("\n".join(lines[:count]) + "\n")
            shutil.copyfile(self.held_out, folder / "held_out.jsonl")
        return folder


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Lock a folder. Yields False where another process holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _copy_run(source: Path, folder: Path, wanted: run.Config) -> None:
    """Copy a run made elsewhere: its checkpoint, and its log if there is one."""
    checkpoint = source if (source / "config.json").exists() else source / "drafter"
    if not (checkpoint / "config.json").exists():
        raise InvalidRequest(f"--trained: {source} holds no drafter; expected a checkpoint or a folder of `train run`")
    _check(checkpoint, wanted)
    log = source / "state" / "log.jsonl"
    if log.exists():
        (folder / "state").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, folder / "state" / "log.jsonl")
    shutil.copytree(checkpoint, folder / "drafter")


def _begin(folder: Path, wanted: run.Config) -> None:
    """Write a run's settings, or check that it was begun with the same ones."""
    file = folder / "settings.json"
    if file.exists():
        _same(read_json(file), wanted, folder)
    write_json(file, wanted.model_dump(mode="json"))


def _check(checkpoint: Path, wanted: run.Config) -> None:
    file = checkpoint / "provenance.json"
    _same(read_json(file).get("config", {}) if file.exists() else {}, wanted, checkpoint)


def _same(found: Mapping[str, Any], wanted: run.Config, where: Path) -> None:
    """Raises InvalidRequest where the settings found differ from the wanted ones."""
    expected = {k: v for k, v in wanted.model_dump(mode="json").items() if k not in run.Config.free | NO_EFFECT}
    other = [name for name, value in expected.items() if found.get(name, value) != value]
    if other or not found:
        different = ", ".join(f"{name} {found.get(name)!r} instead of {expected[name]!r}" for name in other)
        raise InvalidRequest(
            f"{where} was trained with {different or 'unknown settings'}; give another --out, or the --steps and "
            "recipes it was trained with"
        )


def _watch(name: str) -> Callable[[Any, int], None]:
    def watch(step: Any, steps: int) -> None:
        if step.step % 50 == 0 or step.step == steps:
            say(f"  {name}: step {step.step} of {steps}, loss {step.loss:.3f}")

    return watch
