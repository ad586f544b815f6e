"""The demo's figures, from arrivals that are given."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import grpc
import pytest
from rich.console import Console

from cluster.cli import Demo
from cluster.demo import Report, generate, make_report, print_table
from core.errors import UnavailableError
from penstock.types import Stats
from tests.client.fake_server import FakeServer, delta, finished, refuses, started, streams

STATS = Stats("prefill-0", "decode-0", 1, transfer_s=0.4, transfer_exposed_s=0.1, kv_bytes=2048)


def report(arrivals: list[tuple[float, int]], stats: Stats = STATS) -> Report:
    return make_report(arrivals, sent_at=10.0, startup_s=5.0, text="text", finish_reason="length", stats=stats)


def test_the_first_token_counts_from_when_it_was_asked_for() -> None:
    got = report([(10.5, 1), (10.6, 1)])
    assert (got.ttft_s, got.startup_s, got.first_token_s) == (0.5, 5.0, 5.5)


def test_gaps_are_between_tokens() -> None:
    got = report([(11.0, 1), (11.1, 1), (11.2, 1), (11.7, 1)])
    assert got.itl_p50_s == pytest.approx(0.1)
    assert got.itl_p99_s == pytest.approx(0.1 + 0.4 * 0.98)  # linear between the two largest of three gaps


def test_tokens_of_one_delta_have_no_gap_between_them() -> None:
    got = report([(11.0, 1), (11.4, 3)])
    assert got.num_tokens == 4
    assert got.itl_p50_s == 0.0


def test_a_delta_of_text_alone_is_no_token() -> None:
    got = report([(11.0, 1), (11.5, 1), (13.0, 0)])
    assert (got.num_tokens, got.itl_p99_s) == (2, 0.5)
    assert got.tokens_per_s == pytest.approx(2 / 1.5)


def test_one_token_has_no_gaps() -> None:
    got = report([(10.25, 1)])
    assert (got.itl_p50_s, got.itl_p99_s, got.tokens_per_s) == (None, None, 4.0)


def test_the_rest_is_what_the_server_tells() -> None:
    got = report([(11.0, 1)])
    assert (got.kv_bytes, got.prefill_worker, got.decode_worker) == (2048, "prefill-0", "decode-0")
    assert got.overlap_ratio == pytest.approx(0.75)
    assert (got.text, got.finish_reason) == ("text", "length")


def test_nothing_is_made_up_where_the_server_tells_nothing() -> None:
    got = report([(11.0, 1)], Stats())
    assert (got.kv_bytes, got.overlap_ratio) == (None, None)
    assert json.loads(json.dumps(asdict(got)))["kv_bytes"] is None


@pytest.mark.parametrize("stats", [STATS, Stats()], ids=["all", "nothing"])
def test_the_table_shows_every_figure(stats: Stats) -> None:
    out = io.StringIO()
    print_table(Console(file=out, width=100), report([(10.5, 1), (10.6, 1)], stats))
    text = out.getvalue()
    shown = [
        "500.0 ms",
        "100.0 ms",
        "2 (length)",
        "3.3",
        "5.0 s",
        *(["2.0 KiB", "75%", "decode-0"] if stats.kv_bytes else []),
    ]
    assert [part for part in shown if part not in text] == []


# ---- the request


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.stop()


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_prompt_and_text_are_streamed_unless_json_is_asked_for(
    server: FakeServer, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    server.play(streams(started(), delta("a", 1), delta("b", 2), finished(2, kv_bytes=7)))
    got = generate(Demo("def ", model=Path("m"), max_tokens=2, json=as_json), server.target, startup_s=1.0)
    assert (got.text, got.num_tokens, got.kv_bytes, got.finish_reason) == ("ab", 2, 7, "stop")
    assert capsys.readouterr().out == ("" if as_json else "def ab\n\n")
    assert server.requests[0].sampling.max_tokens == 2


def test_a_request_that_fails_is_one_error(server: FakeServer) -> None:
    server.play(refuses(grpc.StatusCode.INVALID_ARGUMENT, "prompt: got '', must not be empty"))
    with pytest.raises(UnavailableError, match="the demo's request failed: prompt: got '', must not be empty"):
        generate(Demo("", model=Path("m"), json=True), server.target, startup_s=1.0)
