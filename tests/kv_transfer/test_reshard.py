"""Resharding plans against a reference that moves one element at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise, product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import TransferError
from core.kv_layout import KVLayout
from core.ticket import CommitRecord, Segment, SegmentRecord
from kv_transfer.reshard import Group, ReshardPlan, refusal

SIZES = (1, 2, 4, 8, 16)
HEADS = KVLayout("m", "f", num_layers=3, num_kv_heads=4, head_size=8, block_size=16, dtype="bfloat16")
LATENT = KVLayout("m", "f", num_layers=3, num_kv_heads=1, head_size=12, block_size=16, dtype="bfloat16", kind="latent")


def divides(num_kv_heads: int, tp_size: int) -> bool:
    return num_kv_heads % tp_size == 0 or tp_size % num_kv_heads == 0


def held(num_kv_heads: int, tp_size: int, rank: int) -> set[int]:
    """The KV heads of a rank: those of which a part would be its own, if heads could be cut."""
    start, end = rank * num_kv_heads, (rank + 1) * num_kv_heads  # in parts of a head, `tp_size` to each
    return {head for head in range(num_kv_heads) if head * tp_size < end and start < (head + 1) * tp_size}


@dataclass(frozen=True)
class Case:
    sender: Group
    receiver: Group
    num_skipped: int
    chunks: tuple[tuple[int, int], ...]
    """Tokens as they are computed, the skipped ones included."""
    max_cells: int

    @property
    def num_tokens(self) -> int:
        return self.chunks[-1][1]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    latent = draw(st.booleans())
    num_kv_heads = 1 if latent else draw(st.integers(1, 16))
    sizes = [size for size in SIZES if divides(num_kv_heads, size)]
    num_layers, dtype = draw(st.integers(1, 5)), draw(st.sampled_from(["float32", "bfloat16", "int8"]))
    shape = KVLayout("m", "f", num_layers, num_kv_heads, 4, 1, dtype, "latent" if latent else "heads")
    sender, receiver = (
        Group(replace(shape, block_size=draw(st.sampled_from([1, 2, 3, 16]))), draw(st.sampled_from(sizes)))
        for _ in range(2)
    )
    num_tokens = draw(st.integers(1, 9))
    cuts = sorted(draw(st.sets(st.integers(1, num_tokens), max_size=3)) | {0, num_tokens})
    num_skipped = draw(st.integers(0, num_tokens - 1))
    return Case(sender, receiver, num_skipped, tuple(pairwise(cuts)), draw(st.integers(num_kv_heads, 60)))


def segments(case: Case) -> list[Segment]:
    """All that leaves, in the order that layers and chunks are computed."""
    plan, num_layers = ReshardPlan(case.sender, case.receiver), case.sender.layout.num_layers
    return [
        segment
        for (start, end), layer, rank in product(case.chunks, range(num_layers), range(case.sender.tp_size))
        for segment in plan.outgoing(rank, layer, max(start, case.num_skipped), end, case.max_cells)
    ]


Cell = tuple[int, int, int]
"""layer, KV head, token"""
Cache = dict[tuple[int, int, int, int], Cell]
"""What a rank holds, by layer, block, offset and KV head."""


class Reference:
    """Caches of all ranks: a dict entry for each element, blocks handed out from the last to the first."""

    def __init__(self, group: Group, num_tokens: int, *, filled: bool) -> None:
        self.size, self.last = group.layout.block_size, num_tokens // group.layout.block_size
        self.heads = [held(group.layout.num_kv_heads, group.tp_size, rank) for rank in range(group.tp_size)]
        cells = list(product(range(group.layout.num_layers), range(group.layout.num_kv_heads), range(num_tokens)))
        self.ranks: list[Cache] = [
            {self.place(cell): cell for cell in cells if cell[1] in heads} if filled else {} for heads in self.heads
        ]

    def place(self, cell: Cell) -> tuple[int, int, int, int]:
        layer, head, token = cell
        return layer, self.last - token // self.size, token % self.size, head


def move(source: Reference, target: Reference, moved: Iterable[Segment]) -> None:
    """Every element by itself; a KeyError where the sender does not hold it, an assertion where it came before."""
    for s in moved:
        heads, tokens = range(s.kv_head_start, s.kv_head_end), range(s.token_start, s.token_end)
        for head, token in product(heads, tokens):
            cell, cache = (s.layer, head, token), target.ranks[s.receiver_rank]
            assert head in target.heads[s.receiver_rank]
            assert target.place(cell) not in cache
            cache[target.place(cell)] = source.ranks[s.sender_rank][source.place(cell)]


@given(cases())
def test_each_rank_gets_all_that_it_holds_exactly_once(case: Case) -> None:
    source = Reference(case.sender, case.num_tokens, filled=True)
    target = Reference(case.receiver, case.num_tokens, filled=False)
    move(source, target, segments(case))
    for heads, cache in zip(target.heads, target.ranks, strict=True):
        layers, tokens = range(case.sender.layout.num_layers), range(case.num_skipped, case.num_tokens)
        assert cache == {target.place(cell): cell for cell in product(layers, heads, tokens)}


@given(cases())
def test_no_segment_is_larger_than_a_message(case: Case) -> None:
    assert all(0 < segment.num_cells <= case.max_cells for segment in segments(case))


@pytest.mark.parametrize("num_kv_heads", range(1, 17))
def test_ranks_that_hold_the_same_head_send_the_same_but_for_one_layer(num_kv_heads: int) -> None:
    sizes = [size for size in SIZES if divides(num_kv_heads, size)]
    for num_layers, ours, theirs in product((1, 3, 8, 61), sizes, sizes):
        shape = replace(HEADS, num_kv_heads=num_kv_heads, num_layers=num_layers)
        sender, sent = Group(shape, ours), Counter[int]()
        for route in ReshardPlan(sender, Group(shape, theirs)).routes:
            sent[route.sender_rank] += len(route.layers) * (route.kv_head_end - route.kv_head_start)
        for first in range(0, ours, sender.num_replicas):
            loads = [sent[rank] for rank in range(first, first + sender.num_replicas)]
            assert max(loads) - min(loads) <= 1, (num_layers, ours, theirs, loads)


def test_equal_groups_send_from_rank_to_same_rank() -> None:
    for shape, size in product((HEADS, LATENT), SIZES):
        routes = ReshardPlan(Group(shape, size), Group(shape, size)).routes
        assert [(r.sender_rank, r.receiver_rank, r.layers) for r in routes] == [(r, r, (0, 1, 2)) for r in range(size)]


def test_replicas_take_turns_over_layers() -> None:
    plan = ReshardPlan(Group(LATENT, 2), Group(LATENT))
    sent = [list(plan.outgoing(rank, layer, 0, 5, 99)) for layer, rank in product(range(3), range(2))]
    assert sent == [
        [Segment(0, 0, 1, 0, 5, 0, 0)],
        [],
        [],
        [Segment(1, 0, 1, 0, 5, 1, 0)],
        [Segment(2, 0, 1, 0, 5, 0, 0)],
        [],
    ]


# ---- what can't be mapped


@pytest.mark.parametrize("num_kv_heads", range(1, 17))
def test_a_size_that_shares_no_heads_evenly_is_refused_on_either_side(num_kv_heads: int) -> None:
    for size in (0, 3, *SIZES):
        whole, group = (Group(replace(HEADS, num_kv_heads=num_kv_heads), tp_size) for tp_size in (1, size))
        possible = size > 0 and divides(num_kv_heads, size)
        for side, pair in (("sender", (group, whole)), ("receiver", (whole, group))):
            reason = f"tp_size: {size} on the {side}, num_kv_heads: {num_kv_heads}: one must divide the other"
            assert refusal(*pair) == (None if possible else reason)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fingerprint", "g"),
        ("num_layers", 4),
        ("num_kv_heads", 8),
        ("head_size", 16),
        ("dtype", "int8"),
        ("kind", "latent"),
    ],
)
def test_a_difference_of_the_models_is_refused_with_both_values(field: str, value: object) -> None:
    other = Group(replace(HEADS, **{field: value}), 2)  # type: ignore[arg-type]
    reason = f"{field}: {getattr(HEADS, field)} on one side, {value} on the other"
    assert refusal(Group(HEADS), other) == reason
    with pytest.raises(TransferError, match=reason) as caught:
        ReshardPlan(Group(HEADS), other)
    assert caught.value.reason == "layout_mismatch"


# ---- records


def record(sent: Iterable[Segment], num_tokens: int, num_skipped: int) -> CommitRecord:
    return CommitRecord(tuple(SegmentRecord(segment, 8, 0) for segment in sent), num_tokens, num_skipped)


@given(cases(), st.randoms(use_true_random=False))
def test_a_record_of_all_that_leaves_has_no_gap(case: Case, random: Random) -> None:
    sent = segments(case)
    random.shuffle(sent)
    plan = ReshardPlan(case.sender, case.receiver)
    assert plan.gap(record(sent, case.num_tokens, case.num_skipped)) is None
    assert all(plan.expects(segment) for segment in sent)


@given(cases(), st.data())
def test_any_harm_to_a_record_is_a_gap(case: Case, data: st.DataObject) -> None:
    sent = segments(case)
    i = data.draw(st.integers(0, len(sent) - 1))
    match data.draw(st.sampled_from(["lose", "double", "bend"])):
        case "lose":
            del sent[i]
        case "double":
            sent.append(sent[i])
        case _:
            field = data.draw(st.sampled_from(list(Segment.__slots__)))
            by = data.draw(st.sampled_from([-1, 1]))
            sent[i] = replace(sent[i], **{field: getattr(sent[i], field) + by})
    assert ReshardPlan(case.sender, case.receiver).gap(record(sent, case.num_tokens, case.num_skipped)) is not None


PLAN = ReshardPlan(Group(HEADS, 2), Group(HEADS))
WHOLE = [segment for layer, rank in product(range(3), range(2)) for segment in PLAN.outgoing(rank, layer, 2, 6, 99)]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (WHOLE[:-1], "layer 2, KV heads [2, 4), rank 1 to rank 0: 2 of 6 tokens"),
        ([replace(WHOLE[0], token_end=5), *WHOLE[1:]], "layer 0, KV heads [0, 2), rank 0 to rank 0: 5 of 6 tokens"),
        (
            [replace(WHOLE[0], token_start=3), *WHOLE[1:]],
            "layer 0, KV heads [0, 2), rank 0 to rank 0: tokens [3, 6) come after 2",
        ),
        ([replace(WHOLE[0], sender_rank=1), *WHOLE[1:]], "a segment outside of the plan: Segment(layer=0,"),
    ],
)
def test_a_gap_says_what_is_wrong(sent: list[Segment], reason: str) -> None:
    assert (PLAN.gap(record(sent, 6, 2)) or "").startswith(reason)
