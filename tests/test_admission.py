"""Requests come, wait, share prefixes, are preempted and cancelled: nothing is lost, and every text is the solo one."""

from __future__ import annotations

import random
import resource
from time import perf_counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_block_cache import check_balance, native
from test_engine import DRAFT_TABLE, TABLE, MarkovDrafter, V
from test_native import layer, random_weights, stack

from outrider.backends.native import NativeBackend
from outrider.config import SamplingParams
from outrider.engine.admission import OLDEST, Admission, Queue
from outrider.engine.engine import Engine
from outrider.engine.finisher import Finisher
from outrider.engine.memory import LEAST, available_bytes, default_memory
from outrider.engine.request import Request
from outrider.errors import InvalidRequest, OutriderError
from outrider.models.decoder import DecoderTarget
from outrider.models.toy import ToyTarget
from outrider.registry import find
from outrider.scheduling.fixed import FixedPolicy
from outrider.types import Drafter, TargetModel, TargetSpec


def make_engine(target: TargetModel, drafter: Drafter, **options: Any) -> Engine:
    policy = FixedPolicy.from_config(FixedPolicy.Config(draft_tokens=drafter.block))
    return Engine(target, drafter, policy, **options)


def toy(block: int = 4, blocks: int | None = None, rows: int = 3, drafts: int = 3, **options: Any) -> Engine:
    """``blocks``: memory for that many; a token takes 8 bytes."""
    memory = None if blocks is None else 8 * block * blocks
    drafter = MarkovDrafter(DRAFT_TABLE, drafts) if drafts else find("drafter", "none")()
    options = {"max_rows": rows, "capacity": 64, "chunk": 8, "beside": 5, "memory": memory, **options}
    return make_engine(ToyTarget(TABLE, block=block), drafter, **options)


def solo(prompt: list[int], params: SamplingParams) -> list[int]:
    """The text of a request that is alone in an engine of its own, without drafts."""
    engine = toy(drafts=0, rows=1)
    request = engine.submit(prompt, params, params.seed or 0)
    engine.wait([request])
    return request.output


# ------------------------------------------------------------------------------------------------ the queue


def waiting(number: int, priority: int = 0) -> Request:
    params = SamplingParams(priority=priority)
    return Request(number, 0, params, 0, Finisher(frozenset()), [1], 1, pending=1)


def drained(queue: Queue, count: int) -> list[int]:
    numbers = []
    for _ in range(count):
        request = queue.first()
        assert request is not None
        queue.take(request)
        numbers.append(request.number)
    return numbers


def test_the_queue_goes_by_priority_then_by_arrival() -> None:
    queue = Queue()
    for number, priority in enumerate([0, 5, 0, -3, 5, -3]):
        queue.add(waiting(number, priority))
    assert len(queue) == 6 and [r.number for r in queue] == [3, 5, 0, 2, 1, 4]
    assert drained(queue, 6) == [3, 5, 0, 2, 1, 4] and queue.first() is None and not queue


def test_nobody_waits_for_ever() -> None:
    """A steady stream of urgent requests, always more of them than leave."""
    queue, number = Queue(), 3
    for old in range(3):
        queue.add(waiting(old, 100))
    left: list[int] = []
    while not {0, 1, 2} <= set(left):
        for _ in range(2):
            queue.add(waiting(number, -100))
            number += 1
        left += drained(queue, 1)
        assert len(left) <= 3 * OLDEST, "the oldest leave in turn"
    urgent = [n for n in left if n > 2]
    assert urgent == sorted(urgent) and len(urgent) >= (OLDEST - 1) * 3


def test_a_request_that_had_a_row_is_the_next_of_its_priority() -> None:
    queue = Queue()
    for number in range(3):
        queue.add(waiting(number))
    first = queue.first()
    assert first is not None
    queue.take(first)
    queue.restore(first)
    assert drained(queue, 3) == [0, 1, 2]


def test_finished_requests_leave_the_queue_and_its_memory() -> None:
    queue = Queue()
    requests = [waiting(number, number % 3) for number in range(1000)]
    for request in requests:
        queue.add(request)
    for request in requests[:-5]:
        request.finish_reason = "cancelled"
        queue.discard(request)
    assert len(queue) == 5 and sum(map(len, queue._of.values())) < 100
    assert drained(queue, 5) == [996, 999, 997, 995, 998]


@pytest.mark.parametrize("value", [-101, 101, 1.5, "high", True])
def test_odd_priorities_are_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="priority must be"):
        SamplingParams(priority=value)


def test_urgent_requests_are_served_first() -> None:
    engine = toy(rows=1)
    params = [SamplingParams(max_tokens=3, priority=p) for p in (0, 0, -1, 7)]
    requests = [engine.submit([1], one, 0) for one in params]
    order: list[int] = []
    while engine.busy:
        engine.step()
        order += [r.number for r in requests if r.finish_reason and r.number not in order]
    assert order == [2, 0, 1, 3]


# ------------------------------------------------------------------------------------------------ chunks and memory


def test_a_long_prompt_stalls_no_stream_for_more_than_one_chunk() -> None:
    engine = toy(rows=4, drafts=0, chunk=8, beside=3)
    stream = engine.submit([1], SamplingParams(max_tokens=40), 0)
    engine.step()
    longs = [engine.submit([2] * 20, SamplingParams(max_tokens=1), 0) for _ in range(2)]
    before = len(stream.output)
    steps = 0
    while any(r.finish_reason is None for r in longs):
        pending = sum(r.pending for r in longs if not r.output)
        engine.step()
        steps += 1
        assert len(stream.output) == before + steps, "a stream gets a token in every step"
        read = pending - sum(r.pending for r in longs if not r.output)
        assert read <= 3 + 1 or steps == 1
    assert steps >= 40 // 3 - 1


def test_prompts_alone_take_whole_chunks() -> None:
    engine = toy(rows=2, drafts=0, chunk=8, beside=3)
    request = engine.submit([2] * 24, SamplingParams(max_tokens=1), 0)
    for pending in (16, 8, 0):
        engine.step()
        assert request.pending == pending or request.output


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    engine = toy(block=4, blocks=5)
    with pytest.raises(
        InvalidRequest, match=r"has 12 tokens and max_tokens is 9: .* enough for 20 tokens; .*kv_memory"
    ):
        engine.submit([1] * 12, SamplingParams(max_tokens=9), 0)
    request = engine.submit([1] * 12, SamplingParams(max_tokens=8), 0)
    engine.wait([request])
    assert len(request.output) == 8


def test_admission_waits_for_memory_and_asks_once() -> None:
    engine = toy(block=4, blocks=6, rows=4, drafts=0)
    first = engine.submit([1] * 14, SamplingParams(max_tokens=4), 0)
    second = engine.submit([2] * 14, SamplingParams(max_tokens=2), 0)
    asked = []
    keep = engine._open
    engine._open = lambda request: (asked.append(request.number), keep(request))[1]  # type: ignore[method-assign]
    while first.finish_reason is None:
        engine.step()
        assert second.slot < 0
    engine.wait([second])
    assert asked == [0, 1, 1] and len(second.output) == 2
    check_balance(engine.cache)


def test_a_row_is_admitted_where_the_others_may_still_grow_by_a_block() -> None:
    engine = toy(block=4, blocks=6, rows=2, drafts=0, chunk=64)
    first = engine.submit([1] * 7, SamplingParams(max_tokens=3), 0)  # two blocks, soon three
    second = engine.submit([2] * 15, SamplingParams(max_tokens=1), 0)  # four
    engine.step()
    assert first.slot >= 0 and second.slot < 0
    engine.wait([second])
    assert len(first.output) == 3


def test_the_least_urgent_and_latest_row_is_preempted() -> None:
    engine = toy(block=4, blocks=9, rows=3, drafts=0, chunk=64)
    preempted: list[int] = []
    keep = engine._preempt
    engine._preempt = lambda request: (preempted.append(request.number), keep(request))[1]  # type: ignore[method-assign]
    asked = [engine.submit([1] * 7, SamplingParams(max_tokens=12, priority=p), 0) for p in (1, 0, 1)]
    while asked[1].finish_reason is None:
        engine.step()
    assert preempted[0] == 2 and 1 not in preempted
    engine.wait(asked)


def test_available_memory_is_the_least_of_what_is_said(tmp_path: Any) -> None:
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     600 kB\n")
    assert available_bytes(tmp_path) == 600 << 10
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) == 600 << 10
    (group / "memory.max").write_text("5000\n")
    assert available_bytes(tmp_path) == 4000
    memory = default_memory()
    assert memory is None or memory >= LEAST


# ------------------------------------------------------------------------------------------------ shared prefixes


def test_cached_tokens_are_counted_and_the_last_one_is_always_computed() -> None:
    engine = toy(block=4)
    prompt = [0, 1, 2, 3] * 4
    params = SamplingParams(max_tokens=3, temperature=1.0, seed=3)
    expected = solo(prompt, params)
    counts = []
    for text in (prompt, prompt, [*prompt, 1], prompt[:9] + [4, 4, 4], [4, *prompt]):
        request = engine.submit(text, params, 3)
        engine.wait([request])
        counts.append(request.stats.cached_tokens)
        if text == prompt:
            assert request.output == expected
    assert counts == [0, 15, 16, 8, 0]
    assert engine.totals[1].cached_tokens == sum(counts)
    engine.forget()
    request = engine.submit(prompt, params, 3)
    engine.wait([request])
    assert request.stats.cached_tokens == 0 and request.output == expected


def test_a_request_that_fails_leaves_what_others_have_published() -> None:
    table = TABLE.clone()
    table[3, 2] = torch.nan
    engine = make_engine(ToyTarget(table, block=4), find("drafter", "none")(), max_rows=2, capacity=64)
    prompt = [0, 1, 2, 4] * 3
    engine.wait([engine.submit(prompt, SamplingParams(max_tokens=1), 0)])
    with pytest.raises(OutriderError, match="NaN"):
        engine.wait([engine.submit([3], SamplingParams(max_tokens=1), 0)])
    again = engine.submit(prompt, SamplingParams(max_tokens=1), 0)
    engine.wait([again])
    assert again.stats.cached_tokens == 11


def test_a_conversation_goes_on_from_its_last_turn() -> None:
    """What was generated is shared too: the next turn's prompt holds it."""
    engine = toy(block=4, drafts=3)
    first = engine.submit([1, 2, 3], SamplingParams(max_tokens=22, temperature=1.0, seed=1), 1)
    engine.wait([first])
    following = [*first.history, 2, 2]
    params = SamplingParams(max_tokens=5, temperature=1.0, seed=2)
    second = engine.submit(following, params, 2)
    engine.wait([second])
    assert second.stats.cached_tokens == 24 and second.output == solo(following, params)


def test_rows_that_run_together_share_their_prefix() -> None:
    engine = toy(block=4, rows=3, chunk=64)
    prompt = [0, 1, 2, 3] * 4
    first = engine.submit([*prompt, 1], SamplingParams(max_tokens=30), 0)
    engine.step()
    others = [engine.submit([*prompt, t], SamplingParams(max_tokens=4), 0) for t in (2, 3)]
    engine.step()
    assert [r.stats.cached_tokens for r in others] == [16, 16] and first.finish_reason is None
    shared = {tuple(slot.table[:4]) for slot in engine.cache._slots if slot is not None}  # type: ignore[attr-defined]
    assert len(shared) == 1
    check_balance(engine.cache)
    engine.wait([first, *others])


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 3),  # steps before it arrives
        st.integers(0, 2),  # which prefix
        st.lists(st.integers(0, V - 1), min_size=1, max_size=6),  # what follows it
        st.integers(1, 9),  # max_tokens
        st.sampled_from([0.0, 1.0]),
        st.integers(-1, 1),  # priority
        st.one_of(st.none(), st.integers(0, 9)),  # cancelled after so many steps
    ),
    min_size=1,
    max_size=9,
)
PREFIXES: list[list[int]] = [[], [0, 1, 2, 3, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4]]


def play(engine: Engine, arrivals: list[Any], token: int = 1) -> list[tuple[Request, SamplingParams, bool]]:
    """Submit and cancel as the arrivals say, until all have finished."""
    played: list[tuple[Request, SamplingParams, bool]] = []
    cancels: list[list[Any]] = []
    queue = list(arrivals)
    wait = queue[0][0]
    while queue or engine.busy:
        while queue and wait <= 0:
            _, prefix, rest, budget, temperature, priority, cancelled = queue.pop(0)
            prompt = [t * token for t in PREFIXES[prefix] + rest]
            params = SamplingParams(max_tokens=budget, temperature=temperature, seed=len(prompt), priority=priority)
            request = engine.submit(prompt, params, len(prompt))
            played.append((request, params, cancelled is not None))
            if cancelled is not None:
                cancels.append([cancelled, request])
            wait = queue[0][0] if queue else 0
        wait -= 1
        engine.step()
        for entry in cancels:
            entry[0] -= 1
            if entry[0] == 0:
                engine.cancel(entry[1])
        if isinstance(engine.target, ToyTarget):
            check_balance(engine.cache)
    return played


@settings(max_examples=80)
@given(ARRIVALS, st.sampled_from([9, 12, 40]), st.integers(1, 4))
def test_any_history_of_requests_gives_the_solo_texts(arrivals: list[Any], blocks: int, rows: int) -> None:
    """Arrivals, shared prefixes, chunks, preemptions, priorities and cancellations, greedy and coupled."""
    engine = toy(block=3, blocks=blocks, rows=rows)
    for request, params, may_be_cut in play(engine, arrivals):
        text = solo(request.history[: request.prompt_length], params)
        assert request.finish_reason == "length" or may_be_cut
        assert request.output == text[: len(request.output)]
        assert may_be_cut or len(request.output) == len(text)
        assert request.stats.cached_tokens < request.prompt_length
    assert engine.cache.free_blocks == engine.cache.pool.count  # type: ignore[attr-defined]
    assert not engine.admission and not engine._requests and not engine.drafter.seen  # type: ignore[attr-defined]


NATIVE_CONFIG = stack(layer(), layer(window=70), vocab_size=203)


def native_target() -> DecoderTarget:
    backend = NativeBackend()
    made = backend.load(NATIVE_CONFIG, random_weights(NATIVE_CONFIG), "bfloat16")
    spec = TargetSpec("test", 203, 64, 2, 2048, torch.bfloat16, "test")
    return DecoderTarget(spec, made, backend)


@native
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@settings(max_examples=15)
@given(arrivals=ARRIVALS, blocks=st.sampled_from([4, 6, 30]))
def test_the_native_core_gives_the_solo_texts(kv_dtype: str, arrivals: list[Any], blocks: int) -> None:
    """The same with real keys and values, prefixes of several blocks, and another chunking."""
    arrivals = [(w, p, r * 9, n, t, q, c) for w, p, r, n, t, q, c in arrivals]
    target = native_target()
    page = target.paged_cache(1, 64, kv_dtype=kv_dtype).block_bytes
    draft = find("drafter", "suffix")
    engine = make_engine(
        target,
        draft(draft.Config(draft_tokens=4)),
        max_rows=3,
        capacity=256,
        chunk=40,
        beside=23,
        memory=page * blocks,
        kv_dtype=kv_dtype,
    )
    lonely = make_engine(target, find("drafter", "none")(), max_rows=1, capacity=256, kv_dtype=kv_dtype)
    PREFIXES[1:] = [[(7 * i * i + i) % 29 for i in range(70)], [(5 * i * i + i) % 29 for i in range(129)]]
    try:
        played = play(engine, arrivals, token=7)
    finally:
        PREFIXES[1:] = [[0, 1, 2, 3, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4]]
    for request, params, may_be_cut in played:
        alone = lonely.submit(request.history[: request.prompt_length], params, params.seed or 0)
        lonely.forget()
        lonely.wait([alone])
        assert alone.stats.cached_tokens == 0
        assert request.output == alone.output[: len(request.output)]
        assert may_be_cut or request.output == alone.output
    check_balance(engine.cache)
    assert engine.cache.free_blocks == engine.cache.pool.count  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ many requests


def test_a_step_costs_the_same_with_thousands_of_waiting_requests() -> None:
    """Bound: half as much again, and 50 microseconds; medians of 60 steps each."""

    def step_seconds(queued: int) -> float:
        engine = toy(rows=1, drafts=0, capacity=4096)
        engine.submit([1], SamplingParams(max_tokens=2000), 0)
        for _ in range(queued):
            engine.submit([1, 2], SamplingParams(max_tokens=2), 0)
        engine.step()
        seconds = []
        for _ in range(60):
            began = perf_counter()
            engine.step()
            seconds.append(perf_counter() - began)
        return sorted(seconds)[30]

    few, many = step_seconds(5), step_seconds(5000)
    assert many < 1.5 * few + 50e-6, f"{few * 1e6:.0f} us with 5 waiting, {many * 1e6:.0f} us with 5,000"


def test_admission_counts_rows_and_waiting_requests() -> None:
    admission = Admission(2, 8)
    for number in range(3):
        admission.waiting.add(waiting(number))
    admission.admit(lambda request: True)
    assert len(admission.running) == 2 and len(admission.waiting) == 1 and len(admission) == 3
    admission.preempt(admission.running[1])
    refused: list[int] = []
    admission.admit(lambda request: bool(refused.append(request.number)))
    admission.admit(lambda request: bool(refused.append(request.number)))
    assert refused == [1], "asked once, until memory is given back"
    admission.freed()
    admission.admit(lambda request: True)
    assert [r.number for r in admission.running] == [0, 1]


@pytest.mark.slow
def test_thousands_of_requests_with_random_cancellations_lose_and_double_nothing() -> None:
    """2,000 requests in random order, few different ones, in little memory; every text is the solo one."""
    draw = random.Random(5)
    engine = toy(block=3, blocks=12, rows=6)
    preempted: list[int] = []
    keep = engine._preempt
    engine._preempt = lambda r: (preempted.append(r.number), keep(r))[1]  # type: ignore[method-assign]
    texts: dict[tuple[Any, ...], list[int]] = {}
    live: list[tuple[Request, SamplingParams]] = []
    done: list[Request] = []
    submitted = 0
    while submitted < 2000 or engine.busy:
        for _ in range(draw.randrange(4)):
            if submitted < 2000:
                prompt = draw.choice(PREFIXES) + [draw.randrange(V) for _ in range(draw.randrange(1, 4))]
                params = SamplingParams(
                    max_tokens=draw.randrange(1, 8), temperature=draw.choice([0, 1]), seed=1, priority=draw.randrange(3)
                )
                live.append((engine.submit(prompt, params, 1, submitted), params))
                submitted += 1
        if live and draw.random() < 0.1:
            engine.cancel(draw.choice(live)[0])
        engine.step()
        for request, params in [pair for pair in live if pair[0].finish_reason]:
            prompt = request.history[: request.prompt_length]
            key = (*prompt, params.max_tokens, params.temperature)
            if key not in texts:
                texts[key] = solo(prompt, params)
            cut = request.finish_reason == "cancelled"
            assert request.output == (texts[key][: len(request.output)] if cut else texts[key])
            assert [p.token_id for e in request.events for p in e.pieces] == request.output
            assert sum(e.finish_reason is not None for e in request.events) == (not cut)
            done.append(request)
        live = [pair for pair in live if not pair[0].finish_reason]
    assert sorted(r.index for r in done) == list(range(2000)) and not live
    assert engine.totals[0] == sum(bool(r.output) for r in done)
    check_balance(engine.cache)
    assert engine.cache.free_blocks == 12 and len(preempted) > 50 and engine.totals[1].cached_tokens > 2000


@pytest.mark.slow
def test_memory_is_flat_over_a_hundred_thousand_requests() -> None:
    """The largest resident size of the process, after 5,000 and after 95,000 more."""
    engine = toy(block=3, blocks=64, rows=64, drafts=0)
    draw = random.Random(1)

    def serve(count: int) -> None:
        for _ in range(count // 500):
            prompts = [[draw.randrange(V) for _ in range(3)] for _ in range(500)]
            engine.wait([engine.submit(p, SamplingParams(max_tokens=1), 0) for p in prompts])

    serve(5000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    serve(95_000)
    assert engine.totals[0] == 100_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 << 10, "kilobytes"
    assert not engine._requests and not engine._cancelled and not engine._arrivals
    check_balance(engine.cache)
