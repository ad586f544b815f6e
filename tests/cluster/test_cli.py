"""The `penstock` command: flags become configurations; answers come from a real server, as text or one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.cli import EMBEDDED_MODEL, Bench, BenchEngine, Demo, Generate, Serve, Status, main, parse
from cluster.config import ClusterConfig, PoolConfig
from core.errors import ConfigError
from engine.config import EngineConfig
from penstock.v1 import inference_pb2 as pb
from router.access.keys import read_file
from router.config import DispatchConfig, RouterConfig
from tests.client.fake_server import FakeServer, delta, finished, refuses, says, started, streams

NOBODY = "127.0.0.1:1"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.stop()


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    """Run the command with --json; the one object that it printed."""
    assert main([*arguments, "--json"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    values: dict[str, Any] = json.loads(out)
    return values


# ---- flags


def test_flags_are_the_fields_of_the_configuration() -> None:
    command = parse(["serve", "--model", "/m", "--router.http-port", "0", "--decode.num-workers", "3"])
    expected = ClusterConfig(model=Path("/m"), router=RouterConfig(http_port=0), decode=PoolConfig(num_workers=3))
    assert command == Serve(expected)


def test_engine_flags_are_named_as_in_vllm() -> None:
    flags = ["--block-size", "32", "--max-num-seqs", "8", "--max-model-len", "100", "--gpu-memory-utilization", "0.5"]
    command = parse(["serve", "--model", "/m", *flags])
    assert isinstance(command, Serve)
    assert command.cluster.engine == EngineConfig(
        block_size=32, max_num_seqs=8, max_model_len=100, gpu_memory_utilization=0.5
    )


@pytest.mark.parametrize("spelling", [["--config", "{}"], ["--config={}"]], ids=["apart", "with ="])
def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path, spelling: list[str]) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("{model: /m, drain_timeout_s: 7, engine: {block_size: 8, num_blocks: 9}}")
    config = [part.format(path) for part in spelling]
    command = parse(["serve", "--block-size", "4", *config, "--router.dispatch.max-attempts", "2"])
    assert command == Serve(
        ClusterConfig(
            model=Path("/m"),
            drain_timeout_s=7.0,
            engine=EngineConfig(block_size=4, num_blocks=9),
            router=RouterConfig(dispatch=DispatchConfig(max_attempts=2)),
        ),
        config=path,
    )


def test_a_model_of_the_flags_wins_too(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("model: there")
    command = parse(["serve", "--config", str(path), "--model", "here"])
    assert isinstance(command, Serve)
    assert command.cluster.model == Path("here")


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["demo"], Demo(model=EMBEDDED_MODEL)),
        (["demo", "def f(", "--launcher", "subprocess", "--json"], Demo("def f(", launcher="subprocess", json=True)),
        (["generate", "hi", "--top-p", "0.5", "--stop", "a", "b"], Generate("hi", top_p=0.5, stop=("a", "b"))),
        (["status", "--target", "h:1"], Status("h:1")),
        (["bench", "--rate", "2.5", "--num-requests", "3"], Bench(rate=2.5, num_requests=3)),
        (["bench", "engine", "--quick", "--models", "a", "b"], BenchEngine(quick=True, models=("a", "b"))),
    ],
    ids=["demo", "demo with flags", "generate", "status", "bench", "bench engine"],
)
def test_every_command_has_its_flags(arguments: list[str], command: object) -> None:
    assert parse(arguments) == command


@pytest.mark.parametrize(
    "arguments",
    [[], ["serv"], ["serve"], ["serve", "--model", "/m", "--block-siz", "3"], ["generate"], ["bench", "-n"]],
)
def test_wrong_usage_ends_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


# ---- bad configurations


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/m", "--block-size", "0"], "engine.block_size: got 0, must be >= 1"),
        (["--model", "/m", "--prefill.num-workers", "-1"], "prefill.num_workers: got -1, must be >= 0"),
        (["--model", "/m", "--router.grpc-port", "70000"], "router.grpc_port: got 70000, must be a port, or 0 for"),
        (["--config", "missing.yaml"], "config: got 'missing.yaml', can't be read: No such file or directory"),
    ],
    ids=["engine", "pool", "router", "no file"],
)
def test_a_bad_configuration_is_one_line_and_code_2(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"penstock: {message}")
    assert err.count("\n") == 1


def test_a_mistake_in_the_file_is_told_before_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("{model: /m, engine: {blok_size: 1}}")
    with pytest.raises(ConfigError, match="did you mean 'block_size'"):
        parse(["serve", "--config", str(path), "--no-such-flag"])


def test_a_folder_without_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--launcher", "subprocess", "--json", "--model", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"penstock: {tmp_path}/config.json: no such file")
    assert err.count("\n") == 1


# ---- generate


def test_generate_prints_the_text_as_it_comes(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.play(says("Hel", "lo"))
    assert main(["generate", "hi", "--target", server.target, "--max-tokens", "2", "--stop", "x", "y"]) == 0
    assert capsys.readouterr().out == "Hello\n"
    (request,) = server.requests
    assert (request.prompt, request.sampling.max_tokens, [*request.sampling.stop]) == ("hi", 2, ["x", "y"])
    assert not request.sampling.HasField("temperature")


def test_generate_sends_a_message_with_chat(server: FakeServer) -> None:
    server.play(says("ok"))
    assert main(["generate", "hi", "--chat", "--target", server.target]) == 0
    assert [(m.role, m.content) for m in server.requests[0].messages.messages] == [("user", "hi")]


def test_generate_answers_with_one_object(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.play(streams(started(seed=5), delta("a", 1, 2), delta("b", 3), finished(3, kv_bytes=12, ttft_s=0.5)))
    got = answer(capsys, "generate", "hi", "--target", server.target)
    stats = got.pop("stats")
    assert got == {
        "request_id": "req-1",
        "model": "tiny",
        "text": "ab",
        "token_ids": [1, 2, 3],
        "finish_reason": "stop",
        "seed": 5,
        "usage": {"num_prompt_tokens": 3, "num_output_tokens": 3},
    }
    assert (stats["prefill_worker"], stats["decode_worker"], stats["kv_bytes"]) == ("p0", "d0", 12)
    assert (stats["ttft_s"], stats["queue_s"]) == (0.5, None)


def test_a_refused_request_is_one_line(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.play(refuses(grpc.StatusCode.INVALID_ARGUMENT, "top_p: got 7, must be in (0, 1]"))
    assert main(["generate", "hi", "--target", server.target, "--json"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "penstock: top_p: got 7, must be in (0, 1]\n")


# ---- status


def worker(worker_id: str, role: pb.WorkerRole.ValueType, *, connected: bool = True) -> pb.WorkerInfo:
    return pb.WorkerInfo(worker_id=worker_id, role=role, connected=connected, num_blocks=8, num_free_blocks=6)


PREFILL = worker("prefill-0", pb.WORKER_ROLE_PREFILL)
DECODE = worker("decode-0", pb.WORKER_ROLE_DECODE)
MIXED = worker("mixed-0", pb.WORKER_ROLE_MIXED)
LOST = worker("mixed-0", pb.WORKER_ROLE_MIXED, connected=False)
UP = pb.PairInfo(prefill_worker="prefill-0", decode_worker="decode-0", epoch=2, up=True, transport="shm")
DOWN = pb.PairInfo(prefill_worker="prefill-0", decode_worker="decode-0", epoch=2, reason="no peer")


@pytest.mark.parametrize(
    ("workers", "pairs", "code"),
    [([PREFILL, DECODE], [UP], 0), ([PREFILL, DECODE], [DOWN], 1), ([MIXED], [], 0), ([LOST], [], 1), ([], [], 1)],
    ids=["pair up", "pair down", "mixed", "mixed lost", "nobody"],
)
def test_status_tells_by_its_code_whether_the_cluster_can_serve(
    server: FakeServer,
    workers: list[pb.WorkerInfo],
    pairs: list[pb.PairInfo],
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answers.server = pb.GetServerInfoResponse(model="tiny", workers=workers, pairs=pairs)
    got = answer(capsys, "status", "--target", server.target, code=code)
    assert [w["worker_id"] for w in got["workers"]] == [w.worker_id for w in workers]
    assert [pair["up"] for pair in got["pairs"]] == [pair.up for pair in pairs]


def test_status_shows_what_carries_a_pairs_payload(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers.server = pb.GetServerInfoResponse(model="tiny", workers=[PREFILL, DECODE], pairs=[UP])
    assert main(["status", "--target", server.target]) == 0
    assert "up over shm" in capsys.readouterr().out


def test_status_shows_workers_and_why_a_pair_is_down(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers.server = pb.GetServerInfoResponse(model="tiny", workers=[PREFILL, DECODE, LOST], pairs=[DOWN])
    assert main(["status", "--target", server.target]) == 1
    out = capsys.readouterr().out
    for text in ("tiny", "prefill-0", "decode-0", "6/8", "lost", "down: no peer"):
        assert text in out


# ---- bench


def test_bench_answers_with_one_object(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers.model.vocab_size = 100
    server.play(*[says("a", "b", "c")] * 4)
    flags = ("--num-requests", "4", "--max-concurrency", "2", "--prompt-tokens", "5", "--output-tokens", "3")
    got = answer(capsys, "bench", "--target", server.target, *flags)
    assert (got["num_requests"], got["num_failed"], got["num_output_tokens"]) == (4, 0, 12)
    assert got["ttft_s"]["p50"] > 0
    assert all(len(request.token_ids.ids) == 5 and max(request.token_ids.ids) < 100 for request in server.requests)
    assert all(request.sampling.max_tokens == 3 for request in server.requests)


def test_bench_fails_where_a_request_did(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers.model.vocab_size = 100
    server.play(says("a"), refuses(grpc.StatusCode.INTERNAL, "broken"))
    flags = ("--num-requests", "2", "--max-concurrency", "1", "--rate", "1000")
    assert main(["bench", "--target", server.target, *flags]) == 1
    out = capsys.readouterr().out
    assert "1 failed" in out
    assert "INTERNAL" in out
    assert "TTFT" in out


# ---- nobody there


@pytest.mark.parametrize("command", [["generate", "hi"], ["status"], ["bench"]], ids=lambda command: command[0])
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_a_target_that_is_not_there_is_one_line_and_code_1(
    command: list[str], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--target", NOBODY, *flags]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"penstock: {NOBODY} is unavailable: ")
    assert err.count("\n") == 1


# ---- what is loaded

PROBE = """
import sys
from cluster.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "ray", "transformers", "numpy"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else code)
"""


@pytest.mark.parametrize("command", [["generate", "hi"], ["status"]], ids=["generate", "status"])
def test_a_command_loads_only_what_it_needs(server: FakeServer, command: list[str]) -> None:
    server.play(says("ok"))
    server.answers.server = pb.GetServerInfoResponse(model="tiny", workers=[MIXED])
    arguments = [sys.executable, "-c", PROBE, *command, "--target", server.target]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_installed_command_is_this_one() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("penstock"), "status", "--target", NOBODY],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"penstock: {NOBODY} is unavailable: ")


def test_a_key_is_made_once_and_its_hash_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    arguments = ["keys", "add", "team-a", "--file", str(path), "--tokens-per-minute", "90", "--json"]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    (record,) = read_file(path)
    assert record.matches(told["key"])
    assert (record.id, record.tokens_per_minute, record.admin) == ("team-a", 90, False)
    assert main(arguments) == 2
    assert "id: got 'team-a', is in" in capsys.readouterr().err
