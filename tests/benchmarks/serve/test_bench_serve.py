"""`penstock bench serve` and `compare` as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve.known_server import KnownServer, serving
from benchmarks.serve.options import BenchCompare, BenchServe
from cluster.cli import main, parse
from penstock.v1 import inference_pb2 as pb
from tests.client.fake_server import FakeServer, says

SHORT = ("--num-prompts", "4", "--request-rate", "1000", "--random-input-len", "5", "--random-output-len", "2")


@pytest.fixture
def fake() -> Iterator[KnownServer]:
    with serving(KnownServer()) as server:
        yield server


def bench(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["bench", "serve", *arguments, "--json"]) == code
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_flags_are_those_of_vllm_bench_serve() -> None:
    flags = ["--base-url", "http://h:1", "--model", "m", "--request-rate", "2", "--num-prompts", "3", "--seed", "4"]
    flags += ["--burstiness", "0.5", "--max-concurrency", "6", "--goodput", "ttft:200", "tpot:50"]
    command = parse(["bench", "serve", *flags])
    assert command == BenchServe(
        base_url="http://h:1",
        model="m",
        request_rate=2.0,
        num_prompts=3,
        seed=4,
        burstiness=0.5,
        max_concurrency=6,
        goodput=("ttft:200", "tpot:50"),
    )
    assert parse(["bench", "serve", "--rate", "2"]) == BenchServe(request_rate=2.0)
    assert parse(["bench", "compare", "a", "b"]) == BenchCompare(Path("a"), Path("b"))


def test_a_load_is_reported_and_kept(fake: KnownServer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    flags = ("--base-url", fake.url, *SHORT, "--result-filename", str(path), "--goodput", "ttft:60000")
    result = bench(capsys, *flags, "--metadata", "machine=mine")
    assert (result["completed"], result["model_id"], result["machine"]) == (4, "tiny", "mine")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (12, 8)
    assert result["slo_attainment"] == 1.0
    assert json.loads(path.read_text()) == result
    assert all(request["model"] == "tiny" and len(request["prompt"]) == 5 for request in fake.requests)


def test_warm_ups_are_not_counted_and_share_no_prompt(fake: KnownServer, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(capsys, "--base-url", fake.url, *SHORT, "--num-warmups", "2")
    assert (result["completed"], len(fake.requests)) == (4, 6)
    assert len({tuple(request["prompt"]) for request in fake.requests}) == 6


def test_one_failure_fails_the_run_and_is_told(fake: KnownServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.status, fake.whole = "429 Busy", b'{"error": {"message": "later"}}'
    assert main(["bench", "serve", "--base-url", fake.url, *SHORT]) == 1
    assert "4 x HTTP 429: later" in capsys.readouterr().out


def test_two_results_are_compared_and_drawn(
    fake: KnownServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, other, picture = (tmp_path / name for name in ("one.json", "other.json", "both.png"))
    bench(capsys, "--base-url", fake.url, *SHORT, "--result-filename", str(one))
    flags = ("--base-url", fake.url, *SHORT, "--result-filename", str(other), "--label", "new")
    assert main(["bench", "serve", *flags, "--compare", str(one)]) == 0
    assert "B / A" in capsys.readouterr().out
    assert main(["bench", "compare", str(one), str(other), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "one" in out
    assert "new" in out
    assert picture.exists()


def test_our_own_grpc_is_a_backend_too(capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeServer()
    try:
        server.answers.model = pb.GetModelResponse(name="tiny", vocab_size=100)
        server.play(*[says("a", "b")] * 4)
        result = bench(capsys, "--backend", "penstock", "--base-url", server.target, *SHORT)
    finally:
        server.stop()
    assert (result["completed"], result["total_output_tokens"], result["model_id"]) == (4, 8, "tiny")
    assert all(max(request.token_ids.ids) < 100 for request in server.requests)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base-url", "http://127.0.0.1:1"], "http://127.0.0.1:1 is unavailable: can't reach 127.0.0.1:1"),
        (["--backend", "penstock", "--base-url", "127.0.0.1:1"], "127.0.0.1:1 is unavailable"),
    ],
    ids=["openai", "penstock"],
)
def test_nobody_there_is_one_line_and_code_1(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *SHORT, *flags]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"penstock: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--request-rate", "0"], "request_rate: got 0.0, must be > 0"),
        (["--goodput", "itl:5"], "goodput: got 'itl:5', must be METRIC:MS"),
        (["--percentile-metrics", "ttft,x"], "percentile_metrics: got 'x', must be some of"),
        (["--metric-percentiles", "50,101"], "metric_percentiles: got '50,101', must be numbers"),
        (["--header", "x"], "header: got 'x', must be KEY=VALUE"),
        (["--extra-body", "[]"], "extra_body: got '[]', must be a JSON object"),
        (["--base-url", "nowhere"], "base_url: got 'nowhere', must be a URL"),
        (["--trace", "missing.csv"], "trace: got 'missing.csv', can't be read"),
        (["--compare", "missing.json"], "result: got 'missing.json', can't be read"),
    ],
)
def test_a_bad_flag_is_one_line_and_code_2(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"penstock: {message}")
    assert err.count("\n") == 1
