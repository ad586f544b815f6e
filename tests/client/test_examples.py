"""The examples run as they are, and so does the README's first one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.v1 import inference_pb2 as pb
from tests.client.fake_server import DEADLINE_S, FakeServer, delta, finished, says, started, streams

CLIENT = Path(__file__).parents[2] / "client"
EXAMPLES = CLIENT / "examples"


def run(name: str, target: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), target]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_stream(server: FakeServer) -> None:
    server.play(streams(started(), delta("ab", 1), finished(1, transfer_s=1.0, transfer_exposed_s=0.25)))
    done = run("stream.py", server.target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ab\n\nstop, ")
    assert "p0 -> d0: 75% of the KV transfer hidden" in done.stdout


def test_concurrent(server: FakeServer) -> None:
    server.play(*[says("x")] * 8)
    done = run("many_at_once.py", server.target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": 'x'") == 8


def test_stop_early_prints_one_line_and_cancels(server: FakeServer) -> None:
    server.play(server.holds(started(), delta("os\nimport", 1)))
    done = run("stop_early.py", server.target)
    assert done.stdout == "os\n", done.stderr
    assert server.cancelled.get(timeout=DEADLINE_S) == "import "


def test_status(server: FakeServer) -> None:
    server.answers.server.workers.add(worker_id="p0", role=pb.WORKER_ROLE_PREFILL, connected=True, device="cpu")
    done = run("cluster_status.py", server.target)
    assert done.returncode == 0, done.stderr
    assert "p0: prefill on cpu, connected" in done.stdout


def test_status_of_no_server_is_one_line_and_a_failure(server: FakeServer) -> None:
    server.stop()
    done = run("cluster_status.py", server.target)
    assert done.returncode == 1
    assert done.stderr.startswith(server.target)
    assert len(done.stderr.splitlines()) == 1


def test_every_example_has_its_test() -> None:
    source = Path(__file__).read_text()
    assert all(f'"{path.name}"' in source for path in EXAMPLES.glob("*.py"))


def test_first_example_of_the_readme(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    example = re.search(r"```python\n(.*?)```", (CLIENT / "README.md").read_text(), re.DOTALL)
    assert example
    server.play(says("a", "b"))
    exec(example[1].replace("127.0.0.1:50051", server.target), {})
    assert capsys.readouterr().out == "ab"
