"""Workers have room for few channels: who gets one, who gives way, and who is left alone for a while."""

from __future__ import annotations

from collections import Counter
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from core.messages import Connect, Disconnect, PairDown, PairUp, WorkerRole
from router.config import SessionConfig
from router.pairs import Pair, PairKey, PairState, PairTable
from tests.router.test_pairs import hello

CONFIG = SessionConfig(
    pair_timeout_s=10.0, pair_backoff_s=0.2, max_pair_backoff_s=5.0, pair_quarantine_after=3, pair_quarantine_s=20.0
)
OPEN = (PairState.WAITING, PairState.CONNECTING, PairState.UP)


def table(num_prefill: int, num_decode: int, max_pairs: int) -> PairTable:
    epochs = count(1)
    pairs = PairTable(CONFIG, lambda: next(epochs))
    hellos = [hello(f"p{i}", WorkerRole.PREFILL, max_pairs) for i in range(num_prefill)]
    hellos += [hello(f"d{i}", WorkerRole.DECODE, max_pairs) for i in range(num_decode)]
    for i, one in enumerate(hellos):
        pairs.add(one, hellos[:i], now_s=0.0)
    return pairs


def bring_up(pairs: PairTable, now_s: float = 0.0) -> None:
    for pair in pairs.due(now_s):
        for sender in pair.key:
            pairs.answer_up(sender, PairUp(*pair.key, pair.epoch), now_s)


def up(pairs: PairTable) -> set[PairKey]:
    return {pair.key for pair in pairs if pair.up}


def one(pairs: PairTable, prefill: str, decode: str) -> Pair:
    return next(pair for pair in pairs if pair.key == (prefill, decode))


def num_open(pairs: PairTable) -> Counter[str]:
    return Counter(name for pair in pairs if pair.state in OPEN for name in pair.key)


def test_ahead_of_need_every_worker_gets_as_many_pairs_as_it_has_room_for() -> None:
    pairs = table(4, 4, max_pairs=2)
    bring_up(pairs)
    assert set(num_open(pairs).values()) == {2}
    assert len(num_open(pairs)) == 8


def test_a_worker_that_comes_late_is_not_left_without_a_pair_where_there_is_room() -> None:
    pairs = table(2, 1, max_pairs=2)
    bring_up(pairs)
    pairs.add(hello("d1", WorkerRole.DECODE, 2), [hello(name, WorkerRole.PREFILL, 2) for name in ("p0", "p1")], 1.0)
    bring_up(pairs, 1.0)
    assert {("p0", "d1"), ("p1", "d1")} <= up(pairs)


def test_a_wanted_pair_takes_the_place_of_the_one_that_was_used_longest_ago() -> None:
    pairs = table(1, 3, max_pairs=2)
    bring_up(pairs)
    assert up(pairs) == {("p0", "d0"), ("p0", "d1")}
    pairs.touch(("p0", "d1"), 1.0)
    pairs.touch(("p0", "d0"), 2.0)
    epoch = one(pairs, "p0", "d1").epoch
    assert pairs.want(("p0", "d2"), (), 3.0) == [(name, Disconnect("p0", "d1", epoch)) for name in ("p0", "d1")]
    bring_up(pairs, 3.0)
    assert up(pairs) == {("p0", "d0"), ("p0", "d2")}
    assert not pairs.answer_down(PairDown("p0", "d1", epoch, "closed"), 3.0), "that it ended is no failure"
    assert pairs.next_due_s() is None


def test_both_workers_of_a_wanted_pair_make_room() -> None:
    pairs = table(2, 2, max_pairs=1)
    bring_up(pairs)
    there = up(pairs)
    (wanted, other) = sorted({(p, d) for p in ("p0", "p1") for d in ("d0", "d1")} - there)
    assert {told for _, told in pairs.want(wanted, (), 1.0)} == {
        Disconnect(*key, one(pairs, *key).epoch) for key in there
    }
    bring_up(pairs, 1.0)
    assert up(pairs) == {wanted, other}, "who had to make room has another partner"


def test_a_pair_that_carries_something_does_not_give_way() -> None:
    pairs = table(1, 3, max_pairs=2)
    bring_up(pairs)
    assert {told for _, told in pairs.want(("p0", "d2"), [("p0", "d0")], 1.0)} == {Disconnect("p0", "d1", 2)}
    pairs = table(1, 3, max_pairs=2)
    bring_up(pairs)
    assert pairs.want(("p0", "d2"), up(pairs), 1.0) == []
    assert one(pairs, "p0", "d2").state is PairState.IDLE


def test_nobody_gives_way_twice_while_the_wanted_pair_is_on_its_way() -> None:
    pairs = table(1, 4, max_pairs=2)
    bring_up(pairs)
    assert pairs.want(("p0", "d2"), (), 1.0)
    pairs.due(1.0)
    assert pairs.want(("p0", "d3"), (), 1.0) == []


def test_a_pair_whose_channel_fails_again_and_again_leaves_its_place_to_another() -> None:
    pairs = table(1, 2, max_pairs=1)
    now_s = 0.0
    for _ in range(CONFIG.pair_quarantine_after):
        (pair,) = pairs.due(now_s)
        assert pair.key == ("p0", "d0")
        pairs.answer_down(PairDown("p0", "d0", pair.epoch, "refused"), now_s)
        now_s = pair.due_s if pair.state is PairState.WAITING else now_s
    assert one(pairs, "p0", "d0").state is PairState.QUARANTINED
    bring_up(pairs, now_s)
    assert up(pairs) == {("p0", "d1")}


def fail_transfers(pairs: PairTable, key: PairKey, times: int, now_s: float) -> list[tuple[str, Connect | Disconnect]]:
    told = []
    for _ in range(times):
        told += pairs.transfer_ended(key, one(pairs, *key).epoch, well=False, now_s=now_s)
    return told


def test_a_pair_whose_transfers_fail_is_left_alone_for_a_while_and_then_made_anew() -> None:
    pairs = table(1, 2, max_pairs=4)
    bring_up(pairs)
    bad, before = ("p0", "d0"), one(pairs, "p0", "d0").epoch
    assert fail_transfers(pairs, bad, 3, now_s=1.0) == [(name, Disconnect(*bad, before)) for name in bad]
    assert up(pairs) == {("p0", "d1")}
    assert one(pairs, *bad).reason == "3 transfers in a row have failed"
    bring_up(pairs, 20.9)
    assert up(pairs) == {("p0", "d1")}
    assert pairs.next_due_s() == 21.0
    bring_up(pairs, 21.0)
    assert up(pairs) == {bad, ("p0", "d1")}
    assert one(pairs, *bad).epoch > before


def test_one_transfer_that_ends_well_clears_a_pair() -> None:
    pairs = table(1, 2, max_pairs=4)
    bring_up(pairs)
    key = ("p0", "d0")
    fail_transfers(pairs, key, 2, 1.0)
    pairs.transfer_ended(key, one(pairs, *key).epoch, well=True, now_s=1.0)
    assert fail_transfers(pairs, key, 2, 1.0) == []
    assert key in up(pairs)


def test_the_only_pair_there_is_stays_whatever_it_does() -> None:
    pairs = table(1, 1, max_pairs=4)
    bring_up(pairs)
    assert fail_transfers(pairs, ("p0", "d0"), 10, 1.0) == []
    assert up(pairs) == {("p0", "d0")}


def test_transfers_of_an_earlier_channel_do_not_speak_against_this_one() -> None:
    pairs = table(1, 2, max_pairs=4)
    bring_up(pairs)
    key, epoch = ("p0", "d0"), one(pairs, "p0", "d0").epoch
    pairs.answer_down(PairDown(*key, epoch, "broken"), 1.0)
    bring_up(pairs, 2.0)
    for _ in range(5):
        assert pairs.transfer_ended(key, epoch, well=False, now_s=2.0) == []
    assert key in up(pairs)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_no_worker_ever_has_more_channels_than_it_has_room_for(
    data: st.DataObject, num_prefill: int, num_decode: int, max_pairs: int
) -> None:
    """By the router's books, and by those of the workers, which only know what they were told."""
    pairs, now_s = table(num_prefill, num_decode, max_pairs), 0.0
    told: dict[str, set[PairKey]] = {}

    def tell(commands: list[tuple[str, Connect | Disconnect]]) -> None:
        for name, command in commands:
            mine = told.setdefault(name, set())
            key = (command.prefill_incarnation, command.decode_incarnation)
            mine.add(key) if isinstance(command, Connect) else mine.discard(key)
            assert len(mine) <= max_pairs

    for _ in range(20):
        all_pairs = [*pairs]
        pair: Pair = data.draw(st.sampled_from(all_pairs))
        match data.draw(st.sampled_from(["want", "down", "bad", "time", "up", "use"])):
            case "want":
                tell(pairs.want(pair.key, data.draw(st.sets(st.sampled_from([p.key for p in all_pairs]))), now_s))
            case "down":
                if pairs.answer_down(PairDown(*pair.key, pair.epoch, "broken"), now_s):
                    for mine in told.values():
                        mine.discard(pair.key)
            case "bad":
                tell(fail_transfers(pairs, pair.key, 3, now_s))
            case "time":
                now_s += data.draw(st.sampled_from([0.1, 1.0, 8.0, 30.0]))
            case "up":
                for sender in pair.key:
                    pairs.answer_up(sender, PairUp(*pair.key, pair.epoch), now_s)
            case "use":
                pairs.touch(pair.key, now_s)
        tell(pairs.expire(now_s))
        for due in pairs.due(now_s):
            tell([*due.connects()])
        assert all(number <= max_pairs for number in num_open(pairs).values())
        idle = [p for p in pairs if p.state is PairState.IDLE and p.for_prompts]
        assert not [p for p in idle if all(num_open(pairs)[name] < max_pairs for name in p.key)], "room is left unused"
