"""The automaton of a pair, told the time by hand."""

from __future__ import annotations

from itertools import count

import pytest

from core.kv_layout import KVLayout
from core.messages import Disconnect, PairDown, PairUp, WorkerHello, WorkerRole
from router.config import SessionConfig
from router.pairs import Pair, PairState, PairTable

LAYOUT = KVLayout("tiny", "f00d", 2, 2, 8, 16, "float32")
CONFIG = SessionConfig(pair_timeout_s=10.0, pair_backoff_s=0.2, max_pair_backoff_s=5.0)


def hello(name: str, role: WorkerRole, max_pairs: int = 16) -> WorkerHello:
    return WorkerHello(name, name, role, LAYOUT, 8, 100, 1024, f"kv-{name}:1", "memory", max_pairs)


def table() -> PairTable:
    epochs = count(1)
    pairs = PairTable(CONFIG, lambda: next(epochs))
    prefill = hello("p", WorkerRole.PREFILL)
    pairs.add(prefill, [], now_s=0.0)
    pairs.add(hello("d", WorkerRole.DECODE), [prefill], now_s=0.0)
    return pairs


def only(pairs: PairTable) -> Pair:
    (pair,) = (pair for pair in pairs if pair.for_prompts)
    return pair


def bring_up(pairs: PairTable, now_s: float) -> Pair:
    (pair,) = pairs.due(now_s)
    for sender in ("p", "d"):
        pairs.answer_up(sender, PairUp("p", "d", pair.epoch), now_s)
    assert pair.up
    return pair


def fail(pairs: PairTable, now_s: float, *, permanent: bool = False) -> bool:
    return pairs.answer_down(PairDown("p", "d", only(pairs).epoch, "broken", permanent), now_s)


def test_roles_say_who_pairs_with_whom() -> None:
    pairs = PairTable(CONFIG, lambda: 1)
    hellos = [hello("p", WorkerRole.PREFILL), hello("d", WorkerRole.DECODE), hello("m", WorkerRole.MIXED)]
    for i, one in enumerate(hellos):
        pairs.add(one, hellos[:i], now_s=0.0)
    names = {(pair.prefill.worker_id, pair.decode.worker_id) for pair in pairs}
    assert names == {("p", "d"), ("p", "m"), ("m", "d"), ("d", "m"), ("d", "p"), ("m", "p")}
    assert {pair.key for pair in pairs.due(0.0)} == {("p", "d"), ("p", "m"), ("m", "d")}  # others if they are wanted


def test_a_new_pair_is_due_at_once_and_only_once() -> None:
    pairs = table()
    assert [pair.epoch for pair in pairs.due(0.0)] == [1]
    assert pairs.due(0.0) == []


def test_it_takes_both_answers_to_be_up() -> None:
    pairs = table()
    pairs.due(0.0)
    for _ in range(2):
        pairs.answer_up("p", PairUp("p", "d", 1), 0.0)
    assert only(pairs).state is PairState.CONNECTING
    pairs.answer_up("d", PairUp("p", "d", 1), 0.0)
    assert only(pairs).up
    assert only(pairs).reason == ""


def test_a_pair_tells_its_transport_while_it_is_up() -> None:
    pairs = table()
    pairs.due(0.0)
    for sender in ("p", "d"):
        pairs.answer_up(sender, PairUp("p", "d", 1, "shm"), 0.0)
    assert only(pairs).transport == "shm"
    fail(pairs, 0.0)
    assert only(pairs).transport == ""


def test_an_answer_to_an_older_epoch_does_not_count() -> None:
    pairs = table()
    pairs.due(0.0)
    pairs.answer_up("d", PairUp("p", "d", 1), 0.0)
    fail(pairs, 0.0)
    pairs.due(0.2)
    pairs.answer_up("p", PairUp("p", "d", 1), 0.2)
    pairs.answer_up("p", PairUp("p", "d", 2), 0.2)
    assert not only(pairs).up


def test_a_word_about_an_older_epoch_does_not_take_a_pair_down() -> None:
    pairs = table()
    bring_up(pairs, 0.0)
    fail(pairs, 1.0)
    bring_up(pairs, 2.0)
    assert not pairs.answer_down(PairDown("p", "d", 1, "late"), 2.0)
    assert only(pairs).up


def test_waits_double_up_to_the_longest() -> None:
    pairs, now_s, waits = table(), 0.0, []
    for _ in range(8):
        (pair,) = pairs.due(now_s)
        fail(pairs, now_s)
        waits.append(round(pair.due_s - now_s, 3))
        now_s = pair.due_s
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]


def test_each_try_is_under_a_fresh_epoch() -> None:
    pairs = table()
    epochs = [bring_up(pairs, 0.0).epoch]
    for now_s in (1.0, 2.0, 4.0):
        fail(pairs, now_s)
        epochs.append(bring_up(pairs, now_s + 1.0).epoch)
    assert epochs == [1, 2, 3, 4]


def test_a_pair_that_held_for_long_is_tried_again_soon() -> None:
    pairs = table()
    for now_s in (0.0, 1.0, 2.0):
        pairs.due(now_s)
        fail(pairs, now_s)
    bring_up(pairs, 4.0)
    fail(pairs, 60.0)
    assert only(pairs).due_s == pytest.approx(60.2)


def test_a_pair_that_breaks_as_soon_as_it_is_up_is_not_hammered() -> None:
    pairs, now_s = table(), 0.0
    for _ in range(6):
        bring_up(pairs, now_s)
        fail(pairs, now_s)
        now_s = only(pairs).due_s
    assert only(pairs).due_s - 6.2 == pytest.approx(5.0)


def test_a_pair_that_can_never_be_rests() -> None:
    pairs = table()
    pairs.due(0.0)
    assert fail(pairs, 0.0, permanent=True)
    assert pairs.due(1e6) == []
    assert pairs.next_due_s() is None


def test_a_worker_that_does_not_answer_is_named() -> None:
    pairs = table()
    pairs.due(0.0)
    pairs.answer_up("p", PairUp("p", "d", 1), 0.0)
    assert pairs.next_due_s() == 10.0
    assert pairs.expire(9.9) == []
    assert pairs.expire(10.0) == [(name, Disconnect("p", "d", 1)) for name in ("p", "d")]
    assert only(pairs).state is PairState.WAITING
    assert only(pairs).reason == "no answer from d"


def test_down_is_reported_once() -> None:
    pairs = table()
    bring_up(pairs, 0.0)
    assert fail(pairs, 1.0)
    assert not fail(pairs, 1.0)


def test_a_word_about_an_unknown_pair_changes_nothing() -> None:
    pairs = table()
    assert not pairs.answer_down(PairDown("x", "y", 1, "?"), 0.0)
    pairs.answer_up("x", PairUp("x", "y", 1), 0.0)


def test_a_lost_worker_takes_its_pairs_along() -> None:
    pairs = table()
    pairs.remove("d")
    assert list(pairs) == []


def test_both_are_told_to_meet_at_the_decode_workers_address() -> None:
    pairs = table()
    (pair,) = pairs.due(0.0)
    commands = dict(pair.connects())
    assert set(commands) == {"p", "d"}
    assert {command.store_address for command in commands.values()} == {"kv-d:1"}
