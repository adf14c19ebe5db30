"""KV caches in blocks: any history leaves contents exact and counts balanced, and shared blocks are as good as new."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import instruction_sets, layer, random_weights, stack
from torch import Tensor

from outrider.backends.native import NativeBackend, available
from outrider.backends.reference import ReferenceBackend
from outrider.errors import CacheFull, InvalidRequest
from outrider.kv_cache.block_pool import BlockPool, digests
from outrider.kv_cache.gathered import GatheredCache
from outrider.models.toy import ToyTarget
from outrider.types import KVCache, PagedCache, PagedTarget, RaggedBatch

native = pytest.mark.skipif(not available(), reason="the compiled core is not built")
WIDTH, SIZE, SLOTS, BLOCKS = 5, 4, 3, 9
TABLE = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def check_balance(cache: Any) -> None:
    """Every block is held by as many slots as its count says, and idle, free and held ones are all there are."""
    pool: BlockPool = cache.pool
    tables = [slot.table for slot in cache._slots if slot is not None]
    held = Counter(block for table in tables for block in table)
    used = len(pool._holders)
    assert [pool.holders(block) for block in range(used)] == [held[block] for block in range(used)]
    idle, free = set(pool._idle), set(pool._free)
    assert len(free) == len(pool._free) and not idle & free and not (idle | free) & set(held)
    assert len(idle) + len(free) + len(held) == used <= pool.count
    assert pool._names == {block: name for name, blocks in pool._named.items() for block in blocks}
    assert len({pool._names[block] for block in idle}) == len(idle), "no content is kept twice"
    assert idle <= set(pool._names) and not free & set(pool._names)
    assert pool.available == pool.count - len(held)


# ------------------------------------------------------------------------------------------------ any history


class History:
    """A cache of tokens beside plain lists of what each slot must hold."""

    def __init__(self) -> None:
        self.target = ToyTarget(TABLE, block=SIZE)
        self.cache: Any = self.target.paged_cache(SLOTS, SIZE * BLOCKS, memory=8 * SIZE * BLOCKS)
        assert isinstance(self.cache, PagedCache) and self.cache.pool.count == BLOCKS
        self.slots: dict[int, list[int]] = {}

    def do(self, action: str, number: int, tokens: list[int]) -> None:
        cache = self.cache
        if action == "open" and len(self.slots) < SLOTS:
            slot = cache.open()
            count = min(cache.match(tokens), max(0, len(tokens) - number % 2))
            if count:
                cache.adopt(slot, tokens, count)
            self.slots[slot] = tokens[:count]
        if not self.slots:
            return
        slot = sorted(self.slots)[number % len(self.slots)]
        held = self.slots[slot]
        if action == "append":
            before = [list(table.table) for table in cache._slots if table is not None]
            if cache.reserve(slot, len(held) + len(tokens)):
                self.target.forward(RaggedBatch.pack([tokens], [len(held)], [slot]), cache)
                held += tokens
            else:
                assert [table.table for table in cache._slots if table is not None] == before, "all or nothing"
        elif action == "rewind":
            del held[number % (len(held) + 1) :]
            cache.rewind(torch.tensor([slot]), torch.tensor([len(held)]))
        elif action == "publish":
            cache.publish(slot, held + tokens)  # the engine knows tokens that the cache does not hold yet
            assert cache.match(held) == len(held) // SIZE * SIZE
        elif action == "release":
            cache.release(slot)
            del self.slots[slot]

    def check(self) -> None:
        check_balance(self.cache)
        for slot, tokens in self.slots.items():
            assert int(self.cache.lengths[slot]) == len(tokens)
            state = self.cache._slots[slot]
            tail = state.table[len(tokens) // SIZE :][:1] if len(tokens) % SIZE else []
            if state.room > len(tokens):  # what is written next belongs to this slot alone, under no name
                assert all(self.cache.pool.holders(b) == 1 and not self.cache.pool.is_named(b) for b in tail)
            stored = torch.cat([self.cache.keys[0][b, 0, :, 0] for b in state.table]) if state.table else torch.zeros(0)
            assert stored[: len(tokens)].tolist() == tokens


ACTIONS = st.tuples(
    st.sampled_from(["open", "append", "append", "rewind", "publish", "release"]),
    st.integers(0, 40),
    # Few different tokens, so that sequences begin alike.
    st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=2 * SIZE + 2),
)


@settings(max_examples=300)
@given(st.lists(ACTIONS, max_size=40))
def test_any_history_keeps_contents_and_counts(actions: list[tuple[str, int, list[int]]]) -> None:
    history = History()
    for action, number, tokens in actions:
        history.do(action, number, tokens)
        history.check()
    for slot in list(history.slots):
        history.cache.release(slot)
    check_balance(history.cache)
    assert history.cache.free_blocks == BLOCKS


@pytest.mark.parametrize("seed", range(4))
def test_long_histories_keep_contents_and_counts(seed: int) -> None:
    """Short ones hardly come to a pool that is full, or to a slot that begins inside a block which others hold."""
    history, rng = History(), random.Random(seed)
    for _ in range(1500):
        action = rng.choice(["open", "append", "append", "append", "rewind", "publish", "publish", "release"])
        history.do(action, rng.randrange(40), rng.choices([0, 0, 0, 0, 0, 1], k=rng.randint(1, 2 * SIZE + 2)))
        history.check()


def test_a_sequence_is_found_while_any_slot_holds_it() -> None:
    history, text = History(), [0] * 2 * SIZE
    for number in range(2):  # each reads the text by itself
        history.do("open", 0, [1])
        history.do("append", number, text)
    for number in range(2):
        history.do("publish", number, [])
    history.do("rewind", 2 * SIZE + 2, [])  # the first slot, to one token
    history.do("append", 0, [1])
    history.check()
    assert history.cache.match(text) == 2 * SIZE, "the other slot still holds it"
    history.do("release", 1, [])
    assert history.cache.match(text) == 2 * SIZE, "idle blocks are found too"


def test_the_check_of_the_balance_sees_a_lost_and_a_doubled_block() -> None:
    """Negative control."""
    for spoil in (
        lambda pool: pool._free.pop(),
        lambda pool: pool._free.append(0),
        lambda pool: pool._holders.__setitem__(0, 2),
    ):
        history = History()
        history.do("open", 0, [1])
        history.do("append", 0, [1, 2, 3])
        history.do("release", 0, [])
        history.do("open", 0, [1])
        history.do("append", 0, [1])
        history.do("open", 0, [1])
        history.do("append", 1, [1])
        history.do("release", 1, [])
        check_balance(history.cache)
        spoil(history.cache.pool)
        with pytest.raises(AssertionError):
            check_balance(history.cache)


def test_idle_blocks_go_from_the_ends_of_the_oldest_sequences() -> None:
    history = History()
    for tokens in ([0] * 12, [1] * 12, [2] * 12):  # three blocks each, nine in all
        history.do("open", 0, tokens)
        history.do("append", 0, tokens)
        history.do("publish", 0, tokens)
        history.do("release", 0, tokens)
    assert [history.cache.match([t] * 12) for t in range(3)] == [12, 12, 12]
    history.do("open", 0, [0])
    assert history.cache.match([0] * 12) == 12
    history.do("append", 0, [3])
    assert [history.cache.match([t] * 12) for t in range(3)] == [8, 12, 12]
    history.do("append", 0, [3] * 12)
    assert [history.cache.match([t] * 12) for t in range(3)] == [0, 8, 12]


def test_names_depend_on_every_token_before_and_on_those_ahead() -> None:
    plain = list(digests([1, 2, 3, 4, 5], 2))
    assert len(plain) == 2 and list(digests([1, 2, 3, 4, 5], 2, after=plain[:1])) == plain[1:]
    assert list(digests([9, 2, 3, 4], 2))[1] != plain[1]
    assert len(list(digests([1, 2, 3, 4], 2, ahead=1))) == 1
    ahead = list(digests([1, 2, 3, 4, 5], 2, ahead=1))
    assert len(ahead) == 2 and list(digests([1, 2, 3, 4, 6], 2, ahead=1))[0] == ahead[0]
    assert list(digests([1, 2, 9, 4, 5], 2, ahead=1))[0] != ahead[0]


def test_no_more_idle_blocks_are_kept_than_was_said() -> None:
    pool = BlockPool(8, 4, retained=2)
    blocks = [pool.take() for _ in range(5)]
    for block, name in zip(blocks, digests(list(range(20)), 4), strict=True):
        pool.name(block, name)
    for block in reversed(blocks):
        pool.drop(block)
    assert pool.idle == 2 and len(pool.find(list(range(20)))) == 2 and pool.available == 8


# ------------------------------------------------------------------------------------------------ keys and values

TEXT = [(7 * i * i + i) % 203 for i in range(150)]


def run(made: Any, cache: KVCache, slot: int, tokens: list[int], start: int) -> Tensor:
    """Logits of every token."""
    logits: Tensor = made.forward(RaggedBatch.pack([tokens], [start], [slot]), cache).logits
    return logits


def shared_runs(made: PagedTarget, kv_dtype: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same last 22 tokens four times: fresh, after a taken prefix, after a rewind into it, and the first again."""
    cache: Any = made.paged_cache(4, 256, kv_dtype=kv_dtype)
    first = cache.open()
    fresh = run(made, cache, first, TEXT, 0)[128:]
    cache.publish(first, TEXT)
    other = TEXT[:128] + [5] * 22
    second = cache.open()
    cache.adopt(second, other, cache.match(other))
    assert int(cache.lengths[second]) == 128
    taken = run(made, cache, second, TEXT[128:], 128)
    third = cache.open()
    cache.adopt(third, TEXT, 100)  # ends in a block that the others hold
    different = run(made, cache, third, [9] * 50, 100)
    assert not torch.equal(different[28:], fresh)
    cache.rewind(torch.tensor([third]), torch.tensor([70]))
    rewound = run(made, cache, third, TEXT[70:], 70)[58:]
    cache.rewind(torch.tensor([first]), torch.tensor([128]))
    again = run(made, cache, first, TEXT[128:], 128)
    for slot in (first, second, third):
        check_balance(cache)
        cache.release(slot)
    check_balance(cache)
    return fresh, taken, rewound, again


@native
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float32", "auto"), ("bfloat16", "auto"), ("int8", "int8")])
def test_shared_blocks_give_the_bits_of_a_fresh_computation(isa: str, dtype: str, kv_dtype: str) -> None:
    config = stack(layer(), layer(window=70, num_kv_heads=1))
    made = NativeBackend(isa).load(config, random_weights(config), dtype)
    fresh, *others = shared_runs(made, kv_dtype)
    assert torch.isfinite(fresh).all()
    for other in others:
        assert torch.equal(other, fresh)


def test_shared_blocks_of_the_reference_backend_are_exact() -> None:
    config = stack(layer(), layer(window=70, num_kv_heads=1))
    made = ReferenceBackend().load(config, random_weights(config), "float64")
    fresh, *others = shared_runs(made)
    contiguous = made.new_cache(1, 150)
    plain = run(made, contiguous, contiguous.open(), TEXT, 0)[128:]
    for other in (fresh, *others):
        assert torch.allclose(other, plain, rtol=1e-9, atol=1e-9)


@native
@pytest.mark.parametrize("isa", instruction_sets())
def test_keys_and_values_of_8_bits_are_near_those_of_16(isa: str) -> None:
    """Two heads of unequal size per layer, a window, and a width that is no multiple of a panel."""
    config = stack(layer(head_dim=80, num_kv_heads=4), layer(window=50))
    made = NativeBackend(isa).load(config, random_weights(config), "bfloat16")
    logits = {}
    for kv_dtype in ("auto", "int8"):
        cache = made.paged_cache(2, 256, kv_dtype=kv_dtype)
        cache.open()
        slot = cache.open()
        whole = run(made, cache, slot, TEXT, 0)
        cache.rewind(torch.tensor([slot]), torch.tensor([0]))
        pieces = [run(made, cache, slot, TEXT[at : at + 7], at) for at in range(0, 150, 7)]
        assert torch.equal(torch.cat(pieces), whole), "bits do not depend on the chunking"
        logits[kv_dtype] = whole
    difference = (logits["int8"] - logits["auto"]).norm() / logits["auto"].norm()
    assert 0 < float(difference) < 0.02


@native
def test_a_memory_bound_is_kept_and_too_long_sequences_are_refused() -> None:
    config = stack()
    made = NativeBackend().load(config, random_weights(config), "float32")
    page = made.paged_cache(1, 64).block_bytes
    assert made.paged_cache(1, 64, kv_dtype="int8").block_bytes < page / 3, "a quarter, and a scale for each position"
    cache = made.paged_cache(2, 1000, memory=3 * page + 5)
    assert cache.capacity == 192 and cache.free_blocks == 3
    first, second = cache.open(), cache.open()
    assert cache.reserve(first, 128) and cache.reserve(second, 64)
    assert not cache.reserve(first, 129) and not cache.reserve(first, 193)
    with pytest.raises(CacheFull, match="0 of 3 blocks of 64 tokens are free"):
        run(made, cache, second, list(range(65)), 0)
    cache.release(second)
    assert cache.reserve(first, 129)
    with pytest.raises(InvalidRequest, match="did you mean 'int8'"):
        made.paged_cache(1, 8, kv_dtype="int")
    with pytest.raises(InvalidRequest, match="keeps keys and values in its own dtype"):
        ReferenceBackend().load(config, random_weights(config), "float32").paged_cache(1, 8, kv_dtype="int8")


def test_a_gathered_cache_is_a_paged_one() -> None:
    cache = GatheredCache(2, 10, [((1, 4, 1), (0,))], torch.int64, size=4)
    assert isinstance(cache, PagedCache) and cache.capacity == 10 and cache.pool.count == 6


@pytest.mark.parametrize("held", [True, False])
def test_a_block_that_was_published_is_not_written_by_a_slot_that_begins_inside_it(held: bool) -> None:
    target, tokens = ToyTarget(torch.zeros(5, 5), block=4), [1, 2, 3, 4, 0, 2, 4, 1, 3]
    cache: Any = target.paged_cache(2, 16)
    size = cache.block_tokens
    first = cache.open()
    cache.require(first, 0, 2 * size)
    target.forward(RaggedBatch.pack([tokens[: 2 * size]], [0], [first]), cache)
    cache.publish(first, tokens)
    shared = list(cache._slots[first].table)
    if not held:
        cache.release(first)
    second = cache.open()
    cache.adopt(second, tokens, 2 * size - 1)
    assert cache.reserve(second, 2 * size + 1)
    own = cache._slots[second].table
    assert own[0] == shared[0], "the block before it is shared"
    if held:
        assert own[1] != shared[1], "a copy, as the first slot reads the block"
    assert cache.match(tokens) == (2 if held else 1) * size, "what may be overwritten is found no more"


def test_a_copy_of_a_shared_block_needs_a_free_one() -> None:
    target, tokens = ToyTarget(torch.zeros(5, 5), block=4), [1, 2, 3, 4, 0, 2, 4, 1, 3]
    cache: Any = target.paged_cache(2, 12, memory=8 * 4 * 3)
    first = cache.open()
    cache.require(first, 0, 8)
    target.forward(RaggedBatch.pack([tokens[:8]], [0], [first]), cache)
    cache.publish(first, tokens)
    second = cache.open()
    cache.adopt(second, tokens, 7)
    assert not cache.reserve(second, 9), "one block is free: for the copy, or for what follows it"
    assert cache.reserve(second, 8) and cache.free_blocks == 0
