"""The study's drafters: what is trained for which table, and training it, in one process or several.

A drafter is its recipe, with what a table changes in it. Each is trained once, in a folder of its own; an interrupted
run goes on where it stopped, and one that another process works on is left to it.
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
ASIDE = {"looks", "look_prompts", "look_tokens", "dtype"}  # settings that say nothing of the trained weights


@dataclass(frozen=True)
class Trained:
    """A drafter to be trained: a recipe, and what is changed in it."""

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the drafter's options
    suffix: str = ""
    seed: int = 0
    texts: int | None = None  # of the answers, evenly from all domains; None: all

    @property
    def name(self) -> str:
        parts = [self.recipe, self.suffix, f"seed{self.seed}" if self.seed else ""]
        return "-".join(part for part in [*parts, f"texts{self.texts}" if self.texts else ""] if part)

    def config(self, steps: int | None) -> run.Config:
        """Its recipe's settings; with ``steps`` as many as DSpark's recipe would then make of its own. The draft model
        has no recipe: DSpark's, with its own loss."""
        if self.recipe == "draft-model":
            base = _recipe("dspark") | {"kind": "draft_model", "drafter": {"layers": 1}}
        else:
            base = _recipe(self.recipe)
        options = {**base["drafter"], **self.changes}
        steps = base["steps"] if steps is None else max(1, round(base["steps"] * steps / _recipe("dspark")["steps"]))
        # One run of a kind is watched while it learns: looks take a fifth of the time.
        looks = base["looks"] if self.name == self.recipe else 0
        return run.Config(**{**base, "drafter": options, "steps": steps, "seed": self.seed, "looks": looks})


def _recipe(name: str) -> dict[str, Any]:
    """What a recipe says of its training run: recipes have the steps that take them equally long."""
    settings: dict[str, Any] = tomllib.loads((RECIPES / f"embedded-{name}.toml").read_text())["run"]
    return settings


def seeded(seeds: int, kinds: Sequence[str] = TRAINED) -> list[Trained]:
    return [Trained(recipe, seed=seed) for recipe in kinds for seed in range(seeds)]


DSPARK = Trained("dspark")
NO_MARKOV = {"markov_rank": 0}
LAYERS = _recipe("dspark")["drafter"]["layers"]
BY_DEPTH = [DSPARK if n == LAYERS else Trained("dspark", {"layers": n}, f"layers{n}") for n in DEPTHS]


def _of_block(size: int) -> dict[str, Any]:
    """As many drafts are learnt from a text whatever the block's size, so that runs take equally long."""
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
    """Where drafters are trained, and from what."""

    answers: Path
    out: Path
    target: str = "embedded"
    steps: int | None = None  # of DSpark, the others' in proportion; None: as the recipes say
    trained: Mapping[str, Path] = field(default_factory=dict)
    features: Path | None = None  # an artefact of `outrider train features`; None: the target teaches online

    @property
    def held_out(self) -> Path:
        return self.answers / "held_out.jsonl"

    def train(self, drafters: Sequence[Trained]) -> None:
        """Train all that are not there, each in one process of those that do this at the same time."""
        for drafter in {drafter.name: drafter for drafter in drafters}.values():
            with alone(self.out / "runs" / drafter.name) as mine:
                if mine:
                    self.checkpoint(drafter)

    def checkpoint(self, drafter: Trained) -> Path:
        """The trained drafter's checkpoint; trains it if it is not there, or not finished."""
        folder, config = self.out / "runs" / drafter.name, drafter.config(self.steps)
        if drafter.name in self.trained and not (folder / "drafter").exists():
            _take_over(self.trained[drafter.name], folder, config)
        if not (folder / "drafter").exists():
            _begin(folder, config)
            say(f"training {drafter.name}: {config.steps} steps of {config.batch} texts")
            features = None if drafter.recipe == "draft-model" else self.features  # it reads none
            texts, watch = self._texts(drafter.texts), _tell(drafter.name)
            run.learn(config, texts, folder, self.target, features=features, watch=watch, say=say)
        _check(folder / "drafter", config)
        return folder / "drafter"

    def _texts(self, count: int | None) -> Path:
        """The answers, or a folder with the first ``count`` of them, the domains in turns."""
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
    """Whether no other process works in the folder; then none does until the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _take_over(source: Path, folder: Path, wanted: run.Config) -> None:
    """Copy a run made elsewhere: its checkpoint, and its log where there is one."""
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
    """Note what a run is made with, or see that it was begun with the same."""
    file = folder / "settings.json"
    if file.exists():
        _same(read_json(file), wanted, folder)
    write_json(file, wanted.model_dump(mode="json"))


def _check(checkpoint: Path, wanted: run.Config) -> None:
    file = checkpoint / "provenance.json"
    _same(read_json(file).get("config", {}) if file.exists() else {}, wanted, checkpoint)


def _same(found: Mapping[str, Any], wanted: run.Config, where: Path) -> None:
    """Raises InvalidRequest where something was trained by other settings than are wanted."""
    expected = {k: v for k, v in wanted.model_dump(mode="json").items() if k not in run.Config.free | ASIDE}
    other = [name for name, value in expected.items() if found.get(name, value) != value]
    if other or not found:
        told = ", ".join(f"{name} {found.get(name)!r} instead of {expected[name]!r}" for name in other)
        raise InvalidRequest(
            f"{where} was trained with {told or 'settings it does not tell'}; give another --out, or the --steps and "
            "recipes it was trained with"
        )


def _tell(name: str) -> Callable[[Any, int], None]:
    def watch(step: Any, steps: int) -> None:
        if step.step % 50 == 0 or step.step == steps:
            say(f"  {name}: step {step.step} of {steps}, loss {step.loss:.3f}")

    return watch
