"""Pieces of a ring never overlap, and none is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.ring import Ring

SIZE = 100


@given(st.lists(st.tuples(st.integers(1, SIZE + 5), st.integers(0, 5))))
def test_pieces_never_overlap_and_all_come_back(steps: list[tuple[int, int]]) -> None:
    """Each step takes a piece, then frees some of those that are held, in any order."""
    ring, held = Ring(SIZE), dict[int, int]()
    for num_bytes, num_freed in steps:
        offset = ring.take(num_bytes)
        if offset is not None:
            assert 0 <= offset <= SIZE - num_bytes
            assert all(offset + num_bytes <= start or start + size <= offset for start, size in held.items())
            held[offset] = num_bytes
        for start in list(held)[num_freed % 2 :: 2][:num_freed]:
            ring.free(start)
            del held[start]
        assert ring.num_bytes == sum(held.values())
    for start in held:
        ring.free(start)
    assert ring.take(SIZE) == 0


def test_pieces_that_come_and_go_in_turn_follow_each_other() -> None:
    ring = Ring(SIZE)
    assert [ring.take(30) for _ in range(4)] == [0, 30, 60, None]
    ring.free(0)
    assert [ring.take(30), ring.take(1)] == [0, None]
    ring.free(30)
    assert ring.take(30) == 30


def test_what_is_not_held_can_not_be_freed() -> None:
    ring = Ring(SIZE)
    assert ring.take(10) == 0
    ring.free(0)
    with pytest.raises(KeyError):
        ring.free(0)
