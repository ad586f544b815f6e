"""Recorded and drawn loads: what is sent, when, and what it shares."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serve.command import make_plans
from benchmarks.serve.options import BenchServe
from benchmarks.serve.traces import TraceRow, read_trace
from benchmarks.serve.workload import Plan, Prompts, Scale, arrivals_s, random_lengths
from core.errors import ConfigError

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 23:59:59.5000000,374,44\r\n"
    "2023-11-17 00:00:01.0000000,396,109"
)
MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 500, "hash_ids": [0, 1, 2]},
    {"timestamp": 4500, "input_length": 1536, "output_length": 4, "hash_ids": [0, 1, 9]},
]


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "azure.csv"
    path.write_bytes(AZURE.encode())
    return path


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "mooncake.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(map(json.dumps, MOONCAKE)))
    return path


def test_an_azure_trace_is_read_over_midnight(azure: Path) -> None:
    assert read_trace(azure) == [TraceRow(0.0, 374, 44), TraceRow(1.5, 396, 109)]


def test_a_mooncake_trace_is_read_with_what_prompts_share(mooncake: Path) -> None:
    assert read_trace(mooncake) == [TraceRow(0.0, 1100, 500, (0, 1, 2)), TraceRow(3.5, 1536, 4, (0, 1, 9))]
    assert len(read_trace(mooncake, limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have at least one row"),
        ("TIMESTAMP,ContextTokens\n", "no GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,x,1\n", ":2', is no row of an Azure trace"),
        ('{"timestamp": 0, "input_length": 1}\n', ":1', is no row of a Mooncake trace: 'output_length'"),
    ],
    ids=["empty", "no column", "bad number", "no field"],
)
def test_a_bad_trace_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert message in str(caught.value)


def test_a_trace_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        read_trace(tmp_path / "missing.csv")


def test_scales_stretch_time_and_lengths_and_limits_come_after() -> None:
    scale = Scale(time=2.0, inputs=0.4, outputs=0.5, max_inputs=1024, max_outputs=100)
    assert scale.plan(3, TraceRow(5.0, 1000, 120)) == Plan(3, 10.0, 400, 60, (), 205)
    assert scale.plan(0, TraceRow(0.0, 9000, 900)).num_inputs == 1024
    assert scale.plan(0, TraceRow(0.0, 1, 0)) == Plan(0, 0.0, 1, 1, (), 205)


def test_prompts_that_share_hash_ids_share_just_those_tokens() -> None:
    prompts = Prompts(vocab_size=50_000)
    one = prompts.token_ids(Plan(0, 0.0, 1400, 1, (7, 8, 9)))
    other = prompts.token_ids(Plan(1, 0.0, 1536, 1, (7, 8, 10)))
    assert (len(one), len(other)) == (1400, 1536)
    assert one[:1024] == other[:1024]
    assert one[1024] != other[1024]


def test_shared_prefixes_are_scaled_with_the_lengths() -> None:
    scale, prompts = Scale(inputs=0.25), Prompts(vocab_size=50_000)
    rows = [TraceRow(0.0, 1100, 1, (0, 1, 2)), TraceRow(0.0, 1536, 1, (0, 1, 9))]
    one, other = (prompts.token_ids(scale.plan(i, row)) for i, row in enumerate(rows))
    assert (len(one), len(other)) == (275, 384)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    assert shared == 256


def test_prompts_are_those_of_the_seed_and_share_nothing_else() -> None:
    plan, next_plan = Plan(0, 0.0, 64, 1), Plan(1, 0.0, 64, 1)
    prompts = Prompts(vocab_size=1000, seed=5)
    assert prompts.token_ids(plan) == Prompts(1000, seed=5).token_ids(plan)
    assert prompts.token_ids(plan) != Prompts(1000, seed=6).token_ids(plan)
    assert prompts.token_ids(plan)[0:4] != prompts.token_ids(next_plan)[0:4]
    assert set(prompts.token_ids(Plan(2, 0.0, 5000, 1))) <= set(range(16, 1000))


def test_a_common_prefix_is_common() -> None:
    prompts = Prompts(vocab_size=1000)
    one, other = (prompts.token_ids(Plan(i, 0.0, 40, 1, prefix_tokens=30)) for i in range(2))
    assert one[:30] == other[:30]
    assert one[30:] != other[30:]


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(burstiness: float) -> None:
    due_s = arrivals_s(20_001, rate=5.0, burstiness=burstiness, seed=1)
    gaps = np.diff(due_s)
    assert due_s[0] == 0.0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert arrivals_s(3, float("inf"), 1.0, 0) == [0.0, 0.0, 0.0]


def test_lengths_lie_around_what_is_asked_for() -> None:
    assert random_lengths(3, 128, 0.0, [0]) == [128, 128, 128]
    lengths = random_lengths(1000, 100, 0.5, [1])
    assert (min(lengths), max(lengths)) == (50, 150)


def test_a_trace_is_replayed_at_its_own_times_or_at_a_rate(azure: Path) -> None:
    own = make_plans(BenchServe(trace=azure, time_scale=0.1, input_scale=0.5, max_output_len=50))
    assert [(plan.due_s, plan.num_inputs, plan.num_outputs) for plan in own] == [
        (0.0, 187, 44),
        (pytest.approx(0.15), 198, 50),
    ]
    drawn = make_plans(BenchServe(trace=azure, request_rate=3.0, seed=1))
    assert [plan.num_inputs for plan in drawn] == [374, 396]
    assert [plan.due_s for plan in drawn] == arrivals_s(2, 3.0, 1.0, 1)


def test_a_part_of_a_trace_begins_at_once(azure: Path) -> None:
    (plan,) = make_plans(BenchServe(trace=azure, trace_start=1, num_prompts=1))
    assert (plan.due_s, plan.num_inputs) == (0.0, 396)
    with pytest.raises(ConfigError, match="trace_start"):
        make_plans(BenchServe(trace=azure, trace_start=2))


def test_without_a_trace_lengths_and_times_are_drawn() -> None:
    plans = make_plans(BenchServe(num_prompts=4, random_input_len=7, random_prefix_len=3, request_rate=1.0))
    assert [(plan.num_inputs, plan.num_outputs, plan.prefix_tokens) for plan in plans] == [(10, 128, 3)] * 4
    assert plans == make_plans(BenchServe(num_prompts=4, random_input_len=7, random_prefix_len=3, request_rate=1.0))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"request_rate": 0.0}, "request_rate"),
        ({"vocab_size": 1}, "vocab_size"),
        ({"random_range_ratio": 1.0}, "random"),
    ],
)
def test_options_that_make_no_load_are_refused(options: dict[str, float], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        BenchServe(**options)  # type: ignore[arg-type]
