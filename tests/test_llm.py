"""Users' view: text in, text out, on the embedded pair."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from outrider import LLM, SamplingParams
from outrider.config import memory_bytes
from outrider.core import native
from outrider.errors import CheckpointError, IncompatibleDrafter, InvalidRequest, UnknownKind

PROMPTS = ["Question: Tom has 3 apples and buys 4 more. How many?\nAnswer:", "def read(path):\n", "Once upon a time"]
DRAFTERS = ["none", "ngram", "suffix", "draft_model"]


@pytest.fixture(scope="module")
def llms() -> dict[str, LLM]:
    """One target in float64 on the reference backend, each drafter on it."""
    first = LLM(drafter="none", dtype="float64", backend="reference")
    shared = {
        name: LLM(first.target, name, tokenizer=first.tokenizer, drafter_options=options)
        for name, options in [("ngram", {}), ("suffix", {})]
    }
    draft = LLM(drafter="draft_model", dtype="float64", backend="reference")
    return {"none": first, **shared, "draft_model": draft}


@pytest.mark.parametrize("drafter", DRAFTERS[1:])
def test_greedy_text_is_the_plain_text(llms: dict[str, LLM], drafter: str) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    plain, fast = llms["none"].generate(PROMPTS, params), llms[drafter].generate(PROMPTS, params)
    assert [o.token_ids for o in fast] == [o.token_ids for o in plain]
    assert [o.text for o in fast] == [o.text for o in plain]
    assert sum(o.stats.accepted for o in fast) > 0, "a run that accepts nothing proves nothing"


@pytest.mark.parametrize("drafter", DRAFTERS[1:])
def test_same_seed_same_text(llms: dict[str, LLM], drafter: str) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, seed=3)
    plain = [o.token_ids for o in llms["none"].generate(PROMPTS, params)]
    assert [o.token_ids for o in llms[drafter].generate(PROMPTS, params)] == plain
    assert [llms[drafter].generate(p, params)[0].token_ids for p in PROMPTS] == plain, "alone as in a batch"


@pytest.mark.parametrize("draft_tokens", [1, 7])
def test_the_draft_length_does_not_change_seeded_text(llms: dict[str, LLM], draft_tokens: int) -> None:
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=8)
    first = llms["none"]
    other = LLM(first.target, "ngram", tokenizer=first.tokenizer, draft_tokens=draft_tokens)
    assert other.generate(PROMPTS[0], params)[0].token_ids == first.generate(PROMPTS[0], params)[0].token_ids


def test_streamed_pieces_are_the_text(llms: dict[str, LLM]) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True)
    whole = llms["none"].generate(PROMPTS[2], params)[0]
    events = list(llms["draft_model"].stream(PROMPTS[2], params))
    assert "".join(e.text for e in events) == whole.text
    assert [p.token_id for e in events for p in e.pieces] == whole.token_ids
    assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1) and events[-1].finish_reason == "length"


def test_streams_can_be_read_in_turns(llms: dict[str, LLM]) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=2, ignore_eos=True)
    llm = llms["ngram"]
    alone = [llm.generate(p, params)[0].text for p in PROMPTS[:2]]
    both = [llm.stream(p, params) for p in PROMPTS[:2]]
    texts = ["", ""]
    for pair in itertools.zip_longest(*both):
        for i, event in enumerate(pair):
            texts[i] += event.text if event else ""
    assert texts == alone


@pytest.mark.parametrize("drafter", ["none", "draft_model"])
def test_a_stop_string_ends_the_text_before_it(llms: dict[str, LLM], drafter: str) -> None:
    free = llms["none"].generate(PROMPTS[2], SamplingParams(max_tokens=40, temperature=1.0, seed=6, ignore_eos=True))[0]
    stop = free.text[len(free.text) // 2 :][:4]
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=6, ignore_eos=True, stop=(stop,))
    cut = llms[drafter].generate(PROMPTS[2], params)[0]
    assert cut.text == free.text[: free.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert cut.stats.generated == len(cut.token_ids)
    streamed = "".join(e.text for e in llms[drafter].stream(PROMPTS[2], params))
    assert streamed == cut.text


def test_closing_a_stream_frees_its_slot(llms: dict[str, LLM]) -> None:
    llm = llms["draft_model"]
    for _ in range(llm.max_rows + 2):
        stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=50, ignore_eos=True))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert len(llm.generate(PROMPTS[0], SamplingParams(max_tokens=5, ignore_eos=True))[0].token_ids) == 5


def test_stats_add_up(llms: dict[str, LLM]) -> None:
    first = llms["none"]
    llm = LLM(first.target, "suffix", tokenizer=first.tokenizer)
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=20, ignore_eos=True))
    stats = llm.stats()
    assert stats["requests"] == 3 and stats["generated"] == 60
    assert stats["accepted"] == sum(o.stats.accepted for o in outputs) == sum(stats["accepted_per_position"])
    assert stats["generated"] == 3 + stats["accepted"] + stats["rounds"]


def test_prompts_of_any_unicode(llms: dict[str, LLM]) -> None:
    for prompt in ["日本語 🙂", "\x00\x01", "\udcff\udc80 bytes", " "]:
        assert len(llms["ngram"].generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


def test_bad_input_is_one_clear_error(llms: dict[str, LLM], tmp_path: object) -> None:
    target, tokenizer = llms["none"].target, llms["none"].tokenizer
    with pytest.raises(InvalidRequest, match="empty"):
        llms["none"].generate("")
    with pytest.raises(InvalidRequest, match="context"):
        llms["none"].generate([[5] * 2040], SamplingParams(max_tokens=100))
    with pytest.raises(InvalidRequest, match="2 sampling params for 1 prompts"):
        llms["none"].generate("a", [SamplingParams()] * 2)
    with pytest.raises(InvalidRequest, match="draft_tokns.*did you mean 'draft_tokens'"):
        LLM(target, "ngram", tokenizer=tokenizer, drafter_options={"draft_tokns": 3})
    with pytest.raises(InvalidRequest, match="tokenizer"):
        LLM(target)
    with pytest.raises(InvalidRequest, match="tokenizer must be an outrider.*Tokenizer, got str"):
        LLM("embedded", tokenizer="gpt2")  # type: ignore[arg-type]
    with pytest.raises((CheckpointError, UnknownKind)):
        LLM(target, str(tmp_path), tokenizer=tokenizer)
    with pytest.raises(CheckpointError):
        LLM(str(tmp_path))


@pytest.mark.parametrize("given", [{"draft_tokens": 10**23}, {"drafter_options": {"draft_tokens": 99999999999}}])
def test_more_drafts_than_the_context_are_refused(llms: dict[str, LLM], given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="draft_tokens must be at most the target's context of 2048 tokens, got"):
        LLM(llms["none"].loaded, "suffix", **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": None}, "policy must be a name such as 'auto', got None"),
        ({"backend": 5}, "backend must be a name"),
        ({"guard": "no"}, "guard must be True or False, got 'no'"),
        ({"measure": "no"}, "measure must be True or False, got 'no'"),
        ({"max_rows": 10**9}, "max_rows must be at most 65536 requests that run together, got 1000000000"),
        ({"policy_options": [1]}, "policy_options must be a mapping"),
        ({"policy_options": {"draft_tokens": "3"}}, "draft_tokens must be a whole number of at least 0, got '3'"),
        ({"policy_options": {"draft_tokens": 10**30}}, "context of 2048 tokens"),
        ({"drafter_options": {"draft_tokens": 1.5}}, "draft_tokens must be a whole number of at least 0, got 1.5"),
        ({"drafter_options": {"min_survival": "0.5"}}, "'suffix': min_survival must be of type float, got '0.5'"),
        ({"drafter_options": {"calibration": 3}}, "calibration must be a directory with a calibration.json, got 3"),
        ({"drafter_options": {"min_match": True}}, "'suffix': min_match must be of type int, got True"),
    ],
)
def test_options_of_another_type_are_refused(llms: dict[str, LLM], given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        LLM(llms["none"].loaded, "suffix", **given)


def test_numbers_that_no_array_holds(llms: dict[str, LLM]) -> None:
    with pytest.raises(InvalidRequest, match="top_k must be a whole number from 0 to 2147483648"):
        SamplingParams(top_k=2**64)
    params = SamplingParams(top_k=1 << 31, seed=-(10**30), draft_tokens=10**30, max_tokens=4, temperature=1.0)
    assert llms["ngram"].generate("one two one two", params)[0].stats.generated == 4
    for size in ("9" * 330, "8388608T"):
        with pytest.raises(InvalidRequest, match="kv_memory must be a size like 8G.*below 2.63"):
            memory_bytes("kv_memory", size)


@pytest.mark.parametrize(("name", "meant"), [("embeded", "embedded"), ("smollm", "smollm2"), ("SmolLM2", "smollm2")])
def test_a_model_of_nearly_a_known_name(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    monkeypatch.setattr("outrider.models.locations._fetch", _offline)
    with pytest.raises(CheckpointError, match=f"there is no model '{name}'; did you mean '{meant}'.*no network"):
        LLM(name)


@pytest.mark.parametrize(("name", "meant"), [("sufix", "suffix"), ("suffix:3", "suffix"), ("Dspark", "dspark")])
def test_a_drafter_of_nearly_a_known_name(
    llms: dict[str, LLM], monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setattr("outrider.models.locations._fetch", _offline)
    with pytest.raises(CheckpointError, match=f"there is no drafter '{name}'; did you mean '{meant}'.*no network"):
        LLM(llms["none"].loaded, name)


def _offline(name: str, patterns: object) -> None:
    raise CheckpointError("no network")


def test_names_that_are_empty_or_given_twice(llms: dict[str, LLM]) -> None:
    with pytest.raises(InvalidRequest, match="the name of a model is empty"):
        LLM("")
    for drafter in ("", ["suffix", ""], ["", ""]):
        with pytest.raises(InvalidRequest, match="the name of a drafter is empty"):
            LLM(llms["none"].loaded, drafter)
    with pytest.raises(InvalidRequest, match="the list of drafters is empty"):
        LLM(llms["none"].loaded, [])
    with pytest.raises(InvalidRequest, match="'auto' chooses one drafter by itself"):
        LLM(llms["none"].loaded, ["auto", "suffix"])
    with pytest.raises(InvalidRequest, match="'suffix' was given twice"):
        LLM(llms["none"].loaded, ["suffix", "suffix"])


def test_a_drafter_that_is_not_packaged_is_named(llms: dict[str, LLM]) -> None:
    with pytest.raises(InvalidRequest, match="embedded has no packaged mtp drafter: give the directory.*draft_model,"):
        LLM(llms["none"].loaded, "mtp")
    with pytest.raises(InvalidRequest, match="this target has no packaged eagle3 drafter.*no packaged drafters"):
        LLM(llms["none"].target, "eagle3", tokenizer=llms["none"].tokenizer)


def test_a_draft_model_with_another_vocabulary_is_refused(tiny_model_dir: object) -> None:
    with pytest.raises(IncompatibleDrafter, match="vocabulary"):
        LLM(drafter=str(tiny_model_dir))


@pytest.mark.skipif(native is None, reason="the compiled core is not built")
@pytest.mark.parametrize(("temperature", "rule"), [(0.0, "coupled"), (0.8, "coupled"), (1.0, "block")])
def test_drafting_in_one_call_gives_the_same_drafts(temperature: float, rule: str) -> None:
    plain = LLM(drafter="none", backend="native")
    at_once, step_by_step = plain.with_drafter("draft_model"), plain.with_drafter("draft_model")
    assert at_once.drafter._draft_loop is not None  # type: ignore[attr-defined]
    step_by_step.drafter._draft_loop = None  # type: ignore[attr-defined]
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=2, rule=rule, ignore_eos=True)  # type: ignore[arg-type]
    one, other = (llm.generate(PROMPTS, params) for llm in (at_once, step_by_step))
    assert [o.token_ids for o in one] == [o.token_ids for o in other]
    assert [o.stats.accepted_per_position for o in one] == [o.stats.accepted_per_position for o in other]
    assert sum(o.stats.accepted for o in one) > 0


@pytest.mark.skipif(native is None, reason="the compiled core is not built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculative_text_is_bit_for_bit_the_plain_text_in_every_precision(dtype: str, temperature: float) -> None:
    plain = LLM(drafter="none", dtype=dtype, backend="native")
    params = SamplingParams(max_tokens=48, temperature=temperature, seed=5, ignore_eos=True)
    expected = [plain.generate(prompt, params)[0].token_ids for prompt in PROMPTS]
    for drafter in DRAFTERS[1:]:
        outputs = plain.with_drafter(drafter).generate(PROMPTS, params)
        assert [o.token_ids for o in outputs] == expected, drafter


@pytest.mark.parametrize("said", [None, [3, 4]])
def test_the_tokenizers_end_counts_where_the_model_names_none(said: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        kept = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**kept, "eos_token_id": said}))
    llm = LLM(directory, "none")
    assert llm.target.spec.eos_token_ids == (llm.tokenizer.eos_token_ids if said is None else (3, 4))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_keys_and_values_in_a_dtype_that_is_not_kept(backend: str) -> None:
    with pytest.raises(InvalidRequest, match="'int4'"):
        LLM("embedded", "none", backend=backend, kv_dtype="int4", measure=False)
