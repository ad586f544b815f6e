"""What a row says of its target, its peer, and the ceiling of the machine."""

import pytest

from benchmarks.rows import CEILING_SHARE, Row


@pytest.mark.parametrize(("value", "target", "ok"), [(2.0, 2.0, True), (1.9, 2.0, False)])
def test_without_a_peer_the_value_counts(value: float, target: float, ok: bool) -> None:
    row = Row.of("name", value, "unit", target)
    assert (row.ratio, row.ok) == (None, ok)


@pytest.mark.parametrize(("value", "ok"), [(9.0, True), (7.9, False)])
def test_with_a_peer_the_ratio_counts(value: float, ok: bool) -> None:
    row = Row.of("name", value, "unit", target=0.8, peer=10.0)
    assert (row.ratio, row.ok) == (value / 10, ok)


def test_a_target_above_the_ceiling_comes_down_to_a_share_of_it() -> None:
    row = Row.of("name", 140.0, "tokens/s", target=2.0, peer=100.0, ceiling=150.0)
    assert row.target == pytest.approx(CEILING_SHARE * 1.5)
    assert row.ok
    assert row.detail == "target = min(2, 0.92 x 150 / 100 tokens/s = 1.38); 93 % of the ceiling"


def test_a_target_below_the_ceiling_stays() -> None:
    assert Row.of("name", 1.0, "tokens/s", target=2.0, peer=100.0, ceiling=1000.0).target == 2.0


def test_a_ceiling_without_a_peer_is_one_of_the_value() -> None:
    assert Row.of("name", 95.0, "tokens/s", target=800.0, ceiling=100.0).target == pytest.approx(92.0)


def test_a_row_for_the_record_is_always_ok_and_says_what_it_is() -> None:
    row = Row.of("name", 0.1, "tokens/s", target=0.0, peer=1.0, ceiling=1.0)
    assert (row.ok, row.target, row.detail) == (True, 0.0, "for the record")
