"""Servers side by side: turns, time, and what is concluded."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.engine_process import EngineError
from benchmarks.serve.records import Record
from benchmarks.serve.traces import TraceRow
from benchmarks.servers import Server, ServerSpec, penstock_server, vllm_server
from benchmarks.serving import MIN_REQUESTS, Bench, Options, result_of
from benchmarks.serving_table import Cells, print_cells, print_verdicts, summary, verdicts

FAST = (sys.executable, "-m", "benchmarks.serve.known_server", "3", "0.001", "{port}")
ROWS = [TraceRow(float(i), 10 * i + 10, 5) for i in range(300)]


def server(label: str, *, keep: bool = False, command: tuple[str, ...] = FAST) -> ServerSpec:
    return ServerSpec(label, command, keep=keep, start_timeout_s=30.0)


def bench(*specs: ServerSpec, minutes: float | None = None, rates: tuple[float, ...] = (200.0,)) -> Bench:
    options = Options(rates=rates, num_requests=20, rounds=2, minutes=minutes)
    return Bench(options, specs, lambda _: None, ROWS)


def record(index: int, ttft_s: float, gap_s: float, error: str = "") -> Record:
    return Record(index, 0.0, 0.0, ttft_s + 2 * gap_s, (ttft_s, ttft_s + gap_s, ttft_s + 2 * gap_s), 10, 3, error)


def test_every_server_gets_the_same_requests_in_turns() -> None:
    run = bench(server("a", keep=True), server("b"))
    run.run()
    (a, b) = run.cells.values()
    assert [(label, len(records)) for (label, _), records in run.cells.items()] == [("a", 20), ("b", 20)]
    assert [(one.due_s, one.num_outputs) for one in a] == [(one.due_s, one.num_outputs) for one in b]
    assert not any(one.error for one in (*a, *b))
    result = result_of(run)
    assert result["servers"]["a"]["200"]["messages"] == result["servers"]["a"]["200"]["output_tokens"] == 60
    assert result["failures"] == {}


def test_a_server_that_does_not_start_is_told_and_others_run() -> None:
    broken = server("broken", keep=True, command=(sys.executable, "-c", "raise RuntimeError('no model')"))
    run = bench(broken, server("b"))
    run.run()
    assert [label for label, _ in run.cells] == ["b"]
    assert "it ended with code 1 (RuntimeError: no model)" in run.failures["broken"]


def test_a_server_that_stands_still_answers_again_when_it_goes_on(tmp_path: Path) -> None:
    with Server(server("a"), tmp_path / "log") as one:
        one.wait_ready()
        one.pause()
        one.resume()
        assert one.wait_ready() < 20
    with pytest.raises(EngineError, match="it ended"):
        one.wait_ready()


def test_rounds_have_other_requests_and_rates_other_times() -> None:
    run = bench()
    first, second, slower = (run._plans(*args) for args in ((0, 20, 1.0), (1, 20, 1.0), (0, 20, 0.5)))
    assert [plan.num_inputs for plan in first] != [plan.num_inputs for plan in second]
    assert [plan.num_inputs for plan in first] == [plan.num_inputs for plan in slower]
    assert [plan.due_s * 2 for plan in first] == pytest.approx([plan.due_s for plan in slower])


def test_as_many_requests_are_made_as_fit_the_time() -> None:
    run = bench(server("a", keep=True), server("b"), minutes=10.0, rates=(0.5, 1.0))
    # 600 s less 2 starts of 12 s and 8 turns of 8 s tail: 512 s, shared by 2 servers at 2 rates
    counts = run._counts()
    assert 120 <= counts[1.0] <= 128
    assert 60 <= counts[0.5] <= 64
    run = bench(server("a"), minutes=0.1)
    assert run._counts() == {200.0: MIN_REQUESTS}
    assert bench(server("a"))._counts() == {200.0: 20}


def cells(ours: float, theirs: float, other: float) -> Cells:
    """Gaps in s of W8A8 and float32, of vLLM at its default and with smaller steps."""
    return {
        ("vLLM fp32", 1.0): [record(0, 0.4, theirs)],
        ("vLLM fp32 256", 1.0): [record(0, 0.8, other)],
        ("vLLM W8A8", 1.0): [record(0, 0.2, theirs)],
        ("fp32 1P1D", 1.0): [record(0, 0.5, ours)],
        ("W8A8 1P1D", 1.0): [record(0, 0.3, ours)],
    }


def test_ours_is_held_against_the_better_peer_of_each_column() -> None:
    found = {each.what: each for each in verdicts(cells(ours=0.02, theirs=0.4, other=0.2))}
    assert found["fp32 1P1D at 1/s, ITL p99"].ratio == pytest.approx(10)
    assert found["fp32 1P1D at 1/s, ITL p99"].peer == "vLLM fp32 256"
    assert found["fp32 1P1D at 1/s, ITL p99"].met
    assert found["fp32 1P1D at 1/s, E2E p50"].met
    assert not found["W8A8 1P1D at 1/s, TTFT p50"].met
    assert found["W8A8 1P1D at 1/s, longest gap p90"].met


def test_five_times_better_is_not_met_by_less() -> None:
    found = {each.what: each for each in verdicts(cells(ours=0.05, theirs=0.4, other=0.2))}
    assert not found["fp32 1P1D at 1/s, ITL p99"].met


def test_without_int8_of_theirs_their_float32_counts() -> None:
    some = {key: records for key, records in cells(0.02, 0.4, 0.2).items() if key[0] != "vLLM W8A8"}
    assert {each.peer for each in verdicts(some) if each.what.startswith("W8A8")} == {"vLLM fp32", "vLLM fp32 256"}


def test_a_server_with_failures_proves_nothing() -> None:
    some = cells(0.02, 0.4, 0.2)
    some["W8A8 1P1D", 1.0].append(record(1, 0.1, 0.1, error="timeout"))
    assert not any(each.what.startswith("W8A8") for each in verdicts(some))


def test_columns_are_percentiles_in_ms() -> None:
    figures = summary([record(0, 0.1, 0.02), record(1, 0.3, 0.04)])
    assert figures["TTFT p50"] == pytest.approx(200)
    assert figures["ITL p50"] == pytest.approx(30)
    assert figures["longest gap p90"] == pytest.approx(38)
    assert summary([]) == {}


def test_tables_show_every_server_and_every_verdict() -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    print_cells(cells(0.02, 0.4, 0.2), console)
    print_verdicts(verdicts(cells(0.02, 0.4, 0.2)), console)
    text = out.getvalue()
    for part in ("vLLM fp32 256", "W8A8 1P1D", "longest gap p90", "met", "missed"):
        assert part in text


def test_vllm_has_all_cores_and_ours_divides_them(tmp_path: Path) -> None:
    theirs = vllm_server("vLLM", Path("py"), tmp_path, tmp_path, num_threads=2, batched_tokens=256)
    assert theirs.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert theirs.command[theirs.command.index("--max-num-batched-tokens") + 1] == "256"
    ours = penstock_server("ours", tmp_path, mixed=True)
    assert ours.command[ours.command.index("--mixed.num-workers") + 1] == "1"
    assert all("--no-enable-prefix-caching" in spec.command for spec in (theirs, ours))
