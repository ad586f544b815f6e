"""Engines behind pipes: what they answer, how they fail, and that one that fails costs the others nothing."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.comparison import Comparison
from benchmarks.comparison_rows import OURS_FLOAT32, PAIRS, VLLM_FLOAT32, comparison_rows
from benchmarks.engine_process import EngineError, EngineProcess, EngineSpec, root_cause
from benchmarks.peers.driver import Drawn, serve, timed
from benchmarks.workloads import Measure, Targets, Workload
from tests.benchmarks.test_workloads import DENSE, MACHINE

ROOT = Path(__file__).resolve().parents[2]
WORKLOADS = (
    Workload("prefill", Measure.PREFILL, 2, 3, 1, Targets(1.1, 1.2, 2.5), Targets(0, 0, 0)),
    Workload("decode", Measure.DECODE, 2, 3, 4, Targets(1.1, 1.2, 2.5), Targets(0, 0, 0)),
)


def fake(label: str, behaviour: str = "good", **fields: Any) -> EngineSpec:
    command = (sys.executable, "-m", "tests.benchmarks.fake_engine", behaviour)
    return EngineSpec(label, command, {"PYTHONPATH": str(ROOT)}, **fields)


# ---- the driver's side


def test_a_run_counts_from_when_every_sequence_has_a_token() -> None:
    steps: list[Drawn] = [[(0, 5)], [(0, 6), (1, 7)], [(0, 8), (1, 9)]]
    run = timed(steps, 2, clock=itertools.count(10.0).__next__)
    assert (run.first_s, run.num_before, run.end_s) == (1.0, 3, 2.0)
    assert run.tokens == [[5, 6, 8], [7, 9]]


def test_a_sequence_without_a_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 of 2 sequences got no token"):
        timed([[(0, 5)]], 2)


def test_a_driver_answers_each_line_and_names_what_is_wrong() -> None:
    class Echo:
        name = "Echo"

        def steps(self, prompts: list[list[int]], num_outputs: int) -> Iterator[Drawn]:
            yield [(sequence, prompt[0]) for sequence, prompt in enumerate(prompts)]

    commands = ['{"prompts": [[4]], "outputs": 1}', '{"prompt": 1}', '{"memory": true}']
    answers = io.StringIO()
    serve(Echo, commands, answers)
    ready, run, wrong, memory = map(json.loads, answers.getvalue().splitlines())
    assert ready["engine"] == "Echo"
    assert run["tokens"] == [[4]]
    assert wrong == {"error": "ValueError: unknown command: ['prompt']"}
    assert memory["peak_rss_bytes"] > 2**20


# ---- the benchmark's side


def test_an_engine_answers_over_its_pipes(tmp_path: Path) -> None:
    with EngineProcess(fake("a"), tmp_path / "log") as process:
        assert process.first_token_s([1, 2]) > 0
        assert process.name == "Fake 1"
        assert process.run([[1, 2], [3]], 3).tokens == [[3, 6, 12], [3, 6, 12]]
    assert "this is no answer" in (tmp_path / "log").read_text()


def test_a_paused_engine_stands_still_and_goes_on(tmp_path: Path) -> None:
    with EngineProcess(fake("a"), tmp_path / "log") as process:
        process.wait_ready()
        process.pause()
        [child] = [c for c in psutil.Process().children() if "fake_engine" in " ".join(c.cmdline())]
        assert child.status() == psutil.STATUS_STOPPED
        process.resume()
        assert process.run([[1]], 1).tokens == [[1]]
        process.pause()
    assert not child.is_running()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("fails", "a: ValueError: one run failed"),
        ("dies", "a: it ended with code 3"),
        ("silent", "a: no answer within 1 s"),
    ],
)
def test_what_ends_a_run_is_named(behaviour: str, message: str, tmp_path: Path) -> None:
    with EngineProcess(fake("a", behaviour, answer_timeout_s=1.0), tmp_path / "log") as process:
        process.first_token_s([1])
        with pytest.raises(EngineError, match=message):
            process.run([[1]], 1)


def test_an_engine_that_does_not_start_is_named_with_the_cause_in_its_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("OldError: of an earlier start\n")
    with EngineProcess(fake("a", "broken"), tmp_path / "log") as process:
        with pytest.raises(EngineError, match=r"RuntimeError: see the log \(KernelError: the real reason\)"):
            process.wait_ready()


def test_a_log_without_errors_has_no_cause() -> None:
    assert root_cause("INFO all is well\nErrors: none\n") is None


# ---- side by side


def compare(tmp_path: Path, *specs: EngineSpec, num_turns: int = 2) -> Comparison:
    comparison = Comparison(specs, 100, tmp_path, lambda _: None)
    with comparison.started():
        for number in range(num_turns):
            comparison.turn(number, WORKLOADS)
    return comparison


def test_engines_get_the_same_prompts_and_their_answers_are_compared(tmp_path: Path) -> None:
    measured = compare(tmp_path, fake("a"), fake("b"), fake("c", "other")).measured
    assert measured.agreement("a", "b") == (8, 8)
    assert measured.agreement("a", "c") == (0, 8)
    assert {key: len(samples) for key, samples in measured.tokens_per_s.items()} == {
        (workload.name, engine): 2 for workload in WORKLOADS for engine in "abc"
    }


def test_an_engine_that_fails_costs_the_others_nothing(tmp_path: Path) -> None:
    measured = compare(tmp_path, fake("a", "dies"), fake("b"), fake("c", "broken")).measured
    assert measured.median("prefill", "b")
    assert measured.median("prefill", "a") is None
    assert measured.failures == {
        "a": "a: it ended with code 3",
        "c": "c: RuntimeError: see the log (KernelError: the real reason)",
    }


def test_a_fallback_takes_the_place_of_an_engine_that_does_not_start(tmp_path: Path) -> None:
    measured = compare(tmp_path, fake("a", "broken", fallback=fake("a", note="a smaller a"))).measured
    assert measured.median("decode", "a")
    assert measured.failures == {}
    assert measured.notes == {"a": "a smaller a; a: RuntimeError: see the log (KernelError: the real reason)"}


def test_no_workload_begins_when_the_time_is_up(tmp_path: Path) -> None:
    answers = iter([True, False, False])
    comparison = Comparison([fake("a"), fake("b")], 100, tmp_path, lambda _: None, in_time=lambda: next(answers))
    with comparison.started():
        comparison.turn(0, WORKLOADS)
    assert list(comparison.measured.tokens_per_s) == [("prefill", "a")]
    assert comparison.measured.failures == {"b": "the time was up before it could start"}


def test_rows_have_medians_and_targets_and_name_what_is_missing(tmp_path: Path) -> None:
    specs = [fake(OURS_FLOAT32), fake(VLLM_FLOAT32)]
    measured = compare(tmp_path, *specs, fake(PAIRS[1].ours, "broken"), num_turns=1).measured
    for i, spec in enumerate(specs):
        measured.tokens_per_s["decode", spec.label] = [1.0 + i, 30.0 - 10 * i, 90.0]
        measured.start_s[spec.label] = [2.0 + 18 * i]
    rows, missing = comparison_rows("m", measured, WORKLOADS, DENSE, dataclasses.replace(MACHINE))
    row = next(row for row in rows if row.name == "m, decode, fp32 by vLLM fp32")
    assert (row.value, row.peer, row.ratio, row.target) == (30.0, 20.0, 1.5, 1.1)
    start = rows[-1]
    assert (start.value, start.ratio, start.target, start.ok) == (0.5, 10.0, 8.0, True)
    reasons = {each.name: each.reason for each in missing}
    assert "the real reason" in reasons["m, rows with W8A8"]
    assert reasons["m, rows with transformers fp32"] == "it was not run"


def test_the_read_rate_is_measured_beside_each_decode_of_one_sequence(tmp_path: Path) -> None:
    single = Workload("one", Measure.DECODE, 1, 3, 2, Targets(0, 0, 0), Targets(0, 0, 0))
    several = Workload("several", Measure.DECODE, 2, 3, 2, Targets(0, 0, 0), Targets(0, 0, 0))
    rates = iter([1.0, 2.0, 3.0])
    comparison = Comparison([fake("a"), fake("b")], 100, tmp_path, lambda _: None, read_rate=lambda: next(rates))
    with comparison.started():
        comparison.turn(0, [several, single])
    assert comparison.measured.read_bytes_per_s == [1.0, 2.0]
