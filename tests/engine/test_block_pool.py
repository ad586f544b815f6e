"""The block pool: all or nothing, no block twice, and an integrity check that sees every kind of damage."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import IntegrityError
from engine.block_pool import BlockPool


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_block_is_taken_for_every_begun_block_size(num_tokens: int, num_blocks: int) -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    assert pool.num_blocks_for(num_tokens) == num_blocks
    assert pool.allocate("a", num_tokens)
    assert (len(pool.table("a")), pool.num_free_blocks) == (num_blocks, 8 - num_blocks)


def test_a_table_grows_at_its_end_and_keeps_what_it_has() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    pool.allocate("a", 4)
    pool.allocate("b", 4)
    before = pool.table("a")
    assert pool.allocate("a", 12)
    assert pool.table("a")[:1] == before
    assert set(pool.table("a")).isdisjoint(pool.table("b"))


def test_asking_for_less_than_the_table_covers_changes_nothing() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    pool.allocate("a", 8)
    assert pool.allocate("a", 1)
    assert len(pool.table("a")) == 2


def test_a_growth_that_does_not_fit_takes_nothing() -> None:
    pool = BlockPool(num_blocks=3, block_size=4)
    pool.allocate("a", 4)
    assert not pool.allocate("a", 13)
    assert (len(pool.table("a")), pool.num_free_blocks) == (1, 2)


def test_freeing_twice_gives_back_once() -> None:
    pool = BlockPool(num_blocks=3, block_size=4)
    pool.allocate("a", 8)
    assert [pool.free("a"), pool.free("a")] == [2, 0]
    assert pool.num_free_blocks == 3
    assert pool.table("a") == ()


def test_retired_blocks_are_handed_out_only_after_reclaim() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    pool.allocate("a", 8)
    assert pool.retire("a") == 2
    assert not pool.allocate("b", 1)
    pool.check_integrity(())
    assert pool.reclaim() == 2
    assert pool.allocate("b", 8)


calls = st.lists(st.tuples(st.sampled_from(["allocate", "free", "retire"]), st.sampled_from("abc"), st.integers(0, 20)))


@given(calls=calls, num_blocks=st.integers(1, 8), block_size=st.integers(1, 4))
def test_no_sequence_of_calls_loses_or_doubles_a_block(
    calls: list[tuple[str, str, int]], num_blocks: int, block_size: int
) -> None:
    pool = BlockPool(num_blocks, block_size)
    held: dict[str, int] = {}
    for call, request_id, num_tokens in calls:
        if call == "allocate":
            need = max(held.get(request_id, 0), -(-num_tokens // block_size))
            fits = need - held.get(request_id, 0) <= pool.num_free_blocks
            assert pool.allocate(request_id, num_tokens) == fits
            held[request_id] = need if fits else held.get(request_id, 0)
        elif call == "free":
            assert pool.free(request_id) == held.pop(request_id, 0)
        else:
            assert pool.retire(request_id) == held.pop(request_id, 0)
        pool.check_integrity(held)
        assert {r: len(pool.table(r)) for r in held} == held
        assert pool.num_free_blocks + pool.num_retired_blocks + sum(held.values()) == num_blocks


def test_equal_calls_give_equal_blocks() -> None:
    tables = []
    for _ in range(2):
        pool = BlockPool(num_blocks=6, block_size=1)
        for request_id, num_tokens in [("a", 2), ("b", 2), ("c", 1)]:
            pool.allocate(request_id, num_tokens)
        pool.free("a")
        pool.allocate("c", 4)
        tables.append(pool.table("c"))
    assert tables[0] == tables[1]


def _lose(pool: BlockPool) -> None:
    pool._empty.pop()


def _free_while_held(pool: BlockPool) -> None:
    pool._empty.append(pool.table("a")[0])


def _free_twice(pool: BlockPool) -> None:
    pool._empty[0] = pool._empty[1]


def _hold_twice(pool: BlockPool) -> None:
    pool._tables["b"] = pool.table("a")


def _invent(pool: BlockPool) -> None:
    pool._empty[0] = pool.num_blocks


def _retire_while_free(pool: BlockPool) -> None:
    pool._retired.append(pool._empty[0])


@pytest.mark.parametrize("damage", [_lose, _free_while_held, _free_twice, _hold_twice, _invent, _retire_while_free])
def test_integrity_check_sees(damage: Callable[[BlockPool], None]) -> None:
    pool = BlockPool(num_blocks=6, block_size=4)
    pool.allocate("a", 8)
    pool.check_integrity({"a", "b"})
    damage(pool)
    with pytest.raises(IntegrityError):
        pool.check_integrity({"a", "b"})


def test_integrity_check_sees_blocks_of_a_request_that_is_gone() -> None:
    pool = BlockPool(num_blocks=6, block_size=4)
    pool.allocate("a", 8)
    with pytest.raises(IntegrityError, match="2 blocks are held for a, which is gone"):
        pool.check_integrity({"b"})
