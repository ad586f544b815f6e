"""Figures of a load, and their names."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.serve.driver import Load
from benchmarks.serve.plot import plot
from benchmarks.serve.records import Record
from benchmarks.serve.report import Json, max_concurrency, meets, parse_goodput, report
from benchmarks.serve.show import print_comparison, print_report, read_result
from core.errors import ConfigError


def record(
    index: int = 0, due_s: float = 0.0, *tokens_s: float, error: str = "", sent_s: float | None = None
) -> Record:
    sent_s = due_s if sent_s is None else sent_s
    end_s = max(tokens_s, default=due_s)
    return Record(index, due_s, sent_s, end_s, tokens_s, 10, len(tokens_s), error)


GOOD = record(0, 0.0, 0.1, 0.2, 0.5)
LATE = record(1, 1.0, 2.0, 2.1)
LOST = record(2, 1.0, 1.5, error="HTTP 503: full")


def figures(*records: Record, lags_s: tuple[float, ...] = (0.001,), **options: object) -> Json:
    return report(Load(records, lags_s), settings={"label": "mine"}, **options)  # type: ignore[arg-type]


def test_names_and_values_are_those_of_vllms_tool() -> None:
    result = figures(GOOD, LATE, percentiles=(50.0, 99.0))
    assert (result["completed"], result["duration"]) == (2, 2.1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (20, 5)
    assert result["request_throughput"] == pytest.approx(2 / 2.1)
    assert result["mean_ttft_ms"] == result["median_ttft_ms"] == pytest.approx(550)
    assert result["p99_ttft_ms"] == pytest.approx(991)
    assert result["mean_tpot_ms"] == pytest.approx((200 + 100) / 2)
    assert result["mean_itl_ms"] == pytest.approx(500 / 3)
    assert result["max_max_itl_ms"] == pytest.approx(300)
    assert result["mean_e2el_ms"] == pytest.approx((500 + 1100) / 2)


def test_failures_are_counted_by_what_they_said_and_have_no_times() -> None:
    result = figures(GOOD, LOST)
    assert (result["completed"], result["failed"], result["errors"]) == (1, 1, {"HTTP 503: full": 1})
    assert result["max_ttft_ms"] == pytest.approx(100)


def test_nothing_has_no_figures_and_is_fit_for_json() -> None:
    result = json.loads(json.dumps(figures()))
    assert (result["completed"], result["request_throughput"], result["p99_ttft_ms"]) == (0, 0.0, None)


def test_goodput_counts_who_met_every_limit_and_failures_as_missed() -> None:
    limits = parse_goodput(["ttft:200", "max_itl:300.1"])
    result = figures(GOOD, LATE, LOST, goodput=limits)
    assert result["request_goodput"] == pytest.approx(1 / 2.1)
    assert result["slo_attainment"] == pytest.approx(1 / 3)
    shares = dict(map(tuple, result["slo_scale_attainment"]))
    assert (shares[0.1], shares[1.0], shares[5.0], shares[10.0]) == (
        0.0,
        pytest.approx(1 / 3),
        *[pytest.approx(2 / 3)] * 2,
    )


def test_a_single_token_has_no_gap_to_miss() -> None:
    assert meets(record(0, 0.0, 0.1), {"tpot": 1.0, "max_itl": 1.0})
    assert not meets(record(0, 0.0), {"ttft": 1e9})


@pytest.mark.parametrize("pair", ["ttft", "ttft:", "ttft:-1", "itl:5", "x:1", "ttft:nan"])
def test_a_limit_that_is_none_is_refused(pair: str) -> None:
    with pytest.raises(ConfigError, match="goodput: got"):
        parse_goodput([pair])


def test_curves_tell_what_share_was_within_what_time() -> None:
    records = [record(i, 0.0, i / 1000) for i in range(101)]
    points = figures(*records)["attainment_curves_ms"]["ttft"]
    assert [points[share] for share in (0, 50, 100)] == [pytest.approx(share) for share in (0, 50, 100)]


def test_a_client_that_was_too_busy_says_so() -> None:
    assert figures(GOOD, lags_s=(0.001,) * 99)["client"]["trustworthy"]
    busy = figures(GOOD, lags_s=(0.02,) * 9)
    assert not busy["client"]["trustworthy"]
    assert "Don't trust it" in shown(busy)


def test_fewer_messages_than_tokens_are_told() -> None:
    assert "gaps are between messages" not in shown(figures(GOOD))
    joined = Record(0, 0.0, 0.0, 2.0, (0.5, 1.0), 10, 9)
    assert "9 tokens came in 2 messages: gaps are between messages" in shown(figures(joined))
    assert joined.tpot_s == 1.5 / 8


def test_how_late_requests_were_sent_is_told() -> None:
    assert figures(record(0, 1.0, 2.0, sent_s=1.25))["client"]["max_send_delay_ms"] == pytest.approx(250)


def test_requests_under_way_at_once_are_counted() -> None:
    assert max_concurrency([record(0, 0.0, 2.0), record(1, 1.0, 3.0), record(2, 3.0, 4.0)]) == 2


def test_each_requests_times_are_kept_where_asked_for() -> None:
    assert "requests" not in figures(GOOD)
    (one,) = figures(GOOD, detailed=True)["requests"]
    assert one["itls_ms"] == [pytest.approx(100), pytest.approx(300)]


def shown(result: Json) -> str:
    out = io.StringIO()
    print_report(result, Console(file=out, width=140), ["ttft", "itl"], (50.0, 90.0, 99.0))
    return out.getvalue()


def test_a_report_is_a_table() -> None:
    text = shown(figures(GOOD, LATE, LOST, goodput={"ttft": 200.0}))
    for part in ("2 requests in 2.1 s, 1 failed", "1 x HTTP 503: full", "Time to first token", "p99", "33.3% of"):
        assert part in text


def test_two_runs_are_compared_and_different_loads_told() -> None:
    out = io.StringIO()
    a, b = figures(GOOD), {**figures(LATE), "seed": 1, "label": "theirs"}
    print_comparison(a, b, Console(file=out, width=120))
    text = out.getvalue()
    assert "mine" in text
    assert "theirs" in text
    (line,) = [line for line in text.splitlines() if "p50_ttft_ms" in line]
    assert line.split()[1:] == ["100.0", "1,000.0", "10.000"]
    assert "The loads differ: seed is None and 1" in text


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="must be a result of penstock bench serve"):
        read_result(path)


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot([figures(GOOD, LATE, goodput={"ttft": 200.0}), figures()], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="can't be written"):
        plot([figures(GOOD)], tmp_path / "missing" / "plot.png")
