from __future__ import annotations

import pytest

from core.trace_context import child_of, log_fields

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_child_is_in_the_same_trace_with_a_span_of_its_own() -> None:
    child = child_of(f"00-{TRACE}-{SPAN}-01", lambda _: 10)
    assert child == f"00-{TRACE}-000000000000000a-01"
    assert log_fields(child) == {"trace_id": TRACE, "span_id": "000000000000000a"}


@pytest.mark.parametrize(
    "given",
    [
        "",
        "x",
        f"00-{TRACE}-{SPAN}",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
    ],
)
def test_what_makes_no_sense_is_ignored(given: str) -> None:
    assert child_of(given, lambda _: 1) == ""
    assert log_fields("") == {}


def test_a_later_version_may_say_more() -> None:
    assert child_of(f"01-{TRACE}-{SPAN}-01-more", lambda _: 1) == f"00-{TRACE}-0000000000000001-01"
