"""The measurement of transfers runs, and its rows say what they are."""

import pytest

from benchmarks import transfer
from benchmarks.rows import Row
from benchmarks.transfer import LAYOUT, MIB, load_of
from benchmarks.transfer_link import Load
from benchmarks.transfer_prefill import Measured, Ways, crossover_rows, rows_of


def test_a_load_is_as_large_as_it_says() -> None:
    load = load_of(3)
    assert load.segment_bytes == 3 * MIB
    assert load.num_bytes == LAYOUT.num_layers * 3 * MIB
    assert Load(LAYOUT, 17).blocks == (0, 1)


def test_every_link_has_its_peer_measured_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "prefill_rows", lambda _num_repeats: [])
    rows = transfer.run(num_mib=2, num_repeats=1)
    assert [row.name for row in rows] == [
        "shared memory, segments of 2 MiB",
        "shared memory, segments of 1 MiB",
        "reserve and commit",
        "gloo, segments of 2 MiB",
        "gloo, segments of 1 MiB",
        "tcp, segments of 2 MiB",
        "tcp, segments of 1 MiB",
    ]
    assert all(row.value > 0 for row in rows)
    assert all((row.peer is not None) == (row.name != "reserve and commit") for row in rows)


def ok(rows: list[Row]) -> list[bool]:
    return [row.ok for row in rows]


def test_what_is_not_hidden_may_take_the_last_segments_time_and_two_milliseconds() -> None:
    assert ok(rows_of(512, Measured(0.1, 0.1, exposed_s=0.0119, last_s=0.01))) == [True, True]
    assert ok(rows_of(512, Measured(0.1, 0.1, exposed_s=0.0121, last_s=0.01))) == [False, True]


def test_a_prefill_may_be_two_percent_slower_while_it_sends() -> None:
    assert ok(rows_of(512, Measured(0.1, 0.1019, 0.001, 0.001))) == [True, True]
    assert ok(rows_of(512, Measured(0.1, 0.1025, 0.001, 0.001))) == [True, False]


def test_the_crossover_is_the_longest_prompt_for_which_serial_is_not_dearer() -> None:
    ways = {16: Ways(0.002, 0.001, 0.001), 64: Ways(0.002, 0.0021, 0.002), 128: Ways(0.002, 0.002, 0.002)}
    (row,) = crossover_rows(ways)
    assert (row.value, row.unit) == (128, "tokens")
    (never,) = crossover_rows({16: Ways(0.001, 0.002, 0.001)})
    assert never.value == 0


def test_short_prompts_are_for_the_record() -> None:
    assert ok(rows_of(64, Measured(0.1, 0.2, 0.1, 0.001))) == [True, True]
