"""The example of a drafter in a package of its own: found by its entry points, trained, saved, loaded and verified."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider import LLM, SamplingParams, checkpoints, registry
from outrider.errors import CheckpointError
from outrider.models.locations import EMBEDDED_PROMPTS
from outrider.training.run import Config, learn

EXAMPLE = Path(__file__).parents[1] / "examples" / "medusa"
FILES = ("medusa_drafter.py", "medusa_training.py")
TEXTS, HELD_OUT = 24, 3
OPTIONS: dict[str, Any] = {
    "steps": 40,
    "batch": 4,
    "length": 128,
    "learning_rate": 3e-3,
    "eval_every": 0,
    "sanity": False,
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `pip install` leaves: the modules on the path, and metadata with the entry points of pyproject.toml."""
    site = tmp_path_factory.mktemp("site")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    metadata = site / "outrider_medusa-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {where}\n" for name, where in points.items())
        for group, points in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.syspath_prepend(str(EXAMPLE))
        registry._outside.cache_clear()
        yield
    registry._outside.cache_clear()
    for file in FILES:
        sys.modules.pop(Path(file).stem, None)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    files = sorted(EMBEDDED_PROMPTS.glob("*.jsonl"))
    lines = [file.read_text().splitlines() for file in files]
    turns = [json.loads(line)["turns"][0] for some in zip(*lines, strict=False) for line in some]
    return turns[: TEXTS + HELD_OUT]


@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM("embedded", "none", dtype="float32", max_rows=8)


@pytest.fixture(scope="module")
def drafter(installed: None, plain: LLM, prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for a few seconds on the target's own answers."""
    folder = tmp_path_factory.mktemp("medusa")
    outputs = plain.generate(prompts[:TEXTS], SamplingParams(max_tokens=48))
    lines = [
        json.dumps({"id": str(i), "domain": "x", "prompt": o.prompt_token_ids[-64:], "answer": o.token_ids})
        for i, o in enumerate(outputs)
        if len(o.token_ids) > 4
    ]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    learn(
        Config(kind="medusa", drafter={"heads": 2}, tensorboard=False, bfloat16=False, **OPTIONS),
        folder,
        folder,
        "embedded",
    )
    return folder / "drafter"


def test_the_example_is_short() -> None:
    assert sum(len((EXAMPLE / file).read_text().splitlines()) for file in FILES) <= 150


def test_it_is_written_in_the_format_that_holds_every_design(drafter: Path) -> None:
    config = json.loads((drafter / "config.json").read_text())
    assert (config["outrider_drafter"], config["design"], config["target_layers"]) == ("medusa", {"heads": 2}, [])
    checkpoint = checkpoints.load(drafter)
    assert sorted(checkpoint.tensors) == [f"heads.{k}.{part}" for k in range(2) for part in ("bias", "weight")]
    with pytest.raises(CheckpointError, match="cannot hold a drafter of kind 'medusa'; it can be written as: outrider"):
        checkpoints.save(checkpoint, drafter.parent / "x", "speculators", {})


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=32),
        SamplingParams(max_tokens=32, temperature=0.8, seed=3),
        SamplingParams(max_tokens=32, temperature=0.8, seed=3, frequency_penalty=0.5),
    ],
    ids=["greedy", "coupled", "coupled-penalised"],
)
def test_it_drafts_and_the_text_is_the_plain_one(
    drafter: Path, plain: LLM, prompts: list[str], params: SamplingParams
) -> None:
    """Greedy and coupled text does not depend on the drafter; some of its drafts are accepted."""
    llm = plain.with_drafter(drafter)
    assert llm.drafter_name == "medusa" and llm.drafter.aux_layers == ()
    outputs = llm.generate(prompts[TEXTS:], params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain.generate(prompts[TEXTS:], params)]
    drafted, accepted = (sum(getattr(o.stats, name) for o in outputs) for name in ("drafted", "accepted"))
    assert drafted > 30 and accepted > 0.05 * drafted, (drafted, accepted)


def test_a_row_alone_drafts_as_it_does_among_others(drafter: Path, plain: LLM, prompts: list[str]) -> None:
    together = plain.with_drafter(drafter).generate(prompts[TEXTS:], SamplingParams(max_tokens=24))
    for prompt, output in zip(prompts[TEXTS:], together, strict=True):
        alone = plain.with_drafter(drafter).generate([prompt], SamplingParams(max_tokens=24))[0]
        assert (alone.token_ids, alone.stats.accepted) == (output.token_ids, output.stats.accepted)


def test_its_loss_is_the_direct_one(installed: None, plain: LLM) -> None:
    """Drafts counted and scored position by position, from one pass of the target over each text."""
    from outrider.training.dataset import Text
    from outrider.training.run import trainable
    from outrider.training.target_runner import TargetRunner
    from outrider.types import RaggedBatch

    network: Any = trainable(Config(kind="medusa", drafter={"heads": 2}), plain)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    texts = [Text(str(n), "x", torch.randint(2, 4096, (n,), generator=generator).tolist(), 4) for n in (9, 14)]
    loss = network(TargetRunner(plain.target, 16).batch(texts, network, 0))
    total = weight = 0.0
    for text in texts:
        cache = plain.target.new_cache(1, 16)
        output = plain.target.forward(RaggedBatch.pack([text.tokens], [0], [cache.open()]), cache)
        assert output.hidden is not None
        for i in range(len(text.tokens)):
            for k, head in enumerate(network.heads, 1):
                if i + 2 >= 4 and i + k + 1 < len(text.tokens):
                    state = output.hidden[i].float()
                    logits = plain.target.unembed((state + torch.nn.functional.silu(head(state)))[None])[0].float()
                    p = output.logits[i + k].float().softmax(-1)
                    total += 0.8**k * float(-(p * logits.detach().log_softmax(-1)).sum())
                    weight += 0.8**k
    assert float(loss.weight) == pytest.approx(weight, rel=1e-5)
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-4)
