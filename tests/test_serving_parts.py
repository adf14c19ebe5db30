"""Parts of the server by themselves: what fields ask of the engine, its thread, finish reasons, counts and metrics."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from served import eventually

from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.serving.chat_run import ChatAnswer, Delta
from outrider.serving.engine_thread import MOST_FAILURES, Answer, EngineThread
from outrider.serving.fields import LONGEST_STOP, MOST_STOPS, SamplingFields, stop_strings
from outrider.serving.metrics import Metrics, _Drafts
from outrider.serving.service import Service, _seconds_saved
from outrider.serving.settings import ServerSettings
from outrider.serving.web import ApiError, sse
from outrider.types import Event, Piece, RequestStats, RowRecord, StepCost, StepRecord

PROMPT = [5, 6, 7]
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


# ------------------------------------------------------------------------------------------------ fields


def sampling(**fields: Any) -> SamplingParams:
    return SamplingFields(**fields).sampling({}, 9)


def test_every_field_of_sampling_reaches_the_engine() -> None:
    given: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.3,
        "frequency_penalty": 0.4, "seed": 3, "ignore_eos": True, "priority": -2,
    }  # fmt: skip
    made = sampling(**given, stop=["a", "b"], logit_bias={"4": 1.5}, outrider={"rule": "block", "draft_tokens": 2})
    assert {name: getattr(made, name) for name in given} == given and made.max_tokens == 9
    assert made.stop == ("a", "b") and made.logit_bias == ((4, 1.5),)
    assert (made.rule, made.draft_tokens, made.logprobs) == ("block", 2, None)
    assert sampling(stop="end").stop == ("end",)
    assert sampling().temperature == 1.0 and sampling(top_k=-1).top_k == 0


def test_the_models_own_defaults_are_taken_where_a_request_says_nothing() -> None:
    own = {"temperature": 0.6, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "max_length": 30.0}
    made = SamplingFields(top_p=0.7).sampling(own, 9)
    assert (made.temperature, made.top_p, made.top_k, made.min_p) == (0.6, 0.7, 20, 0.05)


@pytest.mark.parametrize("off", [{"off": True}, {"drafter": "none"}, {"policy": "none"}])
def test_speculation_is_switched_off(off: dict[str, Any]) -> None:
    assert sampling(outrider={**off, "draft_tokens": 3}).draft_tokens == 0
    assert sampling(outrider={"pieces": True}).logprobs == 0


def test_stop_strings_are_few_and_none_is_empty() -> None:
    for wrong in (["a"] * (MOST_STOPS + 1), [""], ["a" * (LONGEST_STOP + 1)]):
        with pytest.raises(ApiError, match="stop: got"):
            stop_strings("stop", wrong)


def test_an_event_ends_with_an_empty_line() -> None:
    assert sse({"a": "é\n"}) == 'data: {"a":"é\\n"}\n\n'.encode() and sse("[DONE]") == b"data: [DONE]\n\n"
    assert sse({}, "ping") == b"event: ping\ndata: {}\n\n"


# ------------------------------------------------------------------------------------------------ the engine's thread


def test_leaving_an_answer_cancels_it_and_its_end_is_told_once() -> None:
    told: list[Any] = []
    engine = LLM("embedded", "none").engine
    thread = EngineThread(engine, lambda answer, tokens, seconds: told.append(tokens), told.append)

    async def leave() -> Answer:
        thread.start(asyncio.get_running_loop())
        answer = thread.submit(PROMPT, LONG, 0)
        assert await answer.started(20)
        events = answer.events()
        await anext(events)
        await events.aclose()
        return answer

    answer = asyncio.run(leave())
    try:
        assert eventually(lambda: not thread.answers()) and answer.request.finish_reason == "cancelled"
        assert thread.unfinished == 0 and told[-1] is answer and told.count(answer) == 1
        assert sum(told[:-1]) == answer.request.stats.generated < LONG.max_tokens
        other = thread.submit(PROMPT, LONG, 0)
        thread.cancel_all("shutdown")
        assert eventually(lambda: other.request.finish_reason == "shutdown")
        last = thread.submit(PROMPT, LONG, 0)
    finally:
        thread.stop()
    assert last.request.finish_reason == "cancelled" and thread.unfinished == 0, "nothing runs on once it has stopped"


def test_steps_that_fail_one_after_the_other_end_what_runs_and_single_ones_nothing() -> None:
    engine = LLM("embedded", "none").engine
    advance, turns = engine.advance, iter([True, False] * MOST_FAILURES)

    def sometimes(idle: Any) -> None:
        if next(turns, False):
            raise RuntimeError("a step fails")
        advance(idle)

    engine.advance = sometimes  # type: ignore[method-assign]
    thread = EngineThread(engine)
    loop = asyncio.new_event_loop()
    thread.start(loop)
    try:
        for _ in range(MOST_FAILURES):
            one = thread.submit(PROMPT, SamplingParams(max_tokens=1, ignore_eos=True), 0)
            assert eventually(lambda one=one: one.ended) and one.request.finish_reason == "length"
        assert thread.healthy

        def always(idle: Any) -> None:
            raise RuntimeError("every step fails")

        engine.advance = always  # type: ignore[method-assign]
        lost = thread.submit(PROMPT, LONG, 0)
        assert eventually(lambda: lost.request.finish_reason is not None)
        assert not thread.healthy and "the engine failed" in str(lost.request.error)
    finally:
        thread.stop()
        loop.close()


# ------------------------------------------------------------------------------------------------ finish reasons


class Calls:
    """A reader of tools that finds what it is told to."""

    def __init__(self, fed: list[Any], last: tuple[str, list[Any]] = ("", []), complete: bool = False) -> None:
        self.fed, self.last, self.wanted, self.complete = fed, last, complete, False

    def feed(self, pieces: Any) -> Any:
        self.complete = self.wanted
        return self.fed.pop(0)

    def finish(self) -> Any:
        return self.last


def ended(reason: str, reader: Any = None, events: int = 2) -> tuple[list[Delta], str]:
    """The deltas and the finish reason of an answer of some events whose request ended so."""

    class Told:
        request = SimpleNamespace(finish_reason=reason)

        async def events(self) -> Any:
            for i in range(events):
                yield Event(f"t{i}", [Piece(i, f"t{i}", False, None, None)])

    service = SimpleNamespace(llm=SimpleNamespace(target=SimpleNamespace(spec=SimpleNamespace(eos_token_ids=()))))
    tools = None if reader is None else SimpleNamespace(reader=lambda: reader)
    choice = ChatAnswer(service, Told(), tools)  # type: ignore[arg-type]

    async def read() -> list[Delta]:
        return [delta async for delta in choice.deltas()]

    found = asyncio.run(read())
    assert found[-1].finish_reason == choice.finish_reason and all(d.finish_reason is None for d in found[:-1])
    return found, choice.finish_reason


def test_finish_reasons() -> None:
    assert ended("stop")[1] == "stop" and ended("length")[1] == "length"
    call: Any = object()
    assert ended("stop", Calls([("t", []), ("t", [])]))[1] == "stop"
    assert ended("stop", Calls([("", [call]), ("t", [])]))[1] == "tool_calls", "a call before the last event"
    assert ended("length", Calls([("", [call]), ("", [])]))[1] == "length", "cut off within a call"
    found, reason = ended("stop", Calls([("", []), ("", [])], ("held", [call])))
    assert reason == "tool_calls" and found[-2].text == "held" and found[-2].calls == [call]
    assert [d.text for d in ended("stop", Calls([("", []), ("", [])], ("held", [])))[0]][-2:] == ["held", ""]
    found, reason = ended("cancelled", Calls([("", [call]), ("", [])], complete=True))
    assert reason == "tool_calls" and len(found) == 2, "the one call that was asked for is there"


@pytest.mark.parametrize("reason", ["cancelled", "shutdown", "error"])
def test_an_answer_that_the_server_ended_is_no_whole_one(reason: str) -> None:
    with pytest.raises(ApiError, match="ended this answer early") as caught:
        ended(reason)
    assert caught.value.status == 503 and caught.value.retry_after


# ------------------------------------------------------------------------------------------------ counts


def answered(prompt: int, cached: int, saved: float | None, **stats: Any) -> Any:
    request = SimpleNamespace(prompt_length=prompt, stats=RequestStats(cached_tokens=cached, **stats))
    return SimpleNamespace(request=request, seconds_saved=saved)


def test_usage_counts_prompts_once_and_joins_positions() -> None:
    service: Any = SimpleNamespace(llm=SimpleNamespace(drafter_name="suffix"))
    service.speculative = lambda answers: Service.speculative(service, answers)
    one = {"rounds": 4, "drafted": 6, "accepted": 3, "generated": 8}
    positions = {"drafted_per_position": [4, 2], "accepted_per_position": [2, 1]}
    short = {"drafted_per_position": [1], "accepted_per_position": [1]}
    answers = [
        answered(10, 4, 0.25, **one, **positions),
        answered(10, 9, 0.5, generated=2, rounds=2, drafted=1, accepted=1, **short),
        answered(20, 1, -0.125, generated=5),
        answered(20, 19, 0.0, generated=5),
    ]
    usage = Service.usage(service, answers, 2)
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (30, 20, 50)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 5}
    made = usage["speculative"]
    assert made["drafted_per_position"] == [5, 2] and made["accepted_per_position"] == [3, 1]
    assert made["acceptance_length"] == round(1 + 4 / 6, 4) and made["milliseconds_saved"] == 625.0
    assert Service.usage(service, answers[:2])["prompt_tokens"] == 10
    unknown = Service.speculative(service, [*answers, answered(1, 0, None)])
    assert unknown["milliseconds_saved"] is None
    assert Service.speculative(service, answers[2:])["acceptance_length"] == 1.0


def test_time_saved_by_hand() -> None:
    """10 rounds of 2.5 drafts, 12 accepted: 12 passes of 10 ms less, each round 1 ms longer and 3 ms of drafting."""
    costs: Any = SimpleNamespace(
        verify=lambda tokens, rows, context: 0.010 + 0.0004 * (tokens - 1), draft=lambda rows, drafts: 0.001 * drafts
    )
    stats = RequestStats(rounds=10, drafted=25, accepted=12)
    request: Any = SimpleNamespace(stats=stats, history=[1] * 30)
    assert _seconds_saved(costs, request) == pytest.approx(12 * 0.010 - 10 * (0.001 + 0.002))
    request.stats = RequestStats(rounds=10)
    assert _seconds_saved(costs, request) == 0.0


def test_new_tokens_keep_to_the_limit_and_the_room() -> None:
    engine = SimpleNamespace(limit=300)
    service: Any = SimpleNamespace(
        settings=ServerSettings(max_new_tokens=50), llm=SimpleNamespace(engine=engine, capacity=200)
    )

    def room(prompt: int, asked: int | None) -> int:
        return Service.new_tokens(service, [0] * prompt, asked)

    assert room(100, 50) == 50 and room(100, None) == 50 and room(280, None) == 20
    for prompt, asked, param in ((100, 51, "max_tokens"), (280, 21, "max_tokens"), (300, 1, "prompt")):
        with pytest.raises(ApiError) as caught:
            room(prompt, asked)
        assert caught.value.param == param
    service.settings = ServerSettings()
    assert room(100, None) == 100, "what the memory is laid out for"
    assert room(150, None) == 150, "all the room, where that is little"


# ------------------------------------------------------------------------------------------------ metrics


def test_rounds_are_counted_from_steps() -> None:
    drafts = _Drafts()
    first = RowRecord(0, 0, 0, 0, 0, (), None, True)
    rows = (RowRecord(0, 3, 3, 3, 2, (1, 2, 3), None, False), RowRecord(1, 2, 2, 2, 0, (4,), None, False))
    plain = RowRecord(0, 0, 0, 0, 0, (1,), None, False)
    drafts.step(StepRecord((first,), StepCost(0.0, 0.5, 0.0, 1, 40, 0)))
    drafts.step(StepRecord(rows, StepCost(0.001, 0.01, 0.0005, 2, 7, 80)))
    drafts.step(StepRecord((plain,), StepCost(0.0, 0.008, 0.0005, 1, 1, 80)))
    assert (drafts.steps, drafts.rounds, drafts.drafts, drafts.verified, drafts.accepted) == (3, 3, 2, 5, 2)
    assert drafts.per_position == [1, 1]
    assert drafts.drafting_steps == 1 and drafts.drafting_seconds == [0.001, 0.01, 0.0005]
    assert drafts.plain_steps == 1 and drafts.plain_seconds == pytest.approx(0.0085)


def test_times_between_tokens_are_those_of_a_token() -> None:
    metrics = Metrics(LLM("embedded", "none").engine)
    answer: Any = SimpleNamespace(first_token=5.0, latest_token=5.0)
    metrics.tokens(answer, 1, 0.25)
    answer.latest_token = 6.0
    metrics.tokens(answer, 4, 1.0)
    page = metrics.text().decode()
    assert "outrider_time_to_first_token_seconds_count 1.0" in page
    assert "outrider_time_to_first_token_seconds_sum 0.25" in page
    assert "outrider_inter_token_latency_seconds_count 4.0" in page
    assert "outrider_inter_token_latency_seconds_sum 1.0" in page
    assert "outrider_generation_tokens_total 5.0" in page
