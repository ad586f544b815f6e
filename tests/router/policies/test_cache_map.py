"""What the router knows of caches is what workers told, bounded, and looked up in few steps."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from core.messages import CacheChanged
from router.policies.cache_map import MAX_PROBES, CacheMap, bits_of

ALL = (1 << 64) - 1
CHAIN = [bytes([i]) * 32 for i in range(200)]


def depths(caches: CacheMap, hashes: list[bytes], enough: int = 99) -> dict[str, int]:
    """Blocks that each worker is said to have."""
    found: dict[str, int] = {}
    for num_blocks, mask in caches.match(hashes, ALL, ALL, enough):
        for bit in bits_of(mask):
            found.setdefault(caches.name(bit), num_blocks)
    return found


class Model(RuleBasedStateMachine):
    """A few workers with prefixes of one chain, against plain sets. Blocks go from the end, as pools let them go."""

    def __init__(self) -> None:
        super().__init__()
        self.caches = CacheMap(1000)
        self.held: dict[str, int] = {}
        self.num_names = 0

    @precondition(lambda self: len(self.held) < 4)
    @rule(num_blocks=st.integers(0, 12))
    def come(self, num_blocks: int) -> None:
        name = f"w{self.num_names}"
        self.num_names += 1
        self.held[name] = num_blocks
        self.caches.apply(name, CacheChanged(tuple(CHAIN[:num_blocks]), cleared=True))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), num_blocks=st.integers(0, 12))
    def change(self, data: st.DataObject, num_blocks: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        before, self.held[name] = self.held[name], num_blocks
        self.caches.apply(name, CacheChanged(tuple(CHAIN[before:num_blocks]), tuple(CHAIN[num_blocks:before])))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[name]
        self.caches.forget(name)

    @invariant()
    def each_worker_has_what_it_told(self) -> None:
        told = {name: self.caches.depth(self.caches.bit(name), CHAIN[:12]) for name in self.held}
        assert told == self.held

    @invariant()
    def a_match_never_says_too_much_and_finds_the_deepest(self) -> None:
        found = depths(self.caches, CHAIN[:12])
        wanted = {name: count for name, count in self.held.items() if count}
        assert found.keys() == wanted.keys()
        assert all(found[name] <= wanted[name] for name in found)
        assert max(found.values(), default=0) == max(wanted.values(), default=0)


def test_workers_come_tell_and_go_in_any_order() -> None:
    run_state_machine_as_test(Model, settings=settings(max_examples=60, stateful_step_count=20, deadline=None))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=4, unique=True))
def test_a_match_tells_a_few_workers_apart_to_within_the_probes(counts: list[int]) -> None:
    caches = CacheMap(1000)
    for i, count in enumerate(counts):
        caches.apply(f"w{i}", CacheChanged(tuple(CHAIN[:count])))
    found = depths(caches, CHAIN)
    assert max(found.values()) == max(counts)
    assert all(found[f"w{i}"] <= count for i, count in enumerate(counts))


class CountingDict(dict[bytes, int]):
    num_gets = 0

    def get(self, key: bytes, default: int = 0) -> int:  # type: ignore[override]
        self.num_gets += 1
        return super().get(key, default)


def test_a_match_looks_up_few_blocks_however_long_the_prompt_and_however_many_the_workers() -> None:
    caches, long = CacheMap(100_000), [i.to_bytes(32, "big") for i in range(8192)]
    for i in range(60):
        caches.apply(f"w{i}", CacheChanged(tuple(long[: 130 * (i + 1)])))
    counting = CountingDict(caches._holders)
    caches._holders = counting  # type: ignore[assignment]
    caches.match(long, ALL, ALL, 99)
    assert counting.num_gets <= 14 + MAX_PROBES


def test_memory_is_bounded_and_the_latest_are_kept() -> None:
    caches = CacheMap(10)
    caches.apply("w", CacheChanged(tuple(CHAIN[:30])))
    assert len(caches) == 10
    assert caches.depth(caches.bit("w"), CHAIN[20:30]) == 10


def test_bits_of_workers_that_are_gone_are_used_again_once_nothing_has_them() -> None:
    caches = CacheMap(100)
    for life in range(50):
        caches.apply(f"w{life}", CacheChanged(tuple(CHAIN[:20]), cleared=True))
        assert depths(caches, CHAIN[:20]) == {f"w{life}": 20}
        caches.forget(f"w{life}")
    assert len(caches._names) < 6


def test_entries_of_a_worker_that_is_gone_are_swept_up() -> None:
    caches = CacheMap(1000)
    caches.apply("gone", CacheChanged(tuple(CHAIN[:100])))
    caches.forget("gone")
    for digest in CHAIN[100:106]:
        caches.apply("there", CacheChanged((digest,)))
    assert len(caches) == 6


def test_a_block_that_was_removed_twice_or_never_told_is_no_harm() -> None:
    caches = CacheMap(100)
    caches.apply("w", CacheChanged(removed=(CHAIN[0],)))
    caches.apply("w", CacheChanged((CHAIN[0],)))
    for _ in range(2):
        caches.apply("w", CacheChanged(removed=(CHAIN[0],)))
    assert depths(caches, CHAIN[:1]) == {}
