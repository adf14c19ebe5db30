"""Many readers of one engine: late, interleaved, closed, interrupted, in threads; and requests that cannot run."""

from __future__ import annotations

import gc
import threading
from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import interrupted, interrupted_runs
from test_block_cache import check_balance
from test_engine import DRAFT_TABLE, PROMPTS, TABLE, MarkovDrafter

from outrider import LLM, SamplingParams
from outrider.engine.engine import Engine
from outrider.errors import InvalidRequest, OutriderError
from outrider.models.toy import ToyTarget
from outrider.scheduling.fixed import FixedPolicy
from outrider.types import StepRecord

FREE = {"ignore_eos": True}


@pytest.fixture
def llm() -> LLM:
    first = _loaded()
    return first.with_drafter("suffix", draft_tokens=3)


def _loaded(cache: list[LLM] = []) -> LLM:  # noqa: B006 (one target for all tests of this file)
    if not cache:
        cache.append(LLM(drafter="none"))
    return cache[0]


def params(tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, **{**FREE, **more})


# ------------------------------------------------------------------------------------------------ readers


def test_a_stream_that_is_read_late_ends_and_has_its_own_text(llm: LLM) -> None:
    alone = "".join(e.text for e in llm.stream("def f(", params(4)))
    late = llm.stream("def f(", params(4))
    llm.generate(["x"], params(40))
    events = list(late)
    assert sum(len(e.pieces) for e in events) == 4 and "".join(e.text for e in events) == alone
    assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + ["length"]


def test_stats_count_each_request_once_however_streams_are_read(llm: LLM) -> None:
    one, other = llm.stream("def f(", params(4)), llm.stream("x", params(40))
    next(other)
    list(one)
    list(other)
    assert list(one) == [] and list(other) == []
    stats = llm.stats()
    assert (stats["requests"], stats["generated"]) == (2, 44)


def test_a_late_reader_sees_whole_characters_and_the_stop_string(llm: LLM) -> None:
    text = llm.generate("Once upon a time", params(40, temperature=1.0, seed=6))[0].text
    stop = text[len(text) // 2 :][:3]
    wanted = params(40, temperature=1.0, seed=6, stop=(stop,))
    expected = llm.generate("Once upon a time", wanted)[0]
    run = llm.run("Once upon a time", wanted)
    llm.generate("x", params(60))
    assert "".join(e.text for e in run.events()) == expected.text == text[: text.index(stop)]
    assert run.output().token_ids == expected.token_ids


def test_a_stream_that_is_closed_or_dropped_before_its_first_event_leaves_nothing(llm: LLM) -> None:
    closed = llm.stream("abc", params(2000 - 3))
    closed.close()  # type: ignore[attr-defined]
    dropped = llm.stream("abc", params(50))
    del dropped
    gc.collect()
    assert not llm.engine.busy
    assert llm.stats()["requests"] == 0


def test_events_that_are_read_twice_are_cancelled_when_both_are_dropped(llm: LLM) -> None:
    run = llm.run("abc", params(12))
    first, second = run.events(), run.events()
    next(first)
    del first
    assert sum(len(event.pieces) for event in second) == 12
    assert run.output().finish_reason == "length"
    run = llm.run("abc", params(50))
    streams = [run.events(), run.events()]
    del streams
    gc.collect()
    assert not llm.engine.busy and run.output().finish_reason == "cancelled"


def test_the_output_of_a_run_is_its_whole_answer(llm: LLM) -> None:
    """Whether its events were read or not; it had been called cancelled, and was empty."""
    expected = llm.generate("abc", params(12))[0]
    run = llm.run("abc", params(12))
    events = run.events()
    next(events)
    for output in (run.output(), llm.run("abc", params(12)).output()):
        assert (output.text, output.finish_reason) == (expected.text, "length")
    assert len(list(events)) > 0


def test_a_longer_context_grows_the_cache_of_the_same_engine() -> None:
    """Also while another request runs: its text goes on as if nothing had happened."""
    llm = _loaded().with_drafter("ngram")
    llm = LLM(llm.loaded, "ngram", capacity=64)
    engine = llm.engine
    expected = llm.with_drafter("none").generate("def f(", params(50, temperature=1.0, seed=3))[0].token_ids
    stream = llm.stream("def f(", params(50, temperature=1.0, seed=3))
    first = [next(stream)]
    long = llm.generate([[5] * 61], params(60))[0]
    assert len(long.token_ids) == 60 and llm.engine is engine
    assert [p.token_id for e in [*first, *stream] for p in e.pieces] == expected


def test_threads_share_an_engine(llm: LLM) -> None:
    prompts = ["def read(", "Once upon", "Question: 3 + 4?", "x = ["]
    wanted = [params(24, temperature=1.0, seed=i) for i in range(4)]
    expected = [llm.generate(p, w)[0].token_ids for p, w in zip(prompts, wanted, strict=True)]
    found: dict[int, list[list[int]]] = {i: [] for i in range(4)}
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for turn in range(3):
                if turn % 2:
                    found[i].append([p.token_id for e in llm.stream(prompts[i], wanted[i]) for p in e.pieces])
                else:
                    found[i].append(llm.generate(prompts[i], wanted[i])[0].token_ids)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors and not llm.engine.busy
    assert all(found[i] == [expected[i]] * 3 for i in range(4))


# ------------------------------------------------------------------------------------------------ bad requests


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"logit_bias": {999999: 1}}, "logit_bias names token 999999"),
        ({"logit_bias": {7: float("nan")}}, "logit_bias"),
        ({"logit_bias": {7: 1e39}}, "logit_bias"),
        ({"logit_bias": {7.5: 1.0}}, "logit_bias"),
        ({"temperature": float("inf")}, "temperature"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"ignore_eos": "no"}, "ignore_eos"),
    ],
)
def test_a_bad_request_is_refused_when_it_is_submitted(llm: LLM, bad: dict[str, Any], word: str) -> None:
    expected = llm.generate("def f(", params(12))[0].text
    open_one = llm.stream("def f(", params(12))
    first = next(open_one)
    with pytest.raises(InvalidRequest, match=word):
        llm.stream("y", SamplingParams(**bad))
    assert first.text + "".join(e.text for e in open_one) == expected


def test_a_bias_against_every_token_is_refused(llm: LLM) -> None:
    everything = {i: float("-inf") for i in range(llm.target.spec.vocab_size)}
    with pytest.raises(InvalidRequest, match="forbids every token"):
        llm.generate("y", SamplingParams(logit_bias=everything))


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 0.0])
def test_a_temperature_that_is_zero_in_float32_is_greedy(llm: LLM, temperature: float) -> None:
    greedy = llm.generate("def f(", params(8))[0].token_ids
    assert llm.generate("def f(", params(8, temperature=temperature, seed=1))[0].token_ids == greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_options_that_overflow_fail_their_own_request_alone(llm: LLM, temperature: float) -> None:
    expected = llm.generate("def f(", params(12))[0].text
    bad = params(12, repetition_penalty=1e-45, temperature=temperature)
    good, broken = llm.run("def f(", params(12)), llm.run("def f(", bad)
    with pytest.raises(InvalidRequest, match="repetition_penalty=1e-45"):
        list(broken.events())
    assert "".join(e.text for e in good.events()) == expected


@pytest.mark.parametrize("more", [{}, {"top_k": 3}, {"min_p": 0.5}, {"top_p": 0.5, "seed": 1}, {"rule": "coupled"}])
def test_a_bias_that_a_temperature_makes_too_large_is_sampled_with(llm: LLM, more: dict[str, Any]) -> None:
    """1e30 / 1e-8 / 1e-3 is infinite in float32; with truncation it had ended the process."""
    wanted = params(4, temperature=1e-3, logit_bias={5: 1e30}, repetition_penalty=1e-8, **more)
    assert llm.generate([5, 6, 5, 6], wanted)[0].token_ids == [5, 5, 5, 5]


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_refused_under_every_rule(temperature: float, rule: str) -> None:
    table = torch.randn(5, 5)
    table[3, 2] = torch.nan
    target = ToyTarget(table)
    policy = FixedPolicy.from_config(FixedPolicy.Config(draft_tokens=0))
    engine = Engine(target, MarkovDrafter(DRAFT_TABLE, 0), policy, max_rows=4, capacity=64)
    wanted = SamplingParams(max_tokens=30, temperature=temperature, rule=rule)  # type: ignore[arg-type]
    bad = engine.submit([3], wanted, 0)
    good = engine.submit([0], SamplingParams(max_tokens=1), 0)
    engine.wait([good])
    assert len(good.output) == 1
    with pytest.raises(OutriderError, match="NaN or infinite after 1 tokens"):
        engine.wait([bad])
    assert not engine.busy


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
@pytest.mark.parametrize("row", [[0, torch.inf, 0, 0, 0], [0, torch.nan, 0, 0, 0]])
@pytest.mark.parametrize("more", [{}, {"logprobs": 5}])
def test_drafts_that_lead_to_such_logits_fail_their_own_request(
    row: list[float], rule: str, more: dict[str, Any]
) -> None:
    """Also where the core cannot read the drafter's distribution: a token past the vocabulary was sampled."""
    table = TABLE.float()
    table[:, 3] += 2
    table[3] = torch.tensor(row)
    engine = drafting_engine(table, 3)
    wanted = SamplingParams(max_tokens=40, temperature=0.5, rule=rule, **more)  # type: ignore[arg-type]
    bad = engine.submit([1], wanted, 5)
    good = engine.submit([0], SamplingParams(max_tokens=2, logit_bias={3: -1e9}), 0)
    engine.wait([good])
    with pytest.raises(OutriderError, match="NaN or infinite after"):
        engine.wait([bad])
    assert max(bad.history) < 5 and not engine.busy


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5, "seed": 5}, {"temperature": 1.0, "seed": 8, "top_p": 0.9}]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_drafts_change_nothing_of_a_text_that_such_logits_end(value: float, options: dict[str, Any]) -> None:
    """Nor do they end it: plain decoding never sees what follows a draft that is not accepted, or a text's end."""
    table = TABLE.float()
    table[:, 3] += 1
    table[3, 2] = value
    ended = set()
    for length in range(1, 12):
        wanted = SamplingParams(max_tokens=length, **options)
        found = []
        for drafts in (0, 3):
            engine = drafting_engine(table, drafts)
            requests = [engine.submit([start], wanted, wanted.seed or 0) for start in (0, 1, 2)]
            for request in requests:
                with suppress(OutriderError):
                    engine.wait([request])
            found.append([(request.output, request.finish_reason, str(request.error)) for request in requests])
        assert found[0] == found[1]
        ended |= {reason for _, reason, _ in found[0]}
    assert "length" in ended and ("error" in ended or value == 3e38)


def drafting_engine(table: torch.Tensor, drafts: int) -> Engine:
    policy = FixedPolicy.from_config(FixedPolicy.Config(draft_tokens=drafts))
    return Engine(ToyTarget(table), MarkovDrafter(DRAFT_TABLE, drafts), policy, max_rows=4, capacity=64)


# ------------------------------------------------------------------------------------------------ python callers


def test_what_is_clearly_a_prompt_is_taken(llm: LLM) -> None:
    ids = llm.encode("def f(")
    expected = llm.generate("def f(", params(6))[0].token_ids
    rows = np.array([ids, ids])
    for prompts in (
        ids,
        tuple(ids),
        np.array(ids),
        torch.tensor(ids),
        rows,
        torch.tensor(rows),
        [np.array(ids)],
        "def f(",
        np.array(["def f(", "def f("]),
        np.array(["def f("], object),
        [iter(ids)],
    ):
        outputs = llm.generate(prompts, params(6, stop=None))  # type: ignore[arg-type]
        assert all(o.token_ids == expected for o in outputs)
    assert llm.generate([]) == []
    assert [p.token_id for e in llm.stream(map(int, ids), params(6)) for p in e.pieces] == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prompt",
    [
        [1.5, 2.0],
        [[1.5]],
        [None],
        7,
        [b"x"],
        {"a": 1},
        {1, 2},
        [[True, "x"]],
        bytearray(b"x"),
        torch.ones(3, device="meta"),
    ],
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequest):
        llm.generate(prompt, params(4))


def test_a_stream_shared_by_threads_gives_each_event_once(llm: LLM) -> None:
    expected = llm.generate("def f(", params(40))[0].token_ids
    stream, seen = llm.stream("def f(", params(40)), []
    threads = [threading.Thread(target=lambda: seen.extend(stream)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(len(event.pieces) for event in seen) == 40
    assert sorted(p.token_id for event in seen for p in event.pieces) == sorted(expected)


@pytest.mark.parametrize(
    "wrong", [{"model": None}, {"model": 3}, {"drafter": None}, {"drafter": 3}, {"drafter_options": [1]}]
)
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        LLM(**({"model": _loaded().loaded, "drafter": "ngram"} | wrong))


def test_wrong_params_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="SamplingParams"):
        llm.generate("x", {"max_tokens": 3})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ interrupts


def _toy(rows: int = 3, chunk: int = 4, memory: int | None = None, **options: Any) -> Engine:
    """``memory``: 8 bytes a token."""
    policy = FixedPolicy.from_config(FixedPolicy.Config(draft_tokens=3))
    drafter = MarkovDrafter(DRAFT_TABLE, 3)
    target = ToyTarget(TABLE, **options) if memory is None else ToyTarget(TABLE, block=1, **options)
    return Engine(target, drafter, policy, max_rows=rows, capacity=64, chunk=chunk, memory=memory)


TEXT = SamplingParams(max_tokens=12, temperature=1.0, seed=9)


def _finish(engine: Engine, requests: list[Any]) -> list[list[int]]:
    engine.wait(requests)
    return [r.output for r in requests]


@pytest.mark.parametrize("stride", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_line_of_a_step_loses_nothing(stride: int) -> None:
    """The texts, the counts and the memory afterwards are those of a run that was not interrupted."""
    wanted, prompts = SamplingParams(max_tokens=7, temperature=1.0, seed=9), PROMPTS[:3]
    whole = _toy()
    expected = _finish(whole, [whole.submit(p, wanted, 9, i) for i, p in enumerate(prompts)])

    def begin() -> tuple[Engine, list[Any]]:
        engine = _toy()
        return engine, [engine.submit(p, wanted, 9, i) for i, p in enumerate(prompts)]

    for line, engine, requests in interrupted_runs(begin, 5, stride, lines=1500):
        assert _finish(engine, requests) == expected, f"interrupted at line {line}"
        assert not engine.busy and not engine.drafter.seen  # type: ignore[attr-defined]
        assert engine.cache.free_blocks == engine.cache.pool.count  # type: ignore[attr-defined]
        check_balance(engine.cache)
        assert engine.totals[0] == len(prompts)
        assert engine.totals[1].generated == sum(map(len, expected))


def test_an_interrupted_generate_leaves_a_working_engine(llm: LLM) -> None:
    expected = llm.generate("def f(", params(20))[0].token_ids
    for line in (5, 60, 130, 400, 777, 1500):
        with interrupted(line):
            llm.generate(["def f(", "x"], params(20))
        gc.collect()
        assert llm.generate("def f(", params(20))[0].token_ids == expected
        assert not llm.engine.busy


def test_a_text_goes_on_after_an_interrupted_step_with_what_it_held_back() -> None:
    """Text that may be the beginning of a stop string, and the grouping of bytes into characters."""
    llm = _loaded()
    texts = [piece.text for event in llm.stream("def f(", params(24)) for piece in event.pieces]
    whole = "".join(texts)
    for steps in range(1, 8):
        seam = "".join(texts[:steps])[-4:] + whole[:4]  # is no part of the text
        wanted = params(24, stop=(whole[12:24], seam))
        request = llm.engine.submit(llm.tokenizer.encode("def f("), wanted, 0)
        for _ in range(steps):
            llm.engine.step()
        llm.engine._whole = False  # as an interrupt leaves it
        llm.engine.wait([request])
        assert "".join(event.text for event in request.events) == whole[:12]
        assert (request.finish_reason, request.finisher.stop_string) == ("stop", whole[12:24])


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("room", [30, 47, 80])
def test_rows_that_are_preempted_are_computed_again_and_lose_nothing(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _toy()
    expected = _finish(plain, [plain.submit(p, TEXT, 9, i) for i, p in enumerate(PROMPTS)])
    preempted: list[int] = []
    engine = _toy(memory=8 * room)
    keep = engine._preempt
    monkeypatch.setattr(engine, "_preempt", lambda r: (preempted.append(r.number), keep(r)))
    assert _finish(engine, [engine.submit(p, TEXT, 9, i) for i, p in enumerate(PROMPTS)]) == expected
    assert bool(preempted) == (room < 60)
    check_balance(engine.cache)


def test_observers_see_every_step_as_it_was_committed() -> None:
    class Watch:
        def __init__(self) -> None:
            self.records: list[StepRecord] = []

        def step(self, record: StepRecord) -> None:
            self.records.append(record)

    engine, watch = _toy(), Watch()
    engine.observers.append(watch)
    requests = [engine.submit(p, TEXT, 9, i) for i, p in enumerate(PROMPTS)]
    outputs = _finish(engine, requests)
    for request, output in zip(requests, outputs, strict=True):
        rows = [row for record in watch.records for row in record.rows if row.request == request.number]
        assert [t for row in rows for t in row.committed] == output
        assert [row.first for row in rows] == [True] + [False] * (len(rows) - 1)
        assert sum(row.accepted for row in rows) == request.stats.accepted
        assert sum(row.verified for row in rows) == request.stats.drafted
        assert all(row.accepted <= row.verified <= row.drafted <= row.limit for row in rows)


@pytest.mark.parametrize("prompts", [[[[1, 2], [3]]], np.array(5), [np.array(5.0)]])
def test_prompts_of_odd_shapes_are_refused(prompts: Any, llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="token ids"):
        llm.generate(prompts, params(1))


def test_numbers_too_large_for_a_float_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="temperature must be between"):
        SamplingParams(temperature=10**400)
    with pytest.raises(InvalidRequest, match="logit_bias"):
        SamplingParams(logit_bias={7: 10**400})  # type: ignore[arg-type]


def test_options_that_are_whole_numbers_are_sampled_with(llm: LLM) -> None:
    """top_p=1 beside top_k was an array of integers, which the native core does not take."""
    for whole, exact in (
        ({"top_p": 1, "top_k": 5}, {"top_p": 1.0, "top_k": 5}),
        ({"min_p": 1}, {"min_p": 1.0}),
        ({"top_p": np.float32(1), "top_k": np.int8(5)}, {"top_p": 1.0, "top_k": 5}),
    ):
        for rule in ("rejection", "block"):
            assert len(llm.generate("def f(", params(6, temperature=1, rule=rule, **whole))[0].token_ids) == 6
        found = llm.generate("def f(", params(6, temperature=1, seed=3, **whole))[0].token_ids
        assert found == llm.generate("def f(", params(6, temperature=1.0, seed=3, **exact))[0].token_ids


@pytest.mark.parametrize(
    "odd",
    [{"top_p": Fraction(10**400)}, {"min_p": -Fraction(10**400)}, {"stop": np.array(1)}, {"stop": torch.tensor(1)}],
)
def test_odd_numbers_are_refused_by_name(odd: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(odd))):
        SamplingParams(**odd)


@pytest.mark.parametrize("name", ["capacity", "max_rows", "draft_tokens"])
@pytest.mark.parametrize("value", [-1, 2.5, "3", True])
def test_sizes_that_are_no_whole_numbers_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} must be a whole number of at least"):
        LLM(_loaded().loaded, "suffix", **{name: value})


def test_no_capacity_is_not_the_default_one() -> None:
    with pytest.raises(InvalidRequest, match="capacity must be a whole number of at least 1, got 0"):
        LLM(_loaded().loaded, "suffix", capacity=0)


def test_a_dtype_that_is_no_name_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="unknown dtype torch.float32; did you mean 'float32'"):
        LLM(dtype=torch.float32)  # type: ignore[arg-type]


def test_an_interrupt_after_the_last_commit_leaves_no_row(llm: LLM) -> None:
    """The request has finished, and its step was interrupted before the request left."""

    class Interrupts:
        def step(self, record: StepRecord) -> None:
            if finished():
                raise KeyboardInterrupt

    def finished() -> bool:  # but not retired
        return any(r.finish_reason is not None for r in llm.engine._requests.values())

    llm.observers.append(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        llm.generate("def f(", params(4))
    llm.observers.clear()
    assert not llm.engine.busy and not llm.engine.admission.running
    assert llm.stats()["requests"] == 1


def test_a_run_that_is_dropped_unread_leaves_nothing(llm: LLM) -> None:
    run = llm.run("abc", params(50))
    del run
    gc.collect()
    assert not llm.engine.busy
    assert len(list(llm.run("abc", params(5)).events())) > 0
