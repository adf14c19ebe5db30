"""Artefacts of the training stages: resuming, refused parents, killed processes and full disks."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from gguf import GGUFWriter
from pydantic import BaseModel
from rich.console import Console

from outrider.errors import ArtefactError, InvalidRequest
from outrider.tokenization.tokenizer import Tokenizer
from outrider.training import regenerate as stage
from outrider.training.artefact import Journal, begin, open_artefact, read_lines, target_hash
from outrider.training.conversations import ChatTurn, Conversations
from outrider.training.prompts import Config as PromptsConfig
from outrider.training.prompts import Source, make_prompts
from outrider.training.regenerate import Config, regenerate
from outrider.training.stages import STAGES, Stage, StageInputs
from outrider.training.stages import make as make_stage

SMALL = Config(max_tokens=24, rows=4, seed=3)


class Options(BaseModel):
    free: ClassVar[frozenset[str]] = frozenset({"threads"})
    size: int = 1
    threads: int = 1


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """An artefact of 40 prompts, some of them chats of two turns."""
    lines: list[dict[str, Any]] = [{"text": f"def function_{i}(first, second):\n"} for i in range(30)]
    lines += [{"turns": [f"How many pens has Tom {i}?", "And Ann?"]} for i in range(10)]
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_prompts(PromptsConfig(sources=(Source(path=source),), held_out=0.2), tmp_path / "prompts")
    return tmp_path / "prompts"


def make(folder: Path, parent: Path | None = None, **options: Any) -> bool:
    """A stage that writes one file. -> whether it ran."""
    parents = {} if parent is None else {"parent": parent}
    with begin(folder, "stage", Options(**options), parents=parents) as work:
        if work.finished:
            return False
        (folder / "result").write_text(f"{options.get('size')}")
        work.finish(["result"])
    return True


# ------------------------------------------------------------------------------------------------ artefacts


def test_a_finished_artefact_is_kept_unless_something_changed(tmp_path: Path) -> None:
    assert make(tmp_path / "a", size=2) is True
    assert make(tmp_path / "a", size=2) is False
    assert make(tmp_path / "a", size=2, threads=8) is False  # does not change the result
    with pytest.raises(ArtefactError, match=r"made with size: 2, now 3\. Delete the directory"):
        make(tmp_path / "a", size=3)
    with pytest.raises(
        ArtefactError, match="made by the stage 'stage'; expected an artefact of `outrider train prompts`"
    ):
        open_artefact(tmp_path / "a", "prompts")


def test_a_changed_parent_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", size=1)
    assert make(tmp_path / "b", tmp_path / "a")
    assert open_artefact(tmp_path / "b").provenance["parents"] == {"parent": open_artefact(tmp_path / "a").sha256}
    shutil.rmtree(tmp_path / "a")
    make(tmp_path / "a", size=2)
    with pytest.raises(ArtefactError, match="made with another parent"):
        make(tmp_path / "b", tmp_path / "a")
    (tmp_path / "a" / "result").write_text("edited")
    with pytest.raises(ArtefactError, match="were changed since it was finished"):
        make(tmp_path / "c", tmp_path / "a")


def test_an_unfinished_or_foreign_directory_is_refused(tmp_path: Path) -> None:
    with begin(tmp_path / "a", "stage", Options()):
        (tmp_path / "a" / "half").touch()
    with pytest.raises(ArtefactError, match="not finished"):
        make(tmp_path / "b", tmp_path / "a")
    with pytest.raises(ArtefactError, match="has no provenance"):
        make(tmp_path / "b", tmp_path)
    with pytest.raises(ArtefactError, match="begun with size: 1, now 2"):
        make(tmp_path / "a", size=2)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").touch()
    with pytest.raises(ArtefactError, match=r"holds other files \(thesis\.tex\)"):
        make(tmp_path / "c")
    assert [file.name for file in (tmp_path / "c").iterdir() if file.name != ".lock"] == ["thesis.tex"]


def test_a_process_killed_while_it_wrote_its_first_record(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".begun.json.k3jx_9aq").write_text('{"stage": ')
    assert make(tmp_path / "a")


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_file_is_no_directory(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match=r"/file is a file; stage needs a directory of its own, give another one"):
        make(tmp_path / "file" / below)


def test_two_processes_do_not_share_a_directory(tmp_path: Path) -> None:
    with begin(tmp_path / "a", "stage", Options()), pytest.raises(ArtefactError, match="another process"):
        make(tmp_path / "a")
    assert make(tmp_path / "a")


def test_every_file_of_a_target_counts(tmp_path: Path) -> None:
    names = ("config.json", "generation_config.json", "tokenizer.json", "a.safetensors", "b.safetensors")
    for name in names:
        (tmp_path / name).write_text(json.dumps({"model_type": name}))
    before = target_hash(str(tmp_path))
    for name in names:
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text("other bytes")
        assert target_hash(str(tmp_path)) != before, name
        (tmp_path / name).write_text(kept)
    (tmp_path / "README.md").write_text("text")
    assert target_hash(str(tmp_path)) == before
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    assert target_hash(str(tmp_path)) != before


def test_every_shard_of_a_target_counts(tmp_path: Path) -> None:
    shards = [tmp_path / f"model-0000{n}-of-00002.gguf" for n in (1, 2)]
    for n, shard in enumerate(shards):
        writer = GGUFWriter(str(shard), "llama", use_temp_file=False)
        for key, value in (("split.count", 2), ("split.no", n), ("split.tensors.count", 2)):
            writer.add_uint16(key, value)
        writer.add_tensor(f"tensor.{n}", np.ones(32, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    before = target_hash(str(shards[0]))
    shards[1].write_bytes(shards[1].read_bytes()[:-4] + b"1234")
    assert target_hash(str(shards[0])) != before


def test_a_changed_target_is_refused(prompts: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(tiny_model_dir, target)
    regenerate(SMALL, prompts, tmp_path / "answers", str(target))
    (target / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.5}))
    with pytest.raises(ArtefactError, match="made with another target"):
        regenerate(SMALL, prompts, tmp_path / "answers", str(target))
    with pytest.raises(ArtefactError, match="whose files differ"):
        open_artefact(tmp_path / "answers", "regenerate", str(target))


def test_a_stage_does_not_mix_targets(tiny_model_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    answers = {"answers": tmp_path / "answers"}
    with begin(answers["answers"], "answers", Options(), target=str(tiny_model_dir)) as work:
        work.finish([])
    with begin(tmp_path / "same", "run", Options(), parents=answers, target=str(other)) as work:
        assert work.record["target"]["name"] == str(other)
    (other / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.5}')
    with pytest.raises(ArtefactError, match="the answers in .* belong to the target .*, whose files differ"):
        begin(tmp_path / "run", "run", Options(), parents=answers, target=str(other))
    assert not (tmp_path / "run").exists()


def test_a_changed_chat_template_is_refused_where_there_are_chats(
    prompts: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    shutil.copytree(tiny_model_dir, target)
    plain = Source(path=tmp_path / "plain.jsonl")
    plain.path.write_text('{"text": "It was"}\n')
    make_prompts(PromptsConfig(sources=(plain,), held_out=0), tmp_path / "plain")
    for name, asked in (("chats", prompts), ("texts", tmp_path / "plain")):
        regenerate(SMALL, asked, tmp_path / name, str(target))
    (target / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    regenerate(SMALL, tmp_path / "plain", tmp_path / "texts", str(target))
    with pytest.raises(ArtefactError, match=r"made with another chat_template\.jinja"):
        regenerate(SMALL, prompts, tmp_path / "chats", str(target))


GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('bad word') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def test_a_template_without_system_messages_gets_them_in_the_first_user_message(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    shutil.copytree(tiny_model_dir, target)
    (target / "chat_template.jinja").write_text(GEMMA)
    said = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    lines = [{"messages": said}, {"messages": [*said, {"role": "user", "content": "And?"}]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = Source(path=tmp_path / "data.jsonl")
    make_prompts(PromptsConfig(sources=(source,), held_out=0), tmp_path / "prompts")
    text = io.StringIO()
    regenerate(SMALL, tmp_path / "prompts", tmp_path / "out", str(target), console=Console(file=text, width=200))
    assert text.getvalue().count("takes no system messages") == 1
    tokenizer = Tokenizer(target)
    prompts = [tokenizer.decode(line["prompt"]) for line in read_lines(tmp_path / "out" / "train.jsonl")]
    assert len(prompts) == 3 and all(prompt.startswith("<user>Be brief.\n\nHi") for prompt in prompts)

    with source.path.open("a") as file:
        file.write('{"turns": ["a bad word"]}\n')
    make_prompts(PromptsConfig(sources=(source,), held_out=0), tmp_path / "more")
    with pytest.raises(InvalidRequest, match=r"train.jsonl line \d \(prompt [0-9a-f]{16}\): .*bad word"):
        regenerate(SMALL, tmp_path / "more", tmp_path / "refused", str(target))


def test_a_scratch_directory_of_a_killed_stage_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that needs a new directory gets an empty one every time."""
    calls = 0

    def call(function: Any, inputs: StageInputs) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        inputs.out.mkdir()
        (inputs.out / "drafter").mkdir()
        (inputs.out / "drafter" / "weights").write_text(f"call {calls}")
        if calls == 1:
            raise KeyboardInterrupt
        (inputs.out / "provenance.json").write_text("its own")
        return {"calls": calls}

    stage = Stage("outrider.training.export:export", call, {}, ("drafter",), scratch=True)
    monkeypatch.setitem(STAGES, "fake", stage)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make_stage("fake", Options(), {}, out, "embedded")
    assert not (out / "drafter").exists()
    made = make_stage("fake", Options(), {}, out, "embedded")
    assert made.provenance["facts"] == {"calls": 2} and (out / "drafter" / "weights").read_text() == "call 2"
    assert make_stage("fake", Options(), {}, out, "embedded").sha256 == made.sha256 and calls == 2
    assert sorted(path.name for path in out.iterdir()) == [".lock", "drafter", "provenance.json"]


@pytest.mark.parametrize("tail", [b'{"id": "c", "ans', b'{"id": "c"}', b"\x00\x00\x00\x00\n", b'{"id": "\xe2\x80'])
def test_a_journal_loses_only_the_line_being_written(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    whole = '{"id": "a"}\n{"id": "b\u2028"}\n'.encode()
    path.write_bytes(whole + tail)
    with Journal(path) as journal:
        assert [record["id"] for record in journal.records] == ["a", "b\u2028"]
        journal.append([{"id": "d"}])
    assert path.read_bytes() == whole + b'{"id": "d"}\n'


# ------------------------------------------------------------------------------------------------ answers

SCRIPT = """
import sys
from pathlib import Path
from outrider.training.regenerate import Config, regenerate
regenerate(Config(max_tokens=24, rows=1, seed=3), Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


def child(prompts: Path, out: Path, target: Path, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OUTRIDER_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(prompts), str(out), str(target)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **options)


def asked_again(prompts: Path, out: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Finish the answers in this process. -> ids of the turns that were answered."""
    asked: list[str] = []
    engine = stage.engine

    def watched(*arguments: Any) -> Any:
        answer = engine(*arguments)

        def answering(todo: deque[ChatTurn]) -> Iterator[Any]:
            for answers in answer(todo):
                asked.extend(turn.id for turn, _ in answers)
                yield answers

        return answering

    monkeypatch.setattr(stage, "engine", watched)
    regenerate(SMALL, prompts, out, str(target))
    return asked


def test_several_answers_to_a_prompt(prompts: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    twice = SMALL.model_copy(update={"temperature": 1.0, "answers_per_prompt": 2})
    regenerate(twice, prompts, tmp_path / "twice", str(tiny_model_dir))
    regenerate(twice.model_copy(update={"answers_per_prompt": 1}), prompts, tmp_path / "once", str(tiny_model_dir))
    lines, once = (list(read_lines(tmp_path / name / "train.jsonl")) for name in ("twice", "once"))
    again = [line for line in lines if "~2" in line["id"]]
    assert [line for line in lines if line not in again] == once  # more answers change none of those before
    assert [line["id"].replace("~2", "") for line in again] == [line["id"] for line in once]
    assert again[0]["prompt"] == once[0]["prompt"]
    assert [line["answer"] for line in again] != [line["answer"] for line in once]
    held_out = [(tmp_path / name / "held_out.jsonl").read_bytes() for name in ("twice", "once")]
    assert held_out[0] == held_out[1]
    with pytest.raises(InvalidRequest, match="same answer again and again"):
        regenerate(twice.model_copy(update={"temperature": 0.0}), prompts, tmp_path / "same", str(tiny_model_dir))


def test_answers_depend_on_prompt_and_seed_only(prompts: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Not on the number of rows, nor on the drafter."""
    kinds = [SMALL, SMALL.model_copy(update={"rows": 1}), SMALL.model_copy(update={"drafter": "ngram", "rows": 3})]
    made = [regenerate(c, prompts, tmp_path / f"{i}", str(tiny_model_dir)) for i, c in enumerate(kinds)]
    assert len({artefact.sha256 for artefact in made}) == 1
    other = regenerate(SMALL.model_copy(update={"seed": 4}), prompts, tmp_path / "other", str(tiny_model_dir))
    assert other.sha256 != made[0].sha256
    lines = list(read_lines(tmp_path / "0" / "train.jsonl"))
    assert all(0 < len(line["answer"]) <= 24 for line in lines)


def test_a_conversation_continues_from_the_targets_answer(prompts: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    from outrider.tokenization.tokenizer import Tokenizer

    regenerate(SMALL, prompts, tmp_path / "answers", str(tiny_model_dir))
    tokenizer = Tokenizer(tiny_model_dir)
    lines = {line["id"]: line for line in read_lines(tmp_path / "answers" / "train.jsonl")}
    chats = [prompt for prompt in read_lines(prompts / "train.jsonl") if "turns" in prompt]
    assert chats
    for chat in chats:
        first, second = lines[chat["id"]], lines[f"{chat['id']}#2"]
        asked = [{"role": "user", "content": chat["turns"][0]}]
        assert first["prompt"] == tokenizer.encode_chat(asked)
        answered = {"role": "assistant", "content": tokenizer.decode(first["answer"])}
        assert second["prompt"] == tokenizer.encode_chat(
            [*asked, answered, {"role": "user", "content": chat["turns"][1]}]
        )


def test_a_conversation_resumes_behind_the_turns_that_are_answered(tiny_model_dir: Path) -> None:
    chat = {"id": "a", "domain": "chat", "turns": ["one", "two", "three", "four"]}
    tokenizer, settings = Tokenizer(tiny_model_dir), stage.sampling(Config(max_tokens=4), str(tiny_model_dir))
    undisturbed = Conversations([chat], tokenizer, settings)
    undisturbed.resume([])
    lines = []
    while undisturbed.todo:
        turn = undisturbed.todo.popleft()
        lines.append(undisturbed.take(turn, tokenizer.encode(f"answer {turn.number}")))
    assert [line["id"] for line in lines] == ["a", "a#2", "a#3", "a#4"]
    assert undisturbed.ordered() == lines and undisturbed.finished == 1
    for answered in range(4):
        resumed = Conversations([chat], tokenizer, settings)
        resumed.resume(lines[:answered])
        assert [(turn.id, turn.tokens) for turn in resumed.todo] == [(lines[answered]["id"], lines[answered]["prompt"])]
    resumed.resume(lines)
    assert resumed.finished == 1


def test_a_prompt_may_fill_the_context_exactly(tiny_model_dir: Path) -> None:
    tokenizer, settings = Tokenizer(tiny_model_dir), stage.sampling(Config(max_tokens=4), str(tiny_model_dir))
    text = {"id": "a", "domain": "", "text": "as long as the context allows"}
    length = len(tokenizer.encode(text["text"]))
    for context, fits in ((length + 4, True), (length + 3, False)):
        conversations = Conversations([text], tokenizer, replace(settings, context=context))
        conversations.resume([])
        assert [len(turn.tokens) for turn in conversations.todo] == [length] * fits
        assert conversations.too_long == (not fits)


def test_a_killed_process_loses_and_repeats_nothing(
    prompts: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = regenerate(SMALL, prompts, tmp_path / "undisturbed", str(tiny_model_dir))
    out = tmp_path / "killed"
    process = child(prompts, out, tiny_model_dir)
    while process.poll() is None and (not (out / "train.jsonl").exists() or (out / "train.jsonl").stat().st_size < 500):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "provenance.json").exists()
    whole = (out / "train.jsonl").read_bytes()
    (out / "train.jsonl").write_bytes(whole + b'{"id": "half a li')
    answered = [json.loads(line)["id"] for line in whole.splitlines() if line.endswith(b"}")]
    total = undisturbed.provenance["facts"]["train"]["answers"] + undisturbed.provenance["facts"]["held_out"]["answers"]
    assert 0 < len(answered) < total
    asked = asked_again(prompts, out, tiny_model_dir, monkeypatch)
    assert not set(asked) & set(answered) and len(asked) + len(answered) == total
    assert open_artefact(out).sha256 == undisturbed.sha256
    assert asked_again(prompts, out, tiny_model_dir, monkeypatch) == []


def test_a_full_disk_is_reported_and_the_stage_resumes(prompts: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    undisturbed = regenerate(SMALL, prompts, tmp_path / "undisturbed", str(tiny_model_dir))
    out = tmp_path / "full"

    def limit() -> None:  # no file may grow past 4.5 kB; without the signal, writing fails as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4500, resource.RLIM_INFINITY))

    _, errors = child(prompts, out, tiny_model_dir, preexec_fn=limit).communicate()
    assert b"ArtefactError: cannot write to" in errors and b"free disk space and run the same command again" in errors
    assert 0 < (out / "train.jsonl").stat().st_size <= 4500
    assert regenerate(SMALL, prompts, out, str(tiny_model_dir)).sha256 == undisturbed.sha256


def test_a_full_disk_under_safetensors(tmp_path: Path) -> None:
    """It raises an error of its own."""
    script = """
import resource, signal, sys, torch
from pathlib import Path
from pydantic import BaseModel
from outrider.errors import ArtefactError
from outrider.models.weights import write_tensors
from outrider.training.artefact import begin
class Empty(BaseModel): ...
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4500, resource.RLIM_INFINITY))
out = Path(sys.argv[1])
try:
    with begin(out, "stage", Empty()):
        write_tensors(out / "a.safetensors", {"a": torch.zeros(100_000)})
except ArtefactError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], capture_output=True, text=True)
    assert "cannot write to" in done.stdout and "run the same command again" in done.stdout, done.stderr


def test_default_sampling_is_the_targets(tiny_model_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(tiny_model_dir, target)
    assert stage.sampling(Config(max_tokens=24), str(target)).params.temperature == 1.0
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [0, 7]}
    (target / "generation_config.json").write_text(json.dumps(own))
    found = stage.sampling(Config(max_tokens=24, top_k=5), str(target))
    assert (found.params.temperature, found.params.top_p, found.params.top_k) == (0.6, 0.95, 5)
    assert found.end_tokens == (0, 7)


def test_prompts_that_do_not_fit_are_counted_and_left_out(prompts: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    tight = SMALL.model_copy(update={"context": 24 + 14})
    facts = regenerate(tight, prompts, tmp_path / "answers", str(tiny_model_dir)).provenance["facts"]["train"]
    lines = list(read_lines(tmp_path / "answers" / "train.jsonl"))
    assert facts["too_long"] > 0 and len(lines) == facts["answers"] > 0
    assert max(len(line["prompt"]) for line in lines) <= 14
    with pytest.raises(ArtefactError, match=r"at most 1 tokens, which max_tokens = 24 leaves of a context of 25"):
        regenerate(SMALL.model_copy(update={"context": 25}), prompts, tmp_path / "none", str(tiny_model_dir))
