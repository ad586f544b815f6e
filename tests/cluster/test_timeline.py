"""`penstock trace` and `penstock explain`: what a terminal shows of a request."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from cluster.cli import main
from cluster.timeline import bar, print_reasons, print_timeline
from penstock import AttemptTrace, Forecast, RequestTrace, Span
from penstock.v1 import trace_pb2
from tests.client.fake_server import FakeServer

GONE = "session_lost: gone"
LOST = AttemptTrace(1, 0.1, "p0", "d0", ("disaggregated",), 7, "failed", GONE, None, None, None, "least_loaded")
FORECAST = Forecast(ttft_s=0.25, itl_s=0.01, finish_s=0.5, num_cached_prefill=0, num_cached_decode=16)
DONE = AttemptTrace(
    *(2, 0.3, "p1", "d0", ("local", "short"), 9, "stop", "", 2**20, 0.5, 0.125, "prefix_aware", FORECAST, 0.7),
    waited_for=("no_decode_blocks",),
)
SPANS = (
    Span("queue", 1, "router", 0.0, 0.1, None),
    Span("prefill", 1, "p0", 0.1, 0.2, None),
    Span("transfer_exposed", 2, "p1", 0.5, 0.6, 0.05),
    Span("decode", 2, "d0", 0.6, None, None),
)


def trace(attempts: tuple[AttemptTrace, ...] = (LOST, DONE), spans: tuple[Span, ...] = SPANS) -> RequestTrace:
    return RequestTrace("r[1]", 0.0, 1.0, "running", "", 7, 3, 0.25, 0.9, attempts, 0, spans)


def shown(kind: str, of: RequestTrace) -> str:
    out = io.StringIO()
    console = Console(file=out, width=160, highlight=False)
    (print_timeline if kind == "timeline" else print_reasons)(of, console)
    return out.getvalue()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.stop()


@pytest.mark.parametrize(
    ("start_s", "end_s", "expected"),
    [(0.0, 1.0, "██████████"), (0.5, 1.0, "     █████"), (0.0, 0.25, "██▌"), (0.0, 0.0, "▏"), (1.0, 1.0, "         █")],
)
def test_a_bar_lies_where_its_time_does_and_is_never_unseen(start_s: float, end_s: float, expected: str) -> None:
    assert bar(start_s, end_s, 1.0, 10) == expected


def test_a_request_that_took_no_time_has_no_bars() -> None:
    assert bar(0.0, 0.0, 0.0, 10) == ""


def test_a_timeline_has_a_line_for_each_stage_in_order() -> None:
    lines = shown("timeline", trace()).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["queue", "prefill", "transfer_exposed", "decode"]
    assert lines[0].startswith("r[1]  running for 1.000 s  7 prompt + 3 output tokens")
    starts = [line.index("█") for line in lines[2:6]]
    assert starts == sorted(starts)


def test_a_timeline_tells_which_attempt_a_stage_is_of_where_there_are_several() -> None:
    assert "prefill #1" in shown("timeline", trace())
    assert "#" not in shown("timeline", trace((DONE,)))


def test_what_goes_on_is_marked_and_so_is_what_is_inferred() -> None:
    text = shown("timeline", trace())
    assert "400.0…" in text
    assert "~50.0" in text
    assert "worker's clock" in text
    assert "worker's clock" not in shown("timeline", trace(spans=SPANS[:2]))


def test_a_timeline_ends_with_what_a_bar_can_not_say() -> None:
    text = shown("timeline", trace())
    assert "#1: failed: session_lost: gone" in text
    assert "#2: KV 1.00 MiB at 0.00 GB/s, 75% behind computing" in text
    assert "longest gap between tokens 250.0 ms, up to 900.0 ms" in text


def test_each_choice_is_explained() -> None:
    text = shown("reasons", trace())
    assert "attempt 1, at 100.0 ms: 7 tokens to p0 → d0" in text
    assert "policy    least_loaded: read by one worker, written by another (disaggregated)" in text
    assert "policy    prefix_aware: read and written by one worker (local); short" in text
    assert "waited    as no decode worker had blocks for it (no_decode_blocks)" in text
    assert "it was    failed: session_lost: gone" in text


def test_what_was_foreseen_stands_beside_what_came() -> None:
    text = shown("reasons", replace(trace(), outcome="stop"))
    assert "foreseen  first token after 250.0 ms (came after 400.0 ms), 10.0 ms between tokens" in text
    assert "end after 500.0 ms (came after 700.0 ms); d0 has 16 tokens of it" in text
    assert "end after 500.0 ms; d0 has" in shown("reasons", trace())


def test_a_request_that_waits_for_workers_says_so() -> None:
    assert "it waited 1000.0 ms in the queue" in shown("reasons", trace((), ()))


@pytest.mark.parametrize("command", ["trace", "explain"])
def test_the_command_asks_the_router(command: str, server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers.traces["r1"] = trace_pb2.RequestTrace(request_id="r1", outcome="stop", elapsed_s=0.5)
    assert main([command, "r1", "--target", server.target]) == 0
    assert "r1  stop after 0.500 s" in capsys.readouterr().out
    assert main([command, "r1", "--target", server.target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["elapsed_s"] == 0.5


@pytest.mark.parametrize("command", ["trace", "explain"])
def test_a_request_that_nobody_knows_is_one_line(
    command: str, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "r2", "--target", server.target]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("penstock: request_id: got 'r2', which this router never had, or has forgotten")
